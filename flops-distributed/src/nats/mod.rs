//! The log of a run on NATS servers with JetStream: for clusters, where workers come and go.
//!
//! A run has a stream of its own, in which each subject keeps its first message. Entries that are
//! larger than the messages of the server are written in parts. A server that is lost is waited for,
//! and one that comes back with its store changes nothing. The log stays on the server until it is
//! [deleted](NatsLog::delete), so a run can be taken up again by any number of workers.
//!
//! Whoever may publish to the subjects of a run can stop it, though not change its results unnoticed
//! where the payloads are checked: use [authentication](NatsAuth) and [encryption](NatsOptions::ca).

mod envelope;
mod options;
mod outbox;
mod reader;
mod server;

use std::fmt::{self, Debug, Formatter};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Sender};
use std::time::Duration;

use async_nats::jetstream;
use async_nats::jetstream::context::DeleteStreamErrorKind;
use bytes::Bytes;
use flops_executor::ExecutorError;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};

pub use self::options::{NatsAuth, NatsOptions};
use self::outbox::{Outgoing, write};
use self::reader::{Queue, parts, read};
use self::server::{Server, connect, stream_name};
use crate::{DistributedError, Entry, Key, Log, Traffic, checked_name, random};

/// How often the latest checkpoint is looked for again where another takes its place meanwhile.
const TRIES: usize = 5;

/// How long the last entry of a worker that leaves may take.
const FAREWELL: Duration = Duration::from_secs(2);

/// A worker's connection to the log of a run on NATS servers.
///
/// ```no_run
/// # fn main() -> Result<(), flops_distributed::DistributedError> {
/// use flops_distributed::{NatsLog, NatsOptions};
///
/// // nats-server -js
/// let log = NatsLog::connect(&NatsOptions::new(["nats://127.0.0.1:4222"], "run-1"), "worker")?;
/// # Ok(())
/// # }
/// ```
pub struct NatsLog {
    worker: String,
    server: Arc<Server>,
    queue: Arc<Queue>,
    /// Entries to be written, in order.
    outbox: UnboundedSender<Outgoing>,
    /// Whether the worker has told others that it takes part.
    joined: AtomicBool,
    runtime: Option<Runtime>,
}

impl NatsLog {
    /// Connects a worker with a name, to which random letters are added. Servers that are not there yet
    /// are waited for up to the limit.
    ///
    /// # Errors
    /// Where an option is wrong, and where no server can be reached, lets this worker in and has
    /// JetStream.
    pub fn connect(options: &NatsOptions, name: &str) -> Result<Self, DistributedError> {
        let writer = random::bytes()?;
        let worker = checked_name("the name of the worker", &format!("{name}-{}", random::hex(&writer)))?;
        options.checked()?;
        let runtime = runtime()?;
        let (for_task, name) = (options.clone(), worker.clone());
        let connected = wait(&runtime, async move { Server::connect(&for_task, &name, writer).await });
        let server = Arc::new(connected.unwrap_or_else(|| Err(ended(options)))?);
        let queue = Arc::new(Queue::default());
        runtime.spawn(read(server.clone(), queue.clone()));
        let (outbox, outgoing) = unbounded_channel();
        runtime.spawn(write(server.clone(), queue.clone(), outgoing));
        Ok(Self { worker, server, queue, outbox, joined: AtomicBool::new(false), runtime: Some(runtime) })
    }

    /// Deletes the log and the checkpoints of a run. Says whether there were any.
    ///
    /// # Errors
    /// Where no server can be reached, or none lets this program delete.
    pub fn delete(options: &NatsOptions) -> Result<bool, DistributedError> {
        options.checked()?;
        let runtime = runtime()?;
        let options = options.clone();
        let for_task = options.clone();
        let deleted = wait(&runtime, async move {
            let js = jetstream::new(connect(&for_task, "delete").await?);
            match js.delete_stream(stream_name(&for_task.run)).await {
                Ok(_) => Ok(true),
                Err(why) => match why.kind() {
                    DeleteStreamErrorKind::JetStream(ref error) if error.code() == 404 => Ok(false),
                    _ => Err(DistributedError::Server {
                        server: for_task.named(),
                        why: why.to_string(),
                        remedy: "let the user delete streams".into(),
                    }),
                },
            }
        });
        runtime.shutdown_background();
        deleted.unwrap_or_else(|| Err(ended(&options)))
    }

    /// Runs something with the server, and waits for it. The caller may be on a thread of another runtime.
    fn run<T, F>(&self, task: impl FnOnce(Arc<Server>) -> F) -> Result<T, ExecutorError>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, ExecutorError>> + Send + 'static,
    {
        let runtime = self.runtime.as_ref();
        let done = runtime.and_then(|runtime| wait(runtime, task(self.server.clone())));
        done.unwrap_or_else(|| Err(self.closed()))
    }

    fn closed(&self) -> ExecutorError {
        self.server.error("has no connection any more")
    }

    /// Has an entry written after those before it. Whoever listens to `answer` learns whether it was the first.
    fn write(
        &self,
        key: &Key,
        bytes: Bytes,
        answer: Option<Sender<Result<bool, ExecutorError>>>,
    ) -> Result<(), ExecutorError> {
        let floor = self.queue.floor();
        // the weights before a step that is past may still be compared
        if let Some(step) = key.round().map(|round| round.step).filter(|&step| step < floor) {
            let why =
                format!("has no log of step {step} any more: it starts with step {floor}; start the worker again");
            return Err(self.server.error(&why));
        }
        self.queue.note(key.step());
        let (run, step) = (&self.server.run, key.step());
        let outgoing = Outgoing { subject: format!("flops.{run}.log.{key}"), parts: parts(run, step), bytes, answer };
        self.server.unwritten.fetch_add(1, Ordering::Relaxed);
        self.outbox.send(outgoing).map_err(|_| self.closed())
    }
}

impl Log for NatsLog {
    fn worker(&self) -> &str {
        &self.worker
    }

    fn put(&self, key: &Key, bytes: &[u8]) -> Result<bool, ExecutorError> {
        let (answer, written) = mpsc::channel();
        self.write(key, Bytes::copy_from_slice(bytes), Some(answer))?;
        let first = written.recv().unwrap_or_else(|_| Err(self.closed()))?;
        if matches!(key, Key::Joined(worker) if *worker == self.worker) {
            self.joined.store(true, Ordering::Relaxed);
        }
        Ok(first)
    }

    fn send(&self, key: &Key, bytes: Vec<u8>) -> Result<(), ExecutorError> {
        self.write(key, bytes.into(), None)
    }

    fn is_writing(&self) -> bool {
        self.server.unwritten.load(Ordering::Relaxed) > 0
    }

    fn next(&self, timeout: Duration) -> Result<Option<Entry>, ExecutorError> {
        self.queue.next(timeout, &self.server)
    }

    fn trim(&self, step: u64) -> Result<(), ExecutorError> {
        let (past, old) = self.queue.raise(step);
        if step <= old {
            return Ok(());
        }
        self.run(|server| async move {
            let run = &server.run;
            // whoever reads this knows that the steps before are incomplete
            server.write(&format!("flops.{run}.log.trimmed.{step}"), &parts(run, None), Bytes::new()).await?;
            let mut filters = vec![];
            for step in past {
                filters.push(format!("flops.{run}.log.*.{step}.>"));
                filters.push(format!("flops.{run}.part.{step}.>"));
            }
            let marks = server.subjects(&format!("flops.{run}.log.trimmed.*")).await?;
            filters.extend(marks.into_iter().filter(|mark| number(mark).is_some_and(|mark| mark < step)));
            for filter in filters {
                server.purge(&filter).await?;
            }
            Ok(())
        })
    }

    fn put_checkpoint(&self, step: u64, bytes: &[u8]) -> Result<(), ExecutorError> {
        let bytes = Bytes::copy_from_slice(bytes);
        self.run(|server| async move {
            let run = &server.run;
            let heads = format!("flops.{run}.checkpoint.*");
            let latest = server.subjects(&heads).await?.iter().filter_map(|subject| number(subject)).max();
            if latest.is_some_and(|latest| latest >= step) {
                return Ok(());
            }
            let subject = format!("flops.{run}.checkpoint.{step}");
            server.write(&subject, &format!("flops.{run}.file.{step}"), bytes).await?;
            for old in server.subjects(&heads).await? {
                if number(&old).is_some_and(|old| old < step) {
                    server.purge(&old).await?;
                }
            }
            // parts of unfinished ones, too
            let files = server.subjects(&format!("flops.{run}.file.>")).await?;
            let mut steps: Vec<u64> = files.iter().filter_map(|file| file.split('.').nth(3)?.parse().ok()).collect();
            steps.dedup();
            steps.retain(|&old| old < step);
            steps.sort_unstable();
            steps.dedup();
            for old in steps {
                server.purge(&format!("flops.{run}.file.{old}.>")).await?;
            }
            Ok(())
        })
    }

    fn checkpoint(&self) -> Result<Option<(u64, Vec<u8>)>, ExecutorError> {
        self.run(|server| async move {
            let run = &server.run;
            for _ in 0..TRIES {
                let heads = server.subjects(&format!("flops.{run}.checkpoint.*")).await?;
                let mut steps: Vec<u64> = heads.iter().filter_map(|subject| number(subject)).collect();
                steps.sort_unstable();
                if steps.is_empty() {
                    return Ok(None);
                }
                // one that is not whole, as a stranger may leave it, is passed over
                for step in steps.into_iter().rev() {
                    let head = server.last(&format!("flops.{run}.checkpoint.{step}")).await?;
                    let Some(head) = head else { continue };
                    if let Some(bytes) = server.read(&head, &format!("flops.{run}.file.{step}")).await? {
                        return Ok(Some((step, bytes)));
                    }
                }
            }
            Ok(None)
        })
    }

    fn traffic(&self) -> Traffic {
        let count = |bytes: &std::sync::atomic::AtomicU64| bytes.load(Ordering::Relaxed);
        let (sent, received) = (count(&self.server.sent), count(&self.server.received));
        Traffic { sent, received, refused: self.queue.refused() }
    }
}

/// Tells the others that this worker leaves, where it took part.
impl Drop for NatsLog {
    fn drop(&mut self) {
        let Some(runtime) = self.runtime.take() else { return };
        if self.joined.load(Ordering::Relaxed) && self.server.is_connected() {
            let (answer, written) = mpsc::channel();
            if self.write(&Key::Left(self.worker.clone()), Bytes::from_static(b"left"), Some(answer)).is_ok() {
                let _ = written.recv_timeout(FAREWELL);
            }
        }
        runtime.shutdown_background();
    }
}

impl Debug for NatsLog {
    fn fmt(&self, f: &mut Formatter) -> fmt::Result {
        let (servers, run) = (&self.server.named, &self.server.run);
        f.debug_struct("NatsLog").field("servers", servers).field("run", run).field("worker", &self.worker).finish()
    }
}

/// The last token of a subject, if it is a number.
fn number(subject: &str) -> Option<u64> {
    subject.rsplit('.').next()?.parse().ok()
}

/// One thread that serves the connection.
fn runtime() -> Result<Runtime, DistributedError> {
    let runtime = Builder::new_multi_thread().worker_threads(1).thread_name("nats").enable_all().build();
    runtime.map_err(|why| DistributedError::Io { what: "a thread cannot be started".into(), why })
}

/// Runs a task on a runtime, and waits for it here. Nothing where it panics.
fn wait<T: Send + 'static>(runtime: &Runtime, task: impl Future<Output = T> + Send + 'static) -> Option<T> {
    let (done, answer) = mpsc::channel();
    runtime.spawn(async move {
        let _ = done.send(task.await);
    });
    answer.recv().ok()
}

fn ended(options: &NatsOptions) -> DistributedError {
    DistributedError::Server {
        server: options.named(),
        why: "the connection has ended".into(),
        remedy: "start the worker again".into(),
    }
}
