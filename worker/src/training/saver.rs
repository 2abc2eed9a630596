//! Checkpoints that are written while steps go on.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::Duration;

use pswitch_protocol::{Channel, FromWorker, ProtocolError};
use pswitch_train::CheckpointConfig;

use super::served::chain;
use super::task::Snapshot;

/// How long after a last checkpoint that could not be written it is tried again.
const AGAIN_AFTER: Duration = Duration::from_secs(2);

/// Writes the checkpoints of a task by a thread of its own, one after the other, and tells the controller of each. The thread ends
/// behind those that were begun when this is dropped.
pub(super) struct Saver {
    orders: mpsc::Sender<Order>,
    shared: Arc<Shared>,
}

struct Order {
    snapshot: Snapshot,
    kind: Kind,
}

/// What is done about a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// If it cannot be written, the next is tried.
    Regular,
    /// Of a task that has done all its steps: it is tried until it is there.
    Last,
    /// Of one whose next loss is no number: it goes on from an earlier one when it is submitted again.
    Diverged,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// Steps of the one that was begun last, until it is there or was given up.
    under_way: Option<u64>,
    /// Steps and file of the last one that is there.
    written: Option<(u64, PathBuf)>,
}

impl Saver {
    /// `written` is what the task goes on from.
    pub(super) fn start(
        place: &CheckpointConfig,
        written: Option<(u64, PathBuf)>,
        channel: Channel,
    ) -> std::io::Result<Self> {
        let (orders, received) = mpsc::channel();
        let state = Mutex::new(State { under_way: None, written });
        let shared = Arc::new(Shared { state, changed: Condvar::new() });
        let (place, told) = (place.clone(), Arc::clone(&shared));
        std::thread::Builder::new().name("pswitch-checkpoint".to_owned()).spawn(move || {
            for order in received {
                told.write(&order, &place, &channel);
            }
        })?;
        Ok(Self { orders, shared })
    }

    /// Tells of the last checkpoint that is there, if one is.
    pub(super) fn tell_written(&self, channel: &Channel) -> Result<(), ProtocolError> {
        match &self.shared.state().written {
            Some((step, path)) => channel.send(&saved(*step, Ok(path)), &[]),
            None => Ok(()),
        }
    }

    /// Tells that the checkpoint of a step is copied, if it was begun and not given up, ahead of what becomes of it. False if there
    /// is none.
    pub(super) fn tell_copied(&self, step: u64, channel: &Channel) -> Result<bool, ProtocolError> {
        let state = self.shared.state();
        match &*state {
            State { under_way: Some(begun), .. } if *begun == step => {
                channel.send(&FromWorker::TaskCopied, &[])?
            }
            State { written: Some((there, path)), .. } if *there == step => {
                channel.send(&FromWorker::TaskCopied, &[])?;
                channel.send(&saved(step, Ok(path)), &[])?;
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    pub(super) fn is_busy(&self) -> bool {
        self.shared.state().under_way.is_some()
    }

    /// Has a snapshot written, behind those before.
    pub(super) fn write(&self, snapshot: Snapshot, kind: Kind) {
        self.shared.state().under_way = Some(snapshot.step());
        // The thread ends behind this.
        let _ = self.orders.send(Order { snapshot, kind });
    }

    /// Returns when everything that was begun is there or was given up.
    pub(super) fn wait(&self) {
        let state = self.shared.state();
        let waited = self.shared.changed.wait_while(state, |state| state.under_way.is_some());
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self, order: &Order, place: &CheckpointConfig, channel: &Channel) {
        while !self.try_to_write(order, place, channel) {
            std::thread::sleep(AGAIN_AFTER);
        }
    }

    /// False if it is to be tried again.
    fn try_to_write(&self, order: &Order, place: &CheckpointConfig, channel: &Channel) -> bool {
        let step = order.snapshot.step();
        let write = || match order.kind {
            Kind::Regular | Kind::Last => order.snapshot.write(&place.folder, place.keep),
            Kind::Diverged => order.snapshot.write_diverged(&place.folder),
        };
        let write = || write().map_err(chain);
        let written = catch_unwind(AssertUnwindSafe(write));
        let written = written.unwrap_or_else(|_| Err("writing it panicked".to_owned()));
        // Whoever asks from here on knows what is told.
        let mut state = self.state();
        let is_over = written.is_ok() || order.kind != Kind::Last;
        if let Ok(path) = &written {
            state.written = Some((step, path.clone()));
        }
        if is_over && state.under_way == Some(step) {
            state.under_way = None;
            self.changed.notify_all();
        }
        // A channel that is broken is noticed by who serves it.
        let _ = channel.send(&saved(step, written.as_deref().map_err(Clone::clone)), &[]);
        is_over
    }
}

/// What is told of a checkpoint.
pub(super) fn saved(step: u64, written: Result<&Path, String>) -> FromWorker {
    FromWorker::TaskSaved { step, result: written.map(|path| path.display().to_string()) }
}
