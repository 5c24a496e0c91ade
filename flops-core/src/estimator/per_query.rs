//! Passes of noise that is independent for every query of every example.
//!
//! The activation and the low-rank space share how the queries of a batch are cut into chunks, and
//! how the update is cut into jobs. They differ in what a site does with the noise.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use burn::prelude::*;

use super::context::{EstimateContext, SpaceGradients, to_host};
use super::query_weights::WeightedQueries;
use super::rows::losses as row_losses;
use crate::batch::Rows;
use crate::control_variate::{Observation, PredictedRows};
use crate::error::Error;
use crate::model::ForwardModel;
use crate::noise::NoiseSource;
use crate::parallel::{balanced_chunk, run_ordered};
use crate::probe::{Gradients, Prefix, Probe, Query, QueryRows, Recorded, SquaredScoreNorm, Stages};

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

/// The examples of a chunk, and the range of their queries, in the order of a [`Start`], that it
/// evaluates.
struct Chunk {
    positions: Vec<usize>,
    ranges: Vec<Range<usize>>,
}

/// Chunks of at most `max_rows` rows, nearly equal ones.
///
/// A device tunes its kernels to the size of a pass, and threads wait for the last one.
fn chunks(counts: &[usize], max_rows: usize, group: usize) -> Vec<Chunk> {
    let fewest = fill(counts, max_rows, group, 1);
    let equal = fill(counts, max_rows, group, fewest.len().max(1));
    if equal.len() > fewest.len() { fewest } else { equal }
}

/// Chunks of at most `max_rows` rows and about 1/`parts` of all.
///
/// Examples of similar counts lie together; directions stay whole, and examples where they fit.
fn fill(counts: &[usize], max_rows: usize, group: usize, parts: usize) -> Vec<Chunk> {
    let mut order: Vec<usize> = (0..counts.len()).collect();
    order.sort_by_key(|&j| std::cmp::Reverse(counts[j]));
    let (total, mut done) = (counts.iter().sum::<usize>(), 0);
    let (mut chunks, mut room) = (Vec::<Chunk>::new(), 0);
    for j in order {
        // further from the share with the example than without it
        if 2 * chunks.len() * total < parts * (2 * done + counts[j]) {
            room = 0;
        }
        let mut from = 0;
        while from < counts[j] {
            let left = counts[j] - from;
            // what is left of the example, or as many whole directions as fit
            let fits = if left <= room { left } else { room / group * group };
            if fits == 0 || (fits < left && left <= max_rows) {
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

/// The answers of all queries of each example. `rank` is that of noise on weights.
pub(super) fn losses<B: Backend, M: ForwardModel<B>>(
    p: &EstimateContext<'_, B, M>,
    rank: Option<usize>,
) -> Result<Answers, Error> {
    let counts = p.allocation.counts();
    let mut losses: Vec<Vec<f64>> = counts.iter().map(|&a| vec![f64::NAN; a]).collect();
    let mut explains: Vec<Vec<f64>> = counts.iter().map(|&a| vec![0.0; a]).collect();
    let (noise, prediction) = (&p.noise, p.prediction);
    let dim = prediction.map_or(0, |p| p.dim());
    let mut innovations: Vec<Vec<f32>> = counts.iter().map(|&a| vec![0.0; a * dim]).collect();
    let starts = starts(noise, p.stages, counts);
    let jobs: Vec<(usize, Chunk)> = starts
        .iter()
        .enumerate()
        .flat_map(|(i, start)| {
            let counts: Vec<usize> = start.queries.iter().map(Vec::len).collect();
            chunks(&counts, p.rows(start.stages), noise.sampling.group()).into_iter().map(move |chunk| (i, chunk))
        })
        .collect();
    let queries = |job: usize| {
        let (start, chunk) = &jobs[job];
        chunk.positions.iter().zip(&chunk.ranges).map(|(&j, range)| &starts[*start].queries[j][range.clone()])
    };
    let (trained, key) = (p.trained.clone(), p.key);
    let prefixes: Vec<Prefix> = starts.iter().map(|s| p.stages.prefix(s.stages)).collect();
    let context = (p.model.clone(), p.batch.input.clone(), p.target.clone(), prefixes);
    let work = |(model, input, target, prefixes): &(M, M::Input, M::Target, Vec<Prefix>), job: usize| {
        let (start, Chunk { positions, .. }) = &jobs[job];
        let rows = Arc::new(QueryRows::new(positions, queries(job).map(|q| q.iter().copied())));
        let of_rows: Vec<usize> = rows.datum.iter().map(|&i| positions[i]).collect();
        let query = Query::new(rows.clone(), noise.clone(), prediction.cloned(), rank);
        let mut probe = Probe::query(trained.clone(), prefixes[*start].rows(positions), query)
            .with_examples(key.examples(positions));
        let mut output = model.forward(input.rows(positions), &mut probe);
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
    run_ordered(jobs.len(), p.threads, context, work, |_, (losses, of_rows, rows)| {
        found.push(losses);
        outputs.extend(of_rows);
        predicted.answers.extend(rows.answers);
        predicted.explained.extend(rows.explained);
    })?;
    let (values, outputs) = (to_host(found), to_host(outputs));
    let outputs: Vec<f32> = outputs.into_iter().map(|o| o as f32).collect();
    let outputs = (outputs.len() == values.len() * dim).then_some(outputs);
    let mut row = 0;
    for (job, (_, chunk)) in jobs.iter().enumerate() {
        for (&j, queries) in chunk.positions.iter().zip(queries(job)) {
            for &query in queries {
                (losses[j][query], explains[j][query]) = (values[row], predicted.explained[row]);
                if let Some(prediction) = prediction.filter(|_| dim > 0) {
                    let of_row = row * dim..(row + 1) * dim;
                    let (expected, outputs) =
                        (&predicted.answers[of_row.clone()], outputs.as_ref().map(|o| &o[of_row]));
                    let change = values[row] - p.losses[j];
                    let shown = prediction.innovation(j, expected, outputs, change, noise.sigma);
                    innovations[j][query * dim..(query + 1) * dim].copy_from_slice(&shown);
                }
                row += 1;
            }
        }
    }
    let rows = |(_, chunk): &(usize, Chunk)| chunk.ranges.iter().map(|r| r.len()).sum();
    let rows = jobs.iter().map(rows).max().unwrap_or(0);
    Ok(Answers { losses, explained: explains, innovations, rows })
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

/// What a job gives.
pub(super) struct JobGradients<B: Backend> {
    pub gradients: Gradients<B>,
    /// Of each site, for the examples of the job.
    pub squared_score_norms: Vec<SquaredScoreNorm<B>>,
    pub observed: Option<Observation>,
    /// Rows recorded.
    pub recorded: usize,
}

/// Gradients by jobs: `form` makes those of a job from its recorded sites.
///
/// It is handed a function that records the sites of examples, named by their positions.
pub(super) fn gradients<B: Backend, M: ForwardModel<B>>(
    p: &EstimateContext<'_, B, M>,
    weighted: &WeightedQueries,
    form: impl Fn(&Job<'_>, &dyn Fn(&[usize]) -> Vec<Recorded<B>>) -> Result<JobGradients<B>, Error> + Sync,
) -> Result<SpaceGradients<B>, Error> {
    let WeightedQueries { weights, survived, .. } = weighted;
    let n = weights.len();
    // a recorded row keeps the inputs of all its sites, where a query row keeps those of one layer
    // at a time
    // a shrunk estimate compares halves of a job
    let least = if p.prediction.is_some_and(|p| p.measures()) { 2 } else { 1 };
    let width = balanced_chunk(n, (p.max_rows / 16).min(p.rows(p.stages.before(0)) / 8).max(least));
    let jobs = n.div_ceil(width);
    // a device sums directions side by side, as many for each example; jobs find their examples by
    // this order
    let mut order: Vec<usize> = (0..n).collect();
    if p.noise.on_device {
        order.sort_by_key(|&j| std::cmp::Reverse(weights[j].len()));
    }
    let positions = |job: usize| &order[job * width..n.min((job + 1) * width)];
    let (trained, key) = (p.trained.clone(), p.key);
    let context = (p.model.clone(), p.batch.input.clone(), p.stages.frozen());
    let work = |(model, input, prefix): &(M, M::Input, Prefix), job: usize| {
        let positions = positions(job);
        let job = Job {
            positions,
            rows: QueryRows::new(positions, positions.iter().map(|&j| 0..weights[j].len())),
            weights: positions.iter().flat_map(|&j| weights[j].iter().copied()).collect(),
            shares: positions.iter().map(|&j| if survived[j] > 0 { 1.0 / n as f64 } else { 0.0 }).collect(),
        };
        let record = |positions: &[usize]| {
            let mut probe =
                Probe::record(trained.clone(), prefix.rows(positions)).with_examples(key.examples(positions));
            model.forward(input.rows(positions), &mut probe);
            probe.recorded()
        };
        let mut formed = form(&job, &record)?;
        formed.gradients.retain(&trained); // a site may add those of frozen parameters
        Ok(formed)
    };
    let (mut sum, mut norms, mut observed) = (Gradients::default(), Vec::with_capacity(jobs), None::<Observation>);
    let mut recorded = 0;
    run_ordered(jobs, p.threads, context, work, |_, formed: JobGradients<B>| {
        recorded += formed.recorded as u64;
        sum.merge(formed.gradients);
        norms.push(formed.squared_score_norms);
        match (&mut observed, formed.observed) {
            (Some(observed), Some(seen)) => observed.merge(seen),
            (observed, seen) => *observed = seen,
        }
    })?;
    let squared_score_norms = of_examples(n, &norms, positions);
    Ok(SpaceGradients { gradients: sum, squared_score_norms, recorded, observed })
}

/// The norms of each of `n` examples at each site, from those of the jobs; a device is waited for
/// once.
fn of_examples<'a, B: Backend>(
    n: usize,
    jobs: &[Vec<SquaredScoreNorm<B>>],
    positions: impl Fn(usize) -> &'a [usize],
) -> Vec<Vec<f64>> {
    let mut squares =
        to_host(jobs.iter().flatten().filter_map(|norm| norm.squares.clone().map(|s| s.squeeze_dim(1))).collect())
            .into_iter();
    let mut norms = vec![vec![]; n];
    for (job, of_sites) in jobs.iter().enumerate() {
        for norm in of_sites {
            for &j in positions(job) {
                let square = norm.squares.as_ref().and_then(|_| squares.next()).unwrap_or(0.0);
                norms[j].push(norm.constant + norm.factor * square);
            }
        }
    }
    norms
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_hold_every_query_once_and_no_more_rows_than_allowed() {
        for group in [1, 2] {
            for max_rows in [2, 3, 7, 64] {
                let counts = [1, 5, 20, 2, 7, 7, 1, 64, 3];
                let chunks = chunks(&counts, max_rows, group);
                let mut seen: Vec<Vec<usize>> = counts.iter().map(|&a| vec![0; a]).collect();
                for chunk in &chunks {
                    assert!(chunk.ranges.iter().map(|r| r.len()).sum::<usize>() <= max_rows);
                    for (&j, range) in chunk.positions.iter().zip(&chunk.ranges) {
                        assert!(range.start.is_multiple_of(group), "a direction was split");
                        range.clone().for_each(|q| seen[j][q] += 1);
                    }
                }
                assert!(seen.iter().flatten().all(|&n| n == 1));
                for (j, &count) in counts.iter().enumerate().filter(|(_, count)| **count <= max_rows) {
                    let parts = chunks.iter().filter(|chunk| chunk.positions.contains(&j)).count();
                    assert_eq!(parts, 1, "{count} queries fit into a chunk of {max_rows}");
                }
                assert!(chunks.len() <= fill(&counts, max_rows, group, 1).len(), "more chunks than needed");
            }
        }
    }

    #[test]
    fn chunks_are_nearly_equal() {
        for (counts, group) in [(vec![20; 64], 1), (vec![20; 64], 2), ((1..64).collect(), 1), (vec![3; 1000], 1)] {
            let sizes: Vec<usize> =
                chunks(&counts, 256, group).iter().map(|chunk| chunk.ranges.iter().map(Range::len).sum()).collect();
            let (share, most) = (counts.iter().sum::<usize>() / sizes.len(), *counts.iter().max().unwrap());
            assert!(sizes.iter().all(|size| size.abs_diff(share) <= most), "{sizes:?}");
        }
    }
}
