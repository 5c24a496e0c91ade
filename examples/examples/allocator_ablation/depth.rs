//! The second moment of a query by depth.

use anyhow::{Context, Result};
use flops_core::allocator::AllocatorKind;
use flops_core::{ControlVariate, ForwardConfig, QueryBudget, Space};
use flops_examples::experiment::{ImageArgs, Testbed, TestbedArgs, estimate, observe};
use flops_vit::Scope;

use crate::args::Args;

/// Returns the second moment of a query on each layer of the whole model, the first layer first.
pub fn second_moments(args: &Args, seed: u64) -> Result<Vec<f64>> {
    let limit = Some(args.testbed.images.limit.unwrap_or(64).min(64));
    let testbed = TestbedArgs { scope: Scope::Full, images: ImageArgs { limit, ..args.testbed.images.clone() } };
    let testbed = Testbed::open(&testbed, args.experiment.threads()?)?;
    // The learned control variate is left out, because it supports narrow layers only.
    let space = Space::activation().with_control_variate(ControlVariate::None)?;
    let config = ForwardConfig::new(QueryBudget::new(8, 1)?).with_seed(seed).with_space(space);
    let mut learner = testbed.learner(testbed.model(seed), config, AllocatorKind::Uniform)?;
    let mut batches = testbed.batches(16, seed)?;
    // Each query falls on one layer and shows that layer's second moment.
    let mut moments = vec![];
    for _ in 0..if args.experiment.full { 24 } else { 6 } {
        let (grads, _) = estimate(&learner, batches.next().context("there are no images")?)?;
        learner = observe(learner, grads);
        moments = learner.state().sites.moments();
    }
    Ok(moments)
}
