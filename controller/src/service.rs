//! What a front end may ask of the server: the trait [`InferenceService`] and its types.
//!
//! A front end knows sockets and encodings, the service knows models, slots and workers; this trait is all they
//! share. The way of a request through it:
//!
//! 1. [`signature`](InferenceService::signature) tells what the model takes;
//! 2. [`reserve`](InferenceService::reserve) checks names, datatypes and shapes and gives a [`Submission`]: memory
//!    of a slot for every input;
//! 3. the front end [appends](Submission::append) the tensors' bytes as they arrive, straight into the slot;
//! 4. [`infer`](InferenceService::infer) runs the model; its [`Answer`] holds views of the slot, which is free again
//!    when the last view has been dropped, that is when the response has left.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;

mod datatype;
mod error;
mod signature;
mod submission;
mod training;

pub use datatype::Datatype;
pub use error::{ErrorClass, ServiceError};
pub use signature::{DimensionSignature, ModelSignature, TensorSignature, TensorSpec};
pub use submission::{PlacedTensor, Submission};
pub use training::{CheckpointStatus, Residence, TaskCommand, TaskState, TaskStatus};

/// What the service returns where it has to wait.
pub type ServiceFuture<'a, T> = Pin<Box<dyn Future<Output = Result<T, ServiceError>> + Send + 'a>>;

/// A server as its front ends see it.
pub trait InferenceService: Send + Sync + 'static {
    /// Whether the server can answer at all. A server that drains is live.
    fn is_live(&self) -> bool;

    /// Whether the server takes inference requests: everything loaded, a worker there, not draining.
    fn is_ready(&self) -> bool;

    /// Every model of the repository, those that could not be loaded too, sorted by name.
    fn models(&self) -> Vec<ModelStatus>;

    /// One model of the repository.
    ///
    /// # Errors
    /// [`ServiceError::UnknownModel`], [`ServiceError::UnknownVersion`].
    fn model(&self, name: &str, version: Option<&str>) -> Result<ModelStatus, ServiceError>;

    /// What a model takes and gives.
    ///
    /// # Errors
    /// As [`model`](Self::model), and [`ServiceError::ModelUnavailable`] for one that is not loaded.
    fn signature(&self, name: &str, version: Option<&str>) -> Result<Arc<ModelSignature>, ServiceError>;

    /// Checks the inputs against the signature and takes slot memory for them (and for the outputs to come).
    ///
    /// The submission's inputs are in the order of `inputs`, whatever the order of the signature. Dropping the
    /// submission gives the memory back. Does not block.
    ///
    /// # Errors
    /// As [`signature`](Self::signature); [`ServiceError::InvalidInput`] names tensor, expected and found;
    /// [`ServiceError::TooLarge`] if the slot memory can never hold the request and [`ServiceError::NoSlotMemory`]
    /// if it cannot now; [`ServiceError::Draining`].
    fn reserve(
        &self,
        name: &str,
        version: Option<&str>,
        inputs: &[TensorSpec],
    ) -> Result<Submission, ServiceError>;

    /// Runs the model on a submission whose every input is complete.
    ///
    /// **Dropping the future cancels the request**: one that still waits is never run, one that runs is finished (or
    /// stopped) without an answer. The slot is not given to anybody else before the worker is done with it.
    ///
    /// # Errors
    /// Everything that can happen on the way: see [`ServiceError`].
    fn infer(&self, submission: Submission, options: InferOptions) -> ServiceFuture<'_, Answer>;

    /// Loads a model of the repository, or loads it anew. Resolves when it is ready.
    ///
    /// # Errors
    /// [`ServiceError::Unsupported`] unless the service overrides this.
    fn load(&self, name: &str) -> ServiceFuture<'_, ()> {
        let model = name.to_owned();
        Box::pin(async move { Err(ServiceError::Unsupported { what: format!("loading model '{model}'") }) })
    }

    /// Unloads a model. Resolves when it no longer takes requests.
    ///
    /// # Errors
    /// [`ServiceError::Unsupported`] unless the service overrides this.
    fn unload(&self, name: &str) -> ServiceFuture<'_, ()> {
        let model = name.to_owned();
        Box::pin(async move { Err(ServiceError::Unsupported { what: format!("unloading model '{model}'") }) })
    }

    /// Takes a training task: `config` is the text of its configuration, in which relative paths are those of the server's
    /// working directory. Resolves when the task is known; it is prepared meanwhile.
    ///
    /// # Errors
    /// [`ServiceError::Unsupported`] unless the service overrides this; [`ServiceError::InvalidRequest`] for a
    /// configuration that means nothing, or a name that another task has that is not over.
    fn submit_training(&self, name: &str, config: &str) -> ServiceFuture<'_, TaskStatus> {
        let _ = config;
        let task = name.to_owned();
        Box::pin(async move { Err(ServiceError::Unsupported { what: format!("training task '{task}'") }) })
    }

    /// Every training task since the server's start, those that are over too, sorted by name.
    fn training(&self) -> Vec<TaskStatus> {
        Vec::new()
    }

    /// Tells a training task to do something. Resolves when it does, or is over.
    ///
    /// # Errors
    /// [`ServiceError::UnknownTask`]; [`ServiceError::InvalidRequest`] for a task that is over.
    fn command_training(&self, name: &str, command: TaskCommand) -> ServiceFuture<'_, TaskStatus> {
        let _ = command;
        let name = name.to_owned();
        Box::pin(async move { Err(ServiceError::UnknownTask { name }) })
    }

    /// The numbers of this moment that only the service knows, for the metrics.
    fn snapshot(&self) -> ServiceSnapshot;
}

/// State of a model in the repository index.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ModelState {
    /// Takes requests.
    Ready,
    /// Is being loaded.
    Loading,
    /// Is being unloaded.
    Unloading,
    /// Is not loaded or could not be: the reason tells.
    Unavailable,
}

impl ModelState {
    /// The name in the repository index.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Ready => "READY",
            Self::Loading => "LOADING",
            Self::Unloading => "UNLOADING",
            Self::Unavailable => "UNAVAILABLE",
        }
    }
}

/// One line of the repository index.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelStatus {
    /// Name, as in URLs.
    pub name: String,
    /// Version, as in URLs: pswitch has one of each model, "1".
    pub version: String,
    /// What the model can do now.
    pub state: ModelState,
    /// Why, where the state needs a reason; empty otherwise.
    pub reason: String,
}

impl ModelStatus {
    /// The same, if it is of the version that was asked for, should one have been.
    ///
    /// # Errors
    /// [`ServiceError::UnknownVersion`].
    pub fn of_version(self, asked: Option<&str>) -> Result<Self, ServiceError> {
        match asked {
            Some(asked) if asked != self.version => Err(ServiceError::UnknownVersion {
                model: self.name,
                version: asked.to_owned(),
                available: self.version,
            }),
            _ => Ok(self),
        }
    }
}

/// What a client asks about one request beside its tensors.
#[derive(Debug, Clone, Default)]
pub struct InferOptions {
    /// The client's own name of the request, for the spans that follow it; may be empty.
    pub id: String,
    /// When the client has no use for the answer any more.
    pub deadline: Option<Instant>,
}

/// Where the time of a request went, seen by the service.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Timings {
    /// From `infer` to the decision to run it.
    pub queue: Duration,
    /// From the decision to the first layer's computation, where weights had to move; zero for a resident model.
    pub switch: Duration,
    /// From there until the outputs lay in the slot.
    pub compute: Duration,
    /// Whether weights had to move.
    pub switched: bool,
}

/// One output of an answer.
#[derive(Debug, Clone)]
pub struct OutputTensor {
    /// Name, datatype and the shape it really has.
    pub spec: TensorSpec,
    /// Little-endian, row-major, dense: a view of the slot, not a copy.
    pub data: Bytes,
}

/// All outputs of a model for one request, in the order of its signature.
#[derive(Debug, Clone)]
pub struct Answer {
    /// The outputs.
    pub outputs: Vec<OutputTensor>,
    /// Where the time went.
    pub timings: Timings,
}

/// What the service tells the metrics of one model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelSnapshot {
    /// Name of the model.
    pub name: String,
    /// Requests that wait for their turn.
    pub queued: u64,
    /// Whether its weights are in the pool.
    pub resident: bool,
    /// Bytes of its span.
    pub span_bytes: u64,
    /// Times its weights were evicted.
    pub evictions: u64,
}

/// The numbers of one moment, taken whenever the metrics are read. Counts are since the server's start.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ServiceSnapshot {
    /// One entry a loaded model.
    pub models: Vec<ModelSnapshot>,
    /// Workers by the name of their state ("starting", "standby", "active" ...); a state without workers counts 0.
    pub workers: Vec<(&'static str, u64)>,
    /// Workers that were lost and replaced.
    pub worker_restarts: u64,
    /// Bytes of the pool.
    pub pool_bytes: u64,
    /// Bytes of the pool that hold resident weights.
    pub pool_resident_bytes: u64,
    /// Bytes of the memory that slots are cut from.
    pub slot_bytes: u64,
    /// Bytes of it that requests hold.
    pub slot_in_use_bytes: u64,
    /// Bytes of weights that were copied to the device.
    pub transferred_bytes: u64,
    /// Bytes of device memory that nobody has allocated, in any process, all devices together.
    pub device_free_bytes: u64,
    /// Bytes of device memory that libtorch has outside of the pool, in all workers.
    pub outside_bytes: u64,
    /// Allocations of device memory outside of the pool that libtorch has made in the workers that live.
    pub outside_allocations: u64,
    /// Graphs that the workers that live have captured.
    pub graphs: u64,
}
