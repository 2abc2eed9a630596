//! The pool and the host store over a real host device: spans travel from one to the other and back.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use pswitch_device::{Device, DeviceId, HostSlice, LinkThrottle, SharedMemory, doorbell, open_device};
use pswitch_mem_pool::{ArenaId, HostStore, Ledger, ModelId, Pool, PoolError, PoolLayout, Range};

fn host() -> Arc<dyn Device> {
    open_device(DeviceId::Host(0), LinkThrottle::default()).unwrap()
}

#[test]
fn a_span_arrives_in_its_home_and_rings() {
    let device = host();
    let layout = PoolLayout::new(1 << 20, 2, 64 * 1024).unwrap();
    let pool = Pool::new(device.allocate(1 << 20).unwrap(), layout).unwrap();
    let mut ledger = Ledger::new(pool.layout());
    let store = HostStore::new(Arc::clone(&device));
    let model = ModelId(5);

    let span = store.insert(model, 10_000).unwrap();
    span.write(0, &[1; 5_000]).unwrap();
    span.write(5_000, &[2; 5_000]).unwrap();
    span.seal();
    let home = ledger.place(model, 10_000, 2).unwrap();

    ledger.begin_move(model).unwrap();
    let mut stream = device.copy_stream("test").unwrap();
    for group in 0..2 {
        let part = Range::new(group * 5_000, 5_000);
        let to = pool.slice(home.span).unwrap().sub(part.offset, part.bytes).unwrap();
        stream.copy_in(&store.slice(model, part).unwrap(), &to).unwrap();
        let word = pool.doorbell(&home, u32::try_from(group).unwrap()).unwrap();
        stream.write_word(&word, doorbell::RUNG).unwrap();
    }
    let event = stream.record().unwrap();
    event.wait(Instant::now() + Duration::from_secs(30)).unwrap();
    ledger.finish_move(model).unwrap();

    for group in 0..2 {
        assert_eq!(device.word(&pool.doorbell(&home, group).unwrap()), Ok(doorbell::RUNG));
    }
    let back = device.pin(Arc::new(SharedMemory::create("test", 10_000).unwrap())).unwrap();
    stream
        .copy_out(&pool.slice(home.span).unwrap(), &HostSlice::new(back.clone(), 0, 10_000).unwrap())
        .unwrap();
    drop(stream);
    let mut bytes = vec![0; 10_000];
    back.memory().read(0, &mut bytes).unwrap();
    assert!(bytes[..5_000].iter().all(|&byte| byte == 1) && bytes[5_000..].iter().all(|&byte| byte == 2));
}

#[test]
fn a_pool_hands_out_only_its_own_bytes() {
    let device = host();
    let layout = PoolLayout::new(1 << 20, 2, 64 * 1024).unwrap();
    let error = Pool::new(device.allocate(1 << 19).unwrap(), layout.clone()).unwrap_err();
    assert!(
        matches!(error, PoolError::OutOfRange { bytes: 0x10_0000, capacity_bytes: 0x8_0000, .. }),
        "{error}"
    );
    let pool = Pool::new(device.allocate(1 << 20).unwrap(), layout).unwrap();
    let home = Ledger::new(pool.layout()).place(ModelId(0), 100, 3).unwrap();
    for group in [3, u32::MAX] {
        assert!(matches!(pool.doorbell(&home, group), Err(PoolError::OutOfRange { .. })));
    }
    assert!(matches!(pool.slice(Range::new(1 << 20, 1)), Err(PoolError::OutOfRange { .. })));
    assert_eq!(pool.arena(ArenaId(1)).unwrap().bytes(), 64 * 1024);
    assert_eq!(pool.arena(ArenaId(2)).unwrap_err(), PoolError::UnknownArena { arena: ArenaId(2), arenas: 2 });
}

#[test]
fn a_store_gives_out_only_what_is_sealed() {
    let store = HostStore::new(host());
    let (model, unknown) = (ModelId(0), PoolError::UnknownModel { model: ModelId(0) });
    let span = store.insert(model, 1_000).unwrap();
    assert_eq!(store.insert(model, 1).unwrap_err(), PoolError::ModelExists { model });
    assert_eq!(store.slice(model, Range::new(0, 1)).unwrap_err(), unknown);
    assert_eq!(store.remove(model).unwrap_err(), unknown);
    for (offset, bytes) in [(1_000, 1), (0, 1_001), (u64::MAX, 2)] {
        assert!(matches!(span.write(offset, &vec![0; bytes]), Err(PoolError::OutOfRange { .. })));
    }
    // Given up: the name is free again.
    drop(span);
    let span = store.insert(model, 1_000).unwrap();
    span.write(999, &[7]).unwrap();
    span.seal();
    assert_eq!((store.span_bytes(model), store.total_bytes()), (Ok(1_000), 1_000));
    let mut last = [0];
    let slice = store.slice(model, Range::new(990, 10)).unwrap();
    slice.read(9, &mut last).unwrap();
    assert_eq!(last, [7]);
    for range in [Range::new(0, 1_001), Range::new(1_001, 0), Range::new(u64::MAX, 2)] {
        assert!(matches!(store.slice(model, range), Err(PoolError::OutOfRange { .. })));
    }
    store.remove(model).unwrap();
    assert_eq!(store.memory(model).unwrap_err(), unknown);
    // The slice has kept its memory.
    slice.read(9, &mut last).unwrap();
    assert_eq!(last, [7]);
}

#[test]
fn a_model_without_weights_has_a_span_too() {
    let store = HostStore::new(host());
    store.insert(ModelId(0), 0).unwrap().seal();
    assert_eq!(store.slice(ModelId(0), Range::new(0, 0)).unwrap().bytes(), 0);
}

#[test]
fn spans_are_filled_by_several_threads() {
    let store = HostStore::new(host());
    thread::scope(|scope| {
        for model in 0..8 {
            let store = &store;
            scope.spawn(move || {
                let span = store.insert(ModelId(model), 4_096).unwrap();
                span.write(0, &[u8::try_from(model).unwrap(); 4_096]).unwrap();
                span.seal();
            });
        }
    });
    assert_eq!(store.total_bytes(), 8 * 4_096);
    for model in 0..8_u8 {
        let mut bytes = [0; 4_096];
        store.slice(ModelId(model.into()), Range::new(0, 4_096)).unwrap().read(0, &mut bytes).unwrap();
        assert_eq!(bytes, [model; 4_096]);
    }
}

#[test]
fn what_the_host_cannot_hold_leaves_nothing_behind() {
    let store = HostStore::new(host());
    assert!(matches!(store.insert(ModelId(0), u64::MAX), Err(PoolError::Device(_))));
    store.insert(ModelId(0), 1).unwrap().seal();
}
