//! Scheduler, switcher, supervision of workers and front ends of pswitch.

mod http;
mod metrics;
mod service;
mod slots;

pub use http::{HttpOptions, HttpServer};
pub use metrics::{Completion, ConnectionRecord, Metrics, RequestRecord};
pub use service::{
    Answer, Datatype, DimensionSignature, ErrorClass, InferOptions, InferenceService, ModelSignature,
    ModelSnapshot, ModelState, ModelStatus, OutputTensor, PlacedTensor, ServiceError, ServiceFuture,
    ServiceSnapshot, Submission, TensorSignature, TensorSpec, Timings,
};
pub use slots::{FrozenSlot, Slot, SlotMemory};
