use std::time::Duration;

use nix::errno::Errno;

use crate::DeviceId;

/// Everything that a device can refuse or fail at, with the numbers that explain it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// A text that names no device.
    #[error("{text:?} names no device: write `host`, `host:1` or `cuda:0`")]
    InvalidDeviceId {
        /// What was given.
        text: String,
    },
    /// The device cannot be opened by this build or on this machine.
    #[error("device {device} is not available: {reason}")]
    Unavailable {
        /// The device asked for.
        device: DeviceId,
        /// Why, and what to do.
        reason: String,
    },
    /// A throttle that describes no link.
    #[error(
        "a link's bandwidth must be at least {least} bytes/s and finite, and one copy's cost at most {most:?}"
    )]
    InvalidThrottle {
        /// The smallest bandwidth that is accepted.
        least: u64,
        /// The largest cost of a copy that is accepted.
        most: Duration,
    },
    /// A stream of another device was given to this one.
    #[error("device {device} has no such execution stream")]
    WrongExecutionStream {
        /// The device that was asked.
        device: DeviceId,
    },
    /// Memory of another device was given to this one.
    #[error("memory of device {memory} was given to device {device}")]
    ForeignMemory {
        /// The device that was asked.
        device: DeviceId,
        /// The device that the memory belongs to.
        memory: DeviceId,
    },
    /// An event of another kind of device was given to this one.
    #[error("an event of another kind of device was given to device {device}")]
    ForeignEvent {
        /// The device that was asked.
        device: DeviceId,
    },
    /// More than the device has: it can never fit.
    #[error(
        "{asked_bytes} bytes can never fit into device {device}, which has {capacity_bytes} bytes in all"
    )]
    NeverFits {
        /// The device that was asked.
        device: DeviceId,
        /// Bytes asked for.
        asked_bytes: u64,
        /// Bytes that the device has.
        capacity_bytes: u64,
    },
    /// The device has as much, but not free: it may fit later.
    #[error(
        "{asked_bytes} bytes do not fit into device {device} now: {free_bytes} of its {capacity_bytes} bytes are free"
    )]
    OutOfMemory {
        /// The device that was asked.
        device: DeviceId,
        /// Bytes asked for.
        asked_bytes: u64,
        /// Bytes that nobody uses, as far as the device says.
        free_bytes: u64,
        /// Bytes that the device has.
        capacity_bytes: u64,
    },
    /// Memory of zero bytes cannot be mapped.
    #[error("memory of 0 bytes was asked for")]
    EmptyAllocation,
    /// A range that is not inside its memory.
    #[error("{bytes} bytes at offset {offset} are not inside the {capacity_bytes} bytes of the {what}")]
    OutOfRange {
        /// What the range should lie in.
        what: &'static str,
        /// Where the range begins.
        offset: u64,
        /// How long it is.
        bytes: u64,
        /// How much there is.
        capacity_bytes: u64,
    },
    /// A word that is not four bytes at a multiple of four.
    #[error(
        "{bytes} bytes at offset {offset} are not a word: a word has 4 bytes and lies at a multiple of 4"
    )]
    NotAWord {
        /// Offset in its memory.
        offset: u64,
        /// Length of the range given.
        bytes: u64,
    },
    /// The two ends of a copy differ in length.
    #[error("a copy from {from_bytes} bytes to {to_bytes} bytes: both must be equally long")]
    UnequalCopy {
        /// Length of the source.
        from_bytes: u64,
        /// Length of the destination.
        to_bytes: u64,
    },
    /// The two ends of a copy within a device overlap.
    #[error("a copy of {bytes} bytes from offset {from_offset} to {to_offset}: its ends overlap")]
    OverlappingCopy {
        /// Where the source begins.
        from_offset: u64,
        /// Where the destination begins.
        to_offset: u64,
        /// Length of both.
        bytes: u64,
    },
    /// A file received as shared memory has another size than its sender said.
    #[error("a file of {found_bytes} bytes was received as shared memory of {expected_bytes} bytes")]
    WrongFileSize {
        /// The size that was announced.
        expected_bytes: u64,
        /// The size that the file has.
        found_bytes: u64,
    },
    /// Device memory opened by handle has less than its sender said.
    #[error("device memory of {found_bytes} bytes was received as one of {expected_bytes} bytes")]
    WrongAllocationSize {
        /// The size that was announced.
        expected_bytes: u64,
        /// The size that it has.
        found_bytes: u64,
    },
    /// A file received as shared memory could be shrunk by its sender, which would kill whoever reads it.
    #[error("a file received as shared memory is not sealed against shrinking")]
    Unsealed,
    /// The description of a memory handle from another process makes no sense.
    #[error("malformed memory handle: {reason}")]
    MalformedHandle {
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A handle of memory that this device cannot open.
    #[error("device {device} cannot open memory by {kind}")]
    ForeignHandle {
        /// The device that was asked.
        device: DeviceId,
        /// What the handle is, and why not.
        kind: &'static str,
    },
    /// Host memory that this device has not pinned was given to it.
    #[error("host memory that device {device} has not pinned was given to it")]
    NotPinned {
        /// The device that was asked.
        device: DeviceId,
    },
    /// The doorbell was poisoned: what it announces will never arrive.
    #[error("the doorbell was poisoned: the transfer that it announces has failed")]
    Poisoned,
    /// A wait passed its deadline.
    #[error("{what} did not come within {waited:?}")]
    TimedOut {
        /// What was waited for.
        what: &'static str,
        /// How long.
        waited: Duration,
    },
    /// The thread or queue behind a stream is gone.
    #[error("copy stream {stream:?} has ended")]
    StreamEnded {
        /// The stream's name.
        stream: String,
    },
    /// CUDA's driver refused a call, or reports what an earlier one has led to.
    #[error("{call} failed: {text} ({name})")]
    Cuda {
        /// The call that reported it.
        call: &'static str,
        /// CUDA's number of the error.
        code: u32,
        /// CUDA's name of the error.
        name: String,
        /// CUDA's explanation.
        text: String,
    },
    /// The operating system refused a call.
    #[error("{call} failed")]
    System {
        /// The call.
        call: &'static str,
        /// Its error.
        #[source]
        source: Errno,
    },
}

impl DeviceError {
    pub(crate) fn system(call: &'static str) -> impl FnOnce(Errno) -> Self {
        move |source| Self::System { call, source }
    }
}
