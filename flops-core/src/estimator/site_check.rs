//! Whether trained parameters act on the losses through their sites alone.
//!
//! Estimates in the activation and the low-rank space see what a parameter does to the output of
//! its layer, and nothing else. A table that is also multiplied in by hand, or a weight penalty in
//! the losses, would lose that part of its gradient. The check evaluates a few examples twice. The
//! first pass keeps the output of every site. In the second the trained parameters have other
//! values, and every site has its kept output. The losses must then be the same.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use burn::module::{ModuleMapper, Param, ParamId};
use burn::prelude::*;
use burn::tensor::FloatDType;

use super::clean::CleanPass;
use super::rows::check_failure;
use super::rows::{self, check_probe, check_sites};
use crate::batch::Rows;
use crate::error::Error;
use crate::model::ForwardModel;
use crate::ops;
use crate::ops::to_host;
use crate::parameters::{parameters, path, paths};
use crate::probe::{PassExamples, Probe, SiteOutputs};

/// Examples that the check evaluates at most.
const MOST_ROWS: usize = 8;
/// Losses of equal passes may differ on a device; how many times as much counts as a move.
const TIMES_REPEATED: f64 = 8.0;
/// What a parameter of zeros is moved by.
const FROM_ZERO: f32 = 0.1;

impl<B: Backend, M: ForwardModel<B>> CleanPass<'_, B, M> {
    /// Checks that every trained parameter acts on the losses through its sites alone, and that
    /// sites do not depend on the number of rows.
    ///
    /// It takes two passes of at most 8 examples, more where it finds something. In the first of
    /// them every [module](Probe::module) at a site is run under autodiff as well. Nothing is drawn
    /// from the noise, and no later result changes. A [learner](crate::ForwardLearner) calls it in
    /// its first step with a set of trained parameters, unless the model
    /// [asks it not to](ForwardModel::skips_site_check). In the weight space it passes at once.
    ///
    /// A use that the values of these examples hide is not found, such as one behind a branch that
    /// none of them takes.
    ///
    /// # Errors
    /// - [`Error::ActsOutsideSites`]: the losses move with parameters whose sites are held fixed.
    /// - [`Error::ModuleDiffers`]: a [module](Probe::module) is not the same under autodiff.
    /// - [`Error::RowShape`], [`Error::RowAxis`], [`Error::BareParameter`], [`Error::RowCount`]:
    ///   the first axis of a tensor is not its rows.
    /// - [`Error::SitesVary`]: other layers are called than in the clean pass.
    /// - [`Error::NothingTrained`], [`Error::NotSites`], [`Error::Model`].
    pub fn check_sites(&self) -> Result<(), Error> {
        let trained = self.reachable()?;
        if !self.estimator.space.is_independent() {
            return Ok(());
        }
        let index = rows_to_check(self.batch.ids.len(), self.largest_chunk());
        let (input, target) = (self.batch.input.rows(&index), self.batch.target.rows(&index));
        let examples = self.key().examples(&index);
        let by_layer = self.estimator.space.is_by_layer();
        let (model, trained, rows) = (self.model, &trained, index.len());
        let check = SiteCheck { model, input, target, examples, trained, rows, by_layer };
        let (clean, kept) = check.keep()?;
        check_sites(self.model, (&self.sites, self.largest_chunk()), (&kept.sites, index.len()))?;
        if let Some((parameter, difference)) = kept.mismatch {
            return Err(Error::ModuleDiffers { path: path::<B, M>(self.model, parameter), difference });
        }
        let check = PinnedCheck { check, kept };
        let moved = check.losses(trained)?;
        if !differ(&moved, &clean, 0.0) {
            return Ok(());
        }
        // the same pass again: a device may take another kernel, or sum in another order
        let again = check.losses(&HashSet::new())?;
        let tolerance =
            TIMES_REPEATED * clean.iter().zip(&again).fold(0.0, |most: f64, (a, b)| most.max((a - b).abs()));
        if !differ(&moved, &again, tolerance) {
            return Ok(());
        }
        let mut seen = HashSet::new();
        let order = parameters::<B, M>(self.model).into_iter().map(|p| p.id);
        let ids: Vec<ParamId> = order.filter(|id| trained.contains(id) && seen.insert(*id)).collect();
        let acting = check.acting(&ids, &again, tolerance)?;
        Err(Error::ActsOutsideSites { paths: paths::<B, M>(self.model, |id| acting.contains(&id)) })
    }

    /// Rows of the clean pass's largest forward pass.
    fn largest_chunk(&self) -> usize {
        self.cost.largest as usize
    }
}

/// The rows of a batch of `examples` that the check takes: at least two, and another number of them
/// than the clean pass had in a forward pass.
fn rows_to_check(examples: usize, chunk: usize) -> Vec<usize> {
    let rows = match examples.min(MOST_ROWS) {
        0 | 1 => 2,
        2 if chunk == 2 => 3,
        rows if rows == chunk => rows - 1,
        rows => rows,
    };
    (0..rows).map(|i| i % examples.max(1)).collect()
}

/// Whether losses differ by more than `tolerance`, or in being finite.
fn differ(a: &[f64], b: &[f64], tolerance: f64) -> bool {
    a.iter().zip(b).any(|(a, b)| match (a.is_nan(), b.is_nan()) {
        // the difference of two infinite losses of unlike sign is no number, or infinite
        (false, false) => a != b && ((a - b).is_nan() || (a - b).abs() > tolerance),
        (a, b) => a != b,
    })
}

/// A model, and the examples that it is checked on.
struct SiteCheck<'a, B: Backend, M: ForwardModel<B>> {
    model: &'a M,
    input: M::Input,
    target: M::Target,
    /// What keys the dropout masks, the same in both passes.
    examples: PassExamples,
    trained: &'a Arc<HashSet<ParamId>>,
    rows: usize,
    /// Whether the calls of a layer are one site.
    by_layer: bool,
}

impl<B: Backend, M: ForwardModel<B>> SiteCheck<'_, B, M> {
    /// The losses of a pass of `model`, with targets that it couples itself, and its probe.
    fn losses(&self, model: &M, probe: Probe<B>) -> Result<(Vec<f64>, Probe<B>), Error> {
        let mut probe = probe.with_examples(self.examples.clone());
        let output = model.forward(self.input.clone(), &mut probe);
        check_probe(self.model, &mut probe, self.rows)?;
        let target = model.couple(&output, &self.target).unwrap_or_else(|| self.target.clone());
        let losses = rows::losses(model, output, target, self.rows)?;
        check_failure(model)?;
        Ok((to_host(vec![losses]), probe))
    }

    /// The clean losses, and the outputs of the sites.
    fn keep(&self) -> Result<(Vec<f64>, SiteOutputs<B>), Error> {
        let probe =
            Probe::keep(self.trained.clone()).with_sites_by_layer(self.by_layer).with_row_check(self.rows, true);
        let (losses, probe) = self.losses(self.model, probe)?;
        Ok((losses, probe.kept()))
    }
}

/// The same with the outputs of the sites.
struct PinnedCheck<'a, B: Backend, M: ForwardModel<B>> {
    check: SiteCheck<'a, B, M>,
    kept: SiteOutputs<B>,
}

impl<B: Backend, M: ForwardModel<B>> PinnedCheck<'_, B, M> {
    /// The losses where these parameters have other values, and the sites their kept outputs.
    fn losses(&self, moved: &HashSet<ParamId>) -> Result<Vec<f64>, Error> {
        let SiteCheck { model, trained, .. } = &self.check;
        let probe = Probe::pinned((*trained).clone(), self.kept.clone());
        let model = (*model).clone().map(&mut Move { moved, numbers: HashMap::new() });
        Ok(self.check.losses(&model, probe)?.0)
    }

    /// Those of `ids` that the losses move with, by halves; all of them where neither half alone
    /// moves the losses, but both together do.
    fn acting(&self, ids: &[ParamId], clean: &[f64], tolerance: f64) -> Result<HashSet<ParamId>, Error> {
        if ids.len() <= 1 {
            return Ok(ids.iter().copied().collect());
        }
        let mut found = HashSet::new();
        let (first, second) = ids.split_at(ids.len() / 2);
        for half in [first, second] {
            if differ(&self.losses(&half.iter().copied().collect())?, clean, tolerance) {
                found.extend(self.acting(half, clean, tolerance)?);
            }
        }
        Ok(if found.is_empty() { ids.iter().copied().collect() } else { found })
    }
}

/// Gives parameters other values, each its own, as far away as the parameter is large.
struct Move<'a> {
    moved: &'a HashSet<ParamId>,
    /// The parameters met so far, by their number: ids are random, and one may be met twice.
    numbers: HashMap<ParamId, usize>,
}

impl<B: Backend> ModuleMapper<B> for Move<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        let next = self.numbers.len();
        let number = *self.numbers.entry(param.id).or_insert(next);
        if self.moved.contains(&param.id) { param.map(|value| moved(value, number)) } else { param }
    }
}

/// θ_i + 1.5·size·sin(1 + number + 0.7310586·i), with size the root mean square of θ.
///
/// It is formed where the parameter lies, and is neither a multiple of θ nor the same for all i:
/// what depends on a norm, or on differences, moves too.
fn moved<B: Backend, const D: usize>(value: Tensor<B, D>, number: usize) -> Tensor<B, D> {
    let (shape, dtype, device) = (value.dims(), value.dtype(), value.device());
    let len = shape.iter().product::<usize>();
    let flat: Tensor<B, 1> = value.reshape([len]).cast(ops::accum_dtype::<B>());
    let size = flat.clone().powi_scalar(2).mean().sqrt();
    let size = size.clone().mask_fill(size.equal_elem(0.0), FROM_ZERO);
    let wave = Tensor::<B, 1, Int>::arange(0..len as i64, &device).cast(FloatDType::F32).cast(ops::accum_dtype::<B>());
    let wave = (wave * 0.731_058_6 + (1 + number) as f64).sin() * 1.5;
    (flat + wave * size).reshape(shape).cast(dtype)
}

#[cfg(test)]
mod tests;
