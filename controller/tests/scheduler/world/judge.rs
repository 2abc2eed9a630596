//! The judge: performs the scheduler's actions in the world, and objects to those that are wrong there.

use std::collections::BTreeSet;

use pswitch_controller::scheduler::{Action, Outcome, Rejection, RequestId};
use pswitch_mem_pool::{ModelId, Range};

use super::{Doorbell, Execution, Inputs, Place, Process, Request, Span, Training, Transfer, World};
use crate::desk::Execute;

impl World {
    pub(super) fn perform(&mut self, action: &Action) {
        match action {
            Action::Execute { .. } => self.execute(&Execute::of(action).unwrap()),
            Action::Prefetch { transfer, model, load } => {
                let moving = self.spans.values().filter(|span| span.place == Place::Moving).count();
                assert_eq!(moving, 0, "a prefetch is in nobody's way on the link");
                for evicted in &load.evicted {
                    assert!(!self.is_wanted(*evicted), "{evicted} has requests that wait");
                }
                assert!(self.is_wanted(*model));
                let training = self.spans.get(&ModelId::TRAINING).filter(|_| self.held);
                let in_its_way = training.is_some_and(|it| it.home.overlaps(&self.spans[model].home));
                assert!(!in_its_way, "{model} is fetched into training's place in its turn");
                self.load(*model, &load.evicted);
                let clear = load.evicted.clone();
                let (inputs_of, weights) = (None, Some(*model));
                self.transfers.push_back(Transfer { id: *transfer, inputs_of, weights, clear, begun: false });
            }
            Action::BringBack { transfer, load } => {
                assert_eq!(self.training, Training::Asking, "nobody has asked for it");
                self.assert_no_request_in_its_way();
                self.load(ModelId::TRAINING, &load.evicted);
                let (inputs_of, weights) = (None, Some(ModelId::TRAINING));
                let clear = load.evicted.clone();
                self.transfers.push_back(Transfer { id: *transfer, inputs_of, weights, clear, begun: false });
            }
            Action::AdmitTraining => {
                assert_eq!(self.training, Training::Asking, "nobody has asked for it");
                self.assert_no_request_in_its_way();
                assert_eq!(self.spans[&ModelId::TRAINING].place, Place::Resident);
                self.training = Training::Computing;
            }
            Action::RefuseTraining => {
                assert_eq!(self.training, Training::Asking, "nobody has asked for it");
                self.training = Training::Absent;
            }
            Action::Poison { model } => {
                let span = self.spans.get_mut(model).unwrap();
                assert_eq!(span.place, Place::Failed);
                span.doorbell = Doorbell::Poisoned;
            }
            Action::PoisonInputs { execution } => {
                let execution = self.executions.get_mut(execution).unwrap();
                assert!(execution.ended.is_none() && execution.inputs == Inputs::Moving);
                execution.inputs = Inputs::Failed;
            }
            Action::Clear { models } => {
                let failed = models.last().unwrap();
                assert!(!self.is_leased(*failed), "somebody waits at poisoned doorbells");
                let span = self.spans.get_mut(failed).unwrap();
                assert_eq!(span.place, Place::Failed);
                span.place = Place::Host;
                for model in models {
                    let span = self.spans.get_mut(model).unwrap();
                    assert_eq!(span.place, Place::Host, "{model} is in the pool");
                    span.doorbell = Doorbell::Clear;
                }
            }
            Action::Stop { execution } => {
                assert!(self.executions[execution].ended.is_none());
                let at_it = Process::Executing(*execution);
                let worker = self.workers.values_mut().find(|worker| worker.process == at_it).unwrap();
                assert!(!worker.told_to_stop, "told twice");
                worker.told_to_stop = true;
            }
            Action::Kill { worker } => {
                let worker = self.workers.get_mut(worker).unwrap();
                let Process::Executing(execution) = worker.process else { panic!("it does nothing") };
                let time = self.now.duration_since(self.executions[&execution].began);
                assert!(worker.told_to_stop && !worker.killed);
                assert!(time >= self.options.execution_timeout + self.options.stop_grace);
                worker.killed = true;
            }
            Action::Reply { request, result } => self.reply(*request, result),
            Action::Forget { model } => {
                assert!(!self.is_leased(*model) && !self.is_wanted(*model));
                if let Some(span) = self.spans.remove(model) {
                    assert!(span.removed && matches!(span.place, Place::Host | Place::Resident));
                }
            }
        }
    }

    fn reply(&mut self, id: RequestId, result: &Result<(), Rejection>) {
        let request =
            self.requests.remove(&id).unwrap_or_else(|| panic!("{id} is answered twice or unknown"));
        let mut attempts = self.executions.values().filter(|execution| execution.request == id);
        assert!(attempts.all(Execution::is_over), "somebody still uses the slot of {id}");
        let attempts = self.executions.values().filter(|execution| execution.request == id).count();
        assert!(attempts <= self.options.attempts as usize);
        match result {
            Ok(()) => {
                let last = self.executions.values().rev().find(|execution| execution.request == id);
                assert_eq!(last.and_then(|last| last.ended.clone()), Some(Some(Outcome::Completed)));
            }
            Err(Rejection::Draining) => assert!(self.draining && attempts == 0),
            Err(Rejection::QueueFull { waiting, limit }) => {
                assert_eq!((*limit, attempts), (self.options.queue_limit, 0));
                // This one was counted when it was submitted.
                let others = self.requests.values().filter(|request| request.waiting).count();
                assert!(waiting >= limit && others == *waiting);
            }
            Err(Rejection::UnknownModel | Rejection::NeverFits { .. }) => {
                assert!(!self.spans.contains_key(&request.model) && attempts == 0);
            }
            Err(Rejection::ModelRemoved) => assert!(self.spans[&request.model].removed),
            Err(Rejection::WorkerLost { attempts: told }) => {
                assert_eq!((attempts, *told), (self.options.attempts as usize, self.options.attempts));
            }
            Err(
                Rejection::Deadline
                | Rejection::Cancelled
                | Rejection::ExecutionTimedOut { .. }
                | Rejection::ExecutionFailed(_)
                | Rejection::TransferFailed { .. },
            ) => {}
        }
        assert!(self.answers.insert(id, result.clone()).is_none());
        let past = &mut self.past;
        self.executions.retain(|execution, record| {
            let over = record.request == id;
            past.extend(over.then_some(*execution));
            !over
        });
    }

    fn execute(&mut self, begun: &Execute) {
        assert!(!self.held, "it begins although something else has the device");
        self.judge_order(begun);
        let Execute { execution, request, worker, model, arena, transfer, evicted } = begun.clone();
        let record = self.requests.get_mut(&request).expect("it is accepted and not answered");
        assert!(record.waiting && record.model == model);
        record.waiting = false;
        let worker = self.workers.get_mut(&worker).expect("it is not reaped");
        assert!(worker.process == Process::Ready && !worker.killed, "a worker executes one at a time");
        worker.process = Process::Executing(execution);
        worker.told_to_stop = false;
        let busy = self.executions.values().find(|other| other.arena == arena && !other.is_over());
        assert!(busy.is_none(), "{arena} is used by {busy:?}");
        match &evicted {
            Some(evicted) => self.load(model, evicted),
            None => assert!(matches!(self.spans[&model].place, Place::Moving | Place::Resident)),
        }
        let (inputs, transfer_told, ended) = (Inputs::Moving, false, None);
        let record = Execution { request, model, arena, inputs, transfer_told, began: self.now, ended };
        assert!(self.executions.insert(execution, record).is_none());
        let weights = evicted.as_ref().map(|_| model);
        let clear = evicted.unwrap_or_default();
        let inputs_of = Some(execution);
        self.transfers.push_back(Transfer { id: transfer, inputs_of, weights, clear, begun: false });
    }

    /// A model begins to move: what is in its place goes, and nobody may be using that.
    fn load(&mut self, model: ModelId, evicted: &[ModelId]) {
        let home = self.spans[&model].home;
        for (other, span) in &mut self.spans {
            if *other == model {
                assert_eq!(span.place, Place::Host, "{model} is loaded once at a time");
                assert_eq!(span.doorbell, Doorbell::Clear, "{model} would be taken for landed");
                span.place = Place::Moving;
            } else if span.home.overlaps(&home) && span.place != Place::Host {
                assert_eq!(span.place, Place::Resident, "{other} moves and is evicted");
                assert!(evicted.contains(other), "{other} is in the place of {model}");
                span.place = Place::Host;
            } else {
                assert!(!evicted.contains(other), "{other} is in nobody's way");
            }
        }
        for other in evicted {
            assert!(!self.is_leased(*other), "{other} is evicted and leased");
        }
    }

    fn assert_no_request_in_its_way(&self) {
        let executing = self.executions.values().any(|execution| !execution.is_over());
        assert!(self.requests.is_empty() || (self.held && !executing), "training goes before requests");
    }

    fn is_leased(&self, model: ModelId) -> bool {
        (model == ModelId::TRAINING && self.training == Training::Computing)
            || self.executions.values().any(|execution| execution.model == model && !execution.is_over())
    }

    fn is_wanted(&self, model: ModelId) -> bool {
        self.requests.values().any(|request| request.waiting && request.model == model)
    }

    /// Whether a request of the model could begin now, with a worker and an arena at hand.
    fn could_begin(&self, model: ModelId) -> bool {
        let span = &self.spans[&model];
        let evictable = |(other, it): (&ModelId, &Span)| {
            *other == model
                || !it.home.overlaps(&span.home)
                || match it.place {
                    Place::Host => true,
                    Place::Moving | Place::Failed => false,
                    Place::Resident => !self.is_leased(*other),
                }
        };
        match span.place {
            Place::Moving | Place::Resident => true,
            Place::Failed => false,
            Place::Host => self.spans.iter().all(evictable),
        }
    }

    fn judge_order(&mut self, begun: &Execute) {
        let is_overdue = |request: &Request| self.now - request.submitted > self.options.max_wait;
        let chosen = &self.requests[&begun.request];
        let waiting = || self.requests.iter().filter(|(_, request)| request.waiting);
        let of_model = |model| waiting().filter(move |(_, request)| request.model == model);
        let oldest = of_model(begun.model).min_by_key(|(_, request)| request.sequence).unwrap();
        assert_eq!(*oldest.0, begun.request, "a model's requests begin in their order");

        // Who could begin, and stands in nobody's place who cannot yet.
        let wanted: BTreeSet<ModelId> = waiting().map(|(_, request)| request.model).collect();
        let blocked: Vec<Range> = wanted
            .iter()
            .filter(|model| !self.could_begin(**model))
            .map(|model| self.spans[model].home)
            .collect();
        let free = |model: &ModelId| {
            self.could_begin(*model) && !blocked.iter().any(|home| home.overlaps(&self.spans[model].home))
        };
        let others: Vec<&Request> = wanted
            .iter()
            .filter(|model| **model != begun.model && free(model))
            .filter_map(|model| of_model(*model).map(|(_, request)| request).min_by_key(|it| it.sequence))
            .collect();

        // Overdue requests first.
        let overdue = is_overdue(chosen);
        assert!(
            overdue || !others.iter().any(|other| is_overdue(other)),
            "an overdue request was passed over"
        );

        // Only so many of one model in a row while another could be served instead.
        let instead = others.iter().any(|other| is_overdue(other) == overdue);
        let in_a_row =
            if self.row.0 == Some(begun.model) && instead { self.row.1 + 1 } else { u32::from(instead) };
        assert!(in_a_row <= self.options.max_consecutive, "{} has {in_a_row} in a row", begun.model);

        // The oldest of all is passed over only so often while it could begin.
        let first = waiting().min_by_key(|(_, request)| request.sequence).map(|(id, request)| (*id, request));
        let (first, request) = first.unwrap();
        let counted = if self.passed_over.0 == Some(first) { self.passed_over.1 } else { 0 };
        let passed_over = counted + u32::from(first != begun.request && free(&request.model));
        assert!(
            passed_over <= self.options.max_consecutive + 1,
            "{first} is passed over {passed_over} times"
        );
        self.row = (Some(begun.model), in_a_row);
        self.passed_over = (Some(first), passed_over);
    }
}
