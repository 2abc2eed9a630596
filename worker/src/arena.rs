//! libtorch's allocations of device memory, served from the arena of the execution under way.

use std::ffi::c_void;
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use pswitch_device::DeviceAddress;
use pswitch_mem_pool::{Arena, ArenaStats};

use crate::ffi;

/// One process has one libtorch with one allocator for each kind of device, and a worker one device: hence one of these.
static STATE: RwLock<State> = RwLock::new(State { pool: (0, 0), arena: None, closed: None });

struct State {
    /// First address of the pool and the first behind it.
    pool: (u64, u64),
    arena: Option<Arena>,
    /// If it gives nothing any more, whether anybody has asked since.
    closed: Option<AtomicBool>,
}

/// Points libtorch's allocator at an arena for as long as an execution runs, or is captured.
///
/// Outside of an execution the stock allocator serves. An allocation must not outlive the execution that made it: its
/// bytes belong to the next one. [`end`](Self::end) tells whether one did.
#[derive(Debug)]
#[must_use]
pub struct ExecutionArena(());

impl ExecutionArena {
    /// Takes over the CPU allocator of this process; `pool` is the mapping in which all arenas will lie.
    pub fn install_on_cpu(pool: DeviceAddress, bytes: u64) {
        Self::lie_in(pool, bytes);
        // SAFETY: both functions may be called from any thread at any time from now on.
        unsafe { ffi::ps_install_cpu_allocator(allocate, release) }
    }

    /// Says in which memory all arenas will lie, for an allocator that calls [`allocate`] and [`release`].
    pub(crate) fn lie_in(pool: DeviceAddress, bytes: u64) {
        write().pool = (pool.0, pool.0 + bytes);
    }

    /// Serves allocations from the given range until [`end`](Self::end).
    ///
    /// # Panics
    /// If an execution is under way already: a worker runs one at a time.
    pub fn begin(base: DeviceAddress, bytes: u64) -> Self {
        let mut state = write();
        assert!(state.arena.is_none(), "a worker runs one execution at a time");
        (state.arena, state.closed) = (Some(Arena::new(base, bytes)), None);
        Self(())
    }

    /// Refuses all allocations until the next execution begins: what has them may only be given back. From any thread.
    pub(crate) fn close() {
        write().closed = Some(AtomicBool::new(false));
    }

    /// Whether an allocation was refused since it was [closed](Self::close); none if it was not.
    pub(crate) fn was_wanted_closed(&self) -> Option<bool> {
        read().closed.as_ref().map(|wanted| wanted.load(Ordering::Relaxed))
    }

    /// Numbers of this moment.
    pub fn stats(&self) -> ArenaStats {
        read().arena.as_ref().map(Arena::stats).expect("set by `begin`, taken by `end` alone")
    }

    /// Gives the range back. `in_use_bytes` of the answer is what libtorch still holds there, which should be nothing.
    pub fn end(self) -> ArenaStats {
        let stats = self.stats();
        write().arena = None;
        stats
    }
}

fn read() -> RwLockReadGuard<'static, State> {
    STATE.read().unwrap_or_else(PoisonError::into_inner)
}

fn write() -> RwLockWriteGuard<'static, State> {
    STATE.write().unwrap_or_else(PoisonError::into_inner)
}

/// From the arena; null outside of an execution.
pub(crate) extern "C" fn allocate(bytes: usize, refused: *mut bool) -> *mut c_void {
    let state = read();
    let Some(arena) = &state.arena else { return ptr::null_mut() };
    let allocated = match &state.closed {
        None => arena.allocate(bytes as u64).ok(),
        Some(wanted) => {
            wanted.store(true, Ordering::Relaxed);
            None
        }
    };
    match allocated {
        // An address is as wide as a pointer, on the host and on CUDA.
        #[allow(clippy::cast_possible_truncation)]
        Some(address) => address.0 as usize as *mut c_void,
        None => {
            // SAFETY: the shim passes a pointer to a bool of its own.
            unsafe { *refused = true };
            ptr::null_mut()
        }
    }
}

/// Gives back what [`allocate`] gave; false for other memory.
pub(crate) extern "C" fn release(pointer: *mut c_void) -> bool {
    let address = pointer as usize as u64;
    let state = read();
    if address < state.pool.0 || address >= state.pool.1 {
        return false;
    }
    if let Some(arena) = &state.arena
        && arena.free(DeviceAddress(address)).is_err()
    {
        tracing::error!(address, "libtorch freed memory that outlived its execution");
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_closed_arena_has_given_can_only_be_given_back() {
        const BASE: u64 = 1 << 32;
        let get = || {
            let mut refused = false;
            (allocate(256, &raw mut refused), refused)
        };
        ExecutionArena::lie_in(DeviceAddress(BASE), 4096);
        let arena = ExecutionArena::begin(DeviceAddress(BASE), 4096);
        let (pointer, refused) = get();
        assert!(!pointer.is_null() && !refused);
        ExecutionArena::close();
        assert_eq!(arena.was_wanted_closed(), Some(false));
        assert_eq!(get(), (ptr::null_mut(), true));
        assert_eq!(arena.was_wanted_closed(), Some(true));
        assert!(release(pointer));
        assert_eq!(arena.end().in_use_bytes, 0);
        // Memory of the host serves outside of executions, and the next has all of its arena.
        assert_eq!(get(), (ptr::null_mut(), false));
        let arena = ExecutionArena::begin(DeviceAddress(BASE), 4096);
        assert_eq!((get(), arena.was_wanted_closed()), ((pointer, false), None));
        arena.end();
    }
}
