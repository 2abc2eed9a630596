//! What allocating and freeing costs, with few and with many allocations alive.

use std::hint::black_box;

use criterion::{BatchSize, BenchmarkId, Criterion, criterion_group, criterion_main};
use pswitch_device::DeviceAddress;
use pswitch_mem_pool::{Arena, FreeList, TENSOR_ALIGNMENT_BYTES};

const BYTES: u64 = 1 << 30;

/// Sizes as activations have them: between a row and some megabytes.
fn size(index: u64) -> u64 {
    512 * (1 + (index * 7_919) % 8_192)
}

/// A list with `alive` allocations and as many gaps between them.
fn fragmented(alive: u64) -> FreeList {
    let mut list = FreeList::new(BYTES);
    let mut offsets = vec![];
    for index in 0..2 * alive {
        let bytes = size(index).min(BYTES / (2 * alive));
        offsets.push(list.allocate(bytes, TENSOR_ALIGNMENT_BYTES).expect("all fit").offset);
    }
    for offset in offsets.into_iter().step_by(2) {
        list.free(offset).expect("allocated above");
    }
    list
}

fn free_list(c: &mut Criterion) {
    let mut group = c.benchmark_group("free_list/allocate_and_free");
    for alive in [10, 100, 1_000, 10_000] {
        let mut list = fragmented(alive);
        let mut index = 0;
        group.bench_function(BenchmarkId::from_parameter(alive), |b| {
            b.iter(|| {
                index += 1;
                let bytes = black_box(size(index) / 64);
                let range = list.allocate(bytes.max(1), TENSOR_ALIGNMENT_BYTES).expect("it fits");
                list.free(range.offset).expect("allocated above")
            });
        });
    }
    group.finish();
}

fn arena(c: &mut Criterion) {
    let arena = Arena::new(DeviceAddress(1 << 40), BYTES);
    c.bench_function("arena/allocate_and_free", |b| {
        b.iter(|| {
            let address = arena.allocate(black_box(1 << 20)).expect("it fits");
            arena.free(address).expect("allocated above");
        });
    });
    // A forward pass: each operator allocates its output and then its input dies.
    c.bench_function("arena/500_operators", |b| {
        b.iter_batched(
            || Arena::new(DeviceAddress(1 << 40), BYTES),
            |arena| {
                let mut input = arena.allocate(size(0)).expect("it fits");
                for index in 1..500 {
                    let output = arena.allocate(size(index)).expect("it fits");
                    arena.free(input).expect("allocated above");
                    input = output;
                }
                arena
            },
            BatchSize::SmallInput,
        );
    });
}

criterion_group!(benches, free_list, arena);
criterion_main!(benches);
