use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use pswitch_mem_pool::{ArenaId, Lease, ModelId};
use pswitch_transfer::TransferId;

use super::messages::{ExecutionId, ModelLimits, Rejection, RequestId, WorkerId};

/// A request that was accepted and is not answered.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) model: ModelId,
    /// Its place in the order of all requests; a request that is tried again keeps it.
    pub(super) sequence: u64,
    pub(super) submitted: Instant,
    pub(super) deadline: Option<Instant>,
    /// Times that it was begun.
    pub(super) attempts: u32,
    pub(super) state: RequestState,
}

/// States of a request. One that is answered has none: it is forgotten.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RequestState {
    /// In its model's queue.
    Waiting,
    /// An execution of it is not over.
    Executing(ExecutionId),
}

/// A model that has a home.
#[derive(Debug)]
pub(super) struct Model {
    pub(super) limits: ModelLimits,
    /// The requests that wait, by their place in the order of all.
    pub(super) queue: BTreeMap<u64, RequestId>,
    pub(super) executing: usize,
    /// Nothing new is accepted; it goes when nobody uses it.
    pub(super) removed: bool,
    /// Its last prefetch failed: no other until a load for a request has landed.
    pub(super) prefetch_failed: bool,
}

/// One attempt at a request.
#[derive(Debug)]
pub(super) struct Execution {
    pub(super) request: RequestId,
    pub(super) model: ModelId,
    pub(super) worker: WorkerId,
    pub(super) arena: ArenaId,
    pub(super) lease: Lease,
    /// The transfer that carries its inputs.
    pub(super) transfer: TransferId,
    pub(super) inputs: Inputs,
    /// How long it may take, and until when that is.
    pub(super) limit: Duration,
    pub(super) times_out_at: Option<Instant>,
    pub(super) phase: Phase,
}

/// Where the inputs of an execution are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Inputs {
    /// On their way from the slot into the arena: both are in use, whatever becomes of the worker.
    Moving,
    /// In the arena.
    Landed,
    /// Nowhere: the transfer failed, for that reason.
    Failed(String),
}

/// Phases of an execution. One that is over has none: it is forgotten.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Phase {
    /// The worker executes.
    Running {
        /// When it is to be stopped: its time is over, or its deadline has passed.
        stop_at: Option<Instant>,
    },
    /// The worker has been told to stop.
    Stopping {
        /// Why.
        reason: StopReason,
        /// When the worker is to be killed.
        kill_at: Option<Instant>,
    },
    /// The worker has been killed and is not reaped.
    Killed {
        /// Why it had been told to stop.
        reason: StopReason,
    },
    /// The worker is done or lost, but the inputs are still moving.
    Ended {
        /// What happens when they have landed.
        verdict: Verdict,
    },
}

impl Phase {
    /// When its timer is due.
    pub(super) fn due(&self) -> Option<Instant> {
        match self {
            Self::Running { stop_at } => *stop_at,
            Self::Stopping { kill_at, .. } => *kill_at,
            Self::Killed { .. } | Self::Ended { .. } => None,
        }
    }

    /// Why it was told to stop, if it was.
    pub(super) fn stopped_for(&self) -> Option<StopReason> {
        match self {
            Self::Stopping { reason, .. } | Self::Killed { reason } => Some(*reason),
            Self::Running { .. } | Self::Ended { .. } => None,
        }
    }
}

/// Why an execution is told to stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum StopReason {
    /// Nobody wants the answer.
    Cancelled,
    /// The request's deadline has passed.
    Deadline,
    /// It takes too long.
    TimedOut,
}

impl StopReason {
    pub(super) fn rejection(self, limit: Duration) -> Rejection {
        match self {
            Self::Cancelled => Rejection::Cancelled,
            Self::Deadline => Rejection::Deadline,
            Self::TimedOut => Rejection::ExecutionTimedOut { limit },
        }
    }
}

/// What becomes of a request when an execution of it is over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It is answered.
    Reply(Result<(), Rejection>),
    /// Nothing is known: it is tried again.
    Retry,
}

/// What training wants of its part of the pool, where that gives way to models.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Claim {
    /// Nothing: models may lie there.
    #[default]
    Absent,
    /// It waits to have it.
    Asked,
    /// It has it.
    Admitted,
}
