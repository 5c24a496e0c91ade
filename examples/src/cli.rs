//! How an example starts and how it fails: one line on standard error, exit code 1, never a panic's text.

use std::process::ExitCode;

use clap::Parser;
use clap::error::ErrorKind;

/// Parses the command line and runs `main`.
pub fn run<A: Parser>(main: impl FnOnce(A) -> anyhow::Result<()>) -> ExitCode {
    let outcome = match A::try_parse() {
        Ok(args) => main(args).map_err(|error| format!("{error:#}")),
        Err(error) if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) => error.exit(),
        Err(error) => Err(usage(&error.to_string())),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("error: {}", one_line(&message));
            ExitCode::FAILURE
        }
    }
}

/// Threads that evaluate queries: those asked for, otherwise one per core, at most 8.
pub fn threads(asked: Option<usize>) -> usize {
    asked.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from).min(8))
}

/// What clap says before it explains how to get help.
fn usage(message: &str) -> String {
    let end = ["\n\nUsage:", "\n\nFor more information"].iter().filter_map(|mark| message.find(mark)).min();
    message[..end.unwrap_or(message.len())].trim_start_matches("error: ").to_string()
}

fn one_line(message: &str) -> String {
    message.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_usage_error_is_one_line() {
        #[derive(Parser, Debug)]
        struct Args {
            #[arg(long)]
            number: usize,
        }
        let message = Args::try_parse_from(["x", "--number", "many"]).unwrap_err().to_string();
        let line = one_line(&usage(&message));
        assert!(line.starts_with("invalid value 'many' for '--number <NUMBER>'"), "{line}");
        assert!(!line.contains("--help"), "{line}");
    }
}
