//! All figures, one after the other.

use std::path::PathBuf;

use pswitch_device::DeviceId;

use super::bars::Bars;
use super::{Experiment, Figure5, Figure6, Figure7, Figure8, Figure9, Figure10};
use crate::report::Report;
use crate::serving::Zygotes;

/// Figures 5 to 10, with the same flags.
///
/// Figures 5, 7, 8 and 9 come first, model by model, and what several of them have is measured once: their bars of pswitch
/// are the same. With --out results and plots are written as soon as they are there, and in the end report.html beside
/// them, a page that holds everything. How long each part took is told in the end, and what it was made of stands in the
/// results (`took`). A figure that fails does not keep the others from being measured; Ctrl-C keeps what
/// there is.
#[derive(Debug, Clone, clap::Args)]
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

/// A part of it that reports when it is done.
#[derive(Debug)]
pub(crate) enum Part {
    /// The figures whose bars are latencies.
    Bars(Box<All>),
    Figure6(Figure6),
    Figure10(Figure10),
}

impl All {
    const BARS: [Bars; 4] = [Figure5::BARS, Figure7::BARS, Figure8::BARS, Figure9::BARS];

    /// One after the other.
    pub(crate) fn parts(&self) -> Vec<Part> {
        // Figure 6 has one model, as in the paper.
        let mut of_one_model = self.experiment.clone();
        of_one_model.models.truncate(1);
        vec![
            Part::Bars(Box::new(self.clone())),
            Part::Figure6(Figure6 { experiment: of_one_model }),
            Part::Figure10(Figure10::of(self.experiment.clone())),
        ]
    }

    pub(crate) fn device(&self) -> DeviceId {
        self.experiment.serving.device()
    }
}

impl Part {
    /// In words.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Bars(_) => "figures 5, 7, 8 and 9",
            Self::Figure6(_) => "figure 6",
            Self::Figure10(_) => "figure 10",
        }
    }

    /// How many servers it starts, one after another.
    pub(crate) fn servers(&self) -> usize {
        match self {
            Self::Bars(all) => all.experiment.servers(),
            Self::Figure6(figure) => figure.experiment.servers(),
            Self::Figure10(figure) => figure.servers(),
        }
    }

    /// Measures.
    pub(crate) fn run(&self, zygotes: &mut Zygotes) -> anyhow::Result<Vec<Report>> {
        match self {
            Self::Bars(all) => Bars::run_all(&All::BARS, &all.experiment, all.python.as_deref(), zygotes),
            Self::Figure6(figure) => Ok(vec![figure.run(zygotes)?]),
            Self::Figure10(figure) => Ok(vec![figure.run(zygotes)?]),
        }
    }
}
