//! How a program starts and fails: one line on standard error and exit code 1, never the text of a
//! panic.

use std::process::ExitCode;

use clap::Parser;
use clap::error::ErrorKind;

use crate::output;

/// Parses the command line and runs `main`.
pub fn run<A: Parser>(main: impl FnOnce(A) -> anyhow::Result<()>) -> ExitCode {
    let outcome = match A::try_parse() {
        Ok(args) => main(args).map_err(|error| format!("{error:#}")),
        Err(error) if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) => error.exit(),
        Err(error) => Err(usage(&error.to_string())),
    };
    let code = match outcome {
        Ok(()) => 0,
        Err(message) => {
            eprintln!("error: {}", one_line(&message));
            1
        }
    };
    output::exit_code(code).into()
}

/// Returns clap's message without its hints on usage and help.
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
