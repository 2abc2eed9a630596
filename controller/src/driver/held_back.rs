//! Executions that are held back on a GPU until training stands still.
//!
//! Both would have the GPU in turn, for 2 ms or so each: the little that training has to do before its next gate could then
//! take as long as the request. Held back, a request begins as soon as that is done. Everything else is under way meanwhile:
//! its inputs, its weights, and its launch.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::Driver;
use crate::scheduler::{ExecutionId, WorkerId};

/// An execution is held back for no longer than this: whoever trains may be where his GPU has nothing to do and he does not
/// look at his stop word.
const AT_MOST: Duration = Duration::from_millis(1);

/// Training that stands still counts if it does so again after this long: it may have been on its way through a gate.
const SEEN_TWICE_AFTER: Duration = Duration::from_micros(10);

/// Who is held back: of each worker the execution that it has.
#[derive(Debug, Default)]
pub(super) struct HeldBack {
    held: BTreeMap<WorkerId, Held>,
}

#[derive(Debug)]
struct Held {
    execution: ExecutionId,
    until: Instant,
    /// Since when training has been seen to stand still.
    still_since: Option<Instant>,
}

impl HeldBack {
    fn add(&mut self, worker: WorkerId, execution: ExecutionId, now: Instant) {
        self.held.insert(worker, Held { execution, until: now + AT_MOST, still_since: None });
    }

    /// Whether an execution that is about to begin is to wait.
    pub(super) fn holds(&self, worker: WorkerId, execution: ExecutionId) -> bool {
        self.held.get(&worker).is_some_and(|held| held.execution == execution)
    }

    /// The worker is gone, or its execution over.
    pub(super) fn forget(&mut self, worker: WorkerId) {
        self.held.remove(&worker);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.held.is_empty()
    }

    /// Those that need not wait any more.
    fn due(&mut self, stands_still: bool, now: Instant) -> Vec<WorkerId> {
        let is_due = |held: &mut Held| {
            if !stands_still {
                held.still_since = None;
            }
            let since = if stands_still { Some(*held.still_since.get_or_insert(now)) } else { None };
            held.until <= now || since.is_some_and(|since| now.duration_since(since) >= SEEN_TWICE_AFTER)
        };
        self.held.extract_if(.., |_, held| is_due(held)).map(|(worker, _)| worker).collect()
    }
}

impl Driver {
    /// Has an execution that is about to begin wait, if somebody trains.
    pub(super) fn hold_back(&mut self, execution: ExecutionId, worker: WorkerId) {
        let is_gpu = self.device.properties().gpu.is_some();
        if is_gpu && self.gate.as_ref().is_some_and(|gate| gate.somebody_trains()) {
            self.links.set_let_go(worker, false);
            self.held_back.add(worker, execution, Instant::now());
        }
    }

    /// Lets those go that need not wait any more.
    pub(super) fn let_go(&mut self) {
        if self.held_back.is_empty() {
            return;
        }
        let stands_still = self.gate.as_ref().is_none_or(|gate| gate.stands_still());
        for worker in self.held_back.due(stands_still, Instant::now()) {
            self.links.set_let_go(worker, true);
        }
    }

    /// Lets all go: nobody looks any more.
    pub(super) fn let_all_go(&mut self) {
        for (worker, _) in std::mem::take(&mut self.held_back.held) {
            self.links.set_let_go(worker, true);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WORKERS: [WorkerId; 2] = [WorkerId(1), WorkerId(2)];

    #[test]
    fn one_goes_when_training_was_seen_twice_to_stand_still() {
        let begun = Instant::now();
        let at = |us| begun + Duration::from_micros(us);
        let mut held = HeldBack::default();
        held.add(WORKERS[0], ExecutionId(7), at(0));
        assert!(held.holds(WORKERS[0], ExecutionId(7)) && !held.holds(WORKERS[1], ExecutionId(7)));
        assert_eq!(held.due(true, at(100)), []);
        assert_eq!(held.due(true, at(105)), []);
        // It was on its way through a gate.
        assert_eq!(held.due(false, at(108)), []);
        assert_eq!(held.due(true, at(200)), []);
        assert_eq!(held.due(true, at(215)), WORKERS[..1]);
        assert!(held.is_empty());
    }

    #[test]
    fn nobody_waits_for_longer_than_a_millisecond() {
        let begun = Instant::now();
        let mut held = HeldBack::default();
        held.add(WORKERS[0], ExecutionId(1), begun);
        held.add(WORKERS[1], ExecutionId(2), begun + AT_MOST / 2);
        assert_eq!(held.due(false, begun + AT_MOST / 2), []);
        assert_eq!(held.due(false, begun + AT_MOST), WORKERS[..1]);
        assert_eq!(held.due(false, begun + AT_MOST * 2), WORKERS[1..]);
    }

    #[test]
    fn an_execution_that_is_over_lets_no_later_one_of_its_worker_go() {
        let begun = Instant::now();
        let mut held = HeldBack::default();
        held.add(WORKERS[0], ExecutionId(1), begun);
        held.add(WORKERS[0], ExecutionId(2), begun + AT_MOST / 2);
        assert!(!held.holds(WORKERS[0], ExecutionId(1)) && held.holds(WORKERS[0], ExecutionId(2)));
        assert_eq!(held.due(false, begun + AT_MOST), []);
        held.forget(WORKERS[0]);
        assert_eq!(held.due(false, begun + AT_MOST * 2), []);
    }
}
