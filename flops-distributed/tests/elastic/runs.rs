//! Whole runs: workers that are many, slow, late, lost or failing.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use flops_distributed::{Elastic, ElasticOptions, Key, SumMode};
use flops_executor::{ExecutorError, Round, RoundPhase};

use crate::common::{LEAVES, Net, reference};
use crate::memory::Memory;
use crate::{STEPS, failure, fake, options, together};

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

/// Workers that sleep, die, join from a checkpoint and fail, by chance but the same chance each time:
/// what one process gives.
#[test]
fn chance_changes_nothing() {
    let chance = |of: &[u64]| of.iter().fold(1, |hash, word| fake::mix(hash ^ word)) >> 40;
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
