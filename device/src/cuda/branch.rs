//! Waits that a capture has beside its work.

use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::context::{Context, RawStream, log_failure};
use super::driver::{check, sys};
use super::stream::enqueue_batch;
use crate::DeviceError;

/// A branch of the graph that is captured, with nothing in it but waits: each after the one before it, and each ahead of
/// what the captured stream does next.
///
/// A wait between two kernels costs the GPU 2 us, and more between kernels of some size, also when it is over already: the
/// next kernel is not made ready before. One beside them costs 0.8 us if it is over, and 1.5 to 2.4 in models whose words are
/// written meanwhile (H200, driver 580). A kernel that looks at the word would cost nothing, but it would take its place from
/// others, and the GPU from other processes.
#[derive(Debug)]
pub(super) struct Branch {
    stream: RawStream,
    context: Arc<Context>,
    /// Where the branch leaves the captured stream, and where it comes back to it.
    joint: sys::CUevent,
    has_left: AtomicBool,
}

// SAFETY: an event is a handle of the driver, whose functions may be called from any thread.
unsafe impl Send for Branch {}
// SAFETY: as above, also at the same time.
unsafe impl Sync for Branch {}

impl Branch {
    pub(super) fn new(context: &Arc<Context>) -> Result<Self, DeviceError> {
        let stream = RawStream::of_greatest_priority(context)?;
        let mut joint = ptr::null_mut();
        let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
        let _entered = context.enter()?;
        // SAFETY: `joint` is written during the call; the event is destroyed in `drop`.
        check("cuEventCreate", unsafe { sys::cuEventCreate(&raw mut joint, flags) })?;
        Ok(Self { stream, context: Arc::clone(context), joint, has_left: AtomicBool::new(false) })
    }

    /// The capture of a stream has begun, of the context that was entered.
    pub(super) fn begin(&self, captured: &RawStream) -> Result<(), DeviceError> {
        self.has_left.store(false, Ordering::Relaxed);
        self.record(captured)
    }

    /// Has what the captured stream does next come after some waits, beside what it does until then. The words were checked by
    /// the caller, and the context was entered.
    pub(super) fn wait(
        &self,
        captured: &RawStream,
        waits: &mut [sys::CUstreamBatchMemOpParams],
    ) -> Result<(), DeviceError> {
        if !self.has_left.load(Ordering::Relaxed) {
            self.follow(&self.stream)?;
            self.has_left.store(true, Ordering::Relaxed);
        }
        enqueue_batch(&self.stream, waits)?;
        self.record(&self.stream)?;
        self.follow(captured)
    }

    fn record(&self, stream: &RawStream) -> Result<(), DeviceError> {
        // SAFETY: event and stream live and belong to one context.
        check("cuEventRecord", unsafe { sys::cuEventRecord(self.joint, stream.raw()) })
    }

    fn follow(&self, stream: &RawStream) -> Result<(), DeviceError> {
        // SAFETY: as in `record`.
        check("cuStreamWaitEvent", unsafe { sys::cuStreamWaitEvent(stream.raw(), self.joint, 0) })
    }
}

impl Drop for Branch {
    fn drop(&mut self) {
        log_failure(self.context.enter().and_then(|_entered| {
            // SAFETY: made in `new`; a graph keeps nothing of it.
            check("cuEventDestroy", unsafe { sys::cuEventDestroy_v2(self.joint) })
        }));
    }
}
