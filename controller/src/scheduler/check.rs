//! The invariants, for tests.

use std::collections::BTreeSet;

use pswitch_mem_pool::ModelId;

use super::Scheduler;
use super::records::{Claim, Inputs, Phase, RequestState};
use super::timers::Timer;
use super::workers::WorkerState;

impl Scheduler {
    /// Checks all invariants of scheduler, switcher and ledger; takes a time in proportion to everything there is.
    ///
    /// # Errors
    /// What is wrong.
    pub fn check(&self) -> Result<(), String> {
        self.switcher.check()?;
        self.workers.check()?;
        self.check_queues()?;
        self.check_executions()?;
        self.check_workers()?;
        let holds = self.switcher.ledger().leases(ModelId::TRAINING) == Ok(1);
        ensure(holds == (self.claim == Claim::Admitted), || {
            format!("training is {:?}, and its place held: {holds}", self.claim)
        })?;
        self.check_timers()
    }

    fn check_queues(&self) -> Result<(), String> {
        let mut waiting = 0;
        for (id, model) in &self.models {
            waiting += model.queue.len();
            ensure(self.heads.get(*id) == self.head(*id), || {
                format!("the head of {id} is {:?}, {:?} is listed", self.head(*id), self.heads.get(*id))
            })?;
            ensure(!model.removed || model.queue.is_empty(), || format!("{id} is removed and has a queue"))?;
            let executing = self.executions.values().filter(|execution| execution.model == *id).count();
            ensure(model.executing == executing, || {
                format!("{id} executes {executing}, {} are counted", model.executing)
            })?;
            for (sequence, request) in &model.queue {
                let record = self.requests.get(request);
                let fits = record.is_some_and(|record| {
                    record.state == RequestState::Waiting
                        && record.sequence == *sequence
                        && record.model == *id
                });
                ensure(fits, || format!("{request} waits in the queue of {id} and is {record:?}"))?;
            }
        }
        let all = self.requests.values().filter(|request| request.state == RequestState::Waiting).count();
        ensure(self.waiting == waiting && all == waiting, || {
            format!("{waiting} requests are in queues, {all} wait, {} are counted", self.waiting)
        })?;
        let heads = self.models.keys().filter(|model| self.head(**model).is_some()).count();
        ensure(heads == self.heads.len(), || {
            format!("{} heads are listed, there are {heads}", self.heads.len())
        })
    }

    fn check_executions(&self) -> Result<(), String> {
        let mut arenas = BTreeSet::new();
        for (id, execution) in &self.executions {
            let request = self.requests.get(&execution.request);
            ensure(request.is_some_and(|request| request.state == RequestState::Executing(*id)), || {
                format!("{id} is of {}, which is {request:?}", execution.request)
            })?;
            ensure(arenas.insert(execution.arena), || format!("{} is used twice", execution.arena))?;
            let under_way = self.switcher.inputs_under_way(execution.transfer) == Some(*id);
            ensure(under_way == (execution.inputs == Inputs::Moving), || {
                format!(
                    "the inputs of {id} are {:?}, their transfer under way: {under_way}",
                    execution.inputs
                )
            })?;
            let (lease, arena) = (&execution.lease, execution.arena);
            ensure(lease.model() == execution.model && lease.arena() == arena, || {
                format!("{id} runs {} in {arena} by {lease:?}", execution.model)
            })?;
        }
        let executing =
            self.requests.values().filter(|request| request.state != RequestState::Waiting).count();
        ensure(executing == self.executions.len(), || {
            format!("{executing} requests execute in {} executions", self.executions.len())
        })
    }

    fn check_workers(&self) -> Result<(), String> {
        let mut busy = 0;
        for (worker, state) in self.workers.states() {
            let (id, phase_fits): (_, fn(&Phase) -> bool) = match state {
                WorkerState::Starting
                | WorkerState::Standby
                | WorkerState::Killed { execution: None }
                | WorkerState::Ending { execution: None } => {
                    continue;
                }
                WorkerState::Active { execution } => {
                    (execution, |phase| matches!(phase, Phase::Running { .. }))
                }
                WorkerState::Stopping { execution } => {
                    (execution, |phase| matches!(phase, Phase::Stopping { .. }))
                }
                WorkerState::Killed { execution: Some(execution) } => {
                    (execution, |phase| matches!(phase, Phase::Killed { .. }))
                }
                WorkerState::Ending { execution: Some(execution) } => {
                    (execution, |phase| !matches!(phase, Phase::Ended { .. }))
                }
            };
            busy += 1;
            let execution = self.executions.get(&id);
            let fits =
                execution.is_some_and(|execution| execution.worker == worker && phase_fits(&execution.phase));
            ensure(fits, || format!("{worker} is {state:?}, the execution {execution:?}"))?;
        }
        let ended = |phase: &Phase| matches!(phase, Phase::Ended { .. });
        let running = self.executions.values().filter(|execution| !ended(&execution.phase)).count();
        ensure(busy == running, || format!("{busy} workers are busy with {running} executions"))
    }

    fn check_timers(&self) -> Result<(), String> {
        let mut expected = 0;
        for (id, request) in &self.requests {
            if request.state == RequestState::Waiting {
                expected += usize::from(request.deadline.is_some());
                let set = self.timers.contains(request.deadline, Timer::Request(*id));
                ensure(set, || format!("{id} waits without a timer for its deadline"))?;
            }
        }
        for (id, execution) in &self.executions {
            let due = execution.phase.due();
            expected += usize::from(due.is_some());
            let set = self.timers.contains(due, Timer::Execution(*id));
            ensure(set, || format!("{id} is {:?} without a timer", execution.phase))?;
        }
        let found = self.timers.len();
        ensure(expected == found, || format!("{found} timers are set, {expected} belong to something"))
    }
}

fn ensure(holds: bool, message: impl FnOnce() -> String) -> Result<(), String> {
    if holds { Ok(()) } else { Err(message()) }
}
