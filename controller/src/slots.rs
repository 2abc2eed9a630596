//! Slots: pieces of shared memory through which tensors travel between clients and workers.
//!
//! All slots are cut from one [`SlotMemory`]. A front end writes a request's inputs into a [`Slot`], a worker reads
//! them there and leaves its outputs beside them, and [`FrozenSlot::view`] lends the outputs to the response without
//! a copy. The memory is free again when the slot or its last view is dropped.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use pswitch_device::SharedMemory;
use pswitch_mem_pool::{FreeList, PoolError, Range, TENSOR_ALIGNMENT_BYTES};

use crate::service::ServiceError;

/// The shared memory that slots are cut from.
#[derive(Debug)]
pub struct SlotMemory {
    shared: Arc<SharedMemory>,
    free: Mutex<FreeList>,
}

impl SlotMemory {
    /// Slots in memory that the caller made (and may have pinned or handed to workers).
    #[must_use]
    pub fn new(shared: Arc<SharedMemory>) -> Arc<Self> {
        let free = Mutex::new(FreeList::new(shared.bytes()));
        Arc::new(Self { shared, free })
    }

    /// Takes a slot. Offsets in it that are multiples of 512 bytes are so in the shared memory too.
    ///
    /// # Errors
    /// [`ServiceError::TooLarge`] if the memory could never hold it, [`ServiceError::NoSlotMemory`] if it cannot now.
    pub fn reserve(self: &Arc<Self>, bytes: u64) -> Result<Slot, ServiceError> {
        let capacity_bytes = self.shared.bytes();
        // A slot without bytes still has a place of its own to give back.
        match self.free_list().allocate(bytes.max(1), TENSOR_ALIGNMENT_BYTES) {
            Ok(range) => Ok(Slot { memory: Arc::clone(self), range: Range { bytes, ..range } }),
            Err(PoolError::NoRoomNow { asked_bytes, in_use_bytes, .. }) => {
                Err(ServiceError::NoSlotMemory { asked_bytes, in_use_bytes, capacity_bytes })
            }
            Err(PoolError::NeverFits { asked_bytes, .. }) => {
                let what = "the request's tensors".to_owned();
                Err(ServiceError::TooLarge { what, asked_bytes, limit_bytes: capacity_bytes })
            }
            Err(error) => Err(ServiceError::Internal { message: error.to_string() }),
        }
    }

    /// The memory itself, for whoever hands it to workers or pins it.
    #[must_use]
    pub fn shared(&self) -> &Arc<SharedMemory> {
        &self.shared
    }

    /// Bytes of all slots that are taken.
    #[must_use]
    pub fn in_use_bytes(&self) -> u64 {
        self.free_list().in_use_bytes()
    }

    /// Bytes that can be taken at most.
    #[must_use]
    pub fn capacity_bytes(&self) -> u64 {
        self.shared.bytes()
    }

    fn free_list(&self) -> MutexGuard<'_, FreeList> {
        // Every method of the list leaves it whole, so a panic elsewhere under the lock says nothing about it.
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A piece of the slot memory that one request owns.
#[derive(Debug)]
#[must_use]
pub struct Slot {
    memory: Arc<SlotMemory>,
    range: Range,
}

impl Slot {
    /// Offset of its first byte in the shared memory, a multiple of 512.
    #[must_use]
    pub fn offset_bytes(&self) -> u64 {
        self.range.offset
    }

    /// Its size.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.range.bytes
    }

    /// Copies bytes into it.
    ///
    /// # Errors
    /// [`ServiceError::Internal`] if that reaches past its end.
    pub fn write(&mut self, offset_bytes: u64, data: &[u8]) -> Result<(), ServiceError> {
        check(&self.range, offset_bytes, data.len() as u64)?;
        self.memory
            .shared
            .write(self.range.offset + offset_bytes, data)
            .map_err(|error| ServiceError::Internal { message: error.to_string() })
    }

    /// Copies bytes out of it.
    ///
    /// # Errors
    /// [`ServiceError::Internal`] if that reaches past its end.
    pub fn read(&self, offset_bytes: u64, into: &mut [u8]) -> Result<(), ServiceError> {
        check(&self.range, offset_bytes, into.len() as u64)?;
        self.memory
            .shared
            .read(self.range.offset + offset_bytes, into)
            .map_err(|error| ServiceError::Internal { message: error.to_string() })
    }

    /// A slot of `bytes` bytes from the same memory, with the first `kept_bytes` of this one's copied.
    ///
    /// # Errors
    /// As [`SlotMemory::reserve`]; [`ServiceError::Internal`] if either slot is shorter than `kept_bytes`.
    pub fn enlarged(&self, kept_bytes: u64, bytes: u64) -> Result<Self, ServiceError> {
        let mut slot = self.memory.reserve(bytes)?;
        check(&self.range, 0, kept_bytes)?;
        let mut kept = vec![0; usize::try_from(kept_bytes).unwrap_or(usize::MAX)];
        self.read(0, &mut kept)?;
        slot.write(0, &kept)?;
        Ok(slot)
    }

    /// Ends all writing: from here on the slot can be viewed.
    ///
    /// To be called when the worker is done with the slot or gone, never while it may still write.
    #[must_use]
    pub fn freeze(self) -> FrozenSlot {
        FrozenSlot { slot: Arc::new(self) }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let freed = self.memory.free_list().free(self.range.offset);
        debug_assert!(freed.is_ok(), "a slot is given back once: {freed:?}");
    }
}

/// A slot that nobody writes any more.
#[derive(Debug, Clone)]
pub struct FrozenSlot {
    slot: Arc<Slot>,
}

impl FrozenSlot {
    /// A view of some of its bytes that keeps the slot taken until it and its clones are dropped. Copies nothing.
    ///
    /// # Errors
    /// [`ServiceError::Internal`] if the range reaches past the slot's end.
    pub fn view(&self, offset_bytes: u64, bytes: u64) -> Result<Bytes, ServiceError> {
        check(&self.slot.range, offset_bytes, bytes)?;
        if bytes == 0 {
            return Ok(Bytes::new());
        }
        Ok(Bytes::from_owner(View { slot: Arc::clone(&self.slot), offset_bytes, bytes }))
    }
}

struct View {
    slot: Arc<Slot>,
    offset_bytes: u64,
    bytes: u64,
}

impl AsRef<[u8]> for View {
    fn as_ref(&self) -> &[u8] {
        let begin = self.slot.range.offset + self.offset_bytes;
        // The range was checked against the mapping when the view was made, and a mapping's size fits `usize`.
        #[allow(clippy::cast_possible_truncation)]
        let (begin, bytes) = (begin as usize, self.bytes as usize);
        // SAFETY: `view` checked the range against the slot, the slot lies inside the mapping, and `self.slot` keeps
        // the mapping alive and the range out of other hands. Nobody writes it meanwhile: in this process writing
        // takes a `&mut Slot`, which `freeze` consumed; in a worker, `freeze` is called when it is done or gone.
        unsafe { std::slice::from_raw_parts(self.slot.memory.shared.as_ptr().add(begin), bytes) }
    }
}

fn check(range: &Range, offset_bytes: u64, bytes: u64) -> Result<(), ServiceError> {
    if offset_bytes.checked_add(bytes).is_some_and(|end| end <= range.bytes) {
        return Ok(());
    }
    let message = format!("{bytes} bytes at {offset_bytes} of a slot of {} bytes", range.bytes);
    Err(ServiceError::Internal { message })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory(bytes: u64) -> Arc<SlotMemory> {
        SlotMemory::new(Arc::new(SharedMemory::create("slots", bytes).unwrap()))
    }

    #[test]
    fn a_slot_is_taken_until_its_last_view_is_dropped() {
        let memory = memory(4096);
        let mut slot = memory.reserve(100).unwrap();
        slot.write(10, b"hello").unwrap();
        let frozen = slot.freeze();
        let view = frozen.view(10, 5).unwrap();
        drop(frozen);
        let clone = view.slice(1..3);
        drop(view);
        assert_eq!(&clone[..], b"el");
        assert!(memory.in_use_bytes() >= 100);
        drop(clone);
        assert_eq!(memory.in_use_bytes(), 0);
    }

    #[test]
    fn slots_do_not_overlap_and_lie_at_tensor_boundaries() {
        let memory = memory(1 << 16);
        let slots: Vec<Slot> = (0..8).map(|_| memory.reserve(700).unwrap()).collect();
        for (index, slot) in slots.iter().enumerate() {
            assert_eq!(slot.offset_bytes() % TENSOR_ALIGNMENT_BYTES, 0);
            for other in &slots[index + 1..] {
                let apart = slot.offset_bytes() + slot.bytes() <= other.offset_bytes()
                    || other.offset_bytes() + other.bytes() <= slot.offset_bytes();
                assert!(apart, "{slot:?} {other:?}");
            }
        }
    }

    #[test]
    fn full_now_and_too_large_for_ever_are_told_apart() {
        let memory = memory(8192);
        let taken = memory.reserve(8192).unwrap();
        let error = memory.reserve(1).unwrap_err();
        assert!(matches!(error, ServiceError::NoSlotMemory { capacity_bytes: 8192, .. }), "{error}");
        drop(taken);
        let error = memory.reserve(8193).unwrap_err();
        assert!(
            matches!(error, ServiceError::TooLarge { asked_bytes: 8193, limit_bytes: 8192, .. }),
            "{error}"
        );
    }

    #[test]
    fn nothing_reaches_past_a_slot() {
        let memory = memory(4096);
        let mut slot = memory.reserve(16).unwrap();
        assert!(slot.write(12, b"hello").is_err());
        assert!(slot.write(u64::MAX, b"hello").is_err());
        let frozen = slot.freeze();
        assert!(frozen.view(0, 17).is_err());
        assert!(frozen.view(u64::MAX, 2).is_err());
        assert_eq!(frozen.view(0, 16).unwrap().len(), 16);
        assert_eq!(frozen.view(16, 0).unwrap().len(), 0);
    }

    #[test]
    fn an_empty_slot_is_a_slot() {
        let memory = memory(4096);
        let slot = memory.reserve(0).unwrap();
        assert_eq!(slot.bytes(), 0);
        drop(slot);
        assert_eq!(memory.in_use_bytes(), 0);
    }
}
