//! How a program starts and fails: one line on standard error and exit code 1, never the text of a
//! panic.

use std::ffi::OsString;
use std::process::ExitCode;

use clap::Parser;
use clap::error::ErrorKind;

use crate::output;

/// Parses the command line and runs `main`.
pub fn run<A: Parser>(main: impl FnOnce(A) -> anyhow::Result<()>) -> ExitCode {
    let outcome = match parse(std::env::args_os()) {
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

/// Parses a command line, in which `-1` is a number. The program then says what is wrong with it.
fn parse<A: Parser>(line: impl IntoIterator<Item = OsString>) -> Result<A, clap::Error> {
    let matches = A::command().allow_negative_numbers(true).try_get_matches_from(line)?;
    A::from_arg_matches(&matches)
}

/// Returns clap's message without its hints on usage and help.
fn usage(message: &str) -> String {
    let end = ["\n\nUsage:", "\n\nFor more information"].iter().filter_map(|mark| message.find(mark)).min();
    message[..end.unwrap_or(message.len())].trim_start_matches("error: ").replace("\n\n  tip:", "; tip:")
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
        for number in ["many", "-1"] {
            let error = parse::<Args>(["x", "--number", number].map(Into::into)).unwrap_err();
            let line = one_line(&usage(&error.to_string()));
            assert!(line.starts_with(&format!("invalid value '{number}' for '--number <NUMBER>'")), "{line}");
            assert!(!line.contains("--help"), "{line}");
        }
        let error = parse::<Args>(["x", "--numbers", "1"].map(Into::into)).unwrap_err();
        let line = one_line(&usage(&error.to_string()));
        assert_eq!(line, "unexpected argument '--numbers' found; tip: a similar argument exists: '--number'");
    }
}
