//! Copies of a request's inputs: as few as may be, most often one, and that not too short.

use pswitch_mem_pool::Range;

/// A range of a slot and the range of an arena that it is copied to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct InputCopy {
    pub(super) from: Range,
    pub(super) to: Range,
}

impl InputCopy {
    /// Whether the other lies behind it, as far in the slot as in the arena.
    fn goes_on_with(&self, other: &Self) -> bool {
        other.from.offset >= self.from.end()
            && other.from.offset - self.from.offset == other.to.offset.wrapping_sub(self.to.offset)
    }
}

/// The copies of inputs that lie in a slot and an arena, in the order of both, joined where they lie alike. The
/// last is made `least_bytes` long by what follows, up to `slot_end` and `arena_end`: nothing lies there before inputs
/// have come.
pub(super) fn joined(
    inputs: impl IntoIterator<Item = InputCopy>,
    least_bytes: u64,
    slot_end: u64,
    arena_end: u64,
) -> Vec<InputCopy> {
    let mut copies: Vec<InputCopy> = Vec::new();
    for input in inputs.into_iter().filter(|input| input.from.bytes > 0) {
        match copies.last_mut() {
            Some(last) if last.goes_on_with(&input) => {
                let bytes = input.from.end() - last.from.offset;
                (last.from.bytes, last.to.bytes) = (bytes, bytes);
            }
            _ => copies.push(input),
        }
    }
    // Behind the last alone nothing lies that is needed.
    if let Some(InputCopy { from, to }) = copies.last_mut() {
        let room = slot_end.saturating_sub(from.offset).min(arena_end.saturating_sub(to.offset));
        let bytes = from.bytes.max(least_bytes.min(room));
        (from.bytes, to.bytes) = (bytes, bytes);
    }
    copies
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LEAST: u64 = 96 << 10;

    fn copy(from: u64, to: u64, bytes: u64) -> InputCopy {
        InputCopy { from: Range::new(from, bytes), to: Range::new(to, bytes) }
    }

    #[test]
    fn inputs_that_lie_alike_are_one_copy() {
        let inputs = [copy(0, 4096, 100_000), copy(100_352, 104_448, 16), copy(100_864, 104_960, 0)];
        assert_eq!(joined(inputs, LEAST, 1 << 20, 1 << 20), [copy(0, 4096, 100_368)]);
        let apart = [copy(0, 4096, 100_000), copy(100_864, 104_448, 200_000)];
        assert_eq!(joined(apart, LEAST, 1 << 20, 1 << 20), apart);
    }

    #[test]
    fn a_short_copy_takes_what_follows_along_as_far_as_there_is_something() {
        assert_eq!(joined([copy(0, 512, 8)], LEAST, 1 << 20, 1 << 20), [copy(0, 512, LEAST)]);
        assert_eq!(joined([copy(0, 512, 8)], LEAST, 4096, 1 << 20), [copy(0, 512, 4096)]);
        assert_eq!(joined([copy(0, 512, 8)], LEAST, 1 << 20, 2048), [copy(0, 512, 1536)]);
        assert_eq!(joined([], LEAST, 1 << 20, 1 << 20), []);
    }

    proptest! {
        /// Every input arrives where it belongs, and nothing is read or written outside.
        #[test]
        fn all_inputs_arrive(inputs in prop::collection::vec((0_u64..70_000, 0_u64..3), 0..6), spare in 0_u64..200_000) {
            let (mut from, mut to) = (0, 1024);
            let mut asked = Vec::new();
            for (bytes, gap) in inputs {
                asked.push(copy(from, to, bytes));
                (from, to) = (from + bytes.next_multiple_of(512) + gap * 512, to + bytes.next_multiple_of(512));
            }
            let (slot_end, arena_end) = (from + spare, to + spare);
            let copies = joined(asked.clone(), LEAST, slot_end, arena_end);
            for input in asked.iter().filter(|input| input.from.bytes > 0) {
                prop_assert!(copies.iter().any(|copy| copy.from.contains(&input.from)
                    && copy.to.contains(&input.to)
                    && input.from.offset - copy.from.offset == input.to.offset - copy.to.offset));
            }
            prop_assert!(copies.iter().all(|copy| copy.from.end() <= slot_end && copy.to.end() <= arena_end));
            prop_assert!(copies.windows(2).all(|pair| pair[0].to.end() <= pair[1].to.offset));
        }
    }
}
