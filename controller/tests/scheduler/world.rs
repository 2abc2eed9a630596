//! A world for the scheduler: clients, worker processes, a transfer engine and the pool, with everything that can
//! happen to them, and a judge who checks every action against what is really the case.
//!
//! What the scheduler is told lags behind what is the case: landings wait in a queue until they are delivered, so that
//! completions overtake them as they may do in reality.

mod judge;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use pswitch_controller::scheduler::{
    Event, ExecutionId, Homes, ModelLimits, Outcome, Rejection, RequestId, Scheduler, SchedulerOptions,
    WorkerId,
};
use pswitch_mem_pool::{ArenaId, Ledger, ModelId, Range, Residency};
use pswitch_protocol::FaultClass;
use pswitch_transfer::TransferId;

use crate::desk::{UNIT_BYTES, fault, layout_with_training};

#[derive(Debug, Clone, Copy, PartialEq)]
enum Doorbell {
    Clear,
    Rung,
    Poisoned,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Place {
    Host,
    Moving,
    /// Its transfer failed, as the scheduler knows.
    Failed,
    Resident,
}

#[derive(Debug)]
struct Span {
    /// Where it is or was last.
    home: Range,
    own_home: Range,
    /// Its place in the order of uses.
    last_use: u64,
    place: Place,
    doorbell: Doorbell,
    removed: bool,
}

impl Span {
    fn new(home: Range, place: Place) -> Self {
        Self { home, own_home: home, last_use: 0, place, doorbell: Doorbell::Clear, removed: false }
    }
}

#[derive(Debug)]
struct Request {
    model: ModelId,
    sequence: u64,
    submitted: Instant,
    waiting: bool,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Process {
    Starting,
    Ready,
    Executing(ExecutionId),
}

#[derive(Debug)]
struct Worker {
    process: Process,
    told_to_stop: bool,
    hung: bool,
    /// It no longer runs; the scheduler hears of it when it is reaped.
    dead: bool,
    killed: bool,
    /// What it has said of its execution before it ended. The scheduler hears of it when it is reaped.
    last_word: Option<Outcome>,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Inputs {
    Moving,
    Landed,
    Failed,
}

#[derive(Debug)]
struct Execution {
    request: RequestId,
    model: ModelId,
    arena: ArenaId,
    /// In the arena, or poisoned: what the worker sees.
    inputs: Inputs,
    /// Whether the scheduler knows that the transfer is over.
    transfer_told: bool,
    began: Instant,
    /// How it ended, as the scheduler knows: `None` while the worker is at it, `Some(None)` if it was lost.
    ended: Option<Option<Outcome>>,
}

impl Execution {
    /// Neither a worker nor a transfer uses slot, arena or span, as the scheduler knows.
    fn is_over(&self) -> bool {
        match &self.ended {
            None => false,
            Some(Some(Outcome::Completed)) => true,
            Some(_) => self.transfer_told,
        }
    }
}

#[derive(Debug)]
struct Transfer {
    id: TransferId,
    inputs_of: Option<ExecutionId>,
    weights: Option<ModelId>,
    clear: Vec<ModelId>,
    begun: bool,
}

/// What training has of the pool, as it knows.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Training {
    Absent,
    Asking,
    Computing,
}

/// What the engine has said of a transfer and the scheduler has not heard.
#[derive(Debug)]
struct Report {
    transfer: Transfer,
    landed: bool,
}

/// Everything there is beside the scheduler.
pub(crate) struct World {
    pub(crate) scheduler: Scheduler,
    pub(crate) options: SchedulerOptions,
    now: Instant,
    spans: BTreeMap<ModelId, Span>,
    requests: BTreeMap<RequestId, Request>,
    answers: BTreeMap<RequestId, Result<(), Rejection>>,
    workers: BTreeMap<WorkerId, Worker>,
    /// Those of requests that are not answered.
    executions: BTreeMap<ExecutionId, Execution>,
    past: Vec<ExecutionId>,
    /// In the order of the stream.
    transfers: VecDeque<Transfer>,
    undelivered: VecDeque<Report>,
    /// What was to be cleared by the transfers of models that failed, until that is settled.
    unsettled: BTreeMap<ModelId, Vec<ModelId>>,
    next_model: u32,
    next_request: u64,
    next_worker: u32,
    draining: bool,
    held: bool,
    training: Training,
    homes: Homes,
    /// The part of the pool in which homes lie.
    homes_part: Range,
    next_use: u64,
    /// The model that was executed last, and how often in a row while others could have been.
    row: (Option<ModelId>, u32),
    /// The oldest request that waits, and how often others were begun that could have waited instead.
    passed_over: (Option<RequestId>, u32),
    /// Requests that were begun in a row while older ones of other models waited.
    passed: u32,
}

impl World {
    pub(crate) fn new(
        home_units: u64,
        arenas: u64,
        training_units: u64,
        workers: u32,
        options: SchedulerOptions,
    ) -> Self {
        let layout = layout_with_training(home_units, arenas, training_units);
        let homes = options.homes;
        let mut world = Self {
            scheduler: Scheduler::new(Ledger::new(&layout), options.clone()),
            options,
            now: Instant::now(),
            spans: BTreeMap::new(),
            requests: BTreeMap::new(),
            answers: BTreeMap::new(),
            workers: BTreeMap::new(),
            executions: BTreeMap::new(),
            past: Vec::new(),
            transfers: VecDeque::new(),
            undelivered: VecDeque::new(),
            unsettled: BTreeMap::new(),
            next_model: 0,
            next_request: 0,
            next_worker: 0,
            draining: false,
            held: false,
            training: Training::Absent,
            homes,
            homes_part: layout.homes,
            next_use: 1,
            row: (None, 0),
            passed_over: (None, 0),
            passed: 0,
        };
        if layout.training_gives_way() {
            world.spans.insert(ModelId::TRAINING, Span::new(layout.training, Place::Resident));
        }
        for _ in 0..workers {
            world.start_worker();
        }
        world
    }

    // ---- What can happen ----

    pub(crate) fn place_model(&mut self, units: u64) {
        let model = ModelId(self.next_model);
        self.next_model += 1;
        if let Ok(home) = self.scheduler.place(model, units * UNIT_BYTES, 1, ModelLimits::default()) {
            self.spans.insert(model, Span::new(home.span, Place::Host));
        }
        self.check();
    }

    pub(crate) fn remove_model(&mut self, nth: usize) {
        if let Some(model) = pick(self.spans.keys().filter(|model| **model != ModelId::TRAINING), nth) {
            self.spans.get_mut(&model).unwrap().removed = true;
            self.tell(Event::ModelRemoved { model });
        }
    }

    /// Numbers of models that never were or no longer are come too.
    pub(crate) fn submit(&mut self, nth: usize, deadline: Option<Duration>) {
        let model = ModelId(u32::try_from(nth).unwrap() % (self.next_model + 1));
        let (sequence, request) = (self.next_request, RequestId(self.next_request));
        self.next_request += 1;
        let deadline = deadline.map(|time| self.now + time);
        self.requests.insert(request, Request { model, sequence, submitted: self.now, waiting: true });
        self.tell(Event::Submitted { request, model, deadline });
    }

    pub(crate) fn cancel(&mut self, nth: usize) {
        // Answered ones too: a cancellation may cross the answer.
        let request = RequestId(nth as u64 % (self.next_request + 1));
        self.tell(Event::Cancelled { request });
    }

    pub(crate) fn start_worker(&mut self) {
        let worker = WorkerId(self.next_worker);
        self.next_worker += 1;
        let process = Process::Starting;
        let state =
            Worker { process, told_to_stop: false, hung: false, dead: false, killed: false, last_word: None };
        self.workers.insert(worker, state);
        self.tell(Event::WorkerStarting { worker });
    }

    pub(crate) fn worker_ready(&mut self, nth: usize) {
        let starting = self.workers.iter().filter(|(_, it)| it.process == Process::Starting && !it.dead);
        if let Some(worker) = pick(starting.map(|(id, _)| id), nth) {
            self.workers.get_mut(&worker).unwrap().process = Process::Ready;
            self.tell(Event::WorkerReady { worker });
        }
    }

    pub(crate) fn crash(&mut self, nth: usize) {
        if let Some(worker) = pick(self.workers.keys(), nth) {
            self.workers.get_mut(&worker).unwrap().dead = true;
        }
    }

    pub(crate) fn hang(&mut self, nth: usize) {
        if let Some(worker) = pick(self.workers.keys(), nth) {
            self.workers.get_mut(&worker).unwrap().hung = true;
        }
    }

    /// A worker that is dead, or was killed and dies now, is reaped; another takes its place.
    pub(crate) fn reap(&mut self, nth: usize) {
        let dying = self.workers.iter().filter(|(_, it)| it.dead || it.killed);
        let Some(worker) = pick(dying.map(|(id, _)| id), nth) else { return };
        let gone = self.workers.remove(&worker).unwrap();
        if let Process::Executing(execution) = gone.process {
            let ended = &mut self.executions.get_mut(&execution).unwrap().ended;
            *ended = Some(gone.last_word.clone());
            if let Some(outcome) = gone.last_word {
                self.tell(Event::ExecutionFinished { execution, outcome });
            }
        }
        self.tell(Event::WorkerLost { worker });
        self.start_worker();
    }

    /// A worker gets as far as it can: it sees a poisoned doorbell, or the stop flag, or completes if inputs and
    /// weights are there. Otherwise it waits.
    pub(crate) fn work(&mut self, nth: usize) {
        let Some((worker, id)) = self.executing(nth) else { return };
        let (told_to_stop, execution) = (self.workers[&worker].told_to_stop, &self.executions[&id]);
        let doorbell = self.spans[&execution.model].doorbell;
        let poisoned = execution.inputs == Inputs::Failed || doorbell == Doorbell::Poisoned;
        let complete = execution.inputs == Inputs::Landed && doorbell == Doorbell::Rung;
        // Half of those told to stop notice it only after their last operator.
        if complete && (!told_to_stop || nth.is_multiple_of(2)) {
            self.finish(worker, id, Outcome::Completed);
        } else if told_to_stop {
            self.finish(worker, id, Outcome::Stopped);
        } else if poisoned {
            self.finish(worker, id, Outcome::Failed(fault(FaultClass::Transfer)));
        }
    }

    /// The model raises, inputs there or not; or the worker stops though nobody told it to.
    pub(crate) fn raise(&mut self, nth: usize) {
        if let Some((worker, id)) = self.executing(nth) {
            let outcome = match nth % 3 {
                0 => Outcome::Failed(fault(FaultClass::Model)),
                1 => Outcome::Failed(fault(FaultClass::Transfer)),
                _ => Outcome::Stopped,
            };
            self.finish(worker, id, outcome);
        }
    }

    /// An operator breaks the device for its worker, which says so and ends. Until then the device may be at work.
    pub(crate) fn end_with(&mut self, nth: usize) {
        if let Some((worker, _)) = self.executing(nth) {
            let state = self.workers.get_mut(&worker).unwrap();
            state.dead = true;
            state.last_word = Some(Outcome::Failed(fault(FaultClass::Model)));
            self.tell(Event::WorkerEnding { worker });
        }
    }

    /// Something is said twice, or of what is long over.
    pub(crate) fn echo(&mut self, nth: usize) {
        if let Some(execution) = pick(self.past.iter(), nth) {
            self.tell(Event::ExecutionFinished { execution, outcome: Outcome::Completed });
        }
    }

    /// The next transfer of the stream begins: clears the doorbells that it is to clear. Or it lands. Inputs alone may
    /// overtake weights.
    pub(crate) fn transfer(&mut self, nth: usize) {
        let overtakes = |transfer: &Transfer| transfer.weights.is_none() && nth % 2 == 1;
        let next = self.transfers.iter().position(overtakes).unwrap_or(0);
        let Some(first) = self.transfers.get_mut(next) else { return };
        if !first.begun {
            first.begun = true;
            for model in &first.clear {
                if let Some(span) = self.spans.get_mut(model) {
                    span.doorbell = Doorbell::Clear;
                }
            }
            return;
        }
        let Some(transfer) = self.transfers.remove(next) else { return };
        if let Some(execution) = transfer.inputs_of {
            self.executions.get_mut(&execution).unwrap().inputs = Inputs::Landed;
        }
        if let Some(model) = transfer.weights {
            self.spans.get_mut(&model).unwrap().doorbell = Doorbell::Rung;
        }
        self.undelivered.push_back(Report { transfer, landed: true });
    }

    /// The first transfer of the stream fails, begun or not. Nothing is rung.
    pub(crate) fn break_transfer(&mut self) {
        if let Some(transfer) = self.transfers.pop_front() {
            self.undelivered.push_back(Report { transfer, landed: false });
        }
    }

    /// The scheduler hears from the engine.
    pub(crate) fn deliver(&mut self) {
        let Some(Report { transfer, landed }) = self.undelivered.pop_front() else { return };
        if let Some(execution) = transfer.inputs_of.and_then(|id| self.executions.get_mut(&id)) {
            execution.transfer_told = true;
        }
        if let Some(model) = transfer.weights {
            let span = self.spans.get_mut(&model).unwrap();
            assert_eq!(span.place, Place::Moving);
            span.place = if landed { Place::Resident } else { Place::Failed };
            if !landed {
                self.unsettled.insert(model, transfer.clear);
            }
        }
        let transfer = transfer.id;
        self.tell(if landed {
            Event::TransferLanded { transfer }
        } else {
            Event::TransferFailed { transfer, reason: "cut".to_owned() }
        });
    }

    pub(crate) fn advance(&mut self, time: Duration) {
        self.now += time;
        self.tell(Event::Tick);
    }

    /// Goes to the time that the scheduler asked for.
    pub(crate) fn tick(&mut self) {
        if let Some(at) = self.scheduler.next_deadline() {
            assert!(at > self.now, "what is due has been done");
            self.now = at;
            self.tell(Event::Tick);
        }
    }

    pub(crate) fn drain(&mut self) {
        self.draining = true;
        self.tell(Event::Draining);
    }

    /// Something else has the device, or has it no more.
    pub(crate) fn hold(&mut self, held: bool) {
        self.held = held;
        self.tell(if held { Event::Hold } else { Event::Release });
    }

    /// Training wants its place, where it gives way; or it is done there, or gives up.
    pub(crate) fn train(&mut self, trains: bool) {
        if trains && self.training == Training::Absent && self.spans.contains_key(&ModelId::TRAINING) {
            self.training = Training::Asking;
            self.tell(Event::TrainingAsks);
        } else if !trains {
            if self.training == Training::Computing {
                self.note_use(ModelId::TRAINING);
            }
            self.training = Training::Absent;
            self.tell(Event::TrainingLeaves);
        }
    }

    /// Models get their places by other rules.
    pub(crate) fn set_homes(&mut self, homes: Homes) {
        self.homes = homes;
        self.tell(Event::Homes { homes });
    }

    /// From here on everything works, if what hangs is killed: everything must come to an end.
    pub(crate) fn settle(&mut self) {
        self.hold(false);
        if self.training == Training::Computing {
            self.train(false);
        }
        let mut idle_rounds = 0;
        for _ in 0..10_000 {
            if self.scheduler.is_idle() && self.workers.values().all(|worker| !worker.killed) {
                break;
            }
            let before =
                (self.answers.len(), self.executions.len(), self.transfers.len(), self.undelivered.len());
            for nth in 0..self.workers.len() {
                self.worker_ready(nth);
                self.reap(nth);
                self.work(nth);
            }
            self.transfer(0);
            self.transfer(0);
            self.deliver();
            let after =
                (self.answers.len(), self.executions.len(), self.transfers.len(), self.undelivered.len());
            idle_rounds = if before == after { idle_rounds + 1 } else { 0 };
            if idle_rounds > 10 {
                self.tick();
            }
        }
        assert!(self.scheduler.is_idle(), "it comes to no end: {:#?}", self.scheduler);
        assert!(self.requests.is_empty(), "without an answer: {:?}", self.requests);
        assert_eq!(self.answers.len() as u64, self.next_request, "one answer a request");
        assert!(self.executions.is_empty());
        assert!(self.spans.values().all(|span| !span.removed), "what was removed is forgotten");
        if self.spans.contains_key(&ModelId::TRAINING) {
            // Nobody is in its way any more.
            self.train(true);
            for _ in 0..2 {
                self.transfer(0);
            }
            self.deliver();
            assert_eq!(self.training, Training::Computing);
            self.train(false);
        }
        let report = self.scheduler.ledger().report();
        assert!(report.models.iter().all(|model| model.leases == 0), "{report}");
        assert_eq!(report.moving_bytes, 0, "{report}");
        assert_eq!(self.scheduler.next_deadline(), None);
    }

    /// The answers of all requests so far.
    pub(crate) fn answers(&self) -> impl Iterator<Item = &Result<(), Rejection>> {
        self.answers.values()
    }

    // ---- What the scheduler makes of it ----

    fn tell(&mut self, event: Event) {
        let actions = self.scheduler.handle(event, self.now);
        // Whose attempts are over without an answer waits again.
        let busy: BTreeSet<RequestId> =
            self.executions.values().filter(|it| !it.is_over()).map(|it| it.request).collect();
        for (id, request) in &mut self.requests {
            request.waiting |= !busy.contains(id);
        }
        for action in &actions {
            self.perform(action);
        }
        self.judge_rest();
        self.check();
    }

    fn note_use(&mut self, model: ModelId) {
        self.spans.get_mut(&model).unwrap().last_use = self.next_use;
        self.next_use += 1;
    }

    fn check(&self) {
        self.scheduler.check().unwrap();
        let waiting = self.requests.values().filter(|request| request.waiting).count();
        assert_eq!(self.scheduler.waiting(), waiting);
        // Requests that are tried again wait on top.
        assert!(waiting <= self.options.queue_limit + self.scheduler.ledger().arenas());
        for (model, span) in &self.spans {
            let present = matches!(span.place, Place::Moving | Place::Resident);
            if present {
                assert_eq!(self.scheduler.ledger().home(*model).unwrap().span, span.home, "{model}");
            }
            if *model == ModelId::TRAINING {
                let known = self.scheduler.ledger().state(*model);
                assert_eq!(known.map(|state| state == Residency::Host), Ok(span.place == Place::Host));
                continue;
            }
            assert_eq!(self.scheduler.model(*model).map(|counts| counts.present), Some(present), "{model}");
        }
        if let Some(at) = self.scheduler.next_deadline() {
            assert!(at > self.now, "what is due has been done");
        }
    }

    fn executing(&self, nth: usize) -> Option<(WorkerId, ExecutionId)> {
        let able = self.workers.iter().filter(|(_, worker)| !worker.dead && !worker.hung);
        pick(able.map(|(id, _)| id), nth).and_then(|id| match self.workers[&id].process {
            Process::Executing(execution) => Some((id, execution)),
            Process::Starting | Process::Ready => None,
        })
    }

    fn finish(&mut self, worker: WorkerId, id: ExecutionId, outcome: Outcome) {
        self.workers.get_mut(&worker).unwrap().process = Process::Ready;
        self.executions.get_mut(&id).unwrap().ended = Some(Some(outcome.clone()));
        self.tell(Event::ExecutionFinished { execution: id, outcome });
    }
}

fn pick<'a, T: Copy + 'a>(from: impl Iterator<Item = &'a T>, nth: usize) -> Option<T> {
    let all: Vec<T> = from.copied().collect();
    (!all.is_empty()).then(|| all[nth % all.len()])
}
