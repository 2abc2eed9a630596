//! The CUDA backend: the pool is an allocation of the GPU, shared by IPC handle; copies run on its copy engines; doorbells
//! are written and waited for by its streams.
//!
//! Everything happens in the GPU's primary context, which libtorch uses as well. It is current on a thread only while one
//! of this module's functions runs there.

mod context;
mod driver;
mod event;
mod execution;
mod looker;
mod memory;
mod pin;
mod properties;
mod rehearsal;
mod stream;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use self::context::{Context, RawStream};
use self::driver::{check, sys};
use self::memory::CudaMemory;
use self::pin::PinnedWord;
use self::properties::Gpu;
use self::stream::{CudaCopyStream, wait_value, write_values};
use crate::memory::check_word;
use crate::{
    CopyStream, Device, DeviceError, DeviceId, DeviceMemory, DeviceProperties, DeviceSlice, ExecutionStream,
    MemoryHandle, PinnedMemory, SharedMemory, doorbell,
};

pub use self::execution::{GpuGraph, GpuMoment, GpuStream, GpuWay, WayWords};
pub use self::rehearsal::GpuRehearsal;

/// A GPU.
#[derive(Debug)]
pub(crate) struct CudaDevice {
    gpu: Gpu,
    properties: DeviceProperties,
    context: Arc<Context>,
    control: Mutex<Control>,
}

/// For words that are stored and loaded at once: a stream of its own, behind which nothing ever waits.
///
/// It passes other streams, but the GPU takes streams of one process from a few queues, by turns (as many as
/// `CUDA_DEVICE_MAX_CONNECTIONS` says, otherwise 8), and a stream that is stuck at a doorbell holds up all that come
/// from the same queue. A higher priority does not help: with eight stuck streams nothing else of the process moved on
/// an H200, and with 32 queues it did again. Other processes are not held up.
#[derive(Debug)]
struct Control {
    stream: RawStream,
    loaded: PinnedWord,
}

/// All GPUs, in order of their ordinals.
pub(crate) fn devices() -> Result<Vec<DeviceProperties>, DeviceError> {
    let count = properties::count(DeviceId::Cuda(0))?;
    (0..count).map(|ordinal| Gpu::find(ordinal)?.properties()).collect()
}

impl CudaDevice {
    pub(crate) fn open(ordinal: u32) -> Result<Self, DeviceError> {
        let gpu = Gpu::find(ordinal)?;
        let properties = gpu.properties()?;
        let context = Context::retain(gpu.device)?;
        let stream = RawStream::new(&context)?;
        let control = Mutex::new(Control { stream, loaded: PinnedWord::new(&context)? });
        tracing::debug!(device = %gpu.id, name = properties.name, "GPU opened");
        Ok(Self { gpu, properties, context, control })
    }

    fn check_word(&self, word: &DeviceSlice) -> Result<(), DeviceError> {
        CudaMemory::behind(self.gpu.id, word)?;
        check_word(word)
    }
}

impl Device for CudaDevice {
    fn properties(&self) -> &DeviceProperties {
        &self.properties
    }

    fn free_bytes(&self) -> Result<u64, DeviceError> {
        let _entered = self.context.enter()?;
        memory::free_bytes()
    }

    fn allocate(&self, bytes: u64) -> Result<Arc<dyn DeviceMemory>, DeviceError> {
        Ok(CudaMemory::allocate(self.gpu, &self.context, bytes)?)
    }

    fn allocate_managed(&self, bytes: u64) -> Result<Arc<dyn DeviceMemory>, DeviceError> {
        Ok(CudaMemory::allocate_managed(self.gpu, &self.context, bytes)?)
    }

    fn send_back(&self, managed: &DeviceSlice) -> Result<(), DeviceError> {
        CudaMemory::behind(self.gpu.id, managed)?;
        let control = self.control.lock().unwrap_or_else(PoisonError::into_inner);
        let _entered = self.context.enter()?;
        memory::send_back(managed, &control.stream)?;
        control.stream.synchronize()
    }

    fn open(&self, handle: MemoryHandle) -> Result<Arc<dyn DeviceMemory>, DeviceError> {
        Ok(CudaMemory::open(self.gpu, &self.context, handle)?)
    }

    fn pin(&self, memory: Arc<SharedMemory>) -> Result<PinnedMemory, DeviceError> {
        pin::pin(&self.context, memory)
    }

    fn lend(&self, memory: Arc<SharedMemory>) -> PinnedMemory {
        pin::lend(memory)
    }

    fn copy_stream(&self, name: &str) -> Result<Box<dyn CopyStream>, DeviceError> {
        Ok(Box::new(CudaCopyStream::new(self.gpu.id, &self.context, name)?))
    }

    fn wait_doorbell(
        &self,
        on: ExecutionStream,
        word: &DeviceSlice,
        _deadline: Instant,
    ) -> Result<(), DeviceError> {
        let no_such_stream = DeviceError::WrongExecutionStream { device: self.gpu.id };
        let ExecutionStream::Cuda(stream) = on else { return Err(no_such_stream) };
        let stream = usize::try_from(stream).map_err(|_| no_such_stream)?;
        self.check_word(word)?;
        let _entered = self.context.enter()?;
        wait_value(stream, word, doorbell::RUNG)
    }

    fn set_word(&self, word: &DeviceSlice, value: u32) -> Result<(), DeviceError> {
        self.set_words(std::slice::from_ref(word), value)
    }

    fn set_words(&self, words: &[DeviceSlice], value: u32) -> Result<(), DeviceError> {
        words.iter().try_for_each(|word| self.check_word(word))?;
        let control = self.control.lock().unwrap_or_else(PoisonError::into_inner);
        let _entered = self.context.enter()?;
        write_values(&control.stream, words, value)?;
        control.stream.synchronize()
    }

    fn word(&self, word: &DeviceSlice) -> Result<u32, DeviceError> {
        self.check_word(word)?;
        let control = self.control.lock().unwrap_or_else(PoisonError::into_inner);
        let _entered = self.context.enter()?;
        let (into, stream) = (control.loaded.as_ptr(), control.stream.raw());
        // SAFETY: four bytes from a word that lies inside of memory of this context into one that is pinned and that
        // nobody else uses while `control` is locked.
        let enqueued =
            unsafe { sys::cuMemcpyDtoHAsync_v2(into.cast(), word.address().0, size_of::<u32>(), stream) };
        check("cuMemcpyDtoHAsync", enqueued)?;
        control.stream.synchronize()?;
        Ok(control.loaded.load())
    }
}
