//! A worker's connection to a hub.

use std::fmt::{self, Debug, Formatter};
use std::io::{self, BufReader};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use flops_executor::ExecutorError;

use super::frame::{self, Frame, Kind};
use super::spill::{Body, Spill};
use super::{ADDRESS, TOKEN};
use crate::{DistributedError, Entry, Key, Log, Traffic};

/// Bytes of entries that wait in memory until the worker looks at them. What comes after them goes to disk.
const MAX_WAITING: usize = 64 << 20;

/// Where requests go, and where their answers come from, in the same order.
struct Requests {
    stream: TcpStream,
    answers: Receiver<Frame>,
    /// Requests whose answers nobody has waited for.
    open: usize,
}

/// A worker's connection to a [`Hub`](super::Hub). It leaves the run when it is dropped.
pub struct HubClient {
    address: SocketAddr,
    worker: String,
    limit: Duration,
    requests: Mutex<Requests>,
    entries: Mutex<Receiver<(Key, Body)>>,
    /// Bytes of entries that wait in memory.
    waiting: Arc<AtomicUsize>,
    sent: AtomicU64,
    received: Arc<AtomicU64>,
}

impl HubClient {
    /// Connects to a hub as a worker with a name, to which the hub adds a number. A hub that is not
    /// there yet, and later an answer, is waited for up to `limit`.
    ///
    /// # Errors
    /// Where the hub cannot be reached or refuses the name or the token.
    pub fn connect(address: SocketAddr, token: &str, name: &str, limit: Duration) -> Result<Self, DistributedError> {
        let failed = |why: String, remedy: &str| DistributedError::Server {
            server: format!("the hub at {address}"),
            why,
            remedy: remedy.into(),
        };
        let there = "see that the program that starts the workers still runs, and that its address is right";
        let until = Instant::now() + limit;
        let (stream, answer, mut reader) = loop {
            match greet(address, token, name, limit.max(Duration::from_millis(1))) {
                Ok(greeted) => break greeted,
                Err(why) if Instant::now() >= until => return Err(failed(why.to_string(), there)),
                Err(_) => std::thread::sleep(Duration::from_millis(50).min(limit)),
            }
        };
        if answer.kind != Kind::Welcome {
            return Err(failed(answer.head, "pass on the environment that the hub gives, and a short name"));
        }
        let (to_entries, entries) = channel();
        let (to_answers, answers) = channel();
        let received = Arc::new(AtomicU64::new(answer.len()));
        let count = received.clone();
        let waiting = Arc::new(AtomicUsize::new(0));
        let (in_memory, mut spill) = (waiting.clone(), Spill::default());
        let read = move || {
            while let Ok(frame) = frame::read(&mut reader, u64::MAX) {
                count.fetch_add(frame.len(), Ordering::Relaxed);
                let entry = |body: Vec<u8>| {
                    // what nobody looks at, as in a long job, does not fill the memory
                    let body = Body::new(body);
                    let is_full = in_memory.load(Ordering::Relaxed) > MAX_WAITING;
                    let body = if is_full { spill.put(&body) } else { body };
                    in_memory.fetch_add(body.in_memory(), Ordering::Relaxed);
                    body
                };
                if deliver(frame, entry, &to_entries, &to_answers).is_none() {
                    break;
                }
            }
        };
        let thread = std::thread::Builder::new().name("hub-client".into()).spawn(read);
        thread.map_err(|why| DistributedError::Io { what: "a thread cannot be started".into(), why })?;
        let (requests, entries) = (Mutex::new(Requests { stream, answers, open: 0 }), Mutex::new(entries));
        let sent = AtomicU64::new(0);
        Ok(Self { address, worker: answer.head, limit, requests, entries, waiting, sent, received })
    }

    /// Connects to the hub that the environment names, as that of a worker that a program with a hub
    /// [starts](super::Hub::environment). Returns nothing where it names none.
    ///
    /// # Errors
    /// Where the address or the token is missing or wrong, or the hub cannot be reached.
    pub fn from_env(name: &str) -> Result<Option<Self>, DistributedError> {
        let Some(address) = std::env::var_os(ADDRESS) else { return Ok(None) };
        let value = address.to_string_lossy().into_owned();
        let remedy = || "give an address and a port, such as 127.0.0.1:4000".to_string();
        let wrong = |_| DistributedError::Setting { what: ADDRESS, value: value.clone(), remedy: remedy() };
        let address = value.parse().map_err(wrong)?;
        let token = std::env::var(TOKEN).unwrap_or_default();
        Self::connect(address, token.trim(), name, Duration::from_secs(60)).map(Some)
    }

    /// Sends a request and waits for its answer, and before for those to earlier ones.
    fn ask(&self, kind: Kind, head: &str, body: &[u8]) -> Result<Frame, ExecutorError> {
        let mut requests = self.requests.lock().unwrap_or_else(PoisonError::into_inner);
        self.request(&mut requests, kind, head, body)?;
        loop {
            let answer = self.answer(&mut requests)?;
            if requests.open == 0 {
                return Ok(answer);
            }
        }
    }

    fn request(&self, requests: &mut Requests, kind: Kind, head: &str, body: &[u8]) -> Result<(), ExecutorError> {
        let sent = frame::write(&mut requests.stream, kind, head, body).map_err(|_| self.closed())?;
        self.sent.fetch_add(sent, Ordering::Relaxed);
        requests.open += 1;
        Ok(())
    }

    /// Waits for the next answer.
    fn answer(&self, requests: &mut Requests) -> Result<Frame, ExecutorError> {
        let answer = requests.answers.recv_timeout(self.limit).map_err(|why| match why {
            RecvTimeoutError::Disconnected => self.closed(),
            RecvTimeoutError::Timeout => {
                // a later request must not get the answer to this one
                let _ = requests.stream.shutdown(Shutdown::Both);
                let what = format!("the hub at {} has not answered for {:?}", self.address, self.limit);
                ExecutorError::Lost { what }
            }
        })?;
        self.answered(requests, answer)
    }

    /// Takes the answers that are there; those to come are taken by a later call.
    fn take_answers(&self, requests: &mut Requests) -> Result<(), ExecutorError> {
        while let Ok(answer) = requests.answers.try_recv() {
            self.answered(requests, answer)?;
        }
        Ok(())
    }

    fn answered(&self, requests: &mut Requests, answer: Frame) -> Result<Frame, ExecutorError> {
        requests.open = requests.open.saturating_sub(1);
        if answer.kind == Kind::Refused {
            return Err(ExecutorError::Lost { what: format!("the hub at {} says: {}", self.address, answer.head) });
        }
        Ok(answer)
    }

    /// An entry that has waited.
    fn taken(&self, (key, body): (Key, Body)) -> Result<Entry, ExecutorError> {
        self.waiting.fetch_sub(body.in_memory(), Ordering::Relaxed);
        let bytes = body.into_bytes().map_err(|why| ExecutorError::Lost {
            what: format!("an entry of the hub at {} cannot be read from its temporary file: {why}", self.address),
        })?;
        Ok(Entry { key, bytes })
    }

    fn closed(&self) -> ExecutorError {
        ExecutorError::Lost { what: format!("the hub at {} has closed the connection", self.address) }
    }
}

/// Opens a connection and says who is there; returns the answer too.
fn greet(
    address: SocketAddr,
    token: &str,
    name: &str,
    limit: Duration,
) -> io::Result<(TcpStream, Frame, BufReader<TcpStream>)> {
    let mut stream = TcpStream::connect_timeout(&address, limit)?;
    stream.set_nodelay(true)?;
    stream.set_write_timeout(Some(limit))?;
    stream.set_read_timeout(Some(limit))?;
    frame::write(&mut stream, Kind::Hello, name, token.as_bytes())?;
    let mut reader = BufReader::new(stream.try_clone()?);
    let answer = frame::read(&mut reader, 0)?;
    stream.set_read_timeout(None)?;
    Ok((stream, answer, reader))
}

/// Hands on a frame, as long as somebody is there to take it.
fn deliver(
    frame: Frame,
    entry: impl FnOnce(Vec<u8>) -> Body,
    entries: &Sender<(Key, Body)>,
    answers: &Sender<Frame>,
) -> Option<()> {
    match frame.kind {
        Kind::Entry => entries.send((Key::parse(&frame.head)?, entry(frame.body))).ok(),
        _ => answers.send(frame).ok(),
    }
}

impl Log for HubClient {
    fn worker(&self) -> &str {
        &self.worker
    }

    fn put(&self, key: &Key, bytes: &[u8]) -> Result<bool, ExecutorError> {
        Ok(self.ask(Kind::Put, &key.to_string(), bytes)?.kind == Kind::First)
    }

    fn send(&self, key: &Key, bytes: Vec<u8>) -> Result<(), ExecutorError> {
        let mut requests = self.requests.lock().unwrap_or_else(PoisonError::into_inner);
        self.take_answers(&mut requests)?;
        self.request(&mut requests, Kind::Put, &key.to_string(), &bytes)
    }

    fn next(&self, timeout: Duration) -> Result<Option<Entry>, ExecutorError> {
        // whoever only reads learns of a refusal, too; a thread that asks takes its answers itself
        if let Ok(mut requests) = self.requests.try_lock() {
            self.take_answers(&mut requests)?;
        }
        let entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        match entries.try_recv() {
            Ok(entry) => return self.taken(entry).map(Some),
            Err(TryRecvError::Disconnected) => return Err(self.closed()),
            Err(TryRecvError::Empty) if timeout.is_zero() => return Ok(None),
            Err(TryRecvError::Empty) => {}
        }
        match entries.recv_timeout(timeout) {
            Ok(entry) => self.taken(entry).map(Some),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => Err(self.closed()),
        }
    }

    fn trim(&self, step: u64) -> Result<(), ExecutorError> {
        self.ask(Kind::Trim, &step.to_string(), &[]).map(|_| ())
    }

    fn put_checkpoint(&self, step: u64, bytes: &[u8]) -> Result<(), ExecutorError> {
        self.ask(Kind::Checkpoint, &step.to_string(), bytes).map(|_| ())
    }

    fn checkpoint(&self) -> Result<Option<(u64, Vec<u8>)>, ExecutorError> {
        let answer = self.ask(Kind::GetCheckpoint, "", &[])?;
        Ok(answer.head.parse().ok().map(|step| (step, answer.body)))
    }

    fn traffic(&self) -> Traffic {
        let count = |bytes: &AtomicU64| bytes.load(Ordering::Relaxed);
        Traffic { sent: count(&self.sent), received: count(&self.received), refused: 0 }
    }
}

impl Drop for HubClient {
    fn drop(&mut self) {
        let Requests { stream, .. } = self.requests.get_mut().unwrap_or_else(PoisonError::into_inner);
        let _ = frame::write(stream, Kind::Bye, "", &[]);
        let _ = stream.shutdown(Shutdown::Both);
    }
}

impl Debug for HubClient {
    fn fmt(&self, f: &mut Formatter) -> fmt::Result {
        f.debug_struct("HubClient").field("address", &self.address).field("worker", &self.worker).finish()
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    /// A hub that is stopped in the midst, or says what no hub says.
    #[test]
    fn a_hub_that_says_nothing_is_lost_after_a_limit() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let limit = Duration::from_millis(200);
        std::thread::spawn(move || {
            let mut kept = vec![];
            for (number, stream) in listener.incoming().enumerate() {
                let mut stream = stream.unwrap();
                frame::read(&mut stream, 100).unwrap();
                frame::write(&mut stream, Kind::Welcome, "w-0", &[]).unwrap();
                if number == 1 {
                    frame::write(&mut stream, Kind::Entry, "no.key", &[]).unwrap();
                }
                kept.push(stream);
            }
        });
        let [silent, odd] = [0, 1].map(|_| HubClient::connect(address, "token", "w", limit).unwrap());
        let start = Instant::now();
        assert_eq!(silent.next(Duration::ZERO).unwrap(), None);
        let message = silent.put(&Key::Identity, &[]).unwrap_err().to_string();
        assert!(message.contains("has not answered for 200ms"), "{message}");
        assert!(silent.put(&Key::Identity, &[]).unwrap_err().to_string().contains("has closed the connection"));
        assert!(odd.next(Duration::from_secs(5)).is_err() && odd.put(&Key::Identity, &[]).is_err());
        assert!(start.elapsed() < Duration::from_secs(2));
    }
}
