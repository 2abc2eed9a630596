//! Exit codes, and the one place that prints errors.

use std::io::Write as _;
use std::process::ExitCode;

use anyhow::Context as _;

/// What the exit code says about a failure; `pswitch --help` documents the numbers. Usage errors are clap's: 2.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Failure {
    /// Anything that has no code of its own.
    Other = 1,
    /// A file that was given cannot be read or is not valid.
    Input = 3,
    /// No server answers at the address.
    Unreachable = 4,
    /// The server answered with an error.
    Refused = 5,
}

/// An error with its exit code.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Classified(pub(crate) Failure);

impl std::fmt::Display for Classified {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            Failure::Other => write!(f, "failed"),
            Failure::Input => write!(f, "an input cannot be used"),
            Failure::Unreachable => write!(f, "the server cannot be reached"),
            Failure::Refused => write!(f, "the server refused"),
        }
    }
}

/// Gives an error the class that its exit code tells.
pub(crate) trait Classify<T> {
    /// Marks the error; its text stays as it is, led by the class.
    fn class(self, failure: Failure) -> anyhow::Result<T>;
}

impl<T, E: Into<anyhow::Error>> Classify<T> for Result<T, E> {
    fn class(self, failure: Failure) -> anyhow::Result<T> {
        self.map_err(|error| error.into().context(Classified(failure)))
    }
}

/// Prints what a command has to say. A reader that has seen enough (`| head`) is no failure.
pub(crate) fn print(text: &str) -> anyhow::Result<()> {
    let mut stdout = std::io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(error).context("cannot write to standard output")
        }
        _ => Ok(()),
    }
}

/// Prints the chain of an error once and gives its code.
pub(crate) fn report(error: &anyhow::Error) -> ExitCode {
    // Whoever closed standard error does not want to read it.
    let _ = writeln!(std::io::stderr(), "pswitch: {error:#}");
    let failure = error.downcast_ref::<Classified>().map_or(Failure::Other, |classified| classified.0);
    ExitCode::from(failure as u8)
}
