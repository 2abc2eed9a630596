use std::collections::BTreeMap;
use std::sync::mpsc;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Instant;

use mio::Waker;
use pswitch_mem_pool::{ModelId, Range};
use pswitch_model::{Layer, Table};
use pswitch_protocol::{ExitCause, PlacedTensor};
use pswitch_transfer::{Plan, TransferError, TransferId, TransferReport};
use tokio::sync::oneshot;

use super::OutsideUse;
use crate::scheduler::{Homes, ModelLimits, RequestId, WorkerId};
use crate::service::ServiceError;
use crate::slots::Slot;

/// A profile in a slot begins at a multiple of this.
pub(crate) const PROFILE_ALIGNMENT_BYTES: u64 = 64;

/// What the driver has to know of a model.
#[derive(Debug)]
pub(crate) struct ModelSpec {
    pub(crate) id: ModelId,
    pub(crate) name: String,
    pub(crate) path: String,
    pub(crate) digest: u64,
    pub(crate) span_bytes: u64,
    /// One a node of the program, with the bytes that it needs first.
    pub(crate) layers: Vec<Layer>,
    /// Weights of which an execution reads some rows only.
    pub(crate) tables: Vec<Table>,
    /// Bytes of the inputs of the shapes at export.
    pub(crate) example_bytes: u64,
    pub(crate) limits: ModelLimits,
    /// Why it was taken out of service, once a worker that replaced another could not build it.
    pub(crate) lost: OnceLock<String>,
}

/// Tables that a device may read from the host store, and up to which size of a request that is worth it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct HostTables {
    /// In the order of the span.
    pub(crate) tables: Vec<Table>,
    /// A request with inputs of more bytes waits for the tables instead.
    pub(crate) most_input_bytes: u64,
}

/// One input of a job, in the order of the program's inputs.
#[derive(Debug, Clone)]
pub(crate) enum JobInput {
    Tensor { dtype: u8, shape: Vec<u64>, at: Range },
    Integer(i64),
}

/// A request on its way through the driver: everything lies in its slot.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) request: RequestId,
    pub(crate) model: ModelId,
    /// Places are relative to the slot.
    pub(crate) inputs: Vec<JobInput>,
    /// Place for the outputs in the slot.
    pub(crate) outputs: Range,
    /// Place for the times of all nodes in the slot, if they are to be taken.
    pub(crate) profile: Option<Range>,
    pub(crate) slot: Slot,
    pub(crate) deadline: Option<Instant>,
    pub(crate) submitted_ns: u64,
    pub(crate) answer: oneshot::Sender<Result<Finished, ServiceError>>,
}

impl Job {
    /// Bytes of the inputs that are tensors, in their order.
    pub(super) fn tensor_bytes(&self) -> impl Iterator<Item = u64> {
        self.inputs.iter().filter_map(|input| match input {
            JobInput::Tensor { at, .. } => Some(at.bytes),
            JobInput::Integer(_) => None,
        })
    }

    /// Moves the job to a slot with more place for its outputs. An execution says once how much it needs.
    pub(super) fn grow_outputs(&mut self, bytes: u64) -> Result<(), ServiceError> {
        if bytes <= self.outputs.bytes {
            let message = format!("outputs of {bytes} bytes did not fit {} bytes", self.outputs.bytes);
            return Err(ServiceError::Internal { message });
        }
        // The place for a profile lies behind the outputs and moves along.
        let mut end = self.outputs.offset + bytes;
        if let Some(profile) = &mut self.profile {
            profile.offset = end.next_multiple_of(PROFILE_ALIGNMENT_BYTES);
            end = profile.end();
        }
        self.slot = self.slot.enlarged(self.outputs.offset, end)?;
        self.outputs.bytes = bytes;
        Ok(())
    }
}

/// The end of a job that has outputs.
#[derive(Debug)]
pub(crate) struct Finished {
    pub(crate) slot: Slot,
    /// Places are those in the shared memory that slots are cut from.
    pub(crate) outputs: Vec<PlacedTensor>,
    /// The job's place for a profile, as it was in the end.
    pub(crate) profile: Option<Range>,
    pub(crate) times: JobTimes,
}

/// Moments of a job in nanoseconds of `CLOCK_MONOTONIC`, which all processes share.
#[derive(Debug, Clone, Copy)]
pub(crate) struct JobTimes {
    pub(crate) submitted_ns: u64,
    pub(crate) decided_ns: u64,
    pub(crate) first_layer_ns: u64,
    pub(crate) finished_ns: u64,
    /// Time the worker stood still because a group had not landed.
    pub(crate) waited_ns: u64,
    /// Whether weights had to move.
    pub(crate) switched: bool,
}

/// All that a driver is told.
#[derive(Debug)]
pub(crate) enum Mail {
    /// A request comes in: its inputs are being written to their slot.
    Announced,
    Submit(Box<Job>),
    Cancel(RequestId),
    /// Give a model its home and have all workers build it.
    Place {
        spec: Arc<ModelSpec>,
        host_tables: HostTables,
        done: oneshot::Sender<Result<(), String>>,
    },
    /// Move a model by this plan from now on.
    Plan {
        model: ModelId,
        plan: Box<Plan>,
    },
    /// Whether weights move ahead of their turn from now on.
    Prefetch(bool),
    /// By what models get their places from now on.
    Homes(Homes),
    /// Refuse what waits for a model, finish what runs, then forget it.
    Remove {
        model: ModelId,
        done: oneshot::Sender<()>,
    },
    Landed {
        transfer: TransferId,
        result: Result<TransferReport, TransferError>,
    },
    Exited {
        worker: WorkerId,
        cause: ExitCause,
    },
    ForkFailed {
        worker: WorkerId,
        reason: String,
    },
    /// Training wants its part of the pool.
    TrainingAsks,
    /// Training uses it no more.
    TrainingLeaves,
    /// No task could compute any more: whoever waits for one need not.
    TrainingRests,
    /// Refuse what is new; `done` when nothing is left.
    Drain {
        done: oneshot::Sender<()>,
    },
    /// End the driver and its workers.
    Stop,
}

/// Where mail for a driver is put; cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Mailbox {
    sender: mpsc::Sender<Mail>,
    waker: Arc<Waker>,
}

impl Mailbox {
    pub(crate) fn new(waker: Waker) -> (Self, mpsc::Receiver<Mail>) {
        let (sender, receiver) = mpsc::channel();
        (Self { sender, waker: Arc::new(waker) }, receiver)
    }

    /// Puts mail in and wakes the driver. False if the driver has ended: the mail is dropped, and with it the answers
    /// that somebody waits for.
    pub(crate) fn put(&self, mail: Mail) -> bool {
        self.sender.send(mail).is_ok() && self.waker.wake().is_ok()
    }
}

/// What others may see of a driver, as of its last step.
#[derive(Debug, Clone, Default)]
pub(crate) struct DriverView {
    /// Requests that wait, by model.
    pub(crate) queued: BTreeMap<ModelId, usize>,
    /// Requests that execute.
    pub(crate) executing: usize,
    /// Models whose weights are in the pool or on their way.
    pub(crate) resident: Vec<ModelId>,
    pub(crate) resident_bytes: u64,
    /// Times that each model's weights were evicted.
    pub(crate) evictions: BTreeMap<ModelId, u64>,
    /// What the workers have of the device beside the pool.
    pub(crate) outside: OutsideUse,
    pub(crate) workers: Vec<(&'static str, usize)>,
    pub(crate) worker_restarts: u64,
    pub(crate) transferred_bytes: u64,
}

/// The view's place, shared by the driver and those who look.
#[derive(Debug, Clone, Default)]
pub(crate) struct SharedView(Arc<Mutex<DriverView>>);

impl SharedView {
    pub(crate) fn get(&self) -> DriverView {
        self.read(DriverView::clone)
    }

    pub(crate) fn read<T>(&self, look: impl FnOnce(&DriverView) -> T) -> T {
        look(&self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn update(&self, change: impl FnOnce(&mut DriverView)) {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner));
    }
}
