//! The forked worker process of pswitch: attaches to the pool, builds models over it and executes them.
//!
//! - [`Zygote`] is forked first thing in `main` and forks the workers;
//! - [`serve`] is a worker's life: it maps what the controller shares and does what it says;
//! - [`serve_standard_input`] is that of a worker which is a program of its own and may have memory of its own;
//! - [`Executable`] is a program made ready: every operator found by name in libtorch's dispatcher, every argument in
//!   place, weights as views of a span. It runs any ATen operator and knows none.
//! - [`ExecutionArena`] points libtorch's allocator at the arena of the execution under way.
//! - On a GPU, executions are CUDA graphs, captured when a model is loaded.
//! - [`Trainer`] is a program that is trained: steps under autograd that are done wholly or not at all;
//!   [`TrainingTask`] is that with data, schedule and checkpoints, as a configuration describes it.
//!
//! This is the only library here that reaches libtorch. Its kernels are PyTorch's own and are called with the
//! arguments of the graph, so outputs are bit-identical to eager PyTorch on the same machine with as many threads.
#![warn(clippy::unwrap_used)]

mod aliasing;
mod alone;
mod arena;
mod cuda;
mod error;
mod executable;
mod ffi;
mod host;
mod libtorch;
mod process;
mod symbolic;
mod training;
mod work;
mod zygote;

pub use alone::serve_standard_input;
pub use arena::ExecutionArena;
pub use error::{BuildError, RunError, TaskError, WorkerError};
pub use executable::{Executable, Input, OutputShape, Watch};
pub use libtorch::TorchDevice;
pub use process::serve;
pub use pswitch_protocol::Channel;
pub use training::{
    Pace, PartialSnapshot, Phase, Snapshot, StateWorth, StepEnd, StepOrder, TaskStep, Trainer, TrainingTask,
    Upload,
};
pub use zygote::Zygote;
