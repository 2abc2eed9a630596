//! Streams bytes into a pool over a throttled link, group by group, while another thread follows the doorbells.
//!
//! Run with `cargo run -p pswitch-device --example doorbells`.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use pswitch_device::{
    DeviceError, DeviceId, DeviceSlice, ExecutionStream, HostSlice, LinkThrottle, SharedMemory, doorbell,
    open_device,
};

const GROUPS: u64 = 5;
const GROUP_BYTES: u64 = 1 << 20;

fn main() -> Result<(), DeviceError> {
    let throttle = LinkThrottle { bandwidth_bytes_per_s: Some(100e6), per_copy: Duration::from_micros(10) };
    let device = open_device(DeviceId::Host(0), throttle)?;
    println!("{}: {}", device.properties().id, device.properties().name);

    let weights = device.pin(Arc::new(SharedMemory::create("weights", GROUPS * GROUP_BYTES)?))?;
    let pool = device.allocate(GROUPS * (GROUP_BYTES + 4))?;
    let group = |k| DeviceSlice::new(pool.clone(), k * GROUP_BYTES, GROUP_BYTES);
    let word = |k| DeviceSlice::new(pool.clone(), GROUPS * GROUP_BYTES + k * 4, 4);

    let began = Instant::now();
    let mut stream = device.copy_stream("example")?;
    for k in 0..GROUPS {
        stream.copy_in(&HostSlice::new(weights.clone(), k * GROUP_BYTES, GROUP_BYTES)?, &group(k)?)?;
        stream.write_word(&word(k)?, doorbell::RUNG)?;
    }
    println!("enqueued after {:?}", began.elapsed());

    thread::scope(|scope| {
        let execution = scope.spawn(|| {
            for k in 0..GROUPS {
                device.wait_doorbell(ExecutionStream::Host, &word(k)?, began + Duration::from_secs(10))?;
                println!("group {k} has landed after {:?}", began.elapsed());
            }
            Ok(())
        });
        execution.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}
