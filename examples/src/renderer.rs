//! What a run shows and keeps while it trains: Burn's TUI on a terminal, plain lines elsewhere, `metrics.csv` always.

use std::collections::{HashMap, VecDeque};
use std::io::IsTerminal;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use burn::train::metric::{MetricDefinition, MetricId, NumericEntry};
use burn::train::renderer::tui::TuiMetricsRendererWrapper;
use burn::train::renderer::{
    EvaluationName, EvaluationProgress, MetricState, MetricsRenderer, MetricsRendererEvaluation,
    MetricsRendererTraining, ProgressType, TrainingProgress,
};
use burn::train::{Interrupter, LearnerSummary};
use flops_core::learner::{Monitor, StepReport};

use crate::artifacts::Artifacts;
use crate::history::{History, Row, Split, mean};

/// How long plain lines may be silent within an epoch.
const SILENCE: Duration = Duration::from_secs(10);

/// A history that the renderer fills, on burn-train's thread, and the example reads.
#[derive(Clone, Default)]
pub struct SharedHistory(Arc<Mutex<History>>);

impl SharedHistory {
    /// Shares `history`.
    pub fn new(history: History) -> Self {
        Self(Arc::new(Mutex::new(history)))
    }

    /// The history, for a moment.
    pub fn lock(&self) -> MutexGuard<'_, History> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// Values of a metric over the batches of an epoch.
#[derive(Clone, Copy, Default)]
struct Average {
    latest: f64,
    sum: f64,
    count: usize,
}

impl Average {
    fn add(&mut self, entry: &NumericEntry) {
        let (value, count) = match *entry {
            NumericEntry::Value(value) => (value, 1),
            NumericEntry::Aggregated { aggregated_value, count } => (aggregated_value, count),
        };
        self.latest = value;
        self.sum += value * count as f64;
        self.count += count;
    }

    fn mean(&self) -> f64 {
        self.sum / self.count as f64
    }
}

/// Keeps the history of a run and shows its progress.
pub struct RunRenderer {
    history: SharedHistory,
    artifacts: Artifacts,
    monitor: Option<Monitor>,
    reports: VecDeque<StepReport>,
    interrupter: Interrupter,
    tui: Option<TuiMetricsRendererWrapper>,
    names: HashMap<MetricId, String>,
    train: HashMap<String, Average>,
    test: HashMap<String, Average>,
    start: Instant,
    seconds_before: f64,
    spoke: Instant,
    advised: usize,
}

impl RunRenderer {
    /// A renderer that goes on with `history`; `resumed` is the epoch that was resumed from.
    pub fn new(
        history: SharedHistory,
        artifacts: Artifacts,
        monitor: Option<Monitor>,
        interrupter: Interrupter,
        resumed: Option<usize>,
        plain: bool,
    ) -> Self {
        let tui = (!plain && std::io::stdout().is_terminal())
            .then(|| TuiMetricsRendererWrapper::new(interrupter.clone(), resumed));
        let seconds_before = history.lock().seconds();
        let now = Instant::now();
        Self {
            history,
            artifacts,
            monitor,
            reports: VecDeque::new(),
            interrupter,
            tui,
            names: HashMap::new(),
            train: HashMap::new(),
            test: HashMap::new(),
            start: now,
            seconds_before,
            spoke: now,
            advised: 0,
        }
    }

    fn seconds(&self) -> f64 {
        self.seconds_before + self.start.elapsed().as_secs_f64()
    }

    /// Takes a metric's value in, where it has one.
    fn note(&mut self, state: &MetricState, split: Split) {
        let MetricState::Numeric(entry, value) = state else { return };
        let Some(name) = self.names.get(&entry.metric_id) else { return };
        let averages = if split == Split::Train { &mut self.train } else { &mut self.test };
        averages.entry(name.clone()).or_default().add(value);
    }

    fn row(&self, split: Split, epoch: usize) -> Row {
        let averages = if split == Split::Train { &self.train } else { &self.test };
        let value = |name: &str| {
            averages.get(name).map_or(f64::NAN, |a| if split == Split::Train { a.latest } else { a.mean() })
        };
        Row { seconds: self.seconds(), ..Row::new(split, epoch, value("Loss"), value("Accuracy") / 100.0) }
    }

    fn end_step(&mut self, epoch: usize) {
        let row = self.row(Split::Train, epoch);
        // one report per step, in order, made before the step's metrics arrive; training may be a step ahead of them
        if let Some(monitor) = &self.monitor {
            self.reports.extend(monitor.take_reports());
        }
        let row = match self.reports.pop_front() {
            Some(report) => Row {
                step_queries: Some(report.queries),
                dropped: Some(report.dropped),
                variance_vs_uniform: finite(report.allocation.relative_variance),
                ceiling: finite(report.allocation.ceiling),
                cv: finite(report.allocation.cv),
                min_queries: Some(report.allocation.min),
                max_queries: Some(report.allocation.max),
                ..row
            },
            None => row,
        };
        self.history.lock().push(row);
        self.advise();
    }

    /// Passes advice on, once each: below the metrics of the terminal interface there is no room, the lines come when it has closed.
    fn advise(&mut self) {
        if self.tui.is_some() {
            return;
        }
        let Some(monitor) = &self.monitor else { return };
        let advice = monitor.advice();
        for advice in advice.iter().skip(self.advised) {
            println!("advice at step {}: {}", advice.step, advice.message);
        }
        self.advised = advice.len();
    }

    fn end_epoch(&mut self, epoch: usize) {
        let row = self.row(Split::Test, epoch);
        let mut history = self.history.lock();
        history.push(row);
        if let Err(error) = history.write(&self.artifacts) {
            self.interrupter.stop(Some(&format!("{error:#}")));
        }
    }

    fn epoch_line(&self, epoch: usize, epochs: usize) -> String {
        let history = self.history.lock();
        let average =
            |averages: &HashMap<String, Average>, name: &str| averages.get(name).map_or(f64::NAN, Average::mean);
        let mut line = format!(
            "epoch {epoch:>width$}/{epochs}  train loss {:.4}, accuracy {:5.2} %  test loss {:.4}, accuracy {:5.2} %",
            average(&self.train, "Loss"),
            average(&self.train, "Accuracy"),
            average(&self.test, "Loss"),
            average(&self.test, "Accuracy"),
            width = epochs.to_string().len(),
        );
        if history.queries() > 0 {
            line += &format!("  {} queries", thousands(history.queries()));
        }
        let steps = || history.of(Split::Train).filter(|row| row.epoch == epoch);
        if let Some(variance) = mean(steps().filter_map(|row| row.variance_vs_uniform)) {
            line += &format!("  variance {variance:.3} × uniform");
        }
        let dropped: u64 = steps().filter_map(|row| row.dropped).sum();
        if dropped > 0 {
            line += &format!("  {dropped} queries dropped");
        }
        line + &format!("  {:.0} s", self.seconds())
    }
}

fn finite(value: f64) -> Option<f64> {
    value.is_finite().then_some(value)
}

/// A count with its digits in groups of three.
pub fn thousands(count: u64) -> String {
    let digits = count.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

impl MetricsRendererTraining for RunRenderer {
    fn update_train(&mut self, state: MetricState) {
        self.note(&state, Split::Train);
        if let Some(tui) = &mut self.tui {
            tui.update_train(state);
        }
    }

    fn update_valid(&mut self, state: MetricState) {
        self.note(&state, Split::Test);
        if let Some(tui) = &mut self.tui {
            tui.update_valid(state);
        }
    }

    fn render_train(&mut self, item: TrainingProgress, indicators: Vec<ProgressType>) {
        let (epoch, epochs) = (item.global_progress.items_processed, item.global_progress.items_total);
        self.end_step(epoch);
        if let Some(tui) = &mut self.tui {
            tui.render_train(item, indicators);
        } else if let Some(progress) = item.progress
            && self.spoke.elapsed() >= SILENCE
        {
            let loss = self.train.get("Loss").map_or(f64::NAN, Average::mean);
            let (done, all) = (progress.items_processed, progress.items_total);
            println!("epoch {epoch}/{epochs}, {done} of {all} images: train loss {loss:.4}, {:.0} s", self.seconds());
            self.spoke = Instant::now();
        }
    }

    fn render_valid(&mut self, item: TrainingProgress, indicators: Vec<ProgressType>) {
        let (epoch, epochs) = (item.global_progress.items_processed, item.global_progress.items_total);
        let ended = item.progress.as_ref().is_some_and(|p| p.items_processed >= p.items_total);
        if ended {
            self.end_epoch(epoch);
        }
        if let Some(tui) = &mut self.tui {
            tui.render_valid(item, indicators);
        } else if ended {
            println!("{}", self.epoch_line(epoch, epochs));
            self.spoke = Instant::now();
        }
        if ended {
            self.train.clear();
            self.test.clear();
        }
    }

    fn on_train_end(&mut self, summary: Option<LearnerSummary>) -> Result<(), Box<dyn core::error::Error>> {
        match &mut self.tui {
            Some(tui) => tui.on_train_end(summary),
            None => Ok(()),
        }
    }
}

impl MetricsRendererEvaluation for RunRenderer {
    fn update_test(&mut self, name: EvaluationName, state: MetricState) {
        if let Some(tui) = &mut self.tui {
            tui.update_test(name, state);
        }
    }

    fn render_test(&mut self, item: EvaluationProgress, indicators: Vec<ProgressType>) {
        if let Some(tui) = &mut self.tui {
            tui.render_test(item, indicators);
        }
    }
}

impl MetricsRenderer for RunRenderer {
    fn manual_close(&mut self) {
        if let Some(tui) = &mut self.tui {
            tui.manual_close();
        }
    }

    fn register_metric(&mut self, definition: MetricDefinition) {
        self.names.insert(definition.metric_id.clone(), definition.name.clone());
        if let Some(tui) = &mut self.tui {
            tui.register_metric(definition);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_grouped() {
        assert_eq!([0, 999, 1000, 1234567].map(thousands), ["0", "999", "1,000", "1,234,567"]);
    }

    #[test]
    fn batches_weigh_by_their_size() {
        let mut average = Average::default();
        average.add(&NumericEntry::Aggregated { aggregated_value: 1.0, count: 3 });
        average.add(&NumericEntry::Aggregated { aggregated_value: 5.0, count: 1 });
        assert_eq!((average.latest, average.mean()), (5.0, 2.0));
    }
}
