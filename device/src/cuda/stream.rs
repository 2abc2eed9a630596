//! Copies in the order in which they were enqueued, by the GPU's copy engines.

use std::any::Any;
use std::ptr;
use std::sync::Arc;

use super::context::{Context, RawStream};
use super::driver::{check, size, sys};
use super::event::{CudaEvent, InUse, Timeline};
use super::memory::CudaMemory;
use super::pin::check_pinned;
use crate::memory::{check_word, check_words, copy_length, copy_length_within};
use crate::{CopyStream, DeviceAddress, DeviceError, DeviceId, DeviceSlice, Event, HostSlice, doorbell};

/// With so much in use and nothing recorded behind it, the stream records a point itself, to let go of it in time.
const MOST_IN_USE: usize = 256;

/// Writes, or waits, of one batch. The driver refuses batches of 256, and a longer one would be no faster.
const MOST_OPERATIONS: usize = 128;

/// A stream of copies and of the words that announce them.
///
/// Each word holds up the copy behind it by some 2.5 us. A stream of words beside that of the copies would not, but a stream
/// that does not copy works through the GPU's compute engine, which has one process at a time: each word then took the
/// engine away from the process that executes, for some 25 us (H100, driver 580).
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
pub(super) fn host_start(slice: &HostSlice) -> *mut u8 {
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

    fn copy_within(&mut self, from: &DeviceSlice, to: &DeviceSlice) -> Result<(), DeviceError> {
        let bytes = copy_length_within(from, to)?;
        CudaMemory::behind(self.device, from)?;
        CudaMemory::behind(self.device, to)?;
        if bytes == 0 {
            return Ok(());
        }
        {
            let _entered = self.stream.context().enter()?;
            let (source, target, raw) = (from.address().0, to.address().0, self.stream.raw());
            // SAFETY: as in `copy_in`.
            let enqueued = unsafe { sys::cuMemcpyDtoDAsync_v2(target, source, size(bytes), raw) };
            check("cuMemcpyDtoDAsync", enqueued)?;
        }
        self.keep(from, None)?;
        self.keep(to, None)
    }

    /// The driver fences the writes: what the stream did before is visible to whoever sees the words.
    fn write_word(&mut self, word: &DeviceSlice, value: u32) -> Result<(), DeviceError> {
        CudaMemory::behind(self.device, word)?;
        check_word(word)?;
        {
            let _entered = self.stream.context().enter()?;
            write_value(&self.stream, word, value)?;
        }
        self.keep(word, None)
    }

    /// By writes of two words each. A copy of zeros would be no copy: the driver sends so few bytes through the compute
    /// engine, and the stream stands still until whoever computes there pauses.
    fn clear_words(&mut self, words: &DeviceSlice) -> Result<(), DeviceError> {
        CudaMemory::behind(self.device, words)?;
        check_words(words)?;
        let end = words.address().0 + words.bytes();
        let mut writes = Vec::new();
        let mut address = words.address();
        while address.0 < end {
            let is_pair = address.0.is_multiple_of(8) && address.0 + 8 <= end;
            writes.push(if is_pair { write_pair_op(address) } else { write_op(address, doorbell::CLEAR) });
            address.0 += if is_pair { 8 } else { 4 };
        }
        {
            let _entered = self.stream.context().enter()?;
            enqueue_batch(&self.stream, &mut writes)?;
        }
        self.keep(words, None)
    }

    fn record(&mut self) -> Result<Arc<dyn Event>, DeviceError> {
        Ok(Arc::new(self.timeline.record(self.stream.raw(), &mut self.in_use)?))
    }

    fn wait_event(&mut self, event: &Arc<dyn Event>) -> Result<(), DeviceError> {
        let event: &dyn Any = event.as_ref();
        let event = event.downcast_ref::<CudaEvent>();
        event.ok_or(DeviceError::ForeignEvent { device: self.device })?.hold_up(&self.stream)
    }
}

/// Enqueues the stores of words that were checked and are kept, in the context that was entered.
pub(super) fn write_values(stream: &RawStream, words: &[DeviceSlice], value: u32) -> Result<(), DeviceError> {
    if let [word] = words {
        return write_value(stream, word, value);
    }
    let mut writes: Vec<_> = words.iter().map(|word| write_op(word.address(), value)).collect();
    enqueue_batch(stream, &mut writes)
}

/// Enqueues writes to words, and waits for them, in the context that was entered. The words were checked, and live until that
/// is done.
pub(super) fn enqueue_batch(
    stream: &RawStream,
    operations: &mut [sys::CUstreamBatchMemOpParams],
) -> Result<(), DeviceError> {
    for operations in operations.chunks_mut(MOST_OPERATIONS) {
        let count = u32::try_from(operations.len()).unwrap_or(u32::MAX);
        // SAFETY: the array has that length; the words were checked by the caller.
        let enqueued = unsafe { sys::cuStreamBatchMemOp_v2(stream.raw(), count, operations.as_mut_ptr(), 0) };
        check("cuStreamBatchMemOp", enqueued)?;
    }
    Ok(())
}

/// The store of a word, as a part of a batch. Fenced: what came before is visible to whoever sees it.
pub(super) fn write_op(address: DeviceAddress, value: u32) -> sys::CUstreamBatchMemOpParams {
    let mut write = operation();
    write.writeValue = sys::CUstreamBatchMemOpParams_union_CUstreamMemOpWriteValueParams_st {
        operation: sys::CUstreamBatchMemOpType::CU_STREAM_MEM_OP_WRITE_VALUE_32,
        address: address.0,
        __bindgen_anon_1:
            sys::CUstreamBatchMemOpParams_union_CUstreamMemOpWriteValueParams_st__bindgen_ty_1 { value },
        flags: sys::CUstreamWriteValue_flags::CU_STREAM_WRITE_VALUE_DEFAULT as u32,
        alias: 0,
    };
    write
}

/// The same for two words, clear afterwards, at a multiple of eight.
fn write_pair_op(address: DeviceAddress) -> sys::CUstreamBatchMemOpParams {
    let mut write = operation();
    write.writeValue = sys::CUstreamBatchMemOpParams_union_CUstreamMemOpWriteValueParams_st {
        operation: sys::CUstreamBatchMemOpType::CU_STREAM_MEM_OP_WRITE_VALUE_64,
        address: address.0,
        __bindgen_anon_1:
            sys::CUstreamBatchMemOpParams_union_CUstreamMemOpWriteValueParams_st__bindgen_ty_1 {
                value64: u64::from(doorbell::CLEAR),
            },
        flags: sys::CUstreamWriteValue_flags::CU_STREAM_WRITE_VALUE_DEFAULT as u32,
        alias: 0,
    };
    write
}

/// The wait until a word is at least `value`, both taken as signed, as a part of a batch.
pub(super) fn wait_op(word: DeviceAddress, value: u32) -> sys::CUstreamBatchMemOpParams {
    let mut wait = operation();
    wait.waitValue = sys::CUstreamBatchMemOpParams_union_CUstreamMemOpWaitValueParams_st {
        operation: sys::CUstreamBatchMemOpType::CU_STREAM_MEM_OP_WAIT_VALUE_32,
        address: word.0,
        __bindgen_anon_1: sys::CUstreamBatchMemOpParams_union_CUstreamMemOpWaitValueParams_st__bindgen_ty_1 {
            value,
        },
        flags: sys::CUstreamWaitValue_flags::CU_STREAM_WAIT_VALUE_GEQ as u32,
        alias: 0,
    };
    wait
}

fn operation() -> sys::CUstreamBatchMemOpParams {
    sys::CUstreamBatchMemOpParams_union { pad: [0; 6] }
}

/// Enqueues the store of a word that was checked and is kept, in the context that was entered.
fn write_value(stream: &RawStream, word: &DeviceSlice, value: u32) -> Result<(), DeviceError> {
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
