//! The HTTP front end over real sockets, in front of a service that lives in memory.

mod binary;
mod client;
mod connections;
mod endpoints;
mod errors;
mod fake;
mod harness;
mod hostile;
mod json;
mod metrics;
mod properties;
mod training;
