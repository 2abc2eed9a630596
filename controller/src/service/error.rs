//! Why a request was not answered with outputs.

use std::time::Duration;

/// What an error means to whoever asked; front ends map it to their status codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ErrorClass {
    /// The request is wrong and will be wrong again.
    InvalidRequest,
    /// No such model or version.
    NotFound,
    /// The request is larger than the server ever takes.
    TooLarge,
    /// The server has too much to do now.
    Busy,
    /// The server or the model is not there now: starting, draining, a lost worker.
    Unavailable,
    /// The answer came too late or would have.
    Deadline,
    /// The model failed on this request.
    ExecutionFailed,
    /// The server does not offer this.
    Unsupported,
    /// A fault of the server.
    Internal,
    /// Nobody waits for the answer any more.
    Cancelled,
}

impl ErrorClass {
    /// Every class.
    pub const ALL: [Self; 10] = [
        Self::InvalidRequest,
        Self::NotFound,
        Self::TooLarge,
        Self::Busy,
        Self::Unavailable,
        Self::Deadline,
        Self::ExecutionFailed,
        Self::Unsupported,
        Self::Internal,
        Self::Cancelled,
    ];

    /// Name in metrics.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::InvalidRequest => "invalid_request",
            Self::NotFound => "not_found",
            Self::TooLarge => "too_large",
            Self::Busy => "busy",
            Self::Unavailable => "unavailable",
            Self::Deadline => "deadline",
            Self::ExecutionFailed => "execution_failed",
            Self::Unsupported => "unsupported",
            Self::Internal => "internal",
            Self::Cancelled => "cancelled",
        }
    }
}

/// Why the service refused a request or could not finish it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ServiceError {
    /// The repository has no model of this name.
    #[error("unknown model '{model}'")]
    UnknownModel {
        /// As asked for.
        model: String,
    },
    /// There is no training task of this name.
    #[error("unknown training task '{name}'")]
    UnknownTask {
        /// As asked for.
        name: String,
    },
    /// The model has no such version.
    #[error("model '{model}' has no version '{version}', only '{available}'")]
    UnknownVersion {
        /// Name of the model.
        model: String,
        /// As asked for.
        version: String,
        /// The one there is.
        available: String,
    },
    /// The model is known but not loaded.
    #[error("model '{model}' is not ready: {reason}")]
    ModelUnavailable {
        /// Name of the model.
        model: String,
        /// Its state, or why it could not be loaded.
        reason: String,
    },
    /// One tensor of the request does not fit the model or its own description.
    #[error("input '{tensor}': {message}")]
    InvalidInput {
        /// Name of the tensor.
        tensor: String,
        /// Expected and found.
        message: String,
    },
    /// The request as a whole is wrong.
    #[error("{message}")]
    InvalidRequest {
        /// Expected and found.
        message: String,
    },
    /// The request can never be taken.
    #[error("{what} of {asked_bytes} bytes exceeds the limit of {limit_bytes} bytes")]
    TooLarge {
        /// What is too large.
        what: String,
        /// Its size.
        asked_bytes: u64,
        /// What the server takes at most.
        limit_bytes: u64,
    },
    /// All memory for requests' tensors is in use.
    #[error(
        "no room for {asked_bytes} bytes of tensors now: {in_use_bytes} of {capacity_bytes} bytes hold other requests"
    )]
    NoSlotMemory {
        /// What the request needs.
        asked_bytes: u64,
        /// What other requests hold.
        in_use_bytes: u64,
        /// What there is.
        capacity_bytes: u64,
    },
    /// Too many requests wait already.
    #[error("{queued} requests wait already, the limit is {limit}")]
    QueueFull {
        /// Requests in the queue.
        queued: u64,
        /// Its limit.
        limit: u64,
    },
    /// The server finishes what it has accepted and takes nothing new.
    #[error("the server is shutting down")]
    Draining,
    /// Workers died with the request in their hands.
    #[error("lost {attempts} worker(s) in the middle of this request: {reason}")]
    WorkerLost {
        /// How often the request was tried.
        attempts: u32,
        /// How the last one ended.
        reason: String,
    },
    /// The client's own deadline passed.
    #[error("the request's deadline passed after {:.3} ms", waited.as_secs_f64() * 1e3)]
    DeadlineExceeded {
        /// Time since the request was handed over.
        waited: Duration,
    },
    /// The server's limit on one execution passed.
    #[error("the execution was stopped after {:.3} ms, the server's limit", limit.as_secs_f64() * 1e3)]
    ExecutionTimedOut {
        /// The limit.
        limit: Duration,
    },
    /// The model raised on these inputs, such as an index out of range.
    #[error("model '{model}' failed: {message}")]
    ExecutionFailed {
        /// Name of the model.
        model: String,
        /// First line of what libtorch said.
        message: String,
    },
    /// The weights could not be moved to the device.
    #[error("moving the weights of model '{model}' failed: {message}")]
    TransferFailed {
        /// Name of the model.
        model: String,
        /// Cause.
        message: String,
    },
    /// This server does not offer what was asked.
    #[error("this server does not support {what}")]
    Unsupported {
        /// What was asked.
        what: String,
    },
    /// The request was cancelled.
    #[error("the request was cancelled")]
    Cancelled,
    /// A fault of the server.
    #[error("internal error: {message}")]
    Internal {
        /// Cause.
        message: String,
    },
}

impl ServiceError {
    /// What the error means to whoever asked.
    #[must_use]
    pub const fn class(&self) -> ErrorClass {
        match self {
            Self::UnknownModel { .. } | Self::UnknownVersion { .. } | Self::UnknownTask { .. } => {
                ErrorClass::NotFound
            }
            Self::InvalidInput { .. } | Self::InvalidRequest { .. } => ErrorClass::InvalidRequest,
            Self::TooLarge { .. } => ErrorClass::TooLarge,
            Self::NoSlotMemory { .. } | Self::QueueFull { .. } => ErrorClass::Busy,
            Self::ModelUnavailable { .. } | Self::Draining | Self::WorkerLost { .. } => {
                ErrorClass::Unavailable
            }
            Self::DeadlineExceeded { .. } | Self::ExecutionTimedOut { .. } => ErrorClass::Deadline,
            Self::ExecutionFailed { .. } => ErrorClass::ExecutionFailed,
            Self::Unsupported { .. } => ErrorClass::Unsupported,
            Self::Cancelled => ErrorClass::Cancelled,
            Self::TransferFailed { .. } | Self::Internal { .. } => ErrorClass::Internal,
        }
    }

    pub(crate) fn input(tensor: &str, message: impl Into<String>) -> Self {
        Self::InvalidInput { tensor: tensor.to_owned(), message: message.into() }
    }
}
