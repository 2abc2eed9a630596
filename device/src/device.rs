use std::any::Any;
use std::fmt::Debug;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::cuda::CudaDevice;
use crate::host::HostDevice;
use crate::{
    DeviceError, DeviceId, DeviceMemory, DeviceSlice, HostSlice, MemoryHandle, PinnedMemory, SharedMemory,
};

/// What a device is.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct DeviceProperties {
    /// Its name in this program.
    pub id: DeviceId,
    /// Its maker's name for it.
    pub name: String,
    /// All the memory that it has, in use or not.
    pub total_memory_bytes: u64,
    /// Copies to it of fewer bytes may wait for whoever computes on it.
    pub least_copy_bytes: u64,
    /// Fewer bytes are set aside no faster within it than by way of the host.
    pub least_copy_within_bytes: u64,
    /// What a GPU is beyond that.
    pub gpu: Option<GpuProperties>,
}

/// What a GPU is, as reports of measurements name it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct GpuProperties {
    /// Its identity, as `nvidia-smi -L` shows it.
    pub uuid: String,
    /// Major and minor compute capability.
    pub compute_capability: (u32, u32),
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Its place on the bus, as in `/sys/bus/pci/devices`.
    pub pci_address: String,
    /// Speed and width of its link now, where the system tells.
    pub pci_link: Option<String>,
    /// The kernel driver's version, where the system tells.
    pub driver_version: Option<String>,
    /// Major and minor version of CUDA that the driver supports.
    pub cuda_version: (u32, u32),
}

/// The cost of copies over the host backend's link, one for each direction, shared by all streams of the device.
///
/// A copy of `b` bytes takes `per_copy + b / bandwidth` from the moment it begins; the link does one copy at a time.
/// The default costs nothing beyond the copy itself.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct LinkThrottle {
    /// Bytes a second; `None` for as fast as memory goes.
    pub bandwidth_bytes_per_s: Option<f64>,
    /// What a copy costs before its first byte.
    pub per_copy: Duration,
}

/// The stream on which a worker executes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ExecutionStream {
    /// The calling thread itself.
    Host,
    /// A raw `CUstream` of the device's primary context in this process; 0 is the default stream. Whoever gives it
    /// promises that the stream is alive, which nobody can check.
    Cuda(u64),
}

/// A place where models run: its memory, copies to and from it, and the doorbells that announce them.
///
/// All methods may be called from any thread.
pub trait Device: Send + Sync + Debug {
    /// What it is.
    fn properties(&self) -> &DeviceProperties;

    /// Bytes of its memory that nobody has allocated now, in any process.
    ///
    /// # Errors
    /// [`DeviceError::Cuda`].
    fn free_bytes(&self) -> Result<u64, DeviceError>;

    /// Allocates zeroed memory that other processes can open.
    ///
    /// # Errors
    /// [`DeviceError::NeverFits`] if the device has less in all, [`DeviceError::OutOfMemory`] if it has less now;
    /// [`DeviceError::EmptyAllocation`]; [`DeviceError::System`] and [`DeviceError::Cuda`].
    fn allocate(&self, bytes: u64) -> Result<Arc<dyn DeviceMemory>, DeviceError>;

    /// Allocates zeroed memory whose pages move to the device when they are touched there, and back: what CUDA calls managed.
    /// It can be neither exported nor hold doorbells. For measuring what such memory costs.
    ///
    /// # Errors
    /// [`DeviceError::Unavailable`] on a device that has none; otherwise as [`allocate`](Device::allocate).
    fn allocate_managed(&self, bytes: u64) -> Result<Arc<dyn DeviceMemory>, DeviceError>;

    /// Moves the pages of managed memory to the host, and returns when they are there.
    ///
    /// # Errors
    /// [`DeviceError::Unavailable`] on a device without such memory; [`DeviceError::ForeignMemory`];
    /// [`DeviceError::Cuda`].
    fn send_back(&self, managed: &DeviceSlice) -> Result<(), DeviceError>;

    /// Opens memory that another process (or this one) has exported from the same device.
    ///
    /// On `host` the memory stays while anybody has it open. On `cuda` it belongs to the process that allocated it, which
    /// keeps it until the others have closed it or ended.
    ///
    /// # Errors
    /// What is wrong with the handle; a handle from a process that is not trusted does no harm.
    fn open(&self, handle: MemoryHandle) -> Result<Arc<dyn DeviceMemory>, DeviceError>;

    /// Pins host memory, so that copies from and to it run at the link's speed; undone when the last clone is dropped.
    ///
    /// On `cuda` that, as freeing device memory, may wait for all streams of the process.
    ///
    /// # Errors
    /// [`DeviceError::System`] or [`DeviceError::Cuda`] if the memory cannot be pinned.
    fn pin(&self, memory: Arc<SharedMemory>) -> Result<PinnedMemory, DeviceError>;

    /// Gives host memory to copy from and to as it is, not pinned: such copies go through a buffer of the driver's, and hold
    /// up the caller meanwhile. For measuring what pinning brings.
    fn lend(&self, memory: Arc<SharedMemory>) -> PinnedMemory;

    /// A new stream of copies; `name` appears in messages and, on `host`, as a thread's name.
    ///
    /// # Errors
    /// [`DeviceError::System`] or [`DeviceError::Cuda`] if it cannot be made.
    fn copy_stream(&self, name: &str) -> Result<Box<dyn CopyStream>, DeviceError>;

    /// Lets everything that is launched on the execution stream after this call wait until the doorbell word is at
    /// least [`RUNG`](crate::doorbell::RUNG). What the doorbell announces is visible then.
    ///
    /// `host` blocks the calling thread until then. `cuda` enqueues the wait and returns at once: a poisoned word lets
    /// the stream go on too, and `deadline` is the business of whoever waits for the stream.
    ///
    /// # Errors
    /// [`DeviceError::Poisoned`] and [`DeviceError::TimedOut`] where the call blocks; [`DeviceError::NotAWord`],
    /// [`DeviceError::ForeignMemory`], [`DeviceError::WrongExecutionStream`].
    fn wait_doorbell(
        &self,
        on: ExecutionStream,
        word: &DeviceSlice,
        deadline: Instant,
    ) -> Result<(), DeviceError>;

    /// Stores a word of device memory at once, past all streams, and wakes who waits on it; returns when it is stored.
    ///
    /// On `cuda` it passes the streams of other processes always, but not surely those of this process that are stuck at
    /// a doorbell: streams share queues, and there are eight of those unless `CUDA_DEVICE_MAX_CONNECTIONS` says
    /// otherwise. So a process that waits for doorbells leaves it to another one to poison them.
    ///
    /// # Errors
    /// [`DeviceError::NotAWord`], [`DeviceError::ForeignMemory`], [`DeviceError::System`], [`DeviceError::Cuda`].
    fn set_word(&self, word: &DeviceSlice, value: u32) -> Result<(), DeviceError>;

    /// Stores several words, as [`set_word`](Device::set_word) does one.
    ///
    /// # Errors
    /// As [`set_word`](Device::set_word).
    fn set_words(&self, words: &[DeviceSlice], value: u32) -> Result<(), DeviceError> {
        words.iter().try_for_each(|word| self.set_word(word, value))
    }

    /// Loads a word of device memory at once, past all streams, as [`set_word`](Device::set_word) stores it.
    ///
    /// # Errors
    /// [`DeviceError::NotAWord`], [`DeviceError::ForeignMemory`], [`DeviceError::System`], [`DeviceError::Cuda`].
    fn word(&self, word: &DeviceSlice) -> Result<u32, DeviceError>;
}

/// Copies in the order in which they were enqueued. Every call checks, enqueues and returns.
///
/// Dropping a stream waits until all that was enqueued is done: copies under way keep their memory, and no doorbell
/// that was promised stays silent.
pub trait CopyStream: Send + Debug {
    /// Copies host memory to the device. Both ends must be equally long; zero bytes cost nothing.
    ///
    /// # Errors
    /// [`DeviceError::UnequalCopy`], [`DeviceError::ForeignMemory`], [`DeviceError::NotPinned`],
    /// [`DeviceError::StreamEnded`], [`DeviceError::Cuda`].
    fn copy_in(&mut self, from: &HostSlice, to: &DeviceSlice) -> Result<(), DeviceError>;

    /// Copies the device's memory to the host. Both ends must be equally long; zero bytes cost nothing.
    ///
    /// # Errors
    /// [`DeviceError::UnequalCopy`], [`DeviceError::ForeignMemory`], [`DeviceError::NotPinned`],
    /// [`DeviceError::StreamEnded`], [`DeviceError::Cuda`].
    fn copy_out(&mut self, from: &DeviceSlice, to: &HostSlice) -> Result<(), DeviceError>;

    /// Copies device memory to other memory of the device, at the speed of that and not of the link. Both ends must be equally
    /// long and must not overlap; zero bytes cost nothing. A GPU's compute engine does it, which has one process at a time.
    ///
    /// # Errors
    /// [`DeviceError::UnequalCopy`], [`DeviceError::OverlappingCopy`], [`DeviceError::ForeignMemory`],
    /// [`DeviceError::StreamEnded`], [`DeviceError::Cuda`].
    fn copy_within(&mut self, from: &DeviceSlice, to: &DeviceSlice) -> Result<(), DeviceError>;

    /// Stores a word of device memory after all copies before it are complete, and wakes who waits on it.
    ///
    /// # Errors
    /// [`DeviceError::NotAWord`], [`DeviceError::ForeignMemory`], [`DeviceError::StreamEnded`], [`DeviceError::Cuda`].
    fn write_word(&mut self, word: &DeviceSlice, value: u32) -> Result<(), DeviceError>;

    /// Makes a range of words [`CLEAR`](crate::doorbell::CLEAR), in the order of the stream.
    ///
    /// # Errors
    /// [`DeviceError::NotAWord`] for a range that is no whole number of words; otherwise as
    /// [`write_word`](CopyStream::write_word).
    fn clear_words(&mut self, words: &DeviceSlice) -> Result<(), DeviceError>;

    /// An event that is complete when all that was enqueued before it is done, words included.
    ///
    /// # Errors
    /// [`DeviceError::StreamEnded`], [`DeviceError::System`], [`DeviceError::Cuda`].
    fn record(&mut self) -> Result<Arc<dyn Event>, DeviceError>;

    /// Lets all that is enqueued after this call wait until another stream of the device has passed an event.
    ///
    /// # Errors
    /// [`DeviceError::ForeignEvent`] for one of another kind of device; what went wrong in its stream, if that is known;
    /// [`DeviceError::StreamEnded`], [`DeviceError::Cuda`].
    fn wait_event(&mut self, event: &Arc<dyn Event>) -> Result<(), DeviceError>;
}

/// A point in a [`CopyStream`].
pub trait Event: Any + Send + Sync + Debug {
    /// Whether the stream has passed it.
    ///
    /// # Errors
    /// What went wrong in the stream before it.
    fn is_complete(&self) -> Result<bool, DeviceError>;

    /// Blocks until the stream has passed it.
    ///
    /// # Errors
    /// [`DeviceError::TimedOut`] after `deadline`; what went wrong in the stream before it.
    fn wait(&self, deadline: Instant) -> Result<(), DeviceError>;

    /// When the stream passed it, by this process's clock: exact on `host`, on other devices no earlier than it was and
    /// no later than it was noticed. `None` before.
    fn completed_at(&self) -> Option<Instant>;
}

/// The GPUs of this machine that CUDA shows to this process, in the order of their ordinals. Makes no context.
///
/// # Errors
/// [`DeviceError::Unavailable`] if there are none, or no driver for them; the reason says which. [`DeviceError::Cuda`].
pub fn cuda_devices() -> Result<Vec<DeviceProperties>, DeviceError> {
    crate::cuda::devices()
}

/// Opens a device. Every call gives a device of its own: two of one name share no link.
///
/// `throttle` describes the link of the host backend; a CUDA device has a real one. It shares the GPU's primary context
/// with whatever else in this process uses CUDA's runtime, and makes it if nothing has yet. So it must not be opened
/// in a process that is forked later: CUDA does not survive that.
///
/// # Errors
/// [`DeviceError::Unavailable`] if this machine has no such device, or no driver for it; [`DeviceError::Cuda`];
/// [`DeviceError::InvalidThrottle`].
pub fn open_device(id: DeviceId, throttle: LinkThrottle) -> Result<Arc<dyn Device>, DeviceError> {
    match id {
        DeviceId::Host(_) => Ok(Arc::new(HostDevice::new(id, throttle)?)),
        DeviceId::Cuda(ordinal) => Ok(Arc::new(CudaDevice::open(ordinal)?)),
    }
}
