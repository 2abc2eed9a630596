use std::time::Duration;

use pswitch_protocol::{ExecutionFault, FaultClass};

use crate::scheduler::Rejection;
use crate::service::ServiceError;

/// What a client is told of a rejection. `waited` is the time since the request was handed over.
pub(super) fn service_error(rejection: Rejection, model: &str, waited: Duration) -> ServiceError {
    let unavailable = |reason: String| ServiceError::ModelUnavailable { model: model.to_owned(), reason };
    match rejection {
        Rejection::QueueFull { waiting, limit } => {
            ServiceError::QueueFull { queued: waiting as u64, limit: limit as u64 }
        }
        Rejection::UnknownModel | Rejection::ModelRemoved => unavailable("it was unloaded".to_owned()),
        Rejection::NeverFits { .. } => unavailable(rejection.to_string()),
        Rejection::Draining => ServiceError::Draining,
        Rejection::Deadline => ServiceError::DeadlineExceeded { waited },
        Rejection::Cancelled => ServiceError::Cancelled,
        Rejection::WorkerLost { attempts } => {
            ServiceError::WorkerLost { attempts, reason: "the worker process ended".to_owned() }
        }
        Rejection::ExecutionTimedOut { limit } => ServiceError::ExecutionTimedOut { limit },
        Rejection::ExecutionFailed(ExecutionFault { class: FaultClass::Input, message }) => {
            ServiceError::InvalidRequest { message: format!("model '{model}' refused the inputs: {message}") }
        }
        Rejection::ExecutionFailed(fault) => {
            ServiceError::ExecutionFailed { model: model.to_owned(), message: fault.message }
        }
        Rejection::TransferFailed { reason } => {
            ServiceError::TransferFailed { model: model.to_owned(), message: reason }
        }
    }
}
