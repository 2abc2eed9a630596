//! How far a command has come, and since when it runs: a bar on a terminal, a line elsewhere.

use std::fmt::Display;
use std::io::IsTerminal as _;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// When the command began.
static BEGUN: OnceLock<Instant> = OnceLock::new();

/// The command begins.
pub(crate) fn begin() {
    BEGUN.get_or_init(Instant::now);
}

/// Says on standard error what goes on from now on, or what has become of it.
pub(crate) fn say(what: impl Display) {
    eprintln!("{}", line(BEGUN.get_or_init(Instant::now).elapsed(), what));
}

fn line(since: Duration, what: impl Display) -> String {
    format!("[{:4} s] {what}", since.as_secs())
}

/// A part of a command that consists of many steps; its bar is gone when it is dropped.
#[derive(Debug)]
pub(crate) struct Progress(ProgressBar);

impl Progress {
    pub(crate) fn new(what: &'static str, steps: usize) -> Self {
        // Hidden where standard error is no terminal.
        let bar = ProgressBar::new(steps as u64).with_message(what);
        let style = ProgressStyle::with_template("{msg:32} {bar:32} {pos}/{len}  {eta} left");
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        if !std::io::stderr().is_terminal() {
            say(format_args!("{what}: {steps} ..."));
        }
        Self(bar)
    }

    /// One step is done.
    pub(crate) fn step(&self) {
        self.0.inc(1);
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_say_since_when_the_command_runs() {
        assert_eq!(line(Duration::from_millis(12_900), "mps: 10 ..."), "[  12 s] mps: 10 ...");
        assert_eq!(line(Duration::from_secs(12_345), "mps"), "[12345 s] mps");
    }
}
