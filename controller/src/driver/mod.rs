//! The driver of one device: the loop that turns events into the scheduler's actions, and actions into IO.
//!
//! One thread owns the scheduler, the workers' connections and the engine. It sleeps in one poll over its mailbox and
//! all workers, and wakes for mail, messages and deadlines; nothing in it waits for anything else. The way of a
//! request: [`Mail::Submit`] -> [`Action::Execute`] -> one message to a worker and one transfer -> the worker's
//! answer -> [`Action::Reply`].

mod held_back;
mod home;
mod inputs;
mod links;
mod mail;
mod perform;
mod refusal;
mod workers;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use mio::{Events, Poll, Waker};
use pswitch_device::{Device, DeviceError, HostSlice, PinnedMemory};
use pswitch_mem_pool::{
    ArenaDivision, ArenaId, HostStore, Ledger, ModelId, Pool, PoolError, Range, Residency,
};
use pswitch_protocol::{DeviceSpec, Executed, ExecutionFault, Region, ToWorker};
use pswitch_transfer::{Engine, Plan, TransferError};
use tokio::sync::oneshot;

use crate::error::ControllerError;
use crate::scheduler::{Event, ExecutionId, RequestId, Scheduler, SchedulerOptions, WorkerId};
use crate::service::ServiceError;
use crate::supervisor::Supervisor;
use crate::training::{Demand, Gate, Room, Share, TurnAction};
use held_back::HeldBack;
use home::HomedModel;
pub(crate) use links::OutsideUse;
use links::{Attachment, Links};
pub(crate) use mail::{
    DriverView, Finished, HostTables, Job, JobInput, JobTimes, Mail, Mailbox, ModelSpec,
    PROFILE_ALIGNMENT_BYTES, SharedView,
};

/// Time that a worker has to map what is shared and build its models, before it counts as hung.
const STARTUP_TIMEOUT: Duration = Duration::from_secs(300);

/// Transfers in a row that may fail in CUDA's driver before the server gives up: the GPU will not come back to this process.
const BROKEN_TRANSFERS: u32 = 3;

/// What a driver is made of.
pub(crate) struct DriverParts {
    pub(crate) name: String,
    pub(crate) device: Arc<dyn Device>,
    pub(crate) pool: Pool,
    pub(crate) store: Arc<HostStore>,
    pub(crate) slots: PinnedMemory,
    pub(crate) supervisor: Arc<Supervisor>,
    pub(crate) options: SchedulerOptions,
    pub(crate) workers: usize,
    pub(crate) threads: u32,
    /// How long the driver and its workers look for what comes next before they sleep.
    pub(crate) spin: Duration,
    /// Whether workers may wait by kernels on a GPU, since nobody else computes on it while one executes: no other worker, and
    /// no task.
    pub(crate) waits_by_kernels: bool,
    /// Closed while there are requests, where tasks train in between.
    pub(crate) gate: Option<Arc<Gate>>,
    /// States of tasks, where they give way to models.
    pub(crate) room: Option<Room>,
    /// The share of the device that training has although requests never end.
    pub(crate) training_share: f64,
}

/// A driver that runs; dropping it ends it and its workers.
#[derive(Debug)]
pub(crate) struct DriverHandle {
    mailbox: Mailbox,
    /// Whether it and its workers look for what comes before they sleep.
    looks_out: bool,
    view: SharedView,
    thread: Option<JoinHandle<()>>,
}

impl DriverHandle {
    /// Starts the loop and the workers.
    pub(crate) fn start(parts: DriverParts) -> Result<Self, ControllerError> {
        let failed = |what: &'static str| move |source| ControllerError::System { what, source };
        let poll = Poll::new().map_err(failed("a poll"))?;
        let waker = Waker::new(poll.registry(), links::MAILBOX).map_err(failed("a waker"))?;
        let (mailbox, receiver) = Mailbox::new(waker);
        let view = SharedView::default();
        let (name, looks_out) = (parts.name.clone(), !parts.spin.is_zero());
        let driver = Driver::new(parts, poll, mailbox.clone(), receiver, view.clone())?;
        let thread = std::thread::Builder::new()
            .name(format!("pswitch-{name}"))
            .spawn(move || driver.run())
            .map_err(failed("a thread"))?;
        Ok(Self { mailbox, looks_out, view, thread: Some(thread) })
    }

    pub(crate) fn mailbox(&self) -> &Mailbox {
        &self.mailbox
    }

    /// Says that a request comes in, so that nobody has to be woken up for it when it is there.
    pub(crate) fn announce(&self) {
        if self.looks_out {
            self.mailbox.put(Mail::Announced);
        }
    }

    pub(crate) fn view(&self) -> &SharedView {
        &self.view
    }
}

impl Drop for DriverHandle {
    fn drop(&mut self) {
        self.mailbox.put(Mail::Stop);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("a driver panicked");
        }
    }
}

/// One execution on its way.
struct Running {
    request: RequestId,
    worker: WorkerId,
    arena: ArenaId,
    decided_ns: u64,
    switched: bool,
    result: Option<Result<Executed, ExecutionFault>>,
}

/// Says that the server cannot go on, unless it is disarmed: for a driver that panics.
struct FailureOnDrop(Option<Arc<Supervisor>>);

impl FailureOnDrop {
    fn disarm(mut self) {
        self.0 = None;
    }
}

impl Drop for FailureOnDrop {
    fn drop(&mut self) {
        if let Some(supervisor) = &self.0 {
            supervisor.fail();
        }
    }
}

struct Driver {
    device: Arc<dyn Device>,
    pool: Pool,
    store: Arc<HostStore>,
    slots: PinnedMemory,
    supervisor: Arc<Supervisor>,
    scheduler: Scheduler,
    engine: Engine,
    links: Links,
    attachment: Attachment,
    options: SchedulerOptions,
    /// How many workers there are to be.
    workers: usize,
    starting: BTreeMap<WorkerId, Instant>,
    models: BTreeMap<ModelId, HomedModel>,
    /// Plans that wait until nothing of their model is under way.
    plans: BTreeMap<ModelId, Box<Plan>>,
    placing: HashMap<ModelId, oneshot::Sender<Result<(), String>>>,
    removing: HashMap<ModelId, oneshot::Sender<()>>,
    jobs: HashMap<RequestId, Job>,
    running: HashMap<ExecutionId, Running>,
    /// Executions that wait until training stands still.
    held_back: HeldBack,
    /// Input doorbells that an execution may have left rung or poisoned.
    unclear_inputs: Vec<bool>,
    /// Events that actions brought about, not yet handled.
    pending: VecDeque<Event>,
    draining: Option<oneshot::Sender<()>>,
    worker_restarts: u64,
    /// Workers in a row that died before they had attached.
    unattached_deaths: u32,
    /// Transfers in a row that failed in CUDA's driver.
    broken_transfers: u32,
    transferred_bytes: u64,
    poll: Poll,
    mailbox: Mailbox,
    receiver: mpsc::Receiver<Mail>,
    view: SharedView,
    /// Who has the device, where tasks can be trained, and what share of it training has beside requests.
    gate: Option<Arc<Gate>>,
    room: Option<Room>,
    share: Share,
    stopped: bool,
    /// When the engine last did something for nothing.
    rehearsed_at: Instant,
}

impl Driver {
    fn new(
        parts: DriverParts,
        poll: Poll,
        mailbox: Mailbox,
        receiver: mpsc::Receiver<Mail>,
        view: SharedView,
    ) -> Result<Self, ControllerError> {
        let DriverParts {
            device,
            pool,
            store,
            slots,
            supervisor,
            options,
            workers,
            threads,
            spin,
            waits_by_kernels,
            gate,
            room,
            training_share,
            ..
        } = parts;
        let landed = mailbox.clone();
        let engine = Engine::new(
            Arc::clone(&device),
            Box::new(move |transfer, result| {
                landed.put(Mail::Landed { transfer, result });
            }),
        )?;
        let (description, pool_descriptors) = pool.memory().export()?.into_parts();
        let spec = DeviceSpec { id: device.properties().id.to_string(), threads };
        let slot_memory = Arc::clone(slots.memory());
        let arenas = pool.layout().arenas.iter();
        let arenas = arenas.map(|arena| Region { offset: arena.offset, bytes: arena.bytes }).collect();
        let attachment = Attachment {
            device: spec,
            pool: description,
            pool_descriptors,
            slots: slot_memory,
            waits_by_kernels,
            arenas,
            spin,
        };
        let scheduler = Scheduler::new(Ledger::new(pool.layout()), options.clone());
        let mut driver = Self {
            unclear_inputs: vec![true; pool.layout().arenas.len()],
            device,
            pool,
            store,
            slots,
            supervisor,
            scheduler,
            engine,
            links: Links::new()?,
            attachment,
            options,
            workers,
            starting: BTreeMap::new(),
            models: BTreeMap::new(),
            plans: BTreeMap::new(),
            placing: HashMap::new(),
            removing: HashMap::new(),
            jobs: HashMap::new(),
            running: HashMap::new(),
            held_back: HeldBack::default(),
            pending: VecDeque::new(),
            draining: None,
            worker_restarts: 0,
            unattached_deaths: 0,
            broken_transfers: 0,
            transferred_bytes: 0,
            poll,
            mailbox,
            receiver,
            view,
            gate,
            room,
            share: Share::new(training_share, Instant::now()),
            stopped: false,
            rehearsed_at: Instant::now(),
        };
        driver.fork_missing();
        Ok(driver)
    }

    /// Runs until it is told to stop. If it ends otherwise, the server has to end with it.
    fn run(mut self) {
        let failure = FailureOnDrop(Some(self.supervisor.clone()));
        self.serve();
        self.end();
        failure.disarm();
    }

    fn serve(&mut self) {
        let mut events = Events::with_capacity(64);
        while !self.stopped {
            if let Err(error) = self.await_events(&mut events)
                && error.kind() != std::io::ErrorKind::Interrupted
            {
                panic!("the driver cannot poll: {error}");
            }
            for token in events.iter().map(mio::event::Event::token) {
                if let Some(worker) = links::worker_of(token) {
                    self.read(worker);
                }
            }
            while let Ok(mail) = self.receiver.try_recv() {
                self.take(mail);
            }
            self.let_go();
            self.tick();
            self.take_turns();
            self.publish();
        }
    }

    /// What there is on the device for requests and for training.
    fn demand(&self) -> Option<Demand> {
        let (training, step) = self.gate.as_ref()?.wanted();
        let (requests, executing) = (!self.jobs.is_empty(), !self.running.is_empty());
        Some(Demand { requests, executing, training, step })
    }

    /// Lets training have its share.
    fn take_turns(&mut self) {
        while let Some(demand) = self.demand()
            && let Some(action) = self.share.update(demand, Instant::now())
        {
            match action {
                TurnAction::Hold => self.feed(Event::Hold),
                TurnAction::Admit => self.gate.iter().for_each(|gate| gate.open_for_a_turn()),
                TurnAction::Release => {
                    if demand.requests {
                        self.gate.iter().for_each(|gate| gate.close());
                    }
                    self.feed(Event::Release);
                }
            }
        }
    }

    /// Looks for events for a while, then sleeps until there are some or a deadline passes.
    fn await_events(&mut self, events: &mut Events) -> std::io::Result<()> {
        let begun = Instant::now();
        let deadline = self.next_deadline();
        let spin_until = begun + self.attachment.spin;
        let spin_until = deadline.map_or(spin_until, |deadline| deadline.min(spin_until));
        while Instant::now() < spin_until || !self.held_back.is_empty() {
            self.let_go();
            self.rehearse();
            self.poll.poll(events, Some(Duration::ZERO))?;
            if !events.is_empty() {
                return Ok(());
            }
        }
        let timeout = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        self.poll.poll(events, timeout)
    }

    fn next_deadline(&self) -> Option<Instant> {
        let respawn = self.links.not_before.filter(|_| self.links.len() < self.workers);
        let startup = self.starting.values().min().map(|begin| *begin + STARTUP_TIMEOUT);
        let turn = self.demand().and_then(|demand| self.share.next(demand));
        [self.scheduler.next_deadline(), respawn, startup, turn].into_iter().flatten().min()
    }

    /// What time alone brings about.
    fn tick(&mut self) {
        let now = Instant::now();
        if self.scheduler.next_deadline().is_some_and(|deadline| deadline <= now) {
            self.feed(Event::Tick);
        }
        let hung: Vec<WorkerId> = self
            .starting
            .iter()
            .filter_map(|(&worker, &begin)| (now.duration_since(begin) >= STARTUP_TIMEOUT).then_some(worker))
            .collect();
        for worker in hung {
            tracing::error!(%worker, "did not come up in time and is replaced");
            self.starting.remove(&worker);
            self.supervisor.kill(worker);
        }
        if self.links.not_before.is_none_or(|not_before| not_before <= now) {
            self.fork_missing();
        }
    }

    fn take(&mut self, mail: Mail) {
        match mail {
            Mail::Announced => self.look_out(),
            Mail::Submit(job) => self.submit(*job),
            Mail::Cancel(request) => {
                if self.jobs.contains_key(&request) {
                    self.feed(Event::Cancelled { request });
                }
            }
            Mail::Place { spec, host_tables, done } => self.place(spec, host_tables, done),
            Mail::Plan { model, plan } => {
                if self.models.contains_key(&model) {
                    self.plans.insert(model, plan);
                    self.apply_plans();
                }
            }
            Mail::Prefetch(prefetch) => self.scheduler.set_prefetch(prefetch),
            Mail::Homes(homes) => self.feed(Event::Homes { homes }),
            Mail::Remove { model, done } => {
                if self.models.contains_key(&model) {
                    self.removing.insert(model, done);
                    self.feed(Event::ModelRemoved { model });
                } else {
                    let _ = done.send(());
                }
            }
            Mail::Landed { transfer, result } => match result {
                Ok(report) => {
                    self.transferred_bytes += report.bytes;
                    self.broken_transfers = 0;
                    self.room.iter().for_each(|room| room.note_transfer(transfer, true));
                    self.feed(Event::TransferLanded { transfer });
                }
                Err(error) => {
                    self.room.iter().for_each(|room| room.note_transfer(transfer, false));
                    tracing::error!(?transfer, error = &error as &dyn std::error::Error, "a transfer failed");
                    if let TransferError::Device { source: DeviceError::Cuda { .. }, .. } = &error {
                        self.broken_transfers += 1;
                        if self.broken_transfers == BROKEN_TRANSFERS {
                            tracing::error!("the GPU takes no more copies from this process");
                            self.supervisor.fail();
                        }
                    }
                    self.feed(Event::TransferFailed { transfer, reason: error.to_string() });
                }
            },
            Mail::Exited { worker, cause } => {
                if !self.stopped {
                    tracing::error!(%worker, %cause, "lost, and replaced");
                }
                self.lose(worker);
            }
            Mail::ForkFailed { worker, reason } => {
                tracing::error!(%worker, reason, "could not be forked");
                self.lose(worker);
            }
            Mail::TrainingAsks => self.feed(Event::TrainingAsks),
            Mail::TrainingLeaves => self.feed(Event::TrainingLeaves),
            // It is looked at in any case.
            Mail::TrainingRests => {}
            Mail::Drain { done } => {
                self.draining = Some(done);
                self.feed(Event::Draining);
            }
            Mail::Stop => self.stopped = true,
        }
    }

    fn submit(&mut self, job: Job) {
        let Some(arena) = self.pool.layout().arenas.first().copied() else { return };
        if let Err(error) = ArenaDivision::new(arena, job.tensor_bytes()) {
            let asked_bytes = match error {
                PoolError::NeverFits { asked_bytes, .. } => asked_bytes,
                _ => u64::MAX,
            };
            let (what, limit_bytes) = ("the request's inputs".to_owned(), ArenaDivision::limit_bytes(arena));
            let _ = job.answer.send(Err(ServiceError::TooLarge { what, asked_bytes, limit_bytes }));
            return;
        }
        let (request, model, deadline) = (job.request, job.model, job.deadline);
        if let Some(gate) = &self.gate
            && !self.share.is_turn()
        {
            gate.close();
        }
        self.jobs.insert(request, job);
        self.feed(Event::Submitted { request, model, deadline });
    }

    fn place(
        &mut self,
        spec: Arc<ModelSpec>,
        host_tables: HostTables,
        done: oneshot::Sender<Result<(), String>>,
    ) {
        // One for each group that a plan can have; a table is one, and may cut another in two.
        let doorbells =
            spec.layers.iter().filter(|layer| layer.bytes > 0).count() + 2 * host_tables.tables.len();
        let doorbells = u32::try_from(doorbells).unwrap_or(u32::MAX);
        let model = spec.id;
        let placed =
            self.scheduler.place(model, spec.span_bytes, doorbells, spec.limits.clone()).and_then(|home| {
                let least_copy_bytes = self.device.properties().least_copy_bytes;
                HomedModel::new(spec, home, host_tables, least_copy_bytes, &self.pool, &self.store)
            });
        match placed {
            Ok(homed) => {
                self.models.insert(model, homed);
                self.placing.insert(model, done);
                let mut broken: Vec<(WorkerId, String)> = Vec::new();
                for (worker, link) in self.links.iter_mut() {
                    if let Err(error) = link.build(model, &self.models) {
                        broken.push((worker, error.to_string()));
                    }
                }
                for (worker, reason) in broken {
                    self.break_with(worker, &reason);
                }
            }
            Err(error) => {
                let _ = done.send(Err(error.to_string()));
            }
        }
    }

    /// Puts plans in force whose models rest: a transfer under way rings the doorbells of the plan it began with.
    fn apply_plans(&mut self) {
        let resting: Vec<ModelId> =
            self.plans.keys().copied().filter(|&model| self.is_resting(model)).collect();
        for model in resting {
            let (Some(plan), Some(homed)) = (self.plans.remove(&model), self.models.get_mut(&model)) else {
                continue;
            };
            if let Err(error) = homed.follow(&plan, &self.pool, &self.store) {
                tracing::error!(model = homed.spec.name, %error, "a plan cannot be followed");
                continue;
            }
            for (worker, link) in self.links.iter_mut() {
                if let Err(error) = link.plan(homed) {
                    tracing::error!(%worker, %error, "cannot be told a plan and is replaced");
                    self.supervisor.kill(worker);
                }
            }
        }
    }

    /// Whether nothing of a model is under way: no transfer, no execution.
    fn is_resting(&self, model: ModelId) -> bool {
        let ledger = self.scheduler.ledger();
        ledger.leases(model) == Ok(0) && ledger.state(model).is_ok_and(|state| state != Residency::Moving)
    }

    /// Has the scheduler handle an event and all that follow from it at once.
    fn feed(&mut self, event: Event) {
        self.pending.push_back(event);
        while let Some(event) = self.pending.pop_front() {
            for action in self.scheduler.handle(event, Instant::now()) {
                self.perform(action);
            }
        }
        if !self.plans.is_empty() {
            self.apply_plans();
        }
        if let Some(gate) = &self.gate
            && self.jobs.is_empty()
        {
            gate.open();
        }
        if self.scheduler.is_idle()
            && let Some(done) = self.draining.take()
        {
            let _ = done.send(());
        }
    }

    /// Bytes of a job's slot as a copy's source.
    fn slot_slice(&self, job: &Job, at: Range) -> Result<HostSlice, pswitch_device::DeviceError> {
        HostSlice::new(self.slots.clone(), job.slot.offset_bytes() + at.offset, at.bytes)
    }

    fn publish(&self) {
        self.view.update(|view| {
            let counts =
                || self.models.iter().filter_map(|(&id, model)| Some((id, model, self.scheduler.model(id)?)));
            view.queued = counts().map(|(id, _, counts)| (id, counts.waiting)).collect();
            view.evictions = counts().map(|(id, _, counts)| (id, counts.evictions)).collect();
            view.resident = counts().filter(|(.., counts)| counts.present).map(|(id, ..)| id).collect();
            view.resident_bytes = counts()
                .filter(|(.., counts)| counts.present)
                .map(|(_, model, _)| model.spec.span_bytes)
                .sum();
            view.executing = self.scheduler.executing();
            view.workers = self.scheduler.workers().by_name().to_vec();
            view.outside = self.links.outside_use();
            view.worker_restarts = self.worker_restarts;
            view.transferred_bytes = self.transferred_bytes;
        });
    }

    /// Ends the workers; jobs that are left are answered by dropping them.
    fn end(&mut self) {
        self.let_all_go();
        for (worker, link) in self.links.iter_mut() {
            if link.channel.send(&ToWorker::Shutdown, &[]).is_err() {
                self.supervisor.kill(worker);
            }
        }
    }
}
