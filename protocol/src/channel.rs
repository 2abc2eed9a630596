use std::cell::RefCell;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use nix::cmsg_space;
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr, recvmsg,
    sendmsg, socketpair,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::ProtocolError;
use crate::messages::PROTOCOL_VERSION;

/// Longest packet. The largest message lists the placed inputs or outputs of one execution.
pub const MAX_MESSAGE_BYTES: usize = 64 * 1024;

/// Most descriptors that ride along with one message.
pub const MAX_DESCRIPTORS: usize = 4;

const VERSION_BYTES: usize = 2;

/// One end of a connection; sending and receiving may happen on different threads.
#[derive(Debug)]
pub struct Channel {
    socket: OwnedFd,
}

impl Channel {
    /// Two connected ends, closed on `exec`.
    pub fn pair() -> Result<(Self, Self), ProtocolError> {
        let (a, b) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
            .map_err(|errno| ProtocolError::Io { operation: "creation", source: errno.into() })?;
        Ok((Self { socket: a }, Self { socket: b }))
    }

    /// Wraps the descriptor of an end that was received.
    pub fn from_fd(socket: OwnedFd) -> Self {
        Self { socket }
    }

    /// The same end for another thread.
    ///
    /// # Errors
    /// [`ProtocolError::Io`] if the process has too many descriptors.
    pub fn try_clone(&self) -> Result<Self, ProtocolError> {
        let socket = self.socket.try_clone();
        Ok(Self { socket: socket.map_err(|source| ProtocolError::Io { operation: "duplication", source })? })
    }

    /// Makes `receive` and `send` return [`ProtocolError::would_block`] instead of waiting.
    pub fn set_nonblocking(&self, nonblocking: bool) -> Result<(), ProtocolError> {
        use nix::fcntl::{FcntlArg, OFlag, fcntl};
        let set = || -> nix::Result<()> {
            let mut flags = OFlag::from_bits_retain(fcntl(&self.socket, FcntlArg::F_GETFL)?);
            flags.set(OFlag::O_NONBLOCK, nonblocking);
            fcntl(&self.socket, FcntlArg::F_SETFL(flags))?;
            Ok(())
        };
        set().map_err(|errno| ProtocolError::Io { operation: "set-up", source: errno.into() })
    }

    /// Sends one message with the descriptors that belong to it.
    ///
    /// A peer that is gone is an error (`EPIPE`), never a signal.
    pub fn send<T: Serialize>(
        &self,
        message: &T,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(), ProtocolError> {
        let packet =
            postcard::to_extend(message, PROTOCOL_VERSION.to_le_bytes().to_vec()).map_err(|source| {
                ProtocolError::Malformed { bytes: 0, expected: std::any::type_name::<T>(), source }
            })?;
        if packet.len() > MAX_MESSAGE_BYTES {
            return Err(ProtocolError::TooLong { found_bytes: packet.len(), limit_bytes: MAX_MESSAGE_BYTES });
        }
        let raw: Vec<RawFd> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let ancillary = if raw.is_empty() { &rights[..0] } else { &rights[..] };
        loop {
            match sendmsg::<UnixAddr>(
                self.socket.as_raw_fd(),
                &[IoSlice::new(&packet)],
                ancillary,
                MsgFlags::MSG_NOSIGNAL,
                None,
            ) {
                Ok(_) => return Ok(()),
                Err(nix::errno::Errno::EINTR) => {}
                Err(errno) => return Err(ProtocolError::Io { operation: "send", source: errno.into() }),
            }
        }
    }

    /// Receives one message; `None` when the peer has closed its end.
    pub fn receive<T: DeserializeOwned>(&self) -> Result<Option<(T, Vec<OwnedFd>)>, ProtocolError> {
        self.receive_with(MsgFlags::MSG_CMSG_CLOEXEC)
    }

    /// As [`receive`](Self::receive), but looks again and again for a time before it sleeps: a message that comes soon is
    /// read without the delay of waking up.
    pub fn receive_spinning<T: DeserializeOwned>(
        &self,
        spin: Duration,
    ) -> Result<Option<(T, Vec<OwnedFd>)>, ProtocolError> {
        if spin.is_zero() {
            return self.receive();
        }
        let until = Instant::now() + spin;
        loop {
            match self.receive_with(MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT) {
                Err(error) if error.would_block() => {}
                received => return received,
            }
            if Instant::now() >= until {
                return self.receive();
            }
            std::hint::spin_loop();
        }
    }

    fn receive_with<T: DeserializeOwned>(
        &self,
        flags: MsgFlags,
    ) -> Result<Option<(T, Vec<OwnedFd>)>, ProtocolError> {
        thread_local! {
            // Made once: to wipe as much for every message would take longer than most messages.
            static BUFFER: RefCell<Vec<u8>> = RefCell::new(vec![0; MAX_MESSAGE_BYTES]);
        }
        BUFFER.with_borrow_mut(|buffer| self.receive_into(buffer, flags))
    }

    fn receive_into<T: DeserializeOwned>(
        &self,
        buffer: &mut [u8],
        flags: MsgFlags,
    ) -> Result<Option<(T, Vec<OwnedFd>)>, ProtocolError> {
        let mut ancillary = cmsg_space!([RawFd; MAX_DESCRIPTORS]);
        let (length, truncated, descriptors) = loop {
            let mut slices = [IoSliceMut::new(buffer)];
            match recvmsg::<UnixAddr>(self.socket.as_raw_fd(), &mut slices, Some(&mut ancillary), flags) {
                Ok(received) => {
                    let mut descriptors = Vec::new();
                    let messages = received
                        .cmsgs()
                        .map_err(|errno| ProtocolError::Io { operation: "receive", source: errno.into() })?;
                    for message in messages {
                        if let ControlMessageOwned::ScmRights(raw) = message {
                            // SAFETY: the kernel has just made these descriptors for this process; nobody else owns them.
                            descriptors.extend(raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
                        }
                    }
                    let truncated = received.flags.intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC);
                    break (received.bytes, truncated, descriptors);
                }
                Err(nix::errno::Errno::EINTR) => {}
                // A peer that was killed with packets unread shows as a reset: it is gone all the same.
                Err(nix::errno::Errno::ECONNRESET) => return Ok(None),
                Err(errno) => return Err(ProtocolError::Io { operation: "receive", source: errno.into() }),
            }
        };
        if truncated {
            return Err(ProtocolError::TooLong { found_bytes: length, limit_bytes: MAX_MESSAGE_BYTES });
        }
        // Every packet carries its version, so an empty one is the end of the connection.
        if length == 0 {
            return Ok(None);
        }
        decode(&buffer[..length]).map(|message| Some((message, descriptors)))
    }
}

fn decode<T: DeserializeOwned>(packet: &[u8]) -> Result<T, ProtocolError> {
    let malformed = |source| ProtocolError::Malformed {
        bytes: packet.len(),
        expected: std::any::type_name::<T>(),
        source,
    };
    let Some((version, body)) = packet.split_first_chunk::<VERSION_BYTES>() else {
        return Err(malformed(postcard::Error::DeserializeUnexpectedEnd));
    };
    let found = u16::from_le_bytes(*version);
    if found != PROTOCOL_VERSION {
        return Err(ProtocolError::Version { found, expected: PROTOCOL_VERSION });
    }
    let (message, rest) = postcard::take_from_bytes(body).map_err(malformed)?;
    if !rest.is_empty() {
        return Err(malformed(postcard::Error::DeserializeBadEncoding));
    }
    Ok(message)
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl AsRawFd for Channel {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

impl From<Channel> for OwnedFd {
    fn from(channel: Channel) -> Self {
        channel.socket
    }
}

impl From<nix::errno::Errno> for ProtocolError {
    fn from(errno: nix::errno::Errno) -> Self {
        Self::Io { operation: "call", source: io::Error::from(errno) }
    }
}
