//! The worker of a task: forked, attached, spoken with.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use mio::unix::SourceFd;
use mio::{Interest, Registry, Token};
use pswitch_device::SharedMemory;
use pswitch_mem_pool::Range;
use pswitch_protocol::{
    Attach, Channel, DeviceSpec, FromWorker, PrepareTask, Region, ToWorker, WorkerMemory, control,
};
use pswitch_train::TaskConfig;

use super::TrainingParts;
use crate::error::ControllerError;
use crate::scheduler::WorkerId;
use crate::supervisor::{OnLoss, Supervisor};

/// Token of the mailbox; workers follow.
pub(super) const MAIL: Token = Token(0);

pub(super) fn worker_of(token: Token) -> Option<WorkerId> {
    token.0.checked_sub(1).and_then(|number| u32::try_from(number).ok()).map(WorkerId)
}

/// What every worker of a device's tasks is told to attach to.
pub(super) struct Attachment {
    device: DeviceSpec,
    pool: Vec<u8>,
    pool_descriptors: Vec<OwnedFd>,
    slots: Arc<SharedMemory>,
    control: SharedMemory,
}

impl Attachment {
    pub(super) fn new(parts: &TrainingParts, control: SharedMemory) -> Result<Self, ControllerError> {
        let (pool, pool_descriptors) = parts.pool.export()?.into_parts();
        let device = DeviceSpec { id: parts.device.properties().id.to_string(), threads: parts.threads };
        Ok(Self { device, pool, pool_descriptors, slots: Arc::clone(&parts.slots), control })
    }

    /// Wipes a block of the control page, before somebody else has it.
    pub(super) fn wipe(&self, block: u64) {
        for word in control::WORDS.into_iter().filter_map(|offset| self.control.word(block + offset).ok()) {
            word.store(0, Ordering::SeqCst);
        }
    }

    /// Forks a worker and tells it what to attach to. The error is a line.
    pub(super) fn start(
        &self,
        supervisor: &Supervisor,
        lost: OnLoss,
        block: u64,
        registry: &Registry,
        deterministic: bool,
    ) -> Result<TaskWorker, String> {
        let (id, channel) = supervisor.fork(lost).map_err(|error| error.to_string())?;
        let attach = Attach {
            worker: id.0,
            device: self.device.clone(),
            memory: WorkerMemory::Pool(self.pool.clone()),
            slots_bytes: self.slots.bytes(),
            arenas: Vec::new(),
            control: block,
            control_bytes: self.control.bytes(),
            spin_us: 0,
            waits_by_kernels: false,
            deterministic,
        };
        let mut descriptors: Vec<BorrowedFd<'_>> = vec![self.slots.fd(), self.control.fd()];
        descriptors.extend(self.pool_descriptors.iter().map(AsFd::as_fd));
        channel
            .send(&ToWorker::Attach(attach), &descriptors)
            .and_then(|()| channel.set_nonblocking(true))
            .map_err(|error| error.to_string())?;
        registry
            .register(&mut SourceFd(&channel.as_raw_fd()), Token(id.0 as usize + 1), Interest::READABLE)
            .map_err(|error| error.to_string())?;
        Ok(TaskWorker { id, block, channel })
    }
}

/// The order to prepare a task.
pub(super) fn prepare(
    name: &str,
    config: &TaskConfig,
    digest: u64,
    state: Range,
) -> Result<PrepareTask, String> {
    let config = serde_json::to_string(config).map_err(|error| error.to_string())?;
    let state = Region { offset: state.offset, bytes: state.bytes };
    Ok(PrepareTask { name: name.to_owned(), config, digest, state })
}

pub(super) struct TaskWorker {
    pub(super) id: WorkerId,
    /// Offset of its block in the control page.
    pub(super) block: u64,
    channel: Channel,
}

impl TaskWorker {
    /// False if it cannot be told.
    pub(super) fn send(&self, message: &ToWorker) -> bool {
        self.channel.send(message, &[]).is_ok()
    }

    /// The next that it has said, if there is anything. A closed connection says nothing: its loss is reported.
    pub(super) fn receive(&self) -> Result<Option<FromWorker>, String> {
        match self.channel.receive::<FromWorker>() {
            Ok(message) => Ok(message.map(|(message, _)| message)),
            Err(error) if error.would_block() => Ok(None),
            Err(error) => Err(error.to_string()),
        }
    }

    pub(super) fn deregister(&mut self, registry: &Registry) {
        // A descriptor that is closed leaves the registry by itself; this is for the copies that others may hold.
        let _ = registry.deregister(&mut SourceFd(&self.channel.as_raw_fd()));
    }
}
