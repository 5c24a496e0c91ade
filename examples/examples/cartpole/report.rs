//! What the program says of its runs: a table, a picture, and the files.

use std::time::Instant;

use anyhow::Result;
use flops_examples::experiment::{Spread, print_table};
use flops_examples::plot::{Panel, Series, panels};
use flops_examples::run::artifacts::Artifacts;
use serde::Serialize;
use serde_json::{Map, json};

use crate::args::{Args, Method};

/// A look at a run: a row of `returns.csv`.
#[derive(Clone, Debug, Serialize)]
pub struct Look {
    pub method: Method,
    pub seed: u64,
    /// Episodes of training so far.
    pub episodes: u64,
    /// Seconds of training so far.
    pub seconds: f64,
    /// Over 100 episodes.
    pub mean_return: f64,
    pub solved: bool,
    /// Over 1,000 others, once solved.
    pub on_others: Option<f64>,
}

/// Prints the table and writes the files.
pub fn finish(args: &Args, artifacts: &Artifacts, started: Instant, looks: &[Look]) -> Result<()> {
    let (mut table, mut methods, mut drawn) = (vec![], Map::new(), vec![]);
    for &method in &args.methods {
        let mine = |seed: u64| looks.iter().filter(move |look| look.method == method && look.seed == seed);
        let seeds = args.experiment.seeds()?;
        let last: Vec<&Look> = seeds.iter().filter_map(|&seed| mine(seed).next_back()).collect();
        let solved: Vec<&Look> = last.iter().filter(|look| look.solved).copied().collect();
        let spread = |value: fn(&Look) -> f64| Spread::of(&solved.iter().map(|look| value(look)).collect::<Vec<_>>());
        let others = spread(|look| look.on_others.unwrap_or(f64::NAN));
        let (episodes, seconds) = (spread(|look| look.episodes as f64), spread(|look| look.seconds));
        let most = solved.iter().map(|look| look.episodes).max();
        let text = |spread: Spread, decimals| if solved.is_empty() { "".into() } else { spread.text(decimals) };
        table.push(vec![
            method.to_string(),
            format!("{} of {}", solved.len(), last.len()),
            text(episodes, 0),
            most.map_or_else(String::new, |most| most.to_string()),
            text(seconds, 1),
            text(others, 0),
        ]);
        let figures = json!({
            "solved": solved.len(), "runs": last.len(), "episodes": episodes, "most_episodes": most,
            "seconds": seconds, "return_on_others": others,
            "last_return": last.iter().map(|look| look.mean_return).collect::<Vec<_>>(),
        });
        methods.insert(method.to_string(), figures);
        let line = |seed: u64| {
            Series::new(format!("seed {seed}"), mine(seed).map(|look| (look.episodes as f64, look.mean_return)))
        };
        drawn.push(Panel {
            title: method.to_string(),
            axes: ("episodes of training".into(), "mean return of 100 episodes".into()),
            log: (false, false),
            series: seeds.iter().take(8).map(|&seed| line(seed)).collect(),
        });
    }
    println!(
        "σ = {} (openai-es {}), lr = {}, {} episodes a batch, {} queries each",
        args.sigma, args.es_sigma, args.lr, args.batch_size, args.queries
    );
    let header = ["method", "solved", "episodes to solve", "at most", "seconds", "return on 1,000 others"];
    print_table(&header, &table);
    artifacts.write_csv("returns.csv", looks)?;
    artifacts.write("returns.svg", panels("CartPole: returns by episodes of training", &drawn)?.as_bytes())?;
    let settings = json!({
        "sigma": args.sigma, "es_sigma": args.es_sigma, "lr": args.lr, "batch_size": args.batch_size, "queries": args.queries,
        "episodes": args.episodes(), "methods": methods,
    });
    args.experiment.finish(artifacts, started, settings, "returns.svg, returns.csv")
}
