//! A model of the time of a step on many workers, from figures of one machine and a network.
//!
//! It follows the executors as they are. Workers share the examples of a clean pass. Queries of
//! weight noise are shared by directions, or by examples where they begin behind a frozen prefix;
//! those of activation noise by examples. A sum in scalars is formed by every worker whole; in
//! gradients each forms its part, and the parts travel. Where passes begin behind a frozen prefix,
//! a worker that forms the sum of activation noise whole runs the prefixes of the others' examples
//! again. Ranks of MPI swap ever larger nodes of the sum; over a log every worker sends its node,
//! and reads those of all others.

use serde::Serialize;

/// What a network does.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Network {
    /// Seconds of an exchange of nothing between two ranks of MPI.
    pub hop: f64,
    /// Bytes a second between two machines.
    pub bandwidth: f64,
    /// Seconds until an entry that is written to the log is read again.
    pub entry: f64,
    /// Seconds that the server of the log spends on an entry, and on each worker that reads it.
    pub serve: (f64, f64),
}

/// How the queries of a step are cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Cut {
    /// By examples, with weight noise: each worker draws every direction.
    Examples,
    /// By directions: each is drawn by one worker.
    Directions,
    /// By examples with noise of their own, as on activations.
    Own,
    /// The same, behind a frozen prefix.
    OwnBehindPrefix,
}

/// How workers come by a sum.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Sums {
    /// Each forms it whole.
    Scalars,
    /// Each forms a part.
    Gradients,
}

/// What connects the workers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Link {
    /// MPI.
    Mpi,
    /// A log on one server.
    Log,
}

/// A step.
#[derive(Clone, Debug, Serialize)]
pub struct Work {
    /// What it is.
    pub name: String,
    /// How its queries are cut.
    pub cut: Cut,
    /// Examples in a batch.
    pub examples: usize,
    /// Queries of an example.
    pub queries: usize,
    /// Values that are trained.
    pub trained: f64,
    /// Seconds of a row of the clean pass, and of a query.
    pub rows: (f64, f64),
    /// Seconds that drawing a coordinate of a direction takes.
    pub draw: f64,
    /// Seconds that the update takes for a coordinate of a direction; with activation noise, for an
    /// example.
    pub update: f64,
    /// Seconds of what every worker does for itself.
    pub rest: f64,
    /// Bytes that the result of a query has.
    pub answer: f64,
}

/// Spread of the queries of examples, as Neyman's allocation leaves it: their standard deviation
/// over their mean.
const SPREAD: f64 = 0.8;

impl Cut {
    /// Whether the noise falls on activations.
    pub fn is_own(self) -> bool {
        matches!(self, Self::Own | Self::OwnBehindPrefix)
    }
}

impl Work {
    /// Seconds of a step on one worker.
    pub fn alone(&self) -> f64 {
        self.jobs(1, Sums::Scalars) + self.rest
    }

    /// How many times as fast as one worker `workers` are.
    pub fn speedup(&self, workers: usize, sums: Sums, link: Link, network: &Network) -> f64 {
        self.alone() / (self.jobs(workers, sums) + self.rest + self.exchanges(workers, sums, link, network))
    }

    /// Seconds of the jobs of the worker that has most of them.
    fn jobs(&self, workers: usize, sums: Sums) -> f64 {
        let examples = self.examples.div_ceil(workers) as f64;
        let directions = self.queries.div_ceil(workers) as f64;
        let (all, queries) = (self.examples as f64, self.queries as f64);
        let clean = examples * self.rows.0;
        let query = match self.cut {
            Cut::Examples => queries * (examples * self.rows.1 + self.trained * self.draw),
            Cut::Directions => directions * (all * self.rows.1 + self.trained * self.draw),
            Cut::Own | Cut::OwnBehindPrefix => examples * self.imbalance(workers) * queries * self.rows.1,
        };
        let here = |part: f64, whole: f64| if sums == Sums::Scalars { whole } else { part };
        let update = match self.cut {
            Cut::Own => here(examples, all) * self.update,
            Cut::OwnBehindPrefix => here(examples, all) * self.update + here(0.0, all - examples) * self.rows.0,
            Cut::Examples | Cut::Directions => here(directions, queries) * self.trained * self.update,
        };
        clean + query + update
    }

    /// The queries of the worker that has most of them over the mean: the largest of `workers` sums
    /// of examples that are drawn by chance.
    fn imbalance(&self, workers: usize) -> f64 {
        if workers < 2 {
            return 1.0;
        }
        let each = (self.examples as f64 / workers as f64).max(1.0);
        1.0 + SPREAD * (2.0 * (workers as f64).ln() / each).sqrt()
    }

    /// Seconds of the exchanges of a step.
    fn exchanges(&self, workers: usize, sums: Sums, link: Link, network: &Network) -> f64 {
        if workers < 2 {
            return 0.0;
        }
        let n = workers as f64;
        let (shared, gradient) = (sums == Sums::Gradients, 4.0 * self.trained);
        let answers = 8.0 * self.examples as f64 + self.answer * (self.examples * self.queries) as f64;
        match link {
            Link::Mpi => {
                // the clean pass, the queries and the update; in scalars the last tells failures
                // alone
                let turns = n.log2().ceil();
                let sum = if shared { turns * gradient / network.bandwidth } else { 0.0 };
                3.0 * turns * network.hop + answers / network.bandwidth + sum
            }
            Link::Log => {
                // each claims leaves, and writes what they gave in three rounds
                let sent = if shared { answers + (n - 1.0) * gradient } else { answers };
                let served = 4.0 * n * (network.serve.0 + n * network.serve.1);
                4.0 * network.entry + served + n * sent / network.bandwidth
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn network() -> Network {
        Network { hop: 50e-6, bandwidth: 1.25e9, entry: 300e-6, serve: (100e-6, 5e-6) }
    }

    fn work(cut: Cut) -> Work {
        let (examples, queries, trained) = (64, 64, 3e5);
        let name = "a step".into();
        Work {
            name,
            cut,
            examples,
            queries,
            trained,
            rows: (3e-3, 3e-3),
            draw: 1e-9,
            update: 1e-9,
            rest: 0.0,
            answer: 8.0,
        }
    }

    const ALL: [Cut; 4] = [Cut::Examples, Cut::Directions, Cut::Own, Cut::OwnBehindPrefix];

    #[test]
    fn one_worker_has_the_speed_of_one() {
        for cut in ALL {
            for sums in [Sums::Scalars, Sums::Gradients] {
                for link in [Link::Mpi, Link::Log] {
                    assert_eq!(work(cut).speedup(1, sums, link, &network()), 1.0);
                }
            }
        }
    }

    #[test]
    fn no_step_is_faster_than_its_workers_are_many() {
        for cut in ALL {
            for workers in [2, 3, 8, 64, 1024] {
                for sums in [Sums::Scalars, Sums::Gradients] {
                    for link in [Link::Mpi, Link::Log] {
                        let speedup = work(cut).speedup(workers, sums, link, &network());
                        assert!(speedup > 0.0 && speedup <= workers as f64, "{cut:?}, {workers} workers: {speedup}");
                    }
                }
            }
        }
    }

    /// 64 directions of 64 rows of 3 ms: 12.3 s of queries and 0.2 s of a clean pass, which 8
    /// workers share. Noise, updates and exchanges are small beside that.
    #[test]
    fn long_rows_scale_by_the_workers() {
        for cut in [Cut::Examples, Cut::Directions] {
            let speedup = work(cut).speedup(8, Sums::Scalars, Link::Mpi, &network());
            assert!((7.8..8.0).contains(&speedup), "{cut:?}: {speedup}");
        }
    }

    /// What every worker does for itself bounds the gain (Amdahl): a tenth of the time, at most ten
    /// times the speed.
    #[test]
    fn what_is_replicated_bounds_the_gain() {
        let mut of = work(Cut::Directions);
        of.rest = of.alone() / 9.0;
        let speedup = of.speedup(64, Sums::Gradients, Link::Mpi, &network());
        assert!((8.0..10.0).contains(&speedup), "{speedup}");
    }

    /// 64 directions keep 64 workers busy, and no more.
    #[test]
    fn directions_bound_the_workers() {
        let of = Work { rows: (0.0, 3e-3), ..work(Cut::Directions) };
        let free = Network { hop: 0.0, bandwidth: f64::INFINITY, entry: 0.0, serve: (0.0, 0.0) };
        let at = |workers| of.speedup(workers, Sums::Gradients, Link::Mpi, &free);
        assert!((at(64) - 64.0).abs() < 1e-9 && (at(1024) - 64.0).abs() < 1e-9);
    }

    /// A gradient of 86 M values costs scalars its noise, and gradients the network.
    #[test]
    fn the_cheaper_sum_depends_on_noise_and_network() {
        let of = |draw: f64| Work { trained: 86e6, queries: 1024, draw, update: draw, ..work(Cut::Directions) };
        let at = |draw, sums, network: &Network| of(draw).speedup(64, sums, Link::Mpi, network);
        let slow = Network { bandwidth: 1e6, ..network() };
        assert!(at(1e-9, Sums::Gradients, &network()) > 2.0 * at(1e-9, Sums::Scalars, &network()));
        assert!(at(1e-12, Sums::Scalars, &slow) > 2.0 * at(1e-12, Sums::Gradients, &slow));
    }

    /// Two workers that each form the sum whole run the prefixes of the other's 32 examples again.
    #[test]
    fn prefixes_of_others_run_again_in_scalars() {
        let of = |cut| Work { update: 1e-3, ..work(cut) }.jobs(2, Sums::Scalars);
        assert!((of(Cut::OwnBehindPrefix) - of(Cut::Own) - 32.0 * 3e-3).abs() < 1e-12);
        let of = |cut| Work { update: 1e-3, ..work(cut) }.jobs(2, Sums::Gradients);
        assert_eq!(of(Cut::OwnBehindPrefix), of(Cut::Own));
    }

    /// One server sends every gradient to every worker; ranks of MPI swap them.
    #[test]
    fn one_server_is_slower_than_mpi_where_gradients_travel() {
        let of = Work { trained: 86e6, ..work(Cut::Own) };
        let at = |link| of.speedup(64, Sums::Gradients, link, &network());
        assert!(at(Link::Mpi) > 5.0 * at(Link::Log), "{} and {}", at(Link::Mpi), at(Link::Log));
    }
}
