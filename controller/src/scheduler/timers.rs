use std::collections::BTreeSet;
use std::time::Instant;

use super::messages::{ExecutionId, RequestId};

/// What is due.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Timer {
    /// The deadline of a request that waits.
    Request(RequestId),
    /// An execution is to be stopped, or its worker killed.
    Execution(ExecutionId),
}

/// Times at which something is to happen, the next one first. Whoever sets a timer remembers its time to take it back.
#[derive(Debug, Default)]
pub(super) struct Timers {
    due: BTreeSet<(Instant, Timer)>,
}

impl Timers {
    pub(super) fn set(&mut self, at: Option<Instant>, timer: Timer) {
        self.due.extend(at.map(|at| (at, timer)));
    }

    pub(super) fn clear(&mut self, at: Option<Instant>, timer: Timer) {
        if let Some(at) = at {
            self.due.remove(&(at, timer));
        }
    }

    pub(super) fn next(&self) -> Option<Instant> {
        self.due.first().map(|(at, _)| *at)
    }

    pub(super) fn pop_due(&mut self, now: Instant) -> Option<Timer> {
        if self.next()? > now {
            return None;
        }
        self.due.pop_first().map(|(_, timer)| timer)
    }

    pub(super) fn len(&self) -> usize {
        self.due.len()
    }

    pub(super) fn contains(&self, at: Option<Instant>, timer: Timer) -> bool {
        at.is_none_or(|at| self.due.contains(&(at, timer)))
    }
}
