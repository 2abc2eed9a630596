//! Three models share a pool in which two have room. Prints who evicts whom and the ledger's account.
//!
//! Run with `cargo run -p pswitch-mem-pool --example taking_turns`.

use std::sync::Arc;
use std::time::{Duration, Instant};

use pswitch_device::{DeviceId, LinkThrottle, doorbell, open_device};
use pswitch_mem_pool::{HostStore, Ledger, ModelId, Pool, PoolError, PoolLayout, Range, Residency};

const MIB: u64 = 1 << 20;

fn main() -> Result<(), PoolError> {
    let device = open_device(DeviceId::Host(0), LinkThrottle::default())?;
    let pool_bytes = 24 * MIB;
    let pool = Pool::new(device.allocate(pool_bytes)?, PoolLayout::new(pool_bytes, 2, 3 * MIB)?)?;
    let mut ledger = Ledger::new(pool.layout());
    let store = HostStore::new(Arc::clone(&device));
    let mut stream = device.copy_stream("example")?;

    let models = [(ModelId(0), 9 * MIB), (ModelId(1), 7 * MIB), (ModelId(2), 6 * MIB)];
    for (model, span_bytes) in models {
        let span = store.insert(model, span_bytes)?;
        span.write(0, format!("the weights of {model}").as_bytes())?;
        span.seal();
        ledger.place(model, span_bytes, 1)?;
    }

    for model in [0, 1, 0, 2, 1, 2].map(ModelId) {
        if ledger.state(model)? == Residency::Resident {
            println!("{model} is resident");
        } else {
            let home = ledger.home(model)?;
            for evicted in ledger.begin_move(model)? {
                println!("{model} evicts {evicted}");
                stream.write_word(&pool.doorbell(&ledger.home(evicted)?, 0)?, doorbell::CLEAR)?;
            }
            let began = Instant::now();
            stream.copy_in(&store.slice(model, Range::new(0, home.span.bytes))?, &pool.slice(home.span)?)?;
            stream.write_word(&pool.doorbell(&home, 0)?, doorbell::RUNG)?;
            stream.record()?.wait(began + Duration::from_secs(10))?;
            println!("{model} moved in within {:?}", began.elapsed());
            ledger.finish_move(model)?;
        }
        if let Some(arena) = ledger.free_arena() {
            let lease = ledger.lease(model, arena)?;
            println!("{model} executes in {arena} at {}", pool.arena(arena)?.address());
            ledger.release(lease)?;
        }
    }
    println!("\n{}", ledger.report());
    Ok(())
}
