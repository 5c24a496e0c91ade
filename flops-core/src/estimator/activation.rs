//! Noise on the outputs of the trained layers (likelihood ratio; Peters and Schaal 2008, Jiang et al. 2023).
//!
//! For y = xW + b and z = y + σε, E[ℓ(z)·s(ε)]/σ is the gradient of the smoothed loss with respect to y, so xᵀ(c·s(ε)) estimates the
//! gradient for W and c·s(ε) that for b. x is the clean input: layers before this one are perturbed too, which moves x by O(σ), and the
//! estimate by O(σ²) in the mean.

use std::ops::Range;
use std::sync::Arc;

use burn::prelude::*;

use super::{Formed, Problem, parallel::in_order, read};
use crate::batch::Rows;
use crate::error::Error;
use crate::objective::ForwardModel;
use crate::probe::{Gradients, Prefix, Probe, Query, QueryRows};

/// Data of a chunk and the queries of each that it evaluates.
struct Chunk {
    positions: Vec<usize>,
    ranges: Vec<Range<usize>>,
}

/// Chunks of at most `max_rows` rows; data of similar counts lie together, directions stay whole.
fn chunks(counts: &[usize], max_rows: usize, group: usize) -> Vec<Chunk> {
    let mut order: Vec<usize> = (0..counts.len()).collect();
    order.sort_by_key(|&j| std::cmp::Reverse(counts[j]));
    let (mut chunks, mut room) = (Vec::<Chunk>::new(), 0);
    for j in order {
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
        }
    }
    chunks
}

/// Losses of all queries of each datum.
pub(super) fn losses<B: Backend, M: ForwardModel<B>>(p: &Problem<'_, B, M>) -> Result<Vec<Vec<f64>>, Error> {
    let counts = p.allocation.counts();
    let chunks = chunks(counts, p.max_rows, p.noise.sampling.group());
    let mut losses: Vec<Vec<f64>> = counts.iter().map(|&a| vec![f64::NAN; a]).collect();
    let noise = &p.noise;
    let trained = p.trained.clone();
    let context = (p.model.clone(), p.batch.input.clone(), p.batch.target.clone(), p.prefix.clone());
    let work = |(model, input, target, prefix): &(M, M::Input, M::Target, Prefix), job: usize| {
        let chunk = &chunks[job];
        let rows = Arc::new(QueryRows::new(&chunk.positions, &chunk.ranges));
        let of_rows: Vec<usize> = rows.datum.iter().map(|&i| chunk.positions[i]).collect();
        let query = Query { rows, noise: noise.clone() };
        let mut probe = Probe::query(trained.clone(), prefix.rows(&chunk.positions), query);
        let output = model.forward(input.rows(&chunk.positions), &mut probe);
        read(model.losses(output, target.rows(&of_rows)), of_rows.len())
    };
    in_order(chunks.len(), p.threads, context, work, |job, values| {
        let mut values = values.into_iter();
        for (&j, range) in chunks[job].positions.iter().zip(&chunks[job].ranges) {
            for slot in &mut losses[j][range.clone()] {
                *slot = values.next().unwrap_or(f64::NAN);
            }
        }
    })?;
    Ok(losses)
}

/// Gradients, the energies E‖∂_s‖²/c² of each datum at each site, and the rows recorded for them.
pub(super) fn gradients<B: Backend, M: ForwardModel<B>>(
    p: &Problem<'_, B, M>,
    weights: &[Vec<f64>],
) -> Result<Formed<B>, Error> {
    let n = weights.len();
    // a recorded row keeps the inputs of all its sites, where a query row keeps those of one layer at a time
    let width = (p.max_rows / 16).max(1);
    let jobs = n.div_ceil(width);
    let noise = &p.noise;
    let trained = p.trained.clone();
    let context = (p.model.clone(), p.batch.input.clone(), p.prefix.clone());
    let work = |(model, input, prefix): &(M, M::Input, Prefix), job: usize| {
        let positions: Vec<usize> = (job * width..n.min((job + 1) * width)).collect();
        let ranges: Vec<_> = positions.iter().map(|&j| 0..weights[j].len()).collect();
        let rows = QueryRows::new(&positions, &ranges);
        let flat: Vec<f64> = positions.iter().flat_map(|&j| weights[j].iter().copied()).collect();
        let mut probe = Probe::record(trained.clone(), prefix.rows(&positions));
        model.forward(input.rows(&positions), &mut probe);
        let mut gradients = Gradients::default();
        let mut energies = vec![vec![]; positions.len()];
        for (index, site) in probe.recorded().into_iter().enumerate() {
            let device = site.device();
            let g = noise.weighted_scores::<B>(index, &rows.groups, &rows.keys, &flat, site.len(), &device);
            for (all, energy) in energies.iter_mut().zip(site.energy(positions.len())) {
                all.push(energy);
            }
            site.backward(g, &mut gradients);
        }
        Ok((gradients, energies))
    };
    let (mut sum, mut energies) = (Gradients::default(), Vec::with_capacity(n));
    in_order(jobs, p.threads, context, work, |_, (gradients, energy)| {
        sum.merge(gradients);
        energies.extend(energy);
    })?;
    Ok(Formed { gradients: sum, energies, recorded: n as u64 })
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
}
