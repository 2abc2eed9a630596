//! Waits that a capture has beside its work.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::context::{Context, RawStream};
use super::event::RawEvent;
use super::stream::{enqueue_batch, wait_op};
use crate::{DeviceAddress, DeviceError, doorbell};

/// A branch of the graph that is captured, with nothing in it but waits: each after the one before it, and each ahead of
/// what the captured stream does next.
///
/// A wait between two kernels costs the GPU 2 us, and more between kernels of some size, also when it is over already: the
/// next kernel is not made ready before. One beside them costs 0.8 us if it is over, and 1.5 to 2.4 in models whose words are
/// written meanwhile (H200, driver 580). Those who have the GPU to themselves wait by a [kernel](super::looker).
#[derive(Debug)]
pub(super) struct Branch {
    stream: RawStream,
    /// Where the branch leaves the captured stream, and where it comes back to it.
    joint: RawEvent,
    has_left: AtomicBool,
}

impl Branch {
    pub(super) fn new(context: &Arc<Context>) -> Result<Self, DeviceError> {
        let stream = RawStream::of_greatest_priority(context)?;
        Ok(Self { stream, joint: RawEvent::new(context)?, has_left: AtomicBool::new(false) })
    }

    /// The capture of a stream has begun, of the context that was entered.
    pub(super) fn begin(&self, captured: &RawStream) -> Result<(), DeviceError> {
        self.has_left.store(false, Ordering::Relaxed);
        self.joint.record(captured.raw())
    }

    /// Has what the captured stream does next come after some waits, beside what it does until then. The words were checked by
    /// the caller, and the context was entered.
    pub(super) fn wait(&self, captured: &RawStream, words: &[DeviceAddress]) -> Result<(), DeviceError> {
        if !self.has_left.load(Ordering::Relaxed) {
            self.joint.hold_up(self.stream.raw())?;
            self.has_left.store(true, Ordering::Relaxed);
        }
        let mut waits: Vec<_> = words.iter().map(|word| wait_op(*word, doorbell::RUNG)).collect();
        enqueue_batch(&self.stream, &mut waits)?;
        self.joint.record(self.stream.raw())?;
        self.joint.hold_up(captured.raw())
    }
}
