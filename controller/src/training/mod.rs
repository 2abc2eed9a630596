//! Training on one device, beside its driver: a thread that forks a worker for each task and lets one of them compute while
//! there are no requests.
//!
//! [`book`] decides, the thread here does what it says. What the driver has to do with it is the [`Gate`]: closed with the
//! first request, open when the last one is answered.

mod book;
mod gate;
mod worker;

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use mio::{Events, Poll, Waker};
use pswitch_device::{Device, DeviceMemory, SharedMemory};
use pswitch_mem_pool::{Range, TrainingMemory};
use pswitch_protocol::{FromWorker, TaskPause, ToWorker, control};
use pswitch_train::TaskConfig;
use tokio::sync::oneshot;

use crate::error::ControllerError;
use crate::scheduler::WorkerId;
use crate::service::{CheckpointStatus, ServiceError, TaskCommand, TaskStatus};
use crate::supervisor::{Loss, Supervisor};
use book::{Book, TaskAction, TaskEvent, TaskId};
pub(crate) use gate::Gate;
use worker::{Attachment, MAIL, TaskWorker};

/// Tasks that a device may have that are not over: blocks of the control page.
const MOST_TASKS: u64 = 64;

/// What training on a device is made of.
pub(crate) struct TrainingParts {
    pub(crate) device: Arc<dyn Device>,
    pub(crate) pool: Arc<dyn DeviceMemory>,
    /// The part of the pool for states, and, behind them, what a step allocates.
    pub(crate) region: Range,
    pub(crate) slots: Arc<SharedMemory>,
    pub(crate) supervisor: Arc<Supervisor>,
    pub(crate) threads: u32,
}

/// A task that was checked as far as that needs no worker.
#[derive(Debug)]
pub(crate) struct NewTask {
    pub(crate) name: String,
    pub(crate) config: TaskConfig,
    /// Digest of its archive.
    pub(crate) digest: u64,
    pub(crate) state_bytes: u64,
}

type Reply = oneshot::Sender<Result<(), ServiceError>>;

enum Mail {
    Submit(Box<NewTask>, Reply),
    Command(String, TaskCommand, Reply),
    Lost(WorkerId, String),
    Stop,
}

/// Where mail is put.
#[derive(Clone)]
struct Mailbox {
    sender: mpsc::Sender<Mail>,
    waker: Arc<Waker>,
}

impl Mailbox {
    fn put(&self, mail: Mail) {
        if self.sender.send(mail).is_ok()
            && let Err(error) = self.waker.wake()
        {
            tracing::error!(%error, "training cannot be woken");
        }
    }
}

type Statuses = Arc<Mutex<BTreeMap<String, TaskStatus>>>;

/// Training that runs; dropping it ends all tasks where they are.
pub(crate) struct Training {
    mailbox: Mailbox,
    gate: Arc<Gate>,
    statuses: Statuses,
    thread: Option<JoinHandle<()>>,
}

impl std::fmt::Debug for Training {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Training").field("gate", &self.gate).finish_non_exhaustive()
    }
}

impl Training {
    pub(crate) fn start(parts: TrainingParts) -> Result<Self, ControllerError> {
        let failed = |what: &'static str| move |source| ControllerError::System { what, source };
        let poll = Poll::new().map_err(failed("a poll"))?;
        let waker = Arc::new(Waker::new(poll.registry(), MAIL).map_err(failed("a waker"))?);
        let page = SharedMemory::create("pswitch-training-control", MOST_TASKS * control::BLOCK_BYTES)?;
        let control = SharedMemory::from_fd(
            page.fd().try_clone_to_owned().map_err(failed("a descriptor"))?,
            page.bytes(),
        )?;
        let gate = Arc::new(Gate::new(page, Arc::clone(&waker)));
        let (sender, receiver) = mpsc::channel();
        let mailbox = Mailbox { sender, waker };
        let statuses = Statuses::default();
        let name = parts.device.properties().id.to_string();
        let host = Host {
            device: name.clone(),
            attachment: Attachment::new(&parts, control)?,
            region: parts.region,
            states: TrainingMemory::new(parts.region),
            supervisor: parts.supervisor,
            gate: Arc::clone(&gate),
            book: Book::default(),
            tasks: BTreeMap::new(),
            waiting: Vec::new(),
            begun: Instant::now(),
            poll,
            mailbox: mailbox.clone(),
            statuses: Arc::clone(&statuses),
        };
        let thread = std::thread::Builder::new()
            .name(format!("pswitch-training-{name}"))
            .spawn(move || host.run(&receiver))
            .map_err(failed("a thread"))?;
        Ok(Self { mailbox, gate, statuses, thread: Some(thread) })
    }

    pub(crate) fn gate(&self) -> &Arc<Gate> {
        &self.gate
    }

    /// Every task, by name.
    pub(crate) fn statuses(&self) -> Vec<TaskStatus> {
        self.statuses.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    pub(crate) async fn submit(&self, task: NewTask) -> Result<(), ServiceError> {
        let (reply, answer) = oneshot::channel();
        self.mailbox.put(Mail::Submit(Box::new(task), reply));
        answer.await.unwrap_or(Err(ServiceError::Draining))
    }

    pub(crate) async fn command(&self, name: &str, command: TaskCommand) -> Result<(), ServiceError> {
        let (reply, answer) = oneshot::channel();
        self.mailbox.put(Mail::Command(name.to_owned(), command, reply));
        answer.await.unwrap_or(Err(ServiceError::Draining))
    }
}

impl Drop for Training {
    fn drop(&mut self) {
        self.mailbox.put(Mail::Stop);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that trains panicked");
        }
    }
}

/// A task as the thread knows it.
struct Record {
    name: String,
    config: TaskConfig,
    digest: u64,
    /// Where its state lies in the pool; none once it is over and its worker gone.
    state: Option<Range>,
    worker: Option<TaskWorker>,
    checkpoint: Option<CheckpointStatus>,
    checkpoint_error: String,
    log: PathBuf,
    log_file: Option<File>,
}

struct Host {
    device: String,
    attachment: Attachment,
    region: Range,
    states: TrainingMemory,
    supervisor: Arc<Supervisor>,
    gate: Arc<Gate>,
    book: Book,
    tasks: BTreeMap<TaskId, Record>,
    /// Who waits until a task does as it was told.
    waiting: Vec<(TaskId, TaskCommand, Reply)>,
    begun: Instant,
    poll: Poll,
    mailbox: Mailbox,
    statuses: Statuses,
}

impl Host {
    fn run(mut self, receiver: &mpsc::Receiver<Mail>) {
        let mut events = Events::with_capacity(64);
        loop {
            match self.poll.poll(&mut events, None) {
                Err(error) if error.kind() != std::io::ErrorKind::Interrupted => {
                    tracing::error!(%error, "training cannot poll and ends");
                    return;
                }
                _ => {}
            }
            for worker in events.iter().filter_map(|event| worker::worker_of(event.token())) {
                self.read(worker);
            }
            while let Ok(mail) = receiver.try_recv() {
                if !self.take(mail) {
                    return self.end();
                }
            }
            let (is_closed, at) = (self.gate.is_closed(), self.now());
            let actions = self.book.set_closed(is_closed, at);
            self.perform(actions);
            self.publish();
        }
    }

    fn now(&self) -> Duration {
        self.begun.elapsed()
    }

    fn feed(&mut self, task: TaskId, event: TaskEvent) {
        let at = self.now();
        let actions = self.book.handle(task, event, at);
        self.perform(actions);
    }

    /// False at the end.
    fn take(&mut self, mail: Mail) -> bool {
        match mail {
            Mail::Submit(task, reply) => {
                let _ = reply.send(self.submit(*task));
            }
            Mail::Command(name, command, reply) => match self.find(&name) {
                None => {
                    let _ = reply.send(Err(ServiceError::UnknownTask { name }));
                }
                Some(id) => {
                    let over =
                        self.book.view(id, self.now()).map(|view| view.state).filter(|state| state.is_over());
                    if let Some(state) = over {
                        let message =
                            format!("training task '{name}' is over: it is {state:?}").to_lowercase();
                        let _ = reply.send(Err(ServiceError::InvalidRequest { message }));
                    } else {
                        self.waiting.push((id, command, reply));
                        self.feed(id, TaskEvent::Command(command));
                    }
                }
            },
            Mail::Lost(worker, cause) => self.lose(worker, cause),
            Mail::Stop => return false,
        }
        true
    }

    /// The latest task of a name.
    fn find(&self, name: &str) -> Option<TaskId> {
        self.tasks.iter().rev().find(|(_, record)| record.name == name).map(|(&id, _)| id)
    }

    fn submit(&mut self, task: NewTask) -> Result<(), ServiceError> {
        let is_over = |id: &TaskId| self.book.view(*id, self.now()).is_none_or(|view| view.state.is_over());
        if self.find(&task.name).is_some_and(|id| !is_over(&id)) {
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
        let id = TaskId(self.tasks.last_key_value().map_or(0, |(last, _)| last.0 + 1));
        let NewTask { name, config, digest, .. } = task;
        self.book.submit(id, config.weight, config.checkpoint.is_some(), self.now());
        let log = config.checkpoint.as_ref().map(|checkpoints| checkpoints.folder.join("progress.jsonl"));
        let record = Record {
            name,
            config,
            digest,
            state: Some(state),
            worker: None,
            checkpoint: None,
            checkpoint_error: String::new(),
            log: log.unwrap_or_default(),
            log_file: None,
        };
        tracing::info!(
            task = record.name,
            device = self.device,
            state_bytes = state.bytes,
            "training task taken"
        );
        self.tasks.insert(id, record);
        let (is_closed, at) = (self.gate.is_closed(), self.now());
        let actions = self.book.set_closed(is_closed, at);
        self.perform(actions);
        Ok(())
    }

    fn perform(&mut self, actions: Vec<TaskAction>) {
        for action in actions {
            match action {
                TaskAction::Start(id) => self.start(id),
                TaskAction::Train(id) => {
                    let arena = self.arena();
                    let Some(worker) = self.worker(id) else { continue };
                    let (block, sent) = (worker.block, worker.send(&ToWorker::Train { arena }));
                    self.gate.admit(block);
                    self.check_sent(id, sent);
                }
                TaskAction::Interrupt(_) => self.gate.interrupt(),
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
        let book = &self.book;
        let at = self.begun.elapsed();
        let is_done = |id: TaskId, command: TaskCommand| {
            book.view(id, at).is_none_or(|view| match command {
                TaskCommand::Resume => true,
                TaskCommand::Pause => book.rests(id),
                TaskCommand::Stop => view.state.is_over(),
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
    fn arena(&self) -> pswitch_protocol::Region {
        let states = self.tasks.values().filter_map(|record| record.state);
        let offset = states.map(|state| state.end()).max().unwrap_or(self.region.offset);
        pswitch_protocol::Region { offset, bytes: self.region.end() - offset }
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
        let Some(state) = record.state else { return };
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
        let started = self.attachment.start(&self.supervisor, lost, block, self.poll.registry(), || {
            worker::prepare(&record.name, &record.config, record.digest, state)
        });
        match started {
            Ok(worker) => record.worker = Some(worker),
            Err(reason) => self.feed(id, TaskEvent::Lost(reason)),
        }
    }

    fn task_of(&self, worker: WorkerId) -> Option<TaskId> {
        let is_its = |record: &Record| record.worker.as_ref().is_some_and(|known| known.id == worker);
        self.tasks.iter().find(|(_, record)| is_its(record)).map(|(&id, _)| id)
    }

    fn read(&mut self, worker: WorkerId) {
        while let Some(id) = self.task_of(worker) {
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
    }

    fn hear(&mut self, id: TaskId, message: FromWorker) {
        match message {
            FromWorker::Attached => {}
            FromWorker::TaskReady { result } => {
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
                if let (TaskPause::Failed { reason }, Some(record)) = (&pause, self.tasks.get(&id)) {
                    tracing::error!(task = record.name, reason, "training task failed");
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
        let is_over = self.book.view(id, self.now()).is_some_and(|view| view.state.is_over());
        if let Some(record) = self.tasks.get_mut(&id) {
            if let Some(mut gone) = record.worker.take() {
                gone.deregister(self.poll.registry());
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
        if let Some(state) = self.tasks.get_mut(&id).and_then(|record| record.state.take())
            && let Err(error) = self.states.free(state)
        {
            tracing::error!(%error, "the state of a training task cannot be freed");
        }
    }

    fn publish(&self) {
        let at = self.now();
        let status = |(&id, record): (&TaskId, &Record)| {
            let view = self.book.view(id, at)?;
            Some((
                record.name.clone(),
                TaskStatus {
                    name: record.name.clone(),
                    state: view.state,
                    reason: view.reason,
                    device: self.device.clone(),
                    steps_done: view.extent.steps_done,
                    total_steps: view.extent.total_steps,
                    learning_rate: view.rate,
                    progress: view.progress,
                    checkpoint: record.checkpoint.clone(),
                    checkpoint_error: record.checkpoint_error.clone(),
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
