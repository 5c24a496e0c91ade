//! A text encoder fine-tuned as a classifier: forward-only, by MeZO and by backpropagation.
//!
//! ```text
//! cargo run --release --example text
//! cargo run --release --example text -- --text MINILM --row-forwards 20000
//! cargo run --release --example text -- --text MINILM --csv my.csv
//! ```
//!
//! Without flags the encoder is the small one that `flops-multimodal` ships. It is to tell whether the
//! thing in a caption is either small or patterned, but not both. With `--text`, a folder of a BERT
//! sentence encoder such as all-MiniLM-L6-v2, the texts are embedded sentences of reviews, negative or
//! positive. `--csv` takes texts of one's own.
//!
//! Texts have different lengths. They are padded to the longest of their batch, and padding is masked.
//! What is measured stays; the classifiers do not. All methods spend the same row-forwards: the passes of a text through the encoder, where a backward
//! pass counts as two.
// devices are `Copy` on some backends only
#![allow(clippy::clone_on_copy)]

#[macro_use]
extern crate flops_report;

mod args;
mod method;
mod report;
mod trainee;
mod trial;

use std::process::ExitCode;

use anyhow::Result;
use flops_examples::backend;
use flops_examples::cli;
use flops_examples::experiment::Progress;

use flops_vit::Sites;

use args::Args;
use trial::{Look, Subject, Trial};

fn run(args: Args) -> Result<()> {
    args.check()?;
    let (seeds, device) = (args.experiment.seeds()?, backend::device()?);
    let artifacts = args.experiment.artifacts("text")?;
    let subject = Subject::open(&args, device)?;
    for &scope in &args.scopes {
        // before hours are spent on those in front of it
        subject.classifier(scope, Sites::default(), 0)?;
    }
    println!("{}", subject.described());
    let runs = args.scopes.iter().flat_map(|&scope| args.methods.iter().map(move |&method| (scope, method)));
    let runs: Vec<_> = runs.flat_map(|(scope, method)| seeds.iter().map(move |&seed| (scope, method, seed))).collect();
    let (mut progress, mut looks) = (Progress::default(), Vec::<Look>::new());
    for (done, &(scope, method, seed)) in runs.iter().enumerate() {
        let trial = Trial { args: &args, subject: &subject, scope, method, seed };
        let tell = |share: f64, accuracy: f64| {
            let share = 100.0 * share.min(1.0);
            progress.at(done, runs.len(), || {
                format!("{scope}, {method}, seed {seed}: {share:.0} %, test accuracy {accuracy:.1} %")
            });
        };
        looks.extend(trial.run(tell)?);
        // what has been measured stays, wherever a later run ends
        artifacts.write_csv("text.csv", &looks)?;
    }
    report::write(&args, &subject, &looks, &artifacts, progress.started())
}

fn main() -> ExitCode {
    cli::run(run)
}
