//! The baseline: evolution strategies as OpenAI ran them, in plain Rust without this library (Salimans et
//! al. 2017, arXiv 1703.03864).
//!
//! Mirrored Gaussian noise on all weights, an episode of its own for each pair, centred ranks in place of
//! returns, and Adam.

use flops_core::random::keyed_rng;
use rand::RngExt;
use rand::rngs::StdRng;

use crate::args::Args;
use crate::pole::{STEPS, State, starts, step};

const HIDDEN: usize = 16;
/// A row for each hidden unit: 4 weights, a bias, and 2 weights to the actions; then the actions' biases.
const WEIGHTS: usize = HIDDEN * 7 + 2;

/// A policy of the same two layers.
pub struct Policy([f32; WEIGHTS]);

impl Policy {
    fn acts_right(&self, state: State) -> bool {
        let (units, biases) = self.0.split_at(HIDDEN * 7);
        let unit = |w: &[f32]| {
            let sum: f32 = state.iter().zip(w).map(|(s, w)| s * w).sum();
            let h = (sum + w[4]).tanh();
            h * (w[6] - w[5])
        };
        units.chunks(7).map(unit).sum::<f32>() + biases[1] - biases[0] > 0.0
    }

    fn episode(&self, start: State) -> f64 {
        let mut state = Some(start);
        (0..STEPS).map_while(|_| state.inspect(|&s| state = step(s, self.acts_right(s)))).count() as f64
    }

    pub fn mean_return(&self, starts: &[State]) -> f64 {
        starts.iter().map(|&start| self.episode(start)).sum::<f64>() / starts.len() as f64
    }
}

fn gaussian(rng: &mut StdRng) -> f32 {
    let (a, b): (f32, f32) = (1.0 - rng.random::<f32>(), rng.random());
    (-2.0 * a.ln()).sqrt() * (std::f32::consts::TAU * b).cos()
}

/// Ranks from −½ to ½, the mean of them for equal values.
fn centred_ranks(values: &[f64]) -> Vec<f64> {
    let rank = |v: f64| {
        let below = values.iter().filter(|&&w| w < v).count() as f64;
        let equal = values.iter().filter(|&&w| w == v).count() as f64;
        (below + 0.5 * (equal - 1.0)) / (values.len() - 1).max(1) as f64 - 0.5
    };
    values.iter().map(|&v| rank(v)).collect()
}

/// Trains until `look` says to stop, or the episodes are spent.
pub fn train(args: &Args, seed: u64, look: &mut dyn FnMut(u64, &Policy) -> bool) {
    let pairs = (args.batch_size * args.queries / 2).max(1);
    let mut rng = keyed_rng([seed, 0, 0, 1]);
    // uniform within 1/√inputs, as the layers of the other methods begin
    let bound = |i: usize| if i < HIDDEN * 7 && i % 7 < 5 { 0.5 } else { 0.25 };
    let mut policy = Policy(std::array::from_fn(|i| rng.random_range(-bound(i)..bound(i))));
    let (mut first, mut second) = ([0f64; WEIGHTS], [0f64; WEIGHTS]);
    for round in 1i32.. {
        let starts = starts(seed, round as u64, pairs);
        let noise: Vec<[f32; WEIGHTS]> = (0..pairs).map(|_| std::array::from_fn(|_| gaussian(&mut rng))).collect();
        let sigma = args.es_sigma as f32;
        let moved = |e: &[f32; WEIGHTS], s: f32| Policy(std::array::from_fn(|i| policy.0[i] + s * sigma * e[i]));
        let both = noise.iter().zip(&starts).flat_map(|(e, &s)| [1.0, -1.0].map(|sign| moved(e, sign).episode(s)));
        let ranks = centred_ranks(&both.collect::<Vec<f64>>());
        let weights: Vec<f64> = ranks.chunks(2).map(|pair| pair[0] - pair[1]).collect();
        let sum = |i: usize| weights.iter().zip(&noise).map(|(w, e)| w * f64::from(e[i])).sum::<f64>();
        let gradient: [f64; WEIGHTS] = std::array::from_fn(|i| sum(i) / (2.0 * pairs as f64 * args.es_sigma));
        let (first_left, second_left) = (1.0 - 0.9f64.powi(round), 1.0 - 0.999f64.powi(round));
        for (((w, m), v), g) in policy.0.iter_mut().zip(&mut first).zip(&mut second).zip(gradient) {
            *m = 0.9 * *m + 0.1 * g;
            *v = 0.999 * *v + 0.001 * g * g;
            *w += (args.lr * (*m / first_left) / ((*v / second_left).sqrt() + 1e-8)) as f32;
        }
        let episodes = round as u64 * 2 * pairs as u64;
        if !look(episodes, &policy) || episodes >= args.episodes() {
            return;
        }
    }
}
