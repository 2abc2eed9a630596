use crate::Range;

/// Where `bytes` overlap least with the `taken` ranges of `0..capacity_bytes`; `None` if they can never fit.
///
/// Least is, in this order: the fewest bytes of overlap (bytes taken twice count twice), the fewest ranges overlapped
/// (each is a model that cannot be resident together with this one), the fewest bytes in those, the lowest offset.
/// The bytes of overlap are a piecewise linear function of the offset that bends only where one range's end meets
/// another's, so looking at those places is enough; all are multiples of the alignment if what is given is.
pub(super) fn least_overlap(capacity_bytes: u64, bytes: u64, taken: &[Range]) -> Option<u64> {
    let last = capacity_bytes.checked_sub(bytes)?;
    let bends = taken.iter().flat_map(|range| {
        let (begin, end) = (range.offset, range.end());
        [Some(begin), Some(end), begin.checked_sub(bytes), end.checked_sub(bytes)]
    });
    let cost = |offset: u64| {
        let place = Range::new(offset, bytes);
        let overlapped = || taken.iter().filter(|range| range.overlaps(&place));
        let overlap_bytes: u128 = overlapped().map(|range| u128::from(range.overlap_bytes(&place))).sum();
        let evicted_bytes: u128 = overlapped().map(|range| u128::from(range.bytes)).sum();
        (overlap_bytes, overlapped().count(), evicted_bytes, offset)
    };
    bends.flatten().chain([0, last]).filter(|&offset| offset <= last).min_by_key(|&offset| cost(offset))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn overlap_bytes(offset: u64, bytes: u64, taken: &[Range]) -> u64 {
        let place = Range::new(offset, bytes);
        taken.iter().map(|range| range.overlap_bytes(&place)).sum()
    }

    #[test]
    fn the_first_gap_that_is_long_enough_is_taken() {
        let taken = [Range::new(0, 10), Range::new(15, 10), Range::new(40, 10)];
        assert_eq!(least_overlap(100, 5, &taken), Some(10));
        assert_eq!(least_overlap(100, 6, &taken), Some(25));
        assert_eq!(least_overlap(100, 50, &taken), Some(50));
    }

    #[test]
    fn one_neighbour_is_overlapped_rather_than_two() {
        // 10 bytes of overlap in both gaps; only the second one meets one neighbour alone.
        let taken = [Range::new(0, 40), Range::new(50, 30), Range::new(90, 10)];
        let offset = least_overlap(100, 20, &taken).unwrap();
        assert_eq!(overlap_bytes(offset, 20, &taken), 10);
        let place = Range::new(offset, 20);
        assert_eq!(taken.iter().filter(|range| range.overlaps(&place)).count(), 1);
    }

    #[test]
    fn places_taken_twice_are_avoided() {
        let taken = [Range::new(0, 50), Range::new(0, 50), Range::new(50, 50)];
        assert_eq!(least_overlap(100, 50, &taken), Some(50));
    }

    #[test]
    fn what_is_too_long_never_fits() {
        assert_eq!(least_overlap(100, 101, &[]), None);
        assert_eq!(least_overlap(100, u64::MAX, &[]), None);
        assert_eq!(least_overlap(100, 100, &[]), Some(0));
        assert_eq!(least_overlap(100, 0, &[Range::new(0, 100)]), Some(0));
    }

    proptest! {
        /// No other offset is better, whichever one looks at.
        #[test]
        fn no_place_overlaps_less(
            capacity in 1_u64..200,
            bytes in 0_u64..100,
            taken in prop::collection::vec((0_u64..200, 0_u64..80), 0..8),
        ) {
            let taken: Vec<Range> = taken
                .into_iter()
                .map(|(offset, bytes)| Range::new(offset, bytes))
                .filter(|range| range.end() <= capacity)
                .collect();
            match least_overlap(capacity, bytes, &taken) {
                None => prop_assert!(bytes > capacity),
                Some(found) => {
                    prop_assert!(found + bytes <= capacity);
                    let least = (0..=capacity - bytes).map(|at| overlap_bytes(at, bytes, &taken)).min();
                    prop_assert_eq!(Some(overlap_bytes(found, bytes, &taken)), least);
                }
            }
        }
    }
}
