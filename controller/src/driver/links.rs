use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use mio::unix::SourceFd;
use mio::{Interest, Registry, Token};
use pswitch_device::SharedMemory;
use pswitch_mem_pool::ModelId;
use pswitch_protocol::{
    Attach, Channel, DeviceSpec, LoadModel, ProtocolError, Region, ToWorker, WorkerMemory, control,
};

use super::home::HomedModel;
use crate::scheduler::WorkerId;

/// Blocks in the control page: far more than workers that a device may have, those that are being replaced included.
const CONTROL_BLOCKS: u64 = 1024;

/// Longest wait between two attempts to replace workers that die before they are ready.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// Workers are told to look out no more often.
const LOOK_OUT_EVERY: Duration = Duration::from_micros(200);

/// So often they are told without having said anything: a small part of what a socket has room for.
const MOST_UNHEARD: u32 = 16;

/// A worker as the driver knows it.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) channel: Channel,
    /// What it has not built yet.
    pub(super) unbuilt: BTreeSet<ModelId>,
    /// What it builds now: one at a time, so that the socket never fills up.
    pub(super) building: Option<ModelId>,
    pub(super) attached: bool,
    pub(super) ready: bool,
    /// When it was last told to look out, and how often since it last said anything.
    looks_out_from: Option<Instant>,
    unheard: u32,
    /// Offset of its block in the control page.
    control: u64,
}

/// All workers of a driver: their connections, their stop flags, and when the next one is to be forked.
#[derive(Debug)]
pub(super) struct Links {
    links: BTreeMap<WorkerId, Link>,
    control: SharedMemory,
    /// Workers in a row that died before they were ready.
    stillborn: u32,
    /// When workers may be forked again.
    pub(super) not_before: Option<Instant>,
}

/// What every worker of a device is told to attach to.
#[derive(Debug)]
pub(super) struct Attachment {
    pub(super) device: DeviceSpec,
    pub(super) pool: Vec<u8>,
    pub(super) pool_descriptors: Vec<OwnedFd>,
    pub(super) slots: Arc<SharedMemory>,
    pub(super) arenas: Vec<Region>,
    /// How long workers look for the next message before they sleep.
    pub(super) spin: Duration,
    /// Whether workers may wait by kernels on a GPU.
    pub(super) waits_by_kernels: bool,
}

/// What workers have of the device beside the pool, as they last told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct OutsideUse {
    /// Allocations since the workers began.
    pub(crate) allocations: u64,
    /// Bytes of those that are alive.
    pub(crate) bytes: u64,
    /// Graphs captured since the workers began.
    pub(crate) graphs: u64,
}

impl Links {
    pub(super) fn new() -> Result<Self, pswitch_device::DeviceError> {
        let control = SharedMemory::create("pswitch-control", CONTROL_BLOCKS * control::BLOCK_BYTES)?;
        Ok(Self { links: BTreeMap::new(), control, stillborn: 0, not_before: None })
    }

    /// Takes in a worker that was just forked: it is told what to attach to and what to build.
    pub(super) fn add(
        &mut self,
        worker: WorkerId,
        channel: Channel,
        registry: &Registry,
        attachment: &Attachment,
        models: &BTreeMap<ModelId, HomedModel>,
    ) -> Result<(), ProtocolError> {
        let control = self.free_block();
        let attach = Attach {
            worker: worker.0,
            device: attachment.device.clone(),
            memory: WorkerMemory::Pool(attachment.pool.clone()),
            slots_bytes: attachment.slots.bytes(),
            arenas: attachment.arenas.clone(),
            control,
            control_bytes: self.control.bytes(),
            spin_us: u64::try_from(attachment.spin.as_micros()).unwrap_or(u64::MAX),
            waits_by_kernels: attachment.waits_by_kernels,
            deterministic: false,
        };
        let mut descriptors: Vec<BorrowedFd<'_>> = vec![attachment.slots.fd(), self.control.fd()];
        descriptors.extend(attachment.pool_descriptors.iter().map(AsFd::as_fd));
        channel.send(&ToWorker::Attach(attach), &descriptors)?;
        channel.set_nonblocking(true)?;
        registry
            .register(&mut SourceFd(&channel.as_raw_fd()), token(worker), Interest::READABLE)
            .map_err(|source| ProtocolError::Io { operation: "registration", source })?;
        let unbuilt = models.keys().copied().collect();
        let mut link = Link {
            channel,
            unbuilt,
            building: None,
            attached: false,
            ready: false,
            looks_out_from: None,
            unheard: 0,
            control,
        };
        link.build_next(models)?;
        self.links.insert(worker, link);
        Ok(())
    }

    /// The first block that no worker has, wiped.
    fn free_block(&self) -> u64 {
        let taken: BTreeSet<u64> = self.links.values().map(|link| link.control).collect();
        let mut blocks = (0..CONTROL_BLOCKS).map(|block| block * control::BLOCK_BYTES);
        let block = blocks.find(|block| !taken.contains(block)).expect("a device has at most 64 workers");
        for offset in control::WORDS {
            self.word(block, offset).store(0, Ordering::Relaxed);
        }
        block
    }

    fn word(&self, block: u64, offset: u64) -> &AtomicU32 {
        self.control.word(block + offset).expect("every block lies in the control page")
    }

    /// What all workers have of the device beside the pool.
    pub(super) fn outside_use(&self) -> OutsideUse {
        self.links.values().fold(OutsideUse::default(), |sum, link| {
            let of = |offset| u64::from(self.word(link.control, offset).load(Ordering::Relaxed));
            OutsideUse {
                allocations: sum.allocations + of(control::ALLOCATIONS),
                bytes: sum.bytes + of(control::OUTSIDE_KIB) * 1024,
                graphs: sum.graphs + of(control::GRAPHS),
            }
        })
    }

    /// Notes that workers come up again: the next loss is replaced at once.
    pub(super) fn note_ready(&mut self) {
        self.stillborn = 0;
    }

    /// Forgets a worker that is gone.
    pub(super) fn remove(&mut self, worker: WorkerId, registry: &Registry) -> Option<Link> {
        let link = self.links.remove(&worker)?;
        // A descriptor that is closed leaves the registry by itself; this is for the copies that others may hold.
        let _ = registry.deregister(&mut SourceFd(&link.channel.as_raw_fd()));
        Some(link)
    }

    /// Puts off the next fork when workers die before they are ready, ever longer.
    pub(super) fn note_loss(&mut self, was_ready: bool, now: Instant) {
        if was_ready {
            // A pause that others have earned goes on.
            self.not_before = self.not_before.max(Some(now));
            return;
        }
        let pause = Duration::from_millis(50) * 2_u32.saturating_pow(self.stillborn.min(16));
        self.stillborn += 1;
        self.not_before = Some(now + pause.min(LONGEST_PAUSE));
    }

    pub(super) fn get(&self, worker: WorkerId) -> Option<&Link> {
        self.links.get(&worker)
    }

    pub(super) fn get_mut(&mut self, worker: WorkerId) -> Option<&mut Link> {
        self.links.get_mut(&worker)
    }

    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = (WorkerId, &mut Link)> {
        self.links.iter_mut().map(|(&worker, link)| (worker, link))
    }

    pub(super) fn len(&self) -> usize {
        self.links.len()
    }

    /// Whether every worker that lives has built the model; false without workers.
    pub(super) fn all_built(&self, model: ModelId) -> bool {
        !self.links.is_empty()
            && self.links.values().all(|link| link.attached && !link.unbuilt.contains(&model))
    }

    /// Sets or clears the stop flag of a worker.
    pub(super) fn set_stop(&self, worker: WorkerId, stop: bool) {
        let Some(link) = self.links.get(&worker) else { return };
        self.word(link.control, control::STOP).store(u32::from(stop), Ordering::Relaxed);
    }

    /// Lets the execution of a worker go that is held back, or has the next one wait for that.
    pub(super) fn set_let_go(&self, worker: WorkerId, let_go: bool) {
        let Some(link) = self.links.get(&worker) else { return };
        self.word(link.control, control::LET_GO).store(u32::from(let_go), Ordering::SeqCst);
    }
}

impl Link {
    /// Has it look for orders before it sleeps: now and then, since requests may be announced by the hundred, and not when
    /// it has not read for long, since its orders are to find room in the socket.
    pub(super) fn look_out(&mut self, rehearse: bool, now: Instant) {
        let is_told = |from: Instant| now.saturating_duration_since(from) < LOOK_OUT_EVERY;
        if self.unheard < MOST_UNHEARD && !self.looks_out_from.is_some_and(is_told) {
            self.looks_out_from = Some(now);
            self.unheard += 1;
            // One that cannot be told is noticed when it is to execute.
            let _ = self.channel.send(&ToWorker::LookOut { rehearse }, &[]);
        }
    }

    /// Notes that the worker has said something.
    pub(super) fn heard(&mut self) {
        self.unheard = 0;
    }

    /// Adds a model to what the worker has to build.
    pub(super) fn build(
        &mut self,
        model: ModelId,
        models: &BTreeMap<ModelId, HomedModel>,
    ) -> Result<(), ProtocolError> {
        self.unbuilt.insert(model);
        self.build_next(models)
    }

    /// Notes that the worker has built what it was told to, or could not, and tells it the next.
    pub(super) fn built(
        &mut self,
        model: ModelId,
        usable: bool,
        models: &BTreeMap<ModelId, HomedModel>,
    ) -> Result<(), ProtocolError> {
        self.building = None;
        self.unbuilt.remove(&model);
        if let (true, Some(homed)) = (usable, models.get(&model)) {
            self.plan(homed)?;
        }
        self.build_next(models)
    }

    fn build_next(&mut self, models: &BTreeMap<ModelId, HomedModel>) -> Result<(), ProtocolError> {
        if self.building.is_some() {
            return Ok(());
        }
        // A model that was removed in the meantime need not be built.
        self.unbuilt.retain(|model| models.contains_key(model));
        let Some(model) = self.unbuilt.first().and_then(|model| models.get(model)) else { return Ok(()) };
        let region = |range: pswitch_mem_pool::Range| Region { offset: range.offset, bytes: range.bytes };
        self.building = Some(model.spec.id);
        let tables = model.table_storages();
        let descriptors: Vec<BorrowedFd<'_>> =
            if tables.is_empty() { Vec::new() } else { vec![model.host_span.memory().fd()] };
        self.channel.send(
            &ToWorker::Load(LoadModel {
                model: model.spec.id.0,
                name: model.spec.name.clone(),
                path: model.spec.path.clone(),
                digest: model.spec.digest,
                span: region(model.home.span),
                doorbells: region(model.home.doorbells),
                host_span_bytes: (!tables.is_empty()).then_some(model.host_span.bytes()),
                tables,
                keeps_weights: false,
            }),
            &descriptors,
        )
    }

    /// Tells the worker how a model moves.
    pub(super) fn plan(&self, model: &HomedModel) -> Result<(), ProtocolError> {
        let (wait_nodes, table_nodes) = (model.wait_nodes.clone(), model.table_nodes.clone());
        self.channel.send(&ToWorker::Plan { model: model.spec.id.0, wait_nodes, table_nodes }, &[])
    }
}

/// Tokens of the poll: 0 is the mailbox, workers follow.
pub(super) const MAILBOX: Token = Token(0);

pub(super) fn token(worker: WorkerId) -> Token {
    Token(worker.0 as usize + 1)
}

pub(super) fn worker_of(token: Token) -> Option<WorkerId> {
    token.0.checked_sub(1).and_then(|number| u32::try_from(number).ok()).map(WorkerId)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link() -> (Link, Channel) {
        let (channel, theirs) = Channel::pair().unwrap();
        channel.set_nonblocking(true).unwrap();
        theirs.set_nonblocking(true).unwrap();
        let link = Link {
            channel,
            unbuilt: BTreeSet::new(),
            building: None,
            attached: true,
            ready: true,
            looks_out_from: None,
            unheard: 0,
            control: 0,
        };
        (link, theirs)
    }

    fn told(theirs: &Channel) -> Vec<ToWorker> {
        std::iter::from_fn(|| theirs.receive().ok().flatten().map(|(message, _)| message)).collect()
    }

    #[test]
    fn a_worker_is_told_to_look_out_now_and_then() {
        let (mut link, theirs) = link();
        let begun = Instant::now();
        // A request each 50 us: one in four is told of.
        for announced in 0..16 {
            link.look_out(announced == 0, begun + Duration::from_micros(50) * announced);
        }
        let expected = [true, false, false, false].map(|rehearse| ToWorker::LookOut { rehearse });
        assert_eq!(told(&theirs), expected);
    }

    #[test]
    fn a_worker_that_does_not_read_is_told_so_often_and_its_orders_find_room() {
        let (mut link, theirs) = link();
        let begun = Instant::now();
        let mut announced = (0..).map(|announced| begun + LOOK_OUT_EVERY * announced);
        for at in announced.by_ref().take(10_000) {
            link.look_out(true, at);
        }
        link.channel.send(&ToWorker::Unload { model: 7 }, &[]).unwrap();
        let mut all = told(&theirs);
        assert_eq!(all.pop(), Some(ToWorker::Unload { model: 7 }));
        assert_eq!(all.len(), MOST_UNHEARD as usize);
        link.heard();
        link.look_out(true, announced.next().unwrap());
        assert_eq!(told(&theirs).len(), 1);
    }
}
