//! The simulator.

use flops_core::random::keyed_rng;
use rand::RngExt;

/// Steps of an episode at most.
pub const STEPS: usize = 500;
/// Position, velocity, angle and angular velocity.
pub type State = [f32; 4];

/// A step of `CartPole-v1` of Gymnasium (Barto, Sutton and Anderson 1983); `None` where the pole falls or
/// the cart leaves the track.
pub fn step([x, v, angle, spin]: State, right: bool) -> Option<State> {
    let (gravity, total_mass, pole_mass_length, length, dt) = (9.8, 1.1, 0.05, 0.5, 0.02);
    let (sin, cos) = angle.sin_cos();
    let push = (if right { 10.0 } else { -10.0 } + pole_mass_length * spin * spin * sin) / total_mass;
    let turn = (gravity * sin - cos * push) / (length * (4.0 / 3.0 - 0.1 * cos * cos / total_mass));
    let pull = push - pole_mass_length * turn * cos / total_mass;
    let next = [x + dt * v, v + dt * pull, angle + dt * spin, spin + dt * turn];
    (next[0].abs() <= 2.4 && next[2].abs() <= 12f32.to_radians()).then_some(next)
}

/// Starts of episodes, each number within 0.05 of 0.
pub fn starts(seed: u64, round: u64, n: usize) -> Vec<State> {
    let mut rng = keyed_rng([seed, round, 0, 0]);
    (0..n).map(|_| [0; 4].map(|_| rng.random_range(-0.05f32..0.05))).collect()
}
