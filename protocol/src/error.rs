use std::io;

/// What can go wrong on a connection between the processes of one server.
#[derive(Debug, thiserror::Error)]
pub enum ProtocolError {
    /// The peer speaks another version; both are built from one tree, so one of the two was replaced under way.
    #[error("the peer speaks protocol version {found}, this process {expected}: restart the server")]
    Version {
        /// Version of the received packet.
        found: u16,
        /// Version of this build.
        expected: u16,
    },
    /// A message is longer than any that the protocol has.
    #[error("a message of {found_bytes} bytes, {limit_bytes} are allowed")]
    TooLong {
        /// Length of the message.
        found_bytes: usize,
        /// The cap.
        limit_bytes: usize,
    },
    /// The packet does not decode as the message that was expected.
    #[error("a packet of {bytes} bytes does not decode as {expected}")]
    Malformed {
        /// Length of the packet.
        bytes: usize,
        /// Type that was expected.
        expected: &'static str,
        /// The decoder's reason.
        source: postcard::Error,
    },
    /// A message came without the descriptors that belong to it, or with too many.
    #[error("{message} came with {found} descriptors, {expected} belong to it")]
    Descriptors {
        /// The message.
        message: &'static str,
        /// How many came.
        found: usize,
        /// How many belong to it.
        expected: usize,
    },
    /// The socket refused.
    #[error("socket {operation} failed")]
    Io {
        /// What was tried.
        operation: &'static str,
        /// The system's reason.
        source: io::Error,
    },
}

impl ProtocolError {
    /// True when a non-blocking call would have had to wait.
    pub fn would_block(&self) -> bool {
        matches!(self, Self::Io { source, .. } if source.kind() == io::ErrorKind::WouldBlock)
    }
}
