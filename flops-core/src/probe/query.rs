//! A perturbed pass: what falls on the output of each site.

use std::ops::Range;
use std::sync::Arc;

use burn::prelude::*;

use super::layer::Site;
use super::layout::Layout;
use super::low_rank;
use super::mask::TokenMask;
use super::rows::QueryRows;
use crate::control_variate::{PredictedRows, Prediction};
use crate::noise::{DeviceNoise, NoiseSource};
use crate::ops;

/// What a perturbed pass needs to know.
pub(crate) struct Query<B: Backend> {
    pub rows: Arc<QueryRows>,
    noise: NoiseSource,
    prediction: Option<Arc<Prediction>>,
    /// What the prediction expects of each row.
    predicted: PredictedRows,
    /// Rank of noise on weights; `None` for noise on outputs.
    pub rank: Option<usize>,
    /// Noise of the rows, made by their device; the sites take theirs in turn.
    device_noise: Option<DeviceNoise<B>>,
}

impl<B: Backend> Query<B> {
    pub fn new(
        rows: Arc<QueryRows>,
        noise: NoiseSource,
        prediction: Option<Arc<Prediction>>,
        rank: Option<usize>,
    ) -> Self {
        let (n, dim) = (rows.keys.len(), prediction.as_ref().map_or(0, |p| p.dim()));
        let predicted = PredictedRows { answers: vec![0.0; n * dim], explained: vec![0.0; n] };
        Self { rows, noise, prediction, predicted, rank, device_noise: None }
    }

    /// Whether any row is perturbed at site `index`.
    pub fn falls_on(&self, index: usize) -> bool {
        self.noise.falls_on(index, &self.rows.keys)
    }

    /// What the control variate predicts of each row.
    pub fn predicted(self) -> PredictedRows {
        self.predicted
    }

    /// The output `y` of site `index` under noise of low rank on the weights.
    pub fn perturb_weights<const D: usize>(
        &self,
        index: usize,
        y: Tensor<B, D>,
        site: &dyn Site<B>,
        (rank, mask): (usize, Option<&TokenMask<B>>),
    ) -> Tensor<B, D> {
        low_rank::perturb(y, site, (rank, mask), (index, &self.noise), &self.rows)
    }

    /// The output `y` of site `index`, plus σ·ε of each row; 0 at masked tokens.
    ///
    /// # Shapes
    /// - y: `[examples or rows, …]`; a bare parameter has one row for all, and noise is broadcast
    ///   onto it
    /// - returns: `[rows, …]`
    pub fn perturb_output<const D: usize>(
        &mut self,
        index: usize,
        y: Tensor<B, D>,
        mask: Option<&TokenMask<B>>,
        layout: Layout,
    ) -> Tensor<B, D> {
        let rows = self.rows.clone();
        let (mut shape, device) = (y.dims(), y.device());
        shape[0] = rows.keys.len();
        let y = rows.repeat(y);
        let len = shape[1..].iter().product();
        if self.noise.shares(&layout) {
            return self.perturb_groups(index, y, shape, mask, layout);
        }
        let seen_on_host = self.prediction.as_ref().is_some_and(|p| p.looks_at(index, len));
        if self.noise.on_device && !seen_on_host {
            let noise = &self.noise;
            let of_rows = || noise.device_noise(index, &rows.keys, &device);
            let buffer = noise.site_buffer(&mut self.device_noise, of_rows);
            return match mask {
                Some(mask) => ops::add_rounded(y, mask.apply(buffer.take(len)).reshape(shape)),
                None => buffer.add(y, shape),
            };
        }
        match mask {
            // a device is not waited for: the mask stays there, and predictions are masked already
            Some(mask) if !ops::is_host::<B>(&device) => {
                let mut values = vec![0f32; shape[0] * len];
                self.draw(index, len, None, &mut values);
                let values = mask.apply(ops::from_host(values, [shape[0], len], &device));
                ops::add_rounded(y, values.reshape(shape))
            }
            _ => ops::add_values(y, shape, |values| self.draw(index, len, mask, values)),
        }
    }

    /// The same, where tokens that are alike share their noise: the host draws it, in full rows.
    fn perturb_groups<const D: usize>(
        &mut self,
        index: usize,
        y: Tensor<B, D>,
        shape: [usize; D],
        mask: Option<&TokenMask<B>>,
        layout: Layout,
    ) -> Tensor<B, D> {
        let (n, shared, len, device) = (shape[0], layout.shared(), layout.len(), y.device());
        let mut noise = vec![0f32; n * shared];
        self.noise.perturb(index, &self.rows.keys, shared, |r, start, block| {
            noise[r * shared + start..][..block.len()].copy_from_slice(block);
        });
        for (row, noise) in noise.chunks_exact(shared.max(1)).enumerate() {
            self.expect(index, row, (true, noise));
        }
        if !ops::is_host::<B>(&device) {
            let noise = layout.expand(noise, n, &device);
            let noise = mask.map_or(noise.clone(), |mask| mask.apply(noise));
            return ops::add_rounded(y, noise.reshape(shape));
        }
        let real = mask.map(|mask| mask.of_rows(n));
        let tokens = real.as_ref().map_or(0, |real| real.len() / n.max(1));
        ops::add_values(y, shape, |values| {
            let rows = values.chunks_exact_mut(len.max(1)).zip(noise.chunks_exact(shared.max(1)));
            for (row, (values, noise)) in rows.enumerate() {
                layout.add_shared(noise, real.as_ref().map(|real| &real[row * tokens..(row + 1) * tokens]), values);
            }
        })
    }

    /// Notes what the prediction expects of a row.
    fn expect(&mut self, index: usize, row: usize, perturbation: (bool, &[f32])) {
        if let Some(prediction) = &self.prediction {
            let key = self.rows.keys[row];
            if self.noise.signed(index, &key).is_some() {
                prediction.expect(index, key.position as usize, perturbation, row, &mut self.predicted);
            }
        }
    }

    /// Adds σ·ε of each row to `values`, at real tokens, and notes what the control variate expects
    /// of it.
    fn draw(&mut self, index: usize, len: usize, mask: Option<&TokenMask<B>>, values: &mut [f32]) {
        let looks = self.prediction.as_ref().is_some_and(|p| p.looks_at(index, len) && p.expects(index));
        let mut seen = if looks { vec![0f32; values.len()] } else { vec![] };
        self.noise.perturb(index, &self.rows.keys, len, |r, start, noise| {
            let at = r * len + start;
            if looks {
                seen[at..at + noise.len()].copy_from_slice(noise);
            }
            let mut add = |run: Range<usize>| {
                let (at, noise) = (at + run.start, &noise[run]);
                values[at..].iter_mut().zip(noise).for_each(|(v, e)| *v += e);
            };
            match mask {
                Some(mask) => mask.real_runs(r, len, start, noise.len()).into_iter().for_each(add),
                None => add(0..noise.len()),
            }
        });
        for (row, noise) in seen.chunks_exact(len.max(1)).enumerate() {
            self.expect(index, row, (false, noise));
        }
    }
}
