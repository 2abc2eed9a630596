use std::fmt;
use std::time::Instant;

use pswitch_device::{DeviceSlice, HostSlice};

/// Names a transfer in its report. The engine does not care for its value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TransferId(pub u64);

impl fmt::Display for TransferId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "transfer {}", self.0)
    }
}

/// Bytes on their way to the device. Both ends are equally long.
#[derive(Debug, Clone)]
pub struct CopyIn {
    /// Pinned host memory.
    pub from: HostSlice,
    /// Where they go.
    pub to: DeviceSlice,
}

/// Bytes on their way back from the device. Both ends are equally long.
#[derive(Debug, Clone)]
pub struct CopyOut {
    /// Where they are.
    pub from: DeviceSlice,
    /// Pinned host memory.
    pub to: HostSlice,
}

/// Bytes on their way to another place of the device. Both ends are equally long.
#[derive(Debug, Clone)]
pub struct CopyWithin {
    /// Where they are.
    pub from: DeviceSlice,
    /// Where they go.
    pub to: DeviceSlice,
}

/// A group of a plan: its bytes, and the doorbell that says that they have landed.
#[derive(Debug, Clone)]
pub struct GroupCopy {
    /// The group's part of the span.
    pub copy: CopyIn,
    /// A word of device memory; set to [`RUNG`](pswitch_device::doorbell::RUNG) behind the bytes.
    pub doorbell: DeviceSlice,
}

/// All that a switch moves to the device, in the order of its fields.
#[derive(Debug, Clone)]
pub struct Transfer {
    /// Its name in the report.
    pub id: TransferId,
    /// Ranges of doorbells of models that are evicted by this transfer; set to
    /// [`CLEAR`](pswitch_device::doorbell::CLEAR) before the last doorbell of this one rings, so that whoever has used what
    /// it brings can be sure of it.
    pub clear: Vec<DeviceSlice>,
    /// The request's inputs. They go ahead of the weights.
    pub inputs: Vec<CopyIn>,
    /// A doorbell that rings when the inputs have landed.
    pub input_doorbell: Option<DeviceSlice>,
    /// The model's groups in order of execution. Without groups the transfer overtakes others that have some.
    pub groups: Vec<GroupCopy>,
    /// State that makes room: what of it lies where a group goes is on the host before the group is copied over it, and all of
    /// it when the transfer has landed. No two overlap.
    pub save: Vec<CopyOut>,
    /// State that makes room within the device: as with [`save`](Self::save), but elsewhere in its memory. The weights are late by
    /// what that takes, and not by what the link does. No two ends overlap, and none with what is saved.
    pub set_aside: Vec<CopyWithin>,
}

impl Transfer {
    /// One that moves nothing yet.
    pub fn new(id: TransferId) -> Self {
        Self {
            id,
            clear: Vec::new(),
            inputs: Vec::new(),
            input_doorbell: None,
            groups: Vec::new(),
            save: Vec::new(),
            set_aside: Vec::new(),
        }
    }
}

/// State that was saved, or set aside, and comes back to its place.
#[derive(Debug, Clone)]
pub struct BringBack {
    /// Its name in the report.
    pub id: TransferId,
    /// As in a [`Transfer`].
    pub clear: Vec<DeviceSlice>,
    /// What was set aside. It comes first.
    pub within: Vec<CopyWithin>,
    /// What was saved, in order.
    pub copies: Vec<CopyIn>,
}

/// What became of a transfer that has landed.
///
/// Instants are exact where the device can tell (`host`), and otherwise those at which the engine noticed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TransferReport {
    /// Bytes that were copied in either direction, inputs included.
    pub bytes: u64,
    /// When the first operation was enqueued.
    pub enqueued_at: Instant,
    /// When all was done.
    pub landed_at: Instant,
}
