use std::collections::{BTreeMap, VecDeque};

use super::messages::{ExecutionId, WorkerId};

/// States of a worker. A worker that is lost has none: it is gone from the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum WorkerState {
    /// It begins: builds models, cannot execute.
    Starting,
    /// It waits for work.
    Standby,
    /// It executes.
    Active {
        /// What.
        execution: ExecutionId,
    },
    /// It executes and has been told to stop.
    Stopping {
        /// What.
        execution: ExecutionId,
    },
    /// It has been killed and is not reaped yet: what it executes may still be written to.
    Killed {
        /// What it executes, unless it said that it was done after all.
        execution: Option<ExecutionId>,
    },
    /// It has said that it ends and is not reaped yet: what it executed may still be written to.
    Ending {
        /// What it executed, unless that is over.
        execution: Option<ExecutionId>,
    },
}

/// Workers by state, for metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct WorkerCounts {
    /// Those that begin.
    pub starting: usize,
    /// Those that wait for work.
    pub standby: usize,
    /// Those that execute.
    pub active: usize,
    /// Those that have been told to stop what they execute.
    pub stopping: usize,
    /// Those that have been killed or have said that they end, and are not reaped yet.
    pub killed: usize,
}

impl WorkerCounts {
    /// Every count with the name of its state.
    #[must_use]
    pub fn by_name(&self) -> [(&'static str, usize); 5] {
        [
            ("starting", self.starting),
            ("standby", self.standby),
            ("active", self.active),
            ("stopping", self.stopping),
            ("killed", self.killed),
        ]
    }
}

/// All workers, and whose turn it is.
#[derive(Debug, Default)]
pub(super) struct Workers {
    states: BTreeMap<WorkerId, WorkerState>,
    /// Workers on standby, the one that finished last first: it is still awake, and so is its context on the GPU.
    standby: VecDeque<WorkerId>,
}

impl Workers {
    /// Unknown, starting -> Starting.
    pub(super) fn starting(&mut self, worker: WorkerId) {
        self.states.entry(worker).or_insert(WorkerState::Starting);
    }

    /// Starting, ready -> Standby.
    pub(super) fn ready(&mut self, worker: WorkerId) {
        let state = self.states.entry(worker).or_insert(WorkerState::Starting);
        if *state == WorkerState::Starting {
            *state = WorkerState::Standby;
            self.standby.push_back(worker);
        }
    }

    pub(super) fn next_standby(&self) -> Option<WorkerId> {
        self.standby.front().copied()
    }

    /// Standby, an execution is given to it -> Active.
    pub(super) fn activate(&mut self, worker: WorkerId, execution: ExecutionId) {
        debug_assert_eq!(self.standby.front(), Some(&worker), "the next on standby is activated");
        self.standby.pop_front();
        self.states.insert(worker, WorkerState::Active { execution });
    }

    /// Active, told to stop -> Stopping.
    pub(super) fn stop(&mut self, worker: WorkerId) {
        if let Some(state) = self.states.get_mut(&worker)
            && let WorkerState::Active { execution } = *state
        {
            *state = WorkerState::Stopping { execution };
        }
    }

    /// Stopping, the grace is over -> Killed.
    pub(super) fn kill(&mut self, worker: WorkerId) {
        if let Some(state) = self.states.get_mut(&worker)
            && let WorkerState::Stopping { execution } = *state
        {
            *state = WorkerState::Killed { execution: Some(execution) };
        }
    }

    /// Any state but Killed, it has said so -> Ending.
    pub(super) fn ending(&mut self, worker: WorkerId) {
        let Some(state) = self.states.get_mut(&worker) else { return };
        *state = match *state {
            WorkerState::Active { execution } | WorkerState::Stopping { execution } => {
                WorkerState::Ending { execution: Some(execution) }
            }
            WorkerState::Starting | WorkerState::Standby => WorkerState::Ending { execution: None },
            WorkerState::Killed { .. } | WorkerState::Ending { .. } => return,
        };
        self.standby.retain(|standby| *standby != worker);
    }

    /// Its execution ended: Active or Stopping -> Standby. Killed and Ending stay so, with nothing to execute.
    pub(super) fn done(&mut self, worker: WorkerId) {
        let Some(state) = self.states.get_mut(&worker) else { return };
        match state {
            WorkerState::Active { .. } | WorkerState::Stopping { .. } => {
                *state = WorkerState::Standby;
                self.standby.push_front(worker);
            }
            WorkerState::Killed { execution } | WorkerState::Ending { execution } => *execution = None,
            WorkerState::Starting | WorkerState::Standby => {}
        }
    }

    /// Any state, reaped -> lost, that is unknown. Returns what it executed.
    pub(super) fn lost(&mut self, worker: WorkerId) -> Option<ExecutionId> {
        match self.states.remove(&worker)? {
            WorkerState::Starting => None,
            WorkerState::Standby => {
                self.standby.retain(|standby| *standby != worker);
                None
            }
            WorkerState::Active { execution } | WorkerState::Stopping { execution } => Some(execution),
            WorkerState::Killed { execution } | WorkerState::Ending { execution } => execution,
        }
    }

    pub(super) fn counts(&self) -> WorkerCounts {
        let mut counts = WorkerCounts::default();
        for state in self.states.values() {
            *match state {
                WorkerState::Starting => &mut counts.starting,
                WorkerState::Standby => &mut counts.standby,
                WorkerState::Active { .. } => &mut counts.active,
                WorkerState::Stopping { .. } => &mut counts.stopping,
                WorkerState::Killed { .. } | WorkerState::Ending { .. } => &mut counts.killed,
            } += 1;
        }
        counts
    }

    pub(super) fn states(&self) -> impl Iterator<Item = (WorkerId, WorkerState)> {
        self.states.iter().map(|(worker, state)| (*worker, *state))
    }

    pub(super) fn check(&self) -> Result<(), String> {
        let standby = self.states.values().filter(|state| **state == WorkerState::Standby).count();
        let listed = |worker: &WorkerId| self.states.get(worker) == Some(&WorkerState::Standby);
        if standby == self.standby.len() && self.standby.iter().all(listed) {
            return Ok(());
        }
        Err(format!("workers on standby {:?} do not match their states {:?}", self.standby, self.states))
    }
}
