use std::collections::{BTreeMap, BTreeSet};

use crate::range::align_up;
use crate::{PoolError, Range};

/// Hands out ranges of `0..bytes`: best fit, and neighbours grow together again when they are freed.
///
/// Pure arithmetic over offsets; it touches no memory. Allocating and freeing take time logarithmic in the number of
/// ranges as long as all use one alignment.
#[derive(Debug, Clone)]
pub struct FreeList {
    bytes: u64,
    in_use_bytes: u64,
    peak_bytes: u64,
    /// Offset -> length of the free ranges; no two touch.
    free: BTreeMap<u64, u64>,
    /// The same as (length, offset), to find the best fit.
    by_length: BTreeSet<(u64, u64)>,
    /// Offset -> length of the ranges in use.
    used: BTreeMap<u64, u64>,
}

impl FreeList {
    /// All of `0..bytes` is free.
    pub fn new(bytes: u64) -> Self {
        let mut list = Self {
            bytes,
            in_use_bytes: 0,
            peak_bytes: 0,
            free: BTreeMap::new(),
            by_length: BTreeSet::new(),
            used: BTreeMap::new(),
        };
        list.insert_free(0, bytes);
        list
    }

    /// Takes the shortest free range in which `bytes` fit at a multiple of `alignment` (a power of two); of equally
    /// long ones the first.
    ///
    /// # Errors
    /// [`PoolError::NeverFits`] or [`PoolError::NoRoomNow`], with the numbers; [`PoolError::EmptyAllocation`],
    /// [`PoolError::InvalidAlignment`]. Nothing changes then.
    pub fn allocate(&mut self, bytes: u64, alignment: u64) -> Result<Range, PoolError> {
        if bytes == 0 {
            return Err(PoolError::EmptyAllocation);
        }
        if !alignment.is_power_of_two() {
            return Err(PoolError::InvalidAlignment { alignment });
        }
        let fits = |&(length, offset): &(u64, u64)| {
            let begin = align_up(offset, alignment)?;
            (begin.checked_add(bytes)? <= offset + length).then_some((offset, length, begin))
        };
        let Some((offset, length, begin)) = self.by_length.range((bytes, 0)..).find_map(fits) else {
            return Err(self.does_not_fit(bytes));
        };
        self.remove_free(offset, length);
        self.insert_free(offset, begin - offset);
        self.insert_free(begin + bytes, offset + length - (begin + bytes));
        self.used.insert(begin, bytes);
        self.in_use_bytes += bytes;
        self.peak_bytes = self.peak_bytes.max(self.in_use_bytes);
        Ok(Range::new(begin, bytes))
    }

    /// Gives back the range that begins at `offset` and returns it.
    ///
    /// # Errors
    /// [`PoolError::NotAllocated`] if no allocated range begins there.
    pub fn free(&mut self, offset: u64) -> Result<Range, PoolError> {
        let bytes = self.used.remove(&offset).ok_or(PoolError::NotAllocated { at: offset })?;
        self.in_use_bytes -= bytes;
        let (mut begin, mut end) = (offset, offset + bytes);
        if let Some((&before, &length)) = self.free.range(..offset).next_back()
            && before + length == begin
        {
            self.remove_free(before, length);
            begin = before;
        }
        if let Some(&length) = self.free.get(&end) {
            self.remove_free(end, length);
            end += length;
        }
        self.insert_free(begin, end - begin);
        Ok(Range::new(offset, bytes))
    }

    /// The allocated range that begins at `offset`, if one does.
    pub fn allocated(&self, offset: u64) -> Option<Range> {
        self.used.get(&offset).map(|&bytes| Range::new(offset, bytes))
    }

    /// Bytes in all.
    pub fn capacity_bytes(&self) -> u64 {
        self.bytes
    }

    /// Bytes allocated now.
    pub fn in_use_bytes(&self) -> u64 {
        self.in_use_bytes
    }

    /// Ranges allocated now.
    pub fn allocations(&self) -> usize {
        self.used.len()
    }

    /// The longest free range.
    pub fn largest_free_bytes(&self) -> u64 {
        self.by_length.last().map_or(0, |&(length, _)| length)
    }

    /// The most bytes that were allocated at a time since the list was made or the peak was reset.
    pub fn peak_bytes(&self) -> u64 {
        self.peak_bytes
    }

    /// Lets the peak begin anew with what is allocated now.
    pub fn reset_peak(&mut self) {
        self.peak_bytes = self.in_use_bytes;
    }

    /// Checks all invariants: free and used ranges tile the whole without overlap, no two free ranges touch, both views
    /// of the free ranges agree, the totals add up.
    ///
    /// # Errors
    /// What is wrong.
    pub fn check(&self) -> Result<(), String> {
        let mut all: Vec<(u64, u64, bool)> = self.free.iter().map(|(&o, &l)| (o, l, true)).collect();
        all.extend(self.used.iter().map(|(&o, &l)| (o, l, false)));
        all.sort_unstable();
        let (mut end, mut last_was_free) = (0, false);
        for (offset, length, is_free) in all {
            if offset != end || length == 0 {
                return Err(format!("a range of {length} bytes at {offset} follows one that ends at {end}"));
            }
            if is_free && last_was_free {
                return Err(format!(
                    "the free range at {offset} has not grown together with the one before it"
                ));
            }
            (end, last_was_free) = (offset + length, is_free);
        }
        if end != self.bytes {
            return Err(format!("the ranges end at {end}, not at {}", self.bytes));
        }
        let used: u64 = self.used.values().sum();
        if used != self.in_use_bytes || self.peak_bytes < used {
            let (counted, peak) = (self.in_use_bytes, self.peak_bytes);
            return Err(format!("{used} bytes are in use, {counted} were counted, the peak is {peak}"));
        }
        let by_length: BTreeSet<(u64, u64)> = self.free.iter().map(|(&o, &l)| (l, o)).collect();
        if by_length != self.by_length {
            return Err("the free ranges by offset and by length differ".to_owned());
        }
        Ok(())
    }

    fn does_not_fit(&self, asked_bytes: u64) -> PoolError {
        if asked_bytes > self.bytes {
            return PoolError::NeverFits {
                what: "an allocation".to_owned(),
                asked_bytes,
                capacity_bytes: self.bytes,
                advice: "make the whole larger or ask for less (a smaller batch)",
            };
        }
        PoolError::NoRoomNow {
            asked_bytes,
            in_use_bytes: self.in_use_bytes,
            capacity_bytes: self.bytes,
            largest_free_bytes: self.largest_free_bytes(),
        }
    }

    fn insert_free(&mut self, offset: u64, bytes: u64) {
        if bytes > 0 {
            self.free.insert(offset, bytes);
            self.by_length.insert((bytes, offset));
        }
    }

    fn remove_free(&mut self, offset: u64, bytes: u64) {
        self.free.remove(&offset);
        self.by_length.remove(&(bytes, offset));
    }
}
