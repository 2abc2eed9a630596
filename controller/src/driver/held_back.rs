//! Executions that are held back on a GPU until training stands still.
//!
//! Both would have the GPU in turn, for 2 ms or so each: the little that training has to do before its next gate could then
//! take as long as the request. Held back, a request begins as soon as that is done. Everything else is under way meanwhile:
//! its inputs, its weights, and its launch.

use std::time::{Duration, Instant};

use super::Driver;
use crate::scheduler::{ExecutionId, WorkerId};

/// An execution is held back for no longer than this: whoever trains may be where his GPU has nothing to do and he does not
/// look at his stop word.
const AT_MOST: Duration = Duration::from_millis(1);

/// Whose execution is held back, and until when.
#[derive(Debug, Clone, Copy)]
pub(super) struct HeldBack {
    worker: WorkerId,
    until: Instant,
}

impl Driver {
    /// Has an execution that is about to begin wait, if training is on its way to a gate.
    pub(super) fn hold_back(&mut self, execution: ExecutionId, worker: WorkerId) {
        let is_gpu = self.device.properties().gpu.is_some();
        if is_gpu && self.gate.as_ref().is_some_and(|gate| !gate.stands_still()) {
            self.links.set_let_go(worker, false);
            self.held_back.insert(execution, HeldBack { worker, until: Instant::now() + AT_MOST });
        }
    }

    /// Lets those go that need not wait any more.
    pub(super) fn let_go(&mut self) {
        if self.held_back.is_empty() {
            return;
        }
        let (now, gate) = (Instant::now(), self.gate.as_ref());
        let stands_still = gate.is_none_or(|gate| gate.stands_still());
        for (_, HeldBack { worker, .. }) in
            self.held_back.extract_if(|_, held| stands_still || held.until <= now)
        {
            self.links.set_let_go(worker, true);
        }
    }
}
