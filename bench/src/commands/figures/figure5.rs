//! Figure 5: the latency of a request that interrupts training, by mechanism.

use std::path::PathBuf;

use super::Experiment;
use super::bars::{Bars, Order};
use crate::mechanisms::Kind;
use crate::report::Report;
use crate::serving::Zygotes;

/// Figure 5 of the paper: latency of a request that comes while a task trains, by four mechanisms.
///
/// `ready` is the model resident and nothing else: the lower bound. `pswitch` brings it while training stops. `mps` has both
/// processes on the GPU at all times, as clients of NVIDIA MPS. `stop-and-start` kills the process that trains and starts
/// one that loads the model from disk. All stand behind the same front end; latency is from the connection that is made to
/// the answer that is read. In each round the task trains, and then one request comes.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  pswitch bench figure5 --quick
  pswitch bench figure5 --device cuda:0 --task task.yaml --training-size 12GiB --out")]
pub(crate) struct Figure5 {
    /// A Python with torch and the module pswitch.pytorch_rows, to measure what PyTorch itself takes before.
    #[arg(long, value_name = "PATH")]
    python: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) experiment: Experiment,
}

impl Figure5 {
    pub(super) const BARS: Bars = Bars {
        number: 5,
        command: "figure5",
        kinds: &[Kind::Ready, Kind::Pswitch, Kind::Mps, Kind::StopAndStart],
        order: Order::Rising,
    };

    pub(crate) fn run(&self, zygotes: &mut Zygotes) -> anyhow::Result<Report> {
        Self::BARS.run(&self.experiment, self.python.as_deref(), zygotes)
    }
}
