//! The controlling half of pswitch: configuration, model repository, scheduler, supervision of workers, front ends.
//!
//! - [`Config`] and [`Repository`] say what is to be served, and how;
//! - [`scheduler`] decides which request runs next and which weights move for it, as a state machine without IO;
//! - [`Server`] brings devices, workers and models together and answers through [`InferenceService`];
//! - [`HttpServer`] speaks the Open Inference Protocol v2 for any [`InferenceService`].
//!
//! ```
//! use pswitch_controller::Config;
//!
//! let config = Config::parse("server.yaml", "devices:\n  - {id: host, pool_size: 2GiB, workers: 3}\n")?;
//! assert_eq!(config.devices[0].workers, 3);
//! # Ok::<(), pswitch_controller::ControllerError>(())
//! ```
#![warn(clippy::unwrap_used)]

mod config;
mod driver;
mod error;
mod http;
mod metrics;
mod repository;
pub mod scheduler;
mod server;
mod service;
mod slots;
mod supervisor;
mod training;
mod yaml;

pub use config::{
    Bandwidth, ByteSize, Config, ConfigOverrides, DeviceChoice, DeviceConfig, HttpConfig, LimitsConfig,
    LinkConfig, ParseSizeError, SizeSetting, TrainingConfig,
};
pub use error::ControllerError;
pub use http::{HttpOptions, HttpServer};
pub use metrics::{Completion, ConnectionRecord, Metrics, RequestRecord};
pub use repository::{BrokenEntry, ModelEntry, ModelName, ModelSettings, Repository};
pub use server::{
    DeviceProfile, LinkFit, LoadEvent, LoadObserver, PendingModels, Server, describe, profile_yaml,
};
pub use service::{
    Answer, CheckpointStatus, Datatype, DimensionSignature, ErrorClass, InferOptions, InferenceService,
    ModelSignature, ModelSnapshot, ModelState, ModelStatus, OutputTensor, PlacedTensor, Residence,
    ServiceError, ServiceFuture, ServiceSnapshot, Submission, TaskCommand, TaskState, TaskStatus,
    TensorSignature, TensorSpec, Timings,
};
pub use slots::{FrozenSlot, Slot, SlotMemory};
pub use yaml::YamlError;
