//! Who has the device: requests, or training.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use mio::Waker;
use pswitch_device::SharedMemory;
use pswitch_protocol::control;

/// Closed while there are requests. To close it sets the stop flag of the task that trains at once, on the thread that
/// closes: nobody has to wake up first.
#[derive(Debug)]
pub(crate) struct Gate {
    closed: AtomicBool,
    /// The block of the worker that trains, or [`NOBODY`].
    current: AtomicU64,
    control: SharedMemory,
    waker: Arc<Waker>,
}

const NOBODY: u64 = u64::MAX;

impl Gate {
    /// An open one over the control page of training workers. The waker is told of changes.
    pub(super) fn new(control: SharedMemory, waker: Arc<Waker>) -> Self {
        Self { closed: AtomicBool::new(false), current: AtomicU64::new(NOBODY), control, waker }
    }

    /// Requests have the device from now on.
    pub(crate) fn close(&self) {
        if !self.closed.swap(true, Ordering::SeqCst) {
            self.interrupt();
            self.wake();
        }
    }

    /// Training may have it.
    pub(crate) fn open(&self) {
        if self.closed.swap(false, Ordering::SeqCst) {
            self.wake();
        }
    }

    pub(super) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst)
    }

    /// Lets the worker of a block train. Should requests have come meanwhile, it stops at once.
    pub(super) fn admit(&self, block: u64) {
        self.set_stop(block, false);
        self.current.store(block, Ordering::SeqCst);
        if self.is_closed() {
            self.set_stop(block, true);
        }
    }

    /// Sets the stop flag of whoever trains.
    pub(super) fn interrupt(&self) {
        match self.current.load(Ordering::SeqCst) {
            NOBODY => {}
            block => self.set_stop(block, true),
        }
    }

    /// Nobody trains.
    pub(super) fn vacate(&self) {
        self.current.store(NOBODY, Ordering::SeqCst);
    }

    fn set_stop(&self, block: u64, stop: bool) {
        if let Ok(word) = self.control.word(block + control::STOP) {
            word.store(u32::from(stop), Ordering::SeqCst);
        }
    }

    fn wake(&self) {
        if let Err(error) = self.waker.wake() {
            tracing::error!(%error, "training cannot be woken");
        }
    }
}
