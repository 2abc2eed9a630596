//! The thread that trains: it does what [`super::book`] says.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::path::PathBuf;
use std::sync::{Arc, PoisonError, mpsc};
use std::time::{Duration, Instant};

use mio::{Events, Poll};
use pswitch_device::{Device, DeviceError, PinnedMemory, SharedMemory};
use pswitch_mem_pool::{Range, TrainingMemory};
use pswitch_protocol::{FromWorker, Region, TaskPause, ToWorker, control};
use pswitch_train::TaskConfig;

use super::book::{Book, TaskAction, TaskEvent, TaskId};
use super::places::Places;
use super::worker::{self, Attachment, TaskWorker};
use super::{Gate, MOST_TASKS, Mail, Mailbox, NewTask, Reply, Statuses, TrainingParts};
use crate::scheduler::WorkerId;
use crate::service::{CheckpointStatus, Residence, ServiceError, TaskCommand, TaskStatus};
use crate::supervisor::{Loss, Supervisor};

/// After so long a worker that could not be started is tried again.
const RETRY: Duration = Duration::from_millis(200);

/// Time that a worker has to attach, and to prepare a task.
const STARTUP_TIMEOUT: Duration = Duration::from_secs(300);

/// Time that a worker has to stop computing: far longer than any operator takes.
const YIELD_TIMEOUT: Duration = Duration::from_secs(10);

/// Tasks that are over and can still be asked for.
const MOST_OVER: usize = 100;

/// Messages of a worker that are read before others have their turn.
const MOST_MESSAGES: usize = 16;

/// A task as the thread knows it.
struct Record {
    name: String,
    config: TaskConfig,
    digest: u64,
    /// Where its state lies in the pool; none once it is over and its worker gone.
    state: Option<Range>,
    /// Where its state goes when it makes room for a model.
    saved: Option<PinnedMemory>,
    /// How often it did, for workers that are gone.
    made_room: u64,
    worker: Option<TaskWorker>,
    checkpoint: Option<CheckpointStatus>,
    checkpoint_error: String,
    last_yield_us: Option<u64>,
    /// When its worker counts as hung.
    deadline: Option<Instant>,
    /// The most that one of its steps has had of an arena.
    peak_bytes: u64,
    log: PathBuf,
    log_file: Option<File>,
}

pub(super) struct Host {
    name: String,
    device: Arc<dyn Device>,
    places: Places,
    attachment: Attachment,
    region: Range,
    states: TrainingMemory,
    supervisor: Arc<Supervisor>,
    gate: Arc<Gate>,
    book: Book,
    tasks: BTreeMap<TaskId, Record>,
    /// Who waits until a task does as it was told.
    waiting: Vec<(TaskId, TaskCommand, Reply)>,
    /// Workers that may have said more than was read.
    unread: BTreeSet<WorkerId>,
    /// Tasks whose worker could not be started: when to tell of it, and why.
    unstarted: Vec<(Instant, TaskId, String)>,
    begun: Instant,
    poll: Poll,
    mailbox: Mailbox,
    statuses: Statuses,
}

impl Host {
    pub(super) fn new(
        parts: TrainingParts,
        places: Places,
        attachment: Attachment,
        gate: Arc<Gate>,
        poll: Poll,
        mailbox: Mailbox,
        statuses: Statuses,
    ) -> Self {
        Self {
            name: parts.device.properties().id.to_string(),
            device: parts.device,
            places,
            attachment,
            region: parts.region,
            states: TrainingMemory::new(parts.region),
            supervisor: parts.supervisor,
            gate,
            book: Book::default(),
            tasks: BTreeMap::new(),
            waiting: Vec::new(),
            unread: BTreeSet::new(),
            unstarted: Vec::new(),
            begun: Instant::now(),
            poll,
            mailbox,
            statuses,
        }
    }

    pub(super) fn run(mut self, receiver: &mpsc::Receiver<Mail>) {
        let mut events = Events::with_capacity(64);
        loop {
            match self.poll.poll(&mut events, self.patience()) {
                Err(error) if error.kind() != std::io::ErrorKind::Interrupted => {
                    tracing::error!(%error, "training cannot poll and ends");
                    return;
                }
                _ => {}
            }
            self.unread.extend(events.iter().filter_map(|event| worker::worker_of(event.token())));
            for worker in std::mem::take(&mut self.unread) {
                self.read(worker);
            }
            self.retry();
            self.kill_hung();
            while let Ok(mail) = receiver.try_recv() {
                if !self.take(mail) {
                    return self.end();
                }
            }
            self.choose();
            let (wanted, step) = self.book.demand();
            self.gate.want(wanted, step);
            self.publish();
        }
    }

    fn now(&self) -> Duration {
        self.begun.elapsed()
    }

    fn feed(&mut self, task: TaskId, event: TaskEvent) {
        let at = self.now();
        self.note_device();
        let actions = self.book.handle(task, event, at);
        self.perform(actions);
    }

    /// Has the book look at the gate and at who is to train.
    fn choose(&mut self) {
        let is_closed = self.note_device();
        let actions = self.book.set_closed(is_closed, self.now());
        self.perform(actions);
        let used = |(&id, record): (&TaskId, &Record)| {
            record.worker.is_some() && !self.book.leaves_its_place_alone(id)
        };
        let is_used = self.tasks.iter().any(used);
        self.places.update(is_closed, self.book.wants_places(), is_used);
    }

    /// Tells the book what training has of the device now, and says whether that is nothing.
    fn note_device(&mut self) -> bool {
        let is_closed = self.is_closed();
        self.book.note_closed(is_closed);
        self.book.note_away(self.places.are_away(is_closed));
        is_closed
    }

    /// Whether a task has come to its end; one that is not known has.
    fn is_over(&self, id: TaskId) -> bool {
        self.book.view(id, self.now()).is_none_or(|view| view.state.is_over())
    }

    /// False at the end.
    fn take(&mut self, mail: Mail) -> bool {
        match mail {
            Mail::Submit(task, reply) => {
                let taken = self.submit(*task);
                self.publish();
                let _ = reply.send(taken);
            }
            Mail::Command(name, command, reply) => match self.find(&name) {
                None => {
                    let _ = reply.send(Err(ServiceError::UnknownTask { name }));
                }
                Some(id) => {
                    let over =
                        self.book.view(id, self.now()).map(|view| view.state).filter(|state| state.is_over());
                    if let Some(state) = over {
                        let message = format!("training task '{name}' is over: it is {}", state.name());
                        let _ = reply.send(Err(ServiceError::InvalidRequest { message }));
                    } else {
                        self.waiting.push((id, command, reply));
                        self.feed(id, TaskEvent::Command(command));
                    }
                }
            },
            Mail::Lost(worker, cause) => self.lose(worker, cause),
            Mail::Connect(driver) => self.places.connect(driver),
            Mail::Admitted => self.places.admitted(),
            Mail::Refused => self.places.refused(),
            // It is published in any case.
            Mail::Moved => {}
            Mail::Spoilt(places) => self.give_up(&places),
            Mail::Stop => return false,
        }
        true
    }

    /// The latest task of a name.
    fn find(&self, name: &str) -> Option<TaskId> {
        self.tasks.iter().rev().find(|(_, record)| record.name == name).map(|(&id, _)| id)
    }

    fn submit(&mut self, task: NewTask) -> Result<(), ServiceError> {
        if self.find(&task.name).is_some_and(|id| !self.is_over(id)) {
            let message = format!("a training task '{}' is there already, and not over", task.name);
            return Err(ServiceError::InvalidRequest { message });
        }
        if self.tasks.values().filter(|record| record.state.is_some()).count() as u64 >= MOST_TASKS {
            let message = format!("there are {MOST_TASKS} training tasks already");
            return Err(ServiceError::InvalidRequest { message });
        }
        let state = self.states.allocate(task.state_bytes).map_err(|error| ServiceError::InvalidRequest {
            message: format!("no room for the state of '{}': {error}; make training_size larger", task.name),
        })?;
        if let Err(refusal) = self.check_place(&task, state) {
            self.put_back(state);
            return Err(refusal);
        }
        let saved = match self.places.states().map(|_| self.memory_for(state)).transpose() {
            Ok(saved) => saved,
            Err(error) => {
                self.put_back(state);
                let message = format!("no host memory for the state of '{}': {error}", task.name);
                return Err(ServiceError::InvalidRequest { message });
            }
        };
        let id = TaskId(self.tasks.last_key_value().map_or(0, |(last, _)| last.0 + 1));
        let NewTask { name, config, digest, .. } = task;
        self.book.submit(id, config.weight, config.checkpoint.is_some(), self.now());
        let log = config.checkpoint.as_ref().map(|checkpoints| checkpoints.folder.join("progress.jsonl"));
        let record = Record {
            name,
            config,
            digest,
            state: Some(state),
            saved,
            made_room: 0,
            worker: None,
            checkpoint: None,
            checkpoint_error: String::new(),
            last_yield_us: None,
            deadline: None,
            peak_bytes: 0,
            log: log.unwrap_or_default(),
            log_file: None,
        };
        tracing::info!(
            task = record.name,
            device = self.name,
            state_bytes = state.bytes,
            "training task taken"
        );
        self.tasks.insert(id, record);
        self.forget_oldest();
        self.choose();
        Ok(())
    }

    /// Forgets tasks that have been over for longest, so that a server that trains for years has no list without an end.
    fn forget_oldest(&mut self) {
        let is_gone = |record: &Record| record.worker.is_none() && record.state.is_none();
        let over = self.tasks.iter().filter(|(id, record)| is_gone(record) && self.is_over(**id));
        let over: Vec<TaskId> = over.map(|(&id, _)| id).collect();
        for id in &over[..over.len().saturating_sub(MOST_OVER)] {
            self.tasks.remove(id);
            self.book.forget(*id);
        }
    }

    /// Refuses a task that would take away what the steps of others need, or whose checkpoints lie where another's do.
    fn check_place(&self, task: &NewTask, state: Range) -> Result<(), ServiceError> {
        let alive = || self.tasks.values().filter(|record| record.state.is_some());
        let needed = alive().map(|record| record.peak_bytes).max().unwrap_or(0);
        let end = alive().filter_map(|record| record.state).map(|state| state.end()).max().unwrap_or(0);
        let left = self.region.end() - end.max(state.end());
        if left < needed {
            let message = format!(
                "beside the state of '{}' {left} bytes would be left, and steps of other tasks need {needed}; make \
                 training_size larger",
                task.name
            );
            return Err(ServiceError::InvalidRequest { message });
        }
        let folder = |config: &TaskConfig| config.checkpoint.as_ref().map(|it| it.folder.clone());
        // One that is over writes nothing any more.
        let mut others = self.tasks.iter().filter(|(id, _)| !self.is_over(**id)).map(|(_, record)| record);
        let own = folder(&task.config);
        let shared = others.find(|other| own.is_some() && folder(&other.config) == own);
        match shared {
            Some(other) => Err(ServiceError::InvalidRequest {
                message: format!("task '{}' has its checkpoints in the same folder", other.name),
            }),
            None => Ok(()),
        }
    }

    /// Memory that a state can go to when it makes room.
    fn memory_for(&self, state: Range) -> Result<PinnedMemory, DeviceError> {
        self.device.pin(Arc::new(SharedMemory::create("pswitch-state", state.bytes)?))
    }

    /// Ends the workers whose states are lost: the tasks go on from their last checkpoints.
    fn give_up(&self, places: &[Range]) {
        let spoilt = |record: &&Record| record.state.is_some_and(|state| places.contains(&state));
        for record in self.tasks.values().filter(spoilt) {
            tracing::error!(task = record.name, "its state was lost while it made room for a model");
            if let Some(worker) = &record.worker {
                self.supervisor.kill(worker.id);
            }
        }
    }

    fn put_back(&mut self, state: Range) {
        if let Err(error) = self.states.free(state) {
            tracing::error!(%error, "the state of a training task cannot be freed");
        }
    }

    fn perform(&mut self, actions: Vec<TaskAction>) {
        for action in actions {
            match action {
                TaskAction::Start(id) => self.start(id),
                TaskAction::Prepare(id) => self.prepare(id),
                TaskAction::Train(id) => {
                    let arena = self.arena();
                    let Some(worker) = self.worker(id) else { continue };
                    self.gate.admit(worker.block);
                    let sent = worker.send(&ToWorker::Train { arena });
                    self.check_sent(id, sent);
                }
                TaskAction::Interrupt(id) => {
                    self.gate.interrupt();
                    self.set_deadline(id, Some(YIELD_TIMEOUT));
                }
                TaskAction::Save(id) => {
                    let Some(worker) = self.worker(id) else { continue };
                    let sent = worker.send(&ToWorker::SaveTask);
                    self.check_sent(id, sent);
                }
                TaskAction::End(id) => {
                    let Some(record) = self.tasks.get_mut(&id) else { continue };
                    record.log_file = None;
                    match &record.worker {
                        // Its state is free when it is gone.
                        Some(worker) => {
                            if !worker.send(&ToWorker::Shutdown) {
                                self.supervisor.kill(worker.id);
                            }
                        }
                        None => self.free(id),
                    }
                }
            }
        }
        self.answer();
    }

    /// Answers who waits until a task does as it was told.
    fn answer(&mut self) {
        if self.waiting.is_empty() {
            return;
        }
        let book = &self.book;
        let at = self.now();
        let is_done = |id: TaskId, command: TaskCommand| {
            book.view(id, at).is_none_or(|view| match command {
                TaskCommand::Resume => true,
                TaskCommand::Pause => book.has_paused(id),
                TaskCommand::Stop => view.state.is_over() || !book.is_stopping(id),
            })
        };
        let (done, waiting) = std::mem::take(&mut self.waiting)
            .into_iter()
            .partition::<Vec<_>, _>(|(id, command, _)| is_done(*id, *command));
        self.waiting = waiting;
        self.publish();
        for (.., reply) in done {
            let _ = reply.send(Ok(()));
        }
    }

    /// What is left of the region behind all states.
    fn arena(&self) -> Region {
        let states = self.tasks.values().filter_map(|record| record.state);
        let offset = states.map(|state| state.end()).max().unwrap_or(self.region.offset);
        Region { offset, bytes: self.region.end() - offset }
    }

    fn worker(&self, id: TaskId) -> Option<&TaskWorker> {
        self.tasks.get(&id)?.worker.as_ref()
    }

    /// A worker that cannot be told anything is ended; its loss is heard when it is reaped.
    fn check_sent(&self, id: TaskId, sent: bool) {
        if !sent && let Some(worker) = self.worker(id) {
            self.supervisor.kill(worker.id);
        }
    }

    fn start(&mut self, id: TaskId) {
        let taken: Vec<u64> =
            self.tasks.values().filter_map(|record| Some(record.worker.as_ref()?.block)).collect();
        let Some(record) = self.tasks.get_mut(&id) else { return };
        let mut blocks = (0..MOST_TASKS).map(|block| block * control::BLOCK_BYTES);
        let block = blocks.find(|block| !taken.contains(block)).unwrap_or(0);
        let mailbox = self.mailbox.clone();
        let lost = Box::new(move |worker, loss| {
            let cause = match loss {
                Loss::Exited(cause) => cause.to_string(),
                Loss::NotForked(reason) => reason,
            };
            mailbox.put(Mail::Lost(worker, cause));
        });
        let (registry, deterministic) = (self.poll.registry(), record.config.deterministic);
        match self.attachment.start(&self.supervisor, lost, block, registry, deterministic) {
            Ok(worker) => {
                record.worker = Some(worker);
                record.deadline = Some(Instant::now() + STARTUP_TIMEOUT);
            }
            // Not at once: what is wrong now may be better in a while, and other actions are to be done first.
            Err(reason) => self.unstarted.push((Instant::now() + RETRY, id, reason)),
        }
    }

    fn prepare(&mut self, id: TaskId) {
        let Some(record) = self.tasks.get(&id) else { return };
        let (Some(worker), Some(state)) = (&record.worker, record.state) else { return };
        let sent = match worker::prepare(&record.name, &record.config, record.digest, state) {
            Ok(order) => worker.send(&ToWorker::PrepareTask(order)),
            Err(reason) => {
                tracing::error!(task = record.name, reason, "cannot be told to a worker");
                false
            }
        };
        if let (Some(states), Some(saved)) = (self.places.states(), &record.saved) {
            states.add(state, saved.clone());
        }
        self.set_deadline(id, Some(STARTUP_TIMEOUT));
        self.check_sent(id, sent);
    }

    fn task_of(&self, worker: WorkerId) -> Option<TaskId> {
        let is_its = |record: &Record| record.worker.as_ref().is_some_and(|known| known.id == worker);
        self.tasks.iter().find(|(_, record)| is_its(record)).map(|(&id, _)| id)
    }

    /// Reads some of what a worker has said; the rest comes behind what others want.
    fn read(&mut self, worker: WorkerId) {
        for _ in 0..MOST_MESSAGES {
            let Some(id) = self.task_of(worker) else { return };
            let Some(known) = self.worker(id) else { return };
            match known.receive() {
                Ok(Some(message)) => self.hear(id, message),
                Ok(None) => return,
                Err(reason) => {
                    tracing::error!(%worker, reason, "broke with training and is ended");
                    return self.supervisor.kill(worker);
                }
            }
        }
        self.unread.insert(worker);
    }

    /// How long to sleep if nothing happens.
    fn patience(&self) -> Option<Duration> {
        if !self.unread.is_empty() {
            return Some(Duration::ZERO);
        }
        let now = Instant::now();
        let retry = self.unstarted.iter().map(|(due, ..)| due.saturating_duration_since(now)).min();
        let opens_in = self.gate.opens_in().filter(|rest| !rest.is_zero());
        let deadlines = self.tasks.values().filter_map(|record| record.deadline);
        let deadline = deadlines.map(|deadline| deadline.saturating_duration_since(now)).min();
        let places = self.places.due().map(|due| due.saturating_duration_since(now));
        [retry, opens_in, deadline, places].into_iter().flatten().min()
    }

    fn set_deadline(&mut self, id: TaskId, within: Option<Duration>) {
        if let Some(record) = self.tasks.get_mut(&id) {
            record.deadline = within.map(|within| Instant::now() + within);
        }
    }

    /// Kills workers that do not come to an end with what they were told.
    fn kill_hung(&mut self) {
        let now = Instant::now();
        for record in self.tasks.values_mut() {
            if record.deadline.is_some_and(|deadline| deadline <= now)
                && let Some(worker) = &record.worker
            {
                tracing::error!(task = record.name, worker = %worker.id, "hangs and is killed");
                record.deadline = None;
                self.supervisor.kill(worker.id);
            }
        }
    }

    /// Tells of workers that could not be started, when it is time to try again.
    fn retry(&mut self) {
        let now = Instant::now();
        let (due, later) = std::mem::take(&mut self.unstarted).into_iter().partition(|(due, ..)| *due <= now);
        self.unstarted = later;
        let due: Vec<(Instant, TaskId, String)> = due;
        for (_, id, reason) in due {
            self.feed(id, TaskEvent::Lost(reason));
        }
    }

    fn is_closed(&self) -> bool {
        self.gate.opens_in() != Some(Duration::ZERO)
    }

    fn hear(&mut self, id: TaskId, message: FromWorker) {
        match message {
            FromWorker::Attached => {
                self.set_deadline(id, None);
                self.feed(id, TaskEvent::Attached);
            }
            FromWorker::TaskReady { result } => {
                self.set_deadline(id, None);
                if let (Ok(extent), Some(record)) = (&result, self.tasks.get(&id)) {
                    tracing::info!(
                        task = record.name,
                        done = extent.steps_done,
                        steps = extent.total_steps,
                        "training task prepared"
                    );
                }
                self.feed(id, TaskEvent::Ready(result));
            }
            FromWorker::TaskStep(step) => {
                if let Some(record) = self.tasks.get_mut(&id) {
                    record.peak_bytes = record.peak_bytes.max(step.peak_bytes);
                }
                self.feed(id, TaskEvent::Step(step));
                self.log(id, step.step + 1);
            }
            FromWorker::TaskSaved { step, result } => {
                let Some(record) = self.tasks.get_mut(&id) else { return };
                let written = result.is_ok();
                match result {
                    Ok(path) => {
                        record.checkpoint = Some(CheckpointStatus { step, path: path.into() });
                        record.checkpoint_error.clear();
                    }
                    Err(reason) => {
                        tracing::warn!(task = record.name, step, reason, "no checkpoint; the next is tried");
                        record.checkpoint_error = reason;
                    }
                }
                self.feed(id, TaskEvent::Saved { step, written });
            }
            FromWorker::TaskPaused(pause) => {
                self.gate.vacate();
                self.set_deadline(id, None);
                if let (TaskPause::Failed { reason }, Some(record)) = (&pause, self.tasks.get(&id)) {
                    tracing::error!(task = record.name, reason, "training task failed");
                }
                if let (TaskPause::Stopped { at_ns, .. }, Some(record)) = (&pause, self.tasks.get_mut(&id))
                    && let Some(nanos) = at_ns.checked_sub(self.gate.closed_ns())
                    && self.gate.is_closed()
                {
                    record.last_yield_us = Some(nanos / 1000);
                }
                self.feed(id, TaskEvent::Paused(pause));
            }
            FromWorker::Loaded { .. } | FromWorker::Finished { .. } => {
                if let Some(worker) = self.worker(id) {
                    self.supervisor.kill(worker.id);
                }
            }
        }
    }

    /// A line for people and one for plots, every so many steps.
    fn log(&mut self, id: TaskId, steps_done: u64) {
        let at = self.now();
        let Some(record) = self.tasks.get_mut(&id) else { return };
        if !steps_done.is_multiple_of(record.config.log_every_steps) {
            return;
        }
        let (Some(view), Some(line)) = (self.book.view(id, at), self.book.line(id, at)) else { return };
        tracing::info!(
            task = record.name,
            step = steps_done,
            of = view.extent.total_steps,
            loss = view.progress.last_loss,
            steps_per_s = view.progress.steps_per_s,
            interruptions = view.progress.interruptions,
            "trained"
        );
        if record.log.as_os_str().is_empty() {
            return;
        }
        if record.log_file.is_none() {
            let folder = record.log.parent().map_or(Ok(()), std::fs::create_dir_all);
            match folder.and_then(|()| OpenOptions::new().create(true).append(true).open(&record.log)) {
                Ok(file) => record.log_file = Some(file),
                Err(error) => {
                    tracing::warn!(task = record.name, file = %record.log.display(), %error, "no line of progress");
                }
            }
        }
        if let Some(file) = &mut record.log_file
            && let Err(error) = file.write_all(line.as_bytes())
        {
            tracing::warn!(task = record.name, file = %record.log.display(), %error, "no line of progress");
        }
    }

    fn lose(&mut self, worker: WorkerId, cause: String) {
        let Some(id) = self.task_of(worker) else { return };
        let is_over = self.is_over(id);
        if let Some(record) = self.tasks.get_mut(&id) {
            record.deadline = None;
            if let Some(mut gone) = record.worker.take() {
                gone.deregister(self.poll.registry());
            }
            if let (Some(states), Some(state)) = (self.places.states(), record.state) {
                record.made_room += states.view(state).1;
                states.remove(state);
            }
            if !is_over {
                tracing::error!(task = record.name, %worker, cause, "the worker of a training task is lost");
            }
        }
        if self.book.computes(id) {
            self.gate.vacate();
        }
        if is_over {
            self.free(id);
        } else {
            self.feed(id, TaskEvent::Lost(cause));
        }
    }

    fn free(&mut self, id: TaskId) {
        if let Some(state) = self.tasks.get_mut(&id).and_then(|record| record.state.take()) {
            self.put_back(state);
        }
    }

    fn publish(&self) {
        let at = self.now();
        let status = |(&id, record): (&TaskId, &Record)| {
            let view = self.book.view(id, at)?;
            let place = self.places.states().zip(record.state);
            let (residence, made_room) =
                place.map_or((Residence::Resident, 0), |(states, state)| states.view(state));
            Some((
                record.name.clone(),
                TaskStatus {
                    name: record.name.clone(),
                    state: view.state,
                    reason: view.reason,
                    device: self.name.clone(),
                    steps_done: view.extent.steps_done,
                    total_steps: view.extent.total_steps,
                    learning_rate: view.rate,
                    progress: view.progress,
                    checkpoint: record.checkpoint.clone(),
                    checkpoint_error: record.checkpoint_error.clone(),
                    last_yield_us: record.last_yield_us,
                    residence,
                    made_room: record.made_room + made_room,
                    log: record.log.clone(),
                },
            ))
        };
        *self.statuses.lock().unwrap_or_else(PoisonError::into_inner) =
            self.tasks.iter().filter_map(status).collect();
    }

    fn end(self) {
        for worker in self.tasks.values().filter_map(|record| record.worker.as_ref()) {
            self.supervisor.kill(worker.id);
        }
    }
}
