//! Which request runs next, where, and which weights move for it: scheduler and switcher as one state machine.
//!
//! [`Scheduler::handle`] takes an [`Event`] and the time, and returns the [`Action`]s that follow. It does no IO, asks
//! no clock and has no threads; a driver turns actions into messages and transfers and what comes back into events.
//!
//! # Order of service
//!
//! Whenever a worker is on standby and an arena is free:
//!
//! 1. Requests that have waited longer than [`max_wait`](SchedulerOptions::max_wait) go before all others, whatever
//!    is resident. What follows applies among them, and among the others if there are none.
//! 2. The model that was served last goes on, then models whose weights are in the pool or on their way, then the
//!    oldest request. But after [`max_consecutive`](SchedulerOptions::max_consecutive) requests of one model in a row
//!    it is another's turn, and an older request is passed over at most as often in a row.
//! 3. If the model whose turn it is has no room, because executions hold weights in its place, nothing new begins in
//!    that place until it has; others run meanwhile.
//!
//! Between [`Event::Hold`] and [`Event::Release`] nothing begins at all.
//!
//! The next request goes to the worker that finished last: it is awake. What cannot run yet is prefetched, one model
//! at a time, the oldest request's first, where the place is neither held nor wanted by requests that wait.
//!
//! # Places
//!
//! By [`Homes`] a model that moves in goes to its own home, or to a place that it is given anew: `places.rs`. In that case a
//! request that has no room keeps back all that would have to move in, and whoever lies where it is to go. Only the model of
//! the oldest request that cannot run is prefetched.
//!
//! # Training
//!
//! Where training's part of the pool gives way to models, it is one more span to the switcher: [`Event::TrainingAsks`] has it
//! brought back and held once no request is there, or [`Event::Hold`] keeps them; while it is held, models that overlap
//! with it do not begin. After [`Event::TrainingLeaves`] they evict it like any other.
//!
//! # Promises
//!
//! Every accepted request gets exactly one [`Action::Reply`], and only when neither a worker nor a transfer touches its
//! slot any more. In return the driver promises that every transfer ends in [`Event::TransferLanded`] or
//! [`Event::TransferFailed`], that every worker killed ends in [`Event::WorkerLost`], that
//! [`Event::ExecutionFinished`] with [`Outcome::Completed`] comes only after the inputs had landed, and that lost
//! workers are replaced for as long as requests wait, while draining too.

mod check;
mod handle;
mod heads;
mod messages;
mod places;
mod policy;
mod records;
mod switcher;
mod timers;
mod workers;

use std::collections::{BTreeMap, HashMap};
use std::time::Instant;

use pswitch_mem_pool::{Home, Ledger, ModelId, PoolError};

use heads::Heads;
pub use messages::{
    Action, Event, ExecutionId, Homes, Load, ModelLimits, Outcome, Rejection, RequestId, SchedulerOptions,
    WorkerId,
};
use policy::Turn;
use records::{Claim, Execution, Model, Request};
use switcher::Switcher;
use timers::Timers;
pub use workers::WorkerCounts;
use workers::Workers;

/// The scheduler of one device. See the [module](self).
///
/// ```
/// use std::time::{Duration, Instant};
///
/// use pswitch_controller::scheduler::{
///     Action, Event, Homes, ModelLimits, Outcome, RequestId, Scheduler, SchedulerOptions, WorkerId,
/// };
/// use pswitch_mem_pool::{Ledger, ModelId, PoolLayout};
///
/// let options = SchedulerOptions {
///     max_consecutive: 16,
///     max_wait: Duration::from_millis(250),
///     queue_limit: 1024,
///     execution_timeout: Duration::from_secs(30),
///     stop_grace: Duration::from_secs(2),
///     attempts: 2,
///     prefetch: true,
///     homes: Homes::Fixed,
/// };
/// let layout = PoolLayout::new(64 << 20, 1, 8 << 20)?;
/// let mut scheduler = Scheduler::new(Ledger::new(&layout), options);
/// let (model, request, worker) = (ModelId(0), RequestId(0), WorkerId(0));
/// scheduler.place(model, 16 << 20, 4, ModelLimits::default())?;
///
/// let now = Instant::now();
/// assert!(scheduler.handle(Event::WorkerReady { worker }, now).is_empty());
/// let actions = scheduler.handle(Event::Submitted { request, model, deadline: None }, now);
/// let [Action::Execute { execution, transfer, load: Some(_), .. }] = &actions[..] else { panic!("{actions:?}") };
///
/// assert!(scheduler.handle(Event::TransferLanded { transfer: *transfer }, now).is_empty());
/// let done = Event::ExecutionFinished { execution: *execution, outcome: Outcome::Completed };
/// assert_eq!(scheduler.handle(done, now), [Action::Reply { request, result: Ok(()) }]);
/// assert!(scheduler.is_idle());
/// # Ok::<(), pswitch_mem_pool::PoolError>(())
/// ```
#[derive(Debug)]
pub struct Scheduler {
    options: SchedulerOptions,
    switcher: Switcher,
    models: BTreeMap<ModelId, Model>,
    /// Models that can never be in the pool: bytes that they need, bytes that there are.
    unfit: BTreeMap<ModelId, (u64, u64)>,
    /// The oldest request that waits, of every model that has one.
    heads: Heads,
    /// Requests that wait.
    waiting: usize,
    requests: HashMap<RequestId, Request>,
    executions: BTreeMap<ExecutionId, Execution>,
    workers: Workers,
    timers: Timers,
    turn: Turn,
    /// What training wants of the place that it may share with models.
    claim: Claim,
    draining: bool,
    /// Nothing begins.
    held: bool,
    next_sequence: u64,
    next_execution: u64,
}

impl Scheduler {
    /// A scheduler over a pool in which no model has been placed. It runs as many executions at a time as the pool
    /// has arenas.
    #[must_use]
    pub fn new(ledger: Ledger, options: SchedulerOptions) -> Self {
        Self {
            switcher: Switcher::new(ledger, options.homes),
            options,
            models: BTreeMap::new(),
            unfit: BTreeMap::new(),
            heads: Heads::default(),
            waiting: 0,
            requests: HashMap::new(),
            executions: BTreeMap::new(),
            workers: Workers::default(),
            timers: Timers::default(),
            turn: Turn::default(),
            claim: Claim::Absent,
            draining: false,
            held: false,
            next_sequence: 0,
            next_execution: 0,
        }
    }

    /// Whether weights move ahead of their turn from the next event on, instead of what the options say.
    pub fn set_prefetch(&mut self, prefetch: bool) {
        self.options.prefetch = prefetch;
    }

    /// Gives a model its home. From here on its requests are accepted, so every worker that is ready must have built it
    /// over that home before the first [`Event::Submitted`]; its doorbells must be clear.
    ///
    /// # Errors
    /// As [`Ledger::place`]. A model that can never fit is remembered, and its requests are answered with the numbers.
    pub fn place(
        &mut self,
        model: ModelId,
        span_bytes: u64,
        doorbells: u32,
        limits: ModelLimits,
    ) -> Result<Home, PoolError> {
        let placed = self.switcher.place(model, span_bytes, doorbells);
        match &placed {
            Ok(_) => {
                let queue = BTreeMap::new();
                let record = Model { limits, queue, executing: 0, removed: false, prefetch_failed: false };
                self.models.insert(model, record);
                self.unfit.remove(&model);
            }
            Err(PoolError::NeverFits { asked_bytes, capacity_bytes, .. }) => {
                self.unfit.insert(model, (*asked_bytes, *capacity_bytes));
            }
            Err(_) => {}
        }
        placed
    }

    /// Takes what happened and returns what is to be done, in that order. `now` never goes back.
    pub fn handle(&mut self, event: Event, now: Instant) -> Vec<Action> {
        let mut actions = Vec::new();
        self.apply(event, now, &mut actions);
        self.expire(now, &mut actions);
        self.send_home(&mut actions);
        self.dispatch(now, &mut actions);
        actions
    }

    /// When [`Event::Tick`] is wanted, if nothing happens before.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Instant> {
        self.timers.next()
    }

    /// Whether every request is answered and no transfer is under way.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.requests.is_empty() && self.switcher.is_idle()
    }

    /// Requests that wait, of all models.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.waiting
    }

    /// Requests that are executed, those included that are being stopped.
    #[must_use]
    pub fn executing(&self) -> usize {
        self.executions.len()
    }

    /// What there is to know about a model that has a home.
    #[must_use]
    pub fn model(&self, model: ModelId) -> Option<ModelCounts> {
        let record = self.models.get(&model)?;
        let (loads, evictions) = self.switcher.counts(model);
        let present = self.switcher.is_present(model);
        Some(ModelCounts {
            waiting: record.queue.len(),
            executing: record.executing,
            present,
            loads,
            evictions,
        })
    }

    /// Workers by state.
    #[must_use]
    pub fn workers(&self) -> WorkerCounts {
        self.workers.counts()
    }

    /// The worker that executes the next request, if that can begin at once; else it is the one that is done first.
    #[must_use]
    pub fn next_worker(&self) -> Option<WorkerId> {
        self.workers.next_standby().filter(|_| self.ledger().free_arena().is_some())
    }

    /// The account of the pool.
    #[must_use]
    pub fn ledger(&self) -> &Ledger {
        self.switcher.ledger()
    }
}

/// One model in numbers, for metrics and for the choice between devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ModelCounts {
    /// Requests that wait.
    pub waiting: usize,
    /// Requests that are executed.
    pub executing: usize,
    /// Whether its weights are in the pool or on their way.
    pub present: bool,
    /// Times that its weights began to move in.
    pub loads: u64,
    /// Times that its weights were evicted.
    pub evictions: u64,
}
