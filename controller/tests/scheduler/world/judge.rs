//! The judge: performs the scheduler's actions in the world, and objects to those that are wrong there.

use std::collections::{BTreeMap, BTreeSet};

use pswitch_controller::scheduler::{Action, Homes, Load, Outcome, Rejection, RequestId};
use pswitch_mem_pool::{ModelId, Range};

use super::{Doorbell, Execution, Inputs, Place, Process, Request, Span, Training, Transfer, Worker, World};
use crate::desk::{Execute, UNIT_BYTES};

/// The oldest request that waits of every model that has some.
type Heads<'a> = BTreeMap<ModelId, (RequestId, &'a Request)>;

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
                let in_its_way = training.is_some_and(|it| it.home.overlaps(&load.place));
                assert!(!in_its_way, "{model} is fetched into training's place in its turn");
                let wanted = self.spans.keys().copied().filter(|other| self.is_wanted(*other)).collect();
                self.load(*model, load, &wanted);
                let clear = load.evicted.clone();
                let (inputs_of, weights) = (None, Some(*model));
                self.transfers.push_back(Transfer { id: *transfer, inputs_of, weights, clear, begun: false });
            }
            Action::BringBack { transfer, load } => {
                assert_eq!(self.training, Training::Asking, "nobody has asked for it");
                self.assert_no_request_in_its_way();
                self.load(ModelId::TRAINING, load, &BTreeSet::new());
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
                for model in models {
                    assert!(!self.is_leased(*model), "somebody waits at the doorbells of {model}");
                    let span = self.spans.get_mut(model).unwrap();
                    match span.place {
                        Place::Host => {}
                        // It is the last: the others are those that it evicted.
                        Place::Failed => {
                            assert_eq!(models.last(), Some(model));
                            self.unsettled.remove(model);
                        }
                        // It was dropped.
                        Place::Resident => {
                            assert!(
                                self.homes == Homes::Fixed && span.home != span.own_home,
                                "{model} is at home"
                            );
                        }
                        Place::Moving => panic!("{model} is on its way"),
                    }
                    span.place = Place::Host;
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
        self.send_home();
        self.judge_order(begun);
        let Execute { execution, request, worker, model, arena, transfer, load } = begun.clone();
        let record = self.requests.get_mut(&request).expect("it is accepted and not answered");
        assert!(record.waiting && record.model == model);
        record.waiting = false;
        let worker = self.workers.get_mut(&worker).expect("it is not reaped");
        assert!(worker.process == Process::Ready && !worker.killed, "a worker executes one at a time");
        worker.process = Process::Executing(execution);
        worker.told_to_stop = false;
        let busy = self.executions.values().find(|other| other.arena == arena && !other.is_over());
        assert!(busy.is_none(), "{arena} is used by {busy:?}");
        match &load {
            Some(load) => self.load(model, load, &BTreeSet::new()),
            None => assert!(matches!(self.spans[&model].place, Place::Moving | Place::Resident)),
        }
        self.note_use(model);
        let (inputs, transfer_told, ended) = (Inputs::Moving, false, None);
        let record = Execution { request, model, arena, inputs, transfer_told, began: self.now, ended };
        assert!(self.executions.insert(execution, record).is_none());
        let weights = load.as_ref().map(|_| model);
        let clear = load.map(|load| load.evicted).unwrap_or_default();
        let inputs_of = Some(execution);
        self.transfers.push_back(Transfer { id: transfer, inputs_of, weights, clear, begun: false });
    }

    /// A model begins to move: what is in its place goes, and nobody may be using that.
    fn load(&mut self, model: ModelId, load: &Load, keep: &BTreeSet<ModelId>) {
        let Load { place: home, evicted } = load;
        let right = match self.homes {
            Homes::LeastRecentlyUsed if model != ModelId::TRAINING => self.place_by_use(model, keep),
            _ => Some(self.spans[&model].own_home),
        };
        assert_eq!(Some(*home), right, "{model} goes to another place");
        self.spans.get_mut(&model).unwrap().home = *home;
        self.note_use(model);
        for (other, span) in &mut self.spans {
            if *other == model {
                assert_eq!(span.place, Place::Host, "{model} is loaded once at a time");
                assert_eq!(span.doorbell, Doorbell::Clear, "{model} would be taken for landed");
                span.place = Place::Moving;
            } else if span.home.overlaps(home) && span.place != Place::Host {
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

    /// Where an allocator would find room that evicts what was used longest ago, found by trying.
    fn place_by_use(&self, model: ModelId, keep: &BTreeSet<ModelId>) -> Option<Range> {
        self.place_of_the_first(model, |other| self.is_evictable(other) && !keep.contains(&other))
    }

    fn place_of_the_first(&self, model: ModelId, may_go: impl Fn(ModelId) -> bool) -> Option<Range> {
        let others = self.spans.iter().filter(|(other, span)| **other != model && span.place != Place::Host);
        let (mut victims, stay): (Vec<_>, Vec<_>) = others.partition(|(other, _)| may_go(**other));
        victims.sort_by_key(|(other, span)| (span.last_use, **other));
        let bytes = self.spans[&model].home.bytes;
        let places = || {
            let begin = self.homes_part.offset;
            (begin..=self.homes_part.end() - bytes).step_by(usize::try_from(UNIT_BYTES).unwrap())
        };
        (0..=victims.len()).find_map(|gone| {
            let is_free = |place: &Range| {
                stay.iter().chain(&victims[gone..]).all(|(_, span)| !span.home.overlaps(place))
            };
            places().map(|offset| Range::new(offset, bytes)).find(is_free)
        })
    }

    /// Where homes are fixed, whoever is not in the pool has its own, unless its doorbells in the other are not clear.
    fn send_home(&mut self) {
        if self.homes == Homes::Fixed {
            let models = self.spans.keys().copied();
            let done: Vec<ModelId> = models
                .filter(|model| self.spans[model].place == Place::Host && !self.is_to_be_cleared(*model))
                .collect();
            for model in done {
                let span = self.spans.get_mut(&model).unwrap();
                span.home = span.own_home;
            }
        }
    }

    /// Whether a transfer was to clear the model's doorbells that is not over, or that failed and is not settled.
    fn is_to_be_cleared(&self, model: ModelId) -> bool {
        let reported = self.undelivered.iter().map(|report| &report.transfer);
        let under_way = self.transfers.iter().chain(reported).map(|transfer| &transfer.clear);
        under_way.chain(self.unsettled.values()).any(|clear| clear.contains(&model))
    }

    fn is_evictable(&self, model: ModelId) -> bool {
        self.spans[&model].place == Place::Resident && !self.is_leased(model)
    }

    fn is_present(&self, model: ModelId) -> bool {
        matches!(self.spans[&model].place, Place::Moving | Place::Resident)
    }

    /// Whether everybody has the place of its own.
    fn has_fixed_homes(&self) -> bool {
        self.homes == Homes::Fixed && self.spans.values().all(|span| span.home == span.own_home)
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
        let own_home = self.spans[&model].own_home;
        let is_no_obstacle = |(other, span): (&ModelId, &Span)| {
            span.place == Place::Host || !span.home.overlaps(&own_home) || self.is_evictable(*other)
        };
        match self.spans[&model].place {
            Place::Moving | Place::Resident => true,
            Place::Failed => false,
            // Whoever comes back to the place that it was evicted from waits for who evicted it.
            Place::Host if !self.has_fixed_homes() && self.is_to_be_cleared(model) => false,
            Place::Host if self.homes == Homes::Fixed => self.spans.iter().all(is_no_obstacle),
            Place::Host => self.place_by_use(model, &BTreeSet::new()).is_some(),
        }
    }

    /// Whether who cannot begin keeps another back: one that is in the place that it gets, or could come there.
    fn keeps_back(&self, blocked: ModelId, other: ModelId) -> bool {
        let (one, span) = (&self.spans[&blocked], &self.spans[&other]);
        if blocked == other {
            return false;
        }
        if self.has_fixed_homes() {
            return one.own_home.overlaps(&span.own_home);
        }
        let wanted = match one.place {
            Place::Host if self.homes == Homes::Fixed => one.own_home,
            Place::Host => self.place_of_the_first(blocked, |_| true).unwrap(),
            Place::Moving | Place::Resident | Place::Failed => one.home,
        };
        !self.is_present(other) || span.home.overlaps(&wanted)
    }

    fn is_overdue(&self, request: &Request) -> bool {
        self.now - request.submitted > self.options.max_wait
    }

    fn heads(&self) -> Heads<'_> {
        let mut heads = Heads::new();
        for (id, request) in self.requests.iter().filter(|(_, request)| request.waiting) {
            let head = heads.entry(request.model).or_insert((*id, request));
            if request.sequence < head.1.sequence {
                *head = (*id, request);
            }
        }
        heads
    }

    fn blocked(&self, heads: &Heads<'_>) -> Vec<ModelId> {
        heads.keys().copied().filter(|model| !self.could_begin(*model)).collect()
    }

    /// Whether a model with requests could begin, and stands in nobody's place who cannot yet.
    fn is_free(&self, model: ModelId, blocked: &[ModelId]) -> bool {
        !blocked.contains(&model) && !blocked.iter().any(|blocked| self.keeps_back(*blocked, model))
    }

    /// Whoever is free does not wait while a worker and an arena do.
    pub(super) fn judge_rest(&mut self) {
        self.send_home();
        let is_ready = |worker: &Worker| worker.process == Process::Ready && !worker.dead && !worker.killed;
        if self.held || !self.workers.values().any(is_ready) || self.scheduler.ledger().free_arena().is_none()
        {
            return;
        }
        let heads = self.heads();
        let blocked = self.blocked(&heads);
        let free = heads.keys().find(|model| self.is_free(**model, &blocked));
        assert!(free.is_none(), "{free:?} is in nobody's way and does not begin");
    }

    fn judge_order(&mut self, begun: &Execute) {
        let is_overdue = |request: &Request| self.is_overdue(request);
        let chosen = &self.requests[&begun.request];
        let heads = self.heads();
        assert_eq!(heads[&begun.model].0, begun.request, "a model's requests begin in their order");

        let blocked = self.blocked(&heads);
        let free = |model: ModelId| self.is_free(model, &blocked);
        let others: Vec<&Request> = heads
            .values()
            .map(|(_, request)| *request)
            .filter(|request| request.model != begun.model && free(request.model))
            .collect();

        // Overdue requests first.
        let overdue = is_overdue(chosen);
        assert!(
            overdue || !others.iter().any(|other| is_overdue(other)),
            "an overdue request was passed over"
        );

        // Only so many of one model in a row while another could be served instead.
        let last = self.row.0;
        let instead = others.iter().any(|other| is_overdue(other) == overdue);
        let in_a_row = if last == Some(begun.model) && instead { self.row.1 + 1 } else { u32::from(instead) };
        assert!(in_a_row <= self.options.max_consecutive, "{} has {in_a_row} in a row", begun.model);

        // The oldest of all is passed over only so often while it could begin.
        let (first, request) = *heads.values().min_by_key(|(_, request)| request.sequence).unwrap();
        let counted = if self.passed_over.0 == Some(first) { self.passed_over.1 } else { 0 };
        let passed_over = counted + u32::from(first != begun.request && free(request.model));
        assert!(
            passed_over <= self.options.max_consecutive + 1,
            "{first} is passed over {passed_over} times"
        );

        self.judge_turn(begun.model, &heads, &blocked);
        let older = |(_, request): &(RequestId, &Request)| {
            request.model != begun.model && request.sequence < chosen.sequence
        };
        self.passed = if heads.values().any(older) { self.passed + 1 } else { 0 };
        self.row = (Some(begun.model), in_a_row);
        self.passed_over = (Some(first), passed_over);
    }

    /// Whose turn it may be: overdue ones go first, then the model that was served last, who is there, who came first. It
    /// begins, or cannot and is not kept from it by who does.
    fn judge_turn(&self, begun: ModelId, heads: &Heads<'_>, blocked: &[ModelId]) {
        let last = self.row.0;
        let is_overdue = |request: &Request| self.is_overdue(request);
        let any_overdue = heads.values().any(|(_, request)| is_overdue(request));
        let in_turn = || {
            let all = heads.values().map(|(_, request)| *request);
            all.filter(|request| !any_overdue || is_overdue(request))
        };
        let oldest = |of: &dyn Fn(&Request) -> bool| {
            in_turn().filter(|request| of(request)).min_by_key(|request| request.sequence)
        };
        let is_other = |request: &Request| Some(request.model) != last;
        let is_there = |request: &Request| self.is_present(request.model);
        let mut turns = vec![oldest(&|_| true), oldest(&is_other)];
        if self.passed < self.options.max_consecutive {
            turns.push(oldest(&|request| !is_other(request) && is_there(request)));
            turns.push(oldest(&is_there));
            turns.push(oldest(&|request| is_other(request) && is_there(request)));
        }
        let mut turns = turns.into_iter().flatten().map(|request| request.model);
        assert!(
            turns.any(|turn| turn == begun || (blocked.contains(&turn) && !self.keeps_back(turn, begun))),
            "{begun} begins out of its turn, or in the place of whose turn it is"
        );
    }
}
