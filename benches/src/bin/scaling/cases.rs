//! The steps that are modelled: those that were measured, and larger ones.

use flops_benches::{micro, multiply_adds};
use flops_distributed::SumMode;
use flops_vit::ViTConfig;
use serde::Serialize;

use crate::args::Args;
use crate::measure::Figures;
use crate::model::{Cut, Link, Network, Sums, Work};
use crate::task::{Engine, Noise};

/// Numbers of workers that are modelled.
pub const WORKERS: [usize; 11] = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024];
/// Seconds of a coordinate of a direction on a GPU.
const ON_GPU: f64 = 7.5e-11;

/// What was measured on this machine.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Machine {
    /// Seconds of a value of normal noise, on the host.
    pub gaussian: f64,
}

/// What the model says of a step.
#[derive(Clone, Debug, Serialize)]
pub struct Modelled {
    /// The step.
    pub work: Work,
    /// How workers come by sums.
    pub sums: Sums,
    /// What connects them.
    pub link: Link,
    /// Whether the step was measured here.
    pub measured: bool,
    /// How many times as fast as one [these workers](WORKERS) are.
    pub speedup: [f64; 11],
}

/// The network for the model: what was measured, with the hops and the bandwidth of the flags.
pub fn network(args: &Args, of_link: (f64, f64), log: (f64, (f64, f64))) -> Network {
    let (hop, bandwidth) = (1e-6 * args.hop, args.gigabits * 1e9 / 8.0);
    Network { hop: of_link.0 + hop, bandwidth: bandwidth.min(of_link.1), entry: log.0 + 2.0 * hop, serve: log.1 }
}

/// The name of a step that was measured.
fn name(figures: &Figures) -> String {
    format!("micro {}", figures.steps.scope)
}

/// A step as it was measured on one process.
pub fn measured(figures: &Figures, machine: &Machine, answer: f64) -> Work {
    let (steps, trained) = (&figures.steps, figures.trained as f64);
    let seconds = |phase: &str| figures.phases.get(phase).map_or(0.0, |phase| 1e-3 * phase.jobs);
    let (examples, queries) = (steps.batch as f64, steps.queries as f64);
    let cut = match (steps.noise, steps.scope.as_str()) {
        (Noise::Activations, "full") => Cut::Own,
        (Noise::Activations, _) => Cut::OwnBehindPrefix,
        (Noise::Weights, "full") => Cut::Directions,
        (Noise::Weights, _) => Cut::Examples,
    };
    let draw = if cut.is_own() { 0.0 } else { machine.gaussian };
    let per_update = if cut.is_own() { examples } else { queries * trained };
    let row = (seconds("query") - queries * trained * draw).max(0.0) / (examples * queries);
    Work {
        name: name(figures),
        cut,
        examples: steps.batch,
        queries: steps.queries,
        trained,
        rows: (seconds("clean") / examples, row),
        draw,
        update: seconds("update") / per_update,
        rest: 1e-3 * figures.rest,
        answer,
    }
}

/// Bytes of the result of a query, from what two workers or more send in a step in scalars.
pub fn answer(figures: &[Figures]) -> f64 {
    let scalars = |f: &&Figures| f.workers > 1 && f.sums == SumMode::Scalars;
    figures.iter().find(scalars).map_or(8.0, |f| {
        let queries = (f.steps.batch * f.steps.queries) as f64;
        (f.bytes.0 * f.workers as f64 / queries).max(8.0)
    })
}

/// Larger steps, from those of vit_micro on the same thread.
///
/// Rows of ViT-B take as many times longer as it has multiply-adds. The seconds of others are
/// given: a direction of the head takes 50 ms, of adapters 200 ms, and on a GPU 0.2 s or 1 s.
pub fn larger(of: &[Work], machine: &Machine) -> Vec<Work> {
    let base = ViTConfig::vit_base_patch16_224().with_num_classes(10);
    let larger = multiply_adds(&base) / multiply_adds(&micro(6));
    let find = |cut: &[Cut], name: &str| of.iter().find(|work| cut.contains(&work.cut) && work.name == name);
    let mut all = vec![];
    let shared = [Cut::Examples, Cut::Directions];
    if let Some(full) = find(&shared, "micro full").or(find(&shared, "micro cls_tail")) {
        let given = |name: &str, cut, (examples, queries): (usize, usize), trained: f64, direction: f64| {
            let row = direction / examples as f64;
            let (rows, name, rest) = ((row, row), name.to_string(), full.rest * trained / full.trained);
            let (draw, update) = (machine.gaussian, full.update);
            Work { name, cut, examples, queries, trained, rows, draw, update, rest, answer: 8.0 }
        };
        let on_gpu = |work: Work| Work { draw: ON_GPU, update: ON_GPU, rest: 1e-11 * work.trained, ..work };
        all.push(given("head 10k", Cut::Examples, (64, 32), 1e4, 0.05));
        all.push(given("LoRA 300k", Cut::Examples, (64, 64), 3e5, 0.2));
        all.push(given("ViT-B 86M", Cut::Directions, (64, 64), 86e6, 64.0 * full.rows.1 * larger));
        all.push(on_gpu(given("ViT-B 86M, GPU", Cut::Directions, (256, 1024), 86e6, 0.2)));
        all.push(on_gpu(given("7B LoRA 20M, GPU", Cut::Examples, (16, 64), 20e6, 1.0)));
    }
    for (scope, name, trained) in [("micro cls_tail", "ViT-B cls_tail 1M", 1e6), ("micro full", "ViT-B all 86M", 86e6)]
    {
        if let Some(micro) = find(&[Cut::Own, Cut::OwnBehindPrefix], scope) {
            all.push(Work {
                name: name.into(),
                examples: 1024,
                queries: 20,
                trained,
                rows: (micro.rows.0 * larger, micro.rows.1 * larger),
                update: micro.update * larger,
                rest: micro.rest * trained / micro.trained,
                ..micro.clone()
            });
        }
    }
    all
}

/// What the model says of all of them.
pub fn modelled(measured: &[Work], larger: &[Work], networks: &[(Link, Network)]) -> Vec<Modelled> {
    let mut all = vec![];
    for (works, is_measured) in [(measured, true), (larger, false)] {
        for (work, (link, network)) in works.iter().flat_map(|work| networks.iter().map(move |of| (work, of))) {
            for sums in [Sums::Scalars, Sums::Gradients] {
                let speedup = WORKERS.map(|workers| work.speedup(workers, sums, *link, network));
                all.push(Modelled { work: work.clone(), sums, link: *link, measured: is_measured, speedup });
            }
        }
    }
    all
}

/// Whether these are the figures of two workers that the model can be compared with.
pub fn same_as(figures: &Figures, modelled: &Modelled) -> bool {
    let sums = match figures.sums {
        SumMode::Scalars => Sums::Scalars,
        SumMode::Gradients => Sums::Gradients,
        // which of the two is not known
        SumMode::Auto => return false,
    };
    let is_own = modelled.work.cut.is_own();
    let is_same_step = name(figures) == modelled.work.name && is_own == (figures.steps.noise == Noise::Activations);
    let is_same_link = match modelled.link {
        Link::Mpi => figures.engine == Engine::Mpi,
        Link::Log => matches!(figures.engine, Engine::Hub | Engine::Nats),
    };
    modelled.measured && figures.workers == 2 && sums == modelled.sums && is_same_step && is_same_link
}
