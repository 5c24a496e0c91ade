//! Plain inference in chunks, on several threads, optionally from cached prefixes.

use burn::prelude::*;

use crate::batch::{Batch, Rows};
use crate::model::ForwardModel;
use crate::parallel::{balanced_chunk, num_workers, run_ordered};
use crate::probe::{Prefix, PrefixCache, Probe, Stages};

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
    passes(model, (input, rows), (max_rows, threads), None, |_| Probe::clean(), drop)
}

/// [`infer`] on a batch that is evaluated repeatedly, as after every epoch.
///
/// Stages in front of the first trained parameter run once per example. Later calls start from the
/// outputs that `cache` holds of them. A batch that does not fit the cache is evaluated in full.
///
/// The cache identifies examples by `batch.ids`. It must have been told which parameters are
/// trained; until then nothing is cached. All other parameters must keep their values, and every
/// trained one must be called through the probe.
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
    let (n, trained) = (batch.ids.len(), cache.trained());
    let prefix = cache.get(&batch.ids, &trained);
    if trained.is_empty() || prefix.is_none() && !cache.has_room(n) {
        return infer(model, &batch.input, n, max_rows, threads);
    }
    let cached = prefix.is_some();
    let mut stages = vec![];
    let trace = |prefix| Probe::trace(trained.clone(), prefix, false);
    let output = passes(model, (&batch.input, n), (max_rows, threads), prefix, trace, |probe| {
        stages.push(probe.traced().stages);
    });
    if !cached {
        cache.insert(&batch.ids, &trained, &Stages::cat(stages, None).frozen());
    }
    output
}

/// Runs the passes of [`infer`] in order.
///
/// `probe` makes the probe of each pass from its rows of `prefix`; `seen` takes it afterwards.
fn passes<B: Backend, M: ForwardModel<B>>(
    model: &M,
    (input, rows): (&M::Input, usize),
    (max_rows, threads): (usize, usize),
    prefix: Option<Prefix>,
    probe: impl Fn(Option<Prefix>) -> Probe<B> + Sync,
    mut seen: impl FnMut(Probe<B>) + Send,
) -> M::Output {
    assert!(rows > 0 && max_rows > 0, "{rows} rows, at most {max_rows} at a time: both must be at least 1");
    let width = balanced_chunk(rows, max_rows);
    let mut outputs = Vec::with_capacity(rows.div_ceil(width));
    let context = (model.clone(), input.clone(), prefix);
    let work = |(model, input, prefix): &(M, M::Input, Option<Prefix>), job: usize| {
        let index: Vec<usize> = (job * width..rows.min((job + 1) * width)).collect();
        let mut probe = probe(prefix.as_ref().map(|p| p.rows(&index)));
        let output = model.forward(input.rows(&index), &mut probe);
        Ok((output, probe))
    };
    run_ordered(rows.div_ceil(width), num_workers(model, threads), context, work, |_, (output, probe)| {
        outputs.push(output);
        seen(probe);
    })
    .expect("a plain pass gives no error");
    M::Output::cat(outputs)
}
