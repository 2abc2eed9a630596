//! Training on one device, beside its driver: a thread that forks a worker for each task and lets one of them compute while
//! there are no requests.
//!
//! [`book`] decides, the thread here does what it says. What the driver has to do with it is the [`Gate`]: closed with the
//! first request, open when the last one is answered.

mod book;
mod gate;
mod host;
mod share;
mod worker;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::JoinHandle;

use mio::{Poll, Waker};
use pswitch_device::{Device, DeviceMemory, SharedMemory};
use pswitch_mem_pool::Range;
use pswitch_protocol::control;
use pswitch_train::TaskConfig;
use tokio::sync::oneshot;

use crate::error::ControllerError;
use crate::scheduler::WorkerId;
use crate::service::{ServiceError, TaskCommand, TaskStatus};
use crate::supervisor::Supervisor;
pub(crate) use gate::Gate;
use host::Host;
pub(crate) use share::{Demand, Share, TurnAction};
use worker::{Attachment, MAIL};

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
        let attachment = Attachment::new(&parts, control)?;
        let (host_gate, host_statuses) = (Arc::clone(&gate), Arc::clone(&statuses));
        let host = Host::new(parts, attachment, host_gate, poll, mailbox.clone(), host_statuses);
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

    /// The command is given at once; the answer comes when the task does as it was told.
    pub(crate) fn command(
        &self,
        name: &str,
        command: TaskCommand,
    ) -> impl Future<Output = Result<(), ServiceError>> + use<> {
        let (reply, answer) = oneshot::channel();
        self.mailbox.put(Mail::Command(name.to_owned(), command, reply));
        async { answer.await.unwrap_or(Err(ServiceError::Draining)) }
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
