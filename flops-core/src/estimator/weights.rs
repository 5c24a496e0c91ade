//! Noise on the trained parameters (SPSA, Spall 1992; MeZO, Malladi et al. 2023; evolution strategies, Salimans et al. 2017).
//!
//! Query q of every datum shares direction ε_q: one perturbed model evaluates, in one pass, the data that have a query q. The
//! coefficient of datum j is its own, (ℓ_jq − ℓ_j)/σ, so that allocations still weigh 1/(B·A_j); but the noise is not independent
//! between data, and Neyman's ceiling does not hold. The perturbed copy is a new one for every direction: no weight is ever
//! restored by subtraction.

use burn::module::{ModuleMapper, ModuleVisitor, Param, ParamId};
use burn::prelude::*;

use super::{Formed, Problem, counted, parallel::in_order, read};
use crate::batch::Rows;
use crate::error::Error;
use crate::noise::device::Numbers;
use crate::noise::{NoiseSource, RowKey, SHARED};
use crate::objective::{ForwardModel, even};
use crate::ops;
use crate::probe::{Gradients, Prefix, Probe};

/// θ + σε_q, in the trained parameters.
struct Perturb<'a, B: Backend> {
    noise: &'a NoiseSource,
    query: usize,
    trained: &'a std::collections::HashSet<ParamId>,
    site: usize,
    /// Of which they take theirs in turn, where the device makes it.
    numbers: Option<Numbers<B>>,
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
            ops::add_numbers(value, shape, |values| {
                self.noise.perturb(site, &[key], len, |_, start, noise| {
                    values[start..].iter_mut().zip(noise).for_each(|(v, e)| *v += e);
                });
            })
        })
    }
}

/// The trained parameters in the order of their sites, the numbers of each, and where they lie.
struct Sizes<'a, B: Backend> {
    trained: &'a std::collections::HashSet<ParamId>,
    found: Vec<(ParamId, usize)>,
    device: Option<B::Device>,
}

impl<'a, B: Backend> Sizes<'a, B> {
    fn of<M: ForwardModel<B>>(p: &Problem<'a, B, M>) -> Self {
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

/// Losses of all queries of each datum, and the rows of the largest pass.
pub(super) fn losses<B: Backend, M: ForwardModel<B>>(p: &Problem<'_, B, M>) -> Result<(Vec<Vec<f64>>, usize), Error> {
    let counts = p.allocation.counts();
    let mut losses: Vec<Vec<f64>> = counts.iter().map(|&a| vec![f64::NAN; a]).collect();
    // the data that have a query q, for each q
    let directions: Vec<Vec<usize>> =
        (0..p.allocation.max()).map(|q| (0..counts.len()).filter(|&j| counts[j] > q).collect()).collect();
    let (noise, max_rows) = (&p.noise, p.rows(p.stages.before(0)));
    let trained = p.trained.clone();
    let Sizes { found, device, .. } = Sizes::of(p);
    let (total, device) = (found.iter().map(|(_, len)| len).sum(), device.filter(|_| noise.on_device));
    let context = (p.model.clone(), p.batch.input.clone(), p.target.clone(), p.stages.frozen(), device);
    let work = |(model, input, target, prefix, device): &(M, M::Input, M::Target, Prefix, Option<B::Device>),
                query: usize| {
        let key = [RowKey { position: SHARED, query }];
        let numbers = device.as_ref().map(|device| noise.of_rows(0, &key, device).of(total));
        let perturbed = model.clone().map(&mut Perturb { noise, query, trained: &trained, site: 0, numbers });
        let mut values = vec![];
        for positions in directions[query].chunks(even(directions[query].len(), max_rows)) {
            let mut probe = Probe::resume(prefix.rows(positions));
            let output = perturbed.forward(input.rows(positions), &mut probe);
            values.push(counted(perturbed.losses(output, target.rows(positions)), positions.len())?);
        }
        Ok(values)
    };
    let mut found = vec![];
    in_order(directions.len(), p.threads, context, work, |_, values| found.extend(values))?;
    let mut values = read(found).into_iter();
    for (query, data) in directions.iter().enumerate() {
        for (&j, value) in data.iter().zip(&mut values) {
            losses[j][query] = value;
        }
    }
    let largest = directions.iter().map(|data| data.len().min(max_rows)).max().unwrap_or(0);
    Ok((losses, largest))
}

/// Gradients, the energy E‖ε‖² of each datum (the number of perturbed parameters: one site of all of them), and no recorded rows.
pub(super) fn gradients<B: Backend, M: ForwardModel<B>>(
    p: &Problem<'_, B, M>,
    weights: &[Vec<f64>],
) -> Result<Formed<B>, Error> {
    let queries = p.allocation.max();
    // the weight of a direction is the sum over the data it was evaluated on
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
        let mut sums = noise.of_groups(0, groups, &keys, &totals, queries, &device).of(dimensions);
        found.iter().for_each(|&(id, len)| gradients.add(id, sums.take(len)));
    } else {
        let sum = |device: &B::Device, site: usize| {
            let len = found[site].1;
            Ok(ops::from_host::<B, 1>(noise.weighted_scores(site, groups, &keys, &totals, len), [len], device))
        };
        in_order(found.len(), p.threads, device, sum, |site, g| gradients.add(found[site].0, g))?;
    }
    Ok(Formed { gradients, energies: vec![vec![dimensions as f64]; weights.len()], recorded: 0, observed: None })
}
