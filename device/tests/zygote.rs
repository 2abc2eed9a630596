//! A process forked before any thread opens memory that its parent makes later, as the workers do.
//!
//! Has no test harness, since that would start threads before the fork.

use std::os::unix::net::UnixStream;

use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork};
use pswitch_device::conformance::{Fixture, answer_as_peer, talk_to_peer};
use pswitch_device::{DeviceId, ExecutionStream, LinkThrottle, open_device};

fn host() -> Fixture {
    Fixture {
        device: open_device(DeviceId::Host(0), LinkThrottle::default()).unwrap(),
        execution: ExecutionStream::Host,
        synchronize: Box::new(|| ()),
    }
}

fn main() {
    let (parent_end, child_end) = UnixStream::pair().unwrap();
    // SAFETY: this process has one thread, so the child inherits no lock that another thread holds.
    match unsafe { fork() }.unwrap() {
        ForkResult::Child => {
            drop(parent_end);
            answer_as_peer(&host(), &child_end);
        }
        ForkResult::Parent { child } => {
            drop(child_end);
            talk_to_peer(&host(), &parent_end);
            assert_eq!(waitpid(child, None).unwrap(), WaitStatus::Exited(child, 0));
            println!("a forked child shared its parent's memory: ok");
        }
    }
}
