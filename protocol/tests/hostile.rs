//! What a peer that breaks the protocol can send, and what the reader makes of it.

use std::io::Write as _;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use proptest::prelude::*;
use pswitch_protocol::{
    Channel, Execute, FromWorker, InputValue, MAX_MESSAGE_BYTES, PROTOCOL_VERSION, PlacedTensor,
    ProtocolError, Region, ToWorker,
};

fn raw_send(channel: &Channel, packet: &[u8]) {
    let mut stream = UnixStream::from(channel.as_fd().try_clone_to_owned().unwrap());
    stream.write_all(packet).unwrap();
}

fn execute(inputs: usize) -> ToWorker {
    ToWorker::Execute(Execute {
        execution: 7,
        model: 3,
        inputs: vec![
            InputValue::Tensor(PlacedTensor {
                dtype: 7,
                shape: vec![8, 3, 224, 224],
                at: Region { offset: 512, bytes: 4_816_896 }
            });
            inputs
        ],
        input_doorbell: 64,
        home: 4096,
        arena: Region { offset: 1 << 30, bytes: 1 << 30 },
        resident: false,
        held_back: false,
        host_tables: true,
        outputs: Region { offset: 0, bytes: 32_000 },
        profile: None,
        doorbell_timeout_ms: 10_000,
    })
}

#[test]
fn messages_and_descriptors_arrive_as_sent() {
    let (a, b) = Channel::pair().unwrap();
    let (reader, mut writer) = std::io::pipe().unwrap();
    a.send(&execute(3), &[reader.as_fd()]).unwrap();
    let (message, mut descriptors) = b.receive::<ToWorker>().unwrap().unwrap();
    assert_eq!(message, execute(3));
    writer.write_all(b"x").unwrap();
    let received: OwnedFd = descriptors.pop().unwrap();
    let mut file = std::fs::File::from(received);
    let mut byte = [0];
    std::io::Read::read_exact(&mut file, &mut byte).unwrap();
    assert_eq!(&byte, b"x");
}

#[test]
fn another_version_is_refused_with_both_numbers() {
    let (a, b) = Channel::pair().unwrap();
    let other = PROTOCOL_VERSION + 1;
    let [low, high] = other.to_le_bytes();
    raw_send(&a, &[low, high, 1, 2]);
    match b.receive::<ToWorker>() {
        Err(ProtocolError::Version { found, expected }) => {
            assert_eq!((found, expected), (other, PROTOCOL_VERSION));
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_message_over_the_cap_is_refused_by_both_sides() {
    let (a, b) = Channel::pair().unwrap();
    assert!(matches!(a.send(&execute(10_000), &[]), Err(ProtocolError::TooLong { .. })));
    raw_send(&a, &vec![0; MAX_MESSAGE_BYTES + 1]);
    assert!(matches!(b.receive::<ToWorker>(), Err(ProtocolError::TooLong { .. })));
}

#[test]
fn bytes_after_a_message_are_refused() {
    let (a, b) = Channel::pair().unwrap();
    let shutdown = postcard_shutdown();
    raw_send(&a, &[PROTOCOL_VERSION.to_le_bytes().as_slice(), &shutdown, &[0]].concat());
    assert!(matches!(b.receive::<ToWorker>(), Err(ProtocolError::Malformed { .. })));
    raw_send(&a, &[PROTOCOL_VERSION.to_le_bytes().as_slice(), &shutdown].concat());
    assert!(b.receive::<ToWorker>().unwrap().is_some(), "the connection survives a bad packet");
}

fn postcard_shutdown() -> Vec<u8> {
    let (a, b) = Channel::pair().unwrap();
    a.send(&ToWorker::Shutdown, &[]).unwrap();
    let mut stream = std::fs::File::from(OwnedFd::from(b));
    let mut packet = [0; 64];
    let length = std::io::Read::read(&mut stream, &mut packet).unwrap();
    packet[2..length].to_vec()
}

#[test]
fn a_nonblocking_end_says_that_it_would_block() {
    let (a, _b) = Channel::pair().unwrap();
    a.set_nonblocking(true).unwrap();
    assert!(a.receive::<ToWorker>().unwrap_err().would_block());
}

proptest! {
    #[test]
    fn random_packets_never_panic(body in proptest::collection::vec(any::<u8>(), 0..256)) {
        let (a, b) = Channel::pair().unwrap();
        raw_send(&a, &[PROTOCOL_VERSION.to_le_bytes().as_slice(), &body].concat());
        let _ = b.receive::<FromWorker>();
        raw_send(&a, &[PROTOCOL_VERSION.to_le_bytes().as_slice(), &body].concat());
        let _ = b.receive::<ToWorker>();
    }
}
