//! `pswitch`: time-shares a device between many PyTorch models.
//!
//! Thin: parses flags, forks zygotes before anything else when it is to serve or to measure, and prints errors once.

mod args;
mod client;
mod commands;
mod exit;
mod progress;
mod tensors;

use std::process::ExitCode;

use clap::Parser;
use nix::sys::signal::{SigHandler, Signal, signal};

use args::{Args, Command};

/// Files that grow beyond the limit of a process are an error of the write then, as on a full disk, and end nobody.
fn ignore_file_size_signal() {
    // SAFETY: no handler runs.
    if let Err(error) = unsafe { signal(Signal::SIGXFSZ, SigHandler::SigIgn) } {
        eprintln!("pswitch: SIGXFSZ cannot be ignored: {error}");
    }
}

fn main() -> ExitCode {
    ignore_file_size_signal();
    let args = Args::parse();
    let result = match args.command {
        Command::Serve(serve) => commands::serve::run(serve),
        Command::Infer(infer) => commands::infer::run(&infer),
        Command::Models(models) => commands::models::run(&models),
        Command::Profile(profile) => commands::profile::run(&profile),
        Command::PlanGroups(plan) => commands::plan_groups::run(&plan),
        Command::Train(train) => commands::train::run(&train.command),
        Command::Bench(bench) => bench.run(),
        Command::Completions { shell } => {
            commands::completions(shell);
            Ok(())
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => exit::report(&error),
    }
}
