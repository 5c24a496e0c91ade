//! The thread that calls MPI, and what it is asked to do.
//!
//! A communicator stays on the thread that made it. Whoever waits for an answer from that thread can
//! stop waiting, which a call of MPI cannot: so a rank that never comes is an error, and not a hang.

use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use ::mpi::datatype::PartitionMut;
use ::mpi::environment::{Threading, initialize_with_threading};
use ::mpi::point_to_point::send_receive_into;
use ::mpi::topology::SimpleCommunicator;
use ::mpi::traits::{Communicator, CommunicatorCollectives, Root};

/// Words of a status.
const WORDS: usize = 8;

/// What a rank says before data travel. All ranks send one, and see all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Status {
    /// What the rank is about to do. Nothing else travels unless all ranks say the same.
    pub what: [u64; 5],
    /// Whether it has data, or the text of a failure.
    pub outcome: Outcome,
    /// Bytes of its data or text.
    pub bytes: usize,
    /// A value to be compared, or an announcement.
    pub value: u64,
}

/// What a rank has to offer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Outcome {
    /// Data.
    #[default]
    Done,
    /// The text of a failure; a later step may succeed.
    MayPass,
    /// The text of a failure.
    Failed,
}

impl Status {
    fn to_words(self) -> [u64; WORDS] {
        let [a, b, c, d, e] = self.what;
        let outcome = match self.outcome {
            Outcome::Done => 0,
            Outcome::MayPass => 1,
            Outcome::Failed => 2,
        };
        [a, b, c, d, e, outcome, self.bytes as u64, self.value]
    }

    fn from_words(words: &[u64]) -> Self {
        let word = |at: usize| words.get(at).copied().unwrap_or_default();
        let outcome = match word(5) {
            0 => Outcome::Done,
            1 => Outcome::MayPass,
            _ => Outcome::Failed,
        };
        let bytes = usize::try_from(word(6)).unwrap_or(usize::MAX);
        Self { what: [0, 1, 2, 3, 4].map(word), outcome, bytes, value: word(7) }
    }

    /// Whether all ranks are about to do the same.
    pub fn agree(all: &[Self]) -> bool {
        all.windows(2).all(|pair| pair[0].what == pair[1].what)
    }
}

/// How data travel once all ranks agree. Where one has failed, only the texts of failures do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Exchange {
    /// Every rank gets the data of all.
    Gather,
    /// The rank gets the data of one other, and the other way round.
    Pair(usize),
    /// Nothing does.
    Nothing,
}

/// A request to the thread. The first buffer is sent, the second is filled.
enum Request {
    Meet(Status, Exchange, Vec<u8>, Vec<u8>),
    /// Sizes, then data. `None` says that the rank has none to give.
    Swap(usize, Option<Vec<u8>>, Vec<u8>),
}

/// An answer of the thread.
#[derive(Debug, Default)]
pub(super) struct Answer {
    /// The statuses of all ranks, where they were asked for.
    pub statuses: Vec<Status>,
    /// What arrived; `None` where a partner had nothing to give.
    pub received: Option<Vec<u8>>,
    /// A buffer to use again.
    pub spare: Vec<u8>,
    /// Seconds that data took, once all ranks had come.
    pub seconds: f64,
}

/// The time that MPI has to start, at least.
const START: Duration = Duration::from_secs(60);

/// Why there is no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NoAnswer {
    /// It took too long. The thread still waits, and MPI cannot be used again.
    Late,
    /// The thread has ended.
    Ended,
}

impl From<RecvTimeoutError> for NoAnswer {
    fn from(why: RecvTimeoutError) -> Self {
        match why {
            RecvTimeoutError::Timeout => Self::Late,
            RecvTimeoutError::Disconnected => Self::Ended,
        }
    }
}

/// The connection with the thread that calls MPI.
#[derive(Debug)]
pub(super) struct Link {
    pub rank: usize,
    pub size: usize,
    requests: Option<Sender<Request>>,
    answers: Receiver<Answer>,
    limit: Duration,
}

impl Link {
    /// Starts MPI on a thread of its own.
    ///
    /// # Errors
    /// [`NoAnswer::Ended`] where the process has started MPI before, [`NoAnswer::Late`] after the limit.
    pub fn start(limit: Duration, most: usize) -> Result<Self, NoAnswer> {
        let (requests, asked) = mpsc::channel();
        let (answer, answers) = mpsc::channel();
        let (ready, started) = mpsc::channel();
        let run = move || {
            let Some((universe, _)) = initialize_with_threading(Threading::Funneled) else { return };
            let world = universe.world();
            let (rank, size) = (world.rank(), world.size());
            if ready.send((rank.unsigned_abs() as usize, size.unsigned_abs() as usize)).is_err() {
                return;
            }
            let gang = Gang { world, most: most.clamp(1, i32::MAX as usize) };
            for request in asked {
                if answer.send(gang.serve(request)).is_err() {
                    break;
                }
            }
            // this waits for the other ranks, and whoever waits for this thread sees the channel close
            drop(universe);
        };
        thread::Builder::new().name("mpi".into()).spawn(run).map_err(|_| NoAnswer::Ended)?;
        // hosts may have to be reached first
        let (rank, size) = started.recv_timeout(limit.max(START))?;
        Ok(Self { rank, size, requests: Some(requests), answers, limit })
    }

    fn ask(&self, request: Request) -> Result<Answer, NoAnswer> {
        let requests = self.requests.as_ref().ok_or(NoAnswer::Ended)?;
        requests.send(request).map_err(|_| NoAnswer::Ended)?;
        Ok(self.answers.recv_timeout(self.limit)?)
    }

    /// Sends a status and, where all ranks agree, data.
    pub fn meet(&self, status: Status, how: Exchange, data: Vec<u8>, spare: Vec<u8>) -> Result<Answer, NoAnswer> {
        self.ask(Request::Meet(Status { bytes: data.len(), ..status }, how, data, spare))
    }

    /// Swaps data with another rank, whatever their sizes.
    pub fn swap(&self, with: usize, data: Option<Vec<u8>>, spare: Vec<u8>) -> Result<Answer, NoAnswer> {
        self.ask(Request::Swap(with, data, spare))
    }

    /// Ends MPI, which waits for the other ranks. Whether it has ended within the limit.
    pub fn finish(&mut self) -> bool {
        self.requests = None;
        self.answers.recv_timeout(self.limit) == Err(RecvTimeoutError::Disconnected)
    }
}

impl PartialEq for Answer {
    fn eq(&self, other: &Self) -> bool {
        self.statuses == other.statuses && self.received == other.received
    }
}

/// The thread's side.
struct Gang {
    world: SimpleCommunicator,
    /// The most bytes of a message.
    most: usize,
}

impl Gang {
    fn serve(&self, request: Request) -> Answer {
        match request {
            Request::Meet(status, how, data, into) => self.meet(status, how, data, into),
            Request::Swap(with, data, into) => {
                let size = data.as_ref().map_or(u64::MAX, |data| data.len() as u64);
                let mut theirs = u64::MAX;
                let peer = self.world.process_at_rank(with as i32);
                send_receive_into(&size, &peer, &mut theirs, &peer);
                let start = Instant::now();
                match (data, usize::try_from(theirs)) {
                    (Some(data), Ok(bytes)) if theirs != u64::MAX => {
                        let received = Some(self.pair(with, &data, into, bytes));
                        let seconds = start.elapsed().as_secs_f64();
                        Answer { received, spare: data, seconds, ..Answer::default() }
                    }
                    (data, _) => Answer { spare: data.unwrap_or(into), ..Answer::default() },
                }
            }
        }
    }

    fn meet(&self, status: Status, how: Exchange, mut data: Vec<u8>, into: Vec<u8>) -> Answer {
        let size = self.world.size().unsigned_abs() as usize;
        let mut words = vec![0; WORDS * size];
        self.world.all_gather_into(&status.to_words(), &mut words[..]);
        let statuses: Vec<Status> = words.chunks(WORDS).map(Status::from_words).collect();
        if !Status::agree(&statuses) {
            return Answer { statuses, received: None, spare: into, seconds: 0.0 };
        }
        let start = Instant::now();
        let failed = |status: &Status| status.outcome != Outcome::Done;
        let received = if statuses.iter().any(failed) {
            if !failed(&status) {
                data.clear();
            }
            let counts: Vec<usize> = statuses.iter().map(|all| if failed(all) { all.bytes } else { 0 }).collect();
            self.gather(&data, into, &counts)
        } else {
            match how {
                Exchange::Gather => {
                    let counts: Vec<usize> = statuses.iter().map(|all| all.bytes).collect();
                    self.gather(&data, into, &counts)
                }
                Exchange::Pair(with) => self.pair(with, &data, into, statuses[with].bytes),
                Exchange::Nothing => into,
            }
        };
        Answer { statuses, received: Some(received), spare: data, seconds: start.elapsed().as_secs_f64() }
    }

    /// The data of all ranks, one behind the other.
    fn gather(&self, data: &[u8], mut into: Vec<u8>, counts: &[usize]) -> Vec<u8> {
        into.resize(counts.iter().sum(), 0);
        if into.is_empty() {
            return into;
        }
        if into.len() <= self.most {
            let signed: Vec<i32> = counts.iter().map(|&count| count as i32).collect();
            let starts: Vec<i32> = starts(counts).iter().map(|&start| start as i32).collect();
            self.world.all_gather_varcount_into(data, &mut PartitionMut::new(&mut into[..], signed, starts));
            return into;
        }
        for (rank, (&count, start)) in counts.iter().zip(starts(counts)).enumerate() {
            let part = &mut into[start..start + count];
            if rank as i32 == self.world.rank() {
                part.copy_from_slice(data);
            }
            let root = self.world.process_at_rank(rank as i32);
            part.chunks_mut(self.most).for_each(|chunk| root.broadcast_into(chunk));
        }
        into
    }

    /// The data of another rank, which gets these.
    fn pair(&self, with: usize, data: &[u8], mut into: Vec<u8>, bytes: usize) -> Vec<u8> {
        into.resize(bytes, 0);
        let peer = self.world.process_at_rank(with as i32);
        let (mut out, mut back) = (data, &mut into[..]);
        while !out.is_empty() || !back.is_empty() {
            let (now, later) = out.split_at(out.len().min(self.most));
            let (here, rest) = back.split_at_mut(back.len().min(self.most));
            send_receive_into(now, &peer, here, &peer);
            (out, back) = (later, rest);
        }
        into
    }
}

/// Where the data of each rank start.
pub(super) fn starts(counts: &[usize]) -> Vec<usize> {
    counts.iter().scan(0, |next, count| Some(std::mem::replace(next, *next + count))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_survives_the_way() {
        for outcome in [Outcome::Done, Outcome::MayPass, Outcome::Failed] {
            let status = Status { what: [1, 2, 3, u64::MAX, 5], outcome, bytes: 1 << 33, value: 7 };
            assert_eq!(Status::from_words(&status.to_words()), status);
        }
    }

    #[test]
    fn ranks_agree_where_they_do_the_same() {
        let one = Status { what: [1, 2, 3, 4, 5], ..Status::default() };
        let failed = Status { outcome: Outcome::Failed, bytes: 9, value: 3, ..one };
        assert!(Status::agree(&[one, failed, one]));
        assert!(!Status::agree(&[one, one, Status { what: [1, 2, 3, 4, 6], ..one }]));
    }

    #[test]
    fn data_of_the_ranks_follow_one_another() {
        assert_eq!(starts(&[3, 0, 4, 1]), [0, 3, 3, 7]);
    }
}
