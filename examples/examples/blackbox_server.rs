//! Serves a CLIP-style classifier of made-up scenes on 127.0.0.1: images in, scores out, no
//! gradients, no weights.
//!
//! ```text
//! cargo run --release --example blackbox_server -- --port 8080
//! cargo run --release --example prompt_tuning -- --endpoint http://127.0.0.1:8080
//! ```
//!
//! The protocol is described in [`flops_examples::blackbox::server`].

#[macro_use]
extern crate flops_report;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use flops_examples::blackbox::classes::ClassifierArgs;
use flops_examples::blackbox::server::serve;
use flops_examples::cli;

/// Serve a classifier as a black box.
#[derive(Parser, Debug)]
#[command(name = "blackbox_server", version)]
struct Args {
    #[command(flatten)]
    classifier: ClassifierArgs,
    /// Port on 127.0.0.1; 0 for any free port.
    #[arg(long, default_value_t = 8080)]
    port: u16,
    /// File of the charged queries; a restarted server continues it [default: none, the count
    /// starts at 0].
    #[arg(long)]
    charge_log: Option<PathBuf>,
}

fn main() -> ExitCode {
    cli::run(|args: Args| {
        let ready = |address: &str| println!("listening on {address}");
        serve(&args.classifier, args.port, args.charge_log.as_deref(), ready)
    })
}
