//! A perturbed pass: what falls on the output of each site.

use std::ops::Range;
use std::sync::Arc;

use burn::prelude::*;

use super::layer::Site;
use super::low_rank;
use super::mask::TokenMask;
use super::rows::QueryRows;
use crate::control_variate::Prediction;
use crate::noise::{DeviceNoise, NoiseSource};
use crate::ops;

/// What a perturbed pass needs to know.
pub(crate) struct Query<B: Backend> {
    pub rows: Arc<QueryRows>,
    noise: NoiseSource,
    prediction: Option<Arc<Prediction>>,
    /// The part of each row's loss that the prediction explains.
    explained: Vec<f64>,
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
        let explained = vec![0.0; rows.keys.len()];
        Self { rows, noise, prediction, explained, rank, device_noise: None }
    }

    /// Whether any row is perturbed at site `index`.
    pub fn falls_on(&self, index: usize) -> bool {
        self.noise.falls_on(index, &self.rows.keys)
    }

    /// The part of each row's loss that the control variate predicts.
    pub fn explained(self) -> Vec<f64> {
        self.explained
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
    ) -> Tensor<B, D> {
        let rows = self.rows.clone();
        let (mut shape, device) = (y.dims(), y.device());
        shape[0] = rows.keys.len();
        let y = rows.repeat(y);
        let len = shape[1..].iter().product();
        let seen_on_host = self.prediction.as_ref().is_some_and(|p| p.looks_at(len));
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

    /// Adds σ·ε of each row to `values`, at real tokens, and notes what the control variate
    /// explains of it.
    fn draw(&mut self, index: usize, len: usize, mask: Option<&TokenMask<B>>, values: &mut [f32]) {
        let (rows, prediction, explained) = (&self.rows, &self.prediction, &mut self.explained);
        self.noise.perturb(index, &rows.keys, len, |r, start, noise| {
            let mut add = |run: Range<usize>| {
                let (start, noise) = (start + run.start, &noise[run]);
                values[r * len + start..].iter_mut().zip(noise).for_each(|(v, e)| *v += e);
                if let Some(prediction) = prediction {
                    explained[r] += prediction.subtract(index, rows.keys[r].position as usize, len, start, noise);
                }
            };
            match mask {
                Some(mask) => mask.real_runs(r, len, start, noise.len()).into_iter().for_each(add),
                None => add(0..noise.len()),
            }
        });
    }
}
