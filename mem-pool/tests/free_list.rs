//! Random histories of allocating and freeing, against the list's own invariants and a plain model.

use std::collections::BTreeMap;

use proptest::prelude::*;
use pswitch_mem_pool::{FreeList, PoolError, Range};

#[derive(Debug, Clone)]
enum Step {
    Allocate {
        bytes: u64,
        alignment: u64,
    },
    /// Frees the allocation at this place in the order of offsets, modulo how many there are.
    Free(usize),
    /// Frees an offset at which nothing may begin.
    FreeAnywhere(u64),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let allocate =
        (1_u64..300, 0_u32..7).prop_map(|(bytes, shift)| Step::Allocate { bytes, alignment: 1 << shift });
    let step = prop_oneof![
        5 => allocate,
        4 => any::<usize>().prop_map(Step::Free),
        1 => (0_u64..1_100).prop_map(Step::FreeAnywhere),
    ];
    prop::collection::vec(step, 0..200)
}

/// The gaps between allocations.
fn gaps(capacity: u64, used: &BTreeMap<u64, u64>) -> Vec<Range> {
    let mut begin = 0;
    let mut gaps = vec![];
    for (&offset, &bytes) in used.iter().chain([(&capacity, &0)]) {
        gaps.push(Range::new(begin, offset - begin));
        begin = offset + bytes;
    }
    gaps.retain(|gap| gap.bytes > 0);
    gaps
}

fn fits(gap: &Range, bytes: u64, alignment: u64) -> bool {
    gap.offset.next_multiple_of(alignment) + bytes <= gap.end()
}

proptest! {
    #[test]
    fn histories_keep_all_invariants(capacity in 1_u64..1_000, steps in steps()) {
        let mut list = FreeList::new(capacity);
        let mut used = BTreeMap::new();
        let mut peak = 0;
        for step in steps {
            let free_gaps = gaps(capacity, &used);
            match step {
                Step::Allocate { bytes, alignment } => {
                    let best = free_gaps.iter().filter(|gap| fits(gap, bytes, alignment)).map(|gap| gap.bytes).min();
                    match list.allocate(bytes, alignment) {
                        Ok(range) => {
                            prop_assert_eq!(range.bytes, bytes);
                            prop_assert_eq!(range.offset % alignment, 0);
                            let gap = free_gaps.iter().find(|gap| gap.contains(&range));
                            prop_assert_eq!(gap.map(|gap| gap.bytes), best, "not the best fit");
                            used.insert(range.offset, range.bytes);
                        }
                        Err(PoolError::NeverFits { asked_bytes, capacity_bytes, .. }) => {
                            prop_assert_eq!((asked_bytes, capacity_bytes), (bytes, capacity));
                            prop_assert!(bytes > capacity);
                        }
                        Err(PoolError::NoRoomNow { asked_bytes, in_use_bytes, capacity_bytes, largest_free_bytes }) => {
                            prop_assert_eq!(best, None);
                            prop_assert_eq!((asked_bytes, capacity_bytes), (bytes, capacity));
                            prop_assert_eq!(in_use_bytes, used.values().sum::<u64>());
                            let largest = free_gaps.iter().map(|gap| gap.bytes).max().unwrap_or(0);
                            prop_assert_eq!(largest_free_bytes, largest);
                        }
                        Err(error) => prop_assert!(false, "{error:?}"),
                    }
                }
                Step::Free(index) => {
                    if let Some((&offset, &bytes)) = used.iter().nth(index % used.len().max(1)) {
                        prop_assert_eq!(list.free(offset), Ok(Range::new(offset, bytes)));
                        used.remove(&offset);
                    }
                }
                Step::FreeAnywhere(offset) => match used.remove(&offset) {
                    Some(bytes) => prop_assert_eq!(list.free(offset), Ok(Range::new(offset, bytes))),
                    None => prop_assert_eq!(list.free(offset), Err(PoolError::NotAllocated { at: offset })),
                },
            }
            list.check().map_err(TestCaseError::fail)?;
            let in_use: u64 = used.values().sum();
            peak = peak.max(in_use);
            prop_assert_eq!(list.in_use_bytes(), in_use);
            prop_assert_eq!(list.peak_bytes(), peak);
            prop_assert_eq!(list.allocations(), used.len());
        }
        // All grows together again.
        for offset in used.into_keys() {
            list.free(offset).unwrap();
        }
        list.check().map_err(TestCaseError::fail)?;
        prop_assert_eq!((list.in_use_bytes(), list.largest_free_bytes()), (0, capacity));
        prop_assert_eq!(list.allocate(capacity, 1), Ok(Range::new(0, capacity)));
    }
}

#[test]
fn the_shortest_gap_is_taken_and_neighbours_grow_together() {
    let mut list = FreeList::new(100);
    let ranges: Vec<Range> = [30, 5, 10, 5, 50].map(|bytes| list.allocate(bytes, 1).unwrap()).to_vec();
    list.free(ranges[0].offset).unwrap();
    list.free(ranges[2].offset).unwrap();
    assert_eq!(list.allocate(8, 1), Ok(Range::new(35, 8)));
    // Between 0..30 and 43..45, which all become one.
    list.free(35).unwrap();
    list.free(ranges[1].offset).unwrap();
    assert_eq!(list.largest_free_bytes(), 45);
}

#[test]
fn full_and_too_small_are_told_apart() {
    let mut list = FreeList::new(100);
    list.allocate(60, 1).unwrap();
    assert_eq!(
        list.allocate(50, 1).unwrap_err().to_string(),
        "50 bytes do not fit now: 60 of 100 bytes are in use and the largest free range has 40 bytes; free something \
         or make the whole larger"
    );
    assert_eq!(
        list.allocate(101, 1).unwrap_err().to_string(),
        "an allocation needs 101 bytes and can never fit: there are 100 bytes in all; make the whole larger or ask \
         for less (a smaller batch)"
    );
}

#[test]
fn senseless_requests_are_refused() {
    let mut list = FreeList::new(100);
    assert_eq!(list.allocate(0, 1), Err(PoolError::EmptyAllocation));
    for alignment in [0, 3, 96] {
        assert_eq!(list.allocate(1, alignment), Err(PoolError::InvalidAlignment { alignment }));
    }
    assert!(matches!(list.allocate(u64::MAX, 1 << 63), Err(PoolError::NeverFits { .. })));
    let mut nothing = FreeList::new(0);
    assert!(matches!(nothing.allocate(1, 1), Err(PoolError::NeverFits { .. })));
    nothing.check().unwrap();
    let mut all = FreeList::new(u64::MAX);
    assert_eq!(all.allocate(u64::MAX, 1 << 63), Ok(Range::new(0, u64::MAX)));
    all.free(0).unwrap();
    all.allocate(1, 1).unwrap();
    assert_eq!(all.allocate(1, 1 << 63), Ok(Range::new(1 << 63, 1)));
    all.check().unwrap();
}

#[test]
fn a_peak_can_begin_anew() {
    let mut list = FreeList::new(100);
    let range = list.allocate(80, 1).unwrap();
    list.allocate(10, 1).unwrap();
    list.free(range.offset).unwrap();
    assert_eq!(list.peak_bytes(), 90);
    list.reset_peak();
    assert_eq!(list.peak_bytes(), 10);
}
