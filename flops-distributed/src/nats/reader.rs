//! Reads the log into a queue, in the order of the stream.

use std::collections::{BTreeSet, VecDeque};
use std::error::Error;
use std::pin::pin;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use async_nats::jetstream;
use async_nats::jetstream::consumer::DeliverPolicy;
use async_nats::jetstream::consumer::pull::OrderedConfig;
use flops_executor::ExecutorError;
use futures::StreamExt;
use futures::future::{Either, select};
use tokio::sync::Notify;
use tokio::time::sleep;

use super::server::{Server, lock};
use crate::{Entry, Key};

/// Bytes of entries that wait to be taken. More stay on the server.
const ROOM: usize = 256 << 20;

/// How often a server may say in a row that there is no such stream.
const GONE: u32 = 10;

/// Entries that were read and not taken yet.
#[derive(Default)]
pub(super) struct Queue {
    state: Mutex<State>,
    arrived: Condvar,
    taken: Notify,
}

#[derive(Default)]
struct State {
    entries: VecDeque<Entry>,
    bytes: usize,
    /// Why there will be no more.
    ended: Option<ExecutorError>,
    /// Steps that entries were of.
    steps: BTreeSet<u64>,
    /// The first step that was not trimmed.
    floor: u64,
    refused: u64,
}

impl Queue {
    /// The next entry, or none within a time.
    pub fn next(&self, limit: Duration, server: &Server) -> Result<Option<Entry>, ExecutorError> {
        let start = Instant::now();
        let mut state = lock(&self.state);
        loop {
            if let Some(entry) = state.entries.pop_front() {
                state.bytes -= entry.bytes.len();
                self.taken.notify_one();
                return Ok(Some(entry));
            }
            if let Some(why) = state.ended.clone().or_else(|| server.lost()) {
                return Err(why);
            }
            let left = limit.saturating_sub(start.elapsed());
            if left.is_zero() {
                return Ok(None);
            }
            // a server that is lost meanwhile ends the wait
            let slice = left.min(Duration::from_millis(200));
            let (back, _) = self.arrived.wait_timeout(state, slice).unwrap_or_else(|poisoned| poisoned.into_inner());
            state = back;
        }
    }

    async fn push(&self, entry: Entry) {
        while lock(&self.state).bytes >= ROOM {
            self.taken.notified().await;
        }
        let mut state = lock(&self.state);
        state.steps.extend(entry.key.step());
        state.bytes += entry.bytes.len();
        state.entries.push_back(entry);
        self.arrived.notify_one();
    }

    /// Nothing more is read, and an error says why.
    pub fn end(&self, why: ExecutorError) {
        lock(&self.state).ended = Some(why);
        self.arrived.notify_all();
    }

    /// Notes a step that this worker writes entries of.
    pub fn note(&self, step: Option<u64>) {
        lock(&self.state).steps.extend(step);
    }

    /// The first step that was not trimmed.
    pub fn floor(&self) -> u64 {
        lock(&self.state).floor
    }

    /// Raises the first step, and returns known steps before it, and what it was.
    pub fn raise(&self, floor: u64) -> (Vec<u64>, u64) {
        let mut state = lock(&self.state);
        let old = state.floor;
        state.floor = old.max(floor);
        let kept = state.steps.split_off(&floor);
        let past = std::mem::replace(&mut state.steps, kept);
        (past.into_iter().collect(), old)
    }

    /// Messages that no worker can have written.
    pub fn refused(&self) -> u64 {
        lock(&self.state).refused
    }

    fn refuse(&self, server: &Server, subject: &str) {
        let mut state = lock(&self.state);
        state.refused += 1;
        if state.refused == 1 {
            log::warn!("{} has entries of a stranger, such as {subject:?}; they are not used", server.named);
        }
    }
}

/// Reads until the queue is the only one that holds the server.
pub(super) async fn read(server: Arc<Server>, queue: Arc<Queue>) {
    let mut last = 0;
    let mut gone = 0;
    let mut connections = server.connections();
    loop {
        connections.mark_unchanged();
        match server.stream.get_info().await {
            Ok(info) if info.state.last_sequence < last => {
                queue.end(server.error("came back without entries that it had"));
                return;
            }
            Ok(_) => gone = 0,
            Err(why) => {
                let refused = why.source().and_then(|source| source.downcast_ref::<jetstream::Error>());
                let absent = refused.is_some_and(|error| error.code() == 404);
                gone = if absent { gone + 1 } else { 0 };
                if gone == GONE {
                    queue.end(server.error(&format!("has no log of the run {} any more", server.run)));
                    return;
                }
                sleep(Duration::from_millis(100)).await;
                continue;
            }
        }
        let config = OrderedConfig {
            filter_subject: format!("flops.{}.log.>", server.run),
            deliver_policy: DeliverPolicy::ByStartSequence { start_sequence: last + 1 },
            ..OrderedConfig::default()
        };
        let messages = match server.stream.create_consumer(config).await {
            Ok(consumer) => consumer.messages().await.map_err(|why| why.to_string()),
            Err(why) => Err(why.to_string()),
        };
        let mut messages = match messages {
            Ok(messages) => messages,
            Err(why) => {
                log::debug!("{} does not let its log be read yet: {why}", server.named);
                sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        loop {
            // the consumer would notice only after some seconds that the server came back
            let message = match select(messages.next(), pin!(connections.changed())).await {
                Either::Left((Some(Ok(message)), _)) => message,
                Either::Left((Some(Err(why)), _)) => {
                    log::debug!("{}: {why}", server.named);
                    break;
                }
                Either::Left((None, _)) | Either::Right(_) => break,
            };
            let Ok(sequence) = message.info().map(|info| info.stream_sequence) else { continue };
            if sequence <= last {
                continue;
            }
            server.received.fetch_add(message.payload.len() as u64, std::sync::atomic::Ordering::Relaxed);
            if let Err(why) = take(&server, &queue, message.subject.as_str(), &message.payload).await {
                queue.end(why);
                return;
            }
            last = sequence;
        }
    }
}

/// Takes a message of the log.
async fn take(server: &Server, queue: &Queue, subject: &str, payload: &[u8]) -> Result<(), ExecutorError> {
    let text = subject.strip_prefix(&format!("flops.{}.log.", server.run)).unwrap_or_default();
    if let Some(floor) = text.strip_prefix("trimmed.").and_then(|step| step.parse().ok()) {
        queue.raise(floor);
        return Ok(());
    }
    let Some(key) = Key::parse(text) else {
        queue.refuse(server, subject);
        return Ok(());
    };
    let bytes = match server.read(payload, &parts(&server.run, key.step())).await? {
        Some(bytes) => bytes,
        // whoever waits for this key must see that it is taken, and refuses what it says
        None => payload.to_vec(),
    };
    queue.push(Entry { key, bytes }).await;
    Ok(())
}

/// How subjects of parts begin: those of a step can be removed with it.
pub(super) fn parts(run: &str, step: Option<u64>) -> String {
    step.map_or_else(|| format!("flops.{run}.kept"), |step| format!("flops.{run}.part.{step}"))
}
