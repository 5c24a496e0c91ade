//! One training run, with measurements on its way.

use std::time::Instant;

use anyhow::{Context, Result};
use flops_core::control_variate::SiteReport;
use flops_examples::backend::B;
use flops_examples::experiment::{Classifier, Schedule, Spread, Testbed};
use flops_vit::data::ImageBatch;
use flops_vit::{FineTuning, Sites};

use crate::args::Args;
use crate::record::{Key, Look, Record, SiteRow};
use crate::subject::Subject;
use crate::trainee::Trainee;

/// What the runs of a grid have in common.
pub struct Course<'a, M: Classifier> {
    /// The flags.
    pub args: &'a Args,
    /// Row-forwards of each run.
    pub budget: u64,
    /// Images and frozen prefixes, with noise at the sites of the method.
    pub testbed: &'a Testbed<M>,
    /// The batch on which estimates are compared with the exact gradient.
    pub fixed: &'a ImageBatch<B>,
}

/// What a run has seen so far.
#[derive(Default)]
struct Progress {
    /// The loss of every step.
    losses: Vec<f64>,
    /// Steps at the last look.
    looked: usize,
    /// Seconds of the steps alone.
    seconds: f64,
    /// What the last step knew of its sites.
    sites: Vec<SiteReport>,
}

impl<M: Classifier> Course<'_, M> {
    /// Trains `model` until its row-forwards are spent, or a step fails. After each look, `tell`
    /// hears the share of the budget that is spent, and the test accuracy.
    ///
    /// # Errors
    /// If the settings are invalid, or there are no images.
    pub fn run(&self, key: &Key, model: M, mut tell: impl FnMut(f64, f64)) -> Result<Record> {
        let &Self { args, budget, testbed, .. } = self;
        let config = key.method.config(key.queries.max(1), args.sigma, key.seed)?;
        let factor = match key.subject {
            Subject::Pretrained(_) => FineTuning::HEAD_LR_FACTOR,
            Subject::Scratch(_) => 1.0,
        };
        let mut trainee = Trainee::new(testbed, model, key.method, config, factor)?;
        let mut batches = testbed.batches(args.batch_size, key.seed)?;
        let mut progress = Progress::default();
        let mut looks = vec![self.look(key, &trainee, &mut progress)?];
        let (mut rows, mut marks, mut failure) = (0, 1, None);
        while rows < budget {
            let batch = batches.next().context("there are no images")?;
            let lr = Schedule::Cosine.rate_at(key.lr, rows as f64 / budget as f64);
            let started = Instant::now();
            let stepped = trainee.step(batch, lr);
            progress.seconds += started.elapsed().as_secs_f64();
            let step;
            (trainee, step) = match stepped {
                Ok(stepped) => stepped,
                Err(error) => return Ok(record(key, looks, progress, Some(format!("{error:#}")))),
            };
            progress.losses.push(step.loss);
            progress.sites = step.sites;
            rows = self.row_forwards(key, &trainee);
            if rows >= self.mark(marks) {
                marks = (marks..).find(|&k| self.mark(k) > rows).unwrap_or(marks);
                let look = self.look(key, &trainee, &mut progress)?;
                tell(rows as f64 / budget as f64, look.test_accuracy);
                if !look.test_loss.is_some_and(f64::is_finite) {
                    failure = Some("the test loss is not finite".to_string());
                }
                looks.push(look);
            }
            if failure.is_some() {
                break;
            }
        }
        Ok(record(key, looks, progress, failure))
    }

    /// Returns the row-forwards at which the k-th look is due. Looks are closer together at the
    /// start, where the accuracy rises.
    fn mark(&self, k: usize) -> u64 {
        let share = k as f64 / self.args.looks as f64;
        (self.budget as f64 * share.powf(1.5)).ceil() as u64
    }

    fn row_forwards(&self, key: &Key, trainee: &Trainee<M>) -> u64 {
        trainee.row_forwards(self.args.backward, key.method.sites() == Sites::Branch)
    }

    fn look(&self, key: &Key, trainee: &Trainee<M>, progress: &mut Progress) -> Result<Look> {
        let (test_loss, test_accuracy) = self.testbed.evaluate(trainee.model())?;
        let since = &progress.losses[progress.looked..];
        progress.looked = progress.losses.len();
        Ok(Look {
            step: progress.losses.len(),
            row_forwards: self.row_forwards(key, trainee),
            queries: trainee.queries(),
            seconds: progress.seconds,
            train_loss: finite(Spread::of(since).mean),
            test_loss: finite(test_loss),
            test_accuracy,
            // a step that fails on this batch fails in training too, and says why
            cosine: trainee.cosine(self.testbed, self.fixed).unwrap_or(None),
        })
    }
}

fn record(key: &Key, looks: Vec<Look>, progress: Progress, failure: Option<String>) -> Record {
    let Progress { losses, sites, .. } = progress;
    let tail = &losses[losses.len() - losses.len().div_ceil(10)..];
    let site = |site: SiteReport| SiteRow { explained: site.explained, alpha: site.alpha };
    Record {
        seed: key.seed,
        train_loss: finite(Spread::of(tail).mean),
        looks,
        sites: sites.into_iter().map(site).collect(),
        failure,
    }
}

/// Returns a number that JSON can hold.
fn finite(value: f64) -> Option<f64> {
    Some(value).filter(|value| value.is_finite())
}
