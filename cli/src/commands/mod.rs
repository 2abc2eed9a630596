//! One module a command.

pub(crate) mod infer;
mod measure;
pub(crate) mod models;
pub(crate) mod plan_groups;
pub(crate) mod profile;
pub(crate) mod serve;
mod text;
pub(crate) mod train;

use clap::CommandFactory as _;

use crate::args::Args;

/// Prints a completion script.
pub(crate) fn completions(shell: clap_complete::Shell) {
    clap_complete::generate(shell, &mut Args::command(), "pswitch", &mut std::io::stdout());
}

/// What a worker process does.
fn worker(channel: pswitch_worker::Channel) -> i32 {
    match pswitch_worker::serve(&channel) {
        Ok(()) => 0,
        Err(error) => {
            let error = anyhow::Error::from(error);
            tracing::error!("a worker ends: {error:#}");
            1
        }
    }
}
