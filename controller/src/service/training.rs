//! Training tasks as front ends see them.

use std::path::PathBuf;

use pswitch_train::ProgressReport;
use serde::{Deserialize, Serialize};

/// A training task.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TaskStatus {
    /// Its name, as in URLs.
    pub name: String,
    /// What it does now.
    pub state: TaskState,
    /// Why, where the state needs a reason; empty otherwise.
    pub reason: String,
    /// The device that it trains on.
    pub device: String,
    /// Steps that count.
    pub steps_done: u64,
    /// Steps that it has in all; 0 before its data have been read.
    pub total_steps: u64,
    /// The learning rate of the last step.
    pub learning_rate: Option<f64>,
    /// The account of its steps and interruptions since the server took it.
    pub progress: ProgressReport,
    /// The last checkpoint that was written.
    pub checkpoint: Option<CheckpointStatus>,
    /// Why the last one could not be; empty otherwise. Training goes on, and the next is tried.
    pub checkpoint_error: String,
    /// How long it still computed when requests came last, in microseconds.
    pub last_yield_us: Option<u64>,
    /// Where its state is.
    pub residence: Residence,
    /// Times that its state, or a part of it, made room for a model.
    pub made_room: u64,
    /// The file that holds a line of JSON for every step that is logged.
    pub log: PathBuf,
}

/// Where the state of a task is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Residence {
    /// In its place in the pool.
    Resident,
    /// On its way to the host or elsewhere in the pool, or back.
    Moving,
    /// Elsewhere in the pool, all of it or a part: a model lies in its place, or did.
    Aside,
    /// On the host, all of it or a part: a model lies in its place, or did.
    Host,
}

impl Residence {
    /// The name, as in JSON.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Resident => "resident",
            Self::Moving => "moving",
            Self::Aside => "aside",
            Self::Host => "host",
        }
    }
}

/// A checkpoint that was written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointStatus {
    /// Steps that it stands for.
    pub step: u64,
    /// The file.
    pub path: PathBuf,
}

/// What a task does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TaskState {
    /// Its worker starts and builds it.
    Preparing,
    /// It computes.
    Training,
    /// It could compute, but requests, or other tasks in their turn, have the device.
    Waiting,
    /// It was told to pause.
    Paused,
    /// All its steps are done.
    Finished,
    /// It cannot go on: the reason tells. Its last checkpoint is kept.
    Failed,
    /// It was told to stop.
    Stopped,
}

impl TaskState {
    /// The name, as in JSON and metrics.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Preparing => "preparing",
            Self::Training => "training",
            Self::Waiting => "waiting",
            Self::Paused => "paused",
            Self::Finished => "finished",
            Self::Failed => "failed",
            Self::Stopped => "stopped",
        }
    }

    /// Whether it is over.
    #[must_use]
    pub fn is_over(self) -> bool {
        matches!(self, Self::Finished | Self::Failed | Self::Stopped)
    }
}

/// What a task can be told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TaskCommand {
    /// To compute no further step until it is told to go on.
    Pause,
    /// To go on.
    Resume,
    /// To write a last checkpoint, if it has a place for them, and end. One that cannot write it is paused; one that has made all its
    /// steps goes on trying.
    Stop,
    /// To end without a checkpoint: what it has learned since its last one is lost.
    Discard,
}
