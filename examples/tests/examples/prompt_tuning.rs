use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use serde_json::Value;

use crate::flaky_server::FlakyServer;

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

/// Returns the flags of a short run on a server, with a text prompt.
fn on<'a>(server: &'a FlakyServer, more: &[&'a str]) -> Vec<&'a str> {
    with(&[["--prompt", "text", "--endpoint", &server.address].as_slice(), more].concat())
}

/// Returns the flags that resume such a run in the folder `run`; its cap is the one it had.
fn resumed<'a>(server: &'a FlakyServer, more: &[&'a str]) -> Vec<&'a str> {
    let run = on(server, &["--artifact-dir", "run", "--resume"]);
    let without_cap = run.into_iter().filter(|arg| !["--cap", "184"].contains(arg));
    without_cap.chain(more.iter().copied()).collect()
}

/// At a server that may charge again what is sent again, steps used to take the whole cap, so that
/// one such request made the last evaluation impossible.
#[test]
fn one_failed_request_does_not_end_a_run() {
    let dir = tempfile::tempdir().unwrap();
    let server = FlakyServer::start(|request| request == 10);
    crate::succeed(NAME, dir.path(), &on(&server, &["--cap", "400", "--artifact-dir", "run"]));
    let summary = summary(&dir.path().join("run"));
    // 400 less a tenth and two evaluations of 12, in steps of 20
    assert_eq!((&summary["steps"], &summary["steps_planned"]), (&16.into(), &16.into()));
    assert!(summary["stopped"].is_null() && summary["accuracy_tuned"].is_f64(), "{summary}");
    let used = summary["queries_used"].as_u64().unwrap();
    assert!(used == server.rows() && used > 12 + 16 * 20 + 12 && used <= 400, "{used}, {}", server.rows());
    assert!(dir.path().join("run/prompt.safetensors").exists());
}

#[test]
fn a_run_without_reserve_stops_early_and_a_higher_cap_ends_it() {
    let dir = tempfile::tempdir().unwrap();
    // requests of the third and fourth step; what is in flight together decides which
    let server = FlakyServer::start(|request| (6..10).contains(&request));
    let args = on(&server, &["--cap", "400", "--artifact-dir", "run"]);
    let out = crate::succeed(NAME, dir.path(), &args);
    let run = dir.path().join("run");
    let early = summary(&run);
    let (steps, spent) = (early["steps"].as_u64().unwrap(), server.rows());
    let stop = format!("{steps} of 16 steps");
    assert!(steps < 16 && out.contains(&format!("training stops after {stop}")), "{out}");
    assert!(early["stopped"].as_str().unwrap().contains(&stop) && early["accuracy_tuned"].is_f64(), "{early}");
    assert_eq!(early["queries_used"].as_u64(), Some(spent));
    assert!(spent > 12 + 20 * steps + 12 && spent <= 400, "{spent}");

    // nothing is asked twice, and a cap that is spent already is refused
    crate::succeed(NAME, dir.path(), &resumed(&server, &[]));
    assert_eq!((outcome(&early), server.rows()), (outcome(&summary(&run)), spent));
    let lower = crate::fail(NAME, dir.path(), &resumed(&server, &["--cap", "300"]));
    assert!(lower.contains("--cap 300") && lower.contains(&spent.to_string()), "{lower}");
    // the refused cap is not kept
    crate::succeed(NAME, dir.path(), &resumed(&server, &[]));

    let out = crate::succeed(NAME, dir.path(), &resumed(&server, &["--cap", "500"]));
    assert!(out.contains("the cap is 500 now; the 16 steps that were planned stay"), "{out}");
    let whole = summary(&run);
    assert!(whole["stopped"].is_null(), "{whole}");
    // what the step that broke off was answered is not asked again
    let most = spent + 20 * (16 - steps) + 12;
    assert!(whole["steps"] == 16 && (most - 20..=most).contains(&server.rows()), "{} of {most}", server.rows());
    // the steps are those of a run without failures
    let calm = FlakyServer::start(|_| false);
    crate::succeed(NAME, dir.path(), &on(&calm, &["--cap", "400", "--artifact-dir", "calm"]));
    let calm = summary(&dir.path().join("calm"));
    for key in ["accuracy_zero_shot", "accuracy_tuned", "loss_after", "steps"] {
        assert_eq!(whole[key], calm[key], "{key}");
    }
}

#[test]
fn a_prompt_that_cannot_be_evaluated_is_saved() {
    let dir = tempfile::tempdir().unwrap();
    let server = FlakyServer::start(|request| request >= 20);
    let out = crate::succeed(NAME, dir.path(), &on(&server, &["--cap", "300", "--artifact-dir", "run"]));
    assert!(out.contains("saved, not evaluated"), "{out}");
    let summary = summary(&dir.path().join("run"));
    assert!(summary["accuracy_tuned"].is_null() && summary["loss_after"].is_null(), "{summary}");
    assert!(summary["stopped"].as_str().unwrap().contains("not evaluated"), "{summary}");
    assert_eq!((&summary["steps"], &summary["steps_planned"]), (&9.into(), &12.into()));
    assert!(summary["queries_used"].as_u64() == Some(server.rows()) && server.rows() <= 300, "{}", server.rows());
    assert!(dir.path().join("run/prompt.safetensors").exists());
}

#[test]
fn an_endpoint_of_absurd_or_other_sizes_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    for (info, says) in [
        (r#"{"classes":["a"],"image":[3,4000000000,4000000000]}"#, "image = [3, 4000000000, 4000000000]"),
        (r#"{"classes":["a"],"image":[3,1,1],"context":[1,9000000000000000]}"#, "context = [1, 9000000000000000]"),
        (r#"{"classes":["a"],"image":[3,1,-1]}"#, "-1"),
        (r#"{"classes":["a"],"image":[3,1,1]}"#, "--classes"),
    ] {
        let server = FlakyServer::with_info(info.into(), |_| true);
        let error = crate::fail(NAME, dir.path(), &on(&server, &[]));
        assert!(error.contains(says), "{info}: {error}");
        assert_eq!(server.rows(), 0, "{info}");
    }
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
