//! Host memory that the GPU's copy engines and kernels reach by themselves.

use std::any::Any;
use std::collections::HashMap;
use std::ptr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};

use super::context::{Context, log_failure};
use super::driver::{check, size, sys};
use crate::memory::Pin;
use crate::{DeviceAddress, DeviceError, DeviceId, HostSlice, PinnedMemory, SharedMemory};

/// A registration with the driver, one of perhaps several users of it.
#[derive(Debug)]
struct Registration {
    /// Where the memory is mapped in this process; the key of [`registered`].
    start: usize,
    address: DeviceAddress,
}

/// What the driver has for one mapping.
#[derive(Debug)]
struct Registered {
    users: usize,
    address: DeviceAddress,
    context: Arc<Context>,
}

/// The driver takes a mapping once, for all GPUs; several devices of a server pin the same host store.
///
/// The lock is held while it registers and unregisters, so that the two never cross for one mapping.
fn registered() -> MutexGuard<'static, HashMap<usize, Registered>> {
    static REGISTERED: LazyLock<Mutex<HashMap<usize, Registered>>> = LazyLock::new(Mutex::default);
    // Entries change in one step.
    REGISTERED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Registers `memory`, unless it is, for as long as the result or a clone of it lives.
pub(super) fn pin(context: &Arc<Context>, memory: Arc<SharedMemory>) -> Result<PinnedMemory, DeviceError> {
    let start = memory.as_ptr().expose_provenance();
    let mut registered = registered();
    let address = match registered.get_mut(&start) {
        Some(known) => {
            known.users += 1;
            known.address
        }
        None => {
            let address = register(context, &memory)?;
            registered.insert(start, Registered { users: 1, address, context: Arc::clone(context) });
            address
        }
    };
    // `PinnedMemory` drops the registration before the mapping.
    Ok(PinnedMemory::with_pin(memory, Arc::new(Registration { start, address })))
}

/// Memory that the driver does not know, of which copies are allowed all the same.
#[derive(Debug)]
struct Lent {
    address: DeviceAddress,
}

impl Pin for Lent {
    /// Of no use to a GPU that cannot read the host's page tables.
    fn address(&self) -> DeviceAddress {
        self.address
    }
}

/// Gives `memory` as it is.
pub(super) fn lend(memory: Arc<SharedMemory>) -> PinnedMemory {
    let address = DeviceAddress(memory.as_ptr().expose_provenance() as u64);
    PinnedMemory::with_pin(memory, Arc::new(Lent { address }))
}

fn register(context: &Context, memory: &SharedMemory) -> Result<DeviceAddress, DeviceError> {
    let _entered = context.enter()?;
    let start = memory.as_ptr().cast();
    let flags = sys::CU_MEMHOSTREGISTER_PORTABLE | sys::CU_MEMHOSTREGISTER_DEVICEMAP;
    // SAFETY: the mapping is as long as that and stays until the registration is undone (see `pin`). It is never seen
    // as Rust references, so the GPU may read and write it.
    let done = unsafe { sys::cuMemHostRegister_v2(start, size(memory.bytes()), flags) };
    check("cuMemHostRegister", done)?;
    let mut address = 0;
    // SAFETY: `address` is written during the call; the memory is registered as mapped.
    let found = unsafe { sys::cuMemHostGetDevicePointer_v2(&raw mut address, start, 0) };
    if let Err(error) = check("cuMemHostGetDevicePointer", found) {
        unregister(start.expose_provenance());
        return Err(error);
    }
    Ok(DeviceAddress(address))
}

/// In a context that was entered.
fn unregister(start: usize) {
    // SAFETY: registered by `register`, and copies under way hold what they use, so none is left.
    let done = unsafe { sys::cuMemHostUnregister(ptr::with_exposed_provenance_mut(start)) };
    log_failure(check("cuMemHostUnregister", done));
}

impl Pin for Registration {
    fn address(&self) -> DeviceAddress {
        self.address
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        let mut registered = registered();
        let Some(known) = registered.get_mut(&self.start) else { return };
        known.users -= 1;
        if known.users == 0
            && let Some(last) = registered.remove(&self.start)
        {
            log_failure(last.context.enter().map(|_entered| unregister(self.start)));
        }
    }
}

/// Refuses memory that the driver does not know and that was not lent: copies of it go through a buffer and hold up the
/// caller.
pub(super) fn check_pinned(device: DeviceId, slice: &HostSlice) -> Result<(), DeviceError> {
    let pin: Option<&dyn Any> = slice.memory().pin().map(|pin| pin as &dyn Any);
    if pin.is_some_and(|pin| pin.is::<Registration>() || pin.is::<Lent>()) {
        Ok(())
    } else {
        Err(DeviceError::NotPinned { device })
    }
}

/// A word of pinned host memory into which the GPU writes for this process to look.
#[derive(Debug)]
pub(super) struct PinnedWord {
    start: *mut u32,
    context: Arc<Context>,
}

// SAFETY: the word belongs to this value alone, and its allocation to the process.
unsafe impl Send for PinnedWord {}

impl PinnedWord {
    pub(super) fn new(context: &Arc<Context>) -> Result<Self, DeviceError> {
        let _entered = context.enter()?;
        let mut start = ptr::null_mut();
        // SAFETY: `start` is written during the call; the allocation is freed in `drop`.
        check("cuMemHostAlloc", unsafe { sys::cuMemHostAlloc(&raw mut start, size_of::<u32>(), 0) })?;
        Ok(Self { start: start.cast(), context: Arc::clone(context) })
    }

    pub(super) fn as_ptr(&self) -> *mut u32 {
        self.start
    }

    /// Where the GPU sees it: one address space holds all that the driver allocates.
    pub(super) fn address(&self) -> DeviceAddress {
        DeviceAddress(self.start.expose_provenance() as u64)
    }

    /// What the GPU has written.
    pub(super) fn load(&self) -> u32 {
        self.atomic().load(Ordering::Acquire)
    }

    /// Writes it from here.
    pub(super) fn store(&self, value: u32) {
        self.atomic().store(value, Ordering::Release);
    }

    fn atomic(&self) -> &AtomicU32 {
        // SAFETY: allocated in `new`, aligned as pages are, and zeroed by the driver; it lives as long as `self`. The GPU
        // writes it in one piece, as atomics do.
        unsafe { AtomicU32::from_ptr(self.start) }
    }
}

impl Drop for PinnedWord {
    fn drop(&mut self) {
        log_failure(self.context.enter().and_then(|_entered| {
            // SAFETY: made in `new`, used by nobody else.
            check("cuMemFreeHost", unsafe { sys::cuMemFreeHost(self.start.cast()) })
        }));
    }
}
