//! A training task of a worker process: prepared, trained and written down as its controller says.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use pswitch_device::{DeviceAddress, DeviceSlice, GpuStream, GpuWay, HostSlice, SharedMemory, WayWords};
use pswitch_mem_pool::ArenaStats;
use pswitch_model::{Archive, StorageId};
use pswitch_protocol::{
    Channel, FaultClass, FromWorker, PrepareTask, Region, TaskExtent, TaskPause, TaskStep as Counted,
    control, monotonic_ns,
};
use pswitch_train::{StateLayout, TaskConfig, TrainError, latest_checkpoint};

use super::pace::{HostPace, Listener, Pace, Stood, at_a_gate};
use super::run_ahead::{Bounds, GpuPace, RunAhead};
use super::task::{TaskStep, TrainingTask, Upload};
use crate::arena::ExecutionArena;
use crate::error::{RunError, WorkerError};
use crate::work::Shared;

/// Longest that a copy of the initial state may take.
const PATIENCE: Duration = Duration::from_secs(300);

/// How long after a last checkpoint was begun that could not be written the next is tried.
const SAVE_AGAIN: Duration = Duration::from_secs(2);

/// Work that is queued on a GPU, unless the task says otherwise: where it is computed before others have the GPU ...
const RUN_AHEAD_TO_END: Duration = Duration::from_micros(500);

/// ... and where it stands still. Operators that take the host longer than the GPU follow each other for some milliseconds.
const RUN_AHEAD_TO_HOLD: Duration = Duration::from_millis(10);

/// How often a last checkpoint is looked after, and the stop word meanwhile.
const LOOK_EVERY: Duration = Duration::from_millis(1);

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
    /// Writes the last snapshot while steps go on.
    writer: Option<Writer>,
    /// Steps of the last checkpoint that is there.
    written: Option<u64>,
    /// When a last checkpoint may be begun: not at once again where the disk was full.
    again_at: Instant,
}

/// What computes the steps of a task: the host, or a GPU whose queue is kept short.
enum Computer<'a> {
    Host(HostPace<'a>),
    Gpu(&'a GpuStream, GpuPace<'a>),
}

struct Writer {
    step: u64,
    thread: JoinHandle<Result<PathBuf, TrainError>>,
}

impl ServedTask {
    /// Fills the state, and builds the task over it. The inner error is a line for the controller.
    pub(crate) fn prepare(order: &PrepareTask, shared: &Shared) -> Result<Result<Self, String>, WorkerError> {
        let state = shared.slice(order.state)?;
        Ok(Self::build(order, shared, &state))
    }

    fn build(order: &PrepareTask, shared: &Shared, state: &DeviceSlice) -> Result<Self, String> {
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
        let mut written = None;
        if let Some(checkpoints) = &config.checkpoint
            && let Some(checkpoint) = latest_checkpoint(&checkpoints.folder).map_err(chain)?
        {
            task.resume(&checkpoint).map_err(chain)?;
            written = Some(task.steps_done());
            tracing::info!(task = order.name, step = task.steps_done(), file = %checkpoint.path().display(), "resumed");
        }
        let kept = KeptTask { task, config, writer: None, written, again_at: Instant::now() };
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
                        // Where every operator is waited for, a gate would hold up nothing.
                        let gates = holds && !budget.is_zero();
                        let gate = gates.then(|| word(control::STOP)).transpose()?;
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

    /// Writes a checkpoint of this moment, if it has a place for them, and waits until it is there or
    /// cannot be written, which is told.
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
                    self.tell_written(channel, false)?;
                    if self.is_due() {
                        at_a_gate(computer.pace(), || self.begin_write(channel))?;
                    }
                }
                Ok(TaskStep::Stopped) => {
                    return Ok(TaskPause::Stopped { discarded_ns: Some(took_ns), at_ns: 0 });
                }
                Err(error) => {
                    let reason = explain(error, stats.capacity_bytes);
                    // What is being written is its last.
                    self.tell_written(channel, true)?;
                    return Ok(TaskPause::Failed { reason });
                }
            }
        }
        // All of it would be lost otherwise. Others have the device meanwhile: a disk may be slow, or full for a while.
        at_a_gate(computer.pace(), || {
            while !self.write_last(channel)? {
                if stop.load(Ordering::Relaxed) == control::END {
                    return Ok(TaskPause::Stopped { discarded_ns: None, at_ns: 0 });
                }
                std::thread::sleep(LOOK_EVERY);
            }
            Ok(TaskPause::Finished)
        })
    }

    /// Gets on with the checkpoint of the last step. True once it is there, or if there is no place for any.
    fn write_last(&mut self, channel: &Channel) -> Result<bool, WorkerError> {
        self.tell_written(channel, false)?;
        if self.is_written() {
            return Ok(true);
        }
        if self.writer.is_none() && Instant::now() >= self.again_at {
            self.again_at = Instant::now() + SAVE_AGAIN;
            self.begin_write(channel)?;
        }
        Ok(false)
    }

    /// Whether what the task has learned is written down, if it is to be.
    fn is_written(&self) -> bool {
        self.config.checkpoint.is_none() || self.written == Some(self.task.steps_done())
    }

    fn is_due(&self) -> bool {
        let every = self.config.checkpoint.as_ref().map(|checkpoints| checkpoints.every_steps);
        every.is_some_and(|every| self.task.steps_done().is_multiple_of(every.max(1)))
            && !self.task.is_finished()
    }

    /// As [`ServedTask::save`].
    fn save(&mut self, channel: &Channel) -> Result<(), WorkerError> {
        self.tell_written(channel, true)?;
        self.begin_write(channel)?;
        self.tell_written(channel, true)
    }

    /// Copies the state and has it written by a thread.
    fn begin_write(&mut self, channel: &Channel) -> Result<(), WorkerError> {
        let Some(checkpoints) = self.config.checkpoint.clone() else { return Ok(()) };
        let step = self.task.steps_done();
        let refused = |reason: String| FromWorker::TaskSaved { step, result: Err(reason) };
        if self.writer.is_some() {
            let reason = "the one before is still being written: is the disk slow, or every_steps small?";
            channel.send(&refused(reason.to_owned()), &[])?;
            return Ok(());
        }
        let snapshot = match self.task.snapshot() {
            Ok(snapshot) => snapshot,
            Err(error) => {
                channel.send(&refused(error.message), &[])?;
                return Ok(());
            }
        };
        let thread = std::thread::Builder::new()
            .name("pswitch-checkpoint".to_owned())
            .spawn(move || snapshot.write(&checkpoints.folder, checkpoints.keep));
        match thread {
            Ok(thread) => self.writer = Some(Writer { step, thread }),
            Err(error) => channel.send(&refused(error.to_string()), &[])?,
        }
        Ok(())
    }

    /// Tells what became of the checkpoint that is being written, once that is known.
    fn tell_written(&mut self, channel: &Channel, wait: bool) -> Result<(), WorkerError> {
        let is_over = self.writer.as_ref().is_some_and(|writer| wait || writer.thread.is_finished());
        let Some(Writer { step, thread }) = self.writer.take_if(|_| is_over) else { return Ok(()) };
        let result = match thread.join() {
            Ok(written) => written.map(|path| path.display().to_string()).map_err(chain),
            Err(_) => Err("writing it panicked".to_owned()),
        };
        if result.is_ok() {
            self.written = Some(step);
        }
        channel.send(&FromWorker::TaskSaved { step, result }, &[])?;
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
fn chain(error: impl std::error::Error) -> String {
    let mut line = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        line = format!("{line}: {cause}");
        source = cause.source();
    }
    line
}
