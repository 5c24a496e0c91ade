//! Runs of `vit_cifar` that several processes share.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use flops_distributed::hub::{Hub, HubOptions};
use serde_json::Value;
use tempfile::TempDir;

use crate::vit_cifar::folder;

const NAME: &str = "vit_cifar";

/// 8 steps of the small model, in 2 epochs.
const TINY: [&str; 12] = [
    "--weights",
    "tiny.safetensors",
    "--limit",
    "64",
    "--batch-size",
    "16",
    "--copies",
    "0",
    "--queries",
    "4",
    "--epochs",
    "2",
];

fn with<'a>(more: &[&'a str]) -> Vec<&'a str> {
    [TINY.as_slice(), more].concat()
}

/// Trains into a folder, and returns the bytes of the model.
fn trained(dir: &TempDir, run: &str, more: &[&str]) -> Vec<u8> {
    crate::succeed(NAME, dir.path(), &with(&[&["--artifact-dir", run], more].concat()));
    model(&dir.path().join(run))
}

fn model(run: &Path) -> Vec<u8> {
    fs::read(run.join("model.safetensors")).unwrap()
}

fn summary(run: &Path) -> Value {
    serde_json::from_slice(&fs::read(run.join("summary.json")).unwrap()).unwrap()
}

#[test]
fn workers_end_with_the_model_of_one_process() {
    let dir = folder();
    for (name, method) in [
        ("tail", vec!["--method", "forward"]),
        ("full", vec!["--method", "forward", "--scope", "full", "--sites", "branch"]),
        ("mezo", vec!["--method", "mezo"]),
    ] {
        let method = [method.as_slice(), &["--leaves", "8"]].concat();
        let alone = trained(&dir, &format!("{name}_alone"), &method);
        for workers in ["1", "2", "4"] {
            let run = format!("{name}_{workers}");
            let shared = trained(&dir, &run, &[method.as_slice(), &["--workers", workers]].concat());
            assert!(shared == alone, "{name}: {workers} workers ended with another model");
        }
    }
}

#[test]
fn the_summary_tells_what_workers_did() {
    let dir = folder();
    trained(&dir, "alone", &[]);
    assert!(summary(&dir.path().join("alone"))["workers"].is_null());
    let out = crate::succeed(NAME, dir.path(), &with(&["--workers", "2", "--artifact-dir", "run"]));
    assert!(out.contains("2 joined, 0 lost, 0 started again") && out.contains("MB sent"), "{out}");
    assert_eq!(out.matches("test accuracy after").count(), 1, "{out}");
    let run = dir.path().join("run");
    let workers = &summary(&run)["workers"];
    for (key, value) in [("joins", 2), ("losses", 0), ("restarts", 0), ("leaves", 8)] {
        assert_eq!(workers[key], value, "{key}: {workers}");
    }
    assert_eq!((&workers["executor"], &workers["sums"]), (&"hub".into(), &"auto".into()));
    let each = workers["each"].as_array().unwrap();
    assert_eq!(each.len(), 2);
    for (number, work) in each.iter().enumerate() {
        assert_eq!((&work["worker"], &work["starts"]), (&number.to_string().into(), &1.into()));
        for key in ["jobs", "bytes_sent", "bytes_received", "takeovers"] {
            assert!(work[key].is_u64(), "{key}: {work}");
        }
        assert!(work["jobs"].as_u64() > Some(0) && work["bytes_sent"].as_u64() > Some(0), "{work}");
        assert!(work["seconds_waited"].is_f64() && work["seconds_run"].is_f64(), "{work}");
    }
    // the other worker has a folder of its own, and its output there
    let other = fs::read_to_string(run.join("workers/1/output.log")).unwrap();
    assert!(other.contains("epoch 2/2"), "{other}");
    assert!(!run.join("workers/1/model.safetensors").exists());
}

/// `program --workers 2 | head -1`: the run is whole, and so is its summary.
#[cfg(unix)]
#[test]
fn a_closed_pipe_ends_no_shared_run() {
    let dir = folder();
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let args = with(&["--workers", "2", "--plain", "--artifact-dir", "run"]);
    let mut program = Command::new(crate::example(NAME));
    let output = program.args(args).current_dir(dir.path()).stdout(writer).stderr(Stdio::piped()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!((output.status.code(), said.as_ref()), (Some(141), ""));
    assert_eq!(summary(&dir.path().join("run"))["workers"]["joins"], 2);
}

#[test]
fn a_shared_run_is_resumed_by_any_number_of_workers() {
    let dir = folder();
    let whole = trained(&dir, "whole", &["--leaves", "8"]);
    trained(&dir, "run", &["--workers", "2", "--stop-after", "1"]);
    let args = with(&["--workers", "3", "--resume", "--artifact-dir", "run"]);
    let out = crate::succeed(NAME, dir.path(), &args);
    assert!(out.contains("going on after epoch 1 of 2"), "{out}");
    assert!(model(&dir.path().join("run")) == whole, "the resumed run ended with another model");
    // the error is the first worker's
    let error = crate::fail(NAME, dir.path(), &with(&["--workers", "2", "--resume", "--artifact-dir", "none"]));
    assert!(error.contains("no run to resume in none"), "{error}");
    let error = crate::fail(NAME, dir.path(), &[args.as_slice(), &["--lr", "0.5"]].concat());
    assert!(error.contains("lr is 0.5"), "{error}");
}

#[test]
fn what_workers_cannot_share_is_refused() {
    let dir = folder();
    for (args, says) in [
        (vec!["--workers", "2", "--method", "backprop"], ["--method backprop", "leave --workers"]),
        (vec!["--workers", "2", "--dry-run"], ["--dry-run", "leave --workers"]),
        (vec!["--workers", "0"], ["--workers 0", "use 1"]),
        (vec!["--workers", "2", "--leaves", "6"], ["leaves = 6", "power of two"]),
        (vec!["--sums", "most"], ["most", "gradients"]),
        (vec!["--executor", "hub"], ["FLOPS_HUB", "--workers"]),
        (vec!["--executor", "nats://host"], ["nats", "--"]),
        (vec!["--executor", "pigeon"], ["pigeon", "nats://HOST"]),
    ] {
        let error = crate::fail(NAME, dir.path(), &with(&args));
        assert!(says.iter().all(|says| error.contains(says)), "{args:?} gives: {error}");
    }
    assert!(!dir.path().join("artifacts/vit_cifar/config.json").exists());
}

/// Two processes on one hub, the second with other flags.
fn pair(dir: &Path, first: &[&str], second: &[&str]) -> [Output; 2] {
    let hub = Hub::start(HubOptions::default()).unwrap();
    let start = |run: &str, more: &[&str]| {
        let args = with(&[&["--executor", "hub", "--artifact-dir", run], more].concat());
        // clap rejects a flag that is given twice
        let given = |flag: &str| more.contains(&flag);
        let pairs = args[..TINY.len()].chunks(2).filter(|pair| !given(pair[0])).flatten().chain(&args[TINY.len()..]);
        let mut command = Command::new(crate::example(NAME));
        command.args(pairs).envs(hub.environment()).current_dir(dir);
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let children = [start("a", first), start("b", second)];
    children.map(|child: Child| child.wait_with_output().unwrap())
}

#[test]
fn workers_that_were_started_unlike_are_told_in_what() {
    let dir = folder();
    // another model of the same sizes
    let other = folder();
    fs::copy(other.path().join("tiny.safetensors"), dir.path().join("other.safetensors")).unwrap();
    for (flags, says) in [
        (["--sigma", "0.3"], "--sigma of this worker is 0.3"),
        (["--weights", "other.safetensors"], "weights of this worker"),
        (["--batch-size", "32"], "--batch-size of this worker is 32"),
        (["--lr", "0.001"], "--lr of this worker is 0.001"),
    ] {
        // whoever comes first sets what the others must have
        let outputs = pair(dir.path(), &[], &flags);
        let failed: Vec<&Output> = outputs.iter().filter(|output| !output.status.success()).collect();
        assert_eq!(failed.len(), 1, "{flags:?}: {outputs:?}");
        let error = String::from_utf8_lossy(&failed[0].stderr);
        let (name, _) = says.split_once(" of this worker").unwrap();
        assert!(error.contains(name) && error.contains("start all workers alike"), "{flags:?}: {error}");
        assert_eq!(failed[0].status.code(), Some(1));
        if !outputs[1].status.success() {
            assert!(error.contains(says), "{error}");
        }
    }
    let same = pair(dir.path(), &[], &[]);
    assert!(same.iter().all(|output| output.status.success()), "{same:?}");
    assert!(model(&dir.path().join("a")) == model(&dir.path().join("b")));
}

#[cfg(target_os = "linux")]
mod processes {
    use super::*;

    /// The children of a process, with the number of each worker.
    fn workers(starter: u32) -> Vec<(u32, usize)> {
        let all = fs::read_dir("/proc").unwrap().filter_map(|entry| {
            let pid: u32 = entry.ok()?.file_name().to_str()?.parse().ok()?;
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
            // the parent is the second field after the name
            let parent: u32 = stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()?;
            let environment = fs::read(format!("/proc/{pid}/environ")).ok().filter(|_| starter == parent)?;
            let place = environment.split(|&byte| byte == 0).find_map(|entry| entry.strip_prefix(b"FLOPS_WORKER="))?;
            let number = str::from_utf8(place).ok()?.split_once('/')?.0.parse().ok()?;
            Some((pid, number))
        });
        all.collect()
    }

    fn is_alive(pid: u32) -> bool {
        // a process that has ended and that nobody waited for has no command line
        fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| !line.is_empty())
    }

    fn kill(pid: u32) {
        Command::new("kill").args(["-9", &pid.to_string()]).status().unwrap();
    }

    fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
        let until = Instant::now() + Duration::from_secs(60);
        while !holds() {
            assert!(Instant::now() < until, "{what} takes too long");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// A long run of three workers.
    fn start(dir: &Path, run: &str, more: &[&str]) -> Child {
        let args = with(&[&["--workers", "3", "--artifact-dir", run], more].concat());
        let mut command = Command::new(crate::example(NAME));
        command.args(args).current_dir(dir).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    }

    /// Waits until a worker has written the checkpoint of an epoch.
    fn wait_for_epoch(folder: &Path, epoch: usize) {
        let file = |epoch: usize| folder.join(format!("checkpoint/model-{epoch}.mpk"));
        wait_until("an epoch", || (epoch..epoch + 200).any(|epoch| file(epoch).exists()));
    }

    const LONG: [&str; 6] = ["--queries", "32", "--epochs", "40", "--scope", "full"];

    #[test]
    fn killed_workers_change_nothing() {
        let dir = folder();
        let flags = |more: &[&'static str]| -> Vec<&'static str> {
            let of = |flag: &str| LONG.contains(&flag);
            let base: Vec<&str> = TINY.chunks(2).filter(|pair| !of(pair[0])).flatten().copied().collect();
            [&base, LONG.as_slice(), more].concat()
        };
        crate::succeed(NAME, dir.path(), &flags(&["--leaves", "8", "--artifact-dir", "alone"]));
        let mut command = Command::new(crate::example(NAME));
        command.args(flags(&["--workers", "3", "--artifact-dir", "run"])).current_dir(dir.path());
        let starter = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let run = dir.path().join("run");
        let victim = |number: usize| {
            let found = || workers(starter.id()).into_iter().find(|(_, of)| *of == number);
            wait_until("a worker", || found().is_some());
            found().unwrap().0
        };
        wait_for_epoch(&run, 2);
        kill(victim(1));
        wait_for_epoch(&run, 6);
        kill(victim(0));
        let output = starter.wait_with_output().unwrap();
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{out}{err}");
        for number in [0, 1] {
            assert!(out.contains(&format!("worker {number} ended (killed by signal: 9")), "{out}");
        }
        let summary = summary(&run);
        assert_eq!((&summary["workers"]["restarts"], &summary["workers"]["losses"]), (&2.into(), &2.into()));
        assert_eq!(summary["workers"]["each"][0]["starts"], 2);
        assert!(model(&run) == model(&dir.path().join("alone")), "the run ended with another model");
    }

    #[test]
    fn no_worker_outlives_its_starter() {
        let dir = folder();
        let mut starter = start(dir.path(), "run", &[]);
        wait_until("the workers", || workers(starter.id()).len() == 3);
        let all: BTreeSet<u32> = workers(starter.id()).into_iter().map(|(pid, _)| pid).collect();
        starter.kill().unwrap();
        starter.wait().unwrap();
        let start = Instant::now();
        wait_until("their end", || all.iter().all(|pid| !is_alive(*pid)));
        assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    }
}

/// The folder of another starter is not touched.
#[test]
fn two_starters_do_not_share_a_folder() {
    let dir = folder();
    let workers: PathBuf = dir.path().join("run/workers");
    let held = flops_examples::run::artifacts::Artifacts::open(&workers).unwrap();
    let error = crate::fail(NAME, dir.path(), &with(&["--workers", "2", "--artifact-dir", "run"]));
    assert!(error.contains("run/workers") && error.contains("in use"), "{error}");
    drop(held);
}
