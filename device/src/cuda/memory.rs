//! Memory of a GPU, allocated here or opened by the handle that another process sent.

use std::any::Any;
use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError, Weak};

use super::context::{Context, RawStream, log_failure};
use super::driver::{check, size, sys};
use super::properties::Gpu;
use crate::{DeviceAddress, DeviceError, DeviceId, DeviceMemory, DeviceSlice, MemoryHandle};

/// The driver puts smaller allocations together into pieces of this size and exports whole pieces: only with sizes that
/// are multiples of it does another process get this memory and nothing else.
const GRANULARITY_BYTES: u64 = 2 << 20;

type IpcHandle = [u8; 64];

/// The pool, or another process's pool opened here.
#[derive(Debug)]
pub(super) struct CudaMemory {
    gpu: Gpu,
    address: sys::CUdeviceptr,
    bytes: u64,
    handle: IpcHandle,
    origin: Origin,
    context: Arc<Context>,
}

/// Where it comes from, and so what has to be undone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Origin {
    Allocated,
    Managed,
    Opened,
}

/// What this process has allocated. CUDA opens a handle in other processes only; in this one it stands for the memory
/// itself.
fn allocated() -> MutexGuard<'static, HashMap<IpcHandle, Weak<CudaMemory>>> {
    static ALLOCATED: LazyLock<Mutex<HashMap<IpcHandle, Weak<CudaMemory>>>> = LazyLock::new(Mutex::default);
    // Entries are put in and taken out in one step.
    ALLOCATED.lock().unwrap_or_else(PoisonError::into_inner)
}

impl CudaMemory {
    /// Zeroed, and with a handle.
    pub(super) fn allocate(gpu: Gpu, context: &Arc<Context>, bytes: u64) -> Result<Arc<Self>, DeviceError> {
        if bytes == 0 {
            return Err(DeviceError::EmptyAllocation);
        }
        let (device, capacity_bytes) = (gpu.id, gpu.total_memory_bytes);
        let rounded = bytes.checked_next_multiple_of(GRANULARITY_BYTES);
        let (Some(rounded), true) = (rounded, bytes <= capacity_bytes) else {
            return Err(DeviceError::NeverFits { device, asked_bytes: bytes, capacity_bytes });
        };
        let _entered = context.enter()?;
        let mut address = 0;
        // SAFETY: `address` is written during the call; what is allocated is freed in `drop`.
        let allocated_now = unsafe { sys::cuMemAlloc_v2(&raw mut address, size(rounded)) };
        if allocated_now == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            let free_bytes = free_bytes()?;
            return Err(DeviceError::OutOfMemory { device, asked_bytes: bytes, free_bytes, capacity_bytes });
        }
        check("cuMemAlloc", allocated_now)?;
        // From here on it is freed when something fails.
        let mut memory = Self {
            gpu,
            address,
            bytes,
            handle: [0; 64],
            origin: Origin::Allocated,
            context: Arc::clone(context),
        };
        let stream = RawStream::new(context)?;
        // SAFETY: the range was allocated a moment ago, and nobody else knows it.
        check("cuMemsetD8Async", unsafe { sys::cuMemsetD8Async(address, 0, size(rounded), stream.raw()) })?;
        stream.synchronize()?;
        let mut handle = sys::CUipcMemHandle { reserved: [0; 64] };
        // SAFETY: `handle` is written during the call; `address` is the begin of an allocation.
        check("cuIpcGetMemHandle", unsafe { sys::cuIpcGetMemHandle(&raw mut handle, address) })?;
        memory.handle = handle.reserved.map(i8::cast_unsigned);
        let memory = Arc::new(memory);
        allocated().insert(memory.handle, Arc::downgrade(&memory));
        Ok(memory)
    }

    /// Managed memory, which has no handle.
    pub(super) fn allocate_managed(
        gpu: Gpu,
        context: &Arc<Context>,
        bytes: u64,
    ) -> Result<Arc<Self>, DeviceError> {
        if bytes == 0 {
            return Err(DeviceError::EmptyAllocation);
        }
        let (device, capacity_bytes) = (gpu.id, gpu.total_memory_bytes);
        if bytes > capacity_bytes {
            return Err(DeviceError::NeverFits { device, asked_bytes: bytes, capacity_bytes });
        }
        let _entered = context.enter()?;
        let mut address = 0;
        let attached = sys::CUmemAttach_flags::CU_MEM_ATTACH_GLOBAL as u32;
        // SAFETY: `address` is written during the call; what is allocated is freed in `drop`.
        let allocated_now = unsafe { sys::cuMemAllocManaged(&raw mut address, size(bytes), attached) };
        check("cuMemAllocManaged", allocated_now)?;
        let context = Arc::clone(context);
        let memory = Self { gpu, address, bytes, handle: [0; 64], origin: Origin::Managed, context };
        let stream = RawStream::new(&memory.context)?;
        // SAFETY: the range was allocated a moment ago, and nobody else knows it.
        check("cuMemsetD8Async", unsafe { sys::cuMemsetD8Async(address, 0, size(bytes), stream.raw()) })?;
        stream.synchronize()?;
        Ok(Arc::new(memory))
    }

    /// Opens what another process has allocated, or finds what this one has.
    pub(super) fn open(
        gpu: Gpu,
        context: &Arc<Context>,
        handle: MemoryHandle,
    ) -> Result<Arc<Self>, DeviceError> {
        let device = gpu.id;
        let MemoryHandle::CudaIpc { handle, bytes, gpu: uuid } = handle else {
            return Err(DeviceError::ForeignHandle { device, kind: handle.kind() });
        };
        if uuid != gpu.uuid {
            return Err(DeviceError::ForeignHandle { device, kind: "a CUDA IPC handle of another GPU" });
        }
        if bytes == 0 {
            return Err(DeviceError::EmptyAllocation);
        }
        // The lock is released before the memory could be dropped, which takes it, too.
        let own = allocated().get(&handle).and_then(Weak::upgrade);
        if let Some(own) = own {
            return if own.bytes == bytes { Ok(own) } else { Err(wrong_size(bytes, own.bytes)) };
        }
        let _entered = context.enter()?;
        let flags = sys::CUipcMem_flags::CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS as u32;
        let raw_handle = sys::CUipcMemHandle { reserved: handle.map(u8::cast_signed) };
        let mut address = 0;
        // SAFETY: `address` is written during the call; the driver checks the handle itself, whoever made it.
        let opened = unsafe { sys::cuIpcOpenMemHandle_v2(&raw mut address, raw_handle, flags) };
        check("cuIpcOpenMemHandle", opened)?;
        // From here on it is closed when something fails.
        let memory =
            Self { gpu, address, bytes, handle, origin: Origin::Opened, context: Arc::clone(context) };
        let (mut base, mut mapped) = (0, 0);
        // SAFETY: both are written during the call; the address was mapped a moment ago.
        let range = unsafe { sys::cuMemGetAddressRange_v2(&raw mut base, &raw mut mapped, address) };
        check("cuMemGetAddressRange", range)?;
        let mapped_bytes = (mapped as u64).saturating_sub(address.saturating_sub(base));
        if bytes > mapped_bytes {
            return Err(wrong_size(bytes, mapped_bytes));
        }
        Ok(Arc::new(memory))
    }

    /// The memory behind a slice, if it belongs to `device`.
    pub(super) fn behind(device: DeviceId, slice: &DeviceSlice) -> Result<&Self, DeviceError> {
        let memory: &dyn Any = slice.memory().as_ref();
        match memory.downcast_ref::<Self>() {
            Some(memory) if memory.gpu.id == device => Ok(memory),
            _ => Err(DeviceError::ForeignMemory { device, memory: slice.memory().device() }),
        }
    }
}

fn wrong_size(expected_bytes: u64, found_bytes: u64) -> DeviceError {
    DeviceError::WrongAllocationSize { expected_bytes, found_bytes }
}

/// Enqueues the way back to the host of managed memory that was checked, in the context that was entered.
pub(super) fn send_back(managed: &DeviceSlice, stream: &RawStream) -> Result<(), DeviceError> {
    // SAFETY: a location is plain numbers; zeroes are one.
    let mut host: sys::CUmemLocation = unsafe { std::mem::zeroed() };
    host.type_ = sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_HOST;
    // SAFETY: the range lies inside of memory of this context; the driver refuses what is not managed.
    let enqueued = unsafe {
        sys::cuMemPrefetchAsync_v2(managed.address().0, size(managed.bytes()), host, 0, stream.raw())
    };
    check("cuMemPrefetchAsync", enqueued)
}

/// What nobody has allocated on the current context's GPU.
pub(super) fn free_bytes() -> Result<u64, DeviceError> {
    let (mut free, mut total) = (0, 0);
    // SAFETY: both are written during the call.
    check("cuMemGetInfo", unsafe { sys::cuMemGetInfo_v2(&raw mut free, &raw mut total) })?;
    Ok(free as u64)
}

impl DeviceMemory for CudaMemory {
    fn device(&self) -> DeviceId {
        self.gpu.id
    }

    fn address(&self) -> DeviceAddress {
        DeviceAddress(self.address)
    }

    fn bytes(&self) -> u64 {
        self.bytes
    }

    /// What was opened can be handed on: the handle stays that of the process that allocated it.
    fn export(&self) -> Result<MemoryHandle, DeviceError> {
        if self.origin == Origin::Managed {
            let reason = "managed memory has no handle".to_owned();
            return Err(DeviceError::Unavailable { device: self.gpu.id, reason });
        }
        Ok(MemoryHandle::CudaIpc { handle: self.handle, bytes: self.bytes, gpu: self.gpu.uuid })
    }
}

impl Drop for CudaMemory {
    fn drop(&mut self) {
        if self.origin == Origin::Allocated {
            // Before it is freed: handles are never used twice, but nobody may find this one any more.
            allocated().remove(&self.handle);
        }
        // Copies hold what they use, so nothing that this process has enqueued still runs on it.
        log_failure(self.context.enter().and_then(|_entered| match self.origin {
            Origin::Allocated | Origin::Managed => {
                // SAFETY: allocated in `allocate` or `allocate_managed`; no slice is left.
                check("cuMemFree", unsafe { sys::cuMemFree_v2(self.address) })
            }
            // SAFETY: opened in `open`; no slice is left. The driver counts how often it was opened.
            Origin::Opened => check("cuIpcCloseMemHandle", unsafe { sys::cuIpcCloseMemHandle(self.address) }),
        }));
    }
}
