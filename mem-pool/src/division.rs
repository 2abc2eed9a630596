use crate::range::align_up;
use crate::{PoolError, Range, TENSOR_ALIGNMENT_BYTES};

/// How one execution divides its arena: inputs at the begin, the word that announces them at the end, and between them
/// the place for all that the execution allocates.
///
/// It follows from the arena and the inputs' sizes alone, so that whoever copies the inputs and whoever executes come to
/// the same places without a word, and a place may be known long before there is a request.
///
/// ```
/// use pswitch_mem_pool::{ArenaDivision, Range};
///
/// let division = ArenaDivision::new(Range::new(4096, 8192), [100, 600])?;
/// assert_eq!(division.inputs, [Range::new(4096, 100), Range::new(4608, 600)]);
/// assert_eq!(division.activations, Range::new(5632, 6144));
/// assert_eq!(division.doorbell, Range::new(11776, 4));
/// # Ok::<(), pswitch_mem_pool::PoolError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ArenaDivision {
    /// The inputs in their order, each at a multiple of [`TENSOR_ALIGNMENT_BYTES`].
    pub inputs: Vec<Range>,
    /// What the execution allocates from.
    pub activations: Range,
    /// The word that rings when the inputs have landed.
    pub doorbell: Range,
}

impl ArenaDivision {
    /// Divides an arena for inputs of these sizes.
    ///
    /// # Errors
    /// [`PoolError::NeverFits`] if they leave nothing of it.
    pub fn new(arena: Range, input_bytes: impl IntoIterator<Item = u64>) -> Result<Self, PoolError> {
        let limit_bytes = Self::limit_bytes(arena);
        let mut used = 0_u64;
        let mut inputs = Vec::new();
        for bytes in input_bytes {
            inputs.push(Range::new(arena.offset.saturating_add(used), bytes));
            used = used.checked_add(bytes).and_then(align_up_to_tensor).unwrap_or(u64::MAX);
        }
        if used > limit_bytes {
            return Err(PoolError::NeverFits {
                what: "the inputs of one execution".to_owned(),
                asked_bytes: used,
                capacity_bytes: limit_bytes,
                advice: "make the arenas larger, or send a smaller batch",
            });
        }
        let activations = Range::new(arena.offset + used, limit_bytes - used);
        Ok(Self { inputs, activations, doorbell: Range::new(activations.end(), 4) })
    }

    /// Bytes of an arena for inputs and activations together.
    pub fn limit_bytes(arena: Range) -> u64 {
        arena.bytes.saturating_sub(TENSOR_ALIGNMENT_BYTES)
    }

    /// The word of an arena that rings when inputs have landed, whatever the inputs.
    pub fn doorbell_of(arena: Range) -> Range {
        Range::new(arena.offset + Self::limit_bytes(arena), 4)
    }
}

fn align_up_to_tensor(bytes: u64) -> Option<u64> {
    align_up(bytes, TENSOR_ALIGNMENT_BYTES)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn parts_are_apart_and_inside(
            tensors in 1_u64..64,
            inputs in prop::collection::vec(prop_oneof![0_u64..5000, any::<u64>()], 0..6),
        ) {
            let arena = Range::new(512 * 7, 512 * tensors);
            let asked: u128 = inputs.iter().map(|&bytes| u128::from(bytes).next_multiple_of(512)).sum();
            match ArenaDivision::new(arena, inputs.iter().copied()) {
                Ok(division) => {
                    prop_assert!(asked <= u128::from(arena.bytes - 512));
                    let mut parts = division.inputs.clone();
                    prop_assert!(parts.iter().map(|part| part.bytes).eq(inputs.iter().copied()));
                    parts.extend([division.activations, division.doorbell]);
                    prop_assert!(parts.iter().all(|part| arena.contains(part) && part.offset % 512 == 0));
                    prop_assert!(parts.windows(2).all(|pair| pair[0].end() <= pair[1].offset));
                    prop_assert_eq!(division.doorbell, ArenaDivision::doorbell_of(arena));
                }
                Err(PoolError::NeverFits { capacity_bytes, .. }) => {
                    prop_assert!(asked > u128::from(capacity_bytes));
                }
                Err(error) => prop_assert!(false, "{error}"),
            }
        }
    }
}
