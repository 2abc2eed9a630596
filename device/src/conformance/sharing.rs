use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};

use nix::cmsg_space;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};

use super::{Fixture, PATIENCE, done, pattern, slice, soon, whole};
use crate::{MemoryHandle, doorbell};

/// Tells a test binary that it is the other process.
const PEER: &str = "PSWITCH_DEVICE_CONFORMANCE_PEER";
const GROUP_BYTES: usize = 100_003;
const MEMORY_BYTES: u64 = 256 * 1024;
const FROM_PEER: u64 = 128 * 1024;
/// The doorbells, one in each direction.
const TO_PEER_WORD: u64 = MEMORY_BYTES - 8;
const FROM_PEER_WORD: u64 = MEMORY_BYTES - 4;
/// The longest description of a handle.
const DESCRIPTION_BYTES: usize = 256;

/// What is written through one of two mappings is seen through the other.
pub fn an_opened_handle_is_the_same_memory(fixture: &Fixture) {
    let made = fixture.allocate(10_000);
    let opened = done(fixture.device.open(done(made.export())));
    assert_eq!(opened.bytes(), made.bytes());
    fixture.put(&whole(&made), &pattern(1, 10_000));
    assert_eq!(fixture.get(&whole(&opened)), pattern(1, 10_000));
    fixture.put(&whole(&opened), &pattern(2, 10_000));
    assert_eq!(fixture.get(&whole(&made)), pattern(2, 10_000));
    // An opened memory can be handed on.
    let again = done(fixture.device.open(done(opened.export())));
    assert_eq!(fixture.get(&whole(&again)), pattern(2, 10_000));
}

/// Memory stays while anybody has it open.
pub fn memory_outlives_its_maker_while_it_is_open(fixture: &Fixture) {
    let made = fixture.allocate(10_000);
    fixture.put(&whole(&made), &pattern(3, 10_000));
    let opened = done(fixture.device.open(done(made.export())));
    drop(made);
    assert_eq!(fixture.get(&whole(&opened)), pattern(3, 10_000));
}

/// Another process opens the memory by its handle, sees what a doorbell announces and rings one itself.
///
/// `peer` starts a process whose standard input is a Unix socket and which calls [`peer_process`] with a fixture of the
/// same device.
pub fn another_process_shares_the_memory(fixture: &Fixture, mut peer: Command) {
    let (ours, theirs) = UnixStream::pair().expect("a socket pair");
    let mut peer = peer.stdin(Stdio::from(OwnedFd::from(theirs))).spawn().expect("the peer starts");
    talk_to_peer(fixture, &ours);
    let status = peer.wait().expect("the peer can be waited for");
    assert!(status.success(), "the peer failed: {status}");
}

/// A command that runs the ignored test `test` in `module` of this very test binary as the other process.
pub fn this_binary_as_peer(module: &str, test: &str) -> Command {
    // Tests are named by their path inside the crate.
    let path =
        module.split_once("::").map_or_else(|| test.to_owned(), |(_, module)| format!("{module}::{test}"));
    let mut command = Command::new(std::env::current_exe().expect("this binary has a path"));
    command.args(["--exact", &path, "--ignored", "--nocapture"]).env(PEER, "1");
    command
}

/// The other process of [`another_process_shares_the_memory`].
pub fn peer_process(fixture: &Fixture) {
    assert!(std::env::var_os(PEER).is_some(), "this is started by another test, not by hand");
    let socket = std::io::stdin().as_fd().try_clone_to_owned().expect("standard input is a socket");
    answer_as_peer(fixture, &UnixStream::from(socket));
}

/// This process's side: sends the memory, fills it, rings, and waits for the answer.
pub fn talk_to_peer(fixture: &Fixture, socket: &UnixStream) {
    let memory = fixture.allocate(MEMORY_BYTES);
    send_handle(socket, done(memory.export()));
    let mut stream = fixture.stream();
    let group = slice(&memory, 0, GROUP_BYTES as u64);
    done(stream.copy_in(&fixture.pinned(&pattern(21, GROUP_BYTES)), &group));
    done(stream.write_word(&slice(&memory, TO_PEER_WORD, 4), doorbell::RUNG));
    done(fixture.wait(&slice(&memory, FROM_PEER_WORD, 4), soon()));
    assert!(fixture.get(&slice(&memory, FROM_PEER, GROUP_BYTES as u64)) == pattern(22, GROUP_BYTES));
}

/// The other side: receives the memory, waits for the doorbell, looks, answers and rings.
pub fn answer_as_peer(fixture: &Fixture, socket: &UnixStream) {
    let memory = done(fixture.device.open(receive_handle(socket)));
    done(fixture.wait(&slice(&memory, TO_PEER_WORD, 4), soon()));
    assert!(fixture.get(&slice(&memory, 0, GROUP_BYTES as u64)) == pattern(21, GROUP_BYTES));
    let mut stream = fixture.stream();
    let answer = slice(&memory, FROM_PEER, GROUP_BYTES as u64);
    done(stream.copy_in(&fixture.pinned(&pattern(22, GROUP_BYTES)), &answer));
    done(stream.write_word(&slice(&memory, FROM_PEER_WORD, 4), doorbell::RUNG));
}

fn send_handle(socket: &UnixStream, handle: MemoryHandle) {
    let (description, descriptors) = handle.into_parts();
    let raw: Vec<RawFd> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let sent =
        sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(&description)], &rights, MsgFlags::empty(), None);
    assert_eq!(sent.expect("the handle is sent"), description.len());
}

fn receive_handle(socket: &UnixStream) -> MemoryHandle {
    socket.set_read_timeout(Some(PATIENCE)).expect("the socket takes a timeout");
    let mut description = [0; DESCRIPTION_BYTES];
    let mut space = cmsg_space!([RawFd; 4]);
    let mut parts = [IoSliceMut::new(&mut description)];
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)
        .expect("the handle arrives");
    let length = message.bytes;
    let descriptors = message
        .cmsgs()
        .expect("the control data are complete")
        .filter_map(|control| match control {
            ControlMessageOwned::ScmRights(descriptors) => Some(descriptors),
            _ => None,
        })
        .flatten()
        // SAFETY: the kernel has just made these descriptors for this process; nobody else knows them.
        .map(|descriptor| unsafe { OwnedFd::from_raw_fd(descriptor) })
        .collect();
    done(MemoryHandle::from_parts(&description[..length], descriptors))
}
