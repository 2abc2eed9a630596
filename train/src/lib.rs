//! What a training task is, as far as that needs neither a GPU nor libtorch nor a process: its configuration, its data,
//! which rows each step is computed from, its learning rates and seeds, its checkpoints, and the account of it.
//!
//! Everything that a step depends on follows from the configuration and the number of the step, by pure functions:
//! [`Schedule::rate`], [`step_seed`], [`Batches::batch`]. So a task that is interrupted anywhere, or that goes on from a
//! [`Checkpoint`], computes what it would have computed anyway.
//!
//! ```
//! use pswitch_train::{
//!     ArrayInfo, Batches, RowSource, Synthetic, SyntheticArray, TaskConfig, TrainError, step_seed,
//! };
//! use pswitch_model::DType;
//!
//! # fn main() -> Result<(), TrainError> {
//! let config = TaskConfig::from_yaml(
//!     "
//!     program: classifier.pt2
//!     optimizer: {kind: sgd, lr: 0.1, momentum: 0.9}
//!     schedule: {kind: cosine, warm_up: 5}
//!     data: {synthetic: {rows: 100, batch_size: 8}}
//!     length: {epochs: 4}
//!     ",
//! )?;
//! let image = ArrayInfo::new("image", DType::F32, &[3, 8, 8])?;
//! let label = ArrayInfo::new("label", DType::I64, &[])?;
//! let arrays = [image, label].map(|info| SyntheticArray { info, below: 10 });
//! let data = Synthetic::new(100, config.seed, arrays.into())?;
//!
//! let mut batches = Batches::new(data.rows(), config.data.batch_size(), Some(config.seed), false)?;
//! let total_steps = config.total_steps(batches.per_epoch())?;
//! assert_eq!(total_steps, 52);
//!
//! // What step 20 is computed from, whether or not those before it were computed in this process.
//! let batch = batches.batch(20);
//! let mut labels = vec![0; batch.rows.len() * 8];
//! data.gather(1, &batch.rows, &mut labels)?;
//! assert!(labels.chunks(8).all(|label| label[0] < 10));
//! let rate = config.schedule.rate(config.optimizer.learning_rate(), 20, total_steps);
//! assert!(rate > 0.05 && rate < 0.1);
//! let _seed = step_seed(config.seed, 20);
//! # Ok(())
//! # }
//! ```

mod batches;
mod checkpoint;
mod config;
mod data;
mod error;
mod progress;
mod schedule;
mod seed;
mod state;

pub use batches::{BatchRows, Batches};
pub use checkpoint::{
    Checkpoint, CheckpointState, CheckpointTensor, FolderClaim, OPTIMIZER_PREFIX, Position, SavedTensor,
    check_checkpoint, latest_checkpoint, write_checkpoint, write_diverged,
};
pub use config::{CheckpointConfig, DataConfig, Length, Optimizer, OptimizerKind, TaskConfig};
pub use data::{ArrayInfo, Dataset, NpyError, RowSource, Synthetic, SyntheticArray};
pub use error::TrainError;
pub use progress::{InterruptionReason, Progress, ProgressEvent, ProgressLine, ProgressReport, ReasonReport};
pub use schedule::Schedule;
pub use seed::step_seed;
pub use state::{Role, StateLayout, StateTensor};

/// The README's example runs as a test.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
