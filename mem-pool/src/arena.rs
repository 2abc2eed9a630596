use std::sync::{Mutex, MutexGuard, PoisonError};

use pswitch_device::DeviceAddress;

use crate::range::{align_down, align_up};
use crate::{FreeList, PoolError, TENSOR_ALIGNMENT_BYTES};

/// What an executing worker allocates activations and workspaces from: a [`FreeList`] over one arena of the pool that
/// speaks in addresses and may be used by several threads.
///
/// Sizes are rounded up to [`TENSOR_ALIGNMENT_BYTES`], and so are addresses.
#[derive(Debug)]
pub struct Arena {
    base: u64,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    list: FreeList,
    refused: u64,
}

/// How an [`Arena`] is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ArenaStats {
    /// Bytes in all.
    pub capacity_bytes: u64,
    /// Bytes allocated now.
    pub in_use_bytes: u64,
    /// The most bytes that were allocated at a time since the last [`Arena::reset_peak`].
    pub peak_bytes: u64,
    /// The longest free range.
    pub largest_free_bytes: u64,
    /// Allocations that are alive.
    pub allocations: usize,
    /// Allocations that were refused so far.
    pub refused: u64,
}

impl Arena {
    /// Allocates from the `bytes` at `base`, which the caller holds by a lease. Bytes before the first and behind the
    /// last multiple of [`TENSOR_ALIGNMENT_BYTES`] are left alone.
    pub fn new(base: DeviceAddress, bytes: u64) -> Self {
        let end = align_down(base.0.saturating_add(bytes), TENSOR_ALIGNMENT_BYTES);
        let base = align_up(base.0, TENSOR_ALIGNMENT_BYTES).unwrap_or(end);
        let list = FreeList::new(end.saturating_sub(base));
        Self { base, state: Mutex::new(State { list, refused: 0 }) }
    }

    /// Allocates; an allocation of zero bytes has an address of its own, too.
    ///
    /// # Errors
    /// [`PoolError::NeverFits`] or [`PoolError::NoRoomNow`], with the numbers.
    pub fn allocate(&self, bytes: u64) -> Result<DeviceAddress, PoolError> {
        let mut state = self.state();
        // A size that cannot be rounded up is refused as it is.
        let rounded = align_up(bytes.max(1), TENSOR_ALIGNMENT_BYTES).unwrap_or(u64::MAX);
        match state.list.allocate(rounded, TENSOR_ALIGNMENT_BYTES) {
            Ok(range) => Ok(DeviceAddress(self.base + range.offset)),
            Err(error) => {
                state.refused += 1;
                Err(error)
            }
        }
    }

    /// Frees what was allocated at `address`.
    ///
    /// # Errors
    /// [`PoolError::NotAllocated`].
    pub fn free(&self, address: DeviceAddress) -> Result<(), PoolError> {
        let unknown = PoolError::NotAllocated { at: address.0 };
        let Some(offset) = address.0.checked_sub(self.base) else { return Err(unknown) };
        self.state().list.free(offset).map(drop).map_err(|_| unknown)
    }

    /// How it is used.
    pub fn stats(&self) -> ArenaStats {
        let state = self.state();
        ArenaStats {
            capacity_bytes: state.list.capacity_bytes(),
            in_use_bytes: state.list.in_use_bytes(),
            peak_bytes: state.list.peak_bytes(),
            largest_free_bytes: state.list.largest_free_bytes(),
            allocations: state.list.allocations(),
            refused: state.refused,
        }
    }

    /// Lets the peak begin anew with what is allocated now, to measure one execution.
    pub fn reset_peak(&self) {
        self.state().list.reset_peak();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // The list changes only after all its checks: a panic in between cannot leave half a change.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
