//! Noise on the trained parameters (SPSA, Spall 1992; MeZO, Malladi et al. 2023; evolution
//! strategies, Salimans et al. 2017).
//!
//! Query q of every example shares the direction ε_q: one perturbed model evaluates, in one pass,
//! the examples that have a query q. The coefficient of example j is its own, (ℓ_jq − ℓ_j)/σ, and
//! its weight is 1/(B·A_j) as everywhere. The noise is not independent between examples, so
//! Neyman's floor does not hold. Every direction gets a perturbed copy of its own: no weight is
//! ever restored by subtraction. Noise covers all coordinates of a parameter, or a subspace
//! (`weight_noise.rs`).

use std::collections::BTreeMap;
use std::ops::Range;

use burn::module::{ModuleMapper, Param};
use burn::prelude::*;
use burn::tensor::backend::DeviceId;

use super::context::{EstimateContext, SpaceGradients};
use super::leaf_sum::LeafSum;
use super::leaves::part;
use super::rounds::Codec;
use super::rows;
use super::rows::check_failure;
use super::weight_noise::{Lift, WeightNoise};
use crate::batch::Rows;
use crate::error::Error;
use crate::model::ForwardModel;
use crate::noise::{self, DeviceNoise, NoiseSource, RowKey, SHARED};
use crate::ops;
use crate::ops::to_host;
use crate::parallel::{balanced_chunk, run_ordered, run_placed};
use crate::probe::{Gradients, Prefix, Probe};
use crate::wire::{Reader, Writer};

/// θ + σε_q, in the trained parameters.
struct Perturb<'a, B: Backend> {
    noise: &'a NoiseSource,
    query: usize,
    of: &'a WeightNoise<B>,
    /// Number of the next trained parameter.
    site: usize,
    /// The packed parameters, which have their noise; empty where none are.
    packed: Vec<Tensor<B, 1>>,
    /// Noise that the device makes; the other parameters take theirs in turn.
    numbers: Option<DeviceNoise<B>>,
    /// What the host draws for an antithetic pair, where it is kept for the second query.
    pair: Option<&'a mut Drawn>,
}

/// The drawn values of a query, by trained parameter.
#[derive(Default)]
struct Drawn(Vec<Vec<f32>>);

impl Drawn {
    /// Those of the query with the opposite sign.
    fn negate(&mut self) {
        self.0.iter_mut().flatten().for_each(|value| *value = -*value);
    }

    /// The values of a parameter, which are drawn unless they are there.
    fn of(&mut self, site: usize, len: usize, draw: impl FnOnce(&mut [f32])) -> &[f32] {
        if self.0.len() == site {
            let mut values = vec![0f32; len];
            draw(&mut values);
            self.0.push(values);
        }
        &self.0[site]
    }
}

impl<B: Backend> ModuleMapper<B> for Perturb<'_, B> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        let (noise, query, of, site) = (self.noise, self.query, self.of, self.site);
        let Some((_, lift)) = of.parameters.get(site).filter(|(id, _)| *id == param.id) else { return param };
        self.site += 1;
        if let Some(packed) = of.packing.place(site).and_then(|place| self.packed.get(place)) {
            return param.map(|value| packed.clone().reshape(value.dims()));
        }
        let (numbers, pair, len) = (&mut self.numbers, &mut self.pair, lift.drawn());
        let draw = |values: &mut [f32]| {
            noise.perturb(site, &[RowKey { position: SHARED, query }], len, |_, start, noise| {
                add(&mut values[start..], noise);
            });
        };
        let mut add_noise = |values: &mut [f32]| match pair {
            Some(pair) => add(values, pair.of(site, len, draw)),
            None => draw(values),
        };
        param.map(|value| match (lift, numbers) {
            (Lift::Full(_), Some(numbers)) => {
                let shape = value.dims();
                numbers.add(value, shape)
            }
            (Lift::Full(_), None) => {
                let shape = value.dims();
                ops::add_values(value, shape, add_noise)
            }
            (Lift::LowRank { .. }, numbers) => {
                let shape = value.dims();
                let drawn = match numbers {
                    Some(numbers) => numbers.take(len).reshape([len]),
                    None => {
                        let mut values = vec![0f32; len];
                        add_noise(&mut values);
                        ops::from_host(values, [len], &value.device())
                    }
                };
                ops::add_rounded(value, lift.apply(drawn).reshape(shape))
            }
        })
    }
}

/// Adds the noise to as many values.
fn add(values: &mut [f32], noise: &[f32]) {
    values.iter_mut().zip(noise).for_each(|(v, e)| *v += e);
}

/// The losses of a job's queries, in the order of [`Asked`].
struct DirectionLosses(Vec<f64>);

/// Which queries each job asks: directions with the examples that have a query of this number.
struct Asked(Vec<Vec<(usize, Vec<usize>)>>);

impl Asked {
    /// Jobs of examples: every direction on the examples of a leaf, whose prefix stays where it is.
    fn by_leaf(counts: &[usize], ranges: impl Iterator<Item = Range<usize>>) -> Self {
        let of_leaf = |range: Range<usize>| {
            let most = counts[range.clone()].iter().copied().max().unwrap_or(0);
            (0..most).map(|q| (q, range.clone().filter(|&j| counts[j] > q).collect())).collect()
        };
        Self(ranges.map(of_leaf).collect())
    }

    /// Jobs of directions: some of them, on all examples. A pair stays together.
    fn by_direction(counts: &[usize], group: usize, jobs: usize) -> Self {
        let most = counts.iter().copied().max().unwrap_or(0);
        let of_query = |q: usize| (q, (0..counts.len()).filter(|&j| counts[j] > q).collect());
        Self((0..jobs).map(|job| part(most, group, jobs, job).map(of_query).collect()).collect())
    }

    fn len(&self, job: usize) -> usize {
        self.0[job].iter().map(|(_, examples)| examples.len()).sum()
    }
}

impl Codec<DirectionLosses> for Asked {
    fn write(&self, losses: &DirectionLosses, writer: &mut Writer) {
        writer.doubles(&losses.0);
    }

    fn read(&self, jobs: Range<usize>, reader: &mut Reader<'_>) -> Option<DirectionLosses> {
        reader.doubles().filter(|losses| losses.len() == self.len(jobs.start)).map(DirectionLosses)
    }

    fn max_bytes(&self, jobs: Range<usize>) -> usize {
        64 + 8 * jobs.map(|job| self.len(job)).sum::<usize>()
    }
}

/// Losses of all queries of each example, and the rows of the largest pass.
///
/// Where queries begin behind a prefix, a job is a leaf, so that the prefix stays where it was made.
/// Otherwise it is a part of the directions, so that each is drawn once.
pub(super) fn losses<B: Backend, M: ForwardModel<B>>(
    p: &EstimateContext<'_, B, M>,
    of: &WeightNoise<B>,
) -> Result<(Vec<Vec<f64>>, usize), Error> {
    let (counts, leaves, before) = (p.allocation.counts(), p.stages.len(), p.stages.any().before(0));
    let asked = match before {
        0 => Asked::by_direction(counts, p.noise.sampling.group(), leaves),
        _ => Asked::by_leaf(counts, (0..leaves).map(|leaf| p.stages.range(leaf))),
    };
    let mut run = |jobs: &[usize], take: &mut (dyn FnMut(usize, DirectionLosses) + Send)| {
        let losses = losses_of(p, (of, before), &asked, jobs)?;
        check_failure(p.model)?;
        jobs.iter().zip(losses).for_each(|(&job, losses)| take(job, DirectionLosses(losses)));
        Ok(())
    };
    let found = p.rounds.gather((p.phases.0, &p.round_key(), leaves), &mut run, &asked)?;
    let mut losses: Vec<Vec<f64>> = counts.iter().map(|&a| vec![f64::NAN; a]).collect();
    for (directions, DirectionLosses(values)) in asked.0.iter().zip(found) {
        let rows = directions.iter().flat_map(|(query, examples)| examples.iter().map(move |&j| (j, *query)));
        rows.zip(values).for_each(|((j, query), value)| losses[j][query] = value);
    }
    let max_rows = p.rows(before);
    let largest = asked.0.iter().flatten().map(|(_, examples)| examples.len().min(max_rows)).max().unwrap_or(0);
    Ok((losses, largest))
}

/// The losses of these jobs. A direction that several of them ask is drawn once.
///
/// Behind a prefix passes are short, and drawing takes a good part of the time. There an antithetic
/// pair is drawn once, and its values are kept from one query to the other.
fn losses_of<B: Backend, M: ForwardModel<B>>(
    p: &EstimateContext<'_, B, M>,
    (of, before): (&WeightNoise<B>, usize),
    asked: &Asked,
    jobs: &[usize],
) -> Result<Vec<Vec<f64>>, Error> {
    let (noise, max_rows, step) = (&p.noise, p.rows(before), p.key);
    // where the examples of each job begin in its prefix
    let first = |&job: &usize| if before > 0 { p.stages.range(job).start } else { 0 };
    let firsts: Vec<usize> = jobs.iter().map(first).collect();
    let mut by_query = BTreeMap::<usize, Vec<(usize, &Vec<usize>)>>::new();
    for (index, &job) in jobs.iter().enumerate() {
        for (query, examples) in asked.0[job].iter().filter(|(_, examples)| !examples.is_empty()) {
            by_query.entry(*query).or_default().push((index, examples));
        }
    }
    let group = if before > 0 && !noise.on_device { noise.sampling.group() } else { 1 };
    let directions: Vec<_> = by_query.into_iter().collect();
    let groups: Vec<_> = directions.chunk_by(|(one, _), (next, _)| one / group == next / group).collect();
    let prefixes = jobs.iter().map(|&job| p.prefix(job, before)).collect::<Result<Vec<_>, Error>>()?;
    let weights = (of.clone(), of.packed(p.model));
    let context = (p.model.clone(), p.batch.input.clone(), p.target.clone(), prefixes, weights);
    type Context<I, T, M, B> = (M, I, T, Vec<Prefix>, (WeightNoise<B>, Option<Tensor<B, 1>>));
    let work = |(model, input, target, prefixes, (of, packed)): &Context<M::Input, M::Target, M, B>, group: usize| {
        let (mut drawn, mut values) = (Drawn::default(), vec![]);
        for (index, (query, parts)) in groups[group].iter().enumerate() {
            if index > 0 {
                drawn.negate();
            }
            let (key, query) = ([RowKey { position: SHARED, query: *query }], *query);
            let device = of.device.as_ref().filter(|_| noise.on_device);
            let mut numbers = device.map(|device| noise.device_noise(0, &key, device).with_total(of.drawn()));
            let packed = packed.clone().zip(numbers.as_mut()).map(|(values, numbers)| {
                let [len] = values.dims();
                noise::parts(numbers.add(values.reshape([1, len]), [1, len]).reshape([len]), of.packing.places())
            });
            let packed = packed.unwrap_or_default();
            let pair = (groups[group].len() > 1).then_some(&mut drawn);
            let perturbed = model.clone().map(&mut Perturb { noise, query, of, site: 0, packed, numbers, pair });
            for (index, examples) in parts {
                let mut of_part = vec![];
                for positions in examples.chunks(balanced_chunk(examples.len(), max_rows)) {
                    let of_leaf: Vec<usize> = positions.iter().map(|j| j - firsts[*index]).collect();
                    let prefix = prefixes[*index].rows(&of_leaf);
                    let mut probe = Probe::resume(prefix).with_examples(step.examples(positions));
                    let output = perturbed.forward(input.rows(positions), &mut probe);
                    of_part.push(rows::losses(&perturbed, output, target.rows(positions), positions.len())?);
                }
                values.push((*index, of_part));
            }
        }
        Ok(values)
    };
    let (mut found, mut of_jobs) = (vec![], vec![]);
    let out = |(model, input, target, prefixes, (of, packed)): Context<M::Input, M::Target, M, B>, to: DeviceId| {
        let prefixes = prefixes.into_iter().map(|prefix| prefix.on_device(to)).collect();
        let device = &B::Device::from_id(to);
        let weights = (of.on(device), packed.map(|packed| packed.to_device(device)));
        (model.to_device(device), input.to_device_of(to), target.to_device_of(to), prefixes, weights)
    };
    let back = |values: Vec<(usize, Vec<Tensor<B, 1>>)>, to: DeviceId| {
        let to = &B::Device::from_id(to);
        let of_part = |(index, parts): (usize, Vec<Tensor<B, 1>>)| {
            (index, parts.into_iter().map(|losses| losses.to_device(to)).collect())
        };
        values.into_iter().map(of_part).collect()
    };
    run_placed(groups.len(), &p.places, context, (out, back), work, |_, values| {
        for (index, parts) in values {
            for part in parts {
                of_jobs.push((index, part.dims()[0]));
                found.push(part);
            }
        }
    })?;
    let mut values = to_host(found).into_iter();
    let mut losses = vec![vec![]; jobs.len()];
    of_jobs.into_iter().for_each(|(index, rows)| losses[index].extend(values.by_ref().take(rows)));
    Ok(losses)
}

/// Gradients, and E‖ε‖² of each example: the number of perturbed parameters, as one site of them
/// all, whatever the subspace.
///
/// A leaf of the sum is a part of the directions.
pub(super) fn gradients<B: Backend, M: ForwardModel<B>>(
    p: &EstimateContext<'_, B, M>,
    of: &WeightNoise<B>,
    weights: &[Vec<f64>],
) -> Result<SpaceGradients<B>, Error> {
    let (queries, leaves) = (p.allocation.max(), p.stages.len());
    // the weight of a direction is the sum over the examples it was evaluated on
    let totals: Vec<f64> = (0..queries).map(|q| weights.iter().filter_map(|w| w.get(q)).sum()).collect();
    let keys: Vec<RowKey> = (0..queries).map(|query| RowKey { position: SHARED, query }).collect();
    let Some(device) = &of.device else { return Err(Error::NothingTrained) };
    let noise = &p.noise;
    let mut run = |leaves_here: &[usize], take: &mut (dyn FnMut(usize, LeafSum<B>) + Send)| {
        for &leaf in leaves_here {
            let directions = part(queries, noise.sampling.group(), leaves, leaf);
            let (keys, totals, count) = (&keys[directions.clone()], &totals[directions.clone()], directions.len());
            let all = 0..count;
            let (groups, mut gradients) = (std::slice::from_ref(&all), Gradients::default());
            if count == 0 {
                take(leaf, LeafSum::default());
                continue;
            }
            if noise.on_device {
                let mut sums = noise.device_scores(0, groups, keys, totals, count, device).with_total(of.drawn());
                let packed = match of.packing.len() {
                    0 => vec![],
                    len => noise::parts(sums.take(len).reshape([len]), of.packing.places()),
                };
                for (site, (id, lift)) in of.parameters.iter().enumerate() {
                    let drawn = match of.packing.place(site) {
                        Some(place) => packed[place].clone(),
                        None => sums.take(lift.drawn()).reshape([lift.drawn()]),
                    };
                    gradients.add_flat(*id, lift.apply(drawn));
                }
            } else {
                let sum = |(device, of): &(B::Device, WeightNoise<B>), site: usize| {
                    let (lift, len) = (&of.parameters[site].1, of.parameters[site].1.drawn());
                    let drawn = ops::from_host(noise.weighted_scores(site, groups, keys, totals, len), [len], device);
                    Ok(lift.apply(drawn))
                };
                let context = (device.clone(), of.clone());
                let add = |site: usize, g| gradients.add_flat(of.parameters[site].0, g);
                run_ordered(of.parameters.len(), p.places.threads, context, sum, add)?;
            }
            take(leaf, LeafSum { gradients, ..LeafSum::default() });
        }
        Ok(())
    };
    let sum = p.rounds.sum((p.phases.1, &p.round_key(), leaves, true), (&mut run, LeafSum::add), &p.sum_codec())?;
    let squared_score_norms = vec![vec![of.len() as f64]; weights.len()];
    Ok(SpaceGradients { squared_score_norms, ..SpaceGradients::new(0, sum) })
}

#[cfg(test)]
mod tests {
    use burn::module::Module;

    use super::*;
    use crate::estimator::{Estimator, Space, Subspace};
    use crate::noise::{NoiseLaw, Sampling, source};
    use crate::testing::pair::{case, pair};
    use crate::testing::weights;

    /// The second query of a pair has the bits that it has alone, for every law and subspace.
    #[test]
    fn a_pair_that_is_drawn_once_has_the_bits_of_its_queries() {
        let case = case(&pair(5, true), &[0]);
        for subspace in
            [Subspace::Full, Subspace::Random { rank: 1, period: 1 }, Subspace::Orthonormal { rank: 1, period: 2 }]
        {
            for law in [NoiseLaw::Gaussian, NoiseLaw::Rademacher, NoiseLaw::Uniform] {
                let space = Space::weights().with_subspace(subspace).unwrap();
                let estimator = Estimator { noise: law, sigma: 0.3, seed: 5, ..Estimator::new(space) };
                let of = WeightNoise::of(&case.model, &case.trained, (&estimator, subspace), 4, false);
                let noise = NoiseSource { sigma: 0.3, ..source(law, Sampling::Antithetic) };
                let perturbed = |query, pair: Option<&mut Drawn>| {
                    let mut perturb =
                        Perturb { noise: &noise, query, of: &of, site: 0, packed: vec![], numbers: None, pair };
                    weights(&case.model.clone().map(&mut perturb))
                };
                let mut drawn = Drawn::default();
                let [first, again] = [2, 3].map(|query| {
                    let values = perturbed(query, Some(&mut drawn));
                    drawn.negate();
                    values
                });
                assert_eq!([&first, &again], [&perturbed(2, None), &perturbed(3, None)], "{subspace} {law}");
                assert_ne!(first, again, "{subspace} {law}");
            }
        }
    }
}
