//! What each event does.

use std::time::Instant;

use pswitch_mem_pool::{ArenaId, ModelId};
use pswitch_protocol::FaultClass;
use pswitch_transfer::TransferId;

use super::Scheduler;
use super::messages::{Action, Event, ExecutionId, Load, Outcome, Rejection, RequestId, WorkerId};
use super::records::{Claim, Execution, Inputs, Phase, Request, RequestState, StopReason, Verdict};
use super::switcher::Claimed;
use super::timers::Timer;

impl Scheduler {
    pub(super) fn apply(&mut self, event: Event, now: Instant, actions: &mut Vec<Action>) {
        match event {
            Event::Submitted { request, model, deadline } => {
                self.submitted(request, model, deadline, now, actions);
            }
            Event::Resubmitted { request, model, deadline } => {
                if self.models.get(&model).is_some_and(|record| !record.removed) {
                    self.accept(request, model, deadline, now);
                } else {
                    actions.push(Action::Reply { request, result: Err(Rejection::ModelRemoved) });
                }
            }
            Event::Cancelled { request } => self.cancelled(request, now, actions),
            Event::WorkerStarting { worker } => self.workers.starting(worker),
            Event::WorkerReady { worker } => self.workers.ready(worker),
            Event::WorkerEnding { worker } => self.workers.ending(worker),
            Event::WorkerLost { worker } => self.worker_lost(worker, actions),
            Event::TransferLanded { transfer } => self.transfer_landed(transfer, actions),
            Event::TransferFailed { transfer, reason } => self.transfer_failed(transfer, reason, actions),
            Event::ExecutionFinished { execution, outcome } => {
                self.execution_finished(execution, outcome, actions);
            }
            Event::ModelRemoved { model } => self.model_removed(model, actions),
            // Absent, it asks -> Asked.
            Event::TrainingAsks if self.claim == Claim::Absent => self.claim = Claim::Asked,
            Event::TrainingAsks => {}
            Event::TrainingLeaves => {
                // Asked or Admitted, it leaves -> Absent.
                if std::mem::take(&mut self.claim) == Claim::Admitted {
                    self.switcher.let_training_go();
                }
            }
            Event::Hold => self.held = true,
            Event::Release => self.held = false,
            Event::Homes { homes } => self.switcher.set_homes(homes),
            Event::Draining => self.draining = true,
            Event::Tick => {}
        }
    }

    fn submitted(
        &mut self,
        request: RequestId,
        model: ModelId,
        deadline: Option<Instant>,
        now: Instant,
        actions: &mut Vec<Action>,
    ) {
        if self.requests.contains_key(&request) {
            tracing::error!(%request, "submitted twice: the second is not heard");
            debug_assert!(false, "{request} is submitted twice");
            return;
        }
        if let Err(rejection) = self.admit(model) {
            actions.push(Action::Reply { request, result: Err(rejection) });
            return;
        }
        self.accept(request, model, deadline, now);
    }

    fn accept(&mut self, request: RequestId, model: ModelId, deadline: Option<Instant>, now: Instant) {
        let sequence = self.next_sequence;
        self.next_sequence += 1;
        let state = RequestState::Waiting;
        let record = Request { model, sequence, submitted: now, deadline, attempts: 0, state };
        self.requests.insert(request, record);
        self.enqueue(request);
    }

    fn admit(&self, model: ModelId) -> Result<(), Rejection> {
        if self.draining {
            return Err(Rejection::Draining);
        }
        if let Some((asked_bytes, capacity_bytes)) = self.unfit.get(&model).copied() {
            return Err(Rejection::NeverFits { asked_bytes, capacity_bytes });
        }
        let record = self.models.get(&model).ok_or(Rejection::UnknownModel)?;
        if record.removed {
            return Err(Rejection::ModelRemoved);
        }
        let of_model = record.limits.queue_limit.map(|limit| (record.queue.len(), limit));
        let of_device = (self.waiting, self.options.queue_limit);
        match of_model.into_iter().chain([of_device]).find(|(waiting, limit)| *waiting >= (*limit).max(1)) {
            Some((waiting, limit)) => Err(Rejection::QueueFull { waiting, limit }),
            None => Ok(()),
        }
    }

    /// New, accepted -> Waiting; Executing, to be tried again -> Waiting, in its old place.
    fn enqueue(&mut self, id: RequestId) {
        let Some(request) = self.requests.get_mut(&id) else { return };
        let Some(model) = self.models.get_mut(&request.model) else { return };
        request.state = RequestState::Waiting;
        model.queue.insert(request.sequence, id);
        self.waiting += 1;
        self.timers.set(request.deadline, Timer::Request(id));
        let model = request.model;
        self.relist(model);
    }

    /// Takes a request that waits out of its queue.
    fn dequeue(&mut self, id: RequestId) {
        let Some(request) = self.requests.get(&id) else { return };
        let Some(model) = self.models.get_mut(&request.model) else { return };
        if model.queue.remove(&request.sequence).is_some() {
            self.waiting -= 1;
            self.timers.clear(request.deadline, Timer::Request(id));
            let model = request.model;
            self.relist(model);
        }
    }

    /// Answers a request that nothing works on: from here on it is unknown.
    fn reply(&mut self, request: RequestId, result: Result<(), Rejection>, actions: &mut Vec<Action>) {
        if self.requests.remove(&request).is_some() {
            actions.push(Action::Reply { request, result });
        }
    }

    fn cancelled(&mut self, id: RequestId, now: Instant, actions: &mut Vec<Action>) {
        let Some(request) = self.requests.get(&id) else { return };
        match request.state {
            // Waiting, cancelled -> answered.
            RequestState::Waiting => {
                self.dequeue(id);
                self.reply(id, Err(Rejection::Cancelled), actions);
            }
            RequestState::Executing(execution) => {
                self.stop(execution, StopReason::Cancelled, now, actions);
                // Ended, cancelled: it is not tried again.
                if let Some(Execution { phase: Phase::Ended { verdict }, .. }) =
                    self.executions.get_mut(&execution)
                    && *verdict == Verdict::Retry
                {
                    *verdict = Verdict::Reply(Err(Rejection::Cancelled));
                }
            }
        }
    }

    /// Running, nobody wants it or its time is over -> Stopping. Other phases stay as they are.
    fn stop(&mut self, id: ExecutionId, reason: StopReason, now: Instant, actions: &mut Vec<Action>) {
        let Some(execution) = self.executions.get_mut(&id) else { return };
        let Phase::Running { stop_at } = execution.phase else { return };
        // A worker is killed only for an execution that takes too long, not because a client has gone.
        let too_long_at = execution.times_out_at.map(|at| at.max(now));
        let kill_at = too_long_at.and_then(|at| at.checked_add(self.options.stop_grace));
        self.timers.clear(stop_at, Timer::Execution(id));
        self.timers.set(kill_at, Timer::Execution(id));
        execution.phase = Phase::Stopping { reason, kill_at };
        self.workers.stop(execution.worker);
        actions.push(Action::Stop { execution: id });
    }

    fn worker_lost(&mut self, worker: WorkerId, actions: &mut Vec<Action>) {
        let Some(id) = self.workers.lost(worker) else { return };
        let Some(execution) = self.executions.get(&id) else { return };
        let verdict = match (execution.phase.stopped_for(), self.transfer_failure(execution)) {
            (Some(reason), _) => Verdict::Reply(Err(reason.rejection(execution.limit))),
            (None, Some(reason)) => Verdict::Reply(Err(Rejection::TransferFailed { reason })),
            (None, None) => Verdict::Retry,
        };
        let inputs_landed = execution.inputs != Inputs::Moving;
        self.end(id, verdict, inputs_landed, actions);
    }

    fn execution_finished(&mut self, id: ExecutionId, outcome: Outcome, actions: &mut Vec<Action>) {
        // A worker's last word may cross the news of its end: what is over, or as good as over, stays so.
        let Some(execution) = self.executions.get(&id) else { return };
        if matches!(execution.phase, Phase::Ended { .. }) {
            return;
        }
        let failure = self.transfer_failure(execution).map(|reason| Rejection::TransferFailed { reason });
        let stopped = execution.phase.stopped_for().map(|reason| reason.rejection(execution.limit));
        // What is completed had waited for its inputs, whether their landing has been heard of or not.
        let inputs_landed = execution.inputs != Inputs::Moving || outcome == Outcome::Completed;
        let verdict = match (outcome, failure) {
            (Outcome::Completed, None) => Verdict::Reply(Ok(())),
            (Outcome::Completed | Outcome::Failed(_), Some(failure)) => Verdict::Reply(Err(failure)),
            (Outcome::Failed(fault), None) if fault.class == FaultClass::Transfer => {
                Verdict::Reply(Err(Rejection::TransferFailed { reason: fault.message }))
            }
            (Outcome::Failed(fault), None) => Verdict::Reply(Err(Rejection::ExecutionFailed(fault))),
            (Outcome::Stopped, failure) => match stopped.or(failure) {
                Some(rejection) => Verdict::Reply(Err(rejection)),
                // It stopped without having been told to: as good as lost.
                None => Verdict::Retry,
            },
        };
        self.workers.done(execution.worker);
        self.end(id, verdict, inputs_landed, actions);
    }

    /// Why inputs or weights do not come, if so.
    fn transfer_failure(&self, execution: &Execution) -> Option<String> {
        match &execution.inputs {
            Inputs::Failed(reason) => Some(reason.clone()),
            Inputs::Moving | Inputs::Landed => self.switcher.failure(execution.model).map(str::to_owned),
        }
    }

    /// The worker is done or lost: Running, Stopping, Killed -> over, or Ended while the inputs are still moving.
    fn end(&mut self, id: ExecutionId, verdict: Verdict, inputs_landed: bool, actions: &mut Vec<Action>) {
        let Some(execution) = self.executions.get_mut(&id) else { return };
        self.timers.clear(execution.phase.due(), Timer::Execution(id));
        execution.phase = Phase::Ended { verdict };
        if inputs_landed {
            self.close(id, actions);
        }
    }

    /// Ended, and nothing moves any more -> over: the lease goes back, the request is answered or waits again.
    fn close(&mut self, id: ExecutionId, actions: &mut Vec<Action>) {
        if !matches!(self.executions.get(&id), Some(Execution { phase: Phase::Ended { .. }, .. })) {
            return;
        }
        let Some(Execution { request, model, lease, phase: Phase::Ended { verdict }, .. }) =
            self.executions.remove(&id)
        else {
            return;
        };
        if let Some(model) = self.models.get_mut(&model) {
            model.executing -= 1;
        }
        match verdict {
            Verdict::Reply(result) => self.reply(request, result, actions),
            Verdict::Retry => self.retry(request, actions),
        }
        self.switcher.release(lease, actions);
        self.forget_if_unused(model, actions);
    }

    /// Executing, lost -> Waiting again, or answered if that was the last attempt.
    fn retry(&mut self, id: RequestId, actions: &mut Vec<Action>) {
        let Some(request) = self.requests.get(&id) else { return };
        let attempts = request.attempts;
        let removed = self.models.get(&request.model).is_none_or(|model| model.removed);
        if attempts >= self.options.attempts {
            self.reply(id, Err(Rejection::WorkerLost { attempts }), actions);
        } else if removed {
            self.reply(id, Err(Rejection::ModelRemoved), actions);
        } else {
            self.enqueue(id);
        }
    }

    fn transfer_landed(&mut self, transfer: TransferId, actions: &mut Vec<Action>) {
        let (inputs_of, weights) = self.switcher.landed(transfer);
        if let Some(execution) = inputs_of {
            self.inputs_over(execution, Inputs::Landed, actions);
        }
        if let Some(model) = weights {
            if let Some(record) = self.models.get_mut(&model) {
                record.prefetch_failed = false;
            }
            self.forget_if_unused(model, actions);
        }
    }

    fn transfer_failed(&mut self, transfer: TransferId, reason: String, actions: &mut Vec<Action>) {
        let (inputs_of, weights) = self.switcher.failed(transfer, &reason, actions);
        if weights == Some(ModelId::TRAINING) && self.claim == Claim::Asked {
            // Asked, it does not come back -> Absent.
            self.claim = Claim::Absent;
            actions.push(Action::RefuseTraining);
        }
        if let Some(model) = weights {
            if let Some(record) = self.models.get_mut(&model) {
                record.prefetch_failed |= inputs_of.is_none();
            }
            self.relist(model);
            self.forget_if_unused(model, actions);
        }
        if let Some(execution) = inputs_of {
            self.inputs_over(execution, Inputs::Failed(reason), actions);
        }
    }

    /// An execution's inputs no longer move. It may be over already.
    fn inputs_over(&mut self, id: ExecutionId, inputs: Inputs, actions: &mut Vec<Action>) {
        let Some(execution) = self.executions.get_mut(&id) else { return };
        let ended = matches!(execution.phase, Phase::Ended { .. });
        if matches!(inputs, Inputs::Failed(_)) && !ended {
            actions.push(Action::PoisonInputs { execution: id });
        }
        execution.inputs = inputs;
        self.close(id, actions);
    }

    fn model_removed(&mut self, model: ModelId, actions: &mut Vec<Action>) {
        if self.unfit.remove(&model).is_some() {
            actions.push(Action::Forget { model });
            return;
        }
        let Some(record) = self.models.get_mut(&model) else { return };
        record.removed = true;
        let waiting: Vec<RequestId> = record.queue.values().copied().collect();
        for request in waiting {
            self.dequeue(request);
            self.reply(request, Err(Rejection::ModelRemoved), actions);
        }
        self.forget_if_unused(model, actions);
    }

    fn forget_if_unused(&mut self, model: ModelId, actions: &mut Vec<Action>) {
        let removed = self.models.get(&model).is_some_and(|record| record.removed);
        if removed && self.switcher.remove(model) {
            self.models.remove(&model);
            actions.push(Action::Forget { model });
        }
    }

    /// Does what is due.
    pub(super) fn expire(&mut self, now: Instant, actions: &mut Vec<Action>) {
        while let Some(timer) = self.timers.pop_due(now) {
            match timer {
                // Waiting, deadline -> answered.
                Timer::Request(id) => {
                    self.dequeue(id);
                    self.reply(id, Err(Rejection::Deadline), actions);
                }
                Timer::Execution(id) => self.execution_due(id, now, actions),
            }
        }
    }

    fn execution_due(&mut self, id: ExecutionId, now: Instant, actions: &mut Vec<Action>) {
        let Some(execution) = self.executions.get_mut(&id) else { return };
        match execution.phase {
            Phase::Running { .. } => {
                let too_long = execution.times_out_at.is_some_and(|at| at <= now);
                let reason = if too_long { StopReason::TimedOut } else { StopReason::Deadline };
                self.stop(id, reason, now, actions);
            }
            // Stopping, the grace is over -> Killed.
            Phase::Stopping { reason, .. } => {
                execution.phase = Phase::Killed { reason };
                self.workers.kill(execution.worker);
                actions.push(Action::Kill { worker: execution.worker });
            }
            Phase::Killed { .. } | Phase::Ended { .. } => {}
        }
    }

    /// Has those that lie in another place than their own leave it, where homes are fixed and nobody uses them.
    pub(super) fn send_home(&mut self, actions: &mut Vec<Action>) {
        for dropped in self.switcher.send_home(actions) {
            self.relist(dropped);
        }
    }

    /// Begins whatever can begin, also what could not before it was fetched in advance.
    pub(super) fn dispatch(&mut self, now: Instant, actions: &mut Vec<Action>) {
        loop {
            while self.waiting > 0
                && !self.held
                && let Some(worker) = self.workers.next_standby()
                && let Some(arena) = self.switcher.ledger().free_arena()
                && let Some(model) = self.pick(now)
                && let Some(action) = self.begin(model, worker, arena, now)
            {
                actions.push(action);
            }
            // No other while this one is on its way.
            let Some((model, place)) = self.pick_prefetch() else { break };
            let Some((transfer, load)) = self.switcher.prefetch(model, place) else { break };
            self.relist_load(model, Some(&load));
            actions.push(Action::Prefetch { transfer, model, load });
        }
        self.admit_training(actions);
    }

    /// Asked, and no request is in the way: Admitted if all is there, or else it is brought back.
    fn admit_training(&mut self, actions: &mut Vec<Action>) {
        let is_its_turn = self.requests.is_empty() || (self.held && self.executions.is_empty());
        if self.claim != Claim::Asked || !is_its_turn {
            return;
        }
        match self.switcher.claim_for_training() {
            Some(Claimed::Held) => {
                self.claim = Claim::Admitted;
                actions.push(Action::AdmitTraining);
            }
            Some(Claimed::Moves(transfer, load)) => {
                self.relist_load(ModelId::TRAINING, Some(&load));
                actions.push(Action::BringBack { transfer, load });
            }
            // What moves in its place or out of it has to land first.
            None => {}
        }
    }

    /// A model has moved in, if there was a load, and others have moved out for it.
    fn relist_load(&mut self, model: ModelId, load: Option<&Load>) {
        for evicted in load.into_iter().flat_map(|load| &load.evicted) {
            self.relist(*evicted);
        }
        self.relist(model);
    }

    /// Waiting, chosen -> Executing.
    fn begin(&mut self, id: ModelId, worker: WorkerId, arena: ArenaId, now: Instant) -> Option<Action> {
        let model = self.models.get_mut(&id)?;
        let (&sequence, &request) = model.queue.first_key_value()?;
        let execution = ExecutionId(self.next_execution);
        let (lease, transfer, load) = self.switcher.begin(execution, id, arena)?;
        self.next_execution += 1;
        let limit = model.limits.execution_timeout.unwrap_or(self.options.execution_timeout);
        model.executing += 1;
        self.dequeue(request);
        self.relist_load(id, load.as_ref());
        self.take_turn(id, sequence);
        let record = self.requests.get_mut(&request)?;
        record.state = RequestState::Executing(execution);
        record.attempts += 1;
        let times_out_at = now.checked_add(limit);
        let stop_at = times_out_at.into_iter().chain(record.deadline).min();
        self.timers.set(stop_at, Timer::Execution(execution));
        self.workers.activate(worker, execution);
        let (inputs, phase) = (Inputs::Moving, Phase::Running { stop_at });
        let begun = Execution {
            request,
            model: id,
            worker,
            arena,
            lease,
            transfer,
            inputs,
            limit,
            times_out_at,
            phase,
        };
        self.executions.insert(execution, begun);
        Some(Action::Execute { execution, request, worker, model: id, arena, transfer, load })
    }
}
