//! The hub: strangers, hostile frames, lost workers, lost hubs, and workers in processes.

mod common;
mod fake;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use common::{Net, reference};
use flops_distributed::hub::{Hub, HubClient, HubOptions, TOKEN};
use flops_distributed::{DistributedError, Elastic, ElasticOptions, Entry, Key, Log, RoundKey, SumMode, WorkerStats};
use flops_executor::ExecutorError;
use flops_executor::RoundPhase;

const STEPS: u64 = 6;

fn hub() -> Hub {
    Hub::start(HubOptions { limit: Duration::from_secs(5), max_bytes: 1 << 20, ..HubOptions::default() }).unwrap()
}

fn token(hub: &Hub) -> String {
    hub.environment().into_iter().find(|(name, _)| *name == TOKEN).unwrap().1
}

fn entries(worker: &HubClient) -> Vec<Entry> {
    std::iter::from_fn(|| worker.next(Duration::from_millis(100)).unwrap()).collect()
}

/// Waits for something that comes soon.
fn soon(what: &str, mut test: impl FnMut() -> bool) {
    let until = Instant::now() + Duration::from_secs(5);
    while !test() {
        assert!(Instant::now() < until, "{what}");
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn the_first_writer_wins_and_all_see_one_order() {
    let hub = hub();
    let workers: Vec<HubClient> = (0..4).map(|_| hub.connect("w").unwrap()).collect();
    let first: usize = thread::scope(|scope| {
        let write = |worker: &HubClient| {
            (0..50).filter(|step| worker.put(&Key::Weights(*step), worker.worker().as_bytes()).unwrap()).count()
        };
        let all: Vec<_> = workers.iter().map(|worker| scope.spawn(move || write(worker))).collect();
        all.into_iter().map(|worker| worker.join().unwrap()).sum()
    });
    assert_eq!(first, 50);
    let seen = entries(&workers[0]);
    assert_eq!(seen.len(), 50);
    for worker in workers.iter().skip(1).chain([&hub.connect("late").unwrap()]) {
        assert_eq!(entries(worker), seen);
    }
    assert_eq!(workers[2].worker(), "w-2");
    let traffic = workers[0].traffic();
    assert!(traffic.sent > 50 * 20 && traffic.received > 100 * 20);
    assert_eq!((hub.stats().entries, hub.stats().joins), (50, 0));
}

#[test]
fn entries_that_nobody_waits_for_come_in_order() {
    let hub = hub();
    let (one, two) = (hub.connect("one").unwrap(), hub.connect("two").unwrap());
    assert!(two.put(&Key::Weights(7), b"two").unwrap());
    for step in 0..50 {
        one.send(&Key::Weights(step), b"one".to_vec()).unwrap();
    }
    // its own answer, and none of those before
    assert!(!one.put(&Key::Weights(7), b"one").unwrap() && one.put(&Key::Weights(50), b"one").unwrap());
    let steps: Vec<Option<u64>> = entries(&two).into_iter().map(|entry| entry.key.step()).collect();
    assert_eq!(steps, [7].into_iter().chain((0..=50).filter(|step| *step != 7)).map(Some).collect::<Vec<_>>());
    // of a step that is past: who only reads has the error
    two.trim(5).unwrap();
    let past = RoundKey { step: 3, further: 0, phase: RoundPhase::Query, digest: 1 };
    two.send(&Key::Done(past), vec![]).unwrap();
    soon("an error", || two.next(Duration::ZERO).is_err());
    // too large: the hub closes the connection at its head, so the call itself has the error or a later one
    let large = one.send(&Key::Weights(51), vec![0; 2 << 20]);
    soon("an error", || large.is_err() || one.send(&Key::Weights(52), vec![]).is_err());
}

#[test]
fn checkpoints_are_stored_and_the_log_is_trimmed() {
    let hub = hub();
    let worker = hub.connect("w").unwrap();
    assert_eq!(worker.checkpoint().unwrap(), None);
    worker.put(&Key::Identity, b"i").unwrap();
    for step in 0..10 {
        worker.put(&Key::Weights(step), &[step as u8]).unwrap();
    }
    let bytes = vec![7; 1 << 20];
    worker.put_checkpoint(5, &bytes).unwrap();
    worker.put_checkpoint(4, b"older").unwrap();
    assert_eq!(worker.checkpoint().unwrap(), Some((5, bytes)));
    worker.trim(5).unwrap();
    // a worker that is connected misses nothing; a new one gets what is left
    assert_eq!(entries(&worker).len(), 11);
    let late = hub.connect("late").unwrap();
    assert_eq!(entries(&late).first().map(|entry| entry.key.clone()), Some(Key::Identity));
    assert!(!late.put(&Key::Weights(5), b"").unwrap());
    // a worker that took long to join may still ask to be compared
    assert!(late.put(&Key::Weights(4), b"").unwrap());
    let round = RoundKey { step: 4, further: 0, phase: RoundPhase::Clean, digest: 0 };
    let message = late.put(&Key::Done(round), b"").unwrap_err().to_string();
    assert!(message.contains("step 4 is past") && message.contains("starts with step 5"), "{message}");
}

#[test]
fn strangers_and_hostile_frames_are_kept_out() {
    let hub = hub();
    let worker = hub.connect("w").unwrap();
    let refused = |token: &str, name: &str| {
        HubClient::connect(hub.address(), token, name, Duration::from_secs(5)).unwrap_err().to_string()
    };
    assert!(refused("", "w").contains("the token is not that of this run"));
    assert!(refused(&"0".repeat(64), "w").contains("the token"));
    assert!(refused(&token(&hub), "a.b").contains("the name of the worker"));
    assert!(refused(&token(&hub), "").contains("the name of the worker"));
    assert!(refused(&token(&hub), &"a".repeat(64)).contains("the name of the worker"));
    // bytes that are no frame: too long, of another version, of no kind, damaged
    for bytes in [&b"GET / HTTP/1.1\r\n\r\n       "[..], &[1, 0, 255, 255, 0, 0], &[0xff; 64], &[1; 64], &[0; 64], b""]
    {
        let mut stream = TcpStream::connect(hub.address()).unwrap();
        let _ = stream.write_all(bytes);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let mut answer = vec![];
        let _ = stream.read_to_end(&mut answer);
        assert!(answer.len() < 200);
    }
    soon("all are refused", || hub.stats().refused == 11);

    // a worker that writes what no worker may: another's name, or more than there may be
    for (key, bytes) in [(Key::Left("w-0".into()), 0), (Key::Joined("w-0".into()), 0), (Key::Identity, (1 << 20) + 1)] {
        let hostile = hub.connect("h").unwrap();
        assert!(matches!(hostile.put(&key, &vec![0; bytes]), Err(ExecutorError::Lost { .. })));
    }
    // the worker that was there before is not disturbed
    assert!(worker.put(&Key::Identity, b"mine").unwrap());
    assert_eq!(entries(&worker).len(), 1);
    soon("hostile workers are refused", || hub.stats().refused == 14);
}

#[test]
fn workers_that_leave_and_that_are_lost_are_told_apart() {
    let hub = hub();
    let watcher = hub.connect("watcher").unwrap();
    let [planned, lost] = ["planned", "lost"].map(|name| {
        let worker = hub.connect(name).unwrap();
        worker.put(&Key::Joined(worker.worker().into()), &[]).unwrap();
        worker
    });
    assert_eq!((hub.stats().workers, hub.stats().joins), (2, 2));
    let names = [planned.worker().to_string(), lost.worker().to_string()];
    drop(planned);
    soon("one leaves", || hub.stats().workers == 1);
    // a frame that no worker may send
    lost.put(&Key::Left(names[0].clone()), &[]).unwrap_err();
    soon("the other is lost", || hub.stats().workers == 0);
    let stats = hub.stats();
    assert_eq!((stats.joins, stats.losses, stats.refused), (2, 1, 1));
    let left: Vec<_> = entries(&watcher).into_iter().skip(2).map(|entry| (entry.key, entry.bytes)).collect();
    let [planned, lost] = names.map(Key::Left);
    assert_eq!(left, [(planned, b"left".to_vec()), (lost, b"refused".to_vec())]);
}

#[test]
fn a_hub_that_ends_or_hangs_is_lost_after_a_limit() {
    let hub = hub();
    let elastic = Elastic::new(hub.connect("w").unwrap(), ElasticOptions::default());
    let mut net = Net::default();
    net.begin(&elastic).unwrap();
    net.step(&elastic, &mut |_, _| Ok(())).unwrap();
    let (address, token) = (hub.address(), token(&hub));
    drop(hub);
    let why = net.step(&elastic, &mut |_, _| Ok(())).unwrap_err();
    assert!(matches!(why, ExecutorError::Lost { .. }) && !why.may_pass(), "{why}");
    assert!(why.to_string().contains("resumed from its last checkpoint"), "{why}");
    // nobody listens there any more
    let start = Instant::now();
    let why = HubClient::connect(address, &token, "w", Duration::from_millis(200)).unwrap_err();
    assert!(matches!(why, DistributedError::Server { .. }) && why.to_string().contains(&address.to_string()));
    assert!(start.elapsed() < Duration::from_secs(2));

    // one that takes connections and says nothing
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = silent.local_addr().unwrap();
    let start = Instant::now();
    assert!(HubClient::connect(address, &token, "w", Duration::from_millis(200)).is_err());
    assert!(start.elapsed() < Duration::from_secs(2));
}

/// A worker in a process of its own.
#[test]
#[ignore = "started by the other tests"]
fn worker_process() {
    let Some(log) = HubClient::from_env("child").unwrap() else {
        println!("nothing to do: the other tests start this one");
        return;
    };
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<usize>().ok());
    let sum_mode = std::env::var("SUM_MODE").unwrap().parse().unwrap();
    let (abort_at, min_workers) = (number("ABORT_AT"), number("WORKERS").unwrap_or(1));
    // so long that only the hub tells who is lost
    let patience = Duration::from_secs(60);
    let elastic = Elastic::new(log, ElasticOptions { sum_mode, min_workers, patience, ..ElasticOptions::default() });
    let net = elastic.checkpoint().unwrap().map_or_else(Net::default, Net::from_checkpoint);
    let mut count = 0;
    net.begin(&elastic).unwrap();
    let mut net = net;
    while net.step < STEPS {
        if net.step == 2 && elastic.claim_checkpoint(2).unwrap() {
            elastic.put_checkpoint(2, &net.to_bytes()).unwrap();
        }
        let mut hook = |_: &_, _| {
            if abort_at == Some(count) {
                std::process::abort();
            }
            count += 1;
            thread::sleep(Duration::from_micros(500));
            Ok(())
        };
        net.step(&elastic, &mut hook).unwrap();
    }
    let stats = serde_json::to_string(&elastic.stats()).unwrap();
    let path = std::env::var_os("RESULT").unwrap();
    std::fs::write(path, format!("{:016x}\n{stats}", net.hash())).unwrap();
}

fn child(hub: &Hub, result: &Path, sum_mode: SumMode) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "worker_process", "--ignored", "--nocapture"]).envs(hub.environment());
    command.env("RESULT", result).env("SUM_MODE", sum_mode.name()).stdout(Stdio::null()).stderr(Stdio::null());
    command
}

/// Waits for processes; whether each ended well.
fn ends(children: Vec<Child>) -> Vec<bool> {
    children.into_iter().map(|mut child| child.wait().unwrap().success()).collect()
}

fn results(dir: &Path, workers: usize) -> Vec<(String, WorkerStats)> {
    let read = |index| std::fs::read_to_string(dir.join(format!("{index}"))).ok();
    let parse = |text: String| {
        let (hash, stats) = text.split_once('\n').unwrap();
        (hash.into(), serde_json::from_str(stats).unwrap())
    };
    (0..workers).filter_map(read).map(parse).collect()
}

/// Processes that abort at any job: the hub tells the others at once, long before patience ends.
#[test]
fn processes_that_abort_change_nothing() {
    let expected = format!("{:016x}", reference(STEPS).hash());
    for (number, at) in [0, 1, 2, 3, 4, 5, 7, 9, 12, 17].into_iter().enumerate() {
        let sum_mode = SumMode::ALL[number % 3];
        let dir = tempfile::tempdir().unwrap();
        let start = Instant::now();
        let hub = hub();
        let start_worker = |index: usize| {
            let mut command = child(&hub, &dir.path().join(index.to_string()), sum_mode);
            command.env("WORKERS", "3");
            if index == 1 {
                command.env("ABORT_AT", at.to_string());
            }
            command.spawn().unwrap()
        };
        let ends = ends((0..3).map(start_worker).collect());
        assert_eq!(ends, [true, false, true], "job {at}");
        let results = results(dir.path(), 3);
        assert_eq!(results.len(), 2);
        for (hash, stats) in results {
            assert_eq!(hash, expected, "job {at}");
            assert_eq!((stats.joins, stats.refused), (3, 0));
            assert!(stats.losses >= 1 && stats.bytes_sent > 0 && stats.bytes_received > 0, "{stats:?}");
        }
        soon("all have left", || hub.stats().workers == 0);
        let stats = hub.stats();
        assert_eq!((stats.workers, stats.joins, stats.losses, stats.refused), (0, 3, 1, 0));
        assert!(start.elapsed() < Duration::from_secs(40), "{:?}", start.elapsed());
    }
}

/// A process joins from the checkpoint when the others are through, and one when they are not.
#[test]
fn processes_join_late() {
    let expected = format!("{:016x}", reference(STEPS).hash());
    let dir = tempfile::tempdir().unwrap();
    let hub = hub();
    let worker = |index: usize| child(&hub, &dir.path().join(index.to_string()), SumMode::Gradients).spawn().unwrap();
    let first = worker(0);
    thread::sleep(Duration::from_millis(40));
    assert_eq!(ends(vec![first, worker(1)]), [true, true]);
    assert_eq!(ends(vec![worker(2)]), [true]);
    let results = results(dir.path(), 3);
    assert_eq!(results.len(), 3);
    assert!(results.iter().all(|(hash, _)| *hash == expected));
    assert_eq!((results[2].1.jobs_run, results[2].1.rounds), (0, 4 * (STEPS - 2)));
}

/// A worker can tell a run that has begun from one that it would begin.
#[test]
fn a_run_is_new_until_a_worker_begins_it() {
    let hub = hub();
    let worker = |name: &str| Elastic::new(hub.connect(name).unwrap(), ElasticOptions::default());
    let (first, second) = (worker("first"), worker("second"));
    assert!(first.is_new(Duration::from_millis(50)).unwrap() && second.is_new(Duration::ZERO).unwrap());
    Net::default().begin(&first).unwrap();
    assert!(!second.is_new(Duration::from_secs(5)).unwrap() && !first.is_new(Duration::ZERO).unwrap());
    Net::default().begin(&second).unwrap();
}
