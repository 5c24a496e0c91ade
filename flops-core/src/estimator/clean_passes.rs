//! The clean passes of the leaves, here and elsewhere.

use std::collections::HashSet;
use std::ops::Range;
use std::sync::Arc;

use burn::module::ParamId;
use burn::prelude::*;
use burn::tensor::backend::DeviceId;

use super::clean_leaf::{CleanCodec, CleanLeaf, CleanMemory, LeafMasks, LeafResult, LeafTrace};
use super::leaves;
use super::rounds::Rounds;
use super::rows::check_failure;
use super::rows::{self, check_probe, check_sites};
use super::settings::Estimator;
use crate::batch::{Batch, Rows};
use crate::error::Error;
use crate::executor::{ExecutorError, RoundPhase};
use crate::model::ForwardModel;
use crate::ops::to_host;
use crate::parallel::{Places, num_workers, run_placed};
use crate::probe::{Passes, Probe, Stages, StepKey, TokenMask, Traced, TracedSite};

/// What the passes of a leaf leave.
struct Chunks<B: Backend, O> {
    losses: Vec<Tensor<B, 1>>,
    outputs: Vec<O>,
    stages: Vec<Stages>,
    embeddings: Vec<Tensor<B, 2>>,
    reached: HashSet<ParamId>,
    /// Sites of each pass.
    sites: Vec<Vec<TracedSite>>,
    masks: Vec<(usize, Vec<Option<TokenMask<B>>>)>,
}

/// Cuts the examples of a leaf into passes.
pub(crate) type CutPasses<'a> = Box<dyn Fn(Range<usize>) -> Passes + 'a>;

/// What the clean passes of a step share.
pub(super) struct CleanLeaves<'a, B: Backend, M: ForwardModel<B>> {
    pub(super) estimator: &'a Estimator,
    pub(super) model: &'a M,
    pub(super) batch: &'a Batch<M::Input, M::Target>,
    pub(super) trained: &'a Arc<HashSet<ParamId>>,
    /// Keys the dropout masks.
    pub(super) step: u64,
    pub(super) cut: CutPasses<'a>,
    pub(super) devices: Vec<DeviceId>,
    pub(super) memory: CleanMemory,
}

impl<B: Backend, M: ForwardModel<B>> CleanLeaves<'_, B, M> {
    fn range(&self, leaf: usize) -> Range<usize> {
        leaves::leaf(self.batch.ids.len(), self.estimator.leaves, leaf)
    }

    /// Where passes run in this process.
    pub(super) fn places(&self) -> Places {
        let threads = num_workers(self.model, self.estimator.threads);
        Places { threads, devices: self.devices.clone() }
    }

    /// Runs the passes of these leaves, and hands on what each of them gives.
    fn run(
        &self,
        leaves: &[usize],
        take: &mut (dyn FnMut(usize, LeafResult<B, M::Output>) + Send),
    ) -> Result<(), Error> {
        let estimator = self.estimator;
        let (late, sites) = (estimator.is_single_site(), estimator.space.is_independent());
        let key = StepKey { seed: estimator.seed, step: self.step, ids: &self.batch.ids };
        let passes: Vec<(Range<usize>, Passes)> =
            leaves.iter().map(|&l| self.range(l)).map(|r| (r.clone(), (self.cut)(r))).collect();
        let jobs: Vec<(usize, usize)> = (0..leaves.len())
            .filter(|&l| !passes[l].0.is_empty())
            .flat_map(|l| (0..passes[l].1.len()).map(move |pass| (l, pass)))
            .collect();
        // the rows of each pass, by their positions in the batch
        let rows_of = |&(leaf, pass): &(usize, usize)| -> Vec<usize> {
            let (range, passes) = &passes[leaf];
            passes.rows(pass).iter().map(|row| range.start + row).collect()
        };
        let rows: Vec<Vec<usize>> = jobs.iter().map(rows_of).collect();
        let of_passes: Vec<Passes> = passes.iter().map(|(_, passes)| passes.clone()).collect();
        let context = (self.model.clone(), self.batch.input.clone(), self.batch.target.clone(), of_passes);
        let work = |(model, input, target, passes): &(M, M::Input, M::Target, Vec<Passes>), job: usize| {
            let (leaf, pass) = jobs[job];
            let index = &rows[job];
            let mut probe = Probe::trace(self.trained.clone(), passes[leaf].prefix(pass), late)
                .with_examples(key.examples(index))
                .with_sites_by_layer(estimator.space.is_by_layer())
                .with_row_check(index.len(), sites);
            let output = model.forward(input.rows(index), &mut probe);
            check_probe(model, &mut probe, index.len())?;
            let losses = rows::losses(model, output.clone(), target.rows(index), index.len())?;
            Ok((losses, output, probe.traced()))
        };
        let none = || Chunks {
            losses: vec![],
            outputs: vec![],
            stages: vec![],
            embeddings: vec![],
            reached: HashSet::new(),
            sites: vec![],
            masks: vec![],
        };
        let mut found: Vec<Chunks<B, M::Output>> = leaves.iter().map(|_| none()).collect();
        let places = self.places();
        let out = |(model, input, target, passes): (M, M::Input, M::Target, Vec<Passes>), to: DeviceId| {
            let passes = passes.into_iter().map(|passes| passes.on_device(to)).collect();
            (model.to_device(&B::Device::from_id(to)), input.to_device_of(to), target.to_device_of(to), passes)
        };
        let back = |(losses, output, traced): (Tensor<B, 1>, M::Output, Traced<B>), to: DeviceId| {
            (losses.to_device(&B::Device::from_id(to)), output.to_device_of(to), traced.on_device(to))
        };
        run_placed(jobs.len(), &places, context, (out, back), work, |job, (losses, output, traced)| {
            let chunks = &mut found[jobs[job].0];
            chunks.masks.push((rows[job].len(), traced.masks));
            chunks.losses.push(losses);
            chunks.reached = traced.reached;
            chunks.sites.push(traced.sites);
            chunks.outputs.push(output);
            chunks.stages.push(traced.stages);
            chunks.embeddings.extend(traced.embeddings);
        })?;
        check_failure(self.model)?;
        // a device is waited for once
        let losses = to_host(found.iter_mut().flat_map(|chunks| std::mem::take(&mut chunks.losses)).collect());
        let mut losses = losses.into_iter();
        for ((leaf, (range, passes)), chunks) in leaves.iter().zip(passes).zip(found) {
            let losses = losses.by_ref().take(range.len()).collect();
            take(*leaf, LeafResult::Read(Box::new(self.leaf(passes, losses, chunks)?)));
        }
        Ok(())
    }

    /// What a leaf gives, from its passes.
    fn leaf(
        &self,
        passes: Passes,
        losses: Vec<f64>,
        chunks: Chunks<B, M::Output>,
    ) -> Result<CleanLeaf<B, M::Output>, Error> {
        let Chunks { outputs, stages, embeddings, reached, mut sites, masks, .. } = chunks;
        let (Some(last), n) = (sites.pop(), passes.places().len()) else { return Ok(CleanLeaf::empty()) };
        if self.estimator.space.is_independent() {
            let last_rows = masks.last().map_or(0, |(rows, _)| *rows);
            for (other, (rows, _)) in sites.iter().zip(&masks) {
                check_sites(self.model, (other, *rows), (&last, last_rows))?;
            }
        }
        let got = embeddings.iter().map(|e| e.dims()[0]).sum();
        if got != n && !embeddings.is_empty() {
            return Err(Error::RowCount { what: "the embeddings", got, rows: n });
        }
        Ok(CleanLeaf {
            losses: passes.in_order(vec![losses]),
            output: Some(passes.in_order(outputs)),
            embeddings: (!embeddings.is_empty()).then(|| passes.in_order(embeddings)),
            coordinates: last.iter().map(|site| site.coordinates).collect(),
            largest: passes.largest(),
            here: Some(LeafTrace { stages: passes.stages(stages), reached, sites: last }),
            masks: LeafMasks::Passes(masks, passes),
        })
    }

    /// Runs one leaf here, whoever else did.
    fn run_here(&self, leaf: usize) -> Result<CleanLeaf<B, M::Output>, Error> {
        let mut found = None;
        self.run(&[leaf], &mut |_, result| found = Some(result))?;
        match found {
            Some(LeafResult::Read(leaf)) => Ok(*leaf),
            _ => Ok(CleanLeaf::empty()),
        }
    }

    /// The stages of a leaf that ran elsewhere.
    pub(super) fn stages(&self, leaf: usize) -> Result<Stages, Error> {
        Ok(self.run_here(leaf)?.here.map(|trace| trace.stages).unwrap_or_default())
    }

    /// The clean pass of every leaf, and the trace of an earlier one where none ran here.
    #[allow(clippy::type_complexity)]
    pub(super) fn all(&self, rounds: Rounds<'_>) -> Result<(Vec<CleanLeaf<B, M::Output>>, Option<LeafTrace>), Error> {
        let (estimator, n) = (self.estimator, self.batch.ids.len());
        let mut run =
            |leaves: &[usize], take: &mut (dyn FnMut(usize, LeafResult<B, M::Output>) + Send)| self.run(leaves, take);
        let key: Vec<u64> = [estimator.seed, self.step].into_iter().chain(self.batch.ids.iter().copied()).collect();
        // what does not travel is computed by every worker
        let rounds = if M::Output::TRAVELS { rounds } else { Rounds::local() };
        let codec = CleanCodec { examples: n, row_bytes: ROW_BYTES };
        let mut results = rounds.gather((RoundPhase::Clean, &key, estimator.leaves), &mut run, &codec)?;
        let is_here =
            |result: &LeafResult<B, M::Output>| matches!(result, LeafResult::Read(leaf) if leaf.here.is_some());
        let input = self.batch.input.row_shape();
        let earlier = match results.iter().any(is_here) {
            true => None,
            false => self.memory.like::<B, M::Output>((&input, self.trained)),
        };
        if earlier.is_none() && !results.iter().any(is_here) {
            let leaf = (0..estimator.leaves).find(|&leaf| !self.range(leaf).is_empty()).unwrap_or(0);
            results[leaf] = LeafResult::Read(Box::new(self.run_here(leaf)?));
        }
        let here = results.iter().find_map(|result| match result {
            LeafResult::Read(leaf) if leaf.here.is_some() => Some(&**leaf),
            _ => None,
        });
        if let Some(here) = here.filter(|_| rounds.are_shared()) {
            self.memory.keep((input, self.trained), here);
        }
        let Some(like) = here.or(earlier.as_ref()) else { return Err(Error::EmptyBatch) };
        let foreign = |leaf: usize| ExecutorError::Unsupported {
            what: format!("the clean pass of leaf {leaf} that another worker sent cannot be read"),
            remedy: "start all workers with the same program and the same data".into(),
        };
        let mut read = vec![];
        for (leaf, result) in results.iter().enumerate() {
            let LeafResult::Bytes(bytes) = result else {
                read.push(None);
                continue;
            };
            read.push(Some(like.read_like(self.range(leaf).len(), bytes).ok_or_else(|| foreign(leaf))?));
        }
        let leaves = results.into_iter().zip(read).filter_map(|(result, read)| match result {
            LeafResult::Read(leaf) => Some(*leaf),
            LeafResult::Bytes(_) => read,
        });
        Ok((leaves.collect(), earlier.and_then(|earlier| earlier.here)))
    }
}

/// Bytes of a row of output, embeddings and masks that another worker may send, at most: 16 MiB.
const ROW_BYTES: usize = 1 << 24;
