//! Training runs of the contenders.

use anyhow::Result;
use flops_examples::experiment::{Optim, Run, Spread, Testbed};
use serde::Serialize;

use crate::args::{Args, Contender};

/// A row of `training.csv`.
#[derive(Clone, Serialize)]
pub struct Trained {
    pub seed: u64,
    pub contender: String,
    /// The mean training loss of the last tenth of the steps.
    pub loss: f64,
    pub test_loss: f64,
    pub test_accuracy: f64,
    /// The mean over the steps.
    pub relative_variance: f64,
    pub floor: f64,
}

/// A row of `curves.csv`: the training loss of a stretch of steps.
#[derive(Clone, Serialize)]
pub struct Point {
    pub seed: u64,
    pub contender: String,
    pub queries: u64,
    pub loss: f64,
}

/// Trains one contender from the start of `seed`.
pub fn train(
    args: &Args,
    testbed: &Testbed,
    seed: u64,
    contender: &Contender,
    points: &mut Vec<Point>,
) -> Result<Trained> {
    let config = args.config(seed, contender.estimate)?;
    let learner = testbed.learner(testbed.model(seed), config, contender.kind)?;
    let mut batches = testbed.batches(args.batch_size, seed)?;
    let (mut relative, mut floor, mut stretch) = (vec![], vec![], vec![]);
    let width = (args.steps() / 30).max(1);
    let run = Run::new(learner, Optim::adam(), args.lr, args.steps()).with_schedule(args.schedule);
    let (run, loss) = run.finish(&mut batches, |done, report| {
        relative.push(report.allocation.relative_variance);
        floor.push(report.allocation.floor);
        stretch.push(report.loss);
        if done % width == 0 {
            let (contender, loss) = (contender.name.clone(), Spread::of(&stretch).mean);
            points.push(Point { seed, contender, queries: report.queries_total, loss });
            stretch.clear();
        }
    })?;
    let (test_loss, test_accuracy) = testbed.evaluate(&run.learner.model)?;
    Ok(Trained {
        seed,
        contender: contender.name.clone(),
        loss,
        test_loss,
        test_accuracy,
        relative_variance: Spread::of(&relative).mean,
        floor: Spread::of(&floor).mean,
    })
}
