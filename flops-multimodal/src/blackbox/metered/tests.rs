use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::{Charge, Metered};
use crate::blackbox::testing::{Reply, Request, Server, answer, config, info, last, queries, received, truths};
use crate::blackbox::{BlackBox, BlackBoxError, FromFn, HttpBlackBox, JournalError, Query};

const CHARGES: [Charge; 2] = [Charge::PerAnswer, Charge::PerAttempt];

/// A black box that counts the rows it receives.
fn counting(rows: &AtomicUsize) -> impl BlackBox {
    FromFn::new(info(), |queries: &[Query]| {
        rows.fetch_add(queries.len(), Ordering::SeqCst);
        Ok::<_, String>(truths(queries))
    })
    .unwrap()
}

/// The rows that a server has received and charged. It outlives restarts, as the charge log of a
/// real server does.
#[derive(Default)]
struct ChargeLog {
    received: AtomicUsize,
    charged: AtomicUsize,
    keys: Mutex<HashSet<String>>,
}

impl ChargeLog {
    fn record(&self, request: &Request) {
        let rows = received(request).len();
        self.received.fetch_add(rows, Ordering::SeqCst);
        if self.keys.lock().unwrap().insert(request.headers["idempotency-key"].clone()) {
            self.charged.fetch_add(rows, Ordering::SeqCst);
        }
    }

    fn count(&self, charge: Charge) -> u64 {
        match charge {
            Charge::PerAnswer => self.charged.load(Ordering::SeqCst) as u64,
            Charge::PerAttempt => self.received.load(Ordering::SeqCst) as u64,
        }
    }
}

#[test]
fn a_call_that_exceeds_the_cap_sends_nothing() {
    for charge in CHARGES {
        let rows = AtomicUsize::new(0);
        let metered = Metered::new(counting(&rows), 10).with_charge(charge);
        assert_eq!(metered.scores(&queries(7)).unwrap(), truths(&queries(7)));
        assert_eq!((metered.spent(), metered.remaining(), metered.cap()), (7, 3, 10));
        let error = BlackBoxError::CapReached { cap: 10, spent: 7, requested: 4 };
        assert_eq!(metered.scores(&queries(4)), Err(error.clone()));
        // it stays failed, even for queries within the cap
        assert_eq!(metered.scores(&queries(1)), Err(error.clone()));
        assert_eq!((rows.load(Ordering::SeqCst), metered.spent(), metered.failure()), (7, 7, Some(error)));
    }
}

#[test]
fn what_is_held_back_is_spent_only_after_its_release() {
    let folder = tempfile::tempdir().unwrap();
    for charge in CHARGES {
        let (rows, path) = (AtomicUsize::new(0), folder.path().join(format!("{charge:?}")));
        let open =
            |cap| Metered::new(counting(&rows), cap).with_charge(charge).with_journal(&path).expect("a fresh journal");
        let metered = open(10);
        metered.hold_back(4);
        assert_eq!(metered.remaining(), 6);
        assert_eq!(metered.scores(&queries(5)).unwrap(), truths(&queries(5)));
        let error = BlackBoxError::HeldBack { cap: 10, spent: 5, held: 4, requested: 2 };
        assert_eq!(metered.scores(&queries(7)), Err(error.clone()));
        // the call that was refused stays refused: a step must not use a part of its queries
        assert_eq!(metered.scores(&queries(1)), Err(error));
        metered.release();
        assert_eq!((metered.failure(), metered.remaining()), (None, 5));
        assert_eq!(metered.scores(&queries(10)).unwrap(), truths(&queries(10)));
        // what the journal answers is free, also where nothing may be spent
        metered.hold_back(4);
        assert_eq!(metered.scores(&queries(10)).unwrap(), truths(&queries(10)));
        metered.release();
        let error = BlackBoxError::CapReached { cap: 10, spent: 10, requested: 1 };
        assert_eq!(metered.scores(&queries(11)), Err(error.clone()));
        metered.release();
        assert_eq!(metered.failure(), Some(error), "only what was held back is forgiven");
        drop(metered);
        // a raised cap goes on from the answers that were paid
        let metered = open(12);
        assert_eq!(metered.scores(&queries(12)).unwrap(), truths(&queries(12)));
        assert_eq!((rows.load(Ordering::SeqCst), metered.spent()), (12, 12));
    }
}

#[test]
fn a_retry_does_not_spend_what_is_held_back() {
    let server = Server::new(|request, number| if number < 4 { Reply::Status(500, "", "") } else { answer(request) });
    let config = server.config().with_concurrency(1).with_retries(9);
    // a batch of 4 queries costs 4 in each attempt
    let metered = Metered::new(HttpBlackBox::connect(config).unwrap(), 20);
    metered.hold_back(8);
    let error = metered.scores(&queries(4)).unwrap_err();
    assert!(matches!(error, BlackBoxError::HeldBack { spent: 12, held: 8, .. }), "{error}");
    metered.release();
    // the fourth request fails, the fifth is answered
    assert_eq!(metered.scores(&queries(4)).unwrap(), truths(&queries(4)));
    assert_eq!((metered.spent(), metered.remaining()), (20, 0));
}

#[test]
fn a_row_that_occurs_twice_in_a_call_is_sent_once() {
    let rows = AtomicUsize::new(0);
    let metered = Metered::new(counting(&rows), 3);
    let twice = [queries(3), queries(2)].concat();
    assert_eq!(metered.scores(&twice).unwrap(), truths(&twice));
    assert_eq!((rows.load(Ordering::SeqCst), metered.spent()), (3, 3));
    assert_eq!(metered.scores(&[]), Ok(vec![]));
}

#[test]
fn an_invalid_answer_is_a_permanent_failure_and_not_charged_per_answer() {
    for (charge, spent) in [(Charge::PerAnswer, 0), (Charge::PerAttempt, 2)] {
        let calls = AtomicUsize::new(0);
        let wrong = FromFn::new(info(), |_: &[Query]| {
            calls.fetch_add(1, Ordering::SeqCst);
            Ok::<_, String>(vec![vec![0.0, 1.0], vec![f32::NAN, 0.0]])
        });
        let metered = Metered::new(wrong.unwrap(), 10).with_charge(charge);
        for _ in 0..2 {
            assert!(matches!(metered.scores(&queries(2)), Err(BlackBoxError::Score { row: 1, class: 0, .. })));
        }
        assert_eq!((calls.load(Ordering::SeqCst), metered.spent(), metered.remaining()), (1, spent, 10 - spent));
    }
}

#[test]
fn a_panic_of_the_black_box_is_a_failure() {
    let panics = FromFn::new(info(), |_: &[Query]| -> Result<Vec<Vec<f32>>, String> { std::panic::panic_any(()) });
    let metered = Metered::new(panics.unwrap(), 4);
    let call = std::panic::AssertUnwindSafe(|| metered.scores(&queries(2)));
    assert!(std::panic::catch_unwind(call).is_err());
    assert!(matches!(metered.scores(&queries(1)), Err(BlackBoxError::Failed(_))));
    assert_eq!((metered.spent(), metered.remaining()), (2, 2));
}

#[test]
fn a_second_run_sends_nothing() {
    let folder = tempfile::tempdir().unwrap();
    for charge in CHARGES {
        let path = folder.path().join(format!("{charge:?}"));
        for (run, fresh) in [(0, 9), (1, 0), (2, 0)] {
            let rows = AtomicUsize::new(0);
            let metered = Metered::new(counting(&rows), 12).with_charge(charge).with_journal(&path).unwrap();
            assert_eq!(metered.scores(&queries(5)).unwrap(), truths(&queries(5)));
            assert_eq!(metered.scores(&queries(9)).unwrap(), truths(&queries(9)));
            assert_eq!((rows.load(Ordering::SeqCst), metered.spent()), (fresh, 9), "run {run}");
            assert_eq!(metered.answered_from_journal(), if run == 0 { 5 } else { 14 });
        }
        // spent queries stay spent, however the next run charges
        for charge in CHARGES {
            let rows = AtomicUsize::new(0);
            let metered = Metered::new(counting(&rows), 12).with_charge(charge).with_journal(&path).unwrap();
            let error = metered.scores(&queries(13)).unwrap_err();
            assert_eq!(error, BlackBoxError::CapReached { cap: 12, spent: 9, requested: 4 });
        }
        let other = FromFn::new(crate::blackbox::Info::new(["a"], [1, 1, 1]).unwrap(), |_: &[Query]| Err("sent"));
        let error = Metered::new(other.unwrap(), 1).with_journal(&path).err();
        assert!(matches!(error, Some(BlackBoxError::Journal { why: JournalError::OtherBlackBox { .. }, .. })));
    }
}

#[test]
fn answers_before_a_failure_are_kept() {
    let folder = tempfile::tempdir().unwrap();
    for charge in CHARGES {
        let path = folder.path().join(format!("{charge:?}"));
        let log = Arc::new(ChargeLog::default());
        let entries = log.clone();
        let server = Server::new(move |request, number| {
            if number == 2 {
                return Reply::Status(403, "", "quota");
            }
            entries.record(request);
            answer(request)
        });
        let connect = || HttpBlackBox::connect(server.config().with_concurrency(1)).unwrap();
        let metered = Metered::new(connect(), 100).with_charge(charge).with_journal(&path).unwrap();
        for _ in 0..2 {
            assert!(matches!(metered.scores(&queries(22)), Err(BlackBoxError::Status { status: 403, .. })));
        }
        // two batches of 4 were answered; the third may have been charged
        let spent = if charge == Charge::PerAnswer { 8 } else { 12 };
        assert_eq!((metered.spent(), metered.remaining()), (spent, 100 - spent));
        drop(metered);
        let metered = Metered::new(connect(), 100).with_charge(charge).with_journal(&path).unwrap();
        assert_eq!(metered.spent(), spent);
        assert_eq!(metered.scores(&queries(22)).unwrap(), truths(&queries(22)));
        assert_eq!((metered.spent(), metered.answered_from_journal()), (spent + 14, 8));
        assert_eq!(log.count(charge), 22);
    }
}

/// Loses every third request before it is recorded. Of the others, two in five get an invalid
/// answer after.
fn flaky(log: Arc<ChargeLog>) -> impl Fn(&Request, usize) -> Reply + Send + Sync + 'static {
    move |request, number| {
        if number % 3 == 1 {
            return Reply::Close;
        }
        log.record(request);
        match number % 5 {
            2 => Reply::Status(500, "", ""),
            4 => Reply::Json(r#"{"scores":[[NaN]]}"#.into()),
            _ => answer(request),
        }
    }
}

#[test]
fn the_cap_holds_with_concurrency_and_retries() {
    for charge in CHARGES {
        for cap in [10, 57, 64, 90, 1000] {
            let log = Arc::new(ChargeLog::default());
            let server = Server::new(flaky(log.clone()));
            let config = server.config().with_concurrency(4).with_retries(20);
            let metered = Metered::new(HttpBlackBox::connect(config).unwrap(), cap).with_charge(charge);
            let answered = std::thread::scope(|scope| {
                let parts: Vec<_> = (0..4)
                    .map(|part| {
                        let metered = &metered;
                        // 64 different rows in 4 threads
                        scope.spawn(move || metered.scores(&queries(64)[part * 16..][..16]))
                    })
                    .collect();
                parts.into_iter().all(|part| match part.join().unwrap() {
                    Ok(scores) => scores.len() == 16,
                    Err(error) => {
                        assert!(matches!(error, BlackBoxError::CapReached { .. }), "{error}");
                        false
                    }
                })
            });
            let (charged, spent) = (log.count(charge), metered.spent());
            assert!(charged <= cap && spent <= cap, "{charge:?}, cap {cap}: {charged} charged, {spent} spent");
            // per answer, rows that were charged but not answered before the failure are not
            // counted
            assert!(charged <= spent || !answered && charge == Charge::PerAnswer, "{charged} charged, {spent} spent");
            assert_eq!(metered.remaining(), cap - metered.spent());
            assert_eq!(answered, metered.failure().is_none());
            match charge {
                Charge::PerAnswer => assert_eq!(answered, cap >= 64, "cap {cap}"),
                Charge::PerAttempt => assert_eq!(answered, cap == 1000, "cap {cap}"),
            }
            if answered && charge == Charge::PerAnswer {
                assert_eq!((log.count(charge), metered.spent()), (64, 64));
            }
        }
    }
}

#[test]
fn counts_agree_after_a_server_is_killed_and_restarted() {
    for charge in CHARGES {
        let folder = tempfile::tempdir().unwrap();
        let log = Arc::new(ChargeLog::default());
        let serve = |log: &Arc<ChargeLog>| {
            let log = log.clone();
            move |request: &Request, _| {
                std::thread::sleep(Duration::from_millis(5));
                log.record(request);
                answer(request)
            }
        };
        let server = Server::new(serve(&log));
        let (address, done) = (server.address, AtomicBool::new(false));
        let endpoint = HttpBlackBox::connect(config(address).with_retries(1000)).unwrap();
        let metered = Metered::new(endpoint, 1000).with_charge(charge).with_journal(folder.path().join("j")).unwrap();
        std::thread::scope(|scope| {
            let run = scope.spawn(|| {
                // steps of 20 queries
                let scores: Vec<_> = queries(200).chunks(20).map(|step| metered.scores(step).unwrap()).collect();
                done.store(true, Ordering::SeqCst);
                scores.concat()
            });
            let mut server = Some(server);
            for restart in 1..4 {
                // after a fifth, two fifths and three fifths of the rows
                while log.received.load(Ordering::SeqCst) < 40 * restart {
                    std::thread::sleep(Duration::from_millis(1));
                }
                drop(server.take());
                std::thread::sleep(Duration::from_millis(20));
                server = Some(Server::at(address, serve(&log)));
            }
            assert!(!done.load(Ordering::SeqCst), "the run ended before the last restart");
            assert_eq!(run.join().unwrap(), truths(&queries(200)));
        });
        match charge {
            Charge::PerAnswer => assert_eq!((log.count(charge), metered.spent()), (200, 200)),
            // a request that was lost counts; one that was refused does not
            Charge::PerAttempt => {
                let lost = metered.spent() - log.count(charge);
                assert!(metered.spent() >= 200 && lost <= 72, "{lost} lost");
            }
        }
    }
}

#[test]
fn refused_connections_cost_nothing() {
    let server = Server::new(|request, _| answer(request));
    let endpoint = HttpBlackBox::connect(server.config().with_retries(3)).unwrap();
    server.kill();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("j");
    let metered = Metered::new(&endpoint, 8).with_journal(&path).unwrap();
    let error = last(metered.scores(&queries(8)).unwrap_err());
    assert!(matches!(error, BlackBoxError::Transport { .. }), "{error}");
    // the pooled connection of the first request may break instead of being refused
    assert!(metered.spent() <= 4, "{}", metered.spent());
    let spent = metered.spent();
    drop(metered);
    assert_eq!(Metered::new(&endpoint, 8).with_journal(&path).unwrap().spent(), spent);
}

#[test]
fn a_journal_that_cannot_be_written_stops_the_run() {
    for (charge, sent) in [(Charge::PerAnswer, 2), (Charge::PerAttempt, 0)] {
        let folder = tempfile::tempdir().unwrap();
        let rows = AtomicUsize::new(0);
        let metered =
            Metered::new(counting(&rows), 9).with_charge(charge).with_journal(folder.path().join("j")).unwrap();
        metered.state().journal.as_mut().unwrap().forbid_writing();
        for _ in 0..2 {
            let error = metered.scores(&queries(2)).err();
            assert!(matches!(error, Some(BlackBoxError::Journal { why: JournalError::Io(_), .. })), "{error:?}");
        }
        // an attempt that cannot be recorded is not made; an answer that cannot be stored was
        // charged all the same
        assert_eq!((rows.load(Ordering::SeqCst), metered.spent()), (sent, 2));
    }
}
