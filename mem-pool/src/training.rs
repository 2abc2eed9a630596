use crate::range::{align_down, align_up};
use crate::{FreeList, PoolError, Range, TENSOR_ALIGNMENT_BYTES};

/// Hands out the part of a pool that is for training: to each task a range for its state. What lies behind all of them is
/// the arena of whichever task computes.
///
/// As pure as the [`FreeList`] beneath it; ranges are counted from the pool's begin, as all others.
///
/// ```
/// use pswitch_mem_pool::{PoolError, PoolLayout, TrainingMemory};
///
/// let layout = PoolLayout::new(1 << 20, 1, 64 << 10)?.with_training(16 << 10)?;
/// let mut memory = TrainingMemory::new(layout.training);
/// let state = memory.allocate(10_000)?;
/// assert_eq!((state.offset, state.bytes), (layout.training.offset, 10_240));
/// assert!(matches!(memory.allocate(8 << 10), Err(PoolError::NoRoomNow { .. })));
/// assert!(matches!(memory.allocate(1 << 20), Err(PoolError::NeverFits { .. })));
/// memory.free(state)?;
/// # Ok::<(), PoolError>(())
/// ```
#[derive(Debug, Clone)]
pub struct TrainingMemory {
    begin: u64,
    list: FreeList,
}

impl TrainingMemory {
    /// All of [`PoolLayout::training`](crate::PoolLayout::training) is free.
    pub fn new(part: Range) -> Self {
        let begin = align_up(part.offset, TENSOR_ALIGNMENT_BYTES).unwrap_or(part.end());
        let bytes = align_down(part.end().saturating_sub(begin), TENSOR_ALIGNMENT_BYTES);
        Self { begin, list: FreeList::new(bytes) }
    }

    /// Takes `bytes`, rounded up to [`TENSOR_ALIGNMENT_BYTES`], at a multiple of it. The range has all of the rounded bytes.
    ///
    /// # Errors
    /// [`PoolError::NeverFits`] if the part is smaller, [`PoolError::NoRoomNow`] if other tasks have too much of it,
    /// [`PoolError::EmptyAllocation`]. Nothing changes then.
    pub fn allocate(&mut self, bytes: u64) -> Result<Range, PoolError> {
        let rounded = align_up(bytes, TENSOR_ALIGNMENT_BYTES).unwrap_or(u64::MAX);
        let capacity_bytes = self.list.capacity_bytes();
        if rounded > capacity_bytes {
            return Err(PoolError::NeverFits {
                what: "a training task".to_owned(),
                asked_bytes: bytes,
                capacity_bytes,
                advice: "make the pool's part for training larger",
            });
        }
        let range = self.list.allocate(rounded, TENSOR_ALIGNMENT_BYTES)?;
        Ok(Range::new(self.begin + range.offset, range.bytes))
    }

    /// Gives back what [`allocate`](Self::allocate) returned.
    ///
    /// # Errors
    /// [`PoolError::NotAllocated`] for any other range; nothing changes then.
    pub fn free(&mut self, range: Range) -> Result<(), PoolError> {
        let unknown = PoolError::NotAllocated { at: range.offset };
        let Some(offset) = range.offset.checked_sub(self.begin) else { return Err(unknown) };
        if self.list.allocated(offset) != Some(Range::new(offset, range.bytes)) {
            return Err(unknown);
        }
        self.list.free(offset).map(|_| ())
    }

    /// Bytes in all.
    pub fn capacity_bytes(&self) -> u64 {
        self.list.capacity_bytes()
    }

    /// Bytes that tasks have now.
    pub fn in_use_bytes(&self) -> u64 {
        self.list.in_use_bytes()
    }

    /// The longest range that could be had now.
    pub fn largest_free_bytes(&self) -> u64 {
        self.list.largest_free_bytes()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn only_what_was_handed_out_comes_back() {
        let mut memory = TrainingMemory::new(Range::new(4096, 4096));
        let range = memory.allocate(1000).unwrap();
        assert_eq!(range, Range::new(4096, 1024));
        for wrong in
            [Range::new(4096, 1000), Range::new(0, 1024), Range::new(4608, 512), Range::new(8192, 512)]
        {
            assert_eq!(memory.free(wrong), Err(PoolError::NotAllocated { at: wrong.offset }));
        }
        assert_eq!(memory.in_use_bytes(), 1024);
        memory.free(range).unwrap();
        assert_eq!(memory.free(range), Err(PoolError::NotAllocated { at: 4096 }));
        assert_eq!((memory.in_use_bytes(), memory.largest_free_bytes()), (0, 4096));
    }

    #[test]
    fn errors_say_what_is_missing() {
        let mut nothing = TrainingMemory::new(Range::new(4096, 0));
        assert_eq!(nothing.allocate(0), Err(PoolError::EmptyAllocation));
        assert_eq!(
            nothing.allocate(1).unwrap_err().to_string(),
            "a training task needs 1 bytes and can never fit: there are 0 bytes in all; make the pool's part for \
             training larger"
        );
        assert!(matches!(nothing.allocate(u64::MAX), Err(PoolError::NeverFits { .. })));
    }

    proptest! {
        #[test]
        fn ranges_are_aligned_apart_and_inside(
            begin in 0_u64..2000,
            bytes in 0_u64..20_000,
            asked in prop::collection::vec((1_u64..6000, any::<bool>()), 0..40),
        ) {
            let part = Range::new(begin, bytes);
            let mut memory = TrainingMemory::new(part);
            prop_assert!(memory.capacity_bytes() <= bytes);
            let mut given: Vec<Range> = vec![];
            for (bytes, frees) in asked {
                if frees && !given.is_empty() {
                    let range = given.swap_remove(usize::try_from(bytes).unwrap_or(0) % given.len());
                    prop_assert_eq!(memory.free(range), Ok(()));
                } else if let Ok(range) = memory.allocate(bytes) {
                    prop_assert!(part.contains(&range) && given.iter().all(|other| !other.overlaps(&range)));
                    prop_assert_eq!((range.offset % 512, range.bytes), (0, bytes.next_multiple_of(512)));
                    given.push(range);
                }
                prop_assert_eq!(memory.in_use_bytes(), given.iter().map(|range| range.bytes).sum::<u64>());
            }
            for range in given {
                prop_assert_eq!(memory.free(range), Ok(()));
            }
            prop_assert_eq!(memory.largest_free_bytes(), memory.capacity_bytes());
        }
    }
}
