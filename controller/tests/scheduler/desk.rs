//! A scheduler whose driver, workers and engine are the test itself.

use std::time::{Duration, Instant};

use pswitch_controller::scheduler::{
    Action, Event, ExecutionId, Homes, Load, ModelLimits, Outcome, Rejection, RequestId, Scheduler,
    SchedulerOptions, WorkerId,
};
use pswitch_mem_pool::{ArenaId, Ledger, ModelId, PoolLayout, Range};
use pswitch_protocol::{ExecutionFault, FaultClass};
use pswitch_transfer::TransferId;

/// The least that takes a place of its own in the pool.
pub(crate) const UNIT_BYTES: u64 = 512;
const HOMES_OFFSET: u64 = 4096;

/// A pool with that many units for homes.
pub(crate) fn layout(home_units: u64, arenas: u64) -> PoolLayout {
    let homes = Range::new(HOMES_OFFSET, home_units * UNIT_BYTES);
    let arenas = (0..arenas).map(|index| Range::new(homes.end() + index * UNIT_BYTES, UNIT_BYTES)).collect();
    PoolLayout { doorbells: Range::new(0, HOMES_OFFSET), homes, arenas, training: Range::default() }
}

/// The same, with the first of those units for training while no model needs them.
pub(crate) fn layout_with_training(home_units: u64, arenas: u64, training_units: u64) -> PoolLayout {
    layout(home_units, arenas).with_training_in_homes(training_units * UNIT_BYTES).unwrap()
}

pub(crate) fn options() -> SchedulerOptions {
    SchedulerOptions {
        max_consecutive: 3,
        max_wait: Duration::from_millis(100),
        queue_limit: 100,
        execution_timeout: Duration::from_secs(10),
        stop_grace: Duration::from_secs(1),
        attempts: 2,
        prefetch: true,
        homes: Homes::Fixed,
    }
}

pub(crate) const fn model(id: u32) -> ModelId {
    ModelId(id)
}

pub(crate) fn fault(class: FaultClass) -> ExecutionFault {
    ExecutionFault { class, message: format!("{class:?}") }
}

/// The fields of [`Action::Execute`].
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Execute {
    pub(crate) execution: ExecutionId,
    pub(crate) request: RequestId,
    pub(crate) worker: WorkerId,
    pub(crate) model: ModelId,
    pub(crate) arena: ArenaId,
    pub(crate) transfer: TransferId,
    pub(crate) load: Option<Load>,
}

impl Execute {
    pub(crate) fn of(action: &Action) -> Option<Self> {
        let Action::Execute { execution, request, worker, model, arena, transfer, load } = action else {
            return None;
        };
        let (execution, request, worker) = (*execution, *request, *worker);
        let (model, arena, transfer) = (*model, *arena, *transfer);
        Some(Self { execution, request, worker, model, arena, transfer, load: load.clone() })
    }

    /// Models that made room for its weights, if they had to come.
    pub(crate) fn evicted(&self) -> Option<Vec<ModelId>> {
        self.load.as_ref().map(|load| load.evicted.clone())
    }

    /// Where they go, in units from the begin of the homes.
    #[track_caller]
    pub(crate) fn place(&self) -> u64 {
        (self.load.as_ref().expect("its weights come").place.offset - HOMES_OFFSET) / UNIT_BYTES
    }
}

/// The only action, which must be to execute.
#[track_caller]
pub(crate) fn execute(actions: &[Action]) -> Execute {
    match actions {
        [action] => Execute::of(action).unwrap_or_else(|| panic!("not to execute: {action:?}")),
        _ => panic!("not one action: {actions:?}"),
    }
}

pub(crate) fn ok(request: u64) -> Action {
    Action::Reply { request: RequestId(request), result: Ok(()) }
}

pub(crate) fn rejected(request: u64, rejection: Rejection) -> Action {
    Action::Reply { request: RequestId(request), result: Err(rejection) }
}

/// Requests and workers have the numbers that the test gives them; models 0, 1, 2 ... the sizes given at the start.
pub(crate) struct Desk {
    pub(crate) scheduler: Scheduler,
    pub(crate) now: Instant,
}

impl Desk {
    /// One arena.
    pub(crate) fn new(home_units: u64, model_units: &[u64]) -> Self {
        Self::with(home_units, 1, model_units, options())
    }

    pub(crate) fn with(home_units: u64, arenas: u64, model_units: &[u64], options: SchedulerOptions) -> Self {
        let mut scheduler = Scheduler::new(Ledger::new(&layout(home_units, arenas)), options);
        for (id, units) in (0..).zip(model_units) {
            scheduler.place(ModelId(id), units * UNIT_BYTES, 1, ModelLimits::default()).unwrap();
        }
        Self { scheduler, now: Instant::now() }
    }

    /// One arena, and the first units of the homes for training.
    pub(crate) fn beside_training(home_units: u64, training_units: u64, model_units: &[u64]) -> Self {
        Self::beside_training_with(home_units, training_units, model_units, options())
    }

    pub(crate) fn beside_training_with(
        home_units: u64,
        training_units: u64,
        model_units: &[u64],
        options: SchedulerOptions,
    ) -> Self {
        let layout = layout_with_training(home_units, 1, training_units);
        let mut scheduler = Scheduler::new(Ledger::new(&layout), options);
        for (id, units) in (0..).zip(model_units) {
            scheduler.place(ModelId(id), units * UNIT_BYTES, 1, ModelLimits::default()).unwrap();
        }
        Self { scheduler, now: Instant::now() }
    }

    pub(crate) fn at_work(mut self, workers: u32) -> Self {
        for worker in 0..workers {
            assert_eq!(self.ready(worker), []);
        }
        self
    }

    #[track_caller]
    pub(crate) fn event(&mut self, event: Event) -> Vec<Action> {
        let actions = self.scheduler.handle(event, self.now);
        self.scheduler.check().unwrap();
        actions
    }

    pub(crate) fn ready(&mut self, worker: u32) -> Vec<Action> {
        self.event(Event::WorkerStarting { worker: WorkerId(worker) });
        self.event(Event::WorkerReady { worker: WorkerId(worker) })
    }

    #[track_caller]
    pub(crate) fn lose(&mut self, worker: WorkerId) -> Vec<Action> {
        self.event(Event::WorkerLost { worker })
    }

    #[track_caller]
    pub(crate) fn submit(&mut self, request: u64, id: u32) -> Vec<Action> {
        self.event(Event::Submitted { request: RequestId(request), model: model(id), deadline: None })
    }

    #[track_caller]
    pub(crate) fn submit_until(&mut self, request: u64, id: u32, time: Duration) -> Vec<Action> {
        let deadline = Some(self.now + time);
        self.event(Event::Submitted { request: RequestId(request), model: model(id), deadline })
    }

    #[track_caller]
    pub(crate) fn cancel(&mut self, request: u64) -> Vec<Action> {
        self.event(Event::Cancelled { request: RequestId(request) })
    }

    #[track_caller]
    pub(crate) fn land(&mut self, transfer: TransferId) -> Vec<Action> {
        self.event(Event::TransferLanded { transfer })
    }

    #[track_caller]
    pub(crate) fn fail(&mut self, transfer: TransferId) -> Vec<Action> {
        self.event(Event::TransferFailed { transfer, reason: "cut".to_owned() })
    }

    #[track_caller]
    pub(crate) fn finish(&mut self, execution: ExecutionId, outcome: Outcome) -> Vec<Action> {
        self.event(Event::ExecutionFinished { execution, outcome })
    }

    /// Its transfer lands and it completes; returns what follows the reply.
    #[track_caller]
    pub(crate) fn complete(&mut self, running: &Execute) -> Vec<Action> {
        let mut actions = self.land(running.transfer);
        actions.extend(self.finish(running.execution, Outcome::Completed));
        let reply = actions.iter().position(|action| *action == ok(running.request.0));
        actions.remove(reply.unwrap_or_else(|| panic!("no reply to {running:?}: {actions:?}")));
        actions
    }

    /// Lets everything run one after the other, with no prefetch in between; returns the requests in the order in which
    /// they began, with their models.
    #[track_caller]
    pub(crate) fn drain(&mut self, first: Execute) -> Vec<(u64, u32)> {
        let mut order = Vec::new();
        let mut running = Some(first);
        while let Some(current) = running.take() {
            order.push((current.request.0, current.model.0));
            running = self.complete(&current).iter().find_map(Execute::of);
        }
        assert!(self.scheduler.is_idle());
        order
    }

    pub(crate) fn wait(&mut self, time: Duration) {
        self.now += time;
    }

    /// Goes to the time that the scheduler asked for.
    #[track_caller]
    pub(crate) fn tick(&mut self) -> Vec<Action> {
        self.now = self.scheduler.next_deadline().expect("nothing is due");
        self.event(Event::Tick)
    }
}
