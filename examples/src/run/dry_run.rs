//! `--dry-run`: what a run would take, measured on two steps whose results are discarded.

use std::time::{Duration, Instant};

use burn::module::{AutodiffModule, Module};
use burn::optim::AdamWConfig;
use burn::tensor::backend::AutodiffBackend;
use burn::train::TrainStep;
use flops_core::ledger::Ledger;
use flops_core::parameters::trained_values;
use flops_core::train::resident_memory;

use super::format::thousands;
use crate::backend::AB;

/// The size of a planned run.
#[derive(Clone, Copy, Debug)]
pub struct RunSize {
    /// Images of an epoch.
    pub images: usize,
    /// Images of a step.
    pub batch_size: usize,
    /// Passes over the images.
    pub epochs: usize,
    /// Queries per image and step; 0 for backpropagation.
    pub queries: usize,
    /// Bytes of the kept prefixes of one training image; 0 if none are kept.
    pub prefix_bytes: usize,
    /// Bytes of the kept prefixes of all test images.
    pub evaluation_bytes: usize,
}

/// What a step takes, measured first on new images, then on the same images again.
#[derive(Clone, Copy, Debug)]
pub struct Measured {
    first: Duration,
    again: Duration,
    /// Row-forwards of each step.
    rows: [u64; 2],
    /// Memory of the process afterwards, if the system reports it.
    memory: Option<u64>,
}

/// Takes the step twice, by AdamW with a learning rate of zero. `ledger` returns the row-forwards so
/// far, if they are counted.
pub fn measure<L>(mut learner: L, batch: L::Input, ledger: impl Fn() -> Option<Ledger>) -> Measured
where
    L: TrainStep + AutodiffModule<AB>,
    L::Input: Clone,
{
    let rows = || ledger().map_or(0, |ledger| ledger.total().row_forwards);
    let mut optimizer = AdamWConfig::new().init();
    let mut times = [Duration::ZERO; 2];
    let mut seen = [rows(); 3];
    for (i, time) in times.iter_mut().enumerate() {
        let start = Instant::now();
        let grads = learner.step(batch.clone()).grads;
        learner = learner.optimize::<AB, _>(&mut optimizer, 0.0, grads);
        *time = start.elapsed();
        seen[i + 1] = rows();
    }
    let [first, again] = times;
    Measured { first, again, rows: [seen[1] - seen[0], seen[2] - seen[1]], memory: resident_memory() }
}

/// Returns the number of trainable parameters and of all parameters.
pub fn parameters<B: AutodiffBackend, M: AutodiffModule<B>>(model: &M) -> (usize, usize) {
    (trained_values(model), Module::num_params(model))
}

/// Returns the forecast as lines of a table.
pub fn forecast(size: &RunSize, measured: &Measured, (trained, all): (usize, usize)) -> Vec<(&'static str, String)> {
    let per_epoch = size.images.div_ceil(size.batch_size);
    let steps = (per_epoch * size.epochs) as u64;
    // the last batch of an epoch may be smaller: costs are counted by image
    let full = size.images as f64 / size.batch_size.min(size.images) as f64;
    let epochs = |first: f64, again: f64| full * (first + again * (size.epochs - 1) as f64);
    let seconds = epochs(measured.first.as_secs_f64(), measured.again.as_secs_f64());
    let mut lines = vec![
        ("parameters", thousands(all as u64)),
        ("parameters trained", format!("{} ({:.1} %)", thousands(trained as u64), 100.0 * trained as f64 / all as f64)),
        ("steps", thousands(steps)),
    ];
    if size.queries > 0 {
        let queries = (size.images * size.queries * size.epochs) as u64;
        let [first, again] = measured.rows.map(|rows| rows as f64);
        lines.push(("queries", thousands(queries)));
        lines.push(("row-forwards", thousands(epochs(first, again).round() as u64)));
    }
    // evaluation between the epochs is not included
    lines.push(("seconds of training, about", thousands(seconds.ceil() as u64)));
    if let Some(now) = measured.memory {
        let kept = (size.images - size.batch_size.min(size.images)) * size.prefix_bytes + size.evaluation_bytes;
        lines.push(("memory, about", format!("{} MiB", thousands((now + kept as u64) >> 20))));
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_forecast_counts_images_epochs_and_kept_prefixes() {
        let size =
            RunSize { images: 100, batch_size: 40, epochs: 3, queries: 20, prefix_bytes: 1 << 20, evaluation_bytes: 0 };
        let measured = Measured {
            first: Duration::from_secs(4),
            again: Duration::from_secs(2),
            rows: [880, 840],
            memory: Some(100 << 20),
        };
        let lines = forecast(&size, &measured, (10, 1000));
        let of = |name: &str| lines.iter().find(|l| l.0 == name).map(|l| l.1.as_str()).unwrap();
        assert_eq!((of("steps"), of("queries"), of("parameters trained")), ("9", "6,000", "10 (1.0 %)"));
        // 2.5 batches of images, once at 4 s and twice at 2 s
        assert_eq!((of("seconds of training, about"), of("row-forwards")), ("20", "6,400"));
        // 60 of the 100 images are not kept yet
        assert_eq!(of("memory, about"), "160 MiB");
        let plain = forecast(&RunSize { queries: 0, ..size }, &measured, (10, 1000));
        assert!(plain.iter().all(|l| l.0 != "queries" && l.0 != "row-forwards"));
    }
}
