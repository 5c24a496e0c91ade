//! What the model is fed with: noise, and what connects workers.

use std::hint::black_box;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use flops_benches::median;
use flops_core::NoiseLaw;
use flops_distributed::hub::{Hub, HubOptions};
use flops_distributed::{Key, Log};
use serde::Serialize;

use crate::worker::LARGE;

/// The longest wait for an entry.
const LIMIT: Duration = Duration::from_secs(30);

/// What a log does.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct LogFigures {
    /// Seconds until an entry that is written is read again.
    pub entry: f64,
    /// Bytes a second from one worker to another.
    pub bandwidth: f64,
    /// Entries a second of two workers that write at once, and read what both write.
    pub entries_of_2: f64,
    /// The same of sixteen.
    pub entries_of_16: f64,
}

impl LogFigures {
    /// Seconds that an entry costs, and what each worker that reads it adds.
    pub fn serve(&self) -> (f64, f64) {
        let (two, sixteen) = (1.0 / self.entries_of_2, 1.0 / self.entries_of_16);
        let each = ((sixteen - two) / 14.0).max(0.0);
        ((two - 2.0 * each).max(0.0), each)
    }
}

/// Returns the seconds that a law needs for a value, on the host and one thread.
pub fn noise(law: NoiseLaw, rounds: usize) -> f64 {
    let mut values = vec![0f32; 1 << 20];
    let all: Vec<f64> = (0..rounds as u64)
        .map(|seed| {
            let start = Instant::now();
            law.sample(seed, black_box(&mut values));
            start.elapsed().as_secs_f64() / values.len() as f64
        })
        .collect();
    median(&all)
}

/// Measures the hub.
///
/// # Errors
/// If it fails.
pub fn hub() -> Result<LogFigures> {
    // a hub for each measurement: all its workers read all of its entries
    figures(&mut |workers| {
        let hub = Hub::start(HubOptions::default())?;
        let logs = (0..workers).map(|_| Ok(Box::new(hub.connect("probe")?) as Box<dyn Log>)).collect::<Result<_>>()?;
        Ok((logs, Some(hub)))
    })
}

/// Measures a NATS server.
///
/// # Errors
/// If it fails.
#[cfg(feature = "nats")]
pub fn nats(server: &str) -> Result<LogFigures> {
    use flops_distributed::{NatsLog, NatsOptions};
    let mut runs = 0;
    figures(&mut |workers| {
        runs += 1;
        let options = NatsOptions::new([server], format!("probe-{runs}"));
        let connect = |_| Ok(Box::new(NatsLog::connect(&options, "probe")?) as Box<dyn Log>);
        Ok(((0..workers).map(connect).collect::<Result<_>>()?, None))
    })
}

/// Logs of so many workers in a run of their own, and the hub that keeps it.
type Connect<'a> = &'a mut dyn FnMut(usize) -> Result<(Vec<Box<dyn Log>>, Option<Hub>)>;

fn figures(connect: Connect<'_>) -> Result<LogFigures> {
    let (logs, _hub) = connect(2)?;
    let [writer, reader] = &logs[..] else { unreachable!("two were asked for") };
    let mut turns = vec![];
    for number in 0..200 {
        let start = Instant::now();
        writer.put(&Key::Weights(number), &[0; 64])?;
        writer.next(LIMIT)?.context("an entry does not come back")?;
        turns.push(start.elapsed().as_secs_f64());
        reader.next(LIMIT)?.context("an entry does not come")?;
    }
    let entry = median(&turns);
    let mut large = vec![];
    for number in 200..206 {
        let start = Instant::now();
        writer.put(&Key::Weights(number), &vec![number as u8; LARGE])?;
        reader.next(LIMIT)?.context("a large entry does not come")?;
        large.push(start.elapsed().as_secs_f64());
        writer.next(LIMIT)?.context("a large entry does not come back")?;
    }
    let bandwidth = LARGE as f64 / (median(&large) - entry).max(1e-9);
    let (entries_of_2, entries_of_16) = (rate(connect, 2)?, rate(connect, 16)?);
    Ok(LogFigures { entry, bandwidth, entries_of_2, entries_of_16 })
}

/// Entries a second where so many workers write at once, and each reads what all write.
fn rate(connect: Connect<'_>, workers: usize) -> Result<f64> {
    let (logs, _hub) = connect(workers)?;
    let each = 2000 / workers;
    let start = Instant::now();
    thread::scope(|scope| {
        let work = |(index, log): (usize, &dyn Log)| -> Result<()> {
            for number in 0..each {
                log.put(&Key::Weights((index * each + number) as u64), &[0; 64])?;
            }
            (0..workers * each).try_for_each(|_| log.next(LIMIT)?.map(drop).context("an entry does not come"))
        };
        let threads: Vec<_> =
            logs.iter().enumerate().map(|(index, log)| scope.spawn(move || work((index, &**log)))).collect();
        threads.into_iter().try_for_each(|thread| thread.join().unwrap_or_else(|_| anyhow::bail!("a probe panicked")))
    })?;
    Ok((workers * each) as f64 / start.elapsed().as_secs_f64())
}
