//! The files of a run and its table.

use std::time::Instant;

use anyhow::Result;
use flops_examples::BURN_VERSION;
use flops_examples::plot::contact_sheet::{Picture, contact_sheet};
use flops_examples::run::artifacts::{Settings, merge};
use flops_examples::run::curves::Curves;
use serde_json::{Value, json};

use crate::endpoint::{JOURNAL, PROMPT};
use crate::tuning::Run;

impl Run {
    /// Writes the files of the run and prints its table.
    pub fn report(
        &self,
        settings: Settings,
        accuracies: (f64, Option<f64>),
        pictures: Option<Vec<Picture>>,
        started: Instant,
    ) -> Result<()> {
        let artifacts = &self.artifacts;
        let server = self.endpoint.http.as_ref().and_then(|http| http.count().ok());
        self.history.write(artifacts)?;
        let prompt = settings["prompt"].as_str().unwrap_or("");
        let title = format!("{prompt} prompt of a black box, {}", self.args.method.name());
        artifacts.write("curves.svg", Curves::of(&self.history).draw(&title)?.as_bytes())?;
        if let Some(pictures) = &pictures {
            let title = "as the camera gives them and as the tuned prompt repaints them, with the black box's answers";
            artifacts.write("prompt.svg", contact_sheet(title, pictures)?.as_bytes())?;
        }
        let seconds = started.elapsed().as_secs_f64();
        artifacts.write_json("summary.json", &self.summary(settings, accuracies, server, seconds))?;
        let percent = |accuracy: f64| format!("{:.1} %", 100.0 * accuracy);
        println!();
        for (name, value) in [
            ("accuracy, zero-shot", percent(accuracies.0)),
            ("accuracy, tuned", accuracies.1.map_or("–".into(), percent)),
            ("queries used", self.endpoint.metered.spent().to_string()),
            ("queries by the server's count", server.map_or("–".into(), |n| n.to_string())),
            ("seconds", format!("{seconds:.1}")),
        ] {
            println!("  {name:<32}{value:>10}");
        }
        let more = if pictures.is_some() { ", prompt.svg" } else { "" };
        let dir = artifacts.dir().display();
        println!("\n{dir} holds summary.json, metrics.csv, curves.svg{more}, {PROMPT} and {JOURNAL}");
        Ok(())
    }

    /// Returns what `summary.json` holds.
    fn summary(
        &self,
        settings: Settings,
        (zero_shot, tuned): (f64, Option<f64>),
        server: Option<u64>,
        seconds: f64,
    ) -> Value {
        let rows = &self.history.rows;
        let mut summary = Value::Object(settings);
        let more = json!({
            "accuracy_zero_shot": zero_shot,
            "accuracy_tuned": tuned,
            "queries_used": self.endpoint.metered.spent(),
            "queries_server": server,
            "answered_from_journal": self.endpoint.metered.answered_from_journal(),
            "steps": self.history.steps(),
            "steps_planned": self.plan.steps,
            "stopped": self.stopped,
            "loss_before": rows.first().map(|row| row.loss),
            // of the last evaluation, if there was one
            "loss_after": tuned.and_then(|_| rows.last()).map(|row| row.loss),
            "train_images": self.train.len(),
            "test_images": self.test.len(),
            "seconds": seconds,
            "versions": {"flops": env!("CARGO_PKG_VERSION"), "burn": BURN_VERSION},
        });
        merge(&mut summary, more);
        summary
    }
}
