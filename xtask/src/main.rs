//! Tasks of the repository: `cargo xtask setup`, `fixtures`, `test`, `demo` and `bundle`.
//!
//! `setup` finds or installs libtorch, without which nothing that reaches tch can be built; so this crate depends on
//! none of the others.

mod bundle;
mod checks;
mod commands;
mod demo;
mod directions;
mod fixtures;
mod metadata;
mod python;
mod readme;
mod root;
mod setup;
mod suite;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use root::Root;

#[derive(Parser)]
#[command(
    name = "cargo xtask",
    about = "Set-up, tests, fixtures, demonstration and GPU bundle of pswitch",
    disable_version_flag = true
)]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Find torch 2.11.0 or install it, with everything else that Python is used for
    ///
    /// Looks at $PSWITCH_PYTHON, at the virtual environment that is active and at python3. Without torch there it is
    /// installed into .torch/venv (4.7 GB). Does nothing, quickly, when all is there.
    Setup,
    /// Make the models with reference outputs that the tests read, in target/fixtures and target/training
    Fixtures {
        /// These only
        names: Vec<String>,
        /// Make them anew, whatever is there
        #[arg(long)]
        force: bool,
    },
    /// Run everything that must pass: formats, lints, checks, all tests, examples, documentation
    Test {
        /// These steps only, separated by commas
        #[arg(long, value_delimiter = ',', value_name = "STEP")]
        only: Vec<suite::Step>,
    },
    /// Export real models, serve them and send requests
    Demo {
        /// Leave the server running
        #[arg(long)]
        keep: bool,
        /// Port of the server on 127.0.0.1; one that is free if not given
        #[arg(long)]
        port: Option<u16>,
    },
    /// Make a folder that runs on a GPU machine with torch 2.11, but without Rust and without a network
    ///
    /// It holds the stripped release binary, the tests that need a GPU, the Python package and run.sh, which exports
    /// the models there and runs tests and measurements; `run.sh --help` lists them.
    Bundle {
        /// The folder; target/bundle if not given
        #[arg(long, value_name = "FOLDER")]
        out: Option<PathBuf>,
    },
}

fn main() -> ExitCode {
    match run(Arguments::parse().task) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(task: Task) -> anyhow::Result<()> {
    let root = Root::of_this_repository();
    match task {
        Task::Setup => setup::run(&root),
        Task::Fixtures { names, force } => fixtures::run(&root, &names, force),
        Task::Test { only } => suite::run(&root, &only),
        Task::Demo { keep, port } => demo::run(&root, keep, port),
        Task::Bundle { out } => bundle::run(&root, out),
    }
}
