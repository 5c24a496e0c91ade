//! What a run leaves: its files and its table.

use anyhow::Result;
use flops_examples::BURN_VERSION;
use flops_examples::backend::B;
use flops_examples::run::artifacts::merge;
use flops_examples::run::curves::Curves;
use flops_examples::run::fit::TrainedRun;
use flops_examples::run::format::thousands;
use flops_examples::run::history::{History, Row, Split};
use flops_examples::run::workers::worker::Worker;
use flops_vit::checkpoint::{Card, Pretrained};
use flops_vit::{Pool, ViT};
use serde_json::{Value, json};

use crate::args::Args;
use crate::model::evaluate;
use crate::training::Run;

/// The folder of the model for `transformers`.
const FOLDER: &str = "huggingface";
/// The file of the adapters and the head that `lora:R` trained.
const ADAPTERS: &str = "adapters.safetensors";

impl Run<'_> {
    /// Evaluates the trained model, writes the files of the run and prints its table.
    pub fn report(&self, trained: TrainedRun<ViT<B>>, before: &Row, mut card: Card) -> Result<()> {
        let (loss, accuracy) = evaluate(&trained.learner, &*self.data.test, self.config.estimator.threads);
        let summary = self.summary(&trained, before, (loss, accuracy));
        let args = &self.args;
        card.description = format!(
            "{}; fine-tuned on {} ({}, scope {}, {} epochs, seed {}): test accuracy {:.2} %",
            card.description,
            args.dataset,
            args.method.name(),
            args.scope,
            epochs_done(&trained.history),
            args.seed,
            100.0 * accuracy
        );
        let more = self.save_model(&Pretrained { model: trained.learner, card })?;
        trained.history.write(&self.artifacts)?;
        let title = format!("{}, scope {}, {}", args.dataset, args.scope, args.description());
        let curves = Curves::of(&trained.history).beside(self.beside.as_ref()).with_variance(self.knows_variance());
        self.artifacts.write("curves.svg", curves.draw(&title)?.as_bytes())?;
        self.artifacts.write_json("summary.json", &summary)?;
        print_table(args, &summary);
        if let Some(tally) = self.worker.and_then(Worker::tally) {
            tally.print();
        }
        println!(
            "\n{} holds summary.json, metrics.csv, curves.svg{more} and model.safetensors",
            self.artifacts.dir().display()
        );
        Ok(())
    }

    /// Whether it is known what uniform allocation would give: the noise is independent between the images.
    fn knows_variance(&self) -> bool {
        self.args.method.is_forward() && self.config.estimator.space.is_independent()
    }

    /// Saves the model, and returns the names of the other forms that were saved.
    pub fn save_model(&self, tuned: &Pretrained<B>) -> Result<String> {
        let mut more = String::new();
        tuned.save(&self.artifacts.path("model.safetensors"))?;
        let folder = tuned.card.config.pool == Pool::Token;
        if folder {
            tuned.save_huggingface(&self.artifacts.path(FOLDER))?;
        }
        if tuned.model.lora_rank().is_some() {
            tuned.save_adapters(&self.artifacts.path(ADAPTERS))?;
            more += &format!(", {ADAPTERS}");
        }
        if folder {
            more += &format!(", the folder {FOLDER} for transformers");
        }
        Ok(more)
    }

    /// Returns what `summary.json` holds.
    pub fn summary(&self, trained: &TrainedRun<ViT<B>>, before: &Row, (loss, accuracy): (f64, f64)) -> Value {
        let (history, settings) = (&trained.history, &self.settings);
        let (forward, independent) = (self.args.method.is_forward(), self.knows_variance());
        let mut summary = Value::Object(settings.clone());
        let more = json!({
            "allocator": settings.get("allocator"),
            "variance": settings.get("variance"),
            "advice": trained.advice,
            "space": settings.get("space"),
            "noise": settings.get("noise"),
            "sampling": settings.get("sampling"),
            "placement": settings.get("placement"),
            "control_variate": settings.get("control_variate"),
            "sigma": settings.get("sigma"),
            "accuracy_before": before.accuracy,
            "accuracy_after": accuracy,
            "loss_before": before.loss,
            "loss_after": loss,
            "query_budget": if forward { self.query_budget(history) } else { 0 },
            "queries_used": history.queries(),
            "queries_dropped": history.of(Split::Train).filter_map(|row| row.dropped).sum::<u64>(),
            "steps": history.steps(),
            "epochs_done": epochs_done(history),
            "seconds": history.seconds(),
            "variance_vs_uniform": history.mean(|row| row.variance_vs_uniform).filter(|_| independent),
            "floor": history.mean(|row| row.floor).filter(|_| independent),
            "train_images": self.data.train.items.len(),
            "skipped_images": self.data.skipped,
            "site_reports": history.sites(),
            "stopped": trained.stopped,
            "config": settings,
            "versions": {"flops": env!("CARGO_PKG_VERSION"), "burn": BURN_VERSION},
        });
        merge(&mut summary, more);
        if let Some(tally) = self.worker.and_then(Worker::tally) {
            merge(&mut summary, json!({ "workers": tally }));
        }
        summary
    }

    /// Returns the budget of the steps so far: A₀ queries for each of their images.
    pub fn query_budget(&self, history: &History) -> u64 {
        let (images, batch_size) = (self.data.train.items.len(), self.args.batch_size);
        let steps_per_epoch = images.div_ceil(batch_size) as u64;
        let seen: usize = (0..history.steps())
            .map(|step| (step % steps_per_epoch) as usize * batch_size)
            .map(|start| batch_size.min(images - start))
            .sum();
        (seen * self.args.forward.queries) as u64
    }
}

fn epochs_done(history: &History) -> usize {
    history.of(Split::Test).next_back().map_or(0, |row| row.epoch)
}

fn print_table(args: &Args, summary: &Value) {
    let number = |key: &str| summary[key].as_f64();
    let count = |key: &str| summary[key].as_u64().map_or("–".into(), thousands);
    let percent = |key: &str| number(key).map_or("–".into(), |v| format!("{:.2} %", 100.0 * v));
    let decimal = |key: &str, digits: usize| number(key).map_or("–".into(), |v| format!("{v:.digits$}"));
    println!("\n{}, scope {}, {}", args.dataset, args.scope, args.description());
    let mut rows = vec![
        ("test accuracy before", percent("accuracy_before")),
        ("test accuracy after", percent("accuracy_after")),
        ("test loss before", decimal("loss_before", 4)),
        ("test loss after", decimal("loss_after", 4)),
        ("steps", count("steps")),
        ("seconds", decimal("seconds", 1)),
    ];
    if args.method.is_forward() {
        rows.push(("query budget", count("query_budget")));
        rows.push(("queries used", count("queries_used")));
        rows.push(("variance relative to uniform", decimal("variance_vs_uniform", 3)));
        rows.push(("floor 1/(1 + CV²)", decimal("floor", 3)));
    }
    for (name, value) in rows {
        println!("  {name:<30}{value:>12}");
    }
}
