//! Logs on NATS servers that these tests start.
#![cfg(feature = "nats")]

mod fake;

use std::collections::HashSet;
use std::env;
use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use fake::{Fake, Fate};
use flops_distributed::{Elastic, ElasticOptions, Entry, Key, Log, NatsAuth, NatsLog, NatsOptions, RoundKey, SumMode};
use flops_executor::{Executor, ExecutorError, Round, RoundPhase, RunIdentity, Threads};

/// A server with a store of its own.
struct Server {
    child: Option<Child>,
    folder: tempfile::TempDir,
    port: u16,
    config: String,
}

impl Server {
    /// Starts a server. None where there is no nats-server.
    fn start(config: &str) -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let mut server = Self { child: None, folder, port, config: config.into() };
        server.up().then_some(server)
    }

    fn with_jetstream() -> Option<Self> {
        Self::start("jetstream {}")
    }

    /// Starts it, or starts it again on its store.
    fn up(&mut self) -> bool {
        let folder = self.folder.path().display().to_string();
        let config = self.config.replace("jetstream {}", &format!("jetstream {{ store_dir: \"{folder}/store\" }}"));
        let path = self.folder.path().join("server.conf");
        fs::write(&path, config.replace("FOLDER", &folder)).unwrap();
        let mut command = Command::new("nats-server");
        command.args(["-a", "127.0.0.1", "-p", &self.port.to_string(), "-c"]).arg(path);
        let quiet = if env::var_os("FLOPS_TEST_LOUD").is_some() { Stdio::inherit() } else { Stdio::null() };
        match command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(quiet).spawn() {
            Ok(child) => self.child = Some(child),
            Err(_) => {
                eprintln!("skipped: nats-server is not installed");
                return false;
            }
        }
        let start = Instant::now();
        while TcpStream::connect(("127.0.0.1", self.port)).is_err() {
            assert!(start.elapsed() < Duration::from_secs(10), "nats-server does not start");
            thread::sleep(Duration::from_millis(10));
        }
        true
    }

    fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    fn url(&self) -> String {
        format!("nats://127.0.0.1:{}", self.port)
    }

    fn options(&self) -> NatsOptions {
        NatsOptions { limit: Duration::from_secs(15), ..NatsOptions::new([self.url()], "run-1") }
    }

    fn log(&self) -> NatsLog {
        NatsLog::connect(&self.options(), "worker").unwrap()
    }

    /// Publishes as a stranger would, in the plain protocol.
    fn publish(&self, messages: &[(&str, &[u8])]) {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).unwrap();
        stream.write_all(b"CONNECT {\"verbose\":false}\r\n").unwrap();
        for (subject, payload) in messages {
            stream.write_all(format!("PUB {subject} {}\r\n", payload.len()).as_bytes()).unwrap();
            stream.write_all(payload).unwrap();
            stream.write_all(b"\r\n").unwrap();
        }
        stream.write_all(b"PING\r\n").unwrap();
        let mut seen = vec![];
        while !seen.windows(4).any(|part| part == b"PONG") {
            let mut bytes = [0; 512];
            let read = stream.read(&mut bytes).unwrap();
            assert!(read > 0, "{}", String::from_utf8_lossy(&seen));
            seen.extend(&bytes[..read]);
        }
    }

    /// Bytes that the server stores.
    fn stored(&self) -> u64 {
        fn size(path: &Path) -> u64 {
            let Ok(all) = fs::read_dir(path) else { return 0 };
            all.flatten()
                .map(|file| {
                    if file.path().is_dir() { size(&file.path()) } else { file.metadata().map_or(0, |data| data.len()) }
                })
                .sum()
        }
        size(&self.folder.path().join("store"))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}

fn round(step: u64) -> RoundKey {
    RoundKey { step, further: 0, phase: RoundPhase::Update, digest: 0xD16E57 }
}

fn result(step: u64, job: usize) -> Key {
    Key::Result { round: round(step), start: job, end: job + 1, generation: 0 }
}

fn claim(step: u64, leaf: usize) -> Key {
    Key::Claim { round: round(step), leaf, generation: 0 }
}

/// Bytes that are not alike anywhere.
fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut next = || {
        state = state.wrapping_mul(0x5851_F42D_4C95_7F2D).wrapping_add(0x1405_7B7E_F767_814F);
        (state >> 56) as u8
    };
    (0..len).map(|_| next()).collect()
}

/// The next entries, which must come.
fn entries(log: &dyn Log, count: usize) -> Vec<Entry> {
    let next = |_| log.next(Duration::from_secs(10)).unwrap().expect("an entry");
    (0..count).map(next).collect()
}

fn nothing(log: &dyn Log) -> bool {
    log.next(Duration::from_millis(150)).unwrap().is_none()
}

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
fn a_server_that_is_killed_and_comes_back_changes_nothing() {
    let Some(mut server) = Server::with_jetstream() else { return };
    let logs = [server.log(), server.log()];
    let ended = AtomicBool::new(false);
    let (wins, downs) = thread::scope(|scope| {
        let write = |log| {
            move || {
                let size = |job| if job % 10 == 0 { 1_500_000 } else { 100 };
                let mut wins = vec![];
                for job in 0..300 {
                    thread::sleep(Duration::from_millis(5));
                    if NatsLog::put(log, &result(1, job), &noise(size(job), job as u64)).unwrap() {
                        wins.push(job);
                    }
                }
                wins
            }
        };
        let writers: Vec<_> = logs.iter().map(|log| scope.spawn(write(log))).collect();
        let ended = &ended;
        let server = &mut server;
        let killer = scope.spawn(move || {
            let mut downs = 0;
            while !ended.load(Ordering::Relaxed) && downs < 3 {
                thread::sleep(Duration::from_millis(400));
                server.kill();
                thread::sleep(Duration::from_millis(300));
                server.up();
                downs += 1;
            }
            downs
        });
        let wins: Vec<Vec<usize>> = writers.into_iter().map(|writer| writer.join().unwrap()).collect();
        ended.store(true, Ordering::Relaxed);
        (wins, killer.join().unwrap())
    });
    assert!(downs > 0);
    let mut all = wins.concat();
    all.sort_unstable();
    assert_eq!(all, (0..300).collect::<Vec<_>>(), "each entry has one writer");
    let seen = entries(&logs[0], 300);
    assert_eq!(seen.iter().map(|entry| &entry.key).collect::<HashSet<_>>().len(), 300);
    assert!(entries(&logs[1], 300) == seen && entries(&server.log(), 300) == seen);
    assert!(logs.iter().all(|log| nothing(log)));
}

#[test]
fn a_server_that_stays_away_is_lost_within_the_limit() {
    let Some(mut server) = Server::with_jetstream() else { return };
    let options = NatsOptions { limit: Duration::from_secs(2), ..server.options() };
    let log = NatsLog::connect(&options, "worker").unwrap();
    log.put(&Key::Identity, b"run").unwrap();
    entries(&log, 1);
    server.kill();
    let start = Instant::now();
    assert_eq!(log.next(Duration::from_millis(200)).unwrap(), None);
    let message = log.put(&claim(0, 0), b"").unwrap_err().to_string();
    assert!(message.contains("has not taken an entry within 2s") && message.contains(&server.url()), "{message}");
    let message = log.next(Duration::from_secs(60)).unwrap_err().to_string();
    assert!(message.contains("has been lost for 2s") && message.contains("last checkpoint"), "{message}");
    for message in [
        log.trim(5).unwrap_err().to_string(),
        log.checkpoint().unwrap_err().to_string(),
        log.put_checkpoint(1, b"").unwrap_err().to_string(),
    ] {
        assert!(message.contains("within 2s"), "{message}");
    }
    let message = NatsLog::connect(&options, "worker").unwrap_err().to_string();
    assert!(message.contains("see that it runs"), "{message}");
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
    drop(log);
}

#[test]
fn a_server_that_lost_its_store_is_told() {
    let Some(mut server) = Server::with_jetstream() else { return };
    let log = server.log();
    log.put(&Key::Identity, b"run").unwrap();
    entries(&log, 1);
    server.kill();
    fs::remove_dir_all(server.folder.path().join("store")).unwrap();
    server.up();
    let start = Instant::now();
    let message = loop {
        match log.next(Duration::from_secs(10)) {
            Ok(Some(entry)) => panic!("{entry:?}"),
            Ok(None) => assert!(start.elapsed() < Duration::from_secs(20)),
            Err(why) => break why.to_string(),
        }
    };
    assert!(message.contains("has no log of the run run-1 any more"), "{message}");
}

#[test]
fn a_user_is_let_in_and_others_are_not() {
    let config = "jetstream {}\nauthorization { users: [{ user: ann, password: open }] }";
    let Some(server) = Server::start(config) else { return };
    let user = |password: &str| NatsAuth::User { name: "ann".into(), password: password.into() };
    let options = |auth| NatsOptions { auth, ..server.options() };
    let log = NatsLog::connect(&options(user("open")), "worker").unwrap();
    assert!(log.put(&Key::Identity, b"run").unwrap());
    let start = Instant::now();
    for auth in [user("shut"), NatsAuth::None, NatsAuth::Token("open".into())] {
        let message = NatsLog::connect(&options(auth), "worker").unwrap_err().to_string();
        assert!(message.contains("authorization violation; give the token"), "{message}");
    }
    assert!(start.elapsed() < Duration::from_secs(5));
    let config = "jetstream {}\nauthorization { token: open }";
    let server = Server::start(config).unwrap();
    let options = |token: &str| NatsOptions { auth: NatsAuth::Token(token.into()), ..server.options() };
    assert!(NatsLog::connect(&options("open"), "worker").unwrap().put(&Key::Identity, b"run").unwrap());
    assert!(NatsLog::connect(&options("shut"), "worker").is_err());
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
        assert_eq!((&seen[4].bytes[..], &seen[5].bytes[..]), (&b"no envelope"[..], &b"mine"[..]));
        assert!(nothing(log));
        assert_eq!(log.refused(), 7);
    }
}

#[test]
fn an_address_that_does_not_answer_is_passed_over() {
    let Some(server) = Server::with_jetstream() else { return };
    // one that says nothing, and one where nobody listens
    let mute = TcpListener::bind("127.0.0.1:0").unwrap();
    let absent = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let addresses = [format!("nats://{}", mute.local_addr().unwrap()), format!("nats://{absent}"), server.url()];
    let options = NatsOptions { limit: Duration::from_secs(1), ..NatsOptions::new(addresses, "run-1") };
    // they are tried in any order
    let logs = [(); 5].map(|()| NatsLog::connect(&options, "worker").unwrap());
    assert!(logs[0].put(&Key::Identity, b"run").unwrap());
    assert_eq!(entries(&logs[4], 1).len(), 1);
    // alone, they are waited for up to the limit
    let alone = NatsOptions { servers: options.servers[..1].to_vec(), ..options };
    let start = Instant::now();
    let message = NatsLog::connect(&alone, "worker").unwrap_err().to_string();
    assert!(message.contains("see that it runs") && start.elapsed() < Duration::from_secs(5), "{message}");
}

#[test]
fn what_is_wrong_with_a_server_is_named() {
    let Some(server) = Server::start("max_connections: 100") else { return };
    let options = NatsOptions { limit: Duration::from_secs(1), ..server.options() };
    let message = NatsLog::connect(&options, "worker").unwrap_err().to_string();
    assert!(message.contains("nats-server -js"), "{message}");
    for (options, part) in [
        (NatsOptions { run: "a.b".into(), ..options.clone() }, "\"a.b\""),
        (NatsOptions { servers: vec!["nats://a b".into()], ..options.clone() }, "\"nats://a b\""),
    ] {
        let message = NatsLog::connect(&options, "worker").unwrap_err().to_string();
        assert!(message.contains(part), "{message}");
    }
    assert!(NatsLog::connect(&options, "a worker").unwrap_err().to_string().contains("name of the worker"));
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

/// What all workers of the run have in common.
fn identity() -> RunIdentity {
    RunIdentity::new(vec![("space".into(), "weights".into())], (0, 7))
}

/// Rounds of some steps with sums of a size, and a hash of what they gave. A worker may abort in a step.
fn steps(executor: &dyn Executor, steps: u64, values: usize, aborts: Option<u64>) -> Result<u64, ExecutorError> {
    let mut hash = 0;
    for step in 0..steps {
        for (phase, jobs) in
            [(RoundPhase::Clean, 8), (RoundPhase::SiteCheck, 1), (RoundPhase::Query, 8), (RoundPhase::Update, 8)]
        {
            let round = Round::new((step, 0), phase, step ^ 0xD16E57, jobs);
            let mut fake = Fake { pause: Duration::from_micros(300), ..Fake::new(round, values) };
            if aborts == Some(step) && phase == RoundPhase::Query {
                fake.fates = (0..jobs).map(|leaf| (leaf, Fate::Aborts)).collect();
            }
            executor.run(&round, &mut fake)?;
            hash = fake::mix(hash ^ fake.hash().expect("all jobs are done"));
        }
    }
    Ok(hash)
}

fn elastic(log: NatsLog, workers: usize, sum_mode: SumMode) -> Elastic {
    let (patience, limit) = (Duration::from_millis(800), Duration::from_secs(20));
    let elastic = Elastic::new(log, ElasticOptions { min_workers: workers, patience, limit, sum_mode });
    elastic.begin(&identity()).unwrap();
    elastic
}

/// A link that takes 5 ms in each direction, and loses one part of a hundred: as TCP then waits for its
/// retransmission, such a part comes 200 ms late, and what follows it waits. Returns its port.
fn slow_link(to: u16) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let carry = |mut from: TcpStream, mut to: TcpStream, seed: u64| {
        let (sender, receiver) = mpsc::channel::<(Instant, Vec<u8>)>();
        thread::spawn(move || {
            for (due, bytes) in receiver {
                thread::sleep(due.saturating_duration_since(Instant::now()));
                if to.write_all(&bytes).is_err() {
                    return;
                }
            }
        });
        thread::spawn(move || {
            let (mut buffer, mut part) = ([0; 1400], seed);
            while let Ok(read @ 1..) = from.read(&mut buffer) {
                part += 1;
                let is_lost = part.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32 & 0xffff < 655;
                let delay = if is_lost { 205 } else { 5 };
                if sender.send((Instant::now() + Duration::from_millis(delay), buffer[..read].to_vec())).is_err() {
                    return;
                }
            }
        });
    };
    thread::spawn(move || {
        for (number, client) in listener.incoming().flatten().enumerate() {
            let server = TcpStream::connect(("127.0.0.1", to)).unwrap();
            client.set_nodelay(true).unwrap();
            server.set_nodelay(true).unwrap();
            carry(client.try_clone().unwrap(), server.try_clone().unwrap(), 1000 * number as u64);
            carry(server, client, 1000 * number as u64 + 500);
        }
    });
    port
}

/// One worker beside the server, two behind a slow link: the bits of one process, in every mode.
#[test]
fn workers_behind_a_slow_link_change_nothing() {
    for sum_mode in [SumMode::Gradients, SumMode::Scalars] {
        let Some(server) = Server::with_jetstream() else { return };
        let url = format!("nats://127.0.0.1:{}", slow_link(server.port));
        let far = NatsOptions { servers: vec![url], ..server.options() };
        let alone = steps(&Threads, 6, 1000, None).unwrap();
        let logs = [server.log(), NatsLog::connect(&far, "far").unwrap(), NatsLog::connect(&far, "far").unwrap()];
        let hashes: Vec<u64> = thread::scope(|scope| {
            let run = |log| move || steps(&elastic(log, 3, sum_mode), 6, 1000, None).unwrap();
            let running = logs.map(|log| scope.spawn(run(log)));
            running.into_iter().map(|worker| worker.join().unwrap()).collect()
        });
        assert_eq!(hashes, [alone; 3], "{sum_mode}");
    }
}

#[test]
fn workers_give_the_bits_of_one_while_the_server_comes_and_goes() {
    for (workers, sum_mode, values, dies) in [
        (1, SumMode::Gradients, 1000, false),
        (2, SumMode::Gradients, 400_000, false),
        (3, SumMode::Gradients, 1000, true),
        (2, SumMode::Scalars, 1000, true),
        (2, SumMode::Auto, 1000, false),
    ] {
        let Some(mut server) = Server::with_jetstream() else { return };
        let count = if values > 1000 { 4 } else { 40 };
        let alone = steps(&Threads, count, values, None).unwrap();
        let logs: Vec<NatsLog> = (0..workers).map(|_| server.log()).collect();
        let hashes: Vec<u64> = thread::scope(|scope| {
            let run = |log| move || steps(&elastic(log, workers, sum_mode), count, values, None).unwrap();
            let running: Vec<_> = logs.into_iter().map(|log| scope.spawn(run(log))).collect();
            for _ in 0..if dies { 2 } else { 0 } {
                thread::sleep(Duration::from_millis(150));
                server.kill();
                thread::sleep(Duration::from_millis(250));
                server.up();
            }
            running.into_iter().map(|worker| worker.join().unwrap()).collect()
        });
        assert_eq!(hashes, vec![alone; workers], "{workers} {sum_mode}");
        // one that comes after the end reads everything
        let late = elastic(server.log(), 1, sum_mode);
        assert_eq!(steps(&late, count, values, None).unwrap(), alone);
        let stats = late.stats();
        assert!(stats.rounds_taken > 0 && (sum_mode != SumMode::Gradients || stats.jobs_run == 0), "{stats:?}");
    }
}

/// The server of a worker that the next test starts as a process.
const SERVER: &str = "FLOPS_TEST_SERVER";

#[test]
#[ignore = "started by another test"]
fn worker_process() {
    let Ok(server) = env::var(SERVER) else { return };
    let log = NatsLog::connect(&NatsOptions::new([server], "run-1"), "child").unwrap();
    steps(&elastic(log, 2, SumMode::Gradients), 60, 1000, Some(20)).unwrap();
}

#[test]
fn a_process_that_aborts_changes_nothing() {
    let Some(server) = Server::with_jetstream() else { return };
    let mut command = Command::new(env::current_exe().unwrap());
    command.args(["--exact", "worker_process", "--ignored", "--nocapture"]).env(SERVER, server.url());
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let elastic = elastic(server.log(), 2, SumMode::Gradients);
    let hash = steps(&elastic, 60, 1000, None).unwrap();
    assert!(!child.wait().unwrap().success());
    assert_eq!(hash, steps(&Threads, 60, 1000, None).unwrap());
    let stats = elastic.stats();
    assert!(stats.takeovers > 0 && stats.jobs_taken > 0, "{stats:?}");
}

/// Base64 of URLs.
fn base64(bytes: &[u8]) -> String {
    let letters = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let group = |part: &[u8]| {
        let all = part.iter().fold(0u32, |all, &byte| all << 8 | u32::from(byte)) << (8 * (3 - part.len()));
        (0..=part.len()).map(move |at| letters[(all >> (18 - 6 * at)) as usize & 63] as char).collect::<String>()
    };
    bytes.chunks(3).map(group).collect()
}

/// A claim of an issuer about a key.
fn claim_of(issuer: &nkeys::KeyPair, key: &nkeys::KeyPair, claims: &str) -> String {
    let (iss, sub) = (issuer.public_key(), key.public_key());
    let body = format!(r#"{{"jti":"x","iat":1700000000,"iss":"{iss}","sub":"{sub}","name":"x","nats":{claims}}}"#);
    let text = format!("{}.{}", base64(br#"{"typ":"JWT","alg":"ed25519-nkey"}"#), base64(body.as_bytes()));
    let signature = issuer.sign(text.as_bytes()).unwrap();
    format!("{text}.{}", base64(&signature))
}

#[test]
fn a_file_of_credentials_lets_a_user_in() {
    use nkeys::KeyPair;
    let (operator, account, system) = (KeyPair::new_operator(), KeyPair::new_account(), KeyPair::new_account());
    let (user, stranger) = (KeyPair::new_user(), KeyPair::new_user());
    let limits = "\"subs\":-1,\"data\":-1,\"payload\":-1";
    let of_account = |store: i32| {
        let more = "\"imports\":-1,\"exports\":-1,\"wildcards\":true,\"conn\":-1,\"leaf\":-1";
        let store =
            format!("\"mem_storage\":{store},\"disk_storage\":{store},\"streams\":{store},\"consumer\":{store}");
        format!(r#"{{"limits":{{{limits},{more},{store}}},"type":"account","version":2}}"#)
    };
    let of_user = format!(r#"{{{limits},"type":"user","version":2}}"#);
    let config = format!(
        "jetstream {{}}\noperator: {}\nsystem_account: {}\nresolver: MEMORY\nresolver_preload: {{ {}: {}, {}: {} }}",
        claim_of(&operator, &operator, r#"{"type":"operator","version":2}"#),
        system.public_key(),
        account.public_key(),
        claim_of(&operator, &account, &of_account(-1)),
        system.public_key(),
        claim_of(&operator, &system, &of_account(0)),
    );
    let Some(server) = Server::start(&config) else { return };
    let options = |claim: String, seed: String| {
        let path = server.folder.path().join("user.creds");
        let jwt = format!("-----BEGIN NATS USER JWT-----\n{claim}\n------END NATS USER JWT------\n");
        let seed = format!("-----BEGIN USER NKEY SEED-----\n{seed}\n------END USER NKEY SEED------\n");
        fs::write(&path, format!("{jwt}\n{seed}")).unwrap();
        NatsOptions { auth: NatsAuth::Credentials(path), ..server.options() }
    };
    let known = options(claim_of(&account, &user, &of_user), user.seed().unwrap());
    let log = NatsLog::connect(&known, "worker").unwrap();
    assert!(log.put(&Key::Identity, b"run").unwrap());
    // signed by another, and no credentials at all
    let message = |options| NatsLog::connect(&options, "worker").unwrap_err().to_string();
    let foreign = message(options(claim_of(&KeyPair::new_account(), &stranger, &of_user), stranger.seed().unwrap()));
    assert!(foreign.contains("authorization violation; give the token"), "{foreign}");
    let path = server.folder.path().join("user.creds");
    fs::write(&path, "nothing").unwrap();
    let wrong = message(NatsOptions { auth: NatsAuth::Credentials(path), ..server.options() });
    assert!(wrong.contains("user.creds") && wrong.contains("nsc generate creds"), "{wrong}");
}

/// Runs openssl in a folder. False where there is none.
fn openssl(folder: &Path, line: &str) -> bool {
    let status = Command::new("openssl").args(line.split(' ')).current_dir(folder).stderr(Stdio::null()).status();
    status.is_ok_and(|status| status.success())
}

#[test]
fn connections_are_encrypted_and_clients_show_a_certificate() {
    let files = r#"cert_file: "FOLDER/server.pem", key_file: "FOLDER/server.key", ca_file: "FOLDER/ca.pem""#;
    let config = format!("jetstream {{}}\ntls {{ {files}, verify: true }}");
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    fs::write(path.join("names"), "subjectAltName=IP:127.0.0.1,DNS:localhost\n").unwrap();
    let key = "-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes";
    let authority = format!("req -x509 {key} -keyout ca.key -out ca.pem -days 2 -subj /CN=test-ca");
    let mut made = openssl(path, &authority);
    for name in ["server", "client"] {
        let request = format!("req {key} -keyout {name}.key -out {name}.csr -subj /CN={name}");
        let sign = format!(
            "x509 -req -in {name}.csr -CA ca.pem -CAkey ca.key -CAcreateserial -out {name}.pem -days 2 -extfile names"
        );
        made = made && openssl(path, &request) && openssl(path, &sign);
    }
    if !made {
        eprintln!("skipped: openssl is not installed");
        return;
    }
    let place = path.display().to_string();
    let Some(server) = Server::start(&config.replace("FOLDER", &place)) else { return };
    let full = NatsOptions {
        ca: Some(path.join("ca.pem")),
        client_certificate: Some((path.join("client.pem"), path.join("client.key"))),
        limit: Duration::from_secs(5),
        ..server.options()
    };
    let log = NatsLog::connect(&full, "worker").unwrap();
    let bytes = noise(2_000_000, 4);
    assert!(log.put(&result(0, 0), &bytes).unwrap());
    let late = NatsLog::connect(&full, "worker").unwrap();
    assert!(entries(&late, 1)[0].bytes == bytes);
    // without a certificate of its own, and with a server that nobody vouches for
    for options in [
        NatsOptions { client_certificate: None, ..full.clone() },
        NatsOptions { ca: Some(path.join("client.pem")), ..full.clone() },
        NatsOptions { ca: None, ..full.clone() },
    ] {
        let start = Instant::now();
        let why = NatsLog::connect(&options, "worker").unwrap_err().to_string();
        assert!(start.elapsed() < Duration::from_secs(4) && why.contains("give the file of certificates"), "{why}");
    }
}

/// `cargo test --release --features nats --test nats -- --ignored --nocapture times`
#[test]
#[ignore = "a measurement"]
fn times() {
    let Some(server) = Server::with_jetstream() else { return };
    for jobs in [2, 8] {
        let options = NatsOptions { run: format!("elastic-{jobs}"), ..server.options() };
        let logs = [0, 1].map(|_| NatsLog::connect(&options, "worker").unwrap());
        let seconds: Vec<f64> = thread::scope(|scope| {
            let work = |log| {
                move || {
                    let worker = elastic(log, 2, SumMode::Gradients);
                    let run = |step| {
                        let round = Round::new((step, 0), RoundPhase::Query, 1, jobs);
                        let start = Instant::now();
                        worker.run(&round, &mut Fake::new(round, 0)).unwrap();
                        start.elapsed().as_secs_f64()
                    };
                    let mut seconds: Vec<f64> = (0..500).map(run).collect();
                    seconds.sort_by(f64::total_cmp);
                    seconds[250]
                }
            };
            logs.map(|log| scope.spawn(work(log))).into_iter().map(|worker| worker.join().unwrap()).collect()
        });
        println!("elastic round of {jobs} empty jobs, claims and all: median {:.0} us", 1e6 * seconds[0]);
    }
    let large = Server::start("max_payload: 8388608\njetstream {}").unwrap();
    for (what, server, bytes, rounds) in [
        ("empty round", &server, 0, 1000),
        ("sum of 300,000 f32", &server, 1_200_000, 100),
        ("sum of 300,000 f32, max_payload 8 MiB", &large, 1_200_000, 100),
    ] {
        let options = NatsOptions { run: format!("run-{bytes}"), ..server.options() };
        let logs = [0, 1].map(|_| NatsLog::connect(&options, "worker").unwrap());
        let seconds: Vec<Vec<f64>> = thread::scope(|scope| {
            let work = |at: usize, log| {
                move || {
                    let mine = noise(bytes, at as u64);
                    let mut seconds = vec![];
                    for step in 0..rounds {
                        let start = Instant::now();
                        NatsLog::put(log, &result(step, at), &mine).unwrap();
                        assert_eq!(entries(log, 2).len(), 2);
                        seconds.push(start.elapsed().as_secs_f64());
                    }
                    seconds.sort_by(f64::total_cmp);
                    seconds
                }
            };
            let workers: Vec<_> = logs.iter().enumerate().map(|(at, log)| scope.spawn(work(at, log))).collect();
            workers.into_iter().map(|worker| worker.join().unwrap()).collect()
        });
        let (median, mean) = (seconds[0][rounds as usize / 2], seconds[0].iter().sum::<f64>() / rounds as f64);
        println!(
            "{what}: median {:.0} us, mean {:.0} us, {:.0} MB/s",
            1e6 * median,
            1e6 * mean,
            bytes as f64 / 1e6 / median
        );
    }
}
