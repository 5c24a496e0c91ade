//! What workers make of the entries of a log, and of their order.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use flops_distributed::{Elastic, ElasticOptions, Entry, Key, Log, RoundKey, SumMode, Traffic};
use flops_executor::{Executor, ExecutorError, JobFailure, Jobs, Round, RoundPhase};

use crate::common::{LEAVES, Net, reference};
use crate::memory::Memory;
use crate::{STEPS, failure, options, together};

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

/// A log that takes its time to write results, one after another.
#[derive(Debug)]
struct Slow {
    log: Memory,
    outbox: Sender<(Key, Vec<u8>)>,
    unwritten: Arc<AtomicUsize>,
}

impl Slow {
    fn new(log: Memory, time: Duration) -> Self {
        let (outbox, outgoing) = channel::<(Key, Vec<u8>)>();
        let unwritten = Arc::new(AtomicUsize::new(0));
        let (count, to) = (unwritten.clone(), log.clone());
        thread::spawn(move || {
            for (key, bytes) in outgoing {
                thread::sleep(time);
                to.put(&key, &bytes).unwrap();
                count.fetch_sub(1, Ordering::Relaxed);
            }
        });
        Self { log, outbox, unwritten }
    }
}

impl Log for Slow {
    fn worker(&self) -> &str {
        self.log.worker()
    }

    fn put(&self, key: &Key, bytes: &[u8]) -> Result<bool, ExecutorError> {
        self.log.put(key, bytes)
    }

    fn send(&self, key: &Key, bytes: Vec<u8>) -> Result<(), ExecutorError> {
        if !matches!(key, Key::Result { .. }) {
            return self.log.send(key, bytes);
        }
        self.unwritten.fetch_add(1, Ordering::Relaxed);
        self.outbox.send((key.clone(), bytes)).unwrap();
        Ok(())
    }

    fn is_writing(&self) -> bool {
        self.unwritten.load(Ordering::Relaxed) > 0
    }

    fn next(&self, timeout: Duration) -> Result<Option<Entry>, ExecutorError> {
        self.log.next(timeout)
    }

    fn trim(&self, step: u64) -> Result<(), ExecutorError> {
        self.log.trim(step)
    }

    fn put_checkpoint(&self, step: u64, bytes: &[u8]) -> Result<(), ExecutorError> {
        self.log.put_checkpoint(step, bytes)
    }

    fn checkpoint(&self) -> Result<Option<(u64, Vec<u8>)>, ExecutorError> {
        self.log.checkpoint()
    }

    fn traffic(&self) -> Traffic {
        self.log.traffic()
    }
}

/// A long upload is not a lost log: its eight results take four times the limit.
#[test]
fn what_is_long_to_write_is_waited_for() {
    let limit = Duration::from_millis(200);
    let options = ElasticOptions { sum_mode: SumMode::Gradients, limit, ..options(1) };
    let elastic = Elastic::new(Slow::new(Memory::default().connect(), limit / 2), options);
    let start = Instant::now();
    let net = Net::default().train(&elastic, 1, &mut |_, _| Ok(())).unwrap();
    assert_eq!(net, reference(1));
    assert!(start.elapsed() > 4 * limit, "nothing was slow");
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
