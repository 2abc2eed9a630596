//! Figure 9: active and standby workers.

use super::Experiment;
use super::bars::{Bars, Order};
use crate::mechanisms::Kind;
use crate::report::Report;
use crate::serving::Zygotes;

/// Figure 9 of the paper: what it brings to have a worker stand by.
///
/// `one-process`: the process that trains forgets the task, loads the model from disk and runs it. `two-processes`: the
/// process that trains is told to stop and to end, and then another one is started, which loads the model.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  pswitch bench figure9 --quick
  pswitch bench figure9 --device cuda:0 --task task.yaml --training-size 12GiB --out")]
pub(crate) struct Figure9 {
    #[command(flatten)]
    pub(crate) experiment: Experiment,
}

impl Figure9 {
    pub(super) const BARS: Bars = Bars {
        number: 9,
        command: "figure9",
        kinds: &[Kind::Pswitch, Kind::OneProcess, Kind::TwoProcesses],
        order: Order::AbovePswitch,
    };

    pub(crate) fn run(&self, zygotes: &mut Zygotes) -> anyhow::Result<Report> {
        Self::BARS.run(&self.experiment, None, zygotes)
    }
}
