use serde::{Deserialize, Serialize};

use crate::range::{align_down, align_up};
use crate::{PoolError, Range, TENSOR_ALIGNMENT_BYTES};

/// Doorbell words get this share of a pool ...
const DOORBELL_SHARE: u64 = 256;
/// ... but no less than this ...
const LEAST_DOORBELL_BYTES: u64 = 4096;
/// ... and no more: 65,536 words.
const MOST_DOORBELL_BYTES: u64 = 256 * 1024;

/// What each part of a pool is for: doorbell words, then the homes of spans, then the arenas, then what belongs to
/// training.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolLayout {
    /// The words that announce groups.
    pub doorbells: Range,
    /// The homes of all spans.
    pub homes: Range,
    /// One range for each execution that can run at a time.
    pub arenas: Vec<Range>,
    /// The states of training tasks, which [`TrainingMemory`](crate::TrainingMemory) hands out, and behind them the arena
    /// of their steps; empty where nothing is trained. It is a part of the homes if it gives way to models.
    pub training: Range,
}

impl PoolLayout {
    /// Divides a pool of `pool_bytes` into doorbells, homes and `arenas` arenas of `arena_bytes` (rounded up to
    /// [`TENSOR_ALIGNMENT_BYTES`]), with nothing for training.
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
        let arenas: Vec<Range> =
            (0..arenas as u64).map(|i| Range::new(homes.end() + i * arena_bytes, arena_bytes)).collect();
        let training = Range::new(arenas.last().unwrap_or(&homes).end(), 0);
        Ok(Self { doorbells: Range::new(0, doorbell_bytes), homes, arenas, training })
    }

    /// Takes `bytes` (rounded up to [`TENSOR_ALIGNMENT_BYTES`]) from the homes for training, in place of what it had; the
    /// arenas keep their sizes and move to the homes' new end.
    ///
    /// # Errors
    /// [`PoolError::NeverFits`] if nothing would be left for homes.
    pub fn with_training(mut self, bytes: u64) -> Result<Self, PoolError> {
        let pool_bytes = self.bytes();
        let room_bytes = self.homes.bytes + self.training.bytes;
        let training_bytes = align_up(bytes, TENSOR_ALIGNMENT_BYTES).unwrap_or(u64::MAX);
        if training_bytes >= room_bytes {
            let fixed_bytes = (pool_bytes - room_bytes).saturating_add(TENSOR_ALIGNMENT_BYTES);
            return Err(PoolError::NeverFits {
                what: format!(
                    "a part for training of {bytes} bytes beside the doorbells, the arenas and at least one tensor"
                ),
                asked_bytes: training_bytes.saturating_add(fixed_bytes),
                capacity_bytes: pool_bytes,
                advice: "make the pool larger, or the part for training or the arenas smaller",
            });
        }
        let old_end = self.homes.end();
        self.homes.bytes = room_bytes - training_bytes;
        for arena in &mut self.arenas {
            arena.offset = arena.offset - old_end + self.homes.end();
        }
        self.training = Range::new(pool_bytes - training_bytes, training_bytes);
        Ok(self)
    }

    /// Gives training the first `bytes` (rounded up) of the homes, where models may lie too. Those that overlap with it are
    /// in the pool while it is not, which the [`Ledger`](crate::Ledger) sees to under the name
    /// [`ModelId::TRAINING`](crate::ModelId::TRAINING).
    ///
    /// # Errors
    /// [`PoolError::NeverFits`] if the homes are smaller.
    pub fn with_training_in_homes(mut self, bytes: u64) -> Result<Self, PoolError> {
        let training_bytes = align_up(bytes, TENSOR_ALIGNMENT_BYTES).unwrap_or(u64::MAX);
        if training_bytes > self.homes.bytes {
            return Err(PoolError::NeverFits {
                what: format!("a part for training of {bytes} bytes among the homes"),
                asked_bytes: training_bytes,
                capacity_bytes: self.homes.bytes,
                advice: "make the pool larger, or the part for training or the arenas smaller",
            });
        }
        self.training = Range::new(self.homes.offset, training_bytes);
        Ok(self)
    }

    /// Whether models may lie where training does.
    pub fn training_gives_way(&self) -> bool {
        self.training.bytes > 0 && self.homes.contains(&self.training)
    }

    /// Bytes of pool that it needs.
    pub fn bytes(&self) -> u64 {
        let parts = [&self.doorbells, &self.homes, &self.training];
        self.arenas.iter().chain(parts).map(Range::end).max().unwrap_or(0)
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
        let error = PoolLayout::new(1 << 20, 1, 512 * 1024).unwrap().with_training(512 * 1024).unwrap_err();
        assert_eq!(
            error.to_string(),
            "a part for training of 524288 bytes beside the doorbells, the arenas and at least one tensor needs 1053184 \
             bytes and can never fit: there are 1048576 bytes in all; make the pool larger, or the part for training \
             or the arenas smaller"
        );
    }

    #[test]
    fn training_takes_from_the_homes_alone() {
        let without = PoolLayout::new(1 << 20, 2, 64 * 1024).unwrap();
        assert_eq!(without.training, Range::new(1 << 20, 0));
        let with = without.clone().with_training(1000).unwrap();
        assert_eq!(with.training, Range::new((1 << 20) - 1024, 1024));
        assert_eq!(with.homes, Range::new(without.homes.offset, without.homes.bytes - 1024));
        assert_eq!(with.arenas[1], Range::new(without.arenas[1].offset - 1024, 64 * 1024));
        assert_eq!((with.doorbells, with.bytes()), (without.doorbells, 1 << 20));
        // Anew, not on top.
        assert_eq!(with.with_training(0), Ok(without));
    }

    #[test]
    fn training_may_lie_among_the_homes() {
        let without = PoolLayout::new(1 << 20, 2, 64 * 1024).unwrap();
        let with = without.clone().with_training_in_homes(1000).unwrap();
        assert_eq!(with.training, Range::new(without.homes.offset, 1024));
        assert!(with.training_gives_way() && !without.training_gives_way());
        assert!(!without.clone().with_training(1000).unwrap().training_gives_way());
        assert_eq!(PoolLayout { training: without.training, ..with }, without);
        let error = without.clone().with_training_in_homes(1 << 20).unwrap_err();
        let capacity_bytes = without.homes.bytes;
        assert!(matches!(error, PoolError::NeverFits { asked_bytes: 1_048_576, capacity_bytes: found, .. }
            if found == capacity_bytes));
    }

    proptest! {
        #[test]
        fn parts_are_aligned_and_apart(
            pool in any::<u64>(),
            arenas in 0_usize..20,
            arena in any::<u64>(),
            training in any::<u64>(),
            shift in 0..60,
        ) {
            // Small and large ones alike.
            let (pool, arena, training) = (pool >> shift, arena >> shift >> 3, training >> shift >> 1);
            let Ok(without) = PoolLayout::new(pool, arenas, arena) else { return Ok(()) };
            let fits = training <= without.homes.bytes - TENSOR_ALIGNMENT_BYTES;
            let layout = without.clone().with_training(training);
            prop_assert_eq!(layout.is_ok(), fits);
            let layout = layout.unwrap_or(without);
            prop_assert!(layout.bytes() <= pool);
            prop_assert_eq!(layout.arenas.len(), arenas);
            prop_assert!(layout.homes.bytes > 0 && layout.doorbells.bytes >= LEAST_DOORBELL_BYTES);
            prop_assert!(layout.arenas.iter().all(|range| range.bytes >= arena));
            prop_assert!(!fits || (training..training + TENSOR_ALIGNMENT_BYTES).contains(&layout.training.bytes));
            let parts: Vec<Range> =
                [layout.doorbells, layout.homes].into_iter().chain(layout.arenas).chain([layout.training]).collect();
            prop_assert!(parts.windows(2).all(|pair| pair[0].end() == pair[1].offset));
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
