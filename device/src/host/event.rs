use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use crate::{DeviceError, Event};

/// A point in a host copy stream.
#[derive(Debug, Default)]
pub(super) struct HostEvent {
    completed_at: Mutex<Option<Instant>>,
    completed: Condvar,
}

impl HostEvent {
    /// Pending -> complete, by the stream's thread.
    pub(super) fn complete(&self) {
        *self.state() = Some(Instant::now());
        self.completed.notify_all();
    }

    /// Blocks until it is complete, for as long as that takes, and says when that was.
    pub(super) fn await_completion(&self) -> Instant {
        let state = self.completed.wait_while(self.state(), |state| state.is_none());
        state.unwrap_or_else(PoisonError::into_inner).unwrap_or_else(Instant::now)
    }

    fn state(&self) -> MutexGuard<'_, Option<Instant>> {
        // The value is stored in one step: a thread that panicked cannot have left half of it.
        self.completed_at.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Event for HostEvent {
    fn is_complete(&self) -> Result<bool, DeviceError> {
        Ok(self.state().is_some())
    }

    fn wait(&self, deadline: Instant) -> Result<(), DeviceError> {
        let began = Instant::now();
        let timeout = deadline.saturating_duration_since(began);
        let (state, _) = self
            .completed
            .wait_timeout_while(self.state(), timeout, |state| state.is_none())
            .unwrap_or_else(PoisonError::into_inner);
        match *state {
            Some(_) => Ok(()),
            None => Err(DeviceError::TimedOut { what: "an event", waited: began.elapsed() }),
        }
    }

    fn completed_at(&self) -> Option<Instant> {
        *self.state()
    }
}
