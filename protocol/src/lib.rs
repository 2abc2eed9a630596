//! Messages between the pswitch controller, its zygote and its worker processes.
//!
//! Every connection is a Unix socket of type `SOCK_SEQPACKET`: a message is a packet, so a half message cannot be
//! read and two cannot run together. A packet is a two-byte version, then the message in postcard's encoding; it is
//! at most [`MAX_MESSAGE_BYTES`] long. Tensors never travel here: they lie in shared memory, and messages name the
//! place. Descriptors (pool, slots, sockets) ride along as ancillary data.
//!
//! ```
//! use pswitch_protocol::{Channel, FromWorker, ToWorker};
//!
//! let (controller, worker) = Channel::pair()?;
//! controller.send(&ToWorker::Shutdown, &[])?;
//! let (message, descriptors) = worker.receive::<ToWorker>()?.expect("the peer is still there");
//! assert!(matches!(message, ToWorker::Shutdown));
//! assert!(descriptors.is_empty());
//!
//! drop(worker);
//! assert!(controller.receive::<FromWorker>()?.is_none(), "a closed peer reads as the end");
//! # Ok::<(), pswitch_protocol::ProtocolError>(())
//! ```

#![warn(clippy::unwrap_used)]

mod channel;
pub mod control;
mod error;
mod messages;

pub use channel::{Channel, MAX_DESCRIPTORS, MAX_MESSAGE_BYTES};
pub use error::ProtocolError;
pub use messages::{
    Attach, Bring, DeviceSpec, Elsewhere, Execute, Executed, ExecutionFault, ExitCause, FaultClass,
    FromWorker, FromZygote, InputValue, LoadModel, PROFILE_COSTS, PROTOCOL_VERSION, PlacedTensor,
    PrepareTask, Region, TaskExtent, TaskPause, TaskStep, ToWorker, ToZygote, WorkerMemory, monotonic_ns,
};
