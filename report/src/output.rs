//! Lines on standard output and standard error, for programs whose reader may go away.
//!
//! The macros of the standard library panic where a pipe is closed, as by `program | head -1`.
//! After such a failure those here print nothing more. The program goes on and saves its results;
//! [`program::run`](crate::program::run) then ends it with exit code 141.

use std::fmt::Arguments;
use std::io::{ErrorKind, Result, Write, stderr, stdout};
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

/// The exit code of a program whose reader went away, as shells report it: 128 and SIGPIPE's 13.
pub const CLOSED_PIPE: u8 = 141;

/// The exit code that a failure to print asks for; 0 if there was none.
static FAILURE: AtomicU8 = AtomicU8::new(0);

/// Whether standard output is left alone.
static SILENT: AtomicBool = AtomicBool::new(false);

/// Prints nothing more to standard output in this process; standard error stays.
///
/// For the processes of a run that share a terminal with another one of it.
pub fn silence() {
    SILENT.store(true, Ordering::Relaxed);
}

/// [`std::println!`], but nothing is printed once a pipe is closed.
#[macro_export]
macro_rules! println {
    () => { $crate::output::print(::core::format_args!("\n")) };
    ($($text:tt)*) => { $crate::output::print(::core::format_args!("{}\n", ::core::format_args!($($text)*))) };
}

/// [`std::print!`], but nothing is printed once a pipe is closed.
#[macro_export]
macro_rules! print {
    ($($text:tt)*) => { $crate::output::print(::core::format_args!($($text)*)) };
}

/// [`std::eprintln!`], but nothing is printed once a pipe is closed.
#[macro_export]
macro_rules! eprintln {
    () => { $crate::output::print_error(::core::format_args!("\n")) };
    ($($text:tt)*) => { $crate::output::print_error(::core::format_args!("{}\n", ::core::format_args!($($text)*))) };
}

/// Prints to standard output.
#[doc(hidden)]
pub fn print(text: Arguments<'_>) {
    if SILENT.load(Ordering::Relaxed) {
        return;
    }
    if let Some(why) = written(|| stdout().write_fmt(text)) {
        print_error(format_args!("error: cannot write to standard output: {why}\n"));
        note(1);
    }
}

/// Prints to standard error.
#[doc(hidden)]
pub fn print_error(text: Arguments<'_>) {
    // there is no place left to say that it failed
    if written(|| stderr().write_fmt(text)).is_some() {
        note(1);
    }
}

/// Returns the exit code of a program that ends: its own, or that of a failure to print.
pub(crate) fn exit_code(own: u8) -> u8 {
    match FAILURE.load(Ordering::Relaxed) {
        0 => own,
        failure => failure,
    }
}

/// Keeps the exit code of the first failure.
fn note(code: u8) {
    let _ = FAILURE.compare_exchange(0, code, Ordering::Relaxed, Ordering::Relaxed);
}

/// Writes, unless that failed before; returns an error that is to be reported.
fn written(write: impl FnOnce() -> Result<()>) -> Option<std::io::Error> {
    if FAILURE.load(Ordering::Relaxed) != 0 {
        return None;
    }
    match write() {
        Ok(()) => None,
        Err(why) if why.kind() == ErrorKind::BrokenPipe => {
            note(CLOSED_PIPE);
            None
        }
        Err(why) => Some(why),
    }
}
