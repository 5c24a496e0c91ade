//! What a leaf gives to the update, summed over the leaves, and how it travels.

use std::cell::LazyCell;
use std::ops::Range;

use burn::module::ParamId;
use burn::prelude::*;
use burn::tensor::TensorData;

use super::leaves::leaf;
use super::rounds::Codec;
use crate::control_variate::{Observation, Prediction};
use crate::ops::{self, to_host};
use crate::probe::{Gradients, SquaredScoreNorm};
use crate::wire::{Reader, Writer};

/// Gradients of some leaves, and what goes with them.
pub(super) struct LeafSum<B: Backend> {
    pub gradients: Gradients<B>,
    /// Norms of the examples that ran here, by job: their positions, and the norm at each site.
    pub jobs: Vec<(Vec<usize>, Vec<SquaredScoreNorm<B>>)>,
    /// Norms of examples that ran elsewhere, by their positions.
    pub norms: Vec<(usize, Vec<f64>)>,
    /// What the estimates show of the prediction.
    pub observed: Option<Observation>,
    /// Rows recorded.
    pub recorded: u64,
}

impl<B: Backend> Default for LeafSum<B> {
    fn default() -> Self {
        Self { gradients: Gradients::default(), jobs: vec![], norms: vec![], observed: None, recorded: 0 }
    }
}

impl<B: Backend> LeafSum<B> {
    /// The sum of neighbours.
    pub fn add(mut self, right: Self) -> Self {
        self.gradients.merge(right.gradients);
        self.jobs.extend(right.jobs);
        self.norms.extend(right.norms);
        self.observe(right.observed);
        self.recorded += right.recorded;
        self
    }

    /// Adds what further queries show.
    pub fn observe(&mut self, seen: Option<Observation>) {
        match (&mut self.observed, seen) {
            (Some(observed), Some(seen)) => observed.merge(seen),
            (observed, Some(seen)) => *observed = Some(seen),
            (_, None) => {}
        }
    }

    /// The norms of its examples at each site, by their positions; a device is waited for once.
    pub fn norms(&self) -> Vec<(usize, Vec<f64>)> {
        let of_sites = self.jobs.iter().flat_map(|(_, norms)| norms);
        let squares = of_sites.filter_map(|norm| norm.squares.clone().map(|s| s.squeeze_dim(1))).collect();
        let mut squares = to_host(squares).into_iter();
        let mut all = vec![];
        for (positions, of_sites) in &self.jobs {
            let first = all.len();
            all.extend(positions.iter().map(|&position| (position, vec![])));
            for norm in of_sites {
                for (_, norms) in &mut all[first..] {
                    let square = norm.squares.as_ref().and_then(|_| squares.next()).unwrap_or(0.0);
                    norms.push(norm.constant + norm.factor * square);
                }
            }
        }
        all.extend(self.norms.iter().cloned());
        all
    }
}

/// Found when it is asked for.
pub(super) type Lazy<'a, T> = LazyCell<T, Box<dyn FnOnce() -> T + 'a>>;

/// Sends sums. Parameters go by the order in which the model is visited: their ids differ from process
/// to process.
pub(super) struct SumCodec<'a, B: Backend> {
    /// Parameters whose gradient is estimated, with their elements; found when a sum travels.
    pub parameters: Lazy<'a, Vec<(ParamId, usize)>>,
    pub device: B::Device,
    pub prediction: Option<&'a Prediction>,
    /// Examples of the batch, and its leaves.
    pub examples: usize,
    pub leaves: usize,
    /// Sites of the step.
    pub sites: usize,
}

impl<B: Backend> SumCodec<'_, B> {
    fn examples_of(&self, leaves: Range<usize>) -> Range<usize> {
        leaf(self.examples, self.leaves, leaves.start).start..leaf(self.examples, self.leaves, leaves.end - 1).end
    }
}

impl<B: Backend> Codec<LeafSum<B>> for SumCodec<'_, B> {
    fn write(&self, sum: &LeafSum<B>, writer: &mut Writer) {
        for (id, _) in self.parameters.iter() {
            let gradient = sum.gradients.get(*id);
            writer.number(gradient.iter().len());
            gradient.iter().for_each(|g| writer.tensor(&g.to_data()));
        }
        let norms = sum.norms();
        writer.number(norms.len());
        for (position, norms) in &norms {
            writer.number(*position);
            writer.doubles(norms);
        }
        writer.number(sum.observed.iter().len());
        sum.observed.iter().for_each(|observed| observed.write(writer));
        writer.number(sum.recorded as usize);
    }

    fn read(&self, jobs: Range<usize>, reader: &mut Reader<'_>) -> Option<LeafSum<B>> {
        let mut sum = LeafSum::default();
        let dtype = ops::accum_dtype::<B>();
        let like = TensorData::from_bytes_vec(vec![], [0], dtype);
        for &(id, elements) in self.parameters.iter() {
            if reader.number().filter(|&n| n < 2)? == 1 {
                let data = reader.tensor(&like).filter(|data| data.shape[0] == elements)?;
                sum.gradients.add_flat(id, Tensor::from_data(data, (&self.device, dtype)));
            }
        }
        let examples = self.examples_of(jobs);
        let count = reader.number().filter(|&n| n <= examples.len())?;
        for _ in 0..count {
            let position = reader.number().filter(|position| examples.contains(position))?;
            sum.norms.push((position, reader.doubles().filter(|norms| norms.len() <= self.sites)?));
        }
        if reader.number().filter(|&n| n < 2)? == 1 {
            sum.observed = Some(self.prediction?.read_observation(reader)?);
        }
        sum.recorded = reader.number()? as u64;
        Some(sum)
    }

    fn max_bytes(&self, jobs: Range<usize>) -> usize {
        let gradients: usize = self.parameters.iter().map(|(_, elements)| 64 + 8 * elements).sum();
        let norms = self.examples_of(jobs).len() * (64 + 8 * self.sites);
        1024 + gradients + norms + self.prediction.map_or(0, Prediction::observation_bytes)
    }
}
