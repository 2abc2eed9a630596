//! Training on one device, beside its driver: a thread that forks a worker for each task and lets one of them compute while
//! there are no requests.
//!
//! [`book`] decides, the thread here does what it says. What the driver has to do with it is the [`Gate`]: closed with the
//! first request, open when the last one is answered. Where states give way to models, the driver also moves them: it is asked
//! for their part of the pool, says when that is there, and is told when nobody uses it.

mod book;
mod gate;
mod host;
mod journal;
mod places;
mod share;
mod states;
mod worker;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use mio::{Poll, Waker};
use pswitch_device::{Device, DeviceMemory, SharedMemory};
use pswitch_mem_pool::Range;
use pswitch_protocol::control;
use pswitch_train::{FolderClaim, TaskConfig};
use pswitch_transfer::TransferId;
use tokio::sync::oneshot;

use crate::driver;
use crate::error::ControllerError;
use crate::scheduler::WorkerId;
use crate::service::{ServiceError, TaskCommand, TaskState, TaskStatus};
use crate::supervisor::Supervisor;
pub(crate) use gate::Gate;
use host::Host;
use places::Places;
pub(crate) use share::{Demand, Share, TurnAction};
pub(crate) use states::{MadeRoom, States, Unused};
use worker::{Attachment, MAIL};

/// Tasks that a device may have that are not over: blocks of the control page.
const MOST_TASKS: u64 = 64;

/// What training on a device is made of.
pub(crate) struct TrainingParts {
    pub(crate) device: Arc<dyn Device>,
    pub(crate) pool: Arc<dyn DeviceMemory>,
    /// The part of the pool for states, and, behind them, what a step allocates.
    pub(crate) region: Range,
    /// Whether models may lie in that part.
    pub(crate) gives_way: bool,
    pub(crate) slots: Arc<SharedMemory>,
    pub(crate) supervisor: Arc<Supervisor>,
    pub(crate) threads: u32,
    /// How long to look for what comes next before sleeping.
    pub(crate) spin: Duration,
}

/// A task that was checked as far as that needs no worker.
#[derive(Debug)]
pub(crate) struct NewTask {
    pub(crate) name: String,
    pub(crate) config: TaskConfig,
    /// Digest of its archive.
    pub(crate) digest: u64,
    pub(crate) state_bytes: u64,
    /// Its folder of checkpoints.
    pub(crate) claim: Option<FolderClaim>,
}

/// The answer to who commands a task that is over.
pub(crate) fn refused_as_over(name: &str, state: TaskState) -> ServiceError {
    let message = format!("training task '{name}' is over: it is {}", state.name());
    ServiceError::InvalidRequest { message }
}

type Reply = oneshot::Sender<Result<(), ServiceError>>;

enum Mail {
    Submit(Box<NewTask>, Reply),
    Command(String, TaskCommand, Reply),
    Lost(WorkerId, String),
    /// The driver by which places for states are to be had.
    Connect(driver::Mailbox),
    /// States are in their places, until they are left.
    Admitted,
    /// They could not be brought back.
    Refused,
    /// States were moved.
    Moved,
    /// The states of these places are of no use any more.
    Spoilt(Vec<Range>),
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

/// States that give way to models, as the driver sees them.
#[derive(Clone)]
pub(crate) struct Room {
    pub(crate) states: Arc<States>,
    mailbox: Mailbox,
}

impl Room {
    /// States are in their places, and nothing comes there until the driver is told that they are left.
    pub(crate) fn admit(&self) {
        self.mailbox.put(Mail::Admitted);
    }

    /// They could not be brought back; they are asked for again in a while.
    pub(crate) fn refuse(&self) {
        self.mailbox.put(Mail::Refused);
    }

    /// A transfer is over.
    pub(crate) fn note_transfer(&self, transfer: TransferId, landed: bool) {
        if landed {
            if self.states.landed(transfer) {
                self.mailbox.put(Mail::Moved);
            }
            return;
        }
        let spoilt = self.states.failed(transfer);
        if !spoilt.is_empty() {
            self.mailbox.put(Mail::Spoilt(spoilt));
        }
    }
}

type Statuses = Arc<Mutex<BTreeMap<String, TaskStatus>>>;

/// Training that runs; dropping it ends all tasks where they are.
pub(crate) struct Training {
    mailbox: Mailbox,
    gate: Arc<Gate>,
    room: Option<Room>,
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
        let gate = Arc::new(Gate::new(page, Arc::clone(&waker), !parts.gives_way));
        let (sender, receiver) = mpsc::channel();
        let mailbox = Mailbox { sender, waker };
        let states = parts.gives_way.then(|| Arc::new(States::new(Arc::clone(&parts.pool))));
        let room = states.map(|states| Room { states, mailbox: mailbox.clone() });
        let statuses = Statuses::default();
        let name = parts.device.properties().id.to_string();
        let attachment = Attachment::new(&parts, control)?;
        let (host_gate, host_statuses) = (Arc::clone(&gate), Arc::clone(&statuses));
        let places = Places::new(room.as_ref().map(|room| Arc::clone(&room.states)));
        let host = Host::new(parts, places, attachment, host_gate, poll, mailbox.clone(), host_statuses)
            .map_err(failed("a thread"))?;
        let thread = std::thread::Builder::new()
            .name(format!("pswitch-training-{name}"))
            .spawn(move || host.run(&receiver))
            .map_err(failed("a thread"))?;
        Ok(Self { mailbox, gate, room, statuses, thread: Some(thread) })
    }

    pub(crate) fn gate(&self) -> &Arc<Gate> {
        &self.gate
    }

    /// What the driver needs to move states, where they give way.
    pub(crate) fn room(&self) -> Option<&Room> {
        self.room.as_ref()
    }

    /// Says by which driver places for states are to be had.
    pub(crate) fn connect(&self, driver: driver::Mailbox) {
        self.mailbox.put(Mail::Connect(driver));
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
