//! Shows the progress of a run, and records it in `metrics.csv`: Burn's TUI on a terminal, plain
//! lines elsewhere.

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
use flops_core::train::{Monitor, StepReport};

use super::artifacts::Artifacts;
use super::format::thousands;
use super::history::{History, Row, Split, mean};
use super::plan::RunPlan;

/// The longest time without a plain line within an epoch.
const SILENCE: Duration = Duration::from_secs(10);

/// A history that the renderer fills on burn-train's thread, and the program reads.
#[derive(Clone, Default)]
pub struct SharedHistory(Arc<Mutex<History>>);

impl SharedHistory {
    /// Wraps `history`.
    pub fn new(history: History) -> Self {
        Self(Arc::new(Mutex::new(history)))
    }

    /// Locks the history.
    pub fn lock(&self) -> MutexGuard<'_, History> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// The mean of a metric over the batches of an epoch, and its latest value.
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

/// Records the history of a run and shows its progress.
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
    last_line: Instant,
    advised: usize,
}

impl RunRenderer {
    /// Returns a renderer of the run `plan`, which appends to `history`.
    pub fn new(history: SharedHistory, plan: &RunPlan<'_>, interrupter: Interrupter) -> Self {
        let tui = (!plan.plain && std::io::stdout().is_terminal())
            .then(|| TuiMetricsRendererWrapper::new(interrupter.clone(), plan.resume));
        let seconds_before = history.lock().seconds();
        let now = Instant::now();
        Self {
            history,
            artifacts: plan.artifacts.clone(),
            monitor: plan.monitor.clone(),
            reports: VecDeque::new(),
            interrupter,
            tui,
            names: HashMap::new(),
            train: HashMap::new(),
            test: HashMap::new(),
            start: now,
            seconds_before,
            last_line: now,
            advised: 0,
        }
    }

    fn seconds(&self) -> f64 {
        self.seconds_before + self.start.elapsed().as_secs_f64()
    }

    /// Adds the value of a metric to its mean, if it is a number.
    fn record(&mut self, state: &MetricState, split: Split) {
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
        // reports come one per step, in order, before the metrics of the step; training may be a
        // step ahead
        if let Some(monitor) = &self.monitor {
            self.reports.extend(monitor.take_reports());
        }
        let report = self.reports.pop_front();
        if let Some(report) = report.as_ref().filter(|report| !report.sites.is_empty()) {
            self.history.lock().sites.clone_from(&report.sites);
        }
        let row = match report {
            Some(report) => Row {
                step_queries: Some(report.queries),
                dropped: Some(report.dropped),
                variance_vs_uniform: finite(report.allocation.relative_variance),
                floor: finite(report.allocation.floor),
                cv: finite(report.allocation.cv),
                min_queries: Some(report.allocation.min),
                max_queries: Some(report.allocation.max),
                alpha: mean(report.sites.iter().map(|site| site.alpha)),
                explained: mean(report.sites.iter().map(|site| site.explained)),
                ..row
            },
            None => row,
        };
        self.history.lock().push(row);
        self.print_advice();
    }

    /// Prints each piece of advice once. With the terminal interface there is no room: `fit` prints
    /// it afterwards.
    fn print_advice(&mut self) {
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

impl MetricsRendererTraining for RunRenderer {
    fn update_train(&mut self, state: MetricState) {
        self.record(&state, Split::Train);
        if let Some(tui) = &mut self.tui {
            tui.update_train(state);
        }
    }

    fn update_valid(&mut self, state: MetricState) {
        self.record(&state, Split::Test);
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
            && self.last_line.elapsed() >= SILENCE
        {
            let loss = self.train.get("Loss").map_or(f64::NAN, Average::mean);
            let (done, all) = (progress.items_processed, progress.items_total);
            println!("epoch {epoch}/{epochs}, {done} of {all} images: train loss {loss:.4}, {:.0} s", self.seconds());
            self.last_line = Instant::now();
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
            self.last_line = Instant::now();
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
    fn means_weight_batches_by_their_size() {
        let mut average = Average::default();
        average.add(&NumericEntry::Aggregated { aggregated_value: 1.0, count: 3 });
        average.add(&NumericEntry::Aggregated { aggregated_value: 5.0, count: 1 });
        assert_eq!((average.latest, average.mean()), (5.0, 2.0));
    }
}
