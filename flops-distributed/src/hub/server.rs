//! The server of the hub.

use std::collections::{BTreeMap, HashMap};
use std::fmt::{self, Debug, Formatter};
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::frame::{self, Frame, Kind};
use super::spill::{Body, Spill};
use super::{ADDRESS, HubClient, TOKEN};
use crate::{DistributedError, Key, checked_name, random};

/// The longest token and name that a stranger can send.
const MAX_HELLO: u64 = 1024;
/// The time a connection has to say who it is.
const HELLO_LIMIT: Duration = Duration::from_secs(5);
/// Bytes of long entries that wait for a worker in memory. What comes after them is read from disk.
const MAX_QUEUED: usize = 64 << 20;
/// The most connections that have not said so yet.
const MAX_STRANGERS: usize = 64;

/// Settings of a [`Hub`].
#[derive(Clone, Debug)]
pub struct HubOptions {
    /// Where it listens: a free port of the loopback device, unless told otherwise. What it sends is
    /// not encrypted.
    pub address: SocketAddr,
    /// How long a connection may take nothing before it is closed, and how long a worker in this
    /// process waits for an answer.
    pub limit: Duration,
    /// The most bytes of an entry or a checkpoint.
    pub max_bytes: u64,
}

impl Default for HubOptions {
    fn default() -> Self {
        let address = (Ipv4Addr::LOCALHOST, 0).into();
        Self { address, limit: Duration::from_secs(60), max_bytes: 8 << 30 }
    }
}

/// What a hub saw of all its workers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct HubStats {
    /// Workers that take part now.
    pub workers: u64,
    /// Workers that joined so far.
    pub joins: u64,
    /// Workers that were lost: gone without a word.
    pub losses: u64,
    /// Connections that were refused or closed for what they sent.
    pub refused: u64,
    /// Entries that were written, and not those that came second.
    pub entries: u64,
    /// Bytes received in frames.
    pub bytes: u64,
}

/// A server that keeps the log of a run, and its latest checkpoint. Long entries lie in temporary files.
/// Its threads end when it is dropped.
pub struct Hub {
    address: SocketAddr,
    shared: Arc<Shared>,
    accepting: Option<JoinHandle<()>>,
}

impl Hub {
    /// Starts a hub with a new token.
    ///
    /// # Errors
    /// Where the address is taken, or the system gives no random bytes.
    pub fn start(options: HubOptions) -> Result<Self, DistributedError> {
        let failed = |why: String| DistributedError::Server {
            server: format!("the hub at {}", options.address),
            why,
            remedy: "choose another address, or port 0 for a free one".into(),
        };
        let token = random::hex(&random::bytes::<32>()?);
        let listener = TcpListener::bind(options.address).map_err(|why| failed(why.to_string()))?;
        let address = listener.local_addr().map_err(|why| failed(why.to_string()))?;
        let shared = Arc::new(Shared { token, options: options.clone(), ..Shared::default() });
        let for_thread = shared.clone();
        let accepting = thread::Builder::new().name("hub".into()).spawn(move || accept(&listener, &for_thread));
        let accepting = Some(accepting.map_err(|why| failed(why.to_string()))?);
        Ok(Self { address, shared, accepting })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The environment variables that a worker needs to [find it](HubClient::from_env).
    pub fn environment(&self) -> [(&'static str, String); 2] {
        [(ADDRESS, self.address.to_string()), (TOKEN, self.shared.token.clone())]
    }

    /// Connects a worker of this process.
    ///
    /// # Errors
    /// Where the name is no name, or the system gives no connection.
    pub fn connect(&self, name: &str) -> Result<HubClient, DistributedError> {
        HubClient::connect(self.address, &self.shared.token, name, self.shared.options.limit)
    }

    /// What it saw so far.
    pub fn stats(&self) -> HubStats {
        self.shared.state().stats
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        self.shared.closing.store(true, Ordering::Relaxed);
        // wakes the thread that accepts
        let woken = TcpStream::connect_timeout(&self.address, Duration::from_secs(1)).is_ok();
        if let Some(thread) = self.accepting.take().filter(|_| woken) {
            let _ = thread.join();
        }
        for worker in self.shared.state().workers.values() {
            let _ = worker.stream.shutdown(Shutdown::Both);
        }
    }
}

impl Debug for Hub {
    fn fmt(&self, f: &mut Formatter) -> fmt::Result {
        f.debug_struct("Hub").field("address", &self.address).field("stats", &self.stats()).finish()
    }
}

#[derive(Default)]
struct Shared {
    token: String,
    options: HubOptions,
    closing: AtomicBool,
    strangers: AtomicUsize,
    state: Mutex<State>,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Default)]
struct State {
    /// The entries by number, in the order of the log.
    log: BTreeMap<u64, Item>,
    spill: Spill,
    /// The number of each key's entry.
    numbers: HashMap<Key, u64>,
    next: u64,
    /// Steps before it were trimmed.
    floor: u64,
    checkpoint: Option<(u64, Body)>,
    /// Connections, by their number.
    workers: HashMap<u64, Worker>,
    connections: u64,
    stats: HubStats,
}

/// Something to send. Entries are shared by all connections.
#[derive(Clone)]
struct Item {
    kind: Kind,
    head: Arc<str>,
    body: Body,
}

impl Item {
    fn new(kind: Kind, head: impl Into<Arc<str>>) -> Self {
        Self { kind, head: head.into(), body: Body::default() }
    }
}

struct Worker {
    stream: TcpStream,
    queue: Sender<Item>,
    /// Bytes of entries that wait in memory.
    queued: Arc<AtomicUsize>,
}

impl State {
    /// Appends an entry unless there is one, and sends it to all workers.
    fn append(&mut self, key: Key, bytes: Vec<u8>) -> bool {
        if self.numbers.contains_key(&key) {
            return false;
        }
        let item = Item { kind: Kind::Entry, head: key.to_string().into(), body: Body::new(bytes) };
        let kept = Item { body: self.spill.put(&item.body), ..item.clone() };
        for worker in self.workers.values() {
            let is_slow = worker.queued.load(Ordering::Relaxed) > MAX_QUEUED;
            let item = if is_slow { kept.clone() } else { item.clone() };
            worker.queued.fetch_add(item.body.in_memory(), Ordering::Relaxed);
            let _ = worker.queue.send(item);
        }
        self.log.insert(self.next, kept);
        self.numbers.insert(key, self.next);
        self.next += 1;
        self.stats.entries += 1;
        true
    }

    fn trim(&mut self, step: u64) {
        self.floor = self.floor.max(step);
        let log = &mut self.log;
        // workers that are connected have the entries in their queues
        self.numbers.retain(|key, number| {
            let keep = key.step().is_none_or(|of| of >= step);
            if !keep {
                log.remove(number);
            }
            keep
        });
    }
}

fn accept(listener: &TcpListener, shared: &Arc<Shared>) {
    for stream in listener.incoming() {
        if shared.closing.load(Ordering::Relaxed) {
            return;
        }
        let Ok(stream) = stream else {
            // as where there are too many open files
            thread::sleep(Duration::from_millis(10));
            continue;
        };
        if shared.strangers.fetch_add(1, Ordering::Relaxed) >= MAX_STRANGERS {
            shared.strangers.fetch_sub(1, Ordering::Relaxed);
            shared.state().stats.refused += 1;
            continue;
        }
        let for_thread = shared.clone();
        let serving = thread::Builder::new().name("hub-worker".into()).spawn(move || serve(&stream, &for_thread));
        if serving.is_err() {
            shared.strangers.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

/// Serves a connection to its end.
fn serve(stream: &TcpStream, shared: &Shared) {
    let greeted = greet(stream, shared);
    shared.strangers.fetch_sub(1, Ordering::Relaxed);
    let Some((number, name)) = greeted else {
        shared.state().stats.refused += 1;
        let _ = stream.shutdown(Shutdown::Both);
        return;
    };
    let mut reader = BufReader::new(stream);
    let ended = loop {
        match frame::read(&mut reader, shared.options.max_bytes) {
            Ok(frame) if frame.kind == Kind::Bye => break End::Bye,
            Ok(frame) => {
                let mut state = shared.state();
                let Some(item) = answer(frame, &name, &mut state) else { break End::Hostile };
                // what is left of a worker that died is read after its answers found no way out
                if state.workers.get(&number).is_none_or(|worker| worker.queue.send(item).is_err()) {
                    break End::Lost;
                }
            }
            Err(why) if why.kind() == io::ErrorKind::InvalidData => break End::Hostile,
            Err(_) => break End::Lost,
        }
    };
    let mut state = shared.state();
    state.workers.remove(&number);
    state.stats.refused += u64::from(ended == End::Hostile);
    if state.numbers.contains_key(&Key::Joined(name.clone())) {
        state.stats.workers -= 1;
        state.stats.losses += u64::from(ended != End::Bye);
        state.append(Key::Left(name), ended.name().into());
    }
    let _ = stream.shutdown(Shutdown::Both);
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    Bye,
    Lost,
    Hostile,
}

impl End {
    fn name(self) -> &'static str {
        match self {
            Self::Bye => "left",
            Self::Lost => "lost",
            Self::Hostile => "refused",
        }
    }
}

/// Lets a worker in: its number and name.
fn greet(stream: &TcpStream, shared: &Shared) -> Option<(u64, String)> {
    let hello = frame::read(&mut Hurried { stream, until: Instant::now() + HELLO_LIMIT }, MAX_HELLO).ok()?;
    let refuse = |why: &str| {
        let _ = frame::write(&mut &*stream, Kind::Refused, why, &[]);
    };
    stream.set_write_timeout(Some(shared.options.limit.max(Duration::from_millis(1)))).ok()?;
    if hello.kind != Kind::Hello || !same(&hello.body, shared.token.as_bytes()) {
        refuse("the token is not that of this run");
        return None;
    }
    stream.set_read_timeout(None).ok()?;
    stream.set_nodelay(true).ok()?;
    let (queue, items) = channel();
    let queued = Arc::new(AtomicUsize::new(0));
    let (to_keep, to_write) = (stream.try_clone().ok()?, stream.try_clone().ok()?);
    let mut state = shared.state();
    let number = state.connections;
    let checked = |name: &str| checked_name("the name of the worker", name);
    let Ok(name) = checked(&hello.head).and_then(|name| checked(&format!("{name}-{number}"))) else {
        refuse("the name of the worker is not made of 1 to 40 letters, digits, `-` or `_`");
        return None;
    };
    state.connections += 1;
    let _ = queue.send(Item::new(Kind::Welcome, name.as_str()));
    for item in state.log.values() {
        let _ = queue.send(item.clone());
    }
    state.workers.insert(number, Worker { stream: to_keep, queue, queued: queued.clone() });
    // with the lock held: a hub that closes sees the worker here, or the worker its flag
    if shared.closing.load(Ordering::Relaxed) {
        let _ = stream.shutdown(Shutdown::Both);
    }
    drop(state);
    let writing = thread::Builder::new().name("hub-writer".into()).spawn(move || {
        let _ = send_all(&to_write, &items, &queued);
        // wakes the thread that reads
        let _ = to_write.shutdown(Shutdown::Both);
    });
    if writing.is_err() {
        shared.state().workers.remove(&number);
        return None;
    }
    Some((number, name))
}

/// Sends what is queued until the worker is removed or takes nothing any more.
fn send_all(stream: &TcpStream, items: &Receiver<Item>, queued: &AtomicUsize) -> io::Result<()> {
    let mut to = BufWriter::new(stream);
    while let Ok(first) = items.recv() {
        for item in std::iter::once(first).chain(items.try_iter()) {
            frame::write(&mut to, item.kind, &item.head, &item.body.bytes()?)?;
            if item.kind == Kind::Entry {
                // entries of the log that were queued at the beginning were not counted
                let less = |bytes: usize| Some(bytes.saturating_sub(item.body.in_memory()));
                let _ = queued.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
            }
        }
        to.flush()?;
    }
    Ok(())
}

/// Carries out a request: its answer, or nothing where no worker would make it.
fn answer(frame: Frame, name: &str, state: &mut State) -> Option<Item> {
    state.stats.bytes += frame.len();
    let floor = state.floor;
    let late = |step: u64| {
        let why = format!("step {step} is past: the log starts with step {floor}; start the worker again");
        Item::new(Kind::Refused, why)
    };
    Some(match frame.kind {
        Kind::Put => {
            let key = Key::parse(&frame.head)?;
            let joins = match &key {
                Key::Left(_) => return None,
                Key::Joined(worker) if worker != name => return None,
                Key::Joined(_) => true,
                _ => false,
            };
            match key.round().map(|round| round.step).filter(|step| *step < floor) {
                Some(step) => late(step),
                None if state.append(key, frame.body) => {
                    state.stats.joins += u64::from(joins);
                    state.stats.workers += u64::from(joins);
                    Item::new(Kind::First, "")
                }
                None => Item::new(Kind::Done, ""),
            }
        }
        Kind::Trim => {
            state.trim(frame.head.parse().ok()?);
            Item::new(Kind::Done, "")
        }
        Kind::Checkpoint => {
            let step: u64 = frame.head.parse().ok()?;
            if state.checkpoint.as_ref().is_none_or(|(of, _)| *of < step) {
                state.checkpoint = Some((step, state.spill.put(&Body::new(frame.body))));
            }
            Item::new(Kind::Done, "")
        }
        Kind::GetCheckpoint => match &state.checkpoint {
            Some((step, body)) => Item { body: body.clone(), ..Item::new(Kind::Checkpoint, step.to_string()) },
            None => Item::new(Kind::Checkpoint, ""),
        },
        _ => return None,
    })
}

/// Whether a token is the right one, in a time that does not tell how much of it is.
fn same(token: &[u8], right: &[u8]) -> bool {
    token.len() == right.len() && token.iter().zip(right).fold(0, |differ, (a, b)| differ | (a ^ b)) == 0
}

/// A connection that must say something soon, and not a byte at a time.
struct Hurried<'a> {
    stream: &'a TcpStream,
    until: Instant,
}

impl Read for Hurried<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let left = self.until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        self.stream.set_read_timeout(Some(left))?;
        self.stream.read(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Requests that lie unread when a worker dies make no enemy of it.
    #[test]
    fn a_worker_that_dies_in_the_middle_is_lost_and_not_refused() {
        const WORKERS: u64 = 30;
        let hub = Hub::start(HubOptions::default()).unwrap();
        for _ in 0..WORKERS {
            let stream = TcpStream::connect(hub.address()).unwrap();
            frame::write(&mut &stream, Kind::Hello, "worker", hub.shared.token.as_bytes()).unwrap();
            let name = frame::read(&mut &stream, MAX_HELLO).unwrap().head;
            frame::write(&mut &stream, Kind::Put, &Key::Joined(name).to_string(), &[]).unwrap();
            let mut trims = vec![];
            for _ in 0..2000 {
                frame::write(&mut trims, Kind::Trim, "0", &[]).unwrap();
            }
            (&stream).write_all(&trims).unwrap();
            // closed with answers unread, which resets the connection
        }
        let until = Instant::now() + Duration::from_secs(30);
        while hub.stats().losses < WORKERS && Instant::now() < until {
            thread::sleep(Duration::from_millis(10));
        }
        let stats = hub.stats();
        assert_eq!((stats.joins, stats.losses, stats.refused), (WORKERS, WORKERS, 0));
    }
}
