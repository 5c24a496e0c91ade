//! Plain inference in chunks, on several threads, optionally from cached prefixes.

use burn::prelude::*;

use crate::batch::{Batch, Rows};
use crate::model::ForwardModel;
use crate::parallel::{num_workers, run_ordered};
use crate::probe::{Passes, Prefix, PrefixCache, Probe, Stages};

/// Runs the model on the `rows` rows of `input`, at most `max_rows` of them at a time.
///
/// On a CPU, `threads` threads run passes side by side: that is faster than one thread with
/// parallel matrix products. A GPU uses one thread, whatever `threads` says. The result does not
/// depend on `threads`.
///
/// # Panics
/// Where `rows` or `max_rows` is 0.
pub fn infer<B: Backend, M: ForwardModel<B>>(
    model: &M,
    input: &M::Input,
    rows: usize,
    max_rows: usize,
    threads: usize,
) -> M::Output {
    assert!(rows > 0 && max_rows > 0, "{rows} rows, at most {max_rows} at a time: both must be at least 1");
    run(model, input, Passes::new(rows, None, max_rows), threads, |_, _| Probe::clean(), drop)
}

/// [`infer`] on a batch that is evaluated repeatedly, as after every epoch.
///
/// Stages in front of the first trained parameter run once per example. Later calls start from the
/// outputs that `cache` holds of them. Of a batch with some examples in the cache, only the others
/// run these stages.
///
/// The cache identifies examples by `batch.ids` and the [sizes](Rows::row_shape) of their input
/// rows. It must have been told which parameters are trained; until then nothing is cached. All
/// other parameters must keep their values, and every trained one must be called through the probe.
///
/// # Panics
/// Where the batch is empty or `max_rows` is 0.
pub fn infer_cached<B: Backend, M: ForwardModel<B>>(
    model: &M,
    batch: &Batch<M::Input, M::Target>,
    max_rows: usize,
    threads: usize,
    cache: &PrefixCache,
) -> M::Output {
    let Batch { ids, input, .. } = batch;
    let (n, trained, shape) = (ids.len(), cache.trained(), input.row_shape());
    if trained.is_empty() || n == 0 || max_rows == 0 {
        return infer(model, input, n, max_rows, threads);
    }
    let passes = Passes::new(n, cache.get(ids, &shape, &trained), max_rows);
    let fresh: Vec<u64> = passes.fresh().iter().map(|&row| ids[row]).collect();
    let keep = cache.has_room(fresh.iter().copied());
    let mut stages = vec![];
    let probe = |prefix: Option<Prefix>, rows: usize| match prefix {
        Some(prefix) => Probe::resume(prefix),
        None if keep => Probe::trace(trained.clone(), None, false).with_row_check(rows, false),
        None => Probe::clean(),
    };
    let output = run(model, input, passes, threads, probe, |probe| stages.extend(probe.into_stages()));
    if keep {
        // the passes that begin with the input come first, and only they trace
        let places: Vec<usize> = (0..fresh.len()).collect();
        cache.insert(&fresh, &shape, &trained, &Stages::cat(stages, None, &places).frozen());
    }
    output
}

/// Runs passes in order and returns the outputs in the order of the batch.
///
/// `probe` makes the probe of each pass from what the pass begins with and its number of rows;
/// `seen` takes it afterwards.
fn run<B: Backend, M: ForwardModel<B>>(
    model: &M,
    input: &M::Input,
    passes: Passes,
    threads: usize,
    probe: impl Fn(Option<Prefix>, usize) -> Probe<B> + Sync,
    mut seen: impl FnMut(Probe<B>) + Send,
) -> M::Output {
    let mut outputs = Vec::with_capacity(passes.len());
    let context = (model.clone(), input.clone(), passes.clone());
    let work = |(model, input, passes): &(M, M::Input, Passes), job: usize| {
        let rows = passes.rows(job);
        let mut probe = probe(passes.prefix(job), rows.len());
        let output = model.forward(input.rows(rows), &mut probe);
        Ok((output, probe))
    };
    run_ordered(passes.len(), num_workers(model, threads), context, work, |_, (output, probe)| {
        outputs.push(output);
        seen(probe);
    })
    .expect("a plain pass gives no error");
    passes.in_order(outputs)
}
