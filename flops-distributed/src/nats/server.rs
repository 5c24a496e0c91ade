//! Requests to the servers: written until they are answered, or until the limit.

use std::collections::HashMap;
use std::error::Error;
use std::fmt::Display;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use async_nats::jetstream::context::ContextBuilder;
use async_nats::jetstream::context::{PublishError, PublishErrorKind};
use async_nats::jetstream::stream::{
    Config, DirectGetErrorKind, DiscardPolicy, LastRawMessageErrorKind, StorageType, Stream,
};
use async_nats::jetstream::{self, Context, ErrorCode};
use async_nats::{Client, Event};
use bytes::Bytes;
use flops_executor::ExecutorError;
use futures::future::{Either, select};
use futures::{StreamExt, TryStreamExt, stream};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

use super::envelope::{Envelope, HEAD, Id, Parts, hex};
use super::options::{ANSWER, NatsOptions, note, remedy};
use crate::{DistributedError, wire};

/// Time between two requests for the same.
const PAUSE: Duration = Duration::from_millis(50);

/// Parts of an entry that are on their way at once.
const AT_ONCE: usize = 8;

/// Bytes of a message that the server may add or the subject may need.
const ROOM: usize = 1024;

/// A connection with the servers, and the stream of a run.
pub(super) struct Server {
    js: Context,
    pub stream: Stream<()>,
    pub run: String,
    pub named: String,
    pub limit: Duration,
    /// Random bytes of this writer, and the number of its next message.
    writer: [u8; 8],
    count: AtomicU64,
    line: Arc<Line>,
    /// Large entries of this worker that it has not read yet: they need not come back.
    own: Mutex<HashMap<Id, Bytes>>,
    pub sent: AtomicU64,
    pub received: AtomicU64,
    /// Entries that wait to be written, or are.
    pub unwritten: AtomicU64,
}

/// Whether there is a connection.
struct Line {
    /// When it was lost.
    lost: Mutex<Option<Instant>>,
    /// Counts connections.
    connections: watch::Sender<u64>,
}

impl Server {
    /// Connects, and makes the stream of the run unless there is one.
    pub async fn connect(options: &NatsOptions, worker: &str, writer: [u8; 8]) -> Result<Self, DistributedError> {
        let line = Arc::new(Line { lost: Mutex::new(None), connections: watch::Sender::new(0) });
        let client = client(options, worker, line.clone()).await?;
        let js = ContextBuilder::new().timeout(ANSWER).ack_timeout(ANSWER).build(client);
        let stream = stream_of(&js, options).await?;
        Ok(Self {
            js,
            stream,
            run: options.run.clone(),
            named: options.named(),
            limit: options.limit,
            writer,
            count: AtomicU64::new(0),
            line,
            own: Mutex::default(),
            sent: AtomicU64::new(0),
            received: AtomicU64::new(0),
            unwritten: AtomicU64::new(0),
        })
    }

    /// Counts connections: one more is a server that came back.
    pub fn connections(&self) -> watch::Receiver<u64> {
        self.line.connections.subscribe()
    }

    /// The error of a server that is lost for longer than the limit.
    pub fn lost(&self) -> Option<ExecutorError> {
        let since = (*lock(&self.line.lost))?;
        (since.elapsed() >= self.limit).then(|| self.error(&format!("has been lost for {:?}", self.limit)))
    }

    pub fn is_connected(&self) -> bool {
        lock(&self.line.lost).is_none()
    }

    /// An error about the servers.
    pub fn error(&self, what: &str) -> ExecutorError {
        ExecutorError::Lost { what: format!("{} {what}", self.named) }
    }

    /// Asks until there is an answer.
    pub async fn insist<T, E: Display, F: Future<Output = Result<T, E>>>(
        &self,
        what: &str,
        mut ask: impl FnMut() -> F,
    ) -> Result<T, ExecutorError> {
        let start = Instant::now();
        loop {
            let left = self.limit.saturating_sub(start.elapsed());
            let why = match self.answer(left, ask()).await {
                Some(Ok(answer)) => return Ok(answer),
                Some(Err(why)) => why.to_string(),
                None => "it does not answer".into(),
            };
            if start.elapsed() >= self.limit {
                return Err(self.error(&format!("has not {what} within {:?}: {why}", self.limit)));
            }
            sleep(PAUSE).await;
        }
    }

    /// Waits for an answer. Nothing where it takes too long, and where the connection is a new one: then
    /// the server may never have got the question.
    async fn answer<T>(&self, limit: Duration, question: impl Future<Output = T>) -> Option<T> {
        let mut connections = self.connections();
        connections.mark_unchanged();
        match timeout(limit, select(pin!(question), pin!(connections.changed()))).await {
            Ok(Either::Left((answer, _))) => Some(answer),
            Ok(Either::Right(_)) | Err(_) => None,
        }
    }

    /// A message that no other has the id of.
    fn id(&self) -> Id {
        let mut id = [0; 16];
        let (writer, number) = id.split_at_mut(8);
        writer.copy_from_slice(&self.writer);
        number.copy_from_slice(&self.count.fetch_add(1, Ordering::Relaxed).to_be_bytes());
        id
    }

    /// Writes an entry unless the subject has one, and says whether this is the first. What is too
    /// large for a message is written in parts before, under subjects that begin with `parts`.
    pub async fn write(&self, subject: &str, parts: &str, bytes: Bytes) -> Result<bool, ExecutorError> {
        self.write_entry(subject, parts, bytes, false).await
    }

    /// Like [`write`](Self::write), for an entry that this connection reads again.
    pub async fn write_and_keep(&self, subject: &str, parts: &str, bytes: Bytes) -> Result<bool, ExecutorError> {
        self.write_entry(subject, parts, bytes, true).await
    }

    async fn write_entry(&self, subject: &str, parts: &str, bytes: Bytes, keep: bool) -> Result<bool, ExecutorError> {
        let id = self.id();
        let most = self.js.client().server_info().max_payload.saturating_sub(ROOM).max(1);
        if bytes.len() + HEAD <= most {
            return self.write_message(subject, Envelope::Whole(id, &bytes).write(), id).await;
        }
        let place = format!("{parts}.{}", hex(&id));
        let writes = (0..bytes.len().div_ceil(most)).map(|at| {
            let (subject, end) = (format!("{place}.{at}"), bytes.len().min((at + 1) * most));
            let part = bytes.slice(at * most..end);
            async move { self.publish(&subject, part, None).await }
        });
        let written: Vec<bool> = stream::iter(writes).buffered(AT_ONCE).try_collect().await?;
        let head = Parts { bytes: bytes.len() as u64, count: written.len() as u64, checksum: wire::checksum(&bytes) };
        if keep {
            lock(&self.own).insert(id, bytes);
        }
        let first = self.write_message(subject, Envelope::Parts(id, head).write(), id).await;
        if let Ok(false) = first {
            lock(&self.own).remove(&id);
            self.purge(&format!("{place}.>")).await?;
        }
        first
    }

    async fn write_message(&self, subject: &str, message: Vec<u8>, id: Id) -> Result<bool, ExecutorError> {
        self.publish(subject, message.into(), Some(id)).await
    }

    /// Publishes until the server answers. A subject that has a message is compared with an id: an
    /// answer may have been lost, and this one may be the first after all.
    async fn publish(&self, subject: &str, message: Bytes, id: Option<Id>) -> Result<bool, ExecutorError> {
        let start = Instant::now();
        loop {
            let bytes = message.len() as u64;
            let published = async { self.js.publish(subject.to_string(), message.clone()).await?.await };
            let left = self.limit.saturating_sub(start.elapsed());
            let published = self.answer(left, published).await;
            let why = match published.unwrap_or_else(|| Err(PublishError::new(PublishErrorKind::TimedOut))) {
                Ok(_) => {
                    self.sent.fetch_add(bytes, Ordering::Relaxed);
                    return Ok(true);
                }
                Err(why) => why,
            };
            let refused = why.source().and_then(|source| source.downcast_ref::<jetstream::Error>());
            match refused.map(jetstream::Error::error_code) {
                Some(ErrorCode::STREAM_STORE_FAILED) => {
                    let there = self.last(subject).await?;
                    self.sent.fetch_add(bytes, Ordering::Relaxed);
                    if let Some(there) = there {
                        return Ok(id.is_none() || Envelope::read(&there).id() == id);
                    }
                }
                // a server that is not ready yet is asked again
                Some(_) if refused.is_some_and(|error| error.code() != 503) => {
                    return Err(self.error(&format!("refuses an entry: {why}")));
                }
                _ if why.kind() == PublishErrorKind::MaxPayloadExceeded => {
                    return Err(self.error(&format!("takes smaller messages than before: {why}")));
                }
                _ => {}
            }
            if start.elapsed() >= self.limit {
                return Err(self.error(&format!("has not taken an entry within {:?}: {why}", self.limit)));
            }
            sleep(PAUSE).await;
        }
    }

    /// The message of a subject. A server of a cluster may lag, so the leader is asked what it lacks.
    pub async fn last(&self, subject: &str) -> Result<Option<Bytes>, ExecutorError> {
        let found = self.insist("answered", || async {
            match self.stream.direct_get_last_for_subject(subject).await {
                Ok(message) => return Ok(Some(message.payload)),
                Err(why) if why.kind() == DirectGetErrorKind::TimedOut => return Err(why.to_string()),
                Err(_) => {}
            }
            match self.stream.get_last_raw_message_by_subject(subject).await {
                Ok(message) => Ok(Some(message.payload)),
                Err(why) if why.kind() == LastRawMessageErrorKind::NoMessageFound => Ok(None),
                Err(why) => Err(why.to_string()),
            }
        });
        let found = found.await?;
        self.received.fetch_add(found.as_ref().map_or(0, |message| message.len() as u64), Ordering::Relaxed);
        Ok(found)
    }

    /// The entry that a message holds; nothing where its parts are not there or not what it says.
    pub async fn read(&self, message: &[u8], parts: &str) -> Result<Option<Vec<u8>>, ExecutorError> {
        let (id, head) = match Envelope::read(message) {
            Envelope::Whole(_, bytes) => return Ok(Some(bytes.to_vec())),
            Envelope::Foreign(_) => return Ok(None),
            Envelope::Parts(id, head) => (id, head),
        };
        if let Some(bytes) = lock(&self.own).remove(&id) {
            return Ok(Some(bytes.into()));
        }
        let place = format!("{parts}.{}", hex(&id));
        let reads = (0..head.count).map(|at| {
            let subject = format!("{place}.{at}");
            async move { self.last(&subject).await }
        });
        let mut reads = stream::iter(reads).buffered(AT_ONCE);
        let mut all = vec![];
        while let Some(part) = reads.try_next().await? {
            match part {
                Some(part) if (all.len() + part.len()) as u64 <= head.bytes => all.extend_from_slice(&part),
                _ => return Ok(None),
            }
        }
        let whole = all.len() as u64 == head.bytes && wire::checksum(&all) == head.checksum;
        Ok(whole.then_some(all))
    }

    /// Removes all messages of some subjects.
    pub async fn purge(&self, filter: &str) -> Result<(), ExecutorError> {
        self.insist("removed entries", || async { self.stream.purge().filter(filter).await }).await.map(|_| ())
    }

    /// All subjects that match.
    pub async fn subjects(&self, filter: &str) -> Result<Vec<String>, ExecutorError> {
        self.insist("listed its subjects", || async {
            let found = self.stream.info_with_subjects(filter).await.map_err(|why| why.to_string())?;
            found.map_ok(|(subject, _)| subject).try_collect().await.map_err(|why| why.to_string())
        })
        .await
    }
}

/// The name of a run's stream.
pub(super) fn stream_name(run: &str) -> String {
    format!("flops-{run}")
}

/// Connects. Servers that are not there yet are waited for.
pub(super) async fn connect(options: &NatsOptions, worker: &str) -> Result<Client, DistributedError> {
    let line = Arc::new(Line { lost: Mutex::new(None), connections: watch::Sender::new(0) });
    client(options, worker, line).await
}

async fn client(options: &NatsOptions, worker: &str, line: Arc<Line>) -> Result<Client, DistributedError> {
    let (servers, named) = (options.checked()?, options.named());
    let start = Instant::now();
    loop {
        let (line, name) = (line.clone(), named.clone());
        let changed = move |event| {
            note(&event, &name);
            match event {
                Event::Connected => {
                    *lock(&line.lost) = None;
                    line.connections.send_modify(|count| *count += 1);
                }
                Event::Disconnected | Event::Closed => {
                    lock(&line.lost).get_or_insert_with(Instant::now);
                }
                _ => {}
            }
            std::future::ready(())
        };
        let connection = options.connection(worker)?.event_callback(changed);
        let why = match connection.connect(servers.clone()).await {
            Ok(client) => return Ok(client),
            Err(why) => why,
        };
        let late = (start.elapsed() >= options.limit).then_some("see that it runs and that its address is right");
        if let Some(remedy) = remedy(&why).or(late) {
            return Err(DistributedError::Server { server: named, why: why.to_string(), remedy: remedy.into() });
        }
        sleep(2 * PAUSE).await;
    }
}

/// The stream of a run: an entry for each subject, and the first one stays.
async fn stream_of(js: &Context, options: &NatsOptions) -> Result<Stream<()>, DistributedError> {
    let name = stream_name(&options.run);
    let failed =
        |why: String, remedy: &str| DistributedError::Server { server: options.named(), why, remedy: remedy.into() };
    let config = Config {
        name: name.clone(),
        subjects: vec![format!("flops.{}.>", options.run)],
        max_messages_per_subject: 1,
        discard: DiscardPolicy::New,
        discard_new_per_subject: true,
        allow_direct: true,
        storage: StorageType::File,
        num_replicas: options.replicas,
        // messages have ids of their own
        duplicate_window: Duration::from_secs(1),
        ..Config::default()
    };
    let start = Instant::now();
    let found = loop {
        match js.get_or_create_stream(config.clone()).await {
            Ok(found) => break found,
            Err(why) if start.elapsed() >= options.limit.min(2 * ANSWER) => {
                let remedy = "start it with JetStream (nats-server -js), and let the user make streams";
                return Err(failed(format!("the stream {name} cannot be made: {why}"), remedy));
            }
            Err(_) => sleep(PAUSE).await,
        }
    };
    let there = &found.cached_info().config;
    let as_wanted = there.subjects == config.subjects
        && there.max_messages_per_subject == 1
        && there.discard == DiscardPolicy::New
        && there.discard_new_per_subject;
    if !as_wanted {
        let remedy = "give another name to the run, or delete that stream";
        return Err(failed(format!("its stream {name} was made by another program"), remedy));
    }
    js.get_stream_no_info(&name).await.map_err(|why| failed(why.to_string(), "give another name to the run"))
}

/// A lock whose holder may have panicked: what it guards is whole at any time.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
