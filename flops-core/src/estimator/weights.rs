//! Noise on the trained parameters (SPSA, Spall 1992; MeZO, Malladi et al. 2023; evolution
//! strategies, Salimans et al. 2017).
//!
//! Query q of every example shares the direction ε_q: one perturbed model evaluates, in one pass,
//! the examples that have a query q. The coefficient of example j is its own, (ℓ_jq − ℓ_j)/σ, and
//! its weight is 1/(B·A_j) as everywhere. The noise is not independent between examples, so
//! Neyman's floor does not hold. Every direction gets a perturbed copy of its own: no weight is
//! ever restored by subtraction. Noise covers all coordinates of a parameter, or a subspace
//! (`weight_noise.rs`).

use burn::module::{ModuleMapper, Param};
use burn::prelude::*;

use super::context::{EstimateContext, SpaceGradients, to_host};
use super::rows;
use super::weight_noise::{Lift, WeightNoise};
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
    of: &'a WeightNoise<B>,
    /// Number of the next trained parameter.
    site: usize,
    /// Noise that the device makes; the parameters take theirs in turn.
    numbers: Option<DeviceNoise<B>>,
}

impl<B: Backend> ModuleMapper<B> for Perturb<'_, B> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        let (noise, query, of, site) = (self.noise, self.query, self.of, self.site);
        let Some((_, lift)) = of.parameters.get(site).filter(|(id, _)| *id == param.id) else { return param };
        self.site += 1;
        let draw = |len: usize, values: &mut [f32]| {
            noise.perturb(site, &[RowKey { position: SHARED, query }], len, |_, start, noise| {
                values[start..].iter_mut().zip(noise).for_each(|(v, e)| *v += e);
            });
        };
        param.map(|value| match (lift, &mut self.numbers) {
            (Lift::Full(_), Some(numbers)) => {
                let shape = value.dims();
                numbers.add(value, shape)
            }
            (Lift::Full(len), None) => {
                let shape = value.dims();
                ops::add_values(value, shape, |values| draw(*len, values))
            }
            (Lift::LowRank { .. }, numbers) => {
                let (shape, len) = (value.dims(), lift.drawn());
                let drawn = match numbers {
                    Some(numbers) => numbers.take(len).reshape([len]),
                    None => {
                        let mut values = vec![0f32; len];
                        draw(len, &mut values);
                        ops::from_host(values, [len], &value.device())
                    }
                };
                ops::add_rounded(value, lift.apply(drawn).reshape(shape))
            }
        })
    }
}

/// Losses of all queries of each example, and the rows of the largest pass.
pub(super) fn losses<B: Backend, M: ForwardModel<B>>(
    p: &EstimateContext<'_, B, M>,
    of: &WeightNoise<B>,
) -> Result<(Vec<Vec<f64>>, usize), Error> {
    let counts = p.allocation.counts();
    let mut losses: Vec<Vec<f64>> = counts.iter().map(|&a| vec![f64::NAN; a]).collect();
    // the examples that have a query q, for each q
    let directions: Vec<Vec<usize>> =
        (0..p.allocation.max()).map(|q| (0..counts.len()).filter(|&j| counts[j] > q).collect()).collect();
    let (noise, max_rows, step) = (&p.noise, p.rows(p.stages.before(0)), p.key);
    let context = (p.model.clone(), p.batch.input.clone(), p.target.clone(), p.stages.frozen(), of.clone());
    let work = |(model, input, target, prefix, of): &(M, M::Input, M::Target, Prefix, WeightNoise<B>), query: usize| {
        let key = [RowKey { position: SHARED, query }];
        let device = of.device.as_ref().filter(|_| noise.on_device);
        let numbers = device.map(|device| noise.device_noise(0, &key, device).with_total(of.drawn()));
        let perturbed = model.clone().map(&mut Perturb { noise, query, of, site: 0, numbers });
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
/// all, whatever the subspace.
pub(super) fn gradients<B: Backend, M: ForwardModel<B>>(
    p: &EstimateContext<'_, B, M>,
    of: &WeightNoise<B>,
    weights: &[Vec<f64>],
) -> Result<SpaceGradients<B>, Error> {
    let queries = p.allocation.max();
    // the weight of a direction is the sum over the examples it was evaluated on
    let totals: Vec<f64> = (0..queries).map(|q| weights.iter().filter_map(|w| w.get(q)).sum()).collect();
    let keys: Vec<RowKey> = (0..queries).map(|query| RowKey { position: SHARED, query }).collect();
    let Some(device) = &of.device else { return Err(Error::NothingTrained) };
    let (noise, all) = (&p.noise, 0..queries);
    let groups = std::slice::from_ref(&all);
    let mut gradients = Gradients::default();
    if noise.on_device {
        let mut sums = noise.device_scores(0, groups, &keys, &totals, queries, device).with_total(of.drawn());
        for (id, lift) in &of.parameters {
            gradients.add_flat(*id, lift.apply(sums.take(lift.drawn()).reshape([lift.drawn()])));
        }
    } else {
        let sum = |(device, of): &(B::Device, WeightNoise<B>), site: usize| {
            let (lift, len) = (&of.parameters[site].1, of.parameters[site].1.drawn());
            let drawn = ops::from_host(noise.weighted_scores(site, groups, &keys, &totals, len), [len], device);
            Ok(lift.apply(drawn))
        };
        let context = (device.clone(), of.clone());
        let add = |site: usize, g| gradients.add_flat(of.parameters[site].0, g);
        run_ordered(of.parameters.len(), p.threads, context, sum, add)?;
    }
    Ok(SpaceGradients {
        gradients,
        squared_score_norms: vec![vec![of.len() as f64]; weights.len()],
        recorded: 0,
        observed: None,
    })
}
