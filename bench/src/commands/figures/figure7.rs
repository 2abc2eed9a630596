//! Figure 7: pipelined transmission.

use super::Experiment;
use super::bars::{Bars, Order};
use crate::mechanisms::Kind;
use crate::report::Report;
use crate::serving::Zygotes;

/// Figure 7 of the paper: what it brings to divide a transfer into groups and to compute meanwhile.
///
/// All are the same server, in which the model moves by another plan. `per-layer` has a group for every layer, `grouped` one
/// for the whole model. `no-optimization` copies layer by layer as well, and computes only after all have come.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  pswitch bench figure7 --quick
  pswitch bench figure7 --device cuda:0 --task task.yaml --training-size 12GiB --out")]
pub(crate) struct Figure7 {
    #[command(flatten)]
    pub(crate) experiment: Experiment,
}

impl Figure7 {
    pub(super) const BARS: Bars = Bars {
        number: 7,
        command: "figure7",
        kinds: &[Kind::Pswitch, Kind::PerLayer, Kind::Grouped, Kind::NoOptimization],
        order: Order::AbovePswitch,
    };

    pub(crate) fn run(&self, zygotes: &mut Zygotes) -> anyhow::Result<Report> {
        Self::BARS.run(&self.experiment, None, zygotes)
    }
}
