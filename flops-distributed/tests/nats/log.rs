//! What a log keeps: entries, checkpoints, and what strangers write.

use std::collections::HashSet;
use std::thread;

use flops_distributed::{Entry, Key, Log, NatsLog};

use crate::server::Server;
use crate::{claim, entries, noise, nothing, result, round};

#[test]
fn the_first_writer_wins_and_all_see_one_order() {
    let Some(server) = Server::with_jetstream() else { return };
    let (one, two) = (server.log(), server.log());
    assert_ne!(one.worker(), two.worker());
    assert!(one.put(&Key::Identity, b"one").unwrap());
    assert!(!two.put(&Key::Identity, b"two").unwrap());
    // twice from the same worker
    assert!(!one.put(&Key::Identity, b"one").unwrap());
    for job in 0..20 {
        let (writer, other) = if job % 2 == 0 { (&one, &two) } else { (&two, &one) };
        assert!(writer.put(&claim(3, job), writer.worker().as_bytes()).unwrap());
        assert!(!other.put(&claim(3, job), b"late").unwrap());
    }
    let late = server.log();
    let seen = entries(&one, 21);
    assert_eq!(seen[0], Entry { key: Key::Identity, bytes: b"one".to_vec() });
    assert_eq!(seen[6], Entry { key: claim(3, 5), bytes: two.worker().into() });
    for log in [&two, &late] {
        assert_eq!(entries(log, 21), seen);
        assert!(nothing(log));
    }
    let traffic = late.traffic();
    assert!(traffic.received > 21 * 17 && traffic.sent == 0, "{traffic:?}");
}

#[test]
fn entries_that_nobody_waits_for_come_in_order() {
    let Some(server) = Server::with_jetstream() else { return };
    let (one, two) = (server.log(), server.log());
    assert!(two.put(&claim(3, 7), b"two").unwrap());
    // some are larger than a message
    let bytes = |job: usize| noise(if job.is_multiple_of(5) { 3 << 20 } else { 10 }, job as u64);
    for job in 0..20 {
        one.send(&claim(3, job), bytes(job)).unwrap();
    }
    assert!(one.put(&claim(3, 20), b"last").unwrap() && !one.is_writing());
    let sent = (0..20).filter(|&job| job != 7).map(|job| Entry { key: claim(3, job), bytes: bytes(job) });
    let first = Entry { key: claim(3, 7), bytes: b"two".to_vec() };
    let last = Entry { key: claim(3, 20), bytes: b"last".to_vec() };
    let all: Vec<Entry> = [first].into_iter().chain(sent).chain([last]).collect();
    for log in [&one, &two] {
        assert_eq!(entries(log, 21), all);
        assert!(nothing(log));
    }
}

#[test]
fn writers_at_the_same_time_have_one_winner() {
    let Some(server) = Server::with_jetstream() else { return };
    let logs = [server.log(), server.log(), server.log()];
    let wins: Vec<Vec<usize>> = thread::scope(|scope| {
        let write = |log| move || (0..200).filter(|&job| NatsLog::put(log, &claim(0, job), b"mine").unwrap()).collect();
        logs.iter()
            .map(|log| scope.spawn(write(log)))
            .collect::<Vec<_>>()
            .into_iter()
            .map(|done| done.join().unwrap())
            .collect()
    });
    let all: Vec<usize> = wins.concat();
    assert_eq!((all.len(), all.iter().collect::<HashSet<_>>().len()), (200, 200));
    let seen = entries(&logs[0], 200);
    assert_eq!(entries(&logs[1], 200), seen);
}

#[test]
fn entries_larger_than_a_message_are_whole() {
    for config in ["jetstream {}", "max_payload: 8192\njetstream {}"] {
        let Some(server) = Server::start(config) else { return };
        let (one, two) = (server.log(), server.log());
        let len = if config.starts_with("max") { 300_000 } else { 3_500_000 };
        let (first, second) = (noise(len, 1), noise(len, 2));
        assert!(one.put(&result(7, 0), &first).unwrap());
        assert!(two.put(&claim(7, 1), b"small").unwrap());
        assert!(two.put(&result(7, 1), &second).unwrap());
        let before = server.stored();
        assert!(!two.put(&result(7, 0), &second).unwrap());
        assert!(one.put(&Key::Identity, &first).unwrap());
        for log in [&one, &two, &server.log()] {
            let seen = entries(log, 4);
            assert_eq!([&seen[0].key, &seen[1].key, &seen[2].key], [&result(7, 0), &claim(7, 1), &result(7, 1)]);
            assert!(seen[0].bytes == first && seen[2].bytes == second && seen[3].bytes == first);
        }
        // what lost was removed, though a file may not shrink at once
        assert!(server.stored() < before + 3 * len as u64, "{} {before}", server.stored());
        one.trim(8).unwrap();
        let late = server.log();
        assert_eq!(entries(&late, 1)[0].bytes, first);
        assert!(nothing(&late));
    }
}

#[test]
fn past_steps_are_trimmed_and_cannot_be_written() {
    let Some(server) = Server::with_jetstream() else { return };
    let (one, two) = (server.log(), server.log());
    one.put(&Key::Identity, b"run").unwrap();
    one.put(&Key::Joined(one.worker().into()), b"").unwrap();
    for step in 0..30 {
        one.put(&Key::Weights(step), b"hash").unwrap();
        two.put(&result(step, 0), b"result").unwrap();
    }
    two.trim(28).unwrap();
    two.trim(20).unwrap();
    let late = server.log();
    let keys: Vec<Key> = entries(&late, 6).into_iter().map(|entry| entry.key).collect();
    let joined = Key::Joined(one.worker().into());
    assert_eq!(keys, [Key::Identity, joined, Key::Weights(28), result(28, 0), Key::Weights(29), result(29, 0)]);
    assert!(nothing(&late));
    // the others have all entries, and know that the steps are past
    assert_eq!(entries(&one, 62).len(), 62);
    assert!(nothing(&one));
    for log in [&one, &two, &late] {
        let message = log.put(&claim(27, 0), b"").unwrap_err().to_string();
        assert!(message.contains("no log of step 27 any more: it starts with step 28"), "{message}");
        log.put(&Key::Done(round(28)), b"").unwrap();
    }
    one.trim(29).unwrap();
    assert_eq!(entries(&server.log(), 4).len(), 4);
}

#[test]
fn the_latest_whole_checkpoint_is_found() {
    let Some(server) = Server::with_jetstream() else { return };
    let (one, two) = (server.log(), server.log());
    assert_eq!(one.checkpoint().unwrap(), None);
    let bytes = noise(5_000_000, 9);
    one.put_checkpoint(100, &bytes).unwrap();
    assert!(two.checkpoint().unwrap().unwrap() == (100, bytes.clone()));
    // of an earlier step, and once more of the same one
    two.put_checkpoint(90, b"old").unwrap();
    two.put_checkpoint(100, b"again").unwrap();
    assert!(one.checkpoint().unwrap().unwrap() == (100, bytes.clone()));
    two.put_checkpoint(200, b"small").unwrap();
    assert_eq!(one.checkpoint().unwrap(), Some((200, b"small".to_vec())));
    // one whose parts are missing, and one that is nothing, are passed over
    let mut hollow = [&b"P"[..], &[1; 16]].concat();
    hollow.extend([1000u64, 1000, 5].map(u64::to_le_bytes).as_flattened());
    server.publish(&[("flops.run-1.checkpoint.300", &hollow), ("flops.run-1.checkpoint.400", b"nothing")]);
    assert_eq!(one.checkpoint().unwrap(), Some((200, b"small".to_vec())));
    // checkpoints are not entries
    assert!(nothing(&one));
    one.put_checkpoint(500, &bytes).unwrap();
    one.trim(500).unwrap();
    assert!(server.log().checkpoint().unwrap().unwrap() == (500, bytes));
}

#[test]
fn entries_of_a_stranger_change_nothing() {
    let Some(server) = Server::with_jetstream() else { return };
    let log = server.log();
    log.put(&Key::Identity, b"run").unwrap();
    let huge = |count: u64| {
        let numbers = [u64::MAX, count, 7].map(u64::to_le_bytes);
        [&b"P"[..], &[3; 16], numbers.as_flattened()].concat()
    };
    let name = |key: Key| format!("flops.run-1.log.{key}");
    let taken = [name(result(1, 0)), name(result(1, 1)), name(result(1, 2)), name(claim(1, 5))];
    server.publish(&[
        ("flops.run-1.log.nonsense", b"x"),
        ("flops.run-1.log.claim.1.0.update.zz.0.0", b"x"),
        ("flops.run-1.log.trimmed.many", b"x"),
        ("flops.run-1.else", b"x"),
        ("flops.another.log.identity", b"x"),
        (&taken[0], b""),
        (&taken[1], &huge(u64::MAX)),
        (&taken[2], &huge(1)),
        (&taken[3], b"no envelope"),
    ]);
    // what a stranger took is taken, and everybody sees it
    assert!(!log.put(&result(1, 0), b"mine").unwrap());
    assert!(log.put(&result(1, 3), b"mine").unwrap());
    let late = server.log();
    for log in [&log, &late] {
        let seen = entries(log, 6);
        let keys: Vec<&Key> = seen.iter().map(|entry| &entry.key).collect();
        assert_eq!(keys, [&Key::Identity, &result(1, 0), &result(1, 1), &result(1, 2), &claim(1, 5), &result(1, 3)]);
        let bytes: Vec<&[u8]> = seen[1..].iter().map(|entry| &entry.bytes[..]).collect();
        assert_eq!(bytes, [b"", &huge(u64::MAX)[..], &huge(1), b"no envelope", b"mine"]);
        assert!(nothing(log));
        // what is no entry; who reads the others refuses what they say
        assert_eq!(log.traffic().refused, 3);
    }
}

#[test]
fn a_run_can_be_deleted() {
    let Some(server) = Server::with_jetstream() else { return };
    let log = server.log();
    log.put(&Key::Identity, b"run").unwrap();
    drop(log);
    assert!(NatsLog::delete(&server.options()).unwrap());
    assert!(!NatsLog::delete(&server.options()).unwrap());
    assert!(nothing(&server.log()));
}

#[test]
fn a_worker_that_took_part_says_that_it_leaves() {
    let Some(server) = Server::with_jetstream() else { return };
    let (one, two) = (server.log(), server.log());
    let name = one.worker().to_string();
    one.put(&Key::Joined(name.clone()), b"").unwrap();
    drop(one);
    let seen = entries(&two, 2);
    assert_eq!(seen[1], Entry { key: Key::Left(name), bytes: b"left".to_vec() });
    drop(two);
    let three = server.log();
    entries(&three, 2);
    assert!(nothing(&three), "who did not take part does not leave");
}
