//! Workers over a log in memory: N of them give the bits of one.

mod common;

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::{LEAVES, Memory, Net, reference};
use flops_distributed::{Elastic, ElasticOptions, Key, Log, RoundKey, SumMode, WorkerStats};
use flops_executor::{Executor, ExecutorError};
use flops_executor::{JobFailure, Jobs, Round, RoundPhase};

const STEPS: u64 = 6;

fn options(min_workers: usize) -> ElasticOptions {
    let mut options = ElasticOptions::default();
    (options.min_workers, options.patience) = (min_workers, Duration::from_millis(40));
    options.limit = Duration::from_secs(5);
    options
}

/// A failure that may pass.
fn failure(why: &str) -> JobFailure {
    JobFailure { why: why.into(), may_pass: true }
}

/// Trains with several workers at once; `hook` gets the worker's index and the number of the job.
fn together(
    log: &Memory,
    workers: usize,
    options: &ElasticOptions,
    hook: impl Fn(usize, usize, &Round, usize) -> Result<(), JobFailure> + Sync,
) -> Vec<(Result<Net, ExecutorError>, WorkerStats)> {
    thread::scope(|scope| {
        let work = |index: usize| {
            let (hook, log) = (&hook, log.connect());
            let run = move || {
                let elastic = Elastic::new(log, options.clone());
                let mut count = 0;
                let net = Net::default().train(&elastic, STEPS, &mut |round, job| {
                    count += 1;
                    hook(index, count - 1, round, job)
                });
                (net, elastic.stats())
            };
            scope.spawn(run)
        };
        let all: Vec<_> = (0..workers).map(work).collect();
        let ended = |worker: thread::ScopedJoinHandle<'_, _>| match worker.join() {
            Ok(ended) => Some(ended),
            Err(why) if why.downcast_ref() == Some(&"dead") => None,
            Err(why) => std::panic::resume_unwind(why),
        };
        all.into_iter().filter_map(ended).collect()
    })
}

#[test]
fn any_number_of_workers_gives_the_bits_of_one() {
    let expected = reference(STEPS);
    for sum_mode in SumMode::ALL {
        for workers in 1..=5 {
            for twice in [false, true] {
                let mut log = Memory::default();
                log.twice = twice;
                let options = ElasticOptions { sum_mode, patience: Duration::from_secs(5), ..options(workers) };
                let all = together(&log, workers, &options, |_, _, _, _| {
                    thread::sleep(Duration::from_micros(300));
                    Ok(())
                });
                let mut ran = 0;
                for (net, stats) in &all {
                    assert_eq!(net.as_ref().unwrap(), &expected, "{workers} {sum_mode}");
                    assert_eq!((stats.joins, stats.rounds, stats.refused), (workers as u64, 4 * STEPS, 0));
                    assert_eq!(stats.sums_alone + stats.sums_shared, STEPS);
                    let per_sum = if sum_mode == SumMode::Gradients { stats.sums_shared } else { stats.sums_alone };
                    assert!(sum_mode == SumMode::Auto || per_sum == STEPS);
                    ran += stats.jobs_run;
                }
                let once = STEPS * (2 * LEAVES as u64 + 1);
                let sums = STEPS * LEAVES as u64;
                match sum_mode {
                    SumMode::Gradients => assert_eq!(ran, once + sums),
                    _ => assert!(ran >= once + sums),
                }
            }
        }
    }
}

#[test]
fn leaves_are_shared_evenly_and_kept_for_a_step() {
    let log = Memory::default();
    let options = ElasticOptions { sum_mode: SumMode::Gradients, patience: Duration::from_secs(5), ..options(2) };
    let owners = [const { AtomicUsize::new(9) }; LEAVES];
    let all = together(&log, 2, &options, |index, _, round, job| {
        thread::sleep(Duration::from_millis(2));
        match round.phase {
            RoundPhase::Clean => owners[job].store(index, Ordering::Relaxed),
            RoundPhase::Repeat => {}
            _ => assert_eq!(owners[job].load(Ordering::Relaxed), index, "{round:?}"),
        }
        Ok(())
    });
    for (net, stats) in all {
        net.unwrap();
        // each runs half of 150 jobs, but for chance
        assert!((40..110).contains(&stats.jobs_run) && stats.takeovers == 0, "{stats:?}");
    }
}

/// A worker that dies without a word at any of its jobs.
#[test]
fn a_worker_lost_at_any_job_changes_nothing() {
    let expected = reference(STEPS);
    let takeovers = AtomicUsize::new(0);
    for sum_mode in [SumMode::Gradients, SumMode::Scalars] {
        // all jobs, and some where sums are not shared
        for at in (0..24).step_by(if sum_mode == SumMode::Gradients { 1 } else { 5 }) {
            let options = ElasticOptions { sum_mode, ..options(3) };
            let all = together(&Memory::default(), 3, &options, |index, count, _, _| {
                if index == 1 && count == at {
                    std::panic::resume_unwind(Box::new("dead"));
                }
                thread::sleep(Duration::from_micros(300));
                Ok(())
            });
            assert_eq!(all.len(), 2, "worker 1 ran no job {at}");
            for (net, stats) in all {
                assert_eq!(net.unwrap(), expected, "{sum_mode}, job {at}");
                takeovers.fetch_add(stats.takeovers as usize, Ordering::Relaxed);
            }
        }
    }
    assert!(takeovers.load(Ordering::Relaxed) >= 25);
}

/// It publishes what others have long taken over.
#[test]
fn a_slow_worker_holds_nobody_up_and_catches_up() {
    let expected = reference(STEPS);
    let start = Instant::now();
    let times = std::sync::Mutex::new(vec![]);
    let all = together(&Memory::default(), 2, &options(2), |index, _, round, _| {
        if index == 0 {
            thread::sleep(Duration::from_millis(50));
        } else if round.step == STEPS - 1 {
            times.lock().unwrap().push(start.elapsed());
        }
        Ok(())
    });
    for (net, _) in &all {
        assert_eq!(net.as_ref().unwrap(), &expected);
    }
    let slow_alone = Duration::from_millis(50) * 25 * STEPS as u32;
    assert!(*times.lock().unwrap().last().unwrap() < slow_alone / 4);
}

#[test]
fn a_failure_is_the_same_on_all_workers_and_on_one_that_joins_late() {
    for (sum_mode, phase) in [
        (SumMode::Gradients, RoundPhase::Clean),
        (SumMode::Gradients, RoundPhase::Repeat),
        (SumMode::Gradients, RoundPhase::Update),
        (SumMode::Scalars, RoundPhase::Query),
        (SumMode::Scalars, RoundPhase::Update),
    ] {
        let log = Memory::default();
        let options = ElasticOptions { sum_mode, ..options(3) };
        let fail = |_: usize, _: usize, round: &Round, job: usize| match round {
            round if round.step == 2 && round.phase == phase && job == round.jobs / 2 => Err(failure("no memory")),
            _ => Ok(()),
        };
        let mut all = together(&log, 3, &options, fail);
        all.extend(together(&log, 1, &options, fail));
        for (net, _) in &all {
            let net = net.as_ref().unwrap();
            assert_eq!((&net.passed[..], net), (&[2][..], all[0].0.as_ref().unwrap()), "{phase:?}");
        }
        // the last one ran no shared job
        let own = if sum_mode == SumMode::Scalars { STEPS * LEAVES as u64 } else { 0 };
        assert!(all[3].1.jobs_run <= own, "{:?}", all[3].1);
    }
}

/// Only one of the workers fails, as for want of memory, at a job that others can run: either all pass
/// over the step or none does.
#[test]
fn a_failure_of_one_worker_is_agreed_on() {
    for sum_mode in [SumMode::Gradients, SumMode::Scalars] {
        for phase in [RoundPhase::Clean, RoundPhase::Query, RoundPhase::Update] {
            let options = ElasticOptions { sum_mode, ..options(3) };
            let all = together(&Memory::default(), 3, &options, |index, _, round, _| {
                if index == 1 && round.phase == phase && round.step == 2 {
                    // so late that the job has been taken over, or not
                    thread::sleep(Duration::from_millis(if sum_mode == SumMode::Scalars { 5 } else { 40 }));
                    return Err(failure("no memory"));
                }
                thread::sleep(Duration::from_micros(200));
                Ok(())
            });
            let well: Vec<&Net> = all.iter().filter_map(|(net, _)| net.as_ref().ok()).collect();
            assert!(well.len() >= 2 && well.iter().all(|net| *net == well[0]), "{phase:?}");
            for (net, _) in &all {
                // a worker that cannot do what the others did stops
                assert!(!net.as_ref().is_err_and(ExecutorError::may_pass));
            }
        }
    }
}

#[test]
fn a_worker_that_joins_late_replays_the_log() {
    let expected = reference(STEPS);
    let log = Memory::default();
    let options = ElasticOptions { sum_mode: SumMode::Gradients, ..options(1) };
    for (net, _) in together(&log, 2, &options, |_, _, _, _| Ok(())) {
        assert_eq!(net.unwrap(), expected);
    }
    // after the end: nothing is left to run
    let (net, stats) = together(&log, 1, &options, |_, _, _, _| panic!("no job is left")).remove(0);
    assert_eq!((net.unwrap(), stats.jobs_run, stats.rounds_taken), (expected.clone(), 0, 4 * STEPS));
    assert_eq!(stats.jobs_taken, STEPS * (3 * LEAVES as u64 + 1));

    // in the midst, from a checkpoint
    let log = Memory::default();
    thread::scope(|scope| {
        for index in 0..2 {
            let elastic = Elastic::new(log.connect(), options.clone());
            let expected = &expected;
            scope.spawn(move || {
                let mut net = Net::default();
                net.begin(&elastic).unwrap();
                while net.step < STEPS {
                    if net.step.is_multiple_of(2) && elastic.claim_checkpoint(net.step).unwrap() {
                        elastic.put_checkpoint(net.step, &net.to_bytes()).unwrap();
                    }
                    let mut hook = |_: &_, _| {
                        thread::sleep(Duration::from_millis(2));
                        Ok(())
                    };
                    net.step(&elastic, &mut hook).unwrap();
                }
                assert_eq!(&net, expected, "worker {index}");
            });
        }
        thread::sleep(Duration::from_millis(100));
        let elastic = Elastic::new(log.connect(), options.clone());
        let net = elastic.checkpoint().unwrap().map_or_else(Net::default, Net::from_checkpoint);
        assert_eq!(net.train(&elastic, STEPS, &mut |_, _| Ok(())).unwrap(), expected);
    });
    assert_eq!(log.entries().iter().filter(|entry| matches!(entry.key, Key::Checkpoint(_))).count(), 3);
}

/// Somebody writes nonsense under keys that the workers will use.
#[test]
fn hostile_entries_are_refused_and_counted() {
    let expected = reference(STEPS);
    let first = {
        let log = Memory::default();
        together(&log, 1, &options(1), |_, _, _, _| Ok(()));
        log.entries()
    };
    for sum_mode in [SumMode::Gradients, SumMode::Auto] {
        for bytes in [vec![], vec![0xff; 9], vec![0; 10_000]] {
            let log = Memory::default();
            let stranger = log.connect();
            let mut written = 0;
            for key in first.iter().map(|entry| &entry.key) {
                let keys = match *key {
                    Key::Result { round, start, end, .. } => {
                        let key = |start, end, generation| Key::Result { round, start, end, generation };
                        let whole = if round.phase == RoundPhase::Repeat { 1 } else { LEAVES };
                        vec![
                            key(start, end, 0),
                            key(start, end, 2),
                            key(0, whole, 0),
                            key(0, whole, 1),
                            key(3, 5, 0),
                            key(5, 3, 0),
                            key(0, usize::MAX, 0),
                            key(usize::MAX, 0, u32::MAX),
                        ]
                    }
                    Key::Claim { round, leaf, .. } => {
                        let key = |leaf, generation| Key::Claim { round, leaf, generation };
                        vec![key(leaf, 0), key(leaf, 1), key(leaf, 3), key(99, 0), key(usize::MAX, u32::MAX)]
                    }
                    Key::Mode(_) | Key::Weights(_) => vec![key.clone()],
                    _ => vec![],
                };
                for key in keys {
                    written += usize::from(stranger.put(&key, &bytes).unwrap());
                }
            }
            assert!(written > 100);
            stranger.put(&Key::Left("nobody".into()), &bytes).unwrap();
            let options = ElasticOptions { sum_mode, ..options(2) };
            for (net, stats) in together(&log, 2, &options, |_, _, _, _| Ok(())) {
                assert_eq!(net.unwrap(), expected);
                assert!(stats.refused > 50, "{stats:?}");
            }
        }
    }
}

/// A part of a sum that no tree has, though it can be read.
#[test]
fn only_nodes_of_the_tree_are_taken() {
    let options = ElasticOptions { sum_mode: SumMode::Gradients, ..options(1) };
    let log = Memory::default();
    together(&log, 1, &options, |_, _, _, _| Ok(()));
    let copy = Memory::default();
    for entry in log.entries() {
        if let Key::Result { round, .. } = entry.key
            && round.phase == RoundPhase::Update
        {
            for (start, end) in [(3, 5), (0, 3), (6, 10), (8, 8)] {
                copy.put(&Key::Result { round, start, end, generation: 0 }, &entry.bytes).unwrap();
            }
        }
    }
    for (net, stats) in together(&copy, 2, &options, |_, _, _, _| Ok(())) {
        assert_eq!((net.unwrap(), stats.refused), (reference(STEPS), 4 * STEPS));
    }
}

/// Claims of somebody who never runs anything, up to the highest generation.
#[test]
fn claims_without_work_are_taken_over() {
    let log = Memory::default();
    let first = {
        together(&log, 1, &options(1), |_, _, _, _| Ok(()));
        log.entries()
    };
    let log = Memory::default();
    let stranger = log.connect();
    let mut number = 0;
    for entry in first {
        if let Key::Claim { round, leaf, .. } = entry.key
            && round.step < 2
        {
            number += 1;
            let generation = [0, 1, 1 << 16][number % 3];
            stranger.put(&Key::Claim { round, leaf, generation }, b"stranger").unwrap();
        }
    }
    for (net, _) in together(&log, 2, &options(2), |_, _, _, _| Ok(())) {
        assert_eq!(net.unwrap(), reference(STEPS));
    }
}

/// Workers that sleep, die, join from a checkpoint and fail, by chance but the same chance each time:
/// what one process gives.
#[test]
fn chance_changes_nothing() {
    let chance = |of: &[u64]| {
        let mix = |hash: u64, word: &u64| (hash ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(27);
        of.iter().fold(1, mix).wrapping_mul(0xd6e8_feb8_6659_fd93) >> 40
    };
    let mut joins = 0;
    for seed in 0..12 {
        let fail = |round: &Round, job: usize| {
            let fails = chance(&[seed, round.digest, job as u64]).is_multiple_of(80);
            if fails { Err(failure("by chance")) } else { Ok(()) }
        };
        let expected = Net::default().train(&flops_executor::Threads, STEPS, &mut |round, job| fail(round, job));
        let expected = expected.unwrap();
        let log = Memory::default();
        let mode = SumMode::ALL[seed as usize % 3];
        let options = ElasticOptions { sum_mode: mode, patience: Duration::from_millis(15), ..options(1) };
        // passes of a worker through the run, until it ends one
        let live = |index: u64| {
            for life in 0..20 {
                let elastic = Elastic::new(log.connect(), options.clone());
                let mut count = 0;
                let mut hook = |round: &Round, job: usize| {
                    count += 1;
                    let luck = chance(&[seed, index, life, count]);
                    if luck.is_multiple_of(30) && life < 4 {
                        std::panic::resume_unwind(Box::new("dead"));
                    }
                    thread::sleep(Duration::from_micros(
                        luck / 30 % 40 * if luck.is_multiple_of(21) { 1000 } else { 10 },
                    ));
                    fail(round, job)
                };
                let run = std::panic::AssertUnwindSafe(|| {
                    let mut net = elastic.checkpoint().unwrap().map_or_else(Net::default, Net::from_checkpoint);
                    net.begin(&elastic).unwrap();
                    while net.step < STEPS {
                        if net.step == 3 && elastic.claim_checkpoint(3).unwrap() {
                            elastic.put_checkpoint(3, &net.to_bytes()).unwrap();
                        }
                        net.step(&elastic, &mut hook).unwrap();
                    }
                    net
                });
                if let Ok(net) = std::panic::catch_unwind(run) {
                    return (net.weights, elastic.stats().joins);
                }
            }
            panic!("a worker that does not get through")
        };
        thread::scope(|scope| {
            let all: Vec<_> = (0..3).map(|index| scope.spawn(move || live(index))).collect();
            for worker in all {
                let (weights, joined) = worker.join().unwrap();
                assert_eq!(weights, expected.weights, "seed {seed}");
                joins += joined;
            }
        });
    }
    assert!(joins > 12 * 9);
}

#[test]
fn workers_that_are_started_otherwise_are_told_what_differs() {
    let log = Memory::default();
    together(&log, 1, &options(1), |_, _, _, _| Ok(()));
    let odd = ElasticOptions { sum_mode: SumMode::Scalars, ..options(1) };
    let message = Net::default().begin(&Elastic::new(log.connect(), odd)).unwrap_err().to_string();
    assert!(message.contains("the sum mode of this worker is scalars, and that of the run is auto"), "{message}");
    let other = Net { weights: vec![1.0; 5], ..Net::default() };
    let why = other.begin(&Elastic::new(log.connect(), options(1))).unwrap_err();
    assert!(matches!(&why, ExecutorError::Mismatch { what, .. } if what.contains("weights")), "{why}");
    // at another step only later checks tell
    let later = Net { step: 4, ..other };
    let elastic = Elastic::new(log.connect(), options(1));
    let why = later.train(&elastic, STEPS, &mut |_, _| Ok(())).unwrap_err();
    assert_eq!(why, ExecutorError::Diverged { worker: elastic.worker().into(), step: 4 });
}

/// One job, which gives a byte, and what happens while it runs.
struct One<'a>(u8, bool, &'a dyn Fn() -> Result<(), JobFailure>);

impl Jobs for One<'_> {
    fn run(&mut self, _: Range<usize>) -> Result<(), JobFailure> {
        if !self.1 {
            (self.2)()?;
        }
        self.1 = true;
        Ok(())
    }

    fn has(&self, _: Range<usize>) -> bool {
        self.1
    }

    fn pack(&mut self, _: Range<usize>) -> Result<Vec<u8>, JobFailure> {
        Ok(vec![self.0])
    }

    fn unpack(&mut self, _: Range<usize>, _: &[u8]) -> Result<(), JobFailure> {
        self.1 = true;
        Ok(())
    }

    fn max_bytes(&self, _: Range<usize>) -> usize {
        1
    }
}

/// A worker with other bits is told so where a job ran on two.
#[test]
fn a_job_with_other_bits_is_noticed() {
    let log = Memory::default();
    let round = Round::new((3, 0), RoundPhase::Repeat, 1, 1);
    let [slow, fast] = [0, 1].map(|_| Elastic::new(log.connect(), options(1)));
    let ran = AtomicUsize::new(0);
    let taken_over = || {
        fast.run(&round, &mut One(2, false, &|| Ok(()))).unwrap();
        Ok(())
    };
    let why = slow.run(&round, &mut One(1, false, &taken_over)).unwrap_err();
    assert!(matches!(why, ExecutorError::Diverged { step: 3, .. }), "{why}");
    // asked again, the round is run here: its entries are gone
    let here = || {
        ran.fetch_add(1, Ordering::Relaxed);
        Ok(())
    };
    fast.run(&round, &mut One(2, false, &here)).unwrap();
    assert_eq!(ran.load(Ordering::Relaxed), 1);
    // the same bits are no matter
    let round = Round::new((4, 0), RoundPhase::Repeat, 1, 1);
    let taken_over = || {
        fast.run(&round, &mut One(2, false, &|| Ok(()))).unwrap();
        Ok(())
    };
    slow.run(&round, &mut One(2, false, &taken_over)).unwrap();
}

/// What comes first in the log counts, and not what a worker knows of itself.
#[test]
fn failures_and_results_count_in_the_order_of_the_log() {
    for sum_mode in [SumMode::Gradients, SumMode::Scalars] {
        for phase in [RoundPhase::Repeat, RoundPhase::Update] {
            let log = Memory::default();
            let [first, second] =
                [0, 1].map(|_| Elastic::new(log.connect(), ElasticOptions { sum_mode, ..options(1) }));
            let round = Round::new((3, 0), phase, 1, 1);
            let key = Key::Failure { round: RoundKey::from(&round), job: 0 };
            // well here, but after a failure elsewhere
            let fails = || {
                fail(&log, &key);
                Ok(())
            };
            let why = first.run(&round, &mut One(1, false, &fails)).unwrap_err();
            assert!(why.may_pass() && why.to_string().contains("cannot be read"), "{why}");
            assert_eq!(second.run(&round, &mut One(1, false, &|| panic!("nothing to run"))), Err(why.clone()));
            assert_eq!(first.run(&round, &mut One(1, false, &|| panic!("nothing to run"))), Err(why));

            // a failure, but after a result
            let round = Round::new((4, 0), phase, 1, 1);
            let key = Key::Failure { round: RoundKey::from(&round), job: 0 };
            let well = || {
                second.run(&round, &mut One(1, false, &|| Ok(()))).unwrap();
                fail(&log, &key);
                Ok(())
            };
            first.run(&round, &mut One(1, false, &well)).unwrap();

            // a failure here, after a result elsewhere: the result is taken, if there is one to take
            let round = Round::new((5, 0), phase, 1, 1);
            let late = || {
                second.run(&round, &mut One(1, false, &|| Ok(()))).unwrap();
                Err(failure("no memory"))
            };
            let outcome = first.run(&round, &mut One(1, false, &late));
            if sum_mode == SumMode::Scalars && round.is_sum() {
                let why = outcome.unwrap_err();
                assert!(!why.may_pass() && why.to_string().contains("no memory"), "{why}");
            } else {
                outcome.unwrap();
            }
        }
    }
}

/// A worker fails at a job that another took over before it died: the rest is still its own.
#[test]
fn a_failure_that_does_not_count_leaves_no_job_undone() {
    let log = Memory::default();
    let [first, second] = [0, 1].map(|_| Elastic::new(log.connect(), options(1)));
    let take_over = || {
        // it takes jobs 4 to 7 and 0, and dies
        Net::default().train(&second, 1, &mut |_, job| {
            if job == 1 {
                std::panic::resume_unwind(Box::new("dead"));
            }
            Ok(())
        })
    };
    let mut failed = false;
    let net = Net::default().train(&first, 1, &mut |round, job| {
        if (round.phase, job, failed) != (RoundPhase::Query, 0, false) {
            return Ok(());
        }
        failed = true;
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(take_over)).unwrap_err();
        Err(failure("no memory"))
    });
    assert_eq!((net.unwrap(), failed), (reference(1), true));
}

/// Somebody takes the key of a result while its job runs.
#[test]
fn a_result_whose_key_is_taken_is_sent_again() {
    for phase in [RoundPhase::Repeat, RoundPhase::Update] {
        let log = Memory::default();
        let options = ElasticOptions { sum_mode: SumMode::Gradients, ..options(1) };
        let [first, second] = [0, 1].map(|_| Elastic::new(log.connect(), options.clone()));
        let round = Round::new((3, 0), phase, 1, 1);
        let key = |generation| Key::Result { round: (&round).into(), start: 0, end: 1, generation };
        let taken = || {
            [0, 1, 3].into_iter().for_each(|generation| fail(&log, &key(generation)));
            Ok(())
        };
        first.run(&round, &mut One(1, false, &taken)).unwrap();
        second.run(&round, &mut One(1, false, &|| panic!("nothing to run"))).unwrap();
        assert!(!log.put(&key(2), b"").unwrap() && log.put(&key(4), b"").unwrap());
        assert_eq!((first.stats().refused, second.stats().refused), (3, 3));
    }
}

fn fail(log: &Memory, key: &Key) {
    assert!(log.put(key, b"nonsense").unwrap());
}

/// Results that were sent before a worker left, and are read after: they count, and nothing is lost
/// where they do not come.
#[test]
fn a_worker_that_left_may_still_be_heard() {
    let expected = reference(STEPS);
    let log = Memory::default();
    together(&log, 1, &options(1), |_, _, _, _| Ok(()));
    for keep in [2, 3, 5, 100] {
        let copy = Memory::default();
        let stranger = copy.connect();
        // the owner of all leaves has left before its results come, and some never do
        for (number, entry) in log.entries().into_iter().enumerate() {
            let is_result = matches!(entry.key, Key::Result { .. });
            if !is_result || number % keep == 0 {
                stranger.put(&entry.key, &entry.bytes).unwrap();
            }
            if matches!(entry.key, Key::Joined(_)) {
                stranger.put(&Key::Left("w-1".into()), b"lost").unwrap();
            }
        }
        let start = Instant::now();
        // names of workers are those of the copy
        let (_, _) = (copy.connect(), copy.connect());
        for (net, stats) in together(&copy, 2, &options(1), |_, _, _, _| Ok(())) {
            assert_eq!(net.unwrap(), expected);
            assert_eq!(stats.losses, 1);
        }
        assert!(start.elapsed() < Duration::from_secs(2));
    }
    let key = RoundKey { step: 0, further: 0, phase: RoundPhase::Clean, digest: 0 };
    assert!(key < RoundKey { step: 1, ..key });
}
