//! One module a command.

pub(crate) mod infer;
pub(crate) mod models;
pub(crate) mod plan_groups;
pub(crate) mod serve;

use clap::CommandFactory as _;

use crate::args::Args;

/// Prints a completion script.
pub(crate) fn completions(shell: clap_complete::Shell) {
    clap_complete::generate(shell, &mut Args::command(), "pswitch", &mut std::io::stdout());
}
