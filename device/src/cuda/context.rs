//! What all calls happen in: a GPU's primary context, and the streams and events that belong to it.

use std::marker::PhantomData;
use std::ptr;
use std::sync::Arc;

use super::driver::{check, sys};
use crate::DeviceError;

/// A GPU's primary context, which libtorch uses as well, held as long as this lives.
#[derive(Debug)]
pub(super) struct Context {
    device: sys::CUdevice,
    raw: sys::CUcontext,
}

// SAFETY: a context belongs to the process; the driver's functions may be called from any thread.
unsafe impl Send for Context {}
// SAFETY: as above, also at the same time.
unsafe impl Sync for Context {}

impl Context {
    /// `device` comes from the driver, which is initialised.
    pub(super) fn retain(device: sys::CUdevice) -> Result<Arc<Self>, DeviceError> {
        let mut raw = ptr::null_mut();
        // SAFETY: `raw` is written during the call; the count that this raises is lowered in `drop`.
        check("cuDevicePrimaryCtxRetain", unsafe { sys::cuDevicePrimaryCtxRetain(&raw mut raw, device) })?;
        Ok(Arc::new(Self { device, raw }))
    }

    /// Makes it the calling thread's current context until the guard is dropped, and leaves the thread's own current
    /// context as it was: libtorch takes it for the current device.
    pub(super) fn enter(&self) -> Result<Entered<'_>, DeviceError> {
        let mut current = ptr::null_mut();
        // SAFETY: `current` is written during the call.
        check("cuCtxGetCurrent", unsafe { sys::cuCtxGetCurrent(&raw mut current) })?;
        let pushed = current != self.raw;
        if pushed {
            // SAFETY: the context is retained as long as `self` lives.
            check("cuCtxPushCurrent", unsafe { sys::cuCtxPushCurrent_v2(self.raw) })?;
        }
        Ok(Entered { pushed, context: PhantomData, thread: PhantomData })
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: balances `retain`; all that belongs to the context holds it, so nothing is left.
        let released = unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.device) };
        log_failure(check("cuDevicePrimaryCtxRelease", released));
    }
}

/// A thread inside a context.
#[derive(Debug)]
pub(super) struct Entered<'context> {
    pushed: bool,
    context: PhantomData<&'context Context>,
    // Stays on its thread: what is current is the thread's own.
    thread: PhantomData<*const ()>,
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        if self.pushed {
            let mut popped = ptr::null_mut();
            // SAFETY: takes back what `enter` pushed on this thread; guards are dropped in reverse order.
            log_failure(check("cuCtxPopCurrent", unsafe { sys::cuCtxPopCurrent_v2(&raw mut popped) }));
        }
    }
}

/// For clean-up, which has nobody to report to. At the end of a process the driver may be gone already.
pub(super) fn log_failure(result: Result<(), DeviceError>) {
    if let Err(error) = result {
        tracing::debug!(error = &error as &dyn std::error::Error, "CUDA clean-up failed");
    }
}

/// A stream that waits for no other, the default stream included.
#[derive(Debug)]
pub(super) struct RawStream {
    raw: sys::CUstream,
    context: Arc<Context>,
}

// SAFETY: a stream is a handle of the driver, whose functions may be called from any thread.
unsafe impl Send for RawStream {}
// SAFETY: as above, also at the same time.
unsafe impl Sync for RawStream {}

impl RawStream {
    pub(super) fn new(context: &Arc<Context>) -> Result<Self, DeviceError> {
        Self::of_priority(context, |least, _| least)
    }

    pub(super) fn of_greatest_priority(context: &Arc<Context>) -> Result<Self, DeviceError> {
        Self::of_priority(context, |_, greatest| greatest)
    }

    fn of_priority(
        context: &Arc<Context>,
        choose: impl FnOnce(i32, i32) -> i32,
    ) -> Result<Self, DeviceError> {
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        let mut raw = ptr::null_mut();
        let (mut least, mut greatest) = (0, 0);
        let _entered = context.enter()?;
        // SAFETY: both are written during the call.
        let range = unsafe { sys::cuCtxGetStreamPriorityRange(&raw mut least, &raw mut greatest) };
        check("cuCtxGetStreamPriorityRange", range)?;
        // SAFETY: `raw` is written during the call; the stream is destroyed in `drop`.
        let created =
            unsafe { sys::cuStreamCreateWithPriority(&raw mut raw, flags, choose(least, greatest)) };
        check("cuStreamCreateWithPriority", created)?;
        Ok(Self { raw, context: Arc::clone(context) })
    }

    pub(super) fn raw(&self) -> sys::CUstream {
        self.raw
    }

    pub(super) fn context(&self) -> &Arc<Context> {
        &self.context
    }

    /// Blocks until all that was enqueued is done.
    pub(super) fn synchronize(&self) -> Result<(), DeviceError> {
        let _entered = self.context.enter()?;
        // SAFETY: the stream lives as long as `self`.
        check("cuStreamSynchronize", unsafe { sys::cuStreamSynchronize(self.raw) })
    }
}

impl Drop for RawStream {
    fn drop(&mut self) {
        log_failure(self.context.enter().and_then(|_entered| {
            // SAFETY: made in `new`, used by nobody else. The driver lets work under way finish.
            check("cuStreamDestroy", unsafe { sys::cuStreamDestroy_v2(self.raw) })
        }));
    }
}
