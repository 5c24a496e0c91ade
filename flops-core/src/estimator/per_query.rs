//! Passes of noise that is independent for every query of every example.
//!
//! The activation and the low-rank space share how the queries of a batch are cut into chunks, and
//! how the update is cut into jobs. They differ in what a site does with the noise.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

use burn::prelude::*;
use burn::tensor::backend::DeviceId;

use super::context::{EstimateContext, SpaceGradients};
use super::leaf_sum::LeafSum;
use super::leaves::leaf;
use super::query_weights::WeightedQueries;
use super::rounds::Codec;
use super::rows::losses as row_losses;
use super::rows::{check_expected, check_failure};
use crate::batch::Rows;
use crate::control_variate::{Observation, PredictedRows};
use crate::error::Error;
use crate::model::ForwardModel;
use crate::noise::NoiseSource;
use crate::ops;
use crate::parallel::{balanced_chunk, run_placed};
use crate::probe::{Gradients, Prefix, Probe, Query, QueryRows, Recorded, SquaredScoreNorm, Stages};
use crate::wire::{Reader, Writer};

/// Queries that begin behind the same stages.
struct Start {
    /// How many stages they skip.
    stages: usize,
    /// The queries of each example of the batch.
    queries: Vec<Vec<usize>>,
}

/// Queries by where they begin.
///
/// That is behind the last stage before the site of their noise, or before the first site where all
/// are perturbed.
fn starts(noise: &NoiseSource, stages: &Stages, counts: &[usize]) -> Vec<Start> {
    let mut starts = BTreeMap::<usize, Vec<Vec<usize>>>::new();
    for (j, &count) in counts.iter().enumerate() {
        for query in 0..count {
            let (direction, _) = noise.sampling.direction(query);
            let start = stages.before(noise.chosen(j as u64, direction).unwrap_or(0));
            starts.entry(start).or_insert_with(|| vec![vec![]; counts.len()])[j].push(query);
        }
    }
    starts.into_iter().map(|(stages, queries)| Start { stages, queries }).collect()
}

/// Passes that queries which begin apart share at least.
const LEAST_PASSES: usize = 4;

/// The same queries in few passes, with nearly as many in each.
///
/// Those of a pass all begin where the first of them does: what waits for launches takes a few layers more
/// of some queries for fewer passes. There are at least [`LEAST_PASSES`], so that these layers are no more
/// than a quarter of all. No more places to begin than that are left as they are.
fn joined(starts: Vec<Start>, max_rows: usize, group: usize) -> Vec<Start> {
    if starts.len() <= LEAST_PASSES {
        return starts;
    }
    let examples = starts[0].queries.len();
    let of_start = |start: Start| {
        let stages = start.stages;
        let pairs =
            start.queries.into_iter().enumerate().flat_map(|(j, queries)| queries.into_iter().map(move |q| (j, q)));
        pairs.map(move |(j, query)| (stages, j, query)).collect::<Vec<_>>()
    };
    let all: Vec<(usize, usize, usize)> = starts.into_iter().flat_map(of_start).collect();
    let whole = (max_rows / group * group).max(1);
    let passes = LEAST_PASSES.max(all.len().div_ceil(whole));
    let rows = all.len().div_ceil(passes).next_multiple_of(group).max(1);
    let of_pass = |pass: &[(usize, usize, usize)]| {
        let mut queries = vec![vec![]; examples];
        pass.iter().for_each(|&(_, j, query)| queries[j].push(query));
        Start { stages: pass[0].0, queries }
    };
    all.chunks(rows).map(of_pass).collect()
}

/// The examples of a chunk, and the range of their queries, in the order of a [`Start`], that it
/// evaluates.
struct Chunk {
    positions: Vec<usize>,
    ranges: Vec<Range<usize>>,
}

/// Chunks of at most `max_rows` rows, nearly equal ones.
///
/// A device tunes its kernels to the size of a pass, and threads wait for the last one. With `split` there
/// are as few as can be: the queries of an example may lie in two of them, which then both run what comes
/// before its noise.
fn chunks(counts: &[usize], max_rows: usize, group: usize, split: bool) -> Vec<Chunk> {
    let fewest = fill(counts, max_rows, group, (1, split));
    let count = fewest.len().max(1);
    let share = counts.iter().sum::<usize>().div_ceil(count).next_multiple_of(group).min(max_rows);
    let (rows, parts) = if split { (share, 1) } else { (max_rows, count) };
    let equal = fill(counts, rows, group, (parts, split));
    if equal.len() > fewest.len() { fewest } else { equal }
}

/// Chunks of at most `max_rows` rows and about 1/`parts` of all.
///
/// Examples of similar counts lie together; directions stay whole, and examples where they fit, unless
/// they are to be split.
fn fill(counts: &[usize], max_rows: usize, group: usize, (parts, split): (usize, bool)) -> Vec<Chunk> {
    let mut order: Vec<usize> = (0..counts.len()).collect();
    order.sort_by_key(|&j| std::cmp::Reverse(counts[j]));
    let (total, mut done) = (counts.iter().sum::<usize>(), 0);
    let (mut chunks, mut room) = (Vec::<Chunk>::new(), 0);
    for j in order {
        // further from the share with the example than without it
        if !split && 2 * chunks.len() * total < parts * (2 * done + counts[j]) {
            room = 0;
        }
        let mut from = 0;
        while from < counts[j] {
            let left = counts[j] - from;
            // what is left of the example, or as many whole directions as fit
            let fits = if left <= room { left } else { room / group * group };
            if fits == 0 || (!split && fits < left && left <= max_rows) {
                chunks.push(Chunk { positions: vec![], ranges: vec![] });
                room = max_rows;
                continue;
            }
            if let Some(chunk) = chunks.last_mut() {
                chunk.positions.push(j);
                chunk.ranges.push(from..from + fits);
            }
            from += fits;
            room -= fits;
            done += fits;
        }
    }
    chunks
}

/// What the queries of each example answered.
#[derive(Default)]
pub(super) struct Answers {
    /// The losses.
    pub losses: Vec<Vec<f64>>,
    /// What the control variate explains of them.
    pub explained: Vec<Vec<f64>>,
    /// What they show beyond the prediction, `[queries, signals]` of each example.
    pub innovations: Vec<Vec<f32>>,
    /// Rows of the largest pass.
    pub rows: usize,
}

impl Answers {
    /// Of queries that are still to be asked.
    fn of(counts: &[usize], dim: usize) -> Self {
        Self {
            losses: counts.iter().map(|&a| vec![f64::NAN; a]).collect(),
            explained: counts.iter().map(|&a| vec![0.0; a]).collect(),
            innovations: counts.iter().map(|&a| vec![0.0; a * dim]).collect(),
            rows: 0,
        }
    }

    /// These and those of the examples behind them.
    fn and(mut self, right: Self) -> Self {
        self.losses.extend(right.losses);
        self.explained.extend(right.explained);
        self.innovations.extend(right.innovations);
        self.rows = self.rows.max(right.rows);
        self
    }
}

/// Sends the answers of leaves whose examples have so many queries.
struct AnswerCodec<'a> {
    counts: &'a [usize],
    leaves: usize,
    dim: usize,
}

impl Codec<Answers> for AnswerCodec<'_> {
    fn write(&self, answers: &Answers, writer: &mut Writer) {
        writer.doubles(&answers.losses.concat());
        writer.doubles(&answers.explained.concat());
        writer.singles(&answers.innovations.concat());
        writer.number(answers.rows);
    }

    fn read(&self, jobs: Range<usize>, reader: &mut Reader<'_>) -> Option<Answers> {
        let counts = &self.counts[leaf(self.counts.len(), self.leaves, jobs.start)];
        let total: usize = counts.iter().sum();
        let mut losses = reader.doubles().filter(|v| v.len() == total)?.into_iter();
        let mut explained = reader.doubles().filter(|v| v.len() == total)?.into_iter();
        let mut innovations = reader.singles().filter(|v| v.len() == total * self.dim)?.into_iter();
        Some(Answers {
            losses: counts.iter().map(|&a| losses.by_ref().take(a).collect()).collect(),
            explained: counts.iter().map(|&a| explained.by_ref().take(a).collect()).collect(),
            innovations: counts.iter().map(|&a| innovations.by_ref().take(a * self.dim).collect()).collect(),
            rows: reader.number()?,
        })
    }

    fn max_bytes(&self, jobs: Range<usize>) -> usize {
        let counts = &self.counts[leaf(self.counts.len(), self.leaves, jobs.start)];
        64 + counts.iter().sum::<usize>() * (16 + 4 * self.dim)
    }
}

/// The answers of all queries of each example. `rank` is that of noise on weights.
pub(super) fn losses<B: Backend, M: ForwardModel<B>>(
    p: &EstimateContext<'_, B, M>,
    rank: Option<usize>,
) -> Result<Answers, Error> {
    let (counts, leaves) = (p.allocation.counts(), p.stages.len());
    let codec = AnswerCodec { counts, leaves, dim: p.prediction.map_or(0, |p| p.dim()) };
    let mut run = |leaves: &[usize], take: &mut (dyn FnMut(usize, Answers) + Send)| {
        let answers = losses_of(p, rank, leaves)?;
        check_failure(p.model)?;
        leaves.iter().zip(answers).for_each(|(&leaf, answers)| take(leaf, answers));
        Ok(())
    };
    let answers = p.rounds.gather((p.phases.0, &p.round_key(), leaves), &mut run, &codec)?;
    Ok(answers.into_iter().reduce(Answers::and).unwrap_or_default())
}

/// The answers of the examples of these leaves, leaf by leaf.
fn losses_of<B: Backend, M: ForwardModel<B>>(
    p: &EstimateContext<'_, B, M>,
    rank: Option<usize>,
    leaves: &[usize],
) -> Result<Vec<Answers>, Error> {
    let (counts, noise, prediction) = (p.allocation.counts(), &p.noise, p.prediction);
    let dim = prediction.map_or(0, |p| p.dim());
    let mut answers: Vec<Answers> =
        leaves.iter().map(|&leaf| Answers::of(&counts[p.stages.range(leaf)], dim)).collect();
    // where the queries of each leaf begin, and its chunks
    let (mut starts_of, mut jobs) = (vec![], vec![]);
    for (index, &leaf) in leaves.iter().enumerate() {
        let range = p.stages.range(leaf);
        let of_leaf = |j: usize| if range.contains(&j) { counts[j] } else { 0 };
        let of_leaf: Vec<usize> = (0..counts.len()).map(of_leaf).collect();
        let mut starts = starts(noise, p.stages.any(), &of_leaf);
        if !p.on_host {
            starts = joined(starts, p.max_rows, noise.sampling.group());
        }
        for (i, start) in starts.iter().enumerate() {
            let counts: Vec<usize> = start.queries.iter().map(Vec::len).collect();
            let chunks = chunks(&counts, p.rows(start.stages), noise.sampling.group(), !p.on_host);
            jobs.extend(chunks.into_iter().map(|chunk| (index, i, chunk)));
        }
        starts_of.push(starts);
    }
    let queries = |job: usize| {
        let (index, start, chunk) = &jobs[job];
        let queries = &starts_of[*index][*start].queries;
        chunk.positions.iter().zip(&chunk.ranges).map(|(&j, range)| &queries[j][range.clone()])
    };
    let (trained, key, sites) = (p.trained.clone(), p.key, &p.sites);
    // by the stages that they stand for: several passes begin behind the same
    let prefixes_of = |(&leaf, starts): (&usize, &Vec<Start>)| -> Result<BTreeMap<usize, Prefix>, Error> {
        let stages: BTreeSet<usize> = starts.iter().map(|start| start.stages).collect();
        stages.into_iter().map(|stages| Ok((stages, p.prefix(leaf, stages)?))).collect()
    };
    let prefixes = leaves.iter().zip(&starts_of).map(prefixes_of).collect::<Result<Vec<_>, Error>>()?;
    let context = (p.model.clone(), p.batch.input.clone(), p.target.clone(), prefixes);
    let firsts: Vec<usize> = leaves.iter().map(|&leaf| p.stages.range(leaf).start).collect();
    type Context<I, T, M> = (M, I, T, Vec<BTreeMap<usize, Prefix>>);
    let work = |(model, input, target, prefixes): &Context<M::Input, M::Target, M>, job: usize| {
        let (index, start, Chunk { positions, .. }) = &jobs[job];
        let of_leaf: Vec<usize> = positions.iter().map(|j| j - firsts[*index]).collect();
        let rows = Arc::new(QueryRows::new(positions, queries(job).map(|q| q.iter().copied())));
        let of_rows: Vec<usize> = rows.datum.iter().map(|&i| positions[i]).collect();
        let query = Query::new(rows.clone(), noise.clone(), prediction.cloned(), rank);
        let mut probe =
            Probe::query(trained.clone(), prefixes[*index][&starts_of[*index][*start].stages].rows(&of_leaf), query)
                .with_examples(key.examples(positions))
                .with_expected(sites.clone());
        let mut output = model.forward(input.rows(positions), &mut probe);
        check_expected(model, sites, &probe)?;
        // what no noise reaches, as where a layer's output is not used, has a row per example
        if output.check_rows(rows.len()).is_err() && output.check_rows(positions.len()).is_ok() {
            output = output.rows(&rows.datum);
        }
        let target = target.rows(&of_rows);
        let outputs = match prediction.filter(|p| p.sees_outputs()) {
            Some(prediction) => {
                model.signal_outputs(&output, &target).filter(|o| o.dims()[0] == rows.len()).map(|outputs| {
                    let outputs = prediction.along_signals(outputs);
                    let values = outputs.dims().iter().product::<usize>();
                    outputs.reshape([values])
                })
            }
            None => None,
        };
        Ok((row_losses(model, output, target, rows.len())?, outputs, probe.predicted()))
    };
    let (mut found, mut outputs, mut predicted) = (Vec::with_capacity(jobs.len()), vec![], PredictedRows::default());
    let out = |(model, input, target, prefixes): Context<M::Input, M::Target, M>, to: DeviceId| {
        let moved = |(stages, prefix): (usize, Prefix)| (stages, prefix.on_device(to));
        let of_leaf = |prefixes: BTreeMap<usize, Prefix>| prefixes.into_iter().map(moved).collect();
        let prefixes = prefixes.into_iter().map(of_leaf).collect();
        (model.to_device(&B::Device::from_id(to)), input.to_device_of(to), target.to_device_of(to), prefixes)
    };
    let back = |(losses, outputs, rows): (Tensor<B, 1>, Option<Tensor<B, 1>>, PredictedRows), to: DeviceId| {
        let to = &B::Device::from_id(to);
        (losses.to_device(to), outputs.map(|outputs| outputs.to_device(to)), rows)
    };
    run_placed(jobs.len(), &p.places, context, (out, back), work, |_, (losses, of_rows, rows)| {
        found.push(losses);
        outputs.extend(of_rows);
        predicted.answers.extend(rows.answers);
        predicted.explained.extend(rows.explained);
    })?;
    let [values, outputs] = ops::all_to_host([ops::joined(found), ops::joined(outputs)]).map(Option::unwrap_or_default);
    let outputs: Vec<f32> = outputs.into_iter().map(|o| o as f32).collect();
    let outputs = (outputs.len() == values.len() * dim).then_some(outputs);
    let mut row = 0;
    for (job, (index, _, chunk)) in jobs.iter().enumerate() {
        let (first, of_leaf) = (firsts[*index], &mut answers[*index]);
        of_leaf.rows = of_leaf.rows.max(chunk.ranges.iter().map(Range::len).sum());
        for (&j, queries) in chunk.positions.iter().zip(queries(job)) {
            for &query in queries {
                of_leaf.losses[j - first][query] = values[row];
                of_leaf.explained[j - first][query] = predicted.explained[row];
                if let Some(prediction) = prediction.filter(|_| dim > 0) {
                    let of_row = row * dim..(row + 1) * dim;
                    let (expected, outputs) =
                        (&predicted.answers[of_row.clone()], outputs.as_ref().map(|o| &o[of_row]));
                    let change = values[row] - p.losses[j];
                    let shown = prediction.innovation(j, expected, outputs, change, noise.sigma);
                    of_leaf.innovations[j - first][query * dim..(query + 1) * dim].copy_from_slice(&shown);
                }
                row += 1;
            }
        }
    }
    Ok(answers)
}

/// A job of the update pass: some examples with all their queries.
pub(super) struct Job<'a> {
    /// Where the examples lie in the batch.
    pub positions: &'a [usize],
    pub rows: QueryRows,
    /// Weights of the rows.
    pub weights: Vec<f64>,
    /// Weight of each example in the mean: 1/B, or 0 where none of its queries survived.
    pub shares: Vec<f64>,
}

/// Records the sites of examples, named by their positions.
pub(super) type Record<'a, B> = dyn Fn(&[usize]) -> Result<Vec<Recorded<B>>, Error> + 'a;

/// What a job gives.
pub(super) struct JobGradients<B: Backend> {
    pub gradients: Gradients<B>,
    /// Of each site, for the examples of the job.
    pub squared_score_norms: Vec<SquaredScoreNorm<B>>,
    pub observed: Option<Observation>,
    /// Rows recorded.
    pub recorded: usize,
}

impl<B: Backend> JobGradients<B> {
    fn on(self, device: &B::Device) -> Self {
        let to = |norm: SquaredScoreNorm<B>| SquaredScoreNorm {
            squares: norm.squares.map(|squares| squares.to_device(device)),
            ..norm
        };
        let squared_score_norms = self.squared_score_norms.into_iter().map(to).collect();
        Self { gradients: self.gradients.on(device), squared_score_norms, ..self }
    }
}

/// Gradients by jobs: `form` makes those of a job from its recorded sites.
///
/// It is handed a function that records the sites of examples, named by their positions.
pub(super) fn gradients<B: Backend, M: ForwardModel<B>>(
    p: &EstimateContext<'_, B, M>,
    weighted: &WeightedQueries,
    form: impl Fn(&Job<'_>, &Record<'_, B>) -> Result<JobGradients<B>, Error> + Sync,
) -> Result<SpaceGradients<B>, Error> {
    let (n, leaves) = (weighted.weights.len(), p.stages.len());
    let mut run = |leaves: &[usize], take: &mut (dyn FnMut(usize, LeafSum<B>) + Send)| {
        gradients_of(p, weighted, &form, (leaves, take))
    };
    // behind a prefix, only the worker that has it need not run it again
    let repeats = p.stages.any().before(0) == 0;
    let sum = p.rounds.sum((p.phases.1, &p.round_key(), leaves, repeats), (&mut run, LeafSum::add), &p.sum_codec())?;
    Ok(SpaceGradients::new(n, sum))
}

/// Forms the gradients of these leaves, and hands on each as soon as it is whole.
fn gradients_of<B: Backend, M: ForwardModel<B>>(
    p: &EstimateContext<'_, B, M>,
    WeightedQueries { weights, survived, .. }: &WeightedQueries,
    form: &(impl Fn(&Job<'_>, &Record<'_, B>) -> Result<JobGradients<B>, Error> + Sync),
    (leaves, take): (&[usize], &mut (dyn FnMut(usize, LeafSum<B>) + Send)),
) -> Result<(), Error> {
    let n = weights.len();
    // a shrunk estimate compares halves of a job
    let least = if p.prediction.is_some_and(|p| p.measures()) { 2 } else { 1 };
    let before = p.stages.any().before(0);
    let most = p.recorded_rows(before).max(least);
    // the examples of each job, and how many jobs of each leaf are still to come
    let (mut jobs, mut left) = (vec![], vec![]);
    for (index, &leaf) in leaves.iter().enumerate() {
        // a device sums directions side by side, as many for each example; jobs find their examples
        // by this order
        let mut order: Vec<usize> = p.stages.range(leaf).collect();
        if p.noise.on_device {
            order.sort_by_key(|&j| std::cmp::Reverse(weights[j].len()));
        }
        let width = balanced_chunk(order.len(), most);
        let of_leaf: Vec<(usize, Vec<usize>)> = order.chunks(width).map(|chunk| (index, chunk.to_vec())).collect();
        left.push(of_leaf.len());
        jobs.extend(of_leaf);
        if order.is_empty() {
            take(leaf, LeafSum::default());
        }
    }
    let (trained, key, sites) = (p.trained.clone(), p.key, &p.sites);
    let prefixes = leaves.iter().map(|&leaf| p.prefix(leaf, before)).collect::<Result<Vec<_>, Error>>()?;
    let firsts: Vec<usize> = leaves.iter().map(|&leaf| p.stages.range(leaf).start).collect();
    let context = (p.model.clone(), p.batch.input.clone(), prefixes);
    let work = |(model, input, prefixes): &(M, M::Input, Vec<Prefix>), job: usize| {
        let (index, positions) = &jobs[job];
        let job = Job {
            positions,
            rows: QueryRows::new(positions, positions.iter().map(|&j| 0..weights[j].len())),
            weights: positions.iter().flat_map(|&j| weights[j].iter().copied()).collect(),
            shares: positions.iter().map(|&j| if survived[j] > 0 { 1.0 / n as f64 } else { 0.0 }).collect(),
        };
        let record = |positions: &[usize]| {
            let of_leaf: Vec<usize> = positions.iter().map(|j| j - firsts[*index]).collect();
            let mut probe = Probe::record(trained.clone(), prefixes[*index].rows(&of_leaf))
                .with_examples(key.examples(positions))
                .with_expected(sites.clone());
            model.forward(input.rows(positions), &mut probe);
            check_expected(model, sites, &probe)?;
            Ok(probe.recorded())
        };
        let mut formed = form(&job, &record)?;
        formed.gradients.retain(&trained); // a site may add those of frozen parameters
        Ok(formed)
    };
    let mut sum = LeafSum::default();
    let out = |(model, input, prefixes): (M, M::Input, Vec<Prefix>), to: DeviceId| {
        let prefixes = prefixes.into_iter().map(|prefix| prefix.on_device(to)).collect();
        (model.to_device(&B::Device::from_id(to)), input.to_device_of(to), prefixes)
    };
    let back = |formed: JobGradients<B>, to: DeviceId| formed.on(&B::Device::from_id(to));
    run_placed(jobs.len(), &p.places, context, (out, back), work, |job, formed: JobGradients<B>| {
        let (index, positions) = &jobs[job];
        sum.recorded += formed.recorded as u64;
        sum.gradients.merge(formed.gradients);
        sum.jobs.push((positions.clone(), formed.squared_score_norms));
        sum.observe(formed.observed);
        left[*index] -= 1;
        if left[*index] == 0 {
            take(leaves[*index], std::mem::take(&mut sum));
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const COUNTS: [usize; 9] = [1, 5, 20, 2, 7, 7, 1, 64, 3];

    fn sizes(chunks: &[Chunk]) -> Vec<usize> {
        chunks.iter().map(|chunk| chunk.ranges.iter().map(Range::len).sum()).collect()
    }

    #[test]
    fn chunks_hold_every_query_once_and_no_more_rows_than_allowed() {
        for (group, split) in [(1, false), (2, false), (1, true), (2, true)] {
            for max_rows in [2, 3, 7, 64] {
                let chunks = chunks(&COUNTS, max_rows, group, split);
                let mut seen: Vec<Vec<usize>> = COUNTS.iter().map(|&a| vec![0; a]).collect();
                assert!(sizes(&chunks).into_iter().all(|size| (1..=max_rows).contains(&size)));
                for chunk in &chunks {
                    for (&j, range) in chunk.positions.iter().zip(&chunk.ranges) {
                        assert!(range.start.is_multiple_of(group), "a direction was split");
                        range.clone().for_each(|q| seen[j][q] += 1);
                    }
                }
                assert!(seen.iter().flatten().all(|&n| n == 1));
                for (j, &count) in COUNTS.iter().enumerate().filter(|(_, count)| !split && **count <= max_rows) {
                    let parts = chunks.iter().filter(|chunk| chunk.positions.contains(&j)).count();
                    assert_eq!(parts, 1, "{count} queries fit into a chunk of {max_rows}");
                }
                assert!(chunks.len() <= fill(&COUNTS, max_rows, group, (1, false)).len(), "more chunks than needed");
            }
        }
    }

    /// 110 queries: those of an example may lie in two chunks, and pairs stay together.
    #[test]
    fn chunks_that_split_examples_are_as_few_as_can_be() {
        let of = |max_rows, group| sizes(&chunks(&COUNTS, max_rows, group, true));
        assert_eq!((of(64, 1), of(32, 1), of(200, 1)), (vec![55, 55], vec![28, 28, 28, 26], vec![110]));
        assert_eq!((of(64, 2), of(32, 2)), (vec![56, 54], vec![28, 28, 28, 26]));
        assert!(chunks(&[0, 0], 8, 1, true).is_empty());
    }

    #[test]
    fn queries_that_begin_apart_share_passes() {
        let start = |stages, queries: [&[usize]; 2]| Start { stages, queries: queries.map(<[usize]>::to_vec).into() };
        let of = |count: usize, max_rows, group| {
            let all = [
                start(0, [&[0, 1], &[]]),
                start(2, [&[4, 5], &[0, 1]]),
                start(3, [&[], &[4, 5]]),
                start(5, [&[2, 3], &[2, 3]]),
                start(6, [&[6, 7], &[]]),
            ];
            let found = joined(all.into_iter().skip(5 - count).collect(), max_rows, group).into_iter();
            found.map(|start| (start.stages, start.queries)).collect::<Vec<_>>()
        };
        let stages =
            |found: Vec<(usize, Vec<Vec<usize>>)>| found.into_iter().map(|(stages, _)| stages).collect::<Vec<_>>();
        // fourteen queries in four passes
        let four = [
            (0, vec![vec![0, 1, 4, 5], vec![]]),
            (2, vec![vec![], vec![0, 1, 4, 5]]),
            (5, vec![vec![2, 3], vec![2, 3]]),
            (6, vec![vec![6, 7], vec![]]),
        ];
        assert_eq!(of(5, 100, 2), four);
        assert_eq!(of(5, 100, 1), four);
        assert_eq!(stages(of(5, 3, 1)), [0, 2, 3, 5, 6], "as many as the rows need");
        assert_eq!(stages(of(5, 3, 2)), [0, 2, 2, 3, 5, 5, 6], "pairs stay together");
        assert_eq!(stages(of(4, 100, 1)), [2, 3, 5, 6], "as they are");
        assert!(joined(vec![], 9, 2).is_empty());
    }

    #[test]
    fn chunks_are_nearly_equal() {
        for (counts, group) in [(vec![20; 64], 1), (vec![20; 64], 2), ((1..64).collect(), 1), (vec![3; 1000], 1)] {
            let sizes = sizes(&chunks(&counts, 256, group, false));
            let (share, most) = (counts.iter().sum::<usize>() / sizes.len(), *counts.iter().max().unwrap());
            assert!(sizes.iter().all(|size| size.abs_diff(share) <= most), "{sizes:?}");
        }
    }
}
