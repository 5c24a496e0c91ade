//! Noise on the outputs of the trained layers (likelihood ratio; Peters and Schaal 2008, Jiang et al. 2023).
//!
//! For y = xW + b and z = y + σε, E[ℓ(z)·s(ε)]/σ is the gradient of the smoothed loss with respect to y, so xᵀ(c·s(ε)) estimates the
//! gradient for W and c·s(ε) that for b. x is the clean input: layers before this one are perturbed too, which moves x by O(σ), and the
//! estimate by O(σ²) in the mean.
//!
//! How the queries of a batch are cut into passes and their gradients into jobs is the same for [noise on weights of low
//! rank](super::low_rank), which is independent for every query as well: it walks through here.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use burn::prelude::*;

use super::{Formed, Problem, counted, low_rank, parallel::in_order, read};
use crate::batch::Rows;
use crate::error::Error;
use crate::feedback::Observation;
use crate::noise::NoiseSource;
use crate::objective::{ForwardModel, even};
use crate::ops;
use crate::probe::{Energy, Gradients, Prefix, Probe, Query, QueryRows, Stages};

/// Queries that begin behind the same stages.
struct Start {
    /// How many stages they skip.
    stages: usize,
    /// The queries of each datum of the batch.
    queries: Vec<Vec<usize>>,
}

/// Queries by where they begin: behind the last stage before the site of their noise, or where all sites are perturbed, before the first.
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

/// Data of a chunk and which of their queries, in the order of a [`Start`]'s, it evaluates.
struct Chunk {
    positions: Vec<usize>,
    ranges: Vec<Range<usize>>,
}

/// Chunks of at most `max_rows` rows, nearly equal ones: a device tunes its kernels to the size of a pass, and threads wait for the last one.
fn chunks(counts: &[usize], max_rows: usize, group: usize) -> Vec<Chunk> {
    let fewest = fill(counts, max_rows, group, 1);
    let equal = fill(counts, max_rows, group, fewest.len().max(1));
    if equal.len() > fewest.len() { fewest } else { equal }
}

/// Chunks of at most `max_rows` rows and, so far as whole data make it up, a share of 1/`parts` of all; data of similar counts lie together,
/// directions stay whole.
fn fill(counts: &[usize], max_rows: usize, group: usize, parts: usize) -> Vec<Chunk> {
    let mut order: Vec<usize> = (0..counts.len()).collect();
    order.sort_by_key(|&j| std::cmp::Reverse(counts[j]));
    let (total, mut done) = (counts.iter().sum::<usize>(), 0);
    let (mut chunks, mut room) = (Vec::<Chunk>::new(), 0);
    for j in order {
        // further from the share with the datum than without it
        if 2 * chunks.len() * total < parts * (2 * done + counts[j]) {
            room = 0;
        }
        let mut from = 0;
        while from < counts[j] {
            let left = counts[j] - from;
            // what is left of the datum, or as many whole directions as fit
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

/// Losses of all queries of each datum, less what the control variate explains of them, and the rows of the largest pass.
pub(super) fn losses<B: Backend, M: ForwardModel<B>>(p: &Problem<'_, B, M>) -> Result<(Vec<Vec<f64>>, usize), Error> {
    let counts = p.allocation.counts();
    let mut losses: Vec<Vec<f64>> = counts.iter().map(|&a| vec![f64::NAN; a]).collect();
    let (noise, prediction, rank) = (&p.noise, p.prediction, p.rank);
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
    let trained = p.trained.clone();
    let prefixes: Vec<Prefix> = starts.iter().map(|s| p.stages.prefix(s.stages)).collect();
    let context = (p.model.clone(), p.batch.input.clone(), p.target.clone(), prefixes);
    let work = |(model, input, target, prefixes): &(M, M::Input, M::Target, Vec<Prefix>), job: usize| {
        let (start, Chunk { positions, .. }) = &jobs[job];
        let rows = Arc::new(QueryRows::new(positions, queries(job).map(|q| q.iter().copied())));
        let of_rows: Vec<usize> = rows.datum.iter().map(|&i| positions[i]).collect();
        let query = Query::new(rows, noise.clone(), prediction.cloned(), rank);
        let mut probe = Probe::query(trained.clone(), prefixes[*start].rows(positions), query);
        let output = model.forward(input.rows(positions), &mut probe);
        Ok((counted(model.losses(output, target.rows(&of_rows)), of_rows.len())?, probe.explained()))
    };
    let (mut found, mut explained) = (Vec::with_capacity(jobs.len()), vec![]);
    in_order(jobs.len(), p.threads, context, work, |_, (losses, of_rows)| {
        found.push(losses);
        explained.extend(of_rows);
    })?;
    let mut values = read(found).into_iter().zip(explained).map(|(loss, explained)| loss - explained);
    for (job, (_, chunk)) in jobs.iter().enumerate() {
        for (&j, queries) in chunk.positions.iter().zip(queries(job)) {
            for (&query, value) in queries.iter().zip(&mut values) {
                losses[j][query] = value;
            }
        }
    }
    let rows = |(_, chunk): &(usize, Chunk)| chunk.ranges.iter().map(|r| r.len()).sum();
    Ok((losses, jobs.iter().map(rows).max().unwrap_or(0)))
}

/// Gradients, the energies E‖∂_s‖²/c² of each datum at each site, and the rows recorded for them.
pub(super) fn gradients<B: Backend, M: ForwardModel<B>>(
    p: &Problem<'_, B, M>,
    weights: &[Vec<f64>],
    survived: &[usize],
) -> Result<Formed<B>, Error> {
    let n = weights.len();
    // a recorded row keeps the inputs of all its sites, where a query row keeps those of one layer at a time
    let width = even(n, (p.max_rows / 16).min(p.rows(p.stages.before(0)) / 8).max(1));
    let jobs = n.div_ceil(width);
    // of directions that are summed side by side there are to be as many for each; what a job finds goes back to its data by this order
    let mut order: Vec<usize> = (0..n).collect();
    if p.noise.on_device {
        order.sort_by_key(|&j| std::cmp::Reverse(weights[j].len()));
    }
    let (noise, prediction, rank, max_rows) = (&p.noise, p.prediction, p.rank, p.max_rows);
    let trained = p.trained.clone();
    let context = (p.model.clone(), p.batch.input.clone(), p.stages.frozen());
    let work = |(model, input, prefix): &(M, M::Input, Prefix), job: usize| {
        let positions = &order[job * width..n.min((job + 1) * width)];
        let rows = QueryRows::new(positions, positions.iter().map(|&j| 0..weights[j].len()));
        let flat: Vec<f64> = positions.iter().flat_map(|&j| weights[j].iter().copied()).collect();
        let record = |positions: &[usize]| {
            let mut probe = Probe::record(trained.clone(), prefix.rows(positions));
            model.forward(input.rows(positions), &mut probe);
            probe.recorded()
        };
        // noise of low rank asks no more than the shapes of the sites, which one datum tells, but for what an embedding looked up
        let mut sites = record(if rank.is_some() { &positions[..1] } else { positions });
        let mut recorded = if rank.is_some() { 1 } else { positions.len() };
        if rank.is_some() && positions.len() > 1 && sites.iter().any(|site| site.needs_every_row()) {
            sites = record(positions);
            recorded += positions.len();
        }
        let mut gradients = Gradients::default();
        let mut energies = Vec::with_capacity(sites.len());
        // a datum without any finite query has no part in the estimate, in its prediction neither
        let shares: Vec<f64> = positions.iter().map(|&j| if survived[j] > 0 { 1.0 / n as f64 } else { 0.0 }).collect();
        let mut observed = prediction.map(|p| p.observe(positions, &shares));
        let mut numbers = None;
        for (index, site) in sites.into_iter().enumerate() {
            if let Some(rank) = rank {
                let source = (index, noise);
                let energy = low_rank::gradients(&site, rank, source, &rows.groups, &rows.keys, &flat, &mut gradients);
                energies.push(Energy { squares: None, factor: 1.0, constant: energy });
                continue;
            }
            let (len, device) = (site.len(), site.device());
            let g = if noise.made_by_device(len, prediction.map(Arc::as_ref)) {
                if let Some(observed) = &mut observed {
                    observed.sites.push(None);
                }
                let of_groups = || noise.of_groups(index, &rows.groups, &rows.keys, &flat, max_rows, &device);
                noise.numbers(&mut numbers, of_groups).take(len)
            } else {
                let mut g = noise.weighted_scores(index, &rows.groups, &rows.keys, &flat, len);
                if let (Some(prediction), Some(observed)) = (prediction, &mut observed) {
                    observed.sites.push(prediction.complete(index, positions, &shares, &mut g));
                }
                ops::from_host(g, [positions.len(), len], &device)
            };
            energies.push(site.energy(positions.len()));
            site.backward(g, &mut gradients);
        }
        Ok((gradients, energies, observed, recorded as u64))
    };
    let (mut sum, mut found, mut observed) = (Gradients::default(), Vec::with_capacity(jobs), None::<Observation>);
    let mut recorded = 0;
    in_order(jobs, p.threads, context, work, |_, (gradients, energies, seen, rows)| {
        recorded += rows;
        sum.merge(gradients);
        found.push(energies);
        match (&mut observed, seen) {
            (Some(observed), Some(seen)) => observed.merge(seen),
            (observed, seen) => *observed = seen,
        }
    })?;
    let mut squares = read(found.iter().flatten().filter_map(|energy| energy.squares.clone()).collect()).into_iter();
    let mut energies = vec![vec![]; n];
    for (job, of_sites) in found.iter().enumerate() {
        let positions = &order[job * width..n.min((job + 1) * width)];
        for energy in of_sites {
            for &j in positions {
                let square = energy.squares.as_ref().and_then(|_| squares.next()).unwrap_or(0.0);
                energies[j].push(energy.constant + energy.factor * square);
            }
        }
    }
    Ok(Formed { gradients: sum, energies, recorded, observed })
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
