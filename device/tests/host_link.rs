//! The host backend's link: throttled copies take their time, and their bytes arrive during all of it.
//!
//! Only lower bounds and orders are asserted, which hold on a busy machine too.

use std::sync::Arc;
use std::time::{Duration, Instant};

use pswitch_device::{
    CopyStream, Device, DeviceError, DeviceId, DeviceSlice, ExecutionStream, HostSlice, LinkThrottle,
    SharedMemory, open_device,
};

const MIB: u64 = 1 << 20;

fn throttled(bandwidth_bytes_per_s: f64, per_copy: Duration) -> Arc<dyn Device> {
    let throttle = LinkThrottle { bandwidth_bytes_per_s: Some(bandwidth_bytes_per_s), per_copy };
    open_device(DeviceId::Host(0), throttle).unwrap()
}

fn device_slice(device: &dyn Device, bytes: u64) -> DeviceSlice {
    DeviceSlice::new(device.allocate(bytes).unwrap(), 0, bytes).unwrap()
}

fn host_slice(device: &dyn Device, bytes: u64, fill: u8) -> HostSlice {
    let memory = SharedMemory::create("test", bytes).unwrap();
    memory.write(0, &vec![fill; usize::try_from(bytes).unwrap()]).unwrap();
    HostSlice::new(device.pin(Arc::new(memory)).unwrap(), 0, bytes).unwrap()
}

/// When all that was enqueued is done.
fn finish(stream: &mut dyn CopyStream) -> Instant {
    let event = stream.record().unwrap();
    event.wait(Instant::now() + Duration::from_secs(30)).unwrap();
    event.completed_at().unwrap()
}

#[test]
fn copies_take_their_time() {
    // 4 MiB at 100 MiB/s: 40 ms, in four copies that cost 5 ms each.
    let device = throttled(100.0 * MIB as f64, Duration::from_millis(5));
    let (from, to) = (host_slice(&*device, 4 * MIB, 1), device_slice(&*device, 4 * MIB));
    let mut stream = device.copy_stream("test").unwrap();
    let began = Instant::now();
    for piece in 0..4 {
        stream.copy_in(&from.sub(piece * MIB, MIB).unwrap(), &to.sub(piece * MIB, MIB).unwrap()).unwrap();
    }
    let took = finish(&mut *stream) - began;
    assert!(took >= Duration::from_millis(60), "{took:?}");
}

#[test]
fn bytes_arrive_all_the_time() {
    // 200 ms, in which half of the bytes are there while the other half is not.
    let device = throttled(20.0 * MIB as f64, Duration::ZERO);
    let (from, to) = (host_slice(&*device, 4 * MIB, 1), device_slice(&*device, 4 * MIB));
    // Another mapping of the same memory, to look on.
    let pswitch_device::MemoryHandle::Memfd { fd, bytes } = to.memory().export().unwrap() else {
        panic!("the host's memory is a memfd")
    };
    let view = SharedMemory::from_fd(fd, bytes).unwrap();
    let has_arrived = |offset| {
        let mut byte = [0];
        view.read(offset, &mut byte).unwrap();
        byte == [1]
    };
    let mut stream = device.copy_stream("test").unwrap();
    stream.copy_in(&from, &to).unwrap();
    let event = stream.record().unwrap();
    let mut partly = 0;
    while !event.is_complete().unwrap() {
        // In this order: what has arrived stays, so both hold when the second is looked at.
        if has_arrived(MIB) && !has_arrived(4 * MIB - 1) {
            partly += 1;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(partly > 0, "all bytes arrived at once");
    assert!(has_arrived(4 * MIB - 1));
}

#[test]
fn streams_share_a_direction_and_take_turns() {
    // Two streams with four copies of 10 ms each: 80 ms in all.
    let device = throttled(100.0 * MIB as f64, Duration::ZERO);
    let (from, to) = (host_slice(&*device, MIB, 1), device_slice(&*device, MIB));
    let mut streams = [device.copy_stream("first").unwrap(), device.copy_stream("second").unwrap()];
    let began = Instant::now();
    let mut events = [vec![], vec![]];
    for _ in 0..4 {
        for (stream, events) in streams.iter_mut().zip(&mut events) {
            stream.copy_in(&from, &to).unwrap();
            events.push(stream.record().unwrap());
        }
    }
    let ends: Vec<Instant> = streams.iter_mut().map(|stream| finish(&mut **stream)).collect();
    let took = *ends.iter().max().unwrap() - began;
    assert!(took >= Duration::from_millis(80), "{took:?}");
    // Neither stream was done before the other had begun.
    let [first, second] = &events;
    assert!(first[0].completed_at() < second[3].completed_at());
    assert!(second[0].completed_at() < first[3].completed_at());
}

#[test]
fn directions_do_not_wait_for_each_other() {
    let device = throttled(20.0 * MIB as f64, Duration::ZERO);
    let (host, pool) = (host_slice(&*device, 8 * MIB, 1), device_slice(&*device, 8 * MIB));
    let (mut into, mut out) = (device.copy_stream("in").unwrap(), device.copy_stream("out").unwrap());
    // 400 ms one way, 50 ms the other way.
    into.copy_in(&host, &pool).unwrap();
    let slow = into.record().unwrap();
    out.copy_out(&pool.sub(0, MIB).unwrap(), &host.sub(0, MIB).unwrap()).unwrap();
    let fast_ended = finish(&mut *out);
    slow.wait(Instant::now() + Duration::from_secs(30)).unwrap();
    assert!(fast_ended < slow.completed_at().unwrap());
}

#[test]
fn streams_of_other_devices_are_refused() {
    let device = open_device(DeviceId::Host(2), LinkThrottle::default()).unwrap();
    let word = device_slice(&*device, 4);
    let error = device.wait_doorbell(ExecutionStream::Cuda(0), &word, Instant::now()).unwrap_err();
    assert_eq!(error, DeviceError::WrongExecutionStream { device: DeviceId::Host(2) });
}

#[test]
fn the_host_describes_itself() {
    let device = open_device(DeviceId::Host(3), LinkThrottle::default()).unwrap();
    let properties = device.properties();
    assert_eq!(properties.id, DeviceId::Host(3));
    assert!(!properties.name.is_empty());
    assert!(properties.total_memory_bytes > 64 * MIB);
}
