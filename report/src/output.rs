//! Lines on standard output and standard error, for programs whose reader may go away.
//!
//! The macros of the standard library panic where a pipe is closed, as by `program | head -1`.
//! Those here end the program without a word.

use std::fmt::Arguments;
use std::io::{Error, ErrorKind, Result, Write, stderr, stdout};

/// The exit code of a program that a closed pipe ends, as shells report it: 128 and SIGPIPE's 13.
const CLOSED_PIPE: i32 = 141;

/// [`std::println!`], but a closed pipe ends the program quietly, with exit code 141.
#[macro_export]
macro_rules! println {
    () => { $crate::output::print(::core::format_args!("\n")) };
    ($($text:tt)*) => { $crate::output::print(::core::format_args!("{}\n", ::core::format_args!($($text)*))) };
}

/// [`std::print!`], but a closed pipe ends the program quietly, with exit code 141.
#[macro_export]
macro_rules! print {
    ($($text:tt)*) => { $crate::output::print(::core::format_args!($($text)*)) };
}

/// [`std::eprintln!`], but a closed pipe ends the program quietly, with exit code 141.
#[macro_export]
macro_rules! eprintln {
    () => { $crate::output::print_error(::core::format_args!("\n")) };
    ($($text:tt)*) => { $crate::output::print_error(::core::format_args!("{}\n", ::core::format_args!($($text)*))) };
}

/// Prints to standard output; ends the program where that fails.
#[doc(hidden)]
pub fn print(text: Arguments<'_>) {
    end(stdout().write_fmt(text), |why| print_error(format_args!("error: cannot write to standard output: {why}\n")));
}

/// Prints to standard error; ends the program where nobody reads it.
#[doc(hidden)]
pub fn print_error(text: Arguments<'_>) {
    // there is no place left to say that it failed otherwise
    end(stderr().write_fmt(text), |_| {});
}

/// Ends the program where a line could not be written: quietly for a closed pipe, otherwise after
/// `report`.
fn end(written: Result<()>, report: impl FnOnce(Error)) {
    match written {
        Ok(()) => {}
        Err(why) if why.kind() == ErrorKind::BrokenPipe => std::process::exit(CLOSED_PIPE),
        Err(why) => {
            report(why);
            std::process::exit(1)
        }
    }
}
