//! Waits that a capture has beside its work.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::context::{Context, RawStream};
use super::event::RawEvent;
use super::looker::Looker;
use super::stream::{enqueue_batch, wait_op};
use crate::{DeviceAddress, DeviceError, doorbell};

/// A branch of the graph that is captured, with nothing in it but waits: each after the one before it, and each ahead of
/// what the captured stream does next.
///
/// A wait between two kernels costs the GPU 2 us, and more between kernels of some size, also when it is over already: the
/// next kernel is not made ready before. One beside them costs 0.8 us if it is over, and 1.5 to 2.4 in models whose words are
/// written meanwhile (H200, driver 580). A kernel that looks at the word costs 0.1 us there, but it takes the GPU from other
/// processes for as long as it looks: it is for those who have the GPU to themselves.
#[derive(Debug)]
pub(super) struct Branch {
    stream: RawStream,
    /// Where the branch leaves the captured stream, and where it comes back to it.
    joint: RawEvent,
    has_left: AtomicBool,
    looker: Option<Arc<Looker>>,
}

impl Branch {
    pub(super) fn new(context: &Arc<Context>, looks: bool) -> Result<Self, DeviceError> {
        let stream = RawStream::of_greatest_priority(context)?;
        let looker = looks.then(|| Looker::new(context)).transpose()?.map(Arc::new);
        Ok(Self { stream, joint: RawEvent::new(context)?, has_left: AtomicBool::new(false), looker })
    }

    /// The capture of a stream has begun, of the context that was entered.
    pub(super) fn begin(&self, captured: &RawStream) -> Result<(), DeviceError> {
        self.has_left.store(false, Ordering::Relaxed);
        self.joint.record(captured.raw())
    }

    /// The kernel that is waited by, for graphs that launch it.
    pub(super) fn looker(&self) -> Option<Arc<Looker>> {
        self.looker.clone()
    }

    /// Has what the captured stream does next come after some waits, beside what it does until then. The words were checked by
    /// the caller, and the context was entered.
    pub(super) fn wait(&self, captured: &RawStream, words: &[DeviceAddress]) -> Result<(), DeviceError> {
        if !self.has_left.load(Ordering::Relaxed) {
            self.joint.hold_up(self.stream.raw())?;
            self.has_left.store(true, Ordering::Relaxed);
        }
        if let Some(looker) = &self.looker {
            words.iter().try_for_each(|word| looker.launch(&self.stream, *word))?;
        } else {
            let mut waits: Vec<_> = words.iter().map(|word| wait_op(*word, doorbell::RUNG)).collect();
            enqueue_batch(&self.stream, &mut waits)?;
        }
        self.joint.record(self.stream.raw())?;
        self.joint.hold_up(captured.raw())
    }
}
