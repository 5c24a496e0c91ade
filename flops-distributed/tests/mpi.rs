//! Gangs of processes: this test starts itself under `mpirun`.
#![cfg(feature = "mpi")]

mod fake;
#[path = "fake/steps.rs"]
mod steps;

use std::env;
use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use fake::{Fake, identity};
use flops_distributed::{Mpi, MpiOptions, SumMode};
use flops_executor::{Executor, ExecutorError, JobFailure, RoundPhase, Threads};
use steps::{hash, round, skip};

/// What a rank is to do, and where it writes what came of it.
const CASE: &str = "FLOPS_TEST_CASE";
const FOLDER: &str = "FLOPS_TEST_FOLDER";

/// The most that any gang of these tests may take.
const LIMIT: Duration = Duration::from_secs(40);

/// What a gang left: whether it ended well, the last words of each rank, and the time.
struct Ended {
    success: bool,
    ranks: Vec<String>,
    seconds: f64,
}

/// Runs a case on some ranks. None where there is no mpirun.
fn gang(case: &str, ranks: usize) -> Option<Ended> {
    let folder = tempfile::tempdir().unwrap();
    let start = Instant::now();
    let mut command = Command::new("mpirun");
    command.args(["--oversubscribe", "-n", &ranks.to_string()]).arg(env::current_exe().unwrap());
    command.args(["--exact", "rank", "--ignored", "--nocapture", "--test-threads", "1"]);
    command.env("OMPI_ALLOW_RUN_AS_ROOT", "1").env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1");
    command.env(CASE, case).env(FOLDER, folder.path()).stdin(Stdio::null()).stdout(Stdio::null());
    if env::var_os("FLOPS_TEST_LOUD").is_none() {
        command.stderr(Stdio::null());
    }
    let Ok(mut child) = command.spawn() else {
        skip("mpirun");
        return None;
    };
    let success = ends(&mut child, case, start);
    let text = |rank| fs::read_to_string(folder.path().join(format!("{rank}"))).unwrap_or_default();
    Some(Ended { success, ranks: (0..ranks).map(text).collect(), seconds: start.elapsed().as_secs_f64() })
}

fn ends(child: &mut Child, case: &str, start: Instant) -> bool {
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status.success();
        }
        if start.elapsed() > LIMIT {
            child.kill().unwrap();
            child.wait().unwrap();
            panic!("the gang of {case} hangs");
        }
        thread::sleep(Duration::from_millis(10));
    }
}

/// Rounds of all kinds, and a hash of what they gave.
fn six_steps(executor: &dyn Executor) -> Result<String, ExecutorError> {
    Ok(format!("{:016x}", steps::steps(executor, 6, 1000, &mut |_, _| Ok(()))?))
}

/// What happens when a job runs.
#[derive(Clone, Copy)]
enum Fate {
    Fails,
    MayPass,
    Panics,
    Aborts,
    /// It takes so long.
    Sleeps(Duration),
}

impl Fate {
    fn befall(self, job: usize) -> Result<(), JobFailure> {
        let failure = |may_pass| JobFailure { why: format!("leaf {job} fails"), may_pass };
        match self {
            Self::Fails => return Err(failure(false)),
            Self::MayPass => return Err(failure(true)),
            Self::Panics => panic!("leaf {job} panics"),
            Self::Aborts => std::process::abort(),
            Self::Sleeps(time) => thread::sleep(time),
        }
        Ok(())
    }
}

/// A round with fates of its leaves.
fn fated(gang: &Mpi, step: u64, fates: &[(usize, Fate)]) -> String {
    let round = round(step, RoundPhase::Update, 8);
    let mut hook = |_: &_, job| fates.iter().find(|(of, _)| *of == job).map_or(Ok(()), |(_, fate)| fate.befall(job));
    let mut fake = Fake { hook: Some(&mut hook), ..Fake::new(round, 100) };
    match gang.run(&round, &mut fake) {
        Ok(()) => format!("{:016x}", hash(&mut fake).expect("all jobs are done")),
        Err(why) => format!("{why} ({})", why.may_pass()),
    }
}

/// What each rank of a gang does.
fn play(case: &str, note: &dyn Fn(usize, String)) {
    let (sums, max_message) = match case {
        "scalars" => (SumMode::Scalars, 1 << 30),
        "gradients" => (SumMode::Gradients, 1 << 30),
        "short" => (SumMode::Gradients, 999),
        "auto" => (SumMode::Auto, 1 << 30),
        _ => (SumMode::Gradients, 1 << 30),
    };
    let limit = Duration::from_secs(if case == "stuck" { 2 } else { 30 });
    let gang = Mpi::start(MpiOptions { limit, max_message, sums }).unwrap();
    let (rank, size) = (gang.rank(), gang.size());
    let last = rank == size - 1;
    let tell = |told: Result<String, ExecutorError>| note(rank, told.unwrap_or_else(|why| why.to_string()));
    match case {
        "scalars" | "gradients" | "short" | "auto" => {
            assert!(Mpi::start(MpiOptions::default()).is_err(), "MPI starts once");
            let told = gang.begin(&identity("0.1", (3, 7))).and_then(|()| six_steps(&gang));
            let stats = gang.stats();
            assert!(case != "gradients" || size == 1 || stats.bytes_received > 10_000, "{stats:?}");
            tell(told);
        }
        "fails" | "may pass" | "panics" => {
            let fate = match case {
                "fails" => Fate::Fails,
                "may pass" => Fate::MayPass,
                _ => Fate::Panics,
            };
            let fates = [(5, fate), (7, fate)];
            let told = [fated(&gang, 0, &[]), fated(&gang, 1, &fates), fated(&gang, 2, &[])];
            note(rank, told.join(", "));
        }
        "rounds" => note(rank, fated(&gang, u64::from(last), &[])),
        "kinds" if last => tell(gang.verify(0, 1).map(|()| String::new())),
        "kinds" => note(rank, fated(&gang, 0, &[])),
        "settings" | "weights" => {
            let sigma = if last && case == "settings" { "0.2" } else { "0.1" };
            let told = gang.begin(&identity(sigma, (3, u64::from(last && case == "weights"))));
            tell(told.map(|()| "alike".into()));
            tell(six_steps(&gang));
        }
        "diverged" => tell(gang.verify(100, u64::from(last)).map(|()| "alike".into())),
        "leaves" if last => note(rank, fated(&gang, 0, &[])),
        "leaves" => {
            fated(&gang, 0, &[]);
            note(rank, fated(&gang, 1, &[]));
            note(rank, fated(&gang, 2, &[]));
        }
        "refuses" => {
            let round = round(0, RoundPhase::Update, 8);
            let mut fake = Fake { refuses: last, ..Fake::new(round, 100) };
            let first = gang.run(&round, &mut fake).map(|()| "ran".to_string());
            let failed = first.is_err();
            tell(first);
            if !failed {
                note(rank, fated(&gang, 1, &[]));
            }
        }
        "aborts" => note(rank, fated(&gang, 0, &[(if last { 7 } else { 99 }, Fate::Aborts)])),
        "stuck" => {
            let fate = Fate::Sleeps(Duration::from_secs(100));
            note(rank, fated(&gang, 0, &[(if last { 7 } else { 99 }, fate)]));
            panic!("the program ends with an error");
        }
        "broadcast" => {
            let bytes: Vec<u8> = (0..3_000_001u32).map(|at| (at % 251) as u8).collect();
            let mine = if rank == 0 { bytes.clone() } else { vec![9] };
            tell(gang.broadcast(mine).map(|told| format!("{}", told == bytes)));
        }
        _ => unreachable!("{case}"),
    }
}

/// A rank: mpirun starts it.
#[test]
#[ignore = "started by the other tests"]
fn rank() {
    let (Ok(case), Some(folder)) = (env::var(CASE), env::var_os(FOLDER)) else {
        println!("nothing to do: the other tests start this one");
        return;
    };
    play(&case, &|rank, told| {
        let path = Path::new(&folder).join(format!("{rank}"));
        let before = fs::read_to_string(&path).unwrap_or_default();
        fs::write(path, format!("{before}{told}\n")).unwrap();
    });
}

#[test]
fn any_number_of_ranks_gives_the_same_bits() {
    let alone = format!("{}\n", six_steps(&Threads).unwrap());
    for (case, ranks) in [
        ("gradients", 1),
        ("gradients", 2),
        ("gradients", 3),
        ("gradients", 4),
        ("gradients", 5),
        ("gradients", 8),
        ("short", 2),
        ("short", 3),
        ("short", 4),
        ("scalars", 2),
        ("auto", 2),
        ("auto", 3),
    ] {
        let Some(ended) = gang(case, ranks) else { return };
        assert!(ended.success, "{case} {ranks} {:?}", ended.ranks);
        assert_eq!(ended.ranks, vec![alone.clone(); ranks], "{case}");
    }
}

/// The order of a sum shows in its bits: otherwise these tests would show nothing.
#[test]
fn a_sum_in_another_order_has_other_bits() {
    let round = round(1, RoundPhase::Update, 8);
    let mut fake = Fake::new(round, 1000);
    let in_sequence = (0..8).map(|job| fake.leaf(job)).reduce(fake::add).unwrap();
    Threads.run(&round, &mut fake).unwrap();
    assert_ne!(hash(&mut fake).unwrap(), fake::hash(&in_sequence));
}

#[test]
fn a_job_that_fails_or_panics_fails_on_all_ranks_and_the_next_round_runs() {
    for (case, why) in [
        ("fails", "leaf 5 fails (false)"),
        ("may pass", "leaf 5 fails (true)"),
        ("panics", "it panicked: leaf 5 panics (false)"),
    ] {
        for (ranks, worker) in [(2, 1), (3, 2), (4, 2)] {
            let Some(ended) = gang(case, ranks) else { return };
            assert!(ended.success, "{case}");
            for told in &ended.ranks {
                let parts: Vec<&str> = told.trim().split(", ").collect();
                assert_eq!(parts[1], format!("a job failed on worker {worker}: {why}"));
                assert_eq!((parts[0].len(), parts[2].len()), (16, 16));
            }
            assert_eq!(ended.ranks, vec![ended.ranks[0].clone(); ranks]);
        }
    }
}

#[test]
fn ranks_that_differ_are_an_error_on_all() {
    for (case, all) in [
        ("rounds", "the round of this worker is step "),
        ("kinds", "the round of this worker is "),
        ("settings", "sigma of this worker is 0."),
        ("weights", "the hash of the first weights of this worker is 0"),
        ("diverged", "the weights of worker 2 before step 100 differ"),
    ] {
        let Some(ended) = gang(case, 3) else { return };
        assert!(ended.success && ended.seconds < 15.0, "{case}");
        for told in &ended.ranks {
            assert!(told.starts_with(all), "{case}: {told}");
        }
        let second = ended.ranks[0].lines().nth(1);
        assert!(second.is_none_or(|told| told.contains("the ranks of the gang were not started alike")), "{second:?}");
    }
}

#[test]
fn a_rank_that_leaves_or_cannot_go_on_ends_the_others() {
    let Some(ended) = gang("leaves", 3) else { return };
    assert!(ended.success, "{:?}", ended.ranks);
    for told in &ended.ranks[..2] {
        assert!(told.contains("rank 2 left the gang while rank ") && told.lines().count() == 2, "{told}");
    }
    for ranks in [2, 3, 4] {
        let ended = gang("refuses", ranks).unwrap();
        assert!(ended.success, "{:?}", ended.ranks);
        assert!(ended.ranks[ranks - 1].contains("cannot take what rank"), "{:?}", ended.ranks);
        for told in &ended.ranks[..ranks - 1] {
            let last = told.lines().last().unwrap();
            assert!(last.contains("left the gang") || last.contains("it has failed"), "{:?}", ended.ranks);
        }
    }
}

#[test]
fn a_rank_that_dies_or_never_comes_ends_the_gang() {
    for case in ["aborts", "stuck"] {
        let Some(ended) = gang(case, 2) else { return };
        assert!(!ended.success && ended.seconds < 20.0, "{case} {}", ended.seconds);
        assert!(
            case != "stuck" || ended.ranks[0].contains("not all ranks of the gang came within 2s"),
            "{:?}",
            ended.ranks
        );
    }
}

#[test]
fn rank_0_gives_its_bytes_to_all() {
    let Some(ended) = gang("broadcast", 3) else { return };
    assert_eq!(ended.ranks, ["true\n"; 3]);
}
