//! The host backend: the pool is shared memory, copies run on a thread for each stream over a link that can be
//! throttled, doorbells are atomics with futex waits.

mod event;
mod link;
mod stream;

use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use nix::libc;

use crate::host::link::Link;
use crate::host::stream::HostCopyStream;
use crate::memory::check_word;
use crate::{
    CopyStream, Device, DeviceAddress, DeviceError, DeviceId, DeviceMemory, DeviceProperties, DeviceSlice,
    ExecutionStream, LinkThrottle, MemoryHandle, PinnedMemory, SharedMemory, doorbell, futex,
};

/// The CPU as a device.
#[derive(Debug)]
pub(crate) struct HostDevice {
    properties: DeviceProperties,
    // The link is full duplex: each direction is a resource of its own, shared by all streams.
    inward: Arc<Link>,
    outward: Arc<Link>,
}

impl HostDevice {
    pub(crate) fn new(id: DeviceId, throttle: LinkThrottle) -> Result<Self, DeviceError> {
        let properties = DeviceProperties {
            id,
            name: processor_name(),
            total_memory_bytes: physical_memory_bytes(),
            least_copy_bytes: 0,
            least_copy_within_bytes: 0,
            gpu: None,
        };
        let inward = Arc::new(Link::new(throttle)?);
        let outward = Arc::new(Link::new(throttle)?);
        tracing::debug!(device = %id, ?throttle, "host device opened");
        Ok(Self { properties, inward, outward })
    }

    fn has_no_managed_memory(&self) -> DeviceError {
        let reason = "the host's memory does not move: managed memory is CUDA's".to_owned();
        DeviceError::Unavailable { device: self.properties.id, reason }
    }

    fn adopt(&self, memory: SharedMemory) -> Arc<dyn DeviceMemory> {
        Arc::new(HostMemory { device: self.properties.id, memory: Arc::new(memory) })
    }
}

impl Device for HostDevice {
    fn properties(&self) -> &DeviceProperties {
        &self.properties
    }

    fn allocate(&self, bytes: u64) -> Result<Arc<dyn DeviceMemory>, DeviceError> {
        let capacity_bytes = self.properties.total_memory_bytes;
        if bytes > capacity_bytes {
            let device = self.properties.id;
            return Err(DeviceError::NeverFits { device, asked_bytes: bytes, capacity_bytes });
        }
        let memory = SharedMemory::create(&format!("pswitch-{}", self.properties.id), bytes)?;
        Ok(self.adopt(memory))
    }

    fn allocate_managed(&self, _bytes: u64) -> Result<Arc<dyn DeviceMemory>, DeviceError> {
        Err(self.has_no_managed_memory())
    }

    fn send_back(&self, _managed: &DeviceSlice) -> Result<(), DeviceError> {
        Err(self.has_no_managed_memory())
    }

    fn free_bytes(&self) -> Result<u64, DeviceError> {
        Ok(available_memory_bytes())
    }

    fn open(&self, handle: MemoryHandle) -> Result<Arc<dyn DeviceMemory>, DeviceError> {
        let MemoryHandle::Memfd { fd, bytes } = handle else {
            return Err(DeviceError::ForeignHandle { device: self.properties.id, kind: handle.kind() });
        };
        Ok(self.adopt(SharedMemory::from_fd(fd, bytes)?))
    }

    /// Nothing to do: copies are made by the CPU, which sees all memory.
    fn pin(&self, memory: Arc<SharedMemory>) -> Result<PinnedMemory, DeviceError> {
        Ok(PinnedMemory::new(memory))
    }

    fn lend(&self, memory: Arc<SharedMemory>) -> PinnedMemory {
        PinnedMemory::new(memory)
    }

    fn copy_stream(&self, name: &str) -> Result<Box<dyn CopyStream>, DeviceError> {
        let (inward, outward) = (Arc::clone(&self.inward), Arc::clone(&self.outward));
        Ok(Box::new(HostCopyStream::start(self.properties.id, name, inward, outward)?))
    }

    fn wait_doorbell(
        &self,
        on: ExecutionStream,
        word: &DeviceSlice,
        deadline: Instant,
    ) -> Result<(), DeviceError> {
        if on != ExecutionStream::Host {
            return Err(DeviceError::WrongExecutionStream { device: self.properties.id });
        }
        let word = HostWord::new(self.properties.id, word)?;
        let began = Instant::now();
        loop {
            // Acquire: pairs with the release store that followed the bytes.
            match word.atomic().load(Ordering::Acquire) {
                doorbell::CLEAR => {}
                doorbell::POISONED => return Err(DeviceError::Poisoned),
                _ => return Ok(()),
            }
            if Instant::now() >= deadline {
                return Err(DeviceError::TimedOut { what: "a doorbell", waited: began.elapsed() });
            }
            futex::wait_while(word.atomic(), doorbell::CLEAR, deadline)?;
        }
    }

    fn set_word(&self, word: &DeviceSlice, value: u32) -> Result<(), DeviceError> {
        futex::store_and_wake(HostWord::new(self.properties.id, word)?.atomic(), value);
        Ok(())
    }

    fn word(&self, word: &DeviceSlice) -> Result<u32, DeviceError> {
        Ok(HostWord::new(self.properties.id, word)?.atomic().load(Ordering::Acquire))
    }
}

/// Memory of a host device: the pool, or another process's pool mapped here.
#[derive(Debug)]
struct HostMemory {
    device: DeviceId,
    memory: Arc<SharedMemory>,
}

impl DeviceMemory for HostMemory {
    fn device(&self) -> DeviceId {
        self.device
    }

    fn address(&self) -> DeviceAddress {
        // Exposed: whoever builds tensors over the pool turns the number into a pointer again.
        DeviceAddress(self.memory.as_ptr().expose_provenance() as u64)
    }

    fn bytes(&self) -> u64 {
        self.memory.bytes()
    }

    fn export(&self) -> Result<MemoryHandle, DeviceError> {
        let fd = self.memory.fd().try_clone_to_owned().map_err(|error| DeviceError::System {
            call: "fcntl(F_DUPFD_CLOEXEC)",
            source: nix::errno::Errno::try_from(error).unwrap_or(nix::errno::Errno::UnknownErrno),
        })?;
        Ok(MemoryHandle::Memfd { fd, bytes: self.bytes() })
    }
}

/// The shared memory behind a slice, if it belongs to the host device `device`.
fn shared_memory(device: DeviceId, slice: &DeviceSlice) -> Result<Arc<SharedMemory>, DeviceError> {
    let foreign = DeviceError::ForeignMemory { device, memory: slice.memory().device() };
    let memory: &dyn Any = slice.memory().as_ref();
    match memory.downcast_ref::<HostMemory>() {
        Some(memory) if memory.device == device => Ok(Arc::clone(&memory.memory)),
        _ => Err(foreign),
    }
}

/// A word of a host device's memory, checked once.
#[derive(Debug)]
struct HostWord {
    memory: Arc<SharedMemory>,
    offset: u64,
}

impl HostWord {
    fn new(device: DeviceId, slice: &DeviceSlice) -> Result<Self, DeviceError> {
        let memory = shared_memory(device, slice)?;
        check_word(slice)?;
        memory.word(slice.offset())?;
        Ok(Self { memory, offset: slice.offset() })
    }

    fn atomic(&self) -> &AtomicU32 {
        self.memory.word(self.offset).expect("checked in `new`, and the memory cannot change its size")
    }
}

fn processor_name() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    name.map_or_else(|| "CPU".to_owned(), |(_, name)| name.trim().to_owned())
}

/// What the system could give out without swapping.
fn available_memory_bytes() -> u64 {
    let info = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = info.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kibibytes = line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
    kibibytes.unwrap_or(0) * 1024
}

fn physical_memory_bytes() -> u64 {
    // SAFETY: `sysconf` only reads its argument and system settings.
    let (pages, page_bytes) =
        unsafe { (libc::sysconf(libc::_SC_PHYS_PAGES), libc::sysconf(libc::_SC_PAGESIZE)) };
    let known = |value: libc::c_long| u64::try_from(value).unwrap_or(0);
    known(pages).saturating_mul(known(page_bytes))
}
