//! Streams on which tests execute.

use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};

use cudarc::driver::{CudaContext, CudaStream};
use pswitch_device::ExecutionStream;

/// A stream as a worker has one, and this test's turn: tests run one after the other. A stream that waits for a doorbell
/// keeps the driver from freeing memory, and other tests from going on.
pub(crate) struct Execution {
    stream: Arc<CudaStream>,
    _turn: Turn,
}

impl Execution {
    pub(crate) fn start() -> Self {
        let turn = Turn::wait();
        // Held for good: making a context anew for every test would take most of the time.
        static CONTEXT: OnceLock<Arc<CudaContext>> = OnceLock::new();
        let stream = CONTEXT.get_or_init(|| CudaContext::new(0).unwrap()).new_stream().unwrap();
        Self { stream, _turn: turn }
    }

    pub(crate) fn stream(&self) -> ExecutionStream {
        ExecutionStream::Cuda(self.stream.cu_stream() as u64)
    }

    pub(crate) fn raw(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    pub(crate) fn synchronize(&self) {
        self.stream.synchronize().unwrap();
    }
}

struct Turn;

static IS_TAKEN: Mutex<bool> = Mutex::new(false);
static IS_FREE: Condvar = Condvar::new();

impl Turn {
    fn wait() -> Self {
        let taken = IS_TAKEN.lock().unwrap_or_else(PoisonError::into_inner);
        *IS_FREE.wait_while(taken, |taken| *taken).unwrap_or_else(PoisonError::into_inner) = true;
        Self
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        *IS_TAKEN.lock().unwrap_or_else(PoisonError::into_inner) = false;
        IS_FREE.notify_one();
    }
}
