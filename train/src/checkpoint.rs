mod file_name;
mod folder;
mod read;
mod write;

use serde::{Deserialize, Serialize};

use crate::OptimizerKind;

pub use folder::FolderClaim;
pub use read::{Checkpoint, CheckpointTensor, latest_checkpoint};
pub use write::{SavedTensor, check_checkpoint, write_checkpoint, write_diverged};

/// What stands ahead of the names of the optimizer's tensors in a checkpoint, and of no tensor of the model's.
pub const OPTIMIZER_PREFIX: &str = "optimizer.";

/// Where a task is: with the tensors of a checkpoint, all that it takes to go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    /// Steps done; the number of the next one, counted from 0.
    pub step: u64,
    /// Rows that these steps were computed from.
    pub samples: u64,
    /// The task's seed.
    pub seed: u64,
}

/// What a checkpoint says beside its tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CheckpointState {
    /// Where the task is.
    pub position: Position,
    /// Whose state the optimizer's tensors are.
    pub optimizer: OptimizerKind,
}

/// Keys of the metadata. The values are JSON, but for that of `format`, which tells other readers of PyTorch.
const POSITION: &str = "position";
const OPTIMIZER: &str = "optimizer";
const FORMAT: (&str, &str) = ("format", "pt");
