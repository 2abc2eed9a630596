//! Copies in the order in which they were enqueued, by the GPU's copy engines.

use std::ptr;
use std::sync::Arc;

use super::context::{Context, RawStream};
use super::driver::{check, size, sys};
use super::event::{InUse, Timeline};
use super::memory::CudaMemory;
use super::pin::check_pinned;
use crate::memory::{check_word, copy_length};
use crate::{CopyStream, DeviceError, DeviceId, DeviceSlice, Event, HostSlice};

/// With so much in use and nothing recorded behind it, the stream records a point itself, to let go of it in time.
const MOST_IN_USE: usize = 256;

/// A stream of copies.
#[derive(Debug)]
pub(super) struct CudaCopyStream {
    device: DeviceId,
    name: String,
    stream: RawStream,
    timeline: Arc<Timeline>,
    /// Since the last point that was recorded.
    in_use: InUse,
}

impl CudaCopyStream {
    pub(super) fn new(device: DeviceId, context: &Arc<Context>, name: &str) -> Result<Self, DeviceError> {
        Ok(Self {
            device,
            name: name.to_owned(),
            stream: RawStream::new(context)?,
            timeline: Timeline::new(context),
            in_use: InUse::default(),
        })
    }

    /// Both ends of a copy: of equal length, of this device, pinned.
    fn check_copy(
        &self,
        from_bytes: u64,
        to_bytes: u64,
        there: &DeviceSlice,
        here: &HostSlice,
    ) -> Result<usize, DeviceError> {
        let bytes = copy_length(from_bytes, to_bytes)?;
        CudaMemory::behind(self.device, there)?;
        check_pinned(self.device, here)?;
        Ok(size(bytes))
    }

    fn keep(&mut self, there: &DeviceSlice, here: Option<&HostSlice>) -> Result<(), DeviceError> {
        self.in_use.keep_device(there.memory());
        if let Some(here) = here {
            self.in_use.keep_host(here.memory());
        }
        if self.in_use.len() >= MOST_IN_USE {
            self.timeline.record(self.stream.raw(), &mut self.in_use)?;
        }
        Ok(())
    }
}

/// Where a slice of pinned memory begins in this process.
fn host_start(slice: &HostSlice) -> *mut u8 {
    // Inside of the mapping, as every slice is.
    slice.memory().memory().as_ptr().wrapping_add(size(slice.offset()))
}

impl CopyStream for CudaCopyStream {
    fn copy_in(&mut self, from: &HostSlice, to: &DeviceSlice) -> Result<(), DeviceError> {
        let bytes = self.check_copy(from.bytes(), to.bytes(), to, from)?;
        if bytes == 0 {
            return Ok(());
        }
        let (start, address, raw) = (host_start(from), to.address().0, self.stream.raw());
        {
            let _entered = self.stream.context().enter()?;
            // SAFETY: both ranges lie inside of memory that is kept, with its pin, until the stream has passed a point
            // behind this copy. Who else uses them meanwhile is for their allocators to say (see `SharedMemory`).
            let enqueued = unsafe { sys::cuMemcpyHtoDAsync_v2(address, start.cast(), bytes, raw) };
            check("cuMemcpyHtoDAsync", enqueued)?;
        }
        self.keep(to, Some(from))
    }

    fn copy_out(&mut self, from: &DeviceSlice, to: &HostSlice) -> Result<(), DeviceError> {
        let bytes = self.check_copy(from.bytes(), to.bytes(), from, to)?;
        if bytes == 0 {
            return Ok(());
        }
        let (start, address, raw) = (host_start(to), from.address().0, self.stream.raw());
        {
            let _entered = self.stream.context().enter()?;
            // SAFETY: as in `copy_in`.
            let enqueued = unsafe { sys::cuMemcpyDtoHAsync_v2(start.cast(), address, bytes, raw) };
            check("cuMemcpyDtoHAsync", enqueued)?;
        }
        self.keep(from, Some(to))
    }

    /// The driver fences the write: what the stream did before is visible to whoever sees the word.
    fn write_word(&mut self, word: &DeviceSlice, value: u32) -> Result<(), DeviceError> {
        CudaMemory::behind(self.device, word)?;
        check_word(word)?;
        {
            let _entered = self.stream.context().enter()?;
            write_value(&self.stream, word, value)?;
        }
        self.keep(word, None)
    }

    fn record(&mut self) -> Result<Arc<dyn Event>, DeviceError> {
        Ok(Arc::new(self.timeline.record(self.stream.raw(), &mut self.in_use)?))
    }
}

/// Enqueues the store of a word that was checked and is kept, in the context that was entered.
pub(super) fn write_value(stream: &RawStream, word: &DeviceSlice, value: u32) -> Result<(), DeviceError> {
    // With the memory barrier, which is what makes it a doorbell.
    let flags = sys::CUstreamWriteValue_flags::CU_STREAM_WRITE_VALUE_DEFAULT as u32;
    // SAFETY: the word lies inside of memory of this context, at a multiple of four.
    let enqueued = unsafe { sys::cuStreamWriteValue32_v2(stream.raw(), word.address().0, value, flags) };
    check("cuStreamWriteValue32", enqueued)
}

/// Lets a stream of this process wait until a word that was checked is at least `value`, in the context that was entered.
pub(super) fn wait_value(stream: usize, word: &DeviceSlice, value: u32) -> Result<(), DeviceError> {
    let flags = sys::CUstreamWaitValue_flags::CU_STREAM_WAIT_VALUE_GEQ as u32;
    let stream = ptr::with_exposed_provenance_mut(stream);
    // SAFETY: the caller promised the stream (see `ExecutionStream::Cuda`); the word lies inside of memory of this
    // context, at a multiple of four. That the memory stays until the wait is over is for the stream's owner to see to,
    // as it is for everything else that runs on it.
    let enqueued = unsafe { sys::cuStreamWaitValue32_v2(stream, word.address().0, value, flags) };
    check("cuStreamWaitValue32", enqueued)
}

impl Drop for CudaCopyStream {
    fn drop(&mut self) {
        let ended = self.stream.synchronize();
        if let Err(error) = &ended {
            // After such an error the context is of no use any more, and no copy runs in it.
            let error = error as &dyn std::error::Error;
            tracing::error!(device = %self.device, stream = %self.name, error, "a copy stream failed");
        }
        self.timeline.end(&ended);
    }
}
