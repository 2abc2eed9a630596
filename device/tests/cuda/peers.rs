//! Other processes with the pool open, and their end.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};

use pswitch_device::conformance::this_binary_as_peer;
use pswitch_device::{Device, DeviceError, DeviceSlice, MemoryHandle, doorbell};

use crate::device::{allocate, finish, get, open, pinned, soon};
use crate::execution::Execution;

/// Names the variable with a handle's description: CUDA's handles come without descriptors.
const HANDLE: &str = "PSWITCH_CUDA_TEST_HANDLE";
const BYTES: u64 = 5 << 20;

fn peer(test: &str, memory: &DeviceSlice) -> Command {
    let (description, descriptors) = memory.memory().export().unwrap().into_parts();
    assert!(descriptors.is_empty());
    let text: String = description.iter().map(|byte| format!("{byte:02x}")).collect();
    let mut command = this_binary_as_peer(module_path!(), test);
    command.env(HANDLE, text);
    command
}

/// In the other process: the handle that it was started with.
fn handle() -> MemoryHandle {
    let text = std::env::var(HANDLE).expect("this is started by another test, not by hand");
    let byte = |at| u8::from_str_radix(&text[at..at + 2], 16).unwrap();
    let description: Vec<u8> = (0..text.len()).step_by(2).map(byte).collect();
    MemoryHandle::from_parts(&description, Vec::new()).unwrap()
}

fn fill(device: &dyn Device, memory: &DeviceSlice, value: u8) {
    let mut stream = device.copy_stream("fill").unwrap();
    let content = vec![value; usize::try_from(memory.bytes()).unwrap()];
    stream.copy_in(&pinned(device, &content), memory).unwrap();
    finish(&mut *stream);
}

#[test]
fn another_process_opens_what_it_was_given_and_no_more() {
    let _execution = Execution::start();
    let device = open();
    let memory = allocate(&*device, BYTES);
    fill(&*device, &memory, 42);
    let status = peer("opens_what_it_was_given", &memory).status().unwrap();
    assert!(status.success(), "{status}");
    assert_eq!(get(&*device, &memory.sub(0, 8).unwrap()), [43; 8]);
}

#[test]
#[ignore = "the other process of a test above, which starts it"]
fn opens_what_it_was_given() {
    let _execution = Execution::start();
    let device = open();
    let MemoryHandle::CudaIpc { handle: raw, bytes, gpu } = handle() else { panic!() };
    let handle = |bytes| MemoryHandle::CudaIpc { handle: raw, bytes, gpu };
    for too_much in [bytes + (2 << 20), 1 << 50, u64::MAX] {
        let error = device.open(handle(too_much)).unwrap_err();
        let DeviceError::WrongAllocationSize { expected_bytes, found_bytes } = error else {
            panic!("{error:?}")
        };
        assert!(expected_bytes == too_much && found_bytes >= bytes && found_bytes < too_much);
    }
    // Twice, as one memory; the second stays when the first is closed.
    let (first, second) = (device.open(handle(bytes)).unwrap(), device.open(handle(bytes)).unwrap());
    drop(first);
    let memory = DeviceSlice::new(second, 0, bytes).unwrap();
    assert!(get(&*device, &memory).iter().all(|&byte| byte == 42));
    // Handed on, it stays the same handle.
    let MemoryHandle::CudaIpc { handle: again, .. } = memory.memory().export().unwrap() else { panic!() };
    assert_eq!(again, raw);
    fill(&*device, &memory.sub(0, 8).unwrap(), 43);
    // A handle that nobody made.
    let forged = raw.map(|byte| byte ^ 0x5A);
    let error = device.open(MemoryHandle::CudaIpc { handle: forged, bytes, gpu }).unwrap_err();
    assert!(matches!(&error, DeviceError::Cuda { call: "cuIpcOpenMemHandle", .. }), "{error:?}");
    println!("a forged handle: {error}");
}

#[test]
fn a_process_killed_at_a_doorbell_harms_nobody() {
    let execution = Execution::start();
    let device = open();
    let memory = allocate(&*device, BYTES);
    let bell = memory.sub(BYTES - 4, 4).unwrap();
    for round in 1..=3 {
        let mut waiting = Waiting::start(peer("waits_for_a_doorbell", &memory));
        waiting.kill();
        // What it waited in is whole, and the next one may have it.
        fill(&*device, &memory.sub(0, BYTES - 4).unwrap(), round);
        assert_eq!(get(&*device, &memory.sub(BYTES - 12, 8).unwrap()), [round; 8]);
        assert_eq!(device.word(&bell).unwrap(), doorbell::CLEAR);
    }
    // Memory is still allocated, freed, and waited for.
    let other = allocate(&*device, BYTES);
    drop(other);
    device.wait_doorbell(execution.stream(), &bell, soon()).unwrap();
    device.set_word(&bell, doorbell::RUNG).unwrap();
    execution.synchronize();
}

#[test]
#[ignore = "the other process of a test above, which starts it"]
fn waits_for_a_doorbell() {
    let execution = Execution::start();
    let device = open();
    let memory = device.open(handle()).unwrap();
    let bell = DeviceSlice::new(memory, BYTES - 4, 4).unwrap();
    device.wait_doorbell(execution.stream(), &bell, soon()).unwrap();
    println!("\nwaiting");
    execution.synchronize();
    panic!("nobody rang");
}

struct Waiting(Child);

impl Waiting {
    fn start(mut command: Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let waiting = Self(child);
        assert!(output.lines().any(|line| line.unwrap() == "waiting"), "the other process failed");
        waiting
    }

    fn kill(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        // Where the test has failed; otherwise it has ended already, and there is nothing to kill.
        let _ = self.0.kill();
    }
}
