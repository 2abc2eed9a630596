//! The flags that all commands share, and what happens around each.

use std::io::Write as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use pswitch_device::DeviceId;
use tracing_subscriber::EnvFilter;

use crate::commands::{All, Command, PAGE, Part, gather};
use crate::figures::{Drawing, Figure};
use crate::interrupt;
use crate::machine::Machine;
use crate::progress;
use crate::report::{Report, Table};
use crate::serving::Zygotes;

/// Measures pswitch: the whole server with its workers, started in this process.
///
/// Times are worth as much as the machine is quiet: its load stands in every report. A command that has measured
/// succeeds, whatever the numbers; a wrong output is a failure.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  pswitch bench switch --device cuda:0 --out
  pswitch bench switching --requests 10000
  pswitch bench switching --help")]
pub struct Args {
    /// Folder for the results, as COMMAND.json; bench/results without a value. Nothing is written without it. Figures are
    /// drawn there as well, as COMMAND.svg and COMMAND.png.
    #[arg(long, global = true, value_name = "FOLDER", num_args = 0..=1, default_missing_value = "bench/results")]
    out: Option<PathBuf>,
    /// What the server logs, as in info or warn,pswitch_controller=debug.
    #[arg(long, global = true, value_name = "FILTER", default_value = "warn")]
    log: String,
    #[command(subcommand)]
    asked: Asked,
}

/// What is to be done.
#[derive(Debug, clap::Subcommand)]
enum Asked {
    #[command(flatten)]
    One(Command),
    All(All),
}

impl Args {
    /// Measures, prints the report to standard output and writes it where it was asked to.
    ///
    /// Call it before the process has threads or has used libtorch or CUDA: workers are forked from it.
    ///
    /// # Errors
    /// What kept the command from measuring; a wrong output is named with its model.
    pub fn run(&self) -> anyhow::Result<()> {
        progress::begin();
        let filter =
            EnvFilter::try_new(&self.log).with_context(|| format!("`{}` is no log filter", self.log))?;
        tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
        match &self.asked {
            Asked::One(command) => {
                // Before the first thread: a process with threads cannot be forked safely.
                let mut zygotes = Zygotes::fork(command.servers())?;
                self.measure(command, &mut zygotes)
            }
            Asked::All(all) => self.measure_all(all),
        }
    }

    fn measure_all(&self, all: &All) -> anyhow::Result<()> {
        let parts = all.parts();
        let mut zygotes = Zygotes::fork(parts.iter().map(Part::servers).sum())?;
        let (mut failed, mut took) = (Vec::new(), Vec::new());
        for part in parts {
            // What was measured is kept, and gathered below.
            if let Err(interrupted) = interrupt::check() {
                failed.push(interrupted.to_string());
                break;
            }
            let (machine, begun) = (Machine::here(), Instant::now());
            let told = part.run(&mut zygotes).and_then(|reports| {
                reports.iter().try_for_each(|report| self.tell(report, machine.clone(), Some(all.device())))
            });
            if let Err(error) = told {
                progress::say(format_args!("{error:#}"));
                failed.push(format!("{error:#}"));
            }
            took.push((part.name(), begun.elapsed()));
        }
        writeln!(std::io::stdout().lock(), "\n{}", times(&took))
            .context("cannot write to standard output")?;
        if let Some(folder) = &self.out {
            gather(folder, &folder.join(PAGE))?;
        }
        ensure!(failed.is_empty(), "not measured: {}", failed.join("; "));
        Ok(())
    }

    fn measure(&self, command: &Command, zygotes: &mut Zygotes) -> anyhow::Result<()> {
        let machine = Machine::here();
        let report = command.run(zygotes)?;
        self.tell(&report, machine, command.device())
    }

    /// Prints what was measured on a machine, and writes it where it was asked to.
    fn tell(&self, report: &Report, mut machine: Machine, device: Option<DeviceId>) -> anyhow::Result<()> {
        // Afterwards: an idle GPU slows its link down.
        machine.gpu = device.and_then(crate::machine::gpu);
        let arguments: Vec<String> = std::env::args().skip(1).collect();
        let saved = self.out.as_ref().map(|folder| report.save(folder, &machine, &arguments)).transpose()?;
        if let (Some(folder), Some(figure)) = (&self.out, Figure::of(&report.results)) {
            Drawing::of(&figure, &machine.line()).save(folder, report.command)?;
        }
        let mut stdout = std::io::stdout().lock();
        write!(stdout, "\n{}", report.text(&machine)).context("cannot write to standard output")?;
        if let Some(path) = saved {
            writeln!(stdout, "\nwritten to {}", path.display())?;
        }
        Ok(())
    }
}

/// How long each part took, and all of them.
fn times(took: &[(&str, Duration)]) -> Table {
    let mut table = Table::new(["measured", "s"]);
    let all = ("all", took.iter().map(|(_, time)| time).sum());
    for (part, time) in took.iter().chain([&all]) {
        table.push([(*part).to_owned(), format!("{:.1}", time.as_secs_f64())]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_told_with_their_sum() {
        let took = [("figure 6", Duration::from_millis(48_260)), ("figure 10", Duration::from_secs(60))];
        assert_eq!(
            times(&took).to_string(),
            "measured       s\nfigure 6    48.3\nfigure 10   60.0\nall        108.3\n"
        );
    }

    #[test]
    fn flags_of_all_commands_are_declared_once() {
        <Args as clap::Args>::augment_args(clap::Command::new("bench")).debug_assert();
    }
}
