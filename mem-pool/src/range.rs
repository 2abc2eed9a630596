use std::fmt;

use serde::{Deserialize, Serialize};

/// Spans, homes, arenas and allocations begin at multiples of this, as libtorch's own allocator does it.
pub const TENSOR_ALIGNMENT_BYTES: u64 = 512;

/// Some bytes of a pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct Range {
    /// Where it begins, counted from the pool's begin.
    pub offset: u64,
    /// How long it is.
    pub bytes: u64,
}

impl Range {
    /// The `bytes` from `offset` on.
    pub const fn new(offset: u64, bytes: u64) -> Self {
        Self { offset, bytes }
    }

    /// The first offset behind it (saturating).
    pub const fn end(&self) -> u64 {
        self.offset.saturating_add(self.bytes)
    }

    /// Whether the two share a byte; an empty range shares none.
    pub const fn overlaps(&self, other: &Self) -> bool {
        self.overlap_bytes(other) > 0
    }

    /// How many bytes the two share.
    pub const fn overlap_bytes(&self, other: &Self) -> u64 {
        let begin = if self.offset > other.offset { self.offset } else { other.offset };
        let end = if self.end() < other.end() { self.end() } else { other.end() };
        end.saturating_sub(begin)
    }

    /// Whether all of `other` lies in this range.
    pub const fn contains(&self, other: &Self) -> bool {
        self.offset <= other.offset && other.end() <= self.end()
    }
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..{}", self.offset, self.end())
    }
}

/// The next multiple of `alignment` (a power of two) that is not below `value`.
pub(crate) fn align_up(value: u64, alignment: u64) -> Option<u64> {
    debug_assert!(alignment.is_power_of_two());
    value.checked_next_multiple_of(alignment)
}

/// The last multiple of `alignment` (a power of two) that is not above `value`.
pub(crate) fn align_down(value: u64, alignment: u64) -> u64 {
    debug_assert!(alignment.is_power_of_two());
    value & !(alignment - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_know_what_they_share() {
        let range = Range::new(10, 10);
        assert_eq!(range.end(), 20);
        assert_eq!(range.to_string(), "10..20");
        for (other, shared) in [
            (Range::new(0, 10), 0),
            (Range::new(0, 11), 1),
            (Range::new(12, 3), 3),
            (Range::new(19, 100), 1),
            (Range::new(20, 5), 0),
            (Range::new(15, 0), 0),
            (Range::new(5, u64::MAX), 10),
        ] {
            assert_eq!(range.overlap_bytes(&other), shared, "{other}");
            assert_eq!(other.overlap_bytes(&range), shared, "{other}");
            assert_eq!(range.overlaps(&other), shared > 0, "{other}");
        }
        assert!(range.contains(&range) && range.contains(&Range::new(20, 0)));
        assert!(!range.contains(&Range::new(10, 11)) && !range.contains(&Range::new(9, 2)));
    }
}
