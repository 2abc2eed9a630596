//! What pswitch does, in numbers: the commands of `pswitch bench`.
//!
//! Every command starts the whole server in this process, with its real workers, measures, prints a table and, with
//! `--out`, writes JSON that says where and of what it was measured. It is the part of the binary that measures, so that
//! its errors are `anyhow`'s, to be printed and no more:
//!
//! ```no_run
//! use clap::Parser;
//!
//! #[derive(Parser)]
//! struct Cli {
//!     #[command(flatten)]
//!     bench: pswitch_bench::Args,
//! }
//!
//! fn main() -> anyhow::Result<()> {
//!     // First thing in `main`: workers are forked from a process without threads.
//!     Cli::parse().bench.run()
//! }
//! ```
//!
//! How results are told stands alone: [`Samples`] come to a [`Summary`], and a [`Report`] of [`Table`]s and [`Goal`]s says
//! on which [`Machine`] they were found. `examples/report_a_measurement.rs` makes one.
//!
//! Commands are modules of `commands`; what they share:
//!
//! - `subject`: an archive with inputs and their right outputs; `caller` sends them and checks every answer;
//! - `serving`: a server over a repository made for the occasion; `keep_alive`: a client of its HTTP front end;
//! - `trained`: a training task in a server, and PyTorch's own loop over it;
//! - `matched_link`: a link of the host that is as slow as a model computes;
//! - `figures`: results of the figures of the paper, drawn; `pytorch`: PyTorch in a process of its own;
//! - `processes`: memory and descriptors of a server's processes; `machine`: where a result was made;
//! - `mechanisms`: ways to give a device from training to a request, behind one front end; `task`: what is trained;
//! - `interrupt`: Ctrl-C, after which what was found so far is told;
//! - `stats`: medians and tails; `report`: tables, JSON, and what was asked for; `page`: all of it as HTML; `progress`: how far a command is;
//! - `random`: numbers that are the same every time.
#![warn(clippy::unwrap_used)]

mod args;
mod caller;
mod commands;
mod figures;
mod interrupt;
mod keep_alive;
mod machine;
mod matched_link;
mod mechanisms;
mod page;
mod processes;
mod progress;
mod pytorch;
mod random;
mod report;
mod serving;
mod stats;
mod subject;
mod task;
mod trained;

pub use args::Args;
pub use machine::{Gpu, Machine};
pub use report::{Goal, Report, Table};
pub use stats::{Samples, Summary};
