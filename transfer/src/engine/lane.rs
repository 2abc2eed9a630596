use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, SendError, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use pswitch_device::{CopyStream, Device, DeviceError, Event};

use super::{OnLanded, TransferId, TransferReport};
use crate::TransferError;

/// How long a wait for an event lasts before it is said in the log that it goes on. It does go on: memory that a copy
/// may still write to cannot be given to anybody else.
const PATIENCE: Duration = Duration::from_secs(10);

/// One copy stream and the thread that reports what has landed from it.
#[derive(Debug)]
pub(super) struct Lane {
    queue: Mutex<Queue>,
    reporter: Arc<Reporter>,
    /// Transfers that are not reported.
    under_way: Arc<AtomicUsize>,
    thread: Option<JoinHandle<()>>,
}

/// Both under one lock, so that reports wait in the order in which the stream works.
#[derive(Debug)]
struct Queue {
    stream: Box<dyn CopyStream>,
    /// `None` only while dropping.
    pending: Option<Sender<Pending>>,
}

/// A transfer that is enqueued, or as much of it as the device took.
#[derive(Debug)]
pub(super) struct Pending {
    pub(super) id: TransferId,
    pub(super) bytes: u64,
    pub(super) enqueued_at: Instant,
    /// Behind everything. There is no point behind each group: on a GPU it would hold the copies up like a doorbell does.
    pub(super) end: Option<Arc<dyn Event>>,
    /// Why not all of it is enqueued.
    pub(super) failure: Option<TransferError>,
}

/// Calls back, from one thread at a time.
pub(super) struct Reporter {
    on_landed: Mutex<OnLanded>,
}

impl std::fmt::Debug for Reporter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reporter").finish_non_exhaustive()
    }
}

impl Lane {
    pub(super) fn open(
        device: &dyn Device,
        name: &str,
        reporter: Arc<Reporter>,
    ) -> Result<Self, TransferError> {
        let stream = device
            .copy_stream(name)
            .map_err(|source| TransferError::Device { what: "open a copy stream", source })?;
        let (pending, queue) = mpsc::channel();
        let (reports, under_way) = (Arc::clone(&reporter), Arc::new(AtomicUsize::new(0)));
        let left = Arc::clone(&under_way);
        let thread = thread::Builder::new()
            .name(format!("{name}-landed"))
            .spawn(move || report_all(&queue, &reports, &left))
            .map_err(|source| TransferError::Thread { source })?;
        Ok(Self {
            queue: Mutex::new(Queue { stream, pending: Some(pending) }),
            reporter,
            under_way,
            thread: Some(thread),
        })
    }

    /// Lets `enqueue` fill the stream with something that nobody is told of.
    pub(super) fn enqueue<T>(&self, enqueue: impl FnOnce(&mut dyn CopyStream) -> T) -> T {
        enqueue(self.queue.lock().unwrap_or_else(PoisonError::into_inner).stream.as_mut())
    }

    /// Whether no transfer is under way: what is enqueued is done at once, and holds none up.
    pub(super) fn is_idle(&self) -> bool {
        self.under_way.load(Ordering::Relaxed) == 0
    }

    /// Lets `enqueue` fill the stream, and has what it did reported once it is done. Never blocks on the device.
    pub(super) fn run(
        &self,
        id: TransferId,
        bytes: u64,
        enqueue: impl FnOnce(&mut dyn CopyStream) -> Result<(), TransferError>,
    ) {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        self.under_way.fetch_add(1, Ordering::Relaxed);
        let enqueued_at = Instant::now();
        let mut failure = enqueue(queue.stream.as_mut()).err();
        let end = match queue.stream.record() {
            Ok(end) => Some(end),
            Err(source) => {
                failure.get_or_insert(TransferError::Device { what: "record the end of a transfer", source });
                None
            }
        };
        let pending = Pending { id, bytes, enqueued_at, end, failure };
        tracing::debug!(transfer = id.0, bytes, "enqueued");
        let sent = match &queue.pending {
            Some(sender) => sender.send(pending),
            None => Err(SendError(pending)),
        };
        if let Err(SendError(pending)) = sent {
            // The thread lives until this lane is dropped. If it should not, nothing stays unreported.
            drop(queue);
            self.under_way.fetch_sub(1, Ordering::Relaxed);
            self.reporter.report(pending);
        }
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        let queue = self.queue.get_mut().unwrap_or_else(PoisonError::into_inner);
        // The thread reports what is still under way, then finds that nobody is left to send.
        drop(queue.pending.take());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("a thread that reports transfers panicked");
        }
    }
}

fn report_all(queue: &Receiver<Pending>, reporter: &Reporter, under_way: &AtomicUsize) {
    while let Ok(pending) = queue.recv() {
        reporter.report(pending);
        under_way.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Reporter {
    pub(super) fn new(on_landed: OnLanded) -> Self {
        Self { on_landed: Mutex::new(on_landed) }
    }

    /// Waits until the stream is done with a transfer, then calls back.
    fn report(&self, pending: Pending) {
        let id = pending.id;
        let result = pending.land();
        match &result {
            Ok(report) => tracing::debug!(
                transfer = id.0,
                took_us = report.landed_at.duration_since(report.enqueued_at).as_secs_f64() * 1e6,
                "landed"
            ),
            Err(error) => {
                tracing::warn!(transfer = id.0, error = error as &dyn std::error::Error, "failed");
            }
        }
        let on_landed = self.on_landed.lock().unwrap_or_else(PoisonError::into_inner);
        if catch_unwind(AssertUnwindSafe(|| on_landed(id, result))).is_err() {
            tracing::error!(transfer = id.0, "the callback for a finished transfer panicked");
        }
    }
}

impl Pending {
    /// Waits for all of it, even if some of it failed: afterwards no copy touches its memory any more.
    fn land(self) -> Result<TransferReport, TransferError> {
        let Self { id, bytes, enqueued_at, end, failure } = self;
        let landed = end.map_or(Ok(enqueued_at), |end| wait(id, end.as_ref()));
        match (failure, landed) {
            (Some(failure), _) => Err(failure),
            (None, Err(source)) => Err(TransferError::Device { what: "finish a transfer", source }),
            (None, Ok(landed_at)) => Ok(TransferReport { bytes, enqueued_at, landed_at }),
        }
    }
}

fn wait(id: TransferId, event: &dyn Event) -> Result<Instant, DeviceError> {
    loop {
        match event.wait(Instant::now() + PATIENCE) {
            Ok(()) => return Ok(event.completed_at().unwrap_or_else(Instant::now)),
            Err(DeviceError::TimedOut { .. }) => {
                tracing::warn!(transfer = id.0, "still waiting for a transfer to land");
            }
            Err(error) => return Err(error),
        }
    }
}
