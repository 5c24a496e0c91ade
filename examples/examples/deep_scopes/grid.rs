//! All runs: the learning rate of each method is chosen, then every seed is trained.

use anyhow::Result;
use flops_examples::backend::B;
use flops_examples::experiment::{Classifier, Progress, Testbed};
use flops_vit::Sites;
use flops_vit::data::ImageBatch;

use crate::args::Args;
use crate::method::Method;
use crate::record::{Key, Record, Records};
use crate::subject::Subject;
use crate::training::Course;

/// The runs of a method with one number of queries, over the seeds.
pub struct Cell {
    /// What is trained.
    pub subject: Subject,
    /// How gradients are obtained.
    pub method: Method,
    /// Queries per image and step; 0 for backpropagation.
    pub queries: usize,
    /// The chosen learning rate.
    pub lr: f64,
    /// Whether it is the smallest or the largest of several, so that a better one may lie outside.
    pub lr_at_edge: bool,
    /// A run for each seed.
    pub records: Vec<Record>,
}

impl Cell {
    /// Returns the runs that did not fail.
    pub fn trained(&self) -> impl Iterator<Item = &Record> + Clone {
        self.records.iter().filter(|record| record.failure.is_none())
    }
}

/// All runs.
pub struct Grid<'a> {
    args: &'a Args,
    budget: u64,
    records: &'a Records,
    seeds: Vec<u64>,
    progress: Progress,
    /// Runs so far, and in all.
    runs: [usize; 2],
    /// What was measured.
    pub cells: Vec<Cell>,
    /// What was left out, a line each.
    pub left_out: Vec<String>,
}

impl<'a> Grid<'a> {
    /// Creates an empty grid.
    ///
    /// # Errors
    /// If there are no seeds.
    pub fn new(args: &'a Args, budget: u64, records: &'a Records) -> Result<Self> {
        let seeds = args.experiment.seeds()?;
        let of_method = |method: &Method| {
            // the first seed of the chosen rate is among the runs that choose it
            let rates = args.rates(*method).len();
            queries_of(args, *method).len() * (seeds.len() + rates - 1)
        };
        let all = args.subjects().len() * args.methods().iter().map(of_method).sum::<usize>();
        let (progress, cells, left_out) = (Progress::default(), vec![], vec![]);
        Ok(Self { args, budget, records, seeds, progress, runs: [0, all], cells, left_out })
    }

    /// Returns when the first run began.
    pub fn started(&self) -> std::time::Instant {
        self.progress.started()
    }

    /// Measures all methods on a subject. `start` returns its model before training, by seed.
    ///
    /// # Errors
    /// If a model cannot be made, or the file of a run cannot be read or written.
    pub fn measure<M: Classifier>(
        &mut self,
        subject: Subject,
        testbed: &Testbed<M>,
        start: impl Fn(u64) -> Result<M>,
    ) -> Result<()> {
        let fixed = testbed.images.fixed_batch(self.args.fixed_batch);
        for sites in [Sites::Linear, Sites::Branch] {
            let methods: Vec<Method> = self.args.methods().into_iter().filter(|m| m.sites() == sites).collect();
            if methods.is_empty() {
                continue;
            }
            let Some(testbed) = testbed.at_sites(sites)? else {
                let names: Vec<String> = methods.iter().map(Method::to_string).collect();
                self.left_out.push(format!("{subject}, {}: it has no branches", names.join(", ")));
                continue;
            };
            for method in methods {
                for queries in queries_of(self.args, method) {
                    self.measure_cell((subject, method, queries), &testbed, &fixed, &start)?;
                }
            }
        }
        Ok(())
    }

    /// Chooses the learning rate of the lowest training loss at the end, on the first seed, and
    /// trains every seed at this rate.
    fn measure_cell<M: Classifier>(
        &mut self,
        (subject, method, queries): (Subject, Method, usize),
        testbed: &Testbed<M>,
        fixed: &ImageBatch<B>,
        start: &impl Fn(u64) -> Result<M>,
    ) -> Result<()> {
        let name = format!("{subject}, {method}, {queries} queries");
        if let Err(error) = method.config(queries.max(1), self.args.sigma, 0) {
            self.left_out.push(format!("{name}: {error:#}"));
            return Ok(());
        }
        let key = |lr: f64, seed: u64| Key { subject, queries, method, lr, seed };
        let rates = self.args.rates(method);
        let mut best = None::<(f64, f64)>;
        for &lr in &rates {
            let Some(record) = self.run(&key(lr, self.seeds[0]), testbed, fixed, start)? else { continue };
            if let Some(loss) = record.train_loss.filter(|_| record.failure.is_none())
                && best.is_none_or(|(least, _)| loss < least)
            {
                best = Some((loss, lr));
            }
        }
        let Some((_, lr)) = best else {
            self.left_out.push(format!("{name}: there is no run that ended, at any learning rate"));
            return Ok(());
        };
        let mut records = vec![];
        for seed in self.seeds.clone() {
            records.extend(self.run(&key(lr, seed), testbed, fixed, start)?);
        }
        let beyond = |end: fn(f64, f64) -> f64| rates.iter().copied().fold(lr, end) == lr;
        let lr_at_edge = rates.len() > 1 && (beyond(f64::min) || beyond(f64::max));
        self.cells.push(Cell { subject, method, queries, lr, lr_at_edge, records });
        Ok(())
    }

    /// Returns a run, which is trained if the folder does not hold it; `None` if it is missing and
    /// nothing is to be trained.
    fn run<M: Classifier>(
        &mut self,
        key: &Key,
        testbed: &Testbed<M>,
        fixed: &ImageBatch<B>,
        start: &impl Fn(u64) -> Result<M>,
    ) -> Result<Option<Record>> {
        if let Some(record) = self.records.get(key)? {
            return Ok(Some(record));
        }
        if self.args.report_only {
            return Ok(None);
        }
        let Key { subject, queries, method, lr, seed } = key;
        let Some(model) = start(*seed)?.at_sites(method.sites()) else { return Ok(None) };
        let course = Course { args: self.args, budget: self.budget, testbed, fixed };
        let (progress, [done, all]) = (&mut self.progress, self.runs);
        let name = format!("{subject}, {queries} queries, {method}, lr {lr}, seed {seed}");
        progress.at(done, all, || name.clone());
        let record = course.run(key, model, |share, accuracy| {
            let (share, accuracy) = (100.0 * share.min(1.0), 100.0 * accuracy);
            progress.at(done, all, || format!("{name}: {share:.0} %, test accuracy {accuracy:.1} %"));
        })?;
        self.records.put(key, &record)?;
        self.runs[0] += 1;
        // as it is found when the program is started again, down to the last digit
        self.records.get(key)
    }
}

/// Returns the numbers of queries that a method is run with.
fn queries_of(args: &Args, method: Method) -> Vec<usize> {
    if method == Method::Backprop { vec![0] } else { args.queries.clone() }
}
