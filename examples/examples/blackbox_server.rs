//! Serves a CLIP-style classifier of made-up scenes on the loopback interface: images in, scores out, no gradient, no weights.
//!
//! ```text
//! cargo run --release --example blackbox_server -- --port 8080
//! cargo run --release --example prompt_tuning -- --endpoint http://127.0.0.1:8080
//! ```
//!
//! The protocol is described in [`flops_examples::server`].

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use flops_examples::cli;
use flops_examples::server::{Serving, serve};

/// Serve a classifier as a black box.
#[derive(Parser, Debug)]
#[command(name = "blackbox_server", version)]
struct Args {
    #[command(flatten)]
    serving: Serving,
    /// Port on 127.0.0.1; 0 for any that is free.
    #[arg(long, default_value_t = 8080)]
    port: u16,
    /// File of the queries charged, which a server started anew goes on with [default: they are forgotten].
    #[arg(long)]
    book: Option<PathBuf>,
}

fn main() -> ExitCode {
    cli::run(|args: Args| {
        serve(&args.serving, args.port, args.book.as_deref(), |address| println!("listening on {address}"))
    })
}
