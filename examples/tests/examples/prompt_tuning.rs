use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use serde_json::Value;

const NAME: &str = "prompt_tuning";
/// 24 queries for both evaluations, and 20 per step.
const SHORT: [&str; 12] =
    ["--cap", "184", "--shots", "2", "--test", "12", "--batch-size", "4", "--queries", "4", "--classes", "colour"];

/// Returns the flags of the short run; those in `more` replace flags of the same name.
fn with<'a>(more: &[&'a str]) -> Vec<&'a str> {
    let kept = SHORT.chunks(2).filter(|flag| !more.contains(&flag[0])).flatten().copied();
    kept.chain(more.iter().copied()).collect()
}

fn summary(run: &Path) -> Value {
    serde_json::from_slice(&fs::read(run.join("summary.json")).unwrap()).unwrap()
}

/// Returns the results that do not depend on when and how often a query was asked.
fn outcome(summary: &Value) -> [Value; 4] {
    ["accuracy_zero_shot", "accuracy_tuned", "loss_after", "queries_used"].map(|key| summary[key].clone())
}

#[test]
fn http_and_in_process_give_the_same_results() {
    let dir = tempfile::tempdir().unwrap();
    for (prompt, files) in [("text", ["curves.svg", "metrics.csv"]), ("visual", ["prompt.svg", "answers.journal"])] {
        let run = |more: &[&str], to: &str| {
            let to = format!("{prompt}-{to}");
            let more = [&["--prompt", prompt, "--artifact-dir", &to], more].concat();
            crate::succeed(NAME, dir.path(), &with(&more));
            summary(&dir.path().join(to))
        };
        let http = run(&[], "http");
        assert_eq!(http["queries_used"], http["queries_server"], "{prompt}: the counts differ");
        let used = http["queries_used"].as_u64().unwrap();
        assert!((150..=184).contains(&used), "{prompt}: {used} queries");
        for file in files {
            assert!(dir.path().join(format!("{prompt}-http")).join(file).exists(), "{file} is missing");
        }
        let local = run(&["--local"], "local");
        assert_eq!(outcome(&http), outcome(&local), "{prompt}");
        // every query was answered before: none is asked again
        let again = run(&["--resume"], "http");
        assert_eq!(outcome(&http), outcome(&again), "{prompt}");
        assert!(again["answered_from_journal"].as_u64().unwrap() >= used, "{prompt}");
        assert_eq!(again["queries_server"], used, "{prompt}");
        // without --resume they are asked again, and the answers that were paid for are kept
        let anew = run(&[], "http");
        assert_eq!(outcome(&http), outcome(&anew), "{prompt}");
        assert!(dir.path().join(format!("{prompt}-http/answers.journal.1")).exists());
    }
}

/// Starts a run in `dir`; returns it once its server is up, with the id of the server's process.
fn start(dir: &Path, more: &[&str]) -> (Child, BufReader<std::process::ChildStdout>, String) {
    let mut child = Command::new(crate::example(NAME))
        .args(with(more))
        .current_dir(dir)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut out = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    out.read_line(&mut line).unwrap();
    let process =
        line.strip_prefix("server: process ").and_then(|rest| rest.split(' ').next()).expect(&line).to_string();
    (child, out, process)
}

#[cfg(unix)]
#[test]
fn a_killed_server_is_restarted_and_the_counts_agree() {
    let dir = tempfile::tempdir().unwrap();
    let more = ["--prompt", "text", "--cap", "1024"];
    crate::succeed(NAME, dir.path(), &with(&[more.as_slice(), &["--artifact-dir", "calm"]].concat()));
    let (mut child, mut out, process) = start(dir.path(), &[more.as_slice(), &["--artifact-dir", "killed"]].concat());
    let mut line = String::new();
    // the zero-shot evaluation is done: the run is in the middle of its steps
    out.read_line(&mut line).unwrap();
    assert!(line.contains("zero-shot"), "{line}");
    assert!(Command::new("kill").args(["-9", &process]).status().unwrap().success());
    let mut rest = String::new();
    out.read_to_string(&mut rest).unwrap();
    assert!(child.wait().unwrap().success(), "{rest}");
    assert!(rest.contains("started again"), "{rest}");
    let (calm, killed) = (summary(&dir.path().join("calm")), summary(&dir.path().join("killed")));
    assert_eq!(outcome(&calm), outcome(&killed));
    assert_eq!(killed["queries_used"], killed["queries_server"]);
}

#[cfg(unix)]
#[test]
fn a_resumed_run_asks_nothing_twice() {
    let dir = tempfile::tempdir().unwrap();
    let more = ["--prompt", "text", "--cap", "1024", "--artifact-dir", "run"];
    let (mut child, mut out, _) = start(dir.path(), &more);
    let mut line = String::new();
    out.read_line(&mut line).unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    crate::succeed(NAME, dir.path(), &with(&[more.as_slice(), &["--resume"]].concat()));
    let resumed = summary(&dir.path().join("run"));
    crate::succeed(NAME, dir.path(), &with(&["--prompt", "text", "--cap", "1024", "--artifact-dir", "calm"]));
    assert_eq!(outcome(&resumed), outcome(&summary(&dir.path().join("calm"))));
    assert!(resumed["answered_from_journal"].as_u64().unwrap() >= 12, "the evaluation was asked again");
    assert_eq!(resumed["queries_used"], resumed["queries_server"]);
}

#[test]
fn a_running_server_can_be_used() {
    let dir = tempfile::tempdir().unwrap();
    let mut server = Command::new(crate::example("blackbox_server"))
        .args(["--port", "0", "--charge-log", "charges"])
        .current_dir(dir.path())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(server.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let address = line.trim().strip_prefix("listening on ").expect(&line).to_string();
    let output = crate::run(NAME, dir.path(), &with(&["--prompt", "text", "--endpoint", &address]));
    server.kill().unwrap();
    server.wait().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let summary = summary(&dir.path().join("artifacts/prompt_tuning"));
    assert_eq!(summary["queries_used"], summary["queries_server"]);
}

#[test]
fn errors_name_the_setting() {
    let dir = tempfile::tempdir().unwrap();
    for (args, says) in [
        (vec!["--cap", "30"], "--cap 30"),
        (vec!["--method", "backprop"], "no gradient"),
        (vec!["--shots", "0"], "--shots 0"),
        (vec!["--queries", "0"], "queries"),
        (vec!["--local", "--alignment", "nowhere"], "nowhere"),
        (vec!["--endpoint", "https://127.0.0.1:1"], "TLS"),
        (vec!["--resume", "--artifact-dir", "none"], "resume"),
        (vec!["--batch-size", "4611686018427387904", "--queries", "3"], "--cap 184"),
    ] {
        let args = with(&args);
        let error = crate::fail(NAME, dir.path(), &args);
        assert!(error.contains(says), "{args:?}: {error}");
    }
}

#[test]
fn text_pretrain_writes_an_encoder_that_clip_align_reads() {
    let dir = tempfile::tempdir().unwrap();
    crate::succeed(
        "text_pretrain",
        dir.path(),
        &["--steps", "3", "--batch-size", "8", "--embed-dim", "16", "--depth", "1", "--out", "tower"],
    );
    let args = ["--text-encoder", "tower", "--copies", "1", "--epochs", "1", "--method", "backprop"];
    crate::succeed("clip_align", dir.path(), &args);
}
