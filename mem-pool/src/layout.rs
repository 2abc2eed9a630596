use serde::{Deserialize, Serialize};

use crate::range::{align_down, align_up};
use crate::{PoolError, Range, TENSOR_ALIGNMENT_BYTES};

/// Doorbell words get this share of a pool ...
const DOORBELL_SHARE: u64 = 256;
/// ... but no less than this ...
const LEAST_DOORBELL_BYTES: u64 = 4096;
/// ... and no more: 65,536 words.
const MOST_DOORBELL_BYTES: u64 = 256 * 1024;

/// What each part of a pool is for: doorbell words, then the homes of spans, then the arenas.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolLayout {
    /// The words that announce groups.
    pub doorbells: Range,
    /// The homes of all spans.
    pub homes: Range,
    /// One range for each execution that can run at a time.
    pub arenas: Vec<Range>,
}

impl PoolLayout {
    /// Divides a pool of `pool_bytes` into doorbells, homes and `arenas` arenas of `arena_bytes` (rounded up to
    /// [`TENSOR_ALIGNMENT_BYTES`]).
    ///
    /// # Errors
    /// [`PoolError::NeverFits`] if nothing would be left for homes.
    pub fn new(pool_bytes: u64, arenas: usize, arena_bytes: u64) -> Result<Self, PoolError> {
        let doorbell_bytes = align_down(pool_bytes / DOORBELL_SHARE, TENSOR_ALIGNMENT_BYTES)
            .clamp(LEAST_DOORBELL_BYTES, MOST_DOORBELL_BYTES);
        let never = |asked_bytes| PoolError::NeverFits {
            what: format!(
                "{arenas} arenas of {arena_bytes} bytes beside the doorbells and at least one tensor"
            ),
            asked_bytes,
            capacity_bytes: pool_bytes,
            advice: "make the pool larger, or the arenas smaller or fewer",
        };
        let arena_bytes = align_up(arena_bytes, TENSOR_ALIGNMENT_BYTES).ok_or_else(|| never(u64::MAX))?;
        let fixed_bytes = arena_bytes
            .checked_mul(arenas as u64)
            .and_then(|bytes| bytes.checked_add(doorbell_bytes))
            .ok_or_else(|| never(u64::MAX))?;
        let homes_bytes = align_down(pool_bytes, TENSOR_ALIGNMENT_BYTES).saturating_sub(fixed_bytes);
        if homes_bytes == 0 {
            return Err(never(fixed_bytes.saturating_add(TENSOR_ALIGNMENT_BYTES)));
        }
        let homes = Range::new(doorbell_bytes, homes_bytes);
        let arenas =
            (0..arenas as u64).map(|i| Range::new(homes.end() + i * arena_bytes, arena_bytes)).collect();
        Ok(Self { doorbells: Range::new(0, doorbell_bytes), homes, arenas })
    }

    /// Bytes of pool that it needs.
    pub fn bytes(&self) -> u64 {
        self.arenas.iter().chain([&self.doorbells, &self.homes]).map(Range::end).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn an_error_says_what_is_missing() {
        let error = PoolLayout::new(1 << 20, 2, 512 * 1024).unwrap_err();
        assert_eq!(
            error.to_string(),
            "2 arenas of 524288 bytes beside the doorbells and at least one tensor needs 1053184 bytes and can never \
             fit: there are 1048576 bytes in all; make the pool larger, or the arenas smaller or fewer"
        );
    }

    proptest! {
        #[test]
        fn parts_are_aligned_and_apart(pool in any::<u64>(), arenas in 0_usize..20, arena in any::<u64>(), shift in 0..60) {
            // Small and large ones alike.
            let (pool, arena) = (pool >> shift, arena >> shift >> 3);
            let Ok(layout) = PoolLayout::new(pool, arenas, arena) else { return Ok(()) };
            prop_assert!(layout.bytes() <= pool);
            prop_assert_eq!(layout.arenas.len(), arenas);
            prop_assert!(layout.homes.bytes > 0 && layout.doorbells.bytes >= LEAST_DOORBELL_BYTES);
            prop_assert!(layout.arenas.iter().all(|range| range.bytes >= arena));
            let parts: Vec<Range> = [layout.doorbells, layout.homes].into_iter().chain(layout.arenas).collect();
            for (index, part) in parts.iter().enumerate() {
                prop_assert_eq!(part.offset % TENSOR_ALIGNMENT_BYTES, 0);
                prop_assert!(parts[index + 1..].iter().all(|other| !part.overlaps(other)));
            }
            // No more than the doorbells' share and a tensor's rest is lost.
            let used: u64 = parts.iter().map(|part| part.bytes).sum();
            prop_assert!(pool - used < TENSOR_ALIGNMENT_BYTES);
        }
    }
}
