//! Figure 8: unified memory management.

use super::Experiment;
use super::bars::{Bars, Order};
use crate::mechanisms::Kind;
use crate::report::Report;
use crate::serving::Zygotes;

/// Figure 8 of the paper: pswitch without parts of its memory management.
///
/// `no-unified`: the process that stands by has a pinned copy of the weights of its own, allocates memory for the request,
/// copies group by group, and frees it afterwards. `no-ipc`: every group has memory of its own, of which a handle is opened
/// when the request comes. Where addresses are new each time nothing can be captured as a CUDA graph. `no-pinned`: the
/// server's host store is not pinned (GPUs only). `managed`: the weights lie in CUDA managed memory of just their size, on
/// the host until kernels touch them, and training pauses (GPUs only).
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  pswitch bench figure8 --quick
  pswitch bench figure8 --device cuda:0 --task task.yaml --training-size 12GiB --out")]
pub(crate) struct Figure8 {
    #[command(flatten)]
    pub(crate) experiment: Experiment,
}

impl Figure8 {
    pub(super) const BARS: Bars = Bars {
        number: 8,
        command: "figure8",
        kinds: &[Kind::Pswitch, Kind::NoUnified, Kind::NoIpc, Kind::NoPinned, Kind::Managed],
        order: Order::AbovePswitch,
    };

    pub(crate) fn run(&self, zygotes: &mut Zygotes) -> anyhow::Result<Report> {
        Self::BARS.run(&self.experiment, None, zygotes)
    }
}
