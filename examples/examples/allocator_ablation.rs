//! Allocators and estimates of the variance compared on a small ViT: the error of the gradient along one trajectory, and training on their own.
//!
//! ```text
//! cargo run --release --example allocator_ablation                                   # head, 5 seeds, minutes
//! cargo run --release --example allocator_ablation -- --scope cls_tail --queries 4   # another scope and budget
//! cargo run --release --example allocator_ablation -- --full                         # 1,500 steps of everything
//! ```
//!
//! 1. *Along uniform's trajectory.* A run with equal shares moves θ. On the same batches every contender, with state of its own, draws its
//!    allocation and estimates the gradient, which is compared with autodiff's. The last contender is told the variances that 96 further queries
//!    per datum show: the integer Neyman allocation with known variances. Expected errors are by these same variances, which flatters
//!    that contender a little.
//! 2. *On its own.* Each contender trains from the same start, at the same budget.
//! 3. *By depth.* The second moment of a query on each layer of the whole model, by depth.
// devices are `Copy` on some backends only
#![allow(clippy::clone_on_copy)]

use std::collections::BTreeMap;
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use flops_core::allocator::AllocatorKind;
use flops_core::{ControlVariate, ForwardConfig, QueryBudget, StepReport, VarianceEstimate};
use flops_examples::cli;
use flops_examples::experiment::{Common, Progress, Spread, print_table};
use flops_examples::lab::{Lab, LabArgs, Optim, Run, Schedule, estimate, observe, squared_distance};
use flops_examples::plot::{Panel, Series, panels};
use flops_vit::Scope;
use serde::Serialize;
use serde_json::{Map, Value, json};

/// Compare allocators and estimates of the variance at equal budget.
#[derive(Parser, Debug)]
#[command(name = "allocator_ablation", version)]
struct Args {
    #[command(flatten)]
    common: Common,
    #[command(flatten)]
    lab: LabArgs,
    /// Queries per datum.
    #[arg(long, default_value_t = 20)]
    queries: usize,
    /// Data of a batch.
    #[arg(long, default_value_t = 64)]
    batch_size: usize,
    /// Steps of each run [default: 300, with --full 1,500].
    #[arg(long)]
    steps: Option<usize>,
    /// Steps between looks at the error of the gradient [default: 5 of them].
    #[arg(long, default_value_t = 5)]
    every: usize,
    /// Learning rate of AdamW.
    #[arg(long, default_value_t = 5e-3)]
    lr: f64,
    /// Allocators to compare uniform with; the estimates of the variance are compared for each of them.
    #[arg(long, value_delimiter = ',', default_values_t = ["neyman", "gaussian", "bernoulli"].map(String::from))]
    contenders: Vec<String>,
    /// Estimates of the variance to compare: running, loss, pilot:N [default: those, with a quarter of the queries as pilots].
    #[arg(long, value_delimiter = ',')]
    estimates: Vec<VarianceEstimate>,
    /// How the learning rate changes: under a falling one the final loss shows little of the gradient's variance.
    #[arg(long, value_enum, default_value = "constant")]
    schedule: Schedule,
    /// What is subtracted from the queries' coefficients besides the clean loss: none or feedback [default: the library's].
    #[arg(long)]
    control_variate: Option<ControlVariate>,
    /// Leave the training runs out.
    #[arg(long)]
    trajectory_only: bool,
    /// Leave the trajectory out.
    #[arg(long)]
    training_only: bool,
}

/// The contender that is told the variances.
const KNOWN: &str = "neyman, variances known";
/// Queries per datum that show them.
const ASSAY: usize = 96;
/// Keeps the noise of contenders apart.
const SALT: u64 = 1 << 32;

/// Name, allocator and estimate; uniform first.
type Contender = (String, AllocatorKind, VarianceEstimate);

fn contenders(args: &Args) -> Result<Vec<Contender>> {
    let mut estimates = args.estimates.clone();
    if estimates.is_empty() {
        estimates = vec![VarianceEstimate::Running, VarianceEstimate::Loss];
        if args.queries > 3 {
            estimates.push(VarianceEstimate::Pilot(args.queries / 4));
        }
    }
    let mut list = vec![("uniform".to_string(), AllocatorKind::Uniform, VarianceEstimate::Running)];
    for estimate in estimates {
        for name in &args.contenders {
            let kind: AllocatorKind = name.parse()?;
            if kind != AllocatorKind::Uniform {
                list.push((format!("{name}, {estimate}"), kind, estimate));
            }
        }
    }
    Ok(list)
}

/// A row of `trajectory.csv`.
#[derive(Clone, Serialize)]
struct Look {
    seed: u64,
    step: usize,
    contender: String,
    /// ‖ĝ − g‖², g by autodiff.
    squared_error: f64,
    /// Its expectation by the variances the assay shows, Σ_j v_j/A_j/B²; of pilots, which have another, none.
    expected: Option<f64>,
    /// ‖g‖².
    squared_norm: f64,
}

/// A row of `training.csv`.
#[derive(Clone, Serialize)]
struct Trained {
    seed: u64,
    contender: String,
    /// Mean training loss of the last tenth of the steps.
    loss: f64,
    test_loss: f64,
    test_accuracy: f64,
    /// Mean over the steps.
    relative_variance: f64,
    ceiling: f64,
}

/// A row of `curves.csv`: the training loss of a stretch of steps.
#[derive(Clone, Serialize)]
struct Point {
    seed: u64,
    contender: String,
    queries: u64,
    loss: f64,
}

fn config(args: &Args, seed: u64, estimate: VarianceEstimate) -> Result<ForwardConfig> {
    let config = ForwardConfig::new(QueryBudget::new(args.queries, 1)?).with_seed(seed).with_variance(estimate);
    Ok(match args.control_variate {
        Some(control_variate) => config.with_control_variate(control_variate),
        None => config,
    })
}

/// B² times the variance of a step's estimate, by the assay's variances.
fn expected(known: &[f64], report: &StepReport) -> f64 {
    known.iter().zip(&report.data).map(|(v, datum)| v / datum.queries as f64).sum()
}

fn trajectory(
    args: &Args,
    lab: &mut Lab,
    seed: u64,
    steps: usize,
    looks: &mut Vec<Look>,
    progress: &mut Progress,
) -> Result<()> {
    let learner = |lab: &Lab, kind, estimate, salt: u64, queries: usize| {
        let base = config(args, seed + salt * SALT, estimate)?;
        let base = if queries == args.queries {
            base
        } else {
            ForwardConfig { budget: QueryBudget::new(queries, 1)?, ..base }
        };
        lab.learner(lab.model(seed), base, kind)
    };
    let mut leader = Run::new(
        learner(lab, AllocatorKind::Uniform, VarianceEstimate::Running, 0, args.queries)?,
        Optim::adam(),
        args.lr,
        steps,
    )
    .with_schedule(args.schedule);
    let mut others = vec![];
    for (i, (name, kind, estimate)) in contenders(args)?.into_iter().enumerate() {
        others.push((name, estimate, learner(lab, kind, estimate, 1 + i as u64, args.queries)?));
    }
    let mut known = lab.informed(lab.model(seed), config(args, seed + 100 * SALT, VarianceEstimate::Running)?)?;
    let mut assay = learner(lab, AllocatorKind::Uniform, VarianceEstimate::Running, 101, ASSAY)?;
    let mut batches = lab.batches(args.batch_size, seed)?;
    for step in 0..steps {
        progress.at(step, steps, || format!("seed {seed}, along uniform's trajectory"));
        let batch = batches.next().context("there are no images")?;
        let looking = step % args.every == 0;
        let model = leader.learner.model.clone();
        let truth = looking.then(|| lab.true_gradient(&model, &batch));
        // the assay has a control variate of its own, learned at the looks alone
        assay.model = model.clone();
        let assayed = if looking {
            let (grads, report) = estimate(&assay, batch.clone())?;
            assay = observe(assay, grads);
            Some(report.data.iter().map(|d| d.second_moment).collect::<Vec<f64>>())
        } else {
            None
        };
        let square = (batch.ids.len() as f64).powi(2);
        let mut look = |name: &str, grads: &_, report: &StepReport, pilots: bool| {
            let (Some(truth), Some(assayed)) = (&truth, &assayed) else { return };
            let (squared_error, squared_norm) = squared_distance(&model, grads, truth);
            let expected = (!pilots).then(|| expected(assayed, report) / square);
            looks.push(Look { seed, step, contender: name.to_string(), squared_error, expected, squared_norm });
        };
        others = others
            .into_iter()
            .map(|(name, variance, mut contender)| {
                contender.model = model.clone();
                let (grads, report) = estimate(&contender, batch.clone())?;
                look(&name, &grads, &report, matches!(variance, VarianceEstimate::Pilot(_)));
                Ok((name, variance, observe(contender, grads)))
            })
            .collect::<Result<_>>()?;
        known.model = model.clone();
        if let Some(assayed) = &assayed {
            known.allocator.tell(assayed.clone());
        }
        let (grads, report) = estimate(&known, batch.clone())?;
        look(KNOWN, &grads, &report, false);
        known = observe(known, grads);
        (leader, _) = leader.step(batch)?;
    }
    Ok(())
}

fn training(
    args: &Args,
    lab: &Lab,
    seed: u64,
    steps: usize,
    (rows, points): (&mut Vec<Trained>, &mut Vec<Point>),
    progress: &mut Progress,
) -> Result<()> {
    let list = contenders(args)?;
    let all = list.len();
    for (i, (contender, kind, estimate)) in list.into_iter().enumerate() {
        progress.at(i, all, || format!("seed {seed}, training with {contender}"));
        let learner = lab.learner(lab.model(seed), config(args, seed, estimate)?, kind)?;
        let mut batches = lab.batches(args.batch_size, seed)?;
        let (mut relative, mut ceiling, mut stretch) = (vec![], vec![], vec![]);
        let width = (steps / 30).max(1);
        let (run, loss) = Run::new(learner, Optim::adam(), args.lr, steps).with_schedule(args.schedule).finish(
            &mut batches,
            |done, report| {
                relative.push(report.allocation.relative_variance);
                ceiling.push(report.allocation.ceiling);
                stretch.push(report.loss);
                if done % width == 0 {
                    let loss = Spread::of(&stretch).mean;
                    points.push(Point { seed, contender: contender.clone(), queries: report.queries_total, loss });
                    stretch.clear();
                }
            },
        )?;
        let (test_loss, test_accuracy) = lab.evaluate(&run.learner.model)?;
        rows.push(Trained {
            seed,
            contender,
            loss,
            test_loss,
            test_accuracy,
            relative_variance: Spread::of(&relative).mean,
            ceiling: Spread::of(&ceiling).mean,
        });
    }
    Ok(())
}

/// (depth, name, second moment of a query there over that of the last layer) of the whole model.
fn depth(args: &Args, seed: u64) -> Result<Vec<(usize, f64)>> {
    let data = LabArgs { scope: Scope::Full, limit: Some(args.lab.limit.unwrap_or(64).min(64)), ..args.lab.clone() };
    let lab = Lab::open(&data, args.common.threads()?)?;
    // without the learned control variate, which knows narrow layers only
    let estimator =
        ForwardConfig::new(QueryBudget::new(8, 1)?).with_seed(seed).with_control_variate(ControlVariate::None);
    let learner = lab.learner(lab.model(seed), estimator, AllocatorKind::Uniform)?;
    let mut batches = lab.batches(16, seed)?;
    // each direction falls on one layer, and shows its own second moment
    let (mut learner, mut sums) = (learner, vec![]);
    for _ in 0..if args.common.full { 24 } else { 6 } {
        let (grads, _) = estimate(&learner, batches.next().context("there are no images")?)?;
        learner = observe(learner, grads);
        sums = learner.state().sites.moments();
    }
    Ok(sums.into_iter().enumerate().collect())
}

fn run(args: Args) -> Result<()> {
    ensure!(args.every > 0, "--every 0: look at least at every 1");
    ensure!(args.lr > 0.0 && args.lr <= 1.0, "--lr {}: use a number above 0 and at most 1", args.lr);
    let steps = args.steps.unwrap_or(if args.common.full { 1500 } else { 300 });
    ensure!(steps > 0, "--steps 0: use at least 1");
    let seeds = args.common.seeds()?;
    let list = contenders(&args)?;
    for (_, _, estimate) in &list {
        config(&args, 0, *estimate)?.validate()?;
    }
    let artifacts = args.common.artifacts("allocator_ablation")?;
    let mut lab = Lab::open(&args.lab, args.common.threads()?)?;
    let mut progress = Progress::default();
    let (mut looks, mut trained, mut points) = (vec![], vec![], vec![]);
    for &seed in &seeds {
        if !args.training_only {
            trajectory(&args, &mut lab, seed, steps, &mut looks, &mut progress)?;
        }
        if !args.trajectory_only {
            training(&args, &lab, seed, steps, (&mut trained, &mut points), &mut progress)?;
        }
    }
    let by_depth = if args.training_only || args.trajectory_only { vec![] } else { depth(&args, seeds[0])? };

    let mut names: Vec<String> = list.iter().map(|c| c.0.clone()).collect();
    names.push(KNOWN.into());
    let uniform = names[0].clone();
    // every look counts alike: it is measured against what uniform's error is expected to be there
    let unit: BTreeMap<(u64, usize), f64> =
        looks.iter().filter(|l| l.contender == uniform).filter_map(|l| Some(((l.seed, l.step), l.expected?))).collect();
    let ratio = |name: &str, late: bool, of: &dyn Fn(&Look) -> Option<f64>| -> Option<Spread> {
        let sum = |seed: u64, name: &str| -> Option<f64> {
            let mine = looks.iter().filter(|l| l.seed == seed && l.contender == name && (!late || l.step >= steps / 2));
            let values: Option<Vec<f64>> = mine.map(|l| Some(of(l)? / unit.get(&(seed, l.step))?)).collect();
            values.filter(|v| !v.is_empty()).map(|v| v.iter().sum())
        };
        let ratios: Option<Vec<f64>> = seeds.iter().map(|&s| Some(sum(s, name)? / sum(s, &uniform)?)).collect();
        ratios.map(|r| Spread::of(&r))
    };
    let sampled = |l: &Look| Some(l.squared_error);
    let text = |s: Option<Spread>| s.map_or("–".into(), |s| s.text(3));
    println!(
        "{}, scope {}, {} queries per datum, {steps} steps, {} seeds",
        args.lab.dataset,
        args.lab.scope,
        args.queries,
        seeds.len()
    );
    if !looks.is_empty() {
        println!("\nsquared error of the gradient along uniform's trajectory, over uniform's");
        let rows: Vec<Vec<String>> = names
            .iter()
            .map(|name| {
                vec![
                    name.clone(),
                    text(ratio(name, false, &sampled)),
                    text(ratio(name, true, &sampled)),
                    text(ratio(name, false, &|l| l.expected)),
                    text(ratio(name, true, &|l| l.expected)),
                ]
            })
            .collect();
        print_table(&["allocator, estimate", "measured", "second half", "expected", "second half"], &rows);
    }
    let finals = |name: &str, of: &dyn Fn(&Trained) -> f64| -> Vec<f64> {
        trained.iter().filter(|t| t.contender == name).map(of).collect()
    };
    let wins = |name: &str| {
        finals(name, &|t| t.loss).iter().zip(finals(&uniform, &|t| t.loss)).filter(|(a, b)| *a < b).count()
    };
    if !trained.is_empty() {
        println!("\ntraining on its own");
        let rows: Vec<Vec<String>> = names[..names.len() - 1]
            .iter()
            .map(|name| {
                let spread = |of: &dyn Fn(&Trained) -> f64| Spread::of(&finals(name, of));
                vec![
                    name.clone(),
                    spread(&|t| t.loss).text(4),
                    format!("{} of {}", wins(name), seeds.len()),
                    spread(&|t| t.test_loss).text(4),
                    spread(&|t| 100.0 * t.test_accuracy).text(1),
                    spread(&|t| t.relative_variance).text(3),
                ]
            })
            .collect();
        print_table(
            &["allocator, estimate", "train loss", "below uniform", "test loss", "test accuracy, %", "variance"],
            &rows,
        );
    }
    if !by_depth.is_empty() {
        println!("\nsecond moment of a query by depth, over that of the last layer");
        let last = by_depth.last().map_or(1.0, |d| d.1);
        let rows: Vec<Vec<String>> =
            by_depth.iter().map(|(layer, m)| vec![layer.to_string(), format!("{:.3e}", m / last)]).collect();
        print_table(&["layer, from the input", "relative second moment"], &rows);
    }

    // a stretch of the trajectory as one point: expected errors where they are known, which scatter less
    let width = (steps / 20).max(1);
    let stretch = |i: usize, name: &str, expected: bool| -> f64 {
        let mine = looks.iter().filter(|l| l.step / width == i && l.contender == name);
        mine.map(|l| if expected { l.expected.unwrap_or(f64::NAN) } else { l.squared_error }).sum()
    };
    let stretches = |name: &str| -> Vec<(f64, f64)> {
        let expected = looks.iter().any(|l| l.contender == name && l.expected.is_some());
        let ratio = |i: usize| stretch(i, name, expected) / stretch(i, &uniform, expected);
        let points = (0..steps.div_ceil(width)).map(|i| ((i * width + width / 2) as f64, ratio(i)));
        points.filter(|(_, r)| r.is_finite()).collect()
    };
    let shown = ["uniform", "neyman, running", "gaussian, running", "bernoulli, running", KNOWN];
    let mut pictures = vec![];
    if !looks.is_empty() {
        pictures.push(Panel {
            title: "error of the gradient along uniform's trajectory".into(),
            axes: ("step".into(), "squared error over uniform's".into()),
            log: (false, false),
            series: shown.iter().map(|name| Series::new(*name, stretches(name))).collect(),
        });
    }
    if !points.is_empty() {
        let curve = |name: &&str| {
            let mut sums: Vec<(u64, Vec<f64>)> = vec![];
            for p in points.iter().filter(|p| p.contender == **name) {
                match sums.iter_mut().find(|s| s.0.abs_diff(p.queries) <= (args.batch_size * args.queries) as u64) {
                    Some(sum) => sum.1.push(p.loss),
                    None => sums.push((p.queries, vec![p.loss])),
                }
            }
            Series::new(name.to_string(), sums.into_iter().map(|(q, l)| (q as f64, Spread::of(&l).mean)))
        };
        pictures.push(Panel {
            title: "training on its own".into(),
            axes: ("queries".into(), "training loss".into()),
            log: (false, true),
            series: shown[..4].iter().map(curve).collect(),
        });
    }
    if !by_depth.is_empty() {
        let last = by_depth.last().map_or(1.0, |d| d.1);
        pictures.push(Panel {
            title: "second moment of a query by depth".into(),
            axes: ("layer, from the input".into(), "over the last layer's".into()),
            log: (false, true),
            series: vec![Series::new("second moment", by_depth.iter().map(|(l, m)| (*l as f64, m / last)))],
        });
    }
    let title = format!("{}, {}, {} queries per datum", args.lab.dataset, args.lab.scope, args.queries);
    artifacts.write("ablation.svg", panels(&title, &pictures)?.as_bytes())?;
    artifacts.write_csv("trajectory.csv", &looks)?;
    artifacts.write_csv("training.csv", &trained)?;
    artifacts.write_csv("curves.csv", &points)?;
    let per_contender = |of: &dyn Fn(&str) -> Value| -> Map<String, Value> {
        names.iter().map(|name| (name.clone(), of(name))).collect()
    };
    let figures = json!({
        "dataset": args.lab.dataset.to_string(),
        "scope": args.lab.scope.to_string(),
        "queries": args.queries,
        "batch_size": args.batch_size,
        "steps": steps,
        "lr": args.lr,
        "schedule": args.schedule.name(),
        "control_variate": config(&args, 0, VarianceEstimate::Running)?.control_variate,
        "squared_error_over_uniform": per_contender(&|n| json!({
            "measured": ratio(n, false, &sampled),
            "measured_second_half": ratio(n, true, &sampled),
            "expected": ratio(n, false, &|l| l.expected),
            "expected_second_half": ratio(n, true, &|l| l.expected),
        })),
        "training": per_contender(&|n| json!({
            "loss": finals(n, &|t| t.loss),
            "test_loss": finals(n, &|t| t.test_loss),
            "test_accuracy": finals(n, &|t| t.test_accuracy),
            "relative_variance": finals(n, &|t| t.relative_variance),
            "below_uniform": wins(n),
        })),
        "second_moment_by_layer": by_depth.iter().map(|d| d.1).collect::<Vec<_>>(),
    });
    args.common.finish(
        &artifacts,
        progress.started(),
        figures,
        "ablation.svg, trajectory.csv, training.csv, curves.csv",
    )
}

fn main() -> ExitCode {
    cli::run(run)
}
