//! What only CUDA has: registrations, stuck streams, graphs, direct access to host memory.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use cudarc::driver::{result, sys};
use pswitch_device::{
    CopyStream, Device, DeviceAddress, DeviceError, DeviceId, DeviceSlice, ExecutionStream, GpuRehearsal,
    GpuStream, GpuWay, HostSlice, LinkThrottle, MemoryHandle, SharedMemory, WayWords, cuda_devices, doorbell,
    open_device,
};

use crate::execution::Execution;

pub(crate) fn open() -> Arc<dyn Device> {
    open_device(DeviceId::Cuda(0), LinkThrottle::default()).unwrap()
}

pub(crate) fn soon() -> Instant {
    Instant::now() + Duration::from_secs(30)
}

pub(crate) fn allocate(device: &dyn Device, bytes: u64) -> DeviceSlice {
    DeviceSlice::new(device.allocate(bytes).unwrap(), 0, bytes).unwrap()
}

pub(crate) fn pinned(device: &dyn Device, content: &[u8]) -> HostSlice {
    let memory = SharedMemory::create("test", content.len() as u64).unwrap();
    memory.write(0, content).unwrap();
    HostSlice::new(device.pin(Arc::new(memory)).unwrap(), 0, content.len() as u64).unwrap()
}

pub(crate) fn finish(stream: &mut dyn CopyStream) {
    stream.record().unwrap().wait(soon()).unwrap();
}

/// What lies there, by a stream and memory that are there already: while a stream is stuck nothing can be pinned.
fn look_at<const BYTES: usize>(
    copies: &mut dyn CopyStream,
    at: &DeviceSlice,
    found: &HostSlice,
) -> [u8; BYTES] {
    copies.copy_out(at, found).unwrap();
    finish(copies);
    let mut content = [0; BYTES];
    found.read(0, &mut content).unwrap();
    content
}

pub(crate) fn get(device: &dyn Device, from: &DeviceSlice) -> Vec<u8> {
    let mut content = vec![0; usize::try_from(from.bytes()).unwrap()];
    let target = pinned(device, &content);
    let mut stream = device.copy_stream("get").unwrap();
    stream.copy_out(from, &target).unwrap();
    finish(&mut *stream);
    target.read(0, &mut content).unwrap();
    content
}

#[test]
fn a_gpu_describes_itself() {
    let _execution = Execution::start();
    let properties = &cuda_devices().unwrap()[0];
    println!("{properties:#?}");
    assert_eq!(properties, open().properties());
    assert!(properties.name.contains("NVIDIA") && properties.total_memory_bytes > 1 << 30);
    let gpu = properties.gpu.as_ref().unwrap();
    assert!(gpu.uuid.starts_with("GPU-") && gpu.uuid.len() == 40, "{}", gpu.uuid);
    assert!(gpu.compute_capability >= (5, 0) && gpu.multiprocessors > 0);
    assert!(gpu.cuda_version >= (12, 0));
    assert!(gpu.pci_address.matches([':', '.']).count() == 3, "{}", gpu.pci_address);
}

#[test]
fn memory_can_be_pinned_again_and_by_several_devices() {
    let _execution = Execution::start();
    let (first, second) = (open(), open());
    let content: Vec<u8> = (0..=255).cycle().take(100_000).collect();
    let memory = Arc::new(SharedMemory::create("test", 100_000).unwrap());
    memory.write(0, &content).unwrap();
    for _ in 0..2 {
        let (one, other) = (first.pin(memory.clone()).unwrap(), second.pin(memory.clone()).unwrap());
        drop(one);
        // Still pinned.
        let to = allocate(&*second, 100_000);
        let mut stream = second.copy_stream("test").unwrap();
        stream.copy_in(&HostSlice::new(other, 0, 100_000).unwrap(), &to).unwrap();
        finish(&mut *stream);
        assert!(get(&*second, &to) == content);
    }
}

#[test]
fn memory_that_was_not_pinned_is_refused() {
    let _execution = Execution::start();
    let device = open();
    let host = open_device(DeviceId::Host(0), LinkThrottle::default()).unwrap();
    let (foreign, to) = (pinned(&*host, &[1; 8]), allocate(&*device, 8));
    let mut stream = device.copy_stream("test").unwrap();
    let expected = DeviceError::NotPinned { device: DeviceId::Cuda(0) };
    assert_eq!(stream.copy_in(&foreign, &to).unwrap_err(), expected);
    assert_eq!(stream.copy_out(&to, &foreign).unwrap_err(), expected);
}

#[test]
fn handles_of_other_memory_are_refused() {
    let _execution = Execution::start();
    let device = open();
    let host = open_device(DeviceId::Host(0), LinkThrottle::default()).unwrap();
    let is_foreign = |result: Result<_, DeviceError>| {
        assert!(matches!(result, Err(DeviceError::ForeignHandle { .. })), "{result:?}");
    };
    is_foreign(device.open(host.allocate(8).unwrap().export().unwrap()));
    let memory = device.allocate(8).unwrap();
    is_foreign(host.open(memory.export().unwrap()));
    let MemoryHandle::CudaIpc { handle, gpu, .. } = memory.export().unwrap() else { panic!() };
    let mut other = gpu;
    other[3] ^= 1;
    is_foreign(device.open(MemoryHandle::CudaIpc { handle, bytes: 8, gpu: other }));
    assert_eq!(
        device.open(MemoryHandle::CudaIpc { handle, bytes: 9, gpu }).unwrap_err(),
        DeviceError::WrongAllocationSize { expected_bytes: 9, found_bytes: 8 }
    );
    // Once it is freed, this process does not find it by its handle either.
    drop(memory);
    let error = device.open(MemoryHandle::CudaIpc { handle, bytes: 8, gpu }).unwrap_err();
    assert!(matches!(&error, DeviceError::Cuda { call: "cuIpcOpenMemHandle", .. }), "{error:?}");
    println!("{error}");
}

#[test]
fn more_than_is_free_does_not_fit_now() {
    let _execution = Execution::start();
    let device = open();
    // All of it: the context alone takes some.
    let asked = device.properties().total_memory_bytes;
    match device.allocate(asked).unwrap_err() {
        DeviceError::OutOfMemory { asked_bytes, free_bytes, capacity_bytes, .. } => {
            assert_eq!((asked_bytes, capacity_bytes), (asked, asked));
            assert!(free_bytes > 0 && free_bytes < asked);
        }
        other => panic!("{other:?}"),
    }
    // It is no lasting failure.
    allocate(&*device, 1 << 20);
}

#[test]
fn words_pass_streams_that_are_stuck() {
    let execution = Execution::start();
    let context = execution.raw().context();
    // The device's own stream comes next: no two of the streams share one of the eight queues.
    let streams: Vec<_> = (0..4).map(|_| context.new_stream().unwrap()).collect();
    let device = open();
    let words = allocate(&*device, 8);
    let (bell, other) = (words.sub(0, 4).unwrap(), words.sub(4, 4).unwrap());
    for stream in &streams {
        device.wait_doorbell(ExecutionStream::Cuda(stream.cu_stream() as u64), &bell, soon()).unwrap();
    }
    for value in 0..100 {
        device.set_word(&other, value).unwrap();
        assert_eq!(device.word(&other).unwrap(), value);
    }
    assert_eq!(device.word(&bell).unwrap(), doorbell::CLEAR);
    device.set_word(&bell, doorbell::POISONED).unwrap();
    for stream in &streams {
        stream.synchronize().unwrap();
    }
}

#[test]
fn a_doorbell_can_be_waited_for_inside_a_graph() {
    let execution = Execution::start();
    let device = open();
    let (memory, bell) = (allocate(&*device, 8), allocate(&*device, 4));
    let stream = execution.raw();
    stream.begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
    device.wait_doorbell(execution.stream(), &bell, soon()).unwrap();
    // SAFETY: eight bytes of memory that lives until the graph is done.
    unsafe { result::memset_d8_async(memory.address().0, 7, 8, stream.cu_stream()) }.unwrap();
    let flags = sys::CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
    let graph = stream.end_capture(flags).unwrap().unwrap();
    // While a stream is stuck nothing is pinned: unpinning may wait for all streams.
    let (zeros, found) = (pinned(&*device, &[0; 8]), pinned(&*device, &[0xEE; 8]));
    let mut copies = device.copy_stream("test").unwrap();
    let look = |copies: &mut dyn CopyStream| look_at::<8>(copies, &memory, &found);
    for _ in 0..100 {
        device.set_word(&bell, doorbell::CLEAR).unwrap();
        copies.copy_in(&zeros, &memory).unwrap();
        finish(&mut *copies);
        graph.launch().unwrap();
        std::thread::sleep(Duration::from_millis(1));
        assert_eq!(look(&mut *copies), [0; 8], "the graph went on before the doorbell");
        copies.write_word(&bell, doorbell::RUNG).unwrap();
        execution.synchronize();
        assert_eq!(look(&mut *copies), [7; 8]);
    }
}

/// Checks streams that wait by operations and by kernels.
fn with_waits_of_both_kinds(check: fn(&dyn Device, &GpuStream)) {
    let _execution = Execution::start();
    let device = open();
    let id = device.properties().id;
    for stream in [GpuStream::open(id).unwrap(), GpuStream::open_waiting_by_kernels(id).unwrap()] {
        check(&*device, &stream);
    }
}

#[test]
fn waits_of_a_capture_come_ahead_of_what_follows_them_at_every_launch() {
    with_waits_of_both_kinds(check_waits_of_a_capture);
}

fn check_waits_of_a_capture(device: &dyn Device, stream: &GpuStream) {
    let (memory, bells) = (allocate(device, 24), allocate(device, 8));
    let bell = |index: u64| bells.sub(4 * index, 4).unwrap();
    let (ones, zeros) = (pinned(device, &[1; 24]), pinned(device, &[0; 24]));
    let copy = |part: u64| {
        let to = DeviceAddress(memory.address().0 + 8 * part);
        // SAFETY: eight bytes of memory that lives until the graph is done.
        unsafe { stream.copy_in(&ones.sub(8 * part, 8).unwrap(), to) }.unwrap();
    };
    stream.begin_capture().unwrap();
    copy(0);
    for part in [1, 2] {
        stream.wait(&[bell(part - 1)]).unwrap();
        copy(part);
    }
    let graph = stream.end_capture().unwrap();
    let found = pinned(device, &[0xEE; 24]);
    let mut copies = device.copy_stream("test").unwrap();
    let look = |copies: &mut dyn CopyStream| {
        let content = look_at::<24>(copies, &memory, &found);
        [content[0], content[8], content[16]]
    };
    // Each rings first in its turn; the second alone lets nothing on.
    for order in [[0, 1], [1, 0]].into_iter().cycle().take(20) {
        copies.clear_words(&bells).unwrap();
        copies.copy_in(&zeros, &memory).unwrap();
        finish(&mut *copies);
        // SAFETY: the memory lives, and the launch before is over.
        unsafe { graph.launch(stream) }.unwrap();
        std::thread::sleep(Duration::from_millis(1));
        assert_eq!(look(&mut *copies), [1, 0, 0]);
        copies.write_word(&bell(order[0]), doorbell::RUNG).unwrap();
        finish(&mut *copies);
        std::thread::sleep(Duration::from_millis(1));
        assert_eq!(look(&mut *copies), if order[0] == 0 { [1, 1, 0] } else { [1, 0, 0] });
        copies.write_word(&bell(order[1]), doorbell::RUNG).unwrap();
        stream.synchronize().unwrap();
        assert_eq!(look(&mut *copies), [1; 3]);
    }
}

#[test]
fn a_wait_clears_its_last_word_and_no_other() {
    with_waits_of_both_kinds(check_what_a_wait_clears);
}

fn check_what_a_wait_clears(device: &dyn Device, stream: &GpuStream) {
    let (memory, bells) = (allocate(device, 8), allocate(device, 8));
    let (first, last) = (bells.sub(0, 4).unwrap(), bells.sub(4, 4).unwrap());
    // Nothing is pinned while a kernel waits: the driver would wait for it.
    let (ones, found) = (pinned(device, &[1; 8]), pinned(device, &[0xEE; 8]));
    let mut copies = device.copy_stream("test").unwrap();
    copies.copy_in(&pinned(device, &[0; 8]), &memory).unwrap();
    copies.clear_words(&bells).unwrap();
    finish(&mut *copies);
    stream.wait_and_clear(std::slice::from_ref(&first), &last).unwrap();
    // SAFETY: the memory lives until the stream is done.
    unsafe { stream.copy_in(&ones, memory.address()) }.unwrap();
    copies.write_word(&last, doorbell::RUNG).unwrap();
    finish(&mut *copies);
    std::thread::sleep(Duration::from_millis(1));
    assert_eq!(look_at(&mut *copies, &memory, &found), [0; 8], "it went on before the first word");
    copies.write_word(&first, doorbell::RUNG).unwrap();
    stream.synchronize().unwrap();
    assert_eq!(look_at(&mut *copies, &memory, &found), [1; 8]);
    let words = [doorbell::RUNG, doorbell::CLEAR].map(u32::to_le_bytes).concat();
    assert_eq!(look_at::<8>(&mut *copies, &bells, &found), *words);
}

#[test]
fn a_gate_holds_a_stream_until_its_word_opens_it() {
    let device = open();
    let stream = GpuStream::open(device.properties().id).unwrap();
    let memory = SharedMemory::create("pswitch-test", 4096).unwrap();
    let pinned = device.pin(Arc::new(memory)).unwrap();
    let set = |value: u32| pinned.memory().word(64).unwrap().store(value, Ordering::SeqCst);
    let word = |offset| HostSlice::new(pinned.clone(), offset, 4).unwrap();
    let words = |gate, reached| WayWords { reached: word(reached), passed: word(reached + 4), gate };
    let way = GpuWay::new(&stream, words(Some(word(64)), 128)).unwrap();
    let go = |number: u32| {
        stream.expect();
        stream.pass(&way, number).unwrap();
        stream.announce().unwrap();
    };
    // Anything but the top bit lets it through.
    for (number, open) in [(1, 0), (2, 1)] {
        set(open);
        go(number);
        stream.synchronize().unwrap();
        assert_eq!((way.reached(), way.is_at_gate(), stream.is_done()), (number, false, true));
    }
    set(1 << 31);
    go(3);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!((way.reached(), way.is_at_gate(), stream.is_done()), (3, true, false));
    set(0);
    stream.synchronize().unwrap();
    assert_eq!((way.reached(), way.is_at_gate(), stream.is_done()), (3, false, true));
    // In front of one, at work on what computes nothing.
    set(1 << 31);
    stream.arrive(&way, 4).unwrap();
    stream.synchronize().unwrap();
    assert_eq!((way.reached(), way.is_at_gate()), (4, true));
    stream.expect();
    stream.depart(&way, 4).unwrap();
    stream.announce().unwrap();
    std::thread::sleep(Duration::from_millis(20));
    assert!(!stream.is_done() && way.is_at_gate());
    set(0);
    stream.synchronize().unwrap();
    assert!(stream.is_done() && !way.is_at_gate());
    // Without a gate nothing holds it up.
    set(1 << 31);
    let free = GpuWay::new(&stream, words(None, 192)).unwrap();
    stream.pass(&free, 7).unwrap();
    stream.synchronize().unwrap();
    assert_eq!((free.reached(), free.is_at_gate()), (7, false));
    let unaligned = HostSlice::new(pinned.clone(), 66, 4).unwrap();
    let refused = GpuWay::new(&stream, words(Some(unaligned.clone()), 128));
    assert!(matches!(refused, Err(DeviceError::NotAWord { .. })));
    assert!(matches!(stream.hold_back(&unaligned), Err(DeviceError::NotAWord { .. })));
    let host = open_device(DeviceId::Host(0), LinkThrottle::default()).unwrap();
    let foreign = host.pin(Arc::clone(pinned.memory())).unwrap();
    let foreign = HostSlice::new(foreign, 64, 4).unwrap();
    let refused = GpuWay::new(&stream, words(Some(foreign.clone()), 128));
    assert!(matches!(refused, Err(DeviceError::NotPinned { .. })));
    assert!(matches!(stream.hold_back(&foreign), Err(DeviceError::NotPinned { .. })));
}

#[test]
fn what_is_held_back_goes_on_when_its_word_says_so() {
    let device = open();
    let stream = GpuStream::open(device.properties().id).unwrap();
    let memory = SharedMemory::create("pswitch-test", 4096).unwrap();
    let word = HostSlice::new(device.pin(Arc::new(memory)).unwrap(), 8, 4).unwrap();
    let set = |value: u32| word.memory().memory().word(8).unwrap().store(value, Ordering::SeqCst);
    for wait in [0, 20] {
        set(0);
        stream.expect();
        stream.hold_back(&word).unwrap();
        stream.announce().unwrap();
        std::thread::sleep(Duration::from_millis(wait));
        assert!(!stream.is_done());
        set(1);
        stream.synchronize().unwrap();
        assert!(stream.is_done());
        // Let go already.
        stream.hold_back(&word).unwrap();
        stream.synchronize().unwrap();
    }
}

#[test]
fn a_rehearsal_announces_nothing_and_may_come_at_any_time() {
    let device = open();
    let stream = GpuStream::open(device.properties().id).unwrap();
    let rehearsal = GpuRehearsal::new(&stream).unwrap();
    let memory = SharedMemory::create("pswitch-test", 4096).unwrap();
    let word = HostSlice::new(device.pin(Arc::new(memory)).unwrap(), 8, 4).unwrap();
    stream.expect();
    rehearsal.run(&stream).unwrap();
    stream.synchronize().unwrap();
    assert!(!stream.is_done());
    // Behind something that is held back, twice, and ahead of an execution.
    stream.hold_back(&word).unwrap();
    rehearsal.run(&stream).unwrap();
    rehearsal.run(&stream).unwrap();
    assert!(!stream.is_idle().unwrap());
    word.memory().memory().word(8).unwrap().store(1, Ordering::SeqCst);
    stream.announce().unwrap();
    stream.synchronize().unwrap();
    assert!(stream.is_done());
}

#[test]
fn the_gpu_reads_pinned_memory_by_its_address() {
    let execution = Execution::start();
    let device = open();
    let content: Vec<u8> = (0..=255).collect();
    let (table, row) = (pinned(&*device, &content), allocate(&*device, 16));
    let source = table.sub(32, 16).unwrap().address().0;
    // SAFETY: both ranges have 16 bytes and live until the stream is done.
    unsafe { result::memcpy_dtod_async(row.address().0, source, 16, execution.raw().cu_stream()) }.unwrap();
    execution.synchronize();
    assert_eq!(get(&*device, &row), content[32..48]);
}

#[test]
fn managed_memory_keeps_its_content_on_its_way_to_the_host_and_back() {
    let _execution = Execution::start();
    let device = open();
    let content: Vec<u8> = (0..=255).cycle().take(3 << 20).collect();
    let managed = device.allocate_managed(content.len() as u64).unwrap();
    assert!(managed.export().is_err());
    let managed = DeviceSlice::new(managed, 0, content.len() as u64).unwrap();
    assert!(get(&*device, &managed).iter().all(|&byte| byte == 0));
    let mut stream = device.copy_stream("test").unwrap();
    stream.copy_in(&pinned(&*device, &content), &managed).unwrap();
    finish(&mut *stream);
    for _ in 0..3 {
        device.send_back(&managed).unwrap();
        assert_eq!(get(&*device, &managed), content);
    }
    assert!(device.send_back(&allocate(&*device, 4096)).is_err());
}

#[test]
fn calls_leave_a_threads_current_context_alone() {
    let _execution = Execution::start();
    let device = open();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let memory = allocate(&*device, 16);
            let mut stream = device.copy_stream("test").unwrap();
            stream.copy_in(&pinned(&*device, &[3; 16]), &memory).unwrap();
            finish(&mut *stream);
            assert_eq!(device.word(&memory.sub(0, 4).unwrap()).unwrap(), 0x0303_0303);
            drop((stream, memory));
            assert_eq!(result::ctx::get_current().unwrap(), None);
        });
    });
}

#[test]
fn a_stream_without_events_lets_go_of_memory() {
    let _execution = Execution::start();
    let device = open();
    let mut stream = device.copy_stream("test").unwrap();
    let to = allocate(&*device, 4096);
    let memory = Arc::new(SharedMemory::create("test", 4096).unwrap());
    for _ in 0..2_000 {
        stream.copy_in(&pinned(&*device, &[1; 4096]), &to).unwrap();
        let from = HostSlice::new(device.pin(memory.clone()).unwrap(), 0, 4096).unwrap();
        stream.copy_in(&from, &to).unwrap();
    }
    finish(&mut *stream);
    // Only this test's own: the stream has let go of its clones.
    assert_eq!(Arc::strong_count(&memory), 1);
}
