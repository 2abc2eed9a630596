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
