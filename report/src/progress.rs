//! Progress lines of long programs.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

/// Prints how far a long program has come, at most once in 10 seconds.
pub struct Progress {
    started: Instant,
    printed: Instant,
}

impl Default for Progress {
    fn default() -> Self {
        Self { started: Instant::now(), printed: Instant::now() }
    }
}

impl Progress {
    /// Returns when the program began.
    pub fn started(&self) -> Instant {
        self.started
    }

    /// Prints `done`, `all` and `what` comes next, unless a line was printed in the last 10
    /// seconds.
    pub fn at(&mut self, done: usize, all: usize, what: impl FnOnce() -> String) {
        if self.printed.elapsed() >= Duration::from_secs(10) {
            self.printed = Instant::now();
            let line = format!("{done} of {all}: {}, {:.0} s", what(), self.started.elapsed().as_secs_f64());
            // Where standard output is a file, it holds results only.
            if std::io::stdout().is_terminal() { println!("{line}") } else { eprintln!("{line}") }
        }
    }
}
