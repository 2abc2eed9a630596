//! Arenas hand out addresses, to several threads, and say why when they cannot.

use std::collections::BTreeSet;
use std::sync::Mutex;
use std::thread;

use proptest::prelude::*;
use pswitch_device::DeviceAddress;
use pswitch_mem_pool::{Arena, PoolError, TENSOR_ALIGNMENT_BYTES};

const BASE: u64 = 0x7f00_0000_0000;

#[test]
fn sizes_and_addresses_are_whole_tensors() {
    let arena = Arena::new(DeviceAddress(BASE), 4096);
    let first = arena.allocate(1).unwrap();
    let second = arena.allocate(513).unwrap();
    assert_eq!((first, second), (DeviceAddress(BASE), DeviceAddress(BASE + 512)));
    let stats = arena.stats();
    assert_eq!((stats.capacity_bytes, stats.in_use_bytes, stats.allocations), (4096, 1536, 2));
    arena.free(first).unwrap();
    arena.free(second).unwrap();
    let stats = arena.stats();
    assert_eq!((stats.in_use_bytes, stats.peak_bytes, stats.largest_free_bytes), (0, 1536, 4096));
    arena.reset_peak();
    assert_eq!(arena.stats().peak_bytes, 0);
}

#[test]
fn empty_allocations_have_addresses_of_their_own() {
    let arena = Arena::new(DeviceAddress(BASE), 4096);
    assert_ne!(arena.allocate(0).unwrap(), arena.allocate(0).unwrap());
}

#[test]
fn a_base_between_tensors_is_rounded_inwards() {
    let arena = Arena::new(DeviceAddress(BASE + 1), 2048);
    assert_eq!(arena.stats().capacity_bytes, 1536);
    assert_eq!(arena.allocate(1536).unwrap(), DeviceAddress(BASE + 512));
    assert_eq!(Arena::new(DeviceAddress(BASE + 1), 100).stats().capacity_bytes, 0);
    assert_eq!(Arena::new(DeviceAddress(u64::MAX - 10), u64::MAX).stats().capacity_bytes, 0);
}

#[test]
fn what_does_not_fit_is_counted_and_explained() {
    let arena = Arena::new(DeviceAddress(BASE), 4096);
    let held = arena.allocate(2048).unwrap();
    assert_eq!(
        arena.allocate(3000),
        Err(PoolError::NoRoomNow {
            asked_bytes: 3072,
            in_use_bytes: 2048,
            capacity_bytes: 4096,
            largest_free_bytes: 2048
        })
    );
    assert!(matches!(arena.allocate(4097), Err(PoolError::NeverFits { capacity_bytes: 4096, .. })));
    assert!(matches!(arena.allocate(u64::MAX), Err(PoolError::NeverFits { .. })));
    assert_eq!(arena.stats().refused, 3);
    arena.free(held).unwrap();
    assert_eq!(arena.allocate(3000).unwrap(), DeviceAddress(BASE));
}

#[test]
fn what_was_not_allocated_cannot_be_freed() {
    let arena = Arena::new(DeviceAddress(BASE), 4096);
    let held = arena.allocate(512).unwrap();
    for at in [0, BASE - 512, BASE + 1, BASE + 512, u64::MAX] {
        assert_eq!(arena.free(DeviceAddress(at)), Err(PoolError::NotAllocated { at }));
    }
    arena.free(held).unwrap();
    assert_eq!(arena.free(held), Err(PoolError::NotAllocated { at: BASE }));
}

#[test]
fn threads_never_hold_the_same_bytes() {
    let arena = Arena::new(DeviceAddress(BASE), 64 * TENSOR_ALIGNMENT_BYTES);
    let held = Mutex::new(BTreeSet::new());
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..2_000 {
                    let Ok(address) = arena.allocate(512) else { continue };
                    assert!(held.lock().unwrap().insert(address), "{address} was given out twice");
                    assert!(held.lock().unwrap().remove(&address));
                    arena.free(address).unwrap();
                }
            });
        }
    });
    assert_eq!(arena.stats().in_use_bytes, 0);
}

proptest! {
    #[test]
    fn addresses_lie_inside_and_apart(
        skew in 0_u64..2_000,
        bytes in 0_u64..20_000,
        sizes in prop::collection::vec(0_u64..3_000, 0..40),
    ) {
        let arena = Arena::new(DeviceAddress(BASE + skew), bytes);
        let mut end_of_last: Vec<(u64, u64)> = vec![];
        for size in sizes {
            let Ok(DeviceAddress(at)) = arena.allocate(size) else { continue };
            prop_assert_eq!(at % TENSOR_ALIGNMENT_BYTES, 0);
            prop_assert!(at >= BASE + skew && at + size <= BASE + skew + bytes);
            prop_assert!(end_of_last.iter().all(|&(begin, end)| at >= end || at + size.max(1) <= begin));
            end_of_last.push((at, at + size.max(1)));
        }
    }
}
