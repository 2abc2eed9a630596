//! Errors as HTTP tells them.

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};

use crate::service::{ErrorClass, ServiceError};

/// A request's end without success.
#[derive(Debug)]
pub(super) struct Reject {
    pub(super) class: ErrorClass,
    pub(super) status: StatusCode,
    pub(super) message: String,
}

impl Reject {
    /// The request is wrong.
    pub(super) fn bad(message: impl Into<String>) -> Self {
        Self::new(ErrorClass::InvalidRequest, StatusCode::BAD_REQUEST, message)
    }

    /// One of its inputs is.
    pub(super) fn input(tensor: &str, message: impl Into<String>) -> Self {
        ServiceError::input(tensor, message).into()
    }

    pub(super) fn new(class: ErrorClass, status: StatusCode, message: impl Into<String>) -> Self {
        Self { class, status, message: message.into() }
    }
}

impl From<ServiceError> for Reject {
    fn from(error: ServiceError) -> Self {
        let class = error.class();
        Self::new(class, status(class), error.to_string())
    }
}

impl IntoResponse for Reject {
    fn into_response(self) -> Response {
        let body = serde_json::json!({ "error": self.message }).to_string();
        let mut response = (self.status, [(header::CONTENT_TYPE, "application/json")], body).into_response();
        if self.class == ErrorClass::Busy {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        response
    }
}

/// The status of a class of errors.
fn status(class: ErrorClass) -> StatusCode {
    match class {
        ErrorClass::InvalidRequest => StatusCode::BAD_REQUEST,
        ErrorClass::NotFound => StatusCode::NOT_FOUND,
        ErrorClass::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
        ErrorClass::Busy => StatusCode::TOO_MANY_REQUESTS,
        // A cancelled request is one whose client left; if it is another's doing, the client may come again.
        ErrorClass::Unavailable | ErrorClass::Cancelled => StatusCode::SERVICE_UNAVAILABLE,
        ErrorClass::Deadline => StatusCode::GATEWAY_TIMEOUT,
        ErrorClass::Unsupported => StatusCode::NOT_IMPLEMENTED,
        ErrorClass::ExecutionFailed | ErrorClass::Internal => StatusCode::INTERNAL_SERVER_ERROR,
    }
}
