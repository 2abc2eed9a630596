//! What a transfer begins with, done for nothing.

use std::sync::Arc;

use pswitch_device::{CopyStream, Device, DeviceError, DeviceSlice, HostSlice, SharedMemory, doorbell};

use super::{COPY_IN, WRITE_WORD, cannot};
use crate::TransferError;

/// On a device whose copies may be as short as one likes.
const LEAST_BYTES: u64 = 4 << 10;

/// A copy and a word, of memory that nobody looks at.
#[derive(Debug)]
pub(super) struct Rehearsal {
    from: HostSlice,
    to: DeviceSlice,
    word: DeviceSlice,
}

impl Rehearsal {
    pub(super) fn new(device: &Arc<dyn Device>) -> Result<Self, DeviceError> {
        let bytes = device.properties().least_copy_bytes.max(LEAST_BYTES);
        let source = device.pin(Arc::new(SharedMemory::create("pswitch-rehearsal", bytes)?))?;
        let memory = device.allocate(bytes + 4)?;
        Ok(Self {
            from: HostSlice::new(source, 0, bytes)?,
            to: DeviceSlice::new(Arc::clone(&memory), 0, bytes)?,
            word: DeviceSlice::new(memory, bytes, 4)?,
        })
    }

    pub(super) fn run(&self, stream: &mut dyn CopyStream) -> Result<(), TransferError> {
        stream.copy_in(&self.from, &self.to).map_err(cannot(COPY_IN))?;
        stream.write_word(&self.word, doorbell::RUNG).map_err(cannot(WRITE_WORD))
    }
}
