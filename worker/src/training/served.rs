//! A training task of a worker process: prepared, trained and written down as its controller says.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use pswitch_device::{DeviceAddress, DeviceError, DeviceSlice, GpuStream, HostSlice, SharedMemory};
use pswitch_mem_pool::ArenaStats;
use pswitch_model::{Archive, StorageId};
use pswitch_protocol::{
    Channel, FaultClass, FromWorker, PrepareTask, Region, TaskExtent, TaskPause, TaskStep as Counted,
    control, monotonic_ns,
};
use pswitch_train::{StateLayout, TaskConfig, TrainError, latest_checkpoint};

use super::run_ahead::RunAhead;
use super::task::{TaskStep, TrainingTask, Upload};
use crate::arena::ExecutionArena;
use crate::error::{RunError, WorkerError};
use crate::work::Shared;

/// Longest that a copy of the initial state may take.
const PATIENCE: Duration = Duration::from_secs(300);

/// How long after a last checkpoint that could not be written the next is tried.
const SAVE_AGAIN: Duration = Duration::from_secs(2);

/// The task of a worker.
pub(crate) struct ServedTask {
    task: TrainingTask,
    config: TaskConfig,
    /// What is queued on a GPU, and how long it takes.
    ahead: RunAhead,
    /// Writes the last snapshot while steps go on.
    writer: Option<Writer>,
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
        if let Some(checkpoints) = &config.checkpoint
            && let Some(checkpoint) = latest_checkpoint(&checkpoints.folder).map_err(chain)?
        {
            task.resume(&checkpoint).map_err(chain)?;
            tracing::info!(task = order.name, step = task.steps_done(), file = %checkpoint.path().display(), "resumed");
        }
        let ahead = RunAhead::new(Duration::from_micros(config.run_ahead_us));
        Ok(Self { task, config, ahead, writer: None })
    }

    pub(crate) fn extent(&self) -> TaskExtent {
        TaskExtent { steps_done: self.task.steps_done(), total_steps: self.task.total_steps() }
    }

    /// Steps until the stop flag is set or all are done, each of which is told. `gpu` is the stream that computes, if one does.
    pub(crate) fn train(
        &mut self,
        shared: &Shared,
        arena: Region,
        gpu: Option<&GpuStream>,
        channel: &Channel,
    ) -> Result<TaskPause, WorkerError> {
        let stop = shared.control.word(shared.block + control::STOP)?;
        let place = shared.slice(arena)?;
        while !self.task.is_finished() {
            if stop.load(Ordering::Relaxed) != 0 {
                // The optimizer of the last step may still run, and others may have the place of the state next.
                gpu.map_or(Ok(()), GpuStream::synchronize)?;
                return Ok(TaskPause::Stopped { discarded_ns: None, at_ns: monotonic_ns() });
            }
            let begun = Instant::now();
            let (end, stats) = self.step(stop, &place, gpu);
            // After an error autograd's engine may keep some of it; but then nothing of this task runs here any more.
            if end.is_ok() && stats.in_use_bytes != 0 {
                return Err(WorkerError::Kept { bytes: stats.in_use_bytes });
            }
            let took_ns = u64::try_from(begun.elapsed().as_nanos()).unwrap_or(u64::MAX);
            match end {
                Ok((TaskStep::Finished { step, loss, rate, samples }, _)) => {
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
                        self.begin_write(channel)?;
                    }
                }
                Ok((TaskStep::Stopped, at_ns)) => {
                    return Ok(TaskPause::Stopped { discarded_ns: Some(took_ns), at_ns });
                }
                Err(error) => {
                    let reason = explain(error, stats.capacity_bytes);
                    // What is being written is its last.
                    self.tell_written(channel, true)?;
                    return Ok(TaskPause::Failed { reason });
                }
            }
        }
        // All of it would be lost otherwise: a disk that is full may have room again.
        while !self.save(channel)? {
            let again_at = Instant::now() + SAVE_AGAIN;
            while Instant::now() < again_at {
                if stop.load(Ordering::Relaxed) != 0 {
                    return Ok(TaskPause::Stopped { discarded_ns: None, at_ns: monotonic_ns() });
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        Ok(TaskPause::Finished)
    }

    /// One step within a place in the pool, and when the device was done, should it have been stopped. Then nothing of it is
    /// computed any more; behind one that was finished a GPU may still have the optimizer before it.
    #[allow(clippy::type_complexity)] // a step's end, its time, and what it has used
    fn step(
        &mut self,
        stop: &AtomicU32,
        place: &DeviceSlice,
        gpu: Option<&GpuStream>,
    ) -> (Result<(TaskStep, u64), RunError>, ArenaStats) {
        let Some(stream) = gpu else {
            let arena = ExecutionArena::begin(place.address(), place.bytes());
            // SAFETY: nothing is uploaded.
            let end = unsafe { self.task.step(stop, None) };
            return (end.map(|end| (end, monotonic_ns())), arena.end());
        };
        // Inputs first, and what is left for what the step allocates.
        let inputs_bytes = self.task.inputs_bytes().min(place.bytes());
        let rest = DeviceAddress(place.address().0 + inputs_bytes);
        let arena = ExecutionArena::begin(rest, place.bytes() - inputs_bytes);
        let upload = Upload { stream, at: place.address() };
        let pace = self.ahead.watch(stream, stop);
        let end = if inputs_bytes < self.task.inputs_bytes() {
            let message = format!("a batch of {} bytes does not fit", self.task.inputs_bytes());
            Err(RunError { class: FaultClass::OutOfMemory, message })
        } else {
            // SAFETY: the place is this task's for as long as it trains, which it says to be over when the stream is idle.
            unsafe { self.task.step(&pace, Some(upload)) }
        };
        let failed = |error: DeviceError| RunError { class: FaultClass::Model, message: error.to_string() };
        let stopped = pace.end().map_err(failed);
        let end = stopped.and_then(|stopped_ns| Ok((end?, stopped_ns.unwrap_or_else(monotonic_ns))));
        // Others may have the place behind all but a step that counts, which another one follows on the same stream.
        let is_over = !matches!(end, Ok((TaskStep::Finished { .. }, _))) || self.task.is_finished();
        let idle = if is_over { stream.synchronize().map_err(failed) } else { Ok(()) };
        let end = idle.and(end);
        (end, arena.end())
    }

    fn is_due(&self) -> bool {
        let every = self.config.checkpoint.as_ref().map(|checkpoints| checkpoints.every_steps);
        every.is_some_and(|every| self.task.steps_done().is_multiple_of(every.max(1)))
            && !self.task.is_finished()
    }

    /// Writes a checkpoint of this moment, if it has a place for them, and waits until it is there. False if it could not be
    /// written.
    pub(crate) fn save(&mut self, channel: &Channel) -> Result<bool, WorkerError> {
        self.tell_written(channel, true)?;
        self.begin_write(channel)?;
        Ok(self.config.checkpoint.is_none() || self.tell_written(channel, true)?)
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
    /// True if it was written.
    fn tell_written(&mut self, channel: &Channel, wait: bool) -> Result<bool, WorkerError> {
        let is_over = self.writer.as_ref().is_some_and(|writer| wait || writer.thread.is_finished());
        let Some(Writer { step, thread }) = self.writer.take_if(|_| is_over) else { return Ok(false) };
        let result = match thread.join() {
            Ok(written) => written.map(|path| path.display().to_string()).map_err(chain),
            Err(_) => Err("writing it panicked".to_owned()),
        };
        let written = result.is_ok();
        channel.send(&FromWorker::TaskSaved { step, result }, &[])?;
        Ok(written)
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
