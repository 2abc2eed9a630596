//! A training task of a worker process: prepared, trained and written down as its controller says.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use pswitch_device::{DeviceAddress, DeviceSlice, GpuStream, GpuWay, HostSlice, SharedMemory, WayWords};
use pswitch_mem_pool::ArenaStats;
use pswitch_model::{Archive, StorageId};
use pswitch_protocol::{
    Channel, FaultClass, FromWorker, PrepareTask, Region, TaskExtent, TaskPause, TaskStep as Counted,
    control, monotonic_ns,
};
use pswitch_train::{StateLayout, TaskConfig, latest_checkpoint};

use super::StateWorth;
use super::pace::{HostPace, Listener, Pace, Stood, at_a_gate};
use super::run_ahead::{Bounds, GpuPace, RunAhead};
use super::saver::{Kind, Saver, saved};
use super::task::{PartialSnapshot, Snapshot, TaskStep, TrainingTask, Upload};
use crate::arena::ExecutionArena;
use crate::error::{RunError, WorkerError};
use crate::work::Shared;

/// Longest that a copy of the initial state may take.
const PATIENCE: Duration = Duration::from_secs(300);

/// Work that is queued on a GPU, unless the task says otherwise: where it is computed before others have the GPU ...
const RUN_AHEAD_TO_END: Duration = Duration::from_micros(500);

/// ... and where it stands still. Operators that take the host longer than the GPU follow each other for some milliseconds.
const RUN_AHEAD_TO_HOLD: Duration = Duration::from_millis(10);

/// The task of a worker.
pub(crate) struct ServedTask {
    kept: KeptTask,
    /// What is queued on a GPU, and how long it takes.
    ahead: RunAhead,
    /// How far that has come, once the task has trained on one.
    way: Option<GpuWay>,
}

/// A task and what is written down of it.
struct KeptTask {
    task: TrainingTask,
    config: TaskConfig,
    /// Writes checkpoints, if they have a place.
    saver: Option<Saver>,
    /// What is copied of a checkpoint that is due, no step having been made since. It is finished first when the task trains again.
    due: Option<PartialSnapshot>,
}

/// What computes the steps of a task: the host, or a GPU whose queue is kept short.
enum Computer<'a> {
    Host(HostPace<'a>),
    Gpu(&'a GpuStream, GpuPace<'a>),
}

impl ServedTask {
    /// Fills the state, and builds the task over it. The inner error is a line for the controller.
    pub(crate) fn prepare(
        order: &PrepareTask,
        shared: &Shared,
        channel: &Channel,
    ) -> Result<Result<Self, String>, WorkerError> {
        let state = shared.slice(order.state)?;
        let built = Self::build(order, shared, &state, channel.try_clone()?);
        if let Ok(task) = &built
            && let Some(saver) = &task.kept.saver
        {
            saver.tell_written(channel)?;
        }
        Ok(built)
    }

    fn build(
        order: &PrepareTask,
        shared: &Shared,
        state: &DeviceSlice,
        channel: Channel,
    ) -> Result<Self, String> {
        let config = TaskConfig::from_yaml(&order.config).map_err(chain)?;
        let archive = Archive::open(&config.archive()).map_err(chain)?;
        if archive.digest() != order.digest {
            return Err(format!("'{}' has changed since the server read it", config.program.display()));
        }
        let layout = StateLayout::new(archive.program(), &config.optimizer).map_err(chain)?;
        if layout.bytes > state.bytes() {
            return Err(format!(
                "a state of {} bytes does not fit its place of {}",
                layout.bytes,
                state.bytes()
            ));
        }
        fill(&archive, layout.state_bytes, shared, state).map_err(chain)?;
        // SAFETY: the place is part of the pool, which is mapped for as long as the worker lives, and this task's alone; it
        // holds the weights.
        let mut task =
            unsafe { TrainingTask::build(&config, &archive, shared.device.as_ref(), state.address()) }
                .map_err(chain)?;
        let mut saver = None;
        if let Some(checkpoints) = &config.checkpoint {
            task.check_checkpoints(&checkpoints.folder).map_err(chain)?;
            let mut written = None;
            if let Some(checkpoint) = latest_checkpoint(&checkpoints.folder).map_err(chain)? {
                task.resume(&checkpoint).map_err(chain)?;
                written = Some((task.steps_done(), checkpoint.path().to_owned()));
                tracing::info!(task = order.name, step = task.steps_done(), file = %checkpoint.path().display(), "resumed");
            }
            saver = Some(Saver::start(checkpoints, written, channel).map_err(chain)?);
        }
        let kept = KeptTask { task, config, saver, due: None };
        Ok(Self { kept, ahead: RunAhead::default(), way: None })
    }

    pub(crate) fn extent(&self) -> TaskExtent {
        let task = &self.kept.task;
        TaskExtent { steps_done: task.steps_done(), total_steps: task.total_steps() }
    }

    /// Steps until the stop word says that they end or all are done, each of which is told. With `holds` the word may also say
    /// that they stand still. `gpu` is the stream that computes, if one does.
    pub(crate) fn train(
        &mut self,
        shared: &Shared,
        arena: Region,
        holds: bool,
        gpu: Option<&GpuStream>,
        channel: &Channel,
    ) -> Result<TaskPause, WorkerError> {
        let stop = shared.control.word(shared.block + control::STOP)?;
        let place = shared.slice(arena)?;
        // A channel that is broken is noticed with the next step, or the pause.
        let held = |at_ns| drop(channel.send(&FromWorker::TaskHeld { at_ns }, &[]));
        let left = |at_ns| {
            // Others may have the memory before the step is taken apart, which computes nothing.
            ExecutionArena::close();
            drop(channel.send(&FromWorker::TaskLeft { at_ns }, &[]));
        };
        let listener = Listener { held: &held, left: &left };
        let stood = Stood::default();
        let computer = match gpu {
            Some(stream) => {
                let by_default = if holds { RUN_AHEAD_TO_HOLD } else { RUN_AHEAD_TO_END };
                let budget = self.kept.config.run_ahead_us.map_or(by_default, Duration::from_micros);
                let way = match self.way.take() {
                    Some(way) => way,
                    None => {
                        let control = shared.device.pin(Arc::clone(&shared.control))?;
                        let word = |offset| HostSlice::new(control.clone(), shared.block + offset, 4);
                        let gate = holds.then(|| word(control::STOP)).transpose()?;
                        let (reached, passed) = (word(control::REACHED)?, word(control::PASSED)?);
                        GpuWay::new(stream, WayWords { reached, passed, gate })?
                    }
                };
                let way = self.way.insert(way);
                let bounds = Bounds { budget, way };
                Computer::Gpu(stream, self.ahead.watch(stream, stop, bounds, &listener, &stood))
            }
            None => Computer::Host(HostPace::new(stop, &listener, &stood)),
        };
        let pause = self.kept.train(&computer, stop, &stood, &place, channel)?;
        let stopped_ns = computer.end()?;
        Ok(match pause {
            TaskPause::Stopped { discarded_ns, .. } => TaskPause::Stopped { discarded_ns, at_ns: stopped_ns },
            over => over,
        })
    }

    /// Copies what a checkpoint of this moment needs, if it has a place for them, and has it written. Both are told.
    pub(crate) fn save(&mut self, channel: &Channel) -> Result<(), WorkerError> {
        self.kept.save(channel)
    }
}

impl Computer<'_> {
    /// One step within a place in the pool. Behind one that was finished a GPU may still have the optimizer before it.
    fn step(&self, task: &mut TrainingTask, place: &DeviceSlice) -> Result<Ended, WorkerError> {
        let (stream, pace) = match self {
            Computer::Host(pace) => {
                let arena = ExecutionArena::begin(place.address(), place.bytes());
                // SAFETY: nothing is uploaded.
                let end = unsafe { task.step(pace, None) };
                return over(end, arena);
            }
            Computer::Gpu(stream, pace) => (*stream, pace),
        };
        // Inputs first, and what is left for what the step allocates.
        let inputs_bytes = task.inputs_bytes().min(place.bytes());
        let rest = DeviceAddress(place.address().0 + inputs_bytes);
        let arena = ExecutionArena::begin(rest, place.bytes() - inputs_bytes);
        let end = if inputs_bytes < task.inputs_bytes() {
            let message = format!("a batch of {} bytes does not fit", task.inputs_bytes());
            Err(RunError { class: FaultClass::OutOfMemory, message })
        } else {
            let upload = Upload { stream, at: place.address() };
            // SAFETY: the place is this task's until the stream has done all that was launched, which `end` waits for.
            unsafe { task.step(pace, Some(upload)) }
        };
        over(end, arena)
    }

    /// Whether no other step is to begin; stands still before that for as long as it is to.
    fn stops(&self, stop: &AtomicU32) -> bool {
        self.pace().rests();
        stop.load(Ordering::Relaxed) == control::END
    }

    fn pace(&self) -> &dyn Pace {
        match self {
            Computer::Host(pace) => pace,
            Computer::Gpu(_, pace) => pace,
        }
    }

    /// Waits until nothing is computed any more, and says when that was, on `CLOCK_MONOTONIC`.
    fn end(self) -> Result<u64, WorkerError> {
        match self {
            Computer::Host(_) => Ok(monotonic_ns()),
            Computer::Gpu(stream, pace) => {
                stream.synchronize()?;
                Ok(pace.end()?.unwrap_or_else(monotonic_ns))
            }
        }
    }
}

/// How a step ended, and how it used its arena.
type Ended = (Result<TaskStep, RunError>, ArenaStats);

/// What became of a step. One that had left its arena and still wanted memory, which is another's by then, is an error: nobody knows
/// what it keeps for the next.
fn over(end: Result<TaskStep, RunError>, arena: ExecutionArena) -> Result<Ended, WorkerError> {
    let wanted = arena.was_wanted_closed();
    let stats = arena.end();
    match (wanted, end) {
        (Some(_), Err(error)) => Err(WorkerError::ComputesOn { reason: error.message }),
        (Some(true), Ok(_)) => {
            Err(WorkerError::ComputesOn { reason: "it got no memory and did without".to_owned() })
        }
        (_, end) => Ok((end, stats)),
    }
}

impl KeptTask {
    /// As [`ServedTask::train`]; the times of its answer are to be put right.
    fn train(
        &mut self,
        computer: &Computer<'_>,
        stop: &AtomicU32,
        stood: &Stood,
        place: &DeviceSlice,
        channel: &Channel,
    ) -> Result<TaskPause, WorkerError> {
        if !self.write_due(computer, stop, channel)? {
            return Ok(TaskPause::Stopped { discarded_ns: None, at_ns: 0 });
        }
        while !self.task.is_finished() {
            if computer.stops(stop) {
                return Ok(TaskPause::Stopped { discarded_ns: None, at_ns: 0 });
            }
            stood.take();
            let begun = Instant::now();
            let (end, stats) = computer.step(&mut self.task, place)?;
            // After an error autograd's engine may keep some of it; but then nothing of this task runs here any more.
            if end.is_ok() && stats.in_use_bytes != 0 {
                // How many there are tells a workspace of a library from a graph that lives on.
                tracing::error!(?stats, ended = ?end, "a step keeps memory");
                return Err(WorkerError::Kept { bytes: stats.in_use_bytes });
            }
            if end.is_ok() && stats.refused > 0 {
                // cuDNN takes another kernel where its first choice has no room: not the bits that eager PyTorch has.
                tracing::warn!(
                    refused = stats.refused,
                    peak_bytes = stats.peak_bytes,
                    "a step has too little memory"
                );
            }
            let took = begun.elapsed().saturating_sub(stood.take());
            let took_ns = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
            match end {
                Ok(TaskStep::Finished { step, loss, rate, samples }) => {
                    channel.send(
                        &FromWorker::TaskStep(Counted {
                            step,
                            loss,
                            rate,
                            samples,
                            took_ns,
                            peak_bytes: stats.peak_bytes,
                        }),
                        &[],
                    )?;
                    if self.is_due(channel)? {
                        self.due = Some(PartialSnapshot::default());
                        if !self.write_due(computer, stop, channel)? {
                            return Ok(TaskPause::Stopped { discarded_ns: None, at_ns: 0 });
                        }
                    }
                }
                Ok(TaskStep::Stopped) => {
                    return Ok(TaskPause::Stopped { discarded_ns: Some(took_ns), at_ns: 0 });
                }
                Err(error) => {
                    let reason = explain(error, stats.capacity_bytes);
                    let is_sound = self.task.worth() != StateWorth::Torn;
                    // There is none behind what is being written, with which the process ends.
                    if let (Some(saver), false) = (&self.saver, is_sound) {
                        at_a_gate(computer.pace(), || saver.wait());
                    }
                    return Ok(TaskPause::Failed { reason, is_sound });
                }
            }
        }
        Ok(TaskPause::Finished)
    }

    /// Whether a checkpoint is due, and nothing is in its way, which is told.
    fn is_due(&self, channel: &Channel) -> Result<bool, WorkerError> {
        let (Some(saver), Some(checkpoints)) = (&self.saver, &self.config.checkpoint) else {
            return Ok(false);
        };
        let step = self.task.steps_done();
        if self.task.is_finished() {
            return Ok(true);
        }
        if !step.is_multiple_of(checkpoints.every_steps.max(1)) {
            return Ok(false);
        }
        if saver.is_busy() {
            let reason = "the one before is still being written: is the disk slow, or every_steps small?";
            channel.send(&saved(step, Err(reason.to_owned())), &[])?;
            return Ok(false);
        }
        Ok(true)
    }

    /// Copies what is left of a checkpoint that is due, if one is, and has it written. False if the task is to end before all is
    /// copied.
    fn write_due(
        &mut self,
        computer: &Computer<'_>,
        stop: &AtomicU32,
        channel: &Channel,
    ) -> Result<bool, WorkerError> {
        if self.due.is_none() {
            return Ok(true);
        }
        let goes_on = || stop.load(Ordering::Relaxed) != control::END;
        let Some(copied) = at_a_gate(computer.pace(), || self.copy(goes_on)) else { return Ok(false) };
        self.write(copied, channel)?;
        Ok(true)
    }

    /// As [`ServedTask::save`].
    fn save(&mut self, channel: &Channel) -> Result<(), WorkerError> {
        let Some(saver) = &self.saver else { return Ok(()) };
        if saver.tell_copied(self.task.steps_done(), channel)? {
            return Ok(());
        }
        self.due.get_or_insert_default();
        if let Some(copied) = self.copy(|| true) {
            channel.send(&FromWorker::TaskCopied, &[])?;
            self.write(copied, channel)?;
        }
        Ok(())
    }

    /// Copies what is left of a checkpoint that is due, if one is; nothing if it is not to go on before all is copied.
    fn copy(&mut self, goes_on: impl FnMut() -> bool) -> Option<Result<Snapshot, RunError>> {
        let copied = self.task.snapshot(self.due.as_mut()?, goes_on).transpose()?;
        self.due = None;
        Some(copied)
    }

    fn kind(&self) -> Kind {
        match self.task.worth() {
            StateWorth::Diverged => Kind::Diverged,
            _ if self.task.is_finished() => Kind::Last,
            _ => Kind::Regular,
        }
    }

    /// Has it written, or tells why it cannot be.
    fn write(&self, copied: Result<Snapshot, RunError>, channel: &Channel) -> Result<(), WorkerError> {
        match (copied, &self.saver) {
            (Ok(snapshot), Some(saver)) => saver.write(snapshot, self.kind()),
            (Ok(_), None) => {}
            // Nothing would write it any more; another worker makes the steps behind the last checkpoint again.
            (Err(error), _) if self.task.is_finished() => {
                return Err(WorkerError::Unread { reason: error.message });
            }
            (Err(error), _) => channel.send(&saved(self.task.steps_done(), Err(error.message)), &[])?,
        }
        Ok(())
    }
}

/// Copies an archive's weights to where they belong in a state. What the optimizer keeps is zero at first: another task may have
/// had the memory.
fn fill(
    archive: &Archive,
    state_bytes: u64,
    shared: &Shared,
    state: &DeviceSlice,
) -> Result<(), pswitch_device::DeviceError> {
    let span = archive.program().span();
    let staging = SharedMemory::create("pswitch-training", state_bytes)?;
    for (storage, &offset) in (0..).map(StorageId).zip(&span.offsets) {
        staging.write(offset, archive.storage_bytes(storage))?;
    }
    let staging = shared.device.pin(Arc::new(staging))?;
    let mut stream = shared.device.copy_stream("training")?;
    stream.copy_in(&HostSlice::new(staging, 0, state_bytes)?, &state.sub(0, state_bytes)?)?;
    stream.record()?.wait(Instant::now() + PATIENCE)
}

/// Why a step failed, and what helps.
fn explain(error: RunError, arena_bytes: u64) -> String {
    if error.class != FaultClass::OutOfMemory {
        return error.message;
    }
    format!(
        "{}: the arena has {arena_bytes} bytes; give the device a larger training_size, or the task a smaller batch_size with \
         a larger accumulate",
        error.message
    )
}

/// An error with its causes, in one line.
#[allow(clippy::needless_pass_by_value)] // as `map_err` gives it
pub(super) fn chain(error: impl std::error::Error) -> String {
    let mut line = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        line = format!("{line}: {cause}");
        source = cause.source();
    }
    line
}
