//! Ways to give a device from training to a request: pswitch, what it is measured against, and pswitch without one of its
//! parts.
//!
//! All are asked by the same client over the same front end. pswitch and its plans are `served`: the whole server. The
//! others are made of worker processes that are alone (`process`, told what to do by `desk`) and stand behind the front
//! end by `service`.

mod alone;
mod desk;
mod mps;
mod process;
mod restarting;
mod served;
mod service;
mod standby;

use std::net::SocketAddr;
use std::time::Duration;

use pswitch_transfer::Algorithm;

use crate::keep_alive::Parameters;
pub(crate) use alone::AloneArm;
pub(crate) use desk::Desk;
pub(crate) use process::WorkerProcess;
pub(crate) use served::ServedModel;

/// A mechanism, or pswitch with a part left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The model is there, and nothing else goes on.
    Ready,
    Pswitch,
    /// Training and inference share the GPU as clients of NVIDIA MPS.
    Mps,
    /// The process that trains is killed, another one loads the model.
    StopAndStart,
    /// Layer by layer, and nothing computes before all layers have come.
    NoOptimization,
    /// All weights as one group.
    Grouped,
    /// A group for every layer.
    PerLayer,
    /// Copies of its own, memory allocated for the request.
    NoUnified,
    /// A handle for every group.
    NoIpc,
    /// The host store is not pinned.
    NoPinned,
    /// Weights in CUDA's managed memory.
    Managed,
    /// The process that trains cleans up and serves.
    OneProcess,
    /// The process that trains ends in good order, another one loads the model.
    TwoProcesses,
}

impl Kind {
    /// As results and plots name it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Ready => "ready",
            Self::Pswitch => "pswitch",
            Self::Mps => "mps",
            Self::StopAndStart => "stop-and-start",
            Self::NoOptimization => "no-optimization",
            Self::Grouped => "grouped",
            Self::PerLayer => "per-layer",
            Self::NoUnified => "no-unified",
            Self::NoIpc => "no-ipc",
            Self::NoPinned => "no-pinned",
            Self::Managed => "managed",
            Self::OneProcess => "one-process",
            Self::TwoProcesses => "two-processes",
        }
    }

    /// Whether every request has a process made for it: that takes long, and never gets any faster.
    pub(crate) fn restarts(self) -> bool {
        matches!(self, Self::StopAndStart | Self::TwoProcesses)
    }

    /// Whether a task has to be prepared again after every request, though its process stays.
    pub(crate) fn prepares_again(self) -> bool {
        self == Self::OneProcess
    }

    /// The plan by which the server of pswitch moves the model; none for what has no such server, or one of its own.
    pub(crate) fn plan(self) -> Option<Algorithm> {
        match self {
            Self::Ready | Self::Pswitch => Some(Algorithm::Optimal),
            Self::Grouped => Some(Algorithm::Whole),
            Self::PerLayer => Some(Algorithm::PerLayer),
            Self::NoOptimization => Some(Algorithm::Sequential),
            _ => None,
        }
    }
}

/// A mechanism that runs, with its front end.
pub(crate) trait Arm {
    /// Where its front end listens.
    fn address(&self) -> SocketAddr;

    /// Whether anything trains beside it.
    fn trains(&self) -> bool;

    /// Gives the device to training, which begins while the caller goes on; the model is not where a request finds it.
    fn train(&mut self) -> anyhow::Result<()>;

    /// Whether training computes.
    fn is_training(&mut self) -> anyhow::Result<bool>;

    /// Steps of training so far.
    fn steps(&mut self) -> anyhow::Result<u64>;

    /// How long training computed on after the last request; none if it had not to stop.
    fn stopped(&mut self) -> anyhow::Result<Option<Duration>>;

    /// Refuses the answer to a request that came after training and found the device otherwise than it was to.
    fn check(&self, parameters: &Parameters) -> anyhow::Result<()>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plans_are_those_of_the_server() {
        let served = [Kind::Ready, Kind::Pswitch, Kind::Grouped, Kind::PerLayer, Kind::NoOptimization];
        assert!(served.iter().all(|kind| kind.plan().is_some()));
        // A server of its own, as its host store is another.
        assert_eq!([Kind::NoPinned, Kind::StopAndStart].map(Kind::plan), [None, None]);
    }
}
