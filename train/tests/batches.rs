//! Which rows each batch has, over any sizes.

use std::collections::BTreeSet;

use proptest::prelude::*;
use pswitch_train::{Batches, TrainError};

#[test]
fn without_shuffling_rows_come_in_their_order() {
    let mut batches = Batches::new(10, 4, None, false).unwrap();
    let rows: Vec<_> = (0..4).map(|index| batches.batch(index).rows).collect();
    assert_eq!(rows, [vec![0, 1, 2, 3], vec![4, 5, 6, 7], vec![8, 9], vec![0, 1, 2, 3]]);

    let mut batches = Batches::new(10, 4, None, true).unwrap();
    assert_eq!(batches.per_epoch(), 2);
    let third = batches.batch(2);
    assert_eq!((third.epoch, third.position, third.rows), (1, 0, vec![0, 1, 2, 3]));
}

#[test]
fn orders_of_a_seed_are_fixed_forever() {
    // A task that goes on under a newer version must see the rows that it has not seen yet. Both orders were computed by
    // a second implementation, in Python.
    let mut batches = Batches::new(8, 8, Some(42), false).unwrap();
    assert_eq!(batches.batch(0).rows, [0, 1, 4, 3, 6, 2, 5, 7]);
    assert_eq!(batches.batch(1).rows, [4, 3, 2, 5, 7, 1, 6, 0]);
}

#[test]
fn every_order_is_as_likely_as_any_other() {
    let mut batches = Batches::new(4, 4, Some(1), false).unwrap();
    let mut counts = std::collections::BTreeMap::new();
    for epoch in 0..24_000 {
        *counts.entry(batches.batch(epoch).rows).or_insert(0u32) += 1;
    }
    assert_eq!(counts.len(), 24);
    // Five standard deviations are 155.
    assert!(counts.values().all(|count| count.abs_diff(1000) < 160), "{counts:?}");
}

#[test]
fn what_makes_no_batches_is_refused() {
    assert!(matches!(Batches::new(0, 4, None, false), Err(TrainError::NoBatches { rows: 0, batch_size: 4 })));
    assert!(matches!(Batches::new(4, 0, None, false), Err(TrainError::NoBatches { .. })));
    assert!(matches!(
        Batches::new(3, 4, Some(1), true),
        Err(TrainError::NoFullBatch { rows: 3, batch_size: 4 })
    ));
    assert_eq!(Batches::new(3, 4, None, false).unwrap().batch(0).rows, [0, 1, 2]);
    let many = Batches::MOST_SHUFFLED_ROWS + 1;
    assert!(matches!(Batches::new(many, 4, Some(1), false), Err(TrainError::TooManyRowsToShuffle { .. })));
}

#[test]
fn the_largest_numbers_do_not_overflow() {
    let mut batches = Batches::new(u64::MAX, u64::MAX - 1, None, true).unwrap();
    assert_eq!(batches.per_epoch(), 1);
    let mut one_by_one = Batches::new(u64::MAX, 1, None, false).unwrap();
    assert_eq!(one_by_one.batch(u64::MAX - 1).rows, [u64::MAX - 1]);
    assert_eq!(one_by_one.batch(u64::MAX).epoch, 1);
    batches = Batches::new(1, u64::MAX, Some(0), false).unwrap();
    assert_eq!((batches.batch(u64::MAX).epoch, batches.batch(u64::MAX).rows), (u64::MAX, vec![0]));
}

proptest! {
    #[test]
    fn each_row_comes_once_an_epoch(
        rows in 1u64..200,
        batch_size in 1u64..64,
        seed in any::<Option<u64>>(),
        epoch in 0u64..50,
    ) {
        let mut batches = Batches::new(rows, batch_size, seed, false).unwrap();
        let first = epoch * batches.per_epoch();
        let mut seen = Vec::new();
        for position in 0..batches.per_epoch() {
            let batch = batches.batch(first + position);
            prop_assert_eq!((batch.epoch, batch.position), (epoch, position));
            let is_last = position + 1 == batches.per_epoch();
            prop_assert!(batch.rows.len() as u64 == batch_size || is_last);
            seen.extend(batch.rows);
        }
        seen.sort_unstable();
        prop_assert_eq!(seen, (0..rows).collect::<Vec<_>>());
    }

    #[test]
    fn dropping_leaves_full_batches_of_different_rows(
        batch_size in 1u64..64,
        more in 0u64..136,
        seed in any::<Option<u64>>(),
    ) {
        let rows = batch_size + more;
        let mut batches = Batches::new(rows, batch_size, seed, true).unwrap();
        prop_assert_eq!(batches.per_epoch(), rows / batch_size);
        let mut seen = BTreeSet::new();
        for index in 0..batches.per_epoch() {
            let batch = batches.batch(index).rows;
            prop_assert_eq!(batch.len() as u64, batch_size);
            seen.extend(batch);
        }
        prop_assert_eq!(seen.len() as u64, batches.per_epoch() * batch_size);
        prop_assert!(seen.iter().all(|row| *row < rows));
    }

    #[test]
    fn a_batch_is_the_same_from_wherever_it_is_asked_for(
        rows in 1u64..100,
        batch_size in 1u64..20,
        seed in any::<Option<u64>>(),
        start in 0u64..300,
    ) {
        let mut walking = Batches::new(rows, batch_size, seed, false).unwrap();
        let walked: Vec<_> = (0..start + 3).map(|index| walking.batch(index)).collect();
        let mut jumping = Batches::new(rows, batch_size, seed, false).unwrap();
        for index in [start, start + 2, 0, start + 1] {
            prop_assert_eq!(&jumping.batch(index), &walked[usize::try_from(index).unwrap()]);
        }
    }

    #[test]
    fn epochs_and_seeds_have_orders_of_their_own(seed in any::<u64>(), epoch in 0u64..1000) {
        // Two orders of 40 rows are the same once in 10^47 times.
        let order = |seed, epoch| Batches::new(40, 40, Some(seed), false).unwrap().batch(epoch).rows;
        prop_assert_ne!(order(seed, epoch), order(seed, epoch + 1));
        prop_assert_ne!(order(seed, epoch), order(seed ^ 1, epoch));
    }
}
