//! All figures, one after the other.

use std::path::PathBuf;

use super::{Experiment, Figure5, Figure6, Figure7, Figure8, Figure9, Figure10};
use crate::commands::Command;

/// Figures 5 to 10, one after the other, with the same flags.
///
/// Each prints its table when it is done. With --out results and plots are written at once, and in the end report.html
/// beside them, a page that holds everything. A figure that fails does not keep the others from being measured; Ctrl-C
/// keeps what there is.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  pswitch bench all --quick --out
  PYTHONPATH=python/src pswitch bench all --device cuda:0 --quick --task task.yaml --training-size 12GiB \
--python .torch/venv/bin/python --out")]
pub(crate) struct All {
    /// A Python with torch and the module pswitch.pytorch_rows, to measure what PyTorch itself takes beside figure 5.
    #[arg(long, value_name = "PATH")]
    python: Option<PathBuf>,
    #[command(flatten)]
    experiment: Experiment,
}

impl All {
    /// One command a figure.
    pub(crate) fn commands(&self) -> Vec<Command> {
        let experiment = || self.experiment.clone();
        vec![
            Command::Figure5(Figure5 { python: self.python.clone(), experiment: experiment() }),
            Command::Figure6(Figure6 { experiment: experiment() }),
            Command::Figure7(Figure7 { experiment: experiment() }),
            Command::Figure8(Figure8 { experiment: experiment() }),
            Command::Figure9(Figure9 { experiment: experiment() }),
            Command::Figure10(Figure10::of(experiment())),
        ]
    }
}
