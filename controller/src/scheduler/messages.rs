use std::fmt;
use std::time::{Duration, Instant};

use pswitch_mem_pool::{ArenaId, ModelId, Range};
use pswitch_protocol::{Executed, ExecutionFault, FaultClass};
use pswitch_transfer::TransferId;
use serde::Deserialize;

/// A request, numbered by the driver; no two that are unanswered have the same number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub u64);

/// A worker process, numbered by the supervisor; no number comes twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WorkerId(pub u32);

/// One execution of one request, numbered by the scheduler. A request that is tried again gets a new one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ExecutionId(pub u64);

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "request {}", self.0)
    }
}

impl fmt::Display for WorkerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "worker {}", self.0)
    }
}

impl fmt::Display for ExecutionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "execution {}", self.0)
    }
}

/// By what models get their places in the pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Homes {
    /// Each has one, for good; who comes in evicts what lies there.
    #[default]
    Fixed,
    /// As an allocator gives them: who comes in gets a place where there is a gap, and for that those are evicted that were
    /// used longest ago. What lies elsewhere stays where it is.
    LeastRecentlyUsed,
}

/// What the scheduler keeps to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SchedulerOptions {
    /// Requests of one model that are served in a row while others wait, at least 1.
    pub max_consecutive: u32,
    /// A request that has waited so long goes before all that have not, whatever is resident.
    pub max_wait: Duration,
    /// Requests that may wait, at least 1; more are refused.
    pub queue_limit: usize,
    /// Time for one execution; then it is stopped.
    pub execution_timeout: Duration,
    /// Time that a worker has to stop an execution; then it is killed.
    pub stop_grace: Duration,
    /// Times that a request is begun if its worker is lost under it, at least 1.
    pub attempts: u32,
    /// Whether weights move for requests that wait, as long as they are in nobody's way.
    pub prefetch: bool,
    /// By what models get their places in the pool.
    pub homes: Homes,
}

/// What one model keeps to where it differs from [`SchedulerOptions`].
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ModelLimits {
    /// Requests of this model that may wait.
    pub queue_limit: Option<usize>,
    /// Time for one execution.
    pub execution_timeout: Option<Duration>,
}

/// What happened.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// A request came; its tensors lie in their slot. It is answered by exactly one [`Action::Reply`].
    Submitted {
        /// Its number.
        request: RequestId,
        /// The model it is for.
        model: ModelId,
        /// When nobody wants the answer any more.
        deadline: Option<Instant>,
    },
    /// A request whose execution was answered has to run once more, under the same number: its outputs did not fit
    /// their place. It was accepted before, so neither limits nor draining refuse it.
    Resubmitted {
        /// Its number.
        request: RequestId,
        /// The model it is for.
        model: ModelId,
        /// When nobody wants the answer any more.
        deadline: Option<Instant>,
    },
    /// Nobody wants the answer any more. The reply still comes: it frees the slot.
    Cancelled {
        /// The request.
        request: RequestId,
    },
    /// A worker process begins.
    WorkerStarting {
        /// Its number, never used before.
        worker: WorkerId,
    },
    /// A worker has built every model that was placed and can execute.
    WorkerReady {
        /// The worker.
        worker: WorkerId,
    },
    /// A worker has said that it ends: it is given nothing any more. What it executed is over with its loss, or before.
    WorkerEnding {
        /// The worker.
        worker: WorkerId,
    },
    /// A worker is gone and reaped: it writes nothing any more.
    WorkerLost {
        /// The worker.
        worker: WorkerId,
    },
    /// Everything of a transfer is in its place.
    TransferLanded {
        /// The transfer.
        transfer: TransferId,
    },
    /// A transfer failed and is over: it writes nothing any more.
    TransferFailed {
        /// The transfer.
        transfer: TransferId,
        /// Why.
        reason: String,
    },
    /// A worker is done with an execution.
    ExecutionFinished {
        /// The execution.
        execution: ExecutionId,
        /// How it ended.
        outcome: Outcome,
    },
    /// A model is to go. Its waiting requests are refused, those that run are finished, then comes
    /// [`Action::Forget`].
    ModelRemoved {
        /// The model.
        model: ModelId,
    },
    /// Training wants its part of the pool, where that gives way to models: it is answered by [`Action::AdmitTraining`] or
    /// [`Action::RefuseTraining`], when no request is there or [`Event::Hold`] keeps them.
    TrainingAsks,
    /// Training uses its part no more, or wants it no more.
    TrainingLeaves,
    /// Something else is to have the device: no execution begins until [`Event::Release`].
    Hold,
    /// Executions may begin again.
    Release,
    /// Models get their places by other rules from now on. Under [`Homes::Fixed`] those that lie in another place than their
    /// own are dropped from the pool when nobody uses them.
    Homes {
        /// The rules.
        homes: Homes,
    },
    /// The server is to end: what is new is refused, what was accepted is finished.
    Draining,
    /// Time has passed: [`Scheduler::next_deadline`](super::Scheduler::next_deadline) asks for it.
    Tick,
}

/// How an execution ended. In each case the worker is ready for the next, unless it has said that it ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The outputs lie in the slot. It had waited for all groups and for its inputs.
    Completed,
    /// There are no outputs.
    Failed(ExecutionFault),
    /// It saw the stop flag.
    Stopped,
}

impl Outcome {
    /// The scheduler's view of a worker's message.
    #[must_use]
    pub fn of(result: &Result<Executed, ExecutionFault>) -> Self {
        match result {
            Ok(_) => Self::Completed,
            Err(fault) if fault.class == FaultClass::Stopped => Self::Stopped,
            Err(fault) => Self::Failed(fault.clone()),
        }
    }
}

/// What is to be done, in this order.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Start one transfer with the request's inputs, and behind them the model's weights if there is a load; and tell
    /// the worker to run, at the same moment.
    Execute {
        /// Number of the execution.
        execution: ExecutionId,
        /// The request it is for.
        request: RequestId,
        /// The worker that runs it; it executes nothing else.
        worker: WorkerId,
        /// The model.
        model: ModelId,
        /// The arena for inputs and activations; nobody else has it.
        arena: ArenaId,
        /// Number of the transfer.
        transfer: TransferId,
        /// The switch, unless the weights are there or on their way.
        load: Option<Load>,
    },
    /// Start a transfer of a model's weights, while others execute.
    Prefetch {
        /// Number of the transfer.
        transfer: TransferId,
        /// The model.
        model: ModelId,
        /// What else there is to know.
        load: Load,
    },
    /// Start the transfer that brings back what lay in training's part of the pool.
    BringBack {
        /// Number of the transfer.
        transfer: TransferId,
        /// What makes room for it.
        load: Load,
    },
    /// Training's part of the pool is there, and stays until [`Event::TrainingLeaves`].
    AdmitTraining,
    /// It could not be brought back. Training may ask again.
    RefuseTraining,
    /// Poison a model's doorbells: its transfer failed, and executions wait there.
    Poison {
        /// The model.
        model: ModelId,
    },
    /// Poison the doorbell of an execution's inputs: their transfer failed.
    PoisonInputs {
        /// The execution.
        execution: ExecutionId,
    },
    /// Clear the doorbells of these models at once, where nobody waits now: a transfer that was to do it failed, or they were
    /// dropped from the pool for nobody who came in their place.
    Clear {
        /// The models, none of them in the pool.
        models: Vec<ModelId>,
    },
    /// Set the stop flag of the worker of this execution.
    Stop {
        /// The execution.
        execution: ExecutionId,
    },
    /// Kill a worker that did not stop. [`Event::WorkerLost`] is expected.
    Kill {
        /// The worker.
        worker: WorkerId,
    },
    /// Answer a request. Neither a worker nor a transfer touches its slot any more.
    Reply {
        /// The request.
        request: RequestId,
        /// The answer: the outputs are there, or why they are not.
        result: Result<(), Rejection>,
    },
    /// Drop all that belongs to a removed model: nobody uses it, its home is free.
    Forget {
        /// The model.
        model: ModelId,
    },
}

/// Weights that move into the pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Load {
    /// Where they go: the place of the span in the pool from now on, until the next load.
    pub place: Range,
    /// Models, or training, that were in the pool where the new one goes. The transfer clears their doorbells before its last one rings.
    pub evicted: Vec<ModelId>,
}

/// Why a request has no outputs.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Rejection {
    /// Too many wait already.
    #[error("{waiting} requests wait already, {limit} may")]
    QueueFull {
        /// Requests that wait, for the model or for the device.
        waiting: usize,
        /// How many may.
        limit: usize,
    },
    /// There is no such model.
    #[error("no such model")]
    UnknownModel,
    /// The model can never be in the pool.
    #[error("the model needs {asked_bytes} bytes of the pool, which has {capacity_bytes} for weights")]
    NeverFits {
        /// What its weights need.
        asked_bytes: u64,
        /// What there is for weights.
        capacity_bytes: u64,
    },
    /// The model was removed while the request waited.
    #[error("the model was removed")]
    ModelRemoved,
    /// The server is about to end.
    #[error("the server is shutting down")]
    Draining,
    /// The request's deadline has passed.
    #[error("the deadline passed")]
    Deadline,
    /// Nobody wanted the answer any more.
    #[error("the request was cancelled")]
    Cancelled,
    /// Its worker was lost as often as a request is begun.
    #[error("the worker was lost {attempts} times")]
    WorkerLost {
        /// How often it was begun.
        attempts: u32,
    },
    /// The execution took too long and was stopped.
    #[error("the execution took longer than {} ms", limit.as_millis())]
    ExecutionTimedOut {
        /// How long it may take.
        limit: Duration,
    },
    /// The model raised.
    #[error("{}", .0.message)]
    ExecutionFailed(ExecutionFault),
    /// Weights or inputs did not come.
    #[error("the transfer failed: {reason}")]
    TransferFailed {
        /// Why.
        reason: String,
    },
}
