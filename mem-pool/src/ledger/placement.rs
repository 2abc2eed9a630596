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

/// Where `bytes` of `0..capacity_bytes` can be had beside what stays, if the `victims` make room one after the other until
/// there is a gap that is long enough: the lowest such place. `None` if there is none although all are gone.
///
/// Without the last victim that had to go there was no such gap, so the place lies over that one at least; over which of
/// the others it does is for the caller to see. What is given is aligned, and so is what is found.
pub(super) fn in_place_of_the_first(
    capacity_bytes: u64,
    bytes: u64,
    stay: &[Range],
    victims: &[Range],
) -> Option<u64> {
    // Each with how many must have gone for it to be gone.
    let victims_by_turn = (1..).zip(victims).map(|(turn, range)| (*range, turn));
    let mut taken: Vec<(Range, usize)> = stay.iter().map(|range| (*range, usize::MAX)).collect();
    taken.extend(victims_by_turn);
    taken.sort_unstable();
    (0..=victims.len()).find_map(|gone| {
        let left = taken.iter().filter(|(_, turn)| *turn > gone).map(|(range, _)| *range);
        first_fit(capacity_bytes, bytes, left)
    })
}

/// The lowest gap of so many bytes between ranges that are sorted.
fn first_fit(capacity_bytes: u64, bytes: u64, taken: impl Iterator<Item = Range>) -> Option<u64> {
    let mut begin = 0;
    for range in taken.filter(|range| range.bytes > 0) {
        if range.offset.saturating_sub(begin) >= bytes {
            break;
        }
        begin = begin.max(range.end());
    }
    (capacity_bytes.checked_sub(begin)? >= bytes).then_some(begin)
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

    #[test]
    fn victims_go_in_their_order_until_there_is_a_gap() {
        let [a, b, c] = [Range::new(0, 40), Range::new(40, 20), Range::new(60, 40)];
        assert_eq!(in_place_of_the_first(100, 20, &[], &[b, a, c]), Some(40));
        assert_eq!(in_place_of_the_first(100, 20, &[], &[c, a, b]), Some(60));
        assert_eq!(in_place_of_the_first(100, 30, &[], &[b, c, a]), Some(40));
        assert_eq!(in_place_of_the_first(100, 30, &[a, c], &[b]), None);
        // What went first did not help: the place that is found at last is not over it.
        assert_eq!(in_place_of_the_first(100, 40, &[], &[b, a, c]), Some(0));
        // Nobody has to go for a gap that is there.
        assert_eq!(in_place_of_the_first(200, 100, &[], &[a, b, c]), Some(100));
        assert_eq!(in_place_of_the_first(100, 101, &[], &[a, b, c]), None);
    }

    /// Ranges one behind the other, with gaps between them.
    fn apart(parts: &[(u64, u64)]) -> Vec<Range> {
        let mut end = 0;
        let mut range = |&(gap, bytes): &(u64, u64)| {
            let range = Range::new(end + gap, bytes);
            end = range.end();
            range
        };
        parts.iter().map(&mut range).collect()
    }

    proptest! {
        /// As if every offset were tried for every number of victims.
        #[test]
        fn room_is_found_where_trying_all_finds_it(
            parts in prop::collection::vec((0_u64..6, 0_u64..9), 0..7),
            rest in 0_u64..8,
            bytes in 0_u64..30,
            order in Just((0..7_usize).collect::<Vec<_>>()).prop_shuffle(),
            stays in prop::collection::vec(any::<bool>(), 7),
        ) {
            let ranges = apart(&parts);
            let capacity = ranges.last().map_or(0, Range::end) + rest;
            let pick = |stay: bool| -> Vec<Range> {
                let chosen = order.iter().filter(|&&index| index < ranges.len() && stays[index] == stay);
                chosen.map(|&index| ranges[index]).collect()
            };
            let (stay, victims) = (pick(true), pick(false));
            let is_free = |at: u64, gone: usize| {
                stay.iter().chain(&victims[gone..]).all(|range| !range.overlaps(&Range::new(at, bytes)))
            };
            let expected = (0..=victims.len()).find_map(|gone| {
                (0..=capacity.checked_sub(bytes)?).find(|&at| bytes == 0 || is_free(at, gone))
            });
            let found = in_place_of_the_first(capacity, bytes, &stay, &victims);
            prop_assert_eq!(found, expected);
        }

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
