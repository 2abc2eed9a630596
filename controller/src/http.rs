//! Open Inference Protocol v2 over HTTP/1.1, with the extensions of Triton that clients rely on: binary tensor data,
//! model repository, statistics, parameters; training tasks, an extension of our own; and metrics for Prometheus.
//!
//! | verb and path | answer |
//! | --- | --- |
//! | `GET /v2` | name, version and extensions of the server |
//! | `GET /v2/health/live`, `GET /v2/health/ready` | 200 or 503 |
//! | `GET /v2/models/M[/versions/V]` | inputs and outputs |
//! | `GET /v2/models/M[/versions/V]/ready` | 200 or 503 |
//! | `POST /v2/models/M[/versions/V]/infer` | inference |
//! | `GET /v2/models[/M[/versions/V]]/stats` | statistics |
//! | `GET` or `POST /v2/repository/index` | every model and its state |
//! | `POST /v2/repository/models/M/load`, `.../unload` | where the service offers it |
//! | `GET /v2/training/tasks`, `GET /v2/training/tasks/T` | every training task, or one: state, steps, account |
//! | `POST /v2/training/tasks/T` | takes the task whose configuration, YAML or JSON, is the body: 201 |
//! | `POST /v2/training/tasks/T/pause`, `.../resume`, `.../stop` | tells the task, and answers with its state |
//! | `GET /metrics` | Prometheus text |
//!
//! # Data
//! JSON data is a flat list or lists nested as the shape says. Numbers of integer types must be written as integers
//! and lie in the type's range, BOOL takes `true` and `false`; floating-point numbers are rounded to the nearest
//! value of their type. FP16 and BF16 travel as binary data only. JSON has no NaN and no infinity: an output that
//! holds one is refused with a message that asks for binary data (Triton writes `NaN`, which is not JSON).
//!
//! Binary data follows the JSON object, little-endian and dense, in the order of the tensors; the header
//! `Inference-Header-Content-Length` tells where it begins. With that header at 0 the body is nothing but the data
//! of a model's only input and all outputs come as binary data.
//!
//! # Parameters
//! Of a request: `timeout` (microseconds from its arrival, 0 for none) and `binary_data_output`; others are ignored,
//! as the protocol lets servers do. Unknown fields are ignored too. Of a response: `queue_us`, `switch_us`,
//! `compute_us` and `switched`; the same times stand in the header `Server-Timing`, in milliseconds.
//!
//! # Errors
//! `{"error": "..."}` with 400 for a wrong request, 404 for an unknown model or task, 408 for a body that stops
//! arriving, 413 for one that is too large, 415 for a compressed one, 429 (with `Retry-After`) when the server has
//! too much to do, 500 when the model or the server fails, 501 for what is not offered, 503 when server, model or
//! worker are not there, 504 when the request's time ran out.
//!
//! # Copies
//! The bytes of binary inputs go from the socket's buffer into the slot as they arrive; a body is never collected.
//! Binary outputs go from the slot to the socket. When a client goes away, the request's future is dropped and with
//! it what the service was asked.

mod body;
mod decode;
mod encode;
mod infer;
mod reject;
mod request;
mod routes;
mod server;
mod training;

pub use server::{HttpOptions, HttpServer};
