//! Noise on the trained parameters (SPSA, Spall 1992; MeZO, Malladi et al. 2023; evolution
//! strategies, Salimans et al. 2017).
//!
//! Query q of every example shares the direction ε_q: one perturbed model evaluates, in one pass,
//! the examples that have a query q. The coefficient of example j is its own, (ℓ_jq − ℓ_j)/σ, and
//! its weight is 1/(B·A_j) as everywhere. The noise is not independent between examples, so
//! Neyman's floor does not hold. Every direction gets a perturbed copy of its own: no weight is
//! ever restored by subtraction.

use burn::module::{ModuleMapper, ModuleVisitor, Param, ParamId};
use burn::prelude::*;

use super::context::{EstimateContext, SpaceGradients, to_host};
use super::rows;
use crate::batch::Rows;
use crate::error::Error;
use crate::model::ForwardModel;
use crate::noise::{DeviceNoise, NoiseSource, RowKey, SHARED};
use crate::ops;
use crate::parallel::{balanced_chunk, run_ordered};
use crate::probe::{Gradients, Prefix, Probe};

/// θ + σε_q, in the trained parameters.
struct Perturb<'a, B: Backend> {
    noise: &'a NoiseSource,
    query: usize,
    trained: &'a std::collections::HashSet<ParamId>,
    site: usize,
    /// Noise that the device makes; the parameters take theirs in turn.
    numbers: Option<DeviceNoise<B>>,
}

impl<B: Backend> ModuleMapper<B> for Perturb<'_, B> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        if !self.trained.contains(&param.id) {
            return param;
        }
        let site = self.site;
        self.site += 1;
        let key = RowKey { position: SHARED, query: self.query };
        param.map(|value| {
            let shape = value.dims();
            let len = shape.iter().product();
            if let Some(numbers) = &mut self.numbers {
                return numbers.add(value, shape);
            }
            ops::add_values(value, shape, |values| {
                self.noise.perturb(site, &[key], len, |_, start, noise| {
                    values[start..].iter_mut().zip(noise).for_each(|(v, e)| *v += e);
                });
            })
        })
    }
}

/// The trained parameters in the order of their sites, their sizes, and their device.
struct Sizes<'a, B: Backend> {
    trained: &'a std::collections::HashSet<ParamId>,
    found: Vec<(ParamId, usize)>,
    device: Option<B::Device>,
}

impl<'a, B: Backend> Sizes<'a, B> {
    fn of<M: ForwardModel<B>>(p: &EstimateContext<'a, B, M>) -> Self {
        let mut sizes = Self { trained: p.trained, found: vec![], device: None };
        p.model.visit(&mut sizes);
        sizes
    }
}

impl<B: Backend> ModuleVisitor<B> for Sizes<'_, B> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        if self.trained.contains(&param.id) {
            let value = param.val();
            self.found.push((param.id, value.shape().num_elements()));
            self.device.get_or_insert(value.device());
        }
    }
}

/// Losses of all queries of each example, and the rows of the largest pass.
pub(super) fn losses<B: Backend, M: ForwardModel<B>>(
    p: &EstimateContext<'_, B, M>,
) -> Result<(Vec<Vec<f64>>, usize), Error> {
    let counts = p.allocation.counts();
    let mut losses: Vec<Vec<f64>> = counts.iter().map(|&a| vec![f64::NAN; a]).collect();
    // the examples that have a query q, for each q
    let directions: Vec<Vec<usize>> =
        (0..p.allocation.max()).map(|q| (0..counts.len()).filter(|&j| counts[j] > q).collect()).collect();
    let (noise, max_rows, step) = (&p.noise, p.rows(p.stages.before(0)), p.key);
    let trained = p.trained.clone();
    let Sizes { found, device, .. } = Sizes::of(p);
    let (total, device) = (found.iter().map(|(_, len)| len).sum(), device.filter(|_| noise.on_device));
    let context = (p.model.clone(), p.batch.input.clone(), p.target.clone(), p.stages.frozen(), device);
    let work = |(model, input, target, prefix, device): &(M, M::Input, M::Target, Prefix, Option<B::Device>),
                query: usize| {
        let key = [RowKey { position: SHARED, query }];
        let numbers = device.as_ref().map(|device| noise.device_noise(0, &key, device).with_total(total));
        let perturbed = model.clone().map(&mut Perturb { noise, query, trained: &trained, site: 0, numbers });
        let mut values = vec![];
        for positions in directions[query].chunks(balanced_chunk(directions[query].len(), max_rows)) {
            let mut probe = Probe::resume(prefix.rows(positions)).with_examples(step.examples(positions));
            let output = perturbed.forward(input.rows(positions), &mut probe);
            values.push(rows::losses(&perturbed, output, target.rows(positions), positions.len())?);
        }
        Ok(values)
    };
    let mut found = vec![];
    run_ordered(directions.len(), p.threads, context, work, |_, values| found.extend(values))?;
    let mut values = to_host(found).into_iter();
    for (query, examples) in directions.iter().enumerate() {
        for (&j, value) in examples.iter().zip(&mut values) {
            losses[j][query] = value;
        }
    }
    let largest = directions.iter().map(|examples| examples.len().min(max_rows)).max().unwrap_or(0);
    Ok((losses, largest))
}

/// Gradients, and E‖ε‖² of each example: the number of perturbed parameters, as one site of them
/// all.
pub(super) fn gradients<B: Backend, M: ForwardModel<B>>(
    p: &EstimateContext<'_, B, M>,
    weights: &[Vec<f64>],
) -> Result<SpaceGradients<B>, Error> {
    let queries = p.allocation.max();
    // the weight of a direction is the sum over the examples it was evaluated on
    let totals: Vec<f64> = (0..queries).map(|q| weights.iter().filter_map(|w| w.get(q)).sum()).collect();
    let keys: Vec<RowKey> = (0..queries).map(|query| RowKey { position: SHARED, query }).collect();
    let sizes = Sizes::of(p);
    let Some(device) = sizes.device else { return Err(Error::NothingTrained) };
    let found = sizes.found;
    let dimensions: usize = found.iter().map(|(_, n)| n).sum();
    let (noise, all) = (&p.noise, 0..queries);
    let groups = std::slice::from_ref(&all);
    let mut gradients = Gradients::default();
    if noise.on_device {
        let mut sums = noise.device_scores(0, groups, &keys, &totals, queries, &device).with_total(dimensions);
        found.iter().for_each(|&(id, len)| gradients.add_flat(id, sums.take(len).reshape([len])));
    } else {
        let sum = |device: &B::Device, site: usize| {
            let len = found[site].1;
            Ok(ops::from_host::<B, 1>(noise.weighted_scores(site, groups, &keys, &totals, len), [len], device))
        };
        run_ordered(found.len(), p.threads, device, sum, |site, g| gradients.add_flat(found[site].0, g))?;
    }
    Ok(SpaceGradients {
        gradients,
        squared_score_norms: vec![vec![dimensions as f64]; weights.len()],
        recorded: 0,
        observed: None,
    })
}
