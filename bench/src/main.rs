//! `pswitch-bench`: what pswitch does, in numbers.
//!
//! Every command starts the whole server in this process, with its real workers, measures, prints a table and, with
//! `--out`, writes JSON that says where and of what it was measured. Commands are modules of `commands`; what they share:
//!
//! - `subject`: an archive with inputs and their right outputs; `caller` sends them and checks every answer;
//! - `serving`: a server over a repository made for the occasion; `keep_alive`: a client of its HTTP front end;
//! - `processes`: memory and descriptors of a server's processes; `machine`: where a result was made;
//! - `stats`: medians and tails; `report`: tables, JSON, and what was asked for.

mod caller;
mod commands;
mod keep_alive;
mod machine;
mod processes;
mod report;
mod serving;
mod stats;
mod subject;

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::Parser;
use tracing_subscriber::EnvFilter;

use commands::Command;
use machine::Machine;
use serving::Zygotes;

/// Measures pswitch: the whole server with its workers, started in this process.
///
/// Times are worth as much as the machine is quiet: its load stands in every report.
#[derive(Debug, Parser)]
#[command(
    version,
    max_term_width = 110,
    after_help = "\
Exit codes: 0 measured, whatever the numbers; 1 a failure, such as a wrong output; 2 wrong usage."
)]
struct Args {
    /// Folder for the results, as COMMAND.json; bench/results without a value. Nothing is written without it.
    #[arg(long, global = true, value_name = "FOLDER", num_args = 0..=1, default_missing_value = "bench/results")]
    out: Option<PathBuf>,
    /// What the server logs, as in info or warn,pswitch_controller=debug.
    #[arg(long, global = true, value_name = "FILTER", default_value = "warn")]
    log: String,
    #[command(subcommand)]
    command: Command,
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Whoever closed standard error does not want to read it.
            let _ = writeln!(std::io::stderr(), "pswitch-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(&args.log).with_context(|| format!("`{}` is no log filter", args.log))?;
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    // Before the first thread: a process with threads cannot be forked safely.
    let mut zygotes = Zygotes::fork(args.command.servers())?;
    let machine = Machine::here();
    let report = args.command.run(&mut zygotes)?;
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let saved = args.out.as_ref().map(|folder| report.save(folder, &machine, &arguments)).transpose()?;
    let mut stdout = std::io::stdout().lock();
    write!(stdout, "\n{}", report.text(&machine)).context("cannot write to standard output")?;
    if let Some(path) = saved {
        writeln!(stdout, "\nwritten to {}", path.display())?;
    }
    Ok(())
}
