//! Mechanisms with a process that stands by while another one trains: what pswitch is without one of its parts.

use std::ffi::OsString;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::bail;
use pswitch_controller::Bandwidth;
use pswitch_device::{
    CopyStream, Device, DeviceId, DeviceMemory, DeviceSlice, HostSlice, LinkThrottle, PinnedMemory,
    SharedMemory, doorbell, open_device,
};
use pswitch_model::StorageId;
use pswitch_protocol::{Elsewhere, Executed, Region, ToWorker, WorkerMemory};

use super::desk::{Desk, Group, MODEL, Order, Request};
use super::process::Process;
use super::service::{Answered, Procedure};

/// Longest wait for copies that were made.
const PATIENCE: Duration = Duration::from_secs(60);

/// A process that trains when it is told to, until it is told to stop.
pub(super) struct Trainer {
    process: Process,
    is_told: bool,
}

impl Trainer {
    /// Its task is prepared while the caller goes on: it takes as long as all that stands by.
    pub(super) fn start(desk: &Desk, environment: &[(&'static str, OsString)]) -> anyhow::Result<Self> {
        let mut process = desk.start(environment, desk.training_bytes(), false)?;
        desk.prepare(&mut process)?;
        Ok(Self { process, is_told: false })
    }

    pub(super) fn train(&mut self, desk: &Desk) -> anyhow::Result<()> {
        if std::mem::replace(&mut self.is_told, true) {
            return Ok(());
        }
        self.process.train(&desk.training_order(desk.training_bytes()))
    }

    pub(super) fn is_training(&mut self) -> anyhow::Result<bool> {
        Ok(self.is_told && self.process.is_training()?)
    }

    pub(super) fn steps(&mut self) -> anyhow::Result<u64> {
        self.process.steps()
    }

    /// Tells it to stop, and does not wait.
    fn tell_stop(&self) -> anyhow::Result<()> {
        if self.is_told { self.process.set_stop(true) } else { Ok(()) }
    }

    /// Waits until it has stopped, if it was told to: when that was.
    fn await_stop(&mut self) -> anyhow::Result<Option<u64>> {
        if !std::mem::take(&mut self.is_told) {
            return Ok(None);
        }
        self.process.await_pause().map(Some)
    }
}

/// What stands by, and how the model comes there and goes again.
pub(crate) trait Standby {
    /// Training is to have the device: the model goes.
    fn leave(&mut self) -> anyhow::Result<()>;

    /// Runs a request, for which the model comes first if it is not there.
    fn run(&mut self, desk: &Desk, request: &Request, is_there: bool) -> anyhow::Result<Executed>;
}

/// Something that stands by beside a process that trains.
pub(crate) struct BesideTraining<S> {
    desk: Arc<Desk>,
    trainer: Trainer,
    standby: S,
    is_there: bool,
}

impl<S: Standby> Procedure for BesideTraining<S> {
    fn train(&mut self) -> anyhow::Result<()> {
        if std::mem::take(&mut self.is_there) {
            self.standby.leave()?;
        }
        self.trainer.train(&self.desk)
    }

    fn is_training(&mut self) -> anyhow::Result<bool> {
        self.trainer.is_training()
    }

    fn steps(&mut self) -> anyhow::Result<u64> {
        self.trainer.steps()
    }

    fn answer(&mut self, request: &Request) -> anyhow::Result<Answered> {
        self.trainer.tell_stop()?;
        let was_there = std::mem::replace(&mut self.is_there, true);
        let executed = self.standby.run(&self.desk, request, was_there)?;
        Ok(Answered { executed, stopped_ns: self.trainer.await_stop()?, switched: !was_there })
    }
}

/// Without unified memory management: the process that stands by has a pinned copy of the weights of its own, from which
/// it streams them, by the plan of pswitch, into memory that it allocates for the request and frees behind it. Nothing
/// can be captured in advance over memory that is not there yet.
pub(crate) struct NoUnified {
    standby: Process,
    groups: Vec<Region>,
}

impl NoUnified {
    pub(crate) fn start(desk: Arc<Desk>, groups: &[Group]) -> anyhow::Result<BesideTraining<Self>> {
        let trainer = Trainer::start(&desk, &[])?;
        let mut standby = desk.start(&[], desk.room.bytes(), false)?;
        desk.load(&mut standby, true)?;
        desk.plan(&mut standby, groups)?;
        let groups = groups.iter().map(|group| group.part).collect();
        Ok(BesideTraining { desk, trainer, standby: Self { standby, groups }, is_there: false })
    }
}

impl Standby for NoUnified {
    fn leave(&mut self) -> anyhow::Result<()> {
        self.standby.send(&ToWorker::Release { model: MODEL }, &[])
    }

    fn run(&mut self, desk: &Desk, request: &Request, is_there: bool) -> anyhow::Result<Executed> {
        let mut groups = Vec::new();
        if !is_there {
            for part in desk.whole() {
                let to = Elsewhere::Allocated;
                self.standby.send(&ToWorker::Move { model: MODEL, part, to }, &[])?;
            }
            groups.clone_from(&self.groups);
        }
        desk.bring_and_run(&mut self.standby, request, groups)
    }
}

/// With the weights in CUDA's managed memory, of just their size: their pages come when kernels touch them. While training
/// has the GPU they lie on the host.
pub(crate) struct Managed {
    standby: Process,
}

impl Managed {
    pub(crate) fn start(desk: Arc<Desk>) -> anyhow::Result<BesideTraining<Self>> {
        if let DeviceId::Host(_) = desk.device() {
            bail!("the host has no managed memory");
        }
        let trainer = Trainer::start(&desk, &[])?;
        let mut standby = desk.start(&[], desk.room.bytes(), true)?;
        desk.load(&mut standby, true)?;
        for part in desk.whole() {
            standby.send(&ToWorker::Move { model: MODEL, part, to: Elsewhere::Managed }, &[])?;
        }
        desk.bring(&mut standby, desk.whole())?;
        Ok(BesideTraining { desk, trainer, standby: Self { standby }, is_there: true })
    }
}

impl Standby for Managed {
    fn leave(&mut self) -> anyhow::Result<()> {
        self.standby.send(&ToWorker::SendBack { model: MODEL }, &[])
    }

    fn run(&mut self, desk: &Desk, request: &Request, _is_there: bool) -> anyhow::Result<Executed> {
        desk.bring_and_run(&mut self.standby, request, Vec::new())
    }
}

/// Without the one handle for the whole pool: every group of the plan has memory of its own, allocated once by this
/// process, which copies the weights there; the process that stands by opens a handle for each when the request comes.
pub(crate) struct NoIpc {
    // Before the memory that it has opened.
    standby: Process,
    stream: Box<dyn CopyStream>,
    slots: PinnedMemory,
    weights: PinnedMemory,
    groups: Vec<(Group, Arc<dyn DeviceMemory>)>,
    pool: Arc<dyn DeviceMemory>,
    device: Arc<dyn Device>,
    /// The doorbell of each group.
    doorbells: Vec<DeviceSlice>,
}

impl NoIpc {
    pub(crate) fn start(desk: Arc<Desk>, groups: &[Group]) -> anyhow::Result<BesideTraining<Self>> {
        let trainer = Trainer::start(&desk, &[])?;
        let bandwidth_bytes_per_s = desk.link().map(Bandwidth::bytes_per_s);
        let throttle = LinkThrottle { bandwidth_bytes_per_s, ..LinkThrottle::default() };
        let device = open_device(desk.device(), throttle)?;
        let pool = device.allocate(desk.room.bytes())?;
        let (handle, descriptors) = pool.export()?.into_parts();
        let mut standby = desk.attach(&[], WorkerMemory::Pool(handle), &descriptors, false)?;
        desk.load(&mut standby, false)?;
        desk.plan(&mut standby, groups)?;
        let words = (desk.room.doorbells.offset..).step_by(4).take(groups.len());
        let doorbells = words.map(|offset| DeviceSlice::new(Arc::clone(&pool), offset, 4));
        let memory = groups.iter().map(|&group| Ok((group, device.allocate(group.part.bytes)?)));
        let standby = Self {
            stream: device.copy_stream("weights")?,
            slots: device.pin(Arc::clone(desk.slots.shared()))?,
            weights: device.pin(Arc::new(weights(&desk)?))?,
            doorbells: doorbells.collect::<Result<_, _>>()?,
            groups: memory.collect::<anyhow::Result<_>>()?,
            standby,
            pool,
            device,
        };
        Ok(BesideTraining { desk, trainer, standby, is_there: false })
    }

    fn slice(&self, place: Region) -> anyhow::Result<DeviceSlice> {
        Ok(DeviceSlice::new(Arc::clone(&self.pool), place.offset, place.bytes)?)
    }

    /// Has the standby process open all handles.
    fn hand_over(&mut self) -> anyhow::Result<()> {
        for (group, memory) in &self.groups {
            let (handle, descriptors) = memory.export()?.into_parts();
            let descriptors: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
            let to = Elsewhere::Opened(handle);
            self.standby.send(&ToWorker::Move { model: MODEL, part: group.part, to }, &descriptors)?;
        }
        Ok(())
    }
}

impl Standby for NoIpc {
    fn leave(&mut self) -> anyhow::Result<()> {
        self.standby.send(&ToWorker::Release { model: MODEL }, &[])
    }

    fn run(&mut self, desk: &Desk, request: &Request, is_there: bool) -> anyhow::Result<Executed> {
        let Order { inputs, execute } = desk.order(request, is_there)?;
        let input_doorbell = self.slice(Region { offset: execute.input_doorbell, bytes: 4 })?;
        let doorbells = if is_there { &[] } else { &self.doorbells[..] };
        let words: Vec<_> = doorbells.iter().chain([&input_doorbell]).cloned().collect();
        self.device.set_words(&words, doorbell::CLEAR)?;
        for (from, to) in inputs {
            let from = HostSlice::new(self.slots.clone(), from.offset, from.bytes)?;
            let to = self.slice(to)?;
            self.stream.copy_in(&from, &to)?;
        }
        self.stream.write_word(&input_doorbell, doorbell::RUNG)?;
        for ((group, memory), word) in self.groups.iter().zip(doorbells) {
            let Region { offset, bytes } = group.part;
            let from = HostSlice::new(self.weights.clone(), offset, bytes)?;
            self.stream.copy_in(&from, &DeviceSlice::new(Arc::clone(memory), 0, bytes)?)?;
            self.stream.write_word(word, doorbell::RUNG)?;
        }
        if !is_there {
            self.hand_over()?;
        }
        self.standby.send(&ToWorker::Execute(execute), &[])?;
        let executed = Desk::await_outputs(&mut self.standby)?;
        self.stream.record()?.wait(Instant::now() + PATIENCE)?;
        Ok(executed)
    }
}

/// A model's span, filled from its archive.
fn weights(desk: &Desk) -> anyhow::Result<SharedMemory> {
    let span = desk.archive.program().span();
    let memory = SharedMemory::create("pswitch-weights", span.used_bytes.max(1))?;
    let storages = (0..).map(StorageId).zip(&span.offsets);
    for (storage, &offset) in storages.filter(|&(_, &offset)| offset < span.used_bytes) {
        memory.write(offset, desk.archive.storage_bytes(storage))?;
    }
    Ok(memory)
}
