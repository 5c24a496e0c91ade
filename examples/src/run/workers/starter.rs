//! The program that starts the workers of a run on this machine, and watches them.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, IsTerminal, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use flops_distributed::hub::{Hub, HubOptions, HubStats};
use flops_report::output::CLOSED_PIPE;
use serde_json::Value;

use super::super::artifacts::Artifacts;
use super::guard;
use super::tally::{Tally, Work};
use crate::cli::worker_args::{Engine, WorkerArgs};

/// The environment variable with the place of a worker: its number and the number of workers.
const PLACE: &str = "FLOPS_WORKER";
/// The exit code of a worker that others went on without.
pub const AGAIN: i32 = 75;
/// The folder of the workers in the artifact folder.
const FOLDER: &str = "workers";
/// The output of a worker that has no terminal.
const OUTPUT: &str = "output.log";
/// The most restarts of a run.
const MAX_RESTARTS: u64 = 10;
/// How long the others may take to end after the first, which has the results. Where the user stopped
/// the first, they would train on.
const FAREWELL: Duration = Duration::from_secs(2);
/// How long the first may take to say why the run failed, after another did.
const EXPLANATION: Duration = Duration::from_secs(2);
/// How often the workers are looked at.
const EVERY: Duration = Duration::from_millis(20);

/// Returns the place of this process, if a starter started it: its number, and that of all workers.
///
/// # Errors
/// Where the environment variable is not one of a starter.
pub fn place() -> Result<Option<(usize, usize)>> {
    let Ok(text) = std::env::var(PLACE) else { return Ok(None) };
    let place = text.split_once('/').and_then(|(number, all)| Some((number.parse().ok()?, all.parse().ok()?)));
    place.map(Some).with_context(|| format!("{PLACE} is {text}, and not set by this program; unset it"))
}

/// Returns the folder of a worker in the artifact folder of a run. That of the first holds no run.
pub fn folder(dir: &Path, number: usize) -> PathBuf {
    dir.join(FOLDER).join(number.to_string())
}

/// Returns the threads of each of so many workers on this machine.
pub fn threads(workers: usize) -> usize {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    (cores / workers).max(1)
}

/// Starts the workers of a run with the artifact folder `dir`, and waits for its end.
///
/// `threads` is what each of them may use. `plain` says that the first leaves the terminal to lines.
///
/// # Errors
/// The error of a worker, and where one cannot be started.
pub fn run(args: &WorkerArgs, dir: &Path, threads: usize, plain: bool) -> Result<()> {
    // no other starter uses it; the folder itself is the first worker's
    let _folder = Artifacts::open(&dir.join(FOLDER))?;
    let program = std::env::current_exe().context("the path of this program is not known")?;
    let mut workers = Workers {
        hub: Hub::start(HubOptions::default())?,
        program,
        dir: dir.into(),
        threads,
        all: vec![],
        restarts: 0,
        seen: HubStats::default(),
        later: (!plain && std::io::stdout().is_terminal()).then(Vec::new),
    };
    let count = args.workers.unwrap_or(1);
    for number in 0..count {
        std::fs::create_dir_all(folder(dir, number))?;
        guard::take(&folder(dir, number));
        workers.all.push(Worker { work: Work::of(number.to_string()), running: None });
    }
    for number in 0..count {
        workers.start(number, false)?;
    }
    workers.wait()?;
    let tally = workers.tally(args);
    drop(workers);
    tally.print();
    add_to_summary(dir, &tally)
}

/// Adds what the workers did to `summary.json`, which the first has written.
fn add_to_summary(dir: &Path, tally: &Tally) -> Result<()> {
    let artifacts = Artifacts::open(dir)?;
    let path = artifacts.path("summary.json");
    let read = || Ok::<Value, anyhow::Error>(serde_json::from_slice(&std::fs::read(&path)?)?);
    let mut summary = read().with_context(|| format!("cannot read {}", path.display()))?;
    summary["workers"] = serde_json::to_value(tally)?;
    artifacts.write_json("summary.json", &summary)
}

/// A worker, by its place.
struct Worker {
    work: Work,
    running: Option<Running>,
}

/// A process of a worker. It is killed when this is dropped.
struct Running {
    child: Child,
    /// Hands on what the first says on standard error, and returns its error.
    said: Option<JoinHandle<Option<String>>>,
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// How a process ended, where not well.
enum Fault {
    /// It may be started again.
    Again(String),
    /// The run cannot go on.
    Fatal { code: i32, why: Option<String> },
}

struct Workers {
    hub: Hub,
    program: PathBuf,
    dir: PathBuf,
    threads: usize,
    all: Vec<Worker>,
    restarts: u64,
    /// What has been told of the hub.
    seen: HubStats,
    /// Lines that are printed when the terminal interface is gone, where there is one.
    later: Option<Vec<String>>,
}

impl Workers {
    /// Starts a worker.
    fn start(&mut self, number: usize, again: bool) -> Result<()> {
        let mut command = Command::new(&self.program);
        command.args(std::env::args_os().skip(1)).envs(self.hub.environment());
        command.env(PLACE, format!("{number}/{}", self.all.len())).stdin(Stdio::piped());
        if std::env::var_os("RAYON_NUM_THREADS").is_none() {
            command.env("RAYON_NUM_THREADS", self.threads.to_string());
        }
        if number == 0 {
            command.stderr(Stdio::piped());
        } else {
            let (out, err) = output(&self.dir, number, again)?;
            command.stdout(out).stderr(err);
        }
        let mut child = command.spawn().with_context(|| {
            let program = self.program.display();
            format!("worker {number}, {program}, cannot be started")
        })?;
        let said = child.stderr.take().map(|stderr| std::thread::spawn(move || hand_on(stderr)));
        self.all[number].running = Some(Running { child, said });
        Ok(())
    }

    /// Prints a line, at once or at the end.
    fn say(&mut self, line: String) {
        match &mut self.later {
            Some(lines) => lines.push(line),
            None => println!("{line}"),
        }
    }

    /// Waits until the first worker, and then the others, have ended.
    fn wait(&mut self) -> Result<()> {
        let outcome = self.watch();
        if outcome.is_err() {
            // before what was said is printed
            self.all.iter_mut().for_each(|worker| worker.running = None);
        }
        self.later.take().unwrap_or_default().iter().for_each(|line| println!("{line}"));
        outcome
    }

    fn watch(&mut self) -> Result<()> {
        let mut until = None;
        loop {
            for number in 0..self.all.len() {
                let Some(status) = self.ended(number)? else { continue };
                match self.fault(number, status) {
                    None if number == 0 => until = Some(Instant::now() + FAREWELL),
                    None => {}
                    // nobody waits for it any more
                    Some(_) if until.is_some() => {}
                    Some(Fault::Again(why)) => self.start_again(number, &why)?,
                    Some(Fault::Fatal { code, why }) => return self.fail(number, code, why),
                }
            }
            self.tell();
            let all_ended = self.all.iter().all(|worker| worker.running.is_none());
            match until {
                Some(until) if all_ended || Instant::now() >= until => return Ok(()),
                _ => std::thread::sleep(EVERY),
            }
        }
    }

    /// How the process of a worker ended, if it has.
    fn ended(&mut self, number: usize) -> Result<Option<ExitStatus>> {
        let Some(running) = &mut self.all[number].running else { return Ok(None) };
        running.child.try_wait().with_context(|| format!("worker {number} cannot be watched"))
    }

    /// Notes the end of a process, and says what is wrong with it.
    fn fault(&mut self, number: usize, status: ExitStatus) -> Option<Fault> {
        let said = self.all[number].running.take().and_then(|mut running| running.said.take());
        self.note_work(number);
        let why = match said {
            Some(thread) => thread.join().ok().flatten(),
            None => last_error(&folder(&self.dir, number).join(OUTPUT)),
        };
        match status.code() {
            // the reader of the first worker's words went away, and its run is whole all the same
            Some(code) if code == 0 || code == i32::from(CLOSED_PIPE) => None,
            Some(AGAIN) => Some(Fault::Again(why.unwrap_or_else(|| "the others went on without it".into()))),
            Some(code) => Some(Fault::Fatal { code, why }),
            None => Some(Fault::Again(format!("killed by {status}"))),
        }
    }

    /// Adds what a process that has ended told of its work.
    fn note_work(&mut self, number: usize) {
        match guard::take(&folder(&self.dir, number)) {
            Some(stats) => self.all[number].work.add(&stats),
            None => self.all[number].work.starts += 1,
        }
    }

    /// Starts a worker again, as long as there are restarts left.
    fn start_again(&mut self, number: usize, why: &str) -> Result<()> {
        if self.restarts >= MAX_RESTARTS {
            let what = format!("worker {number} ended ({why}), and {MAX_RESTARTS} restarts are used up");
            if number == 0 {
                bail!("{what}; --resume goes on from the last checkpoint in {}", self.dir.display());
            }
            self.say(format!("{what}: the run goes on without it"));
            return Ok(());
        }
        self.restarts += 1;
        self.say(format!("worker {number} ended ({why}); it is started again, {} of {MAX_RESTARTS}", self.restarts));
        self.start(number, true)
    }

    /// Ends the run with the error of a worker; the first one's is preferred.
    fn fail(&mut self, number: usize, code: i32, why: Option<String>) -> Result<()> {
        let (mut number, mut code, mut why) = (number, code, why);
        let until = Instant::now() + EXPLANATION;
        while number != 0 && self.all[0].running.is_some() && Instant::now() < until {
            if let Some(status) = self.ended(0)? {
                if let Some(Fault::Fatal { code: first, why: Some(reason) }) = self.fault(0, status) {
                    (number, code, why) = (0, first, Some(reason));
                }
                break;
            }
            std::thread::sleep(EVERY);
        }
        match why {
            Some(why) if number == 0 => bail!(why),
            Some(why) => bail!("worker {number}: {why}"),
            None => bail!("worker {number} ended with exit code {code}{}", place_of_output(&self.dir, number)),
        }
    }

    /// Tells who came and went since the last look.
    fn tell(&mut self) {
        let now = self.hub.stats();
        if (now.joins, now.losses) != (self.seen.joins, self.seen.losses) {
            let HubStats { workers, joins, losses, .. } = now;
            self.say(format!("workers: {workers} take part, {joins} joined and {losses} lost so far"));
        }
        self.seen = now;
    }

    /// What all workers did.
    fn tally(&mut self, args: &WorkerArgs) -> Tally {
        // before those that still run are killed
        let hub = self.hub.stats();
        for number in 0..self.all.len() {
            if self.all[number].running.take().is_some() {
                self.note_work(number);
            }
        }
        Tally {
            executor: Engine::Hub.name(),
            sums: args.sums,
            leaves: args.leaves(),
            joins: hub.joins,
            losses: hub.losses,
            restarts: self.restarts,
            each: self.all.iter().map(|worker| worker.work.clone()).collect(),
        }
    }
}

/// The file for the output of a worker, for both streams.
fn output(dir: &Path, number: usize, again: bool) -> Result<(File, File)> {
    let path = folder(dir, number).join(OUTPUT);
    let failed = || format!("cannot write {}", path.display());
    // a link would be followed, and what it names overwritten
    if !again && std::fs::symlink_metadata(&path).is_ok() {
        std::fs::remove_file(&path).with_context(failed)?;
    }
    let file = OpenOptions::new().append(true).create(true).open(&path).with_context(failed)?;
    Ok((file.try_clone().with_context(failed)?, file))
}

/// Hands on lines to standard error, except for the error that a program ends with, which is
/// returned.
fn hand_on(stderr: impl Read) -> Option<String> {
    let mut error = None::<String>;
    for line in BufReader::new(stderr).split(b'\n') {
        let Ok(line) = line else { break };
        let line = String::from_utf8_lossy(&line);
        match line.strip_prefix("error: ") {
            Some(why) => {
                if let Some(before) = error.replace(why.to_string()) {
                    eprintln!("error: {before}");
                }
            }
            None => eprintln!("{line}"),
        }
    }
    error
}

/// The last error in the output of a worker.
fn last_error(path: &Path) -> Option<String> {
    let text = std::fs::read(path).ok()?;
    let text = String::from_utf8_lossy(&text);
    text.lines().rev().find_map(|line| Some(line.strip_prefix("error: ")?.to_string()))
}

/// Where to look for what a worker said.
fn place_of_output(dir: &Path, number: usize) -> String {
    if number == 0 {
        return String::new();
    }
    format!("; see {}", folder(dir, number).join(OUTPUT).display())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_error_of_a_program_is_kept_from_its_other_lines() {
        assert_eq!(hand_on(&b"error: one\n"[..]).as_deref(), Some("one"));
        assert_eq!(hand_on(&b""[..]), None);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(OUTPUT);
        assert_eq!(last_error(&path), None);
        std::fs::write(&path, "epoch 1\nerror: one\nerror: two\n").unwrap();
        assert_eq!(last_error(&path).as_deref(), Some("two"));
    }
}
