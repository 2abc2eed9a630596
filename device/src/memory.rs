use std::any::Any;
use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::{DeviceError, DeviceId, SharedMemory};

/// An address in a device's memory: a pointer of this process on the host, a `CUdeviceptr` on CUDA.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceAddress(pub u64);

impl fmt::Display for DeviceAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// Memory of a device, freed (or closed, if another process made it) when dropped.
///
/// A backend accepts only its own memory: it looks at the type behind the trait, not at the address alone.
pub trait DeviceMemory: Any + Send + Sync + fmt::Debug {
    /// The device that it belongs to.
    fn device(&self) -> DeviceId;

    /// Where it begins, in this process.
    fn address(&self) -> DeviceAddress;

    /// Its size.
    fn bytes(&self) -> u64;

    /// A handle with which another process can open the same memory.
    ///
    /// # Errors
    /// [`DeviceError::System`] if the handle cannot be made.
    fn export(&self) -> Result<MemoryHandle, DeviceError>;
}

/// How a device's memory is handed to another process.
///
/// A sender takes it [apart](MemoryHandle::into_parts) and need not know the variants.
#[derive(Debug)]
#[non_exhaustive]
pub enum MemoryHandle {
    /// Shared memory behind a file descriptor (`host`).
    Memfd {
        /// The descriptor, which travels beside the message (`SCM_RIGHTS`).
        fd: OwnedFd,
        /// The memory's size; checked against the file when it is opened.
        bytes: u64,
    },
    /// An allocation of a GPU by the handle of CUDA's inter-process communication (`cuda`). No descriptor travels with
    /// it. It names memory of a living process: the one that allocated it must not free it while others have it open.
    CudaIpc {
        /// What the driver made (`CUipcMemHandle`).
        handle: [u8; CUDA_IPC_BYTES],
        /// The memory's size; checked against the allocation when it is opened.
        bytes: u64,
        /// The GPU's UUID. Ordinals of devices may differ between processes.
        gpu: [u8; UUID_BYTES],
    },
}

const CUDA_IPC_BYTES: usize = 64;
const UUID_BYTES: usize = 16;

impl MemoryHandle {
    const MEMFD: u8 = 1;
    const CUDA_IPC: u8 = 2;

    /// How it is handed on, for messages.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Self::Memfd { .. } => "a file descriptor of shared memory",
            Self::CudaIpc { .. } => "a CUDA IPC handle",
        }
    }

    /// Takes the handle apart for a message: bytes to be sent as they are, and the descriptors that travel with them.
    pub fn into_parts(self) -> (Vec<u8>, Vec<OwnedFd>) {
        match self {
            Self::Memfd { fd, bytes } => {
                let mut description = vec![Self::MEMFD];
                description.extend_from_slice(&bytes.to_le_bytes());
                (description, vec![fd])
            }
            Self::CudaIpc { handle, bytes, gpu } => {
                let mut description = vec![Self::CUDA_IPC];
                description.extend_from_slice(&bytes.to_le_bytes());
                description.extend_from_slice(&gpu);
                description.extend_from_slice(&handle);
                (description, Vec::new())
            }
        }
    }

    /// Puts a handle together again. Both parts may come from a process that is not trusted.
    ///
    /// # Errors
    /// [`DeviceError::MalformedHandle`] if they do not fit each other.
    pub fn from_parts(description: &[u8], descriptors: Vec<OwnedFd>) -> Result<Self, DeviceError> {
        let malformed = |reason| DeviceError::MalformedHandle { reason };
        match description.split_first() {
            Some((&Self::MEMFD, size)) => {
                let size = size.try_into().map_err(|_| malformed("a memfd's size has 8 bytes"))?;
                let [fd] = <[OwnedFd; 1]>::try_from(descriptors)
                    .map_err(|_| malformed("a memfd comes with one descriptor"))?;
                Ok(Self::Memfd { fd, bytes: u64::from_le_bytes(size) })
            }
            Some((&Self::CUDA_IPC, rest)) => {
                let parts = rest.split_first_chunk().and_then(|(bytes, rest)| {
                    let (gpu, handle) = rest.split_first_chunk()?;
                    Some((u64::from_le_bytes(*bytes), *gpu, handle.try_into().ok()?))
                });
                let (bytes, gpu, handle) =
                    parts.ok_or_else(|| malformed("a CUDA IPC handle has 8, 16 and 64 bytes"))?;
                if !descriptors.is_empty() {
                    return Err(malformed("a CUDA IPC handle comes without descriptors"));
                }
                Ok(Self::CudaIpc { handle, bytes, gpu })
            }
            Some(_) => Err(malformed("of a kind that this build does not know")),
            None => Err(malformed("empty")),
        }
    }
}

/// Shared memory that a device can copy from and to at full speed, as long as this or a clone of it lives.
///
/// The pin holds for every device of the same kind in this process (CUDA: registered as portable).
#[derive(Debug, Clone)]
pub struct PinnedMemory {
    // Before the memory: it is unpinned first and unmapped then.
    pin: Option<Arc<dyn Pin>>,
    memory: Arc<SharedMemory>,
}

/// What a backend did to pin memory; undone when it is dropped.
pub(crate) trait Pin: Any + Send + Sync + fmt::Debug {
    /// Where the device sees the begin of the memory.
    fn address(&self) -> DeviceAddress;
}

impl PinnedMemory {
    /// For a backend that need not pin memory.
    pub(crate) fn new(memory: Arc<SharedMemory>) -> Self {
        Self { pin: None, memory }
    }

    /// For a backend that has pinned `memory`.
    pub(crate) fn with_pin(memory: Arc<SharedMemory>, pin: Arc<dyn Pin>) -> Self {
        Self { pin: Some(pin), memory }
    }

    /// What the backend did, by which it knows its own.
    pub(crate) fn pin(&self) -> Option<&dyn Pin> {
        self.pin.as_deref()
    }

    /// Where the device itself reads and writes the memory, without a copy: kernels may be given this address for data of
    /// which they need little.
    pub fn address(&self) -> DeviceAddress {
        match &self.pin {
            Some(pin) => pin.address(),
            // Exposed: whoever builds tensors over the memory turns the number into a pointer again.
            None => DeviceAddress(self.memory.as_ptr().expose_provenance() as u64),
        }
    }

    /// The memory that is pinned.
    pub fn memory(&self) -> &Arc<SharedMemory> {
        &self.memory
    }

    /// Its size.
    pub fn bytes(&self) -> u64 {
        self.memory.bytes()
    }
}

/// Refuses a range that is not inside `capacity_bytes`.
fn check_inside(what: &'static str, offset: u64, bytes: u64, capacity_bytes: u64) -> Result<(), DeviceError> {
    match offset.checked_add(bytes) {
        Some(end) if end <= capacity_bytes => Ok(()),
        _ => Err(DeviceError::OutOfRange { what, offset, bytes, capacity_bytes }),
    }
}

/// The length of a copy, if both ends have the same.
pub(crate) fn copy_length(from_bytes: u64, to_bytes: u64) -> Result<u64, DeviceError> {
    if from_bytes == to_bytes {
        Ok(from_bytes)
    } else {
        Err(DeviceError::UnequalCopy { from_bytes, to_bytes })
    }
}

/// The length of a copy within a device, if both ends have the same and lie apart.
pub(crate) fn copy_length_within(from: &DeviceSlice, to: &DeviceSlice) -> Result<u64, DeviceError> {
    let bytes = copy_length(from.bytes(), to.bytes())?;
    if !from.overlaps(to) {
        return Ok(bytes);
    }
    Err(DeviceError::OverlappingCopy { from_offset: from.offset(), to_offset: to.offset(), bytes })
}

/// Refuses what is not four bytes at a multiple of four.
pub(crate) fn check_word(slice: &DeviceSlice) -> Result<(), DeviceError> {
    if slice.bytes == 4 && slice.address().0.is_multiple_of(4) {
        Ok(())
    } else {
        Err(DeviceError::NotAWord { offset: slice.offset, bytes: slice.bytes })
    }
}

/// The same for a range of words.
pub(crate) fn check_words(slice: &DeviceSlice) -> Result<(), DeviceError> {
    if slice.bytes.is_multiple_of(4) && slice.address().0.is_multiple_of(4) {
        Ok(())
    } else {
        Err(DeviceError::NotAWord { offset: slice.offset, bytes: slice.bytes })
    }
}

/// A range of a device's memory, known to lie inside, that keeps the memory alive.
#[derive(Debug, Clone)]
pub struct DeviceSlice {
    memory: Arc<dyn DeviceMemory>,
    offset: u64,
    bytes: u64,
}

impl DeviceSlice {
    /// The `bytes` at `offset`; zero bytes are allowed.
    ///
    /// # Errors
    /// [`DeviceError::OutOfRange`].
    pub fn new(memory: Arc<dyn DeviceMemory>, offset: u64, bytes: u64) -> Result<Self, DeviceError> {
        check_inside("device memory", offset, bytes, memory.bytes())?;
        Ok(Self { memory, offset, bytes })
    }

    /// The words of which it consists; a rest at its end is none.
    pub fn words(&self) -> impl Iterator<Item = Self> + '_ {
        (0..self.bytes / 4).map(|index| Self {
            memory: Arc::clone(&self.memory),
            offset: self.offset + 4 * index,
            bytes: 4,
        })
    }

    /// Whether a byte lies in both, which are of one device.
    pub fn overlaps(&self, other: &Self) -> bool {
        let (begin, other_begin) = (self.address().0, other.address().0);
        begin < other_begin + other.bytes() && other_begin < begin + self.bytes()
    }

    /// A part of this slice; `offset` counts from where it begins.
    ///
    /// # Errors
    /// [`DeviceError::OutOfRange`].
    pub fn sub(&self, offset: u64, bytes: u64) -> Result<Self, DeviceError> {
        check_inside("device slice", offset, bytes, self.bytes)?;
        Ok(Self { memory: Arc::clone(&self.memory), offset: self.offset + offset, bytes })
    }

    /// Where it begins.
    pub fn address(&self) -> DeviceAddress {
        DeviceAddress(self.memory.address().0 + self.offset)
    }

    /// How long it is.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Where it begins in its memory.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// The memory that it lies in.
    pub fn memory(&self) -> &Arc<dyn DeviceMemory> {
        &self.memory
    }
}

/// A range of pinned host memory, known to lie inside, that keeps the memory pinned.
#[derive(Debug, Clone)]
pub struct HostSlice {
    memory: PinnedMemory,
    offset: u64,
    bytes: u64,
}

impl HostSlice {
    /// The `bytes` at `offset`; zero bytes are allowed.
    ///
    /// # Errors
    /// [`DeviceError::OutOfRange`].
    pub fn new(memory: PinnedMemory, offset: u64, bytes: u64) -> Result<Self, DeviceError> {
        check_inside("pinned memory", offset, bytes, memory.bytes())?;
        Ok(Self { memory, offset, bytes })
    }

    /// A part of this slice; `offset` counts from where it begins.
    ///
    /// # Errors
    /// [`DeviceError::OutOfRange`].
    pub fn sub(&self, offset: u64, bytes: u64) -> Result<Self, DeviceError> {
        check_inside("host slice", offset, bytes, self.bytes)?;
        Ok(Self { memory: self.memory.clone(), offset: self.offset + offset, bytes })
    }

    /// How long it is.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Where it begins in its memory.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// The memory that it lies in.
    pub fn memory(&self) -> &PinnedMemory {
        &self.memory
    }

    /// Where the device itself reads and writes it; see [`PinnedMemory::address`].
    pub fn address(&self) -> DeviceAddress {
        DeviceAddress(self.memory.address().0 + self.offset)
    }

    /// Writes `data` at `offset` of the slice.
    ///
    /// # Errors
    /// [`DeviceError::OutOfRange`]; nothing is written then.
    pub fn write(&self, offset: u64, data: &[u8]) -> Result<(), DeviceError> {
        check_inside("host slice", offset, data.len() as u64, self.bytes)?;
        self.memory.memory.write(self.offset + offset, data)
    }

    /// Fills `into` from `offset` of the slice on.
    ///
    /// # Errors
    /// [`DeviceError::OutOfRange`]; `into` is untouched then.
    pub fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), DeviceError> {
        check_inside("host slice", offset, into.len() as u64, self.bytes)?;
        self.memory.memory.read(self.offset + offset, into)
    }
}
