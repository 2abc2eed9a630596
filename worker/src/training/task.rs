//! A whole task: a trainer, the rows that its steps are computed from, and what is written down of it.

use std::borrow::Cow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use pswitch_device::{Device, DeviceAddress, DeviceId, GpuMoment, GpuStream};
use pswitch_model::{Archive, DType, Dim, InputKind, Program};
use pswitch_protocol::FaultClass;
use pswitch_train::{
    ArrayInfo, Batches, Checkpoint, CheckpointState, DataConfig, Dataset, OptimizerKind, Position, Role,
    RowSource, SavedTensor, StateTensor, Synthetic, SyntheticArray, TaskConfig, TrainError, check_checkpoint,
    step_seed, write_checkpoint, write_diverged,
};

use super::loader::{Batch, BatchLayout, Loader};
use super::pace::at_a_gate;
use super::{Pace, StateWorth, StepEnd, StepOrder, Trainer};
use crate::error::{RunError, TaskError};
use crate::executable::Input;
use crate::libtorch::TorchDevice;

/// Name of the tensor that says for every parameter how many steps its optimizer's state stands for.
const COUNTS: &str = "steps";

/// Integers of synthetic data are below this where the program does not tell what they number: two classes are known to
/// every classifier.
const SYNTHETIC_BELOW: u64 = 2;

/// A training task as its configuration describes it. Everything a step depends on follows from its number, so a task that
/// goes on from a [checkpoint](Self::resume) computes what it would have computed anyway.
pub struct TrainingTask {
    config: TaskConfig,
    trainer: Trainer,
    loader: Loader,
    inputs: Vec<Feed>,
    layout: BatchLayout,
    /// The last of so many batches has fewer rows, which not all steps have alike.
    partial_every: Option<u64>,
    total_steps: u64,
    step: u64,
    samples: u64,
}

/// One input of the program and the array whose rows it takes.
struct Feed {
    array: usize,
    dtype: DType,
    row_shape: Vec<u64>,
    row_bytes: u64,
}

/// A GPU that computes steps, and where in its memory the rows of a batch are to lie meanwhile.
#[derive(Debug, Clone, Copy)]
pub struct Upload<'a> {
    /// The stream by which it computes.
    pub stream: &'a GpuStream,
    /// [`TrainingTask::inputs_bytes`] of memory that is nobody else's.
    pub at: DeviceAddress,
}

/// How a step of a task ended.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum TaskStep {
    /// It counts.
    Finished {
        /// Its number, from 0.
        step: u64,
        /// The mean loss of its batches.
        loss: f64,
        /// The learning rate.
        rate: f64,
        /// Rows that it was computed from.
        samples: u64,
    },
    /// It was stopped; the same step comes next.
    Stopped,
}

impl TrainingTask {
    /// Prepares a task over its state at `base`, memory of `device`, with nothing done yet.
    ///
    /// # Safety
    /// That of [`Trainer::build`].
    ///
    /// # Errors
    /// [`TaskError`]: for a program that cannot be trained, data that cannot be read, and data that are not what the program
    /// takes.
    pub unsafe fn build(
        config: &TaskConfig,
        archive: &Archive,
        device: &dyn Device,
        base: DeviceAddress,
    ) -> Result<Self, TaskError> {
        let program = archive.program();
        let torch = match device.properties().id {
            DeviceId::Host(_) => TorchDevice::Cpu,
            DeviceId::Cuda(ordinal) => TorchDevice::Cuda(ordinal),
        };
        // SAFETY: the caller's promises are those asked for.
        let trainer = unsafe { Trainer::build(program, torch, &config.optimizer, base, &[]) }?;
        let source = open_source(config, program)?;
        let (batch_size, seed) = (config.data.batch_size(), config.seed);
        let (shuffle, drop_last) = match &config.data {
            DataConfig::Files { shuffle, drop_last, .. } => (shuffle.then_some(seed), *drop_last),
            DataConfig::Synthetic { .. } => (None, false),
        };
        let batches = Batches::new(source.rows(), batch_size, shuffle, drop_last)?;
        let most = batch_size.min(source.rows());
        let last = source.rows() % most;
        let is_partial = last > 0 && !drop_last;
        let sizes = if is_partial { vec![most, last] } else { vec![most] };
        let inputs = feeds(program, source.as_ref(), &sizes)?;
        // Steps of whole epochs have them at the same places.
        let are_alike = u64::from(config.accumulate.max(1)).is_multiple_of(batches.per_epoch());
        let partial_every = (is_partial && !are_alike).then_some(batches.per_epoch());
        let total_steps = config.total_steps(batches.per_epoch())?;
        let rows = inputs.iter().map(|feed| (feed.array, feed.row_bytes));
        let layout = BatchLayout::new(rows, most)
            .ok_or_else(|| unfit("data", format!("no memory has room for batches of {most} rows")))?;
        let loader = Loader::new(source, batches, layout.clone(), device)?;
        let config = config.clone();
        let (step, samples) = (0, 0);
        Ok(Self { config, trainer, loader, inputs, layout, partial_every, total_steps, step, samples })
    }

    /// Room that the rows of the largest batch take.
    pub fn inputs_bytes(&self) -> u64 {
        self.layout.bytes()
    }

    /// Steps that are done.
    pub fn steps_done(&self) -> u64 {
        self.step
    }

    /// Steps that it has in all.
    pub fn total_steps(&self) -> u64 {
        self.total_steps
    }

    /// What its state is worth.
    pub fn worth(&self) -> StateWorth {
        self.trainer.worth()
    }

    /// Whether all steps are done.
    pub fn is_finished(&self) -> bool {
        self.step >= self.total_steps
    }

    /// The next step. All that it allocates has to go to an arena that was begun.
    ///
    /// With `upload`, rows are copied to a GPU first, and the device must be that; when it returns, what it has launched last
    /// need not be done.
    ///
    /// # Safety
    /// The memory at [`Upload::at`] must be mapped, and nobody else's until the stream has done all that was launched.
    ///
    /// # Errors
    /// Those of [`Trainer::step`]; the same step comes next.
    pub unsafe fn step(&mut self, pace: &dyn Pace, upload: Option<Upload<'_>>) -> Result<TaskStep, RunError> {
        let step = self.step;
        let micro_batches = self.config.accumulate.max(1);
        let rate = self.config.schedule.rate(self.config.optimizer.learning_rate(), step, self.total_steps);
        let order = StepOrder {
            seed: step_seed(self.config.seed, step),
            rate,
            micro_batches,
            clip_norm: self.config.clip_norm,
        };
        let batches = step * u64::from(micro_batches);
        let epochs = |batches: u64| self.partial_every.map(|per_epoch| batches / per_epoch);
        pace.begin(epochs(batches) == epochs(batches + u64::from(micro_batches)));
        let (loader, layout, inputs) = (&mut self.loader, &self.layout, &self.inputs);
        let mut samples = 0;
        // SAFETY: a batch stays in its memory until the next one is taken; the caller promises that on the GPU.
        let end = unsafe {
            self.trainer.step(&order, pace, |index| {
                let batch = loader.take(batches + u64::from(index))?;
                samples += batch.rows;
                let base = match upload {
                    Some(upload) => at_a_gate(pace, || upload.copy(batch, layout))?,
                    None => DeviceAddress(batch.memory().memory().as_ptr().expose_provenance() as u64),
                };
                let places = layout.places(batch.rows);
                Ok(inputs
                    .iter()
                    .zip(places)
                    .map(|(feed, place)| feed.input(DeviceAddress(base.0 + place.start), batch.rows))
                    .collect())
            })
        };
        match end.map_err(|error| RunError { message: format!("step {step}: {}", error.message), ..error })? {
            StepEnd::Stopped { .. } => Ok(TaskStep::Stopped),
            StepEnd::Finished { loss } => {
                self.step += 1;
                self.samples += samples;
                Ok(TaskStep::Finished { step, loss, rate, samples })
            }
        }
    }

    /// Copies the whole state to host memory, to be written while steps go on. None if it is not to go on, which is asked ahead of
    /// every tensor; called with the same part again, it copies what is left. No step may be made in between.
    ///
    /// # Errors
    /// What libtorch raised.
    pub fn snapshot(
        &self,
        part: &mut PartialSnapshot,
        mut goes_on: impl FnMut() -> bool,
    ) -> Result<Option<Snapshot>, RunError> {
        let tensors = &self.trainer.state().tensors;
        while let Some(tensor) = tensors.get(part.bytes.len()) {
            if !goes_on() {
                return Ok(None);
            }
            part.bytes.push(self.trainer.read(tensor)?);
        }
        Ok(Some(Snapshot {
            state: self.checkpoint_state(),
            tensors: tensors.clone(),
            bytes: std::mem::take(&mut part.bytes),
            counts: self.trainer.counts(),
        }))
    }

    /// Refuses a task whose state no checkpoint can hold.
    ///
    /// # Errors
    /// Those of [`check_checkpoint`].
    pub fn check_checkpoints(&self, folder: &Path) -> Result<(), TrainError> {
        let fetch = |_| &[][..];
        let tensors = saved_tensors(&self.trainer.state().tensors, self.config.optimizer.kind(), fetch);
        check_checkpoint(folder, &self.checkpoint_state(), tensors)
    }

    fn checkpoint_state(&self) -> CheckpointState {
        CheckpointState {
            position: Position { step: self.step, samples: self.samples, seed: self.config.seed },
            optimizer: self.config.optimizer.kind(),
        }
    }

    /// Goes on from a checkpoint.
    ///
    /// # Errors
    /// [`TaskError::Checkpoint`] for one of another program, optimizer or seed. The state is as before then.
    pub fn resume(&mut self, checkpoint: &Checkpoint) -> Result<(), TaskError> {
        let refused = |reason: String| TaskError::Checkpoint { path: checkpoint.path().to_owned(), reason };
        let CheckpointState { position, optimizer } = checkpoint.state();
        if *optimizer != self.config.optimizer.kind() || position.seed != self.config.seed {
            let named = |kind: OptimizerKind| format!("{kind:?}").to_lowercase();
            return Err(refused(format!(
                "it was made with {} and seed {}, the task has {} and {}",
                named(*optimizer),
                position.seed,
                named(self.config.optimizer.kind()),
                self.config.seed
            )));
        }
        let mut found = Vec::new();
        for tensor in &self.trainer.state().tensors {
            let name = saved_name(tensor, *optimizer);
            let saved = if tensor.in_state_dict {
                checkpoint.model().find(|saved| saved.name == name)
            } else {
                checkpoint.optimizer().find(|saved| saved.name == name)
            };
            let saved = saved.ok_or_else(|| refused(format!("it has no tensor '{name}'")))?;
            if saved.dtype != tensor.dtype || saved.shape != tensor.sizes {
                return Err(refused(format!(
                    "'{name}' is {} of {:?} there and {} of {:?} in the program",
                    saved.dtype, saved.shape, tensor.dtype, tensor.sizes
                )));
            }
            found.push((tensor.clone(), saved.bytes));
        }
        let counts = checkpoint.optimizer().find(|saved| saved.name == COUNTS);
        let counts = counts.ok_or_else(|| refused("it does not say how many steps were made".to_owned()))?;
        let counts: Vec<u64> =
            counts.bytes.as_chunks::<8>().0.iter().map(|it| u64::from_le_bytes(*it)).collect();
        if counts.len() != self.trainer.counts().len() {
            return Err(refused("it counts the steps of other parameters".to_owned()));
        }
        for (tensor, bytes) in found {
            self.trainer.write(&tensor, bytes).map_err(TaskError::Run)?;
        }
        self.trainer.set_counts(&counts);
        (self.step, self.samples) = (position.step, position.samples);
        Ok(())
    }
}

/// The first tensors of a [`Snapshot`].
#[derive(Debug, Default)]
pub struct PartialSnapshot {
    bytes: Vec<Vec<u8>>,
}

/// The state of a task at the end of a step, in host memory.
#[derive(Debug)]
pub struct Snapshot {
    state: CheckpointState,
    tensors: Vec<StateTensor>,
    bytes: Vec<Vec<u8>>,
    counts: Vec<u64>,
}

impl Snapshot {
    /// Steps that it stands for.
    pub fn step(&self) -> u64 {
        self.state.position.step
    }

    /// Writes it as a checkpoint; see [`write_checkpoint`].
    ///
    /// # Errors
    /// Those of [`write_checkpoint`].
    pub fn write(&self, folder: &Path, keep: u32) -> Result<PathBuf, TrainError> {
        write_checkpoint(folder, keep, &self.state, self.saved())
    }

    /// Writes it as that of a task whose next loss is no number; see [`write_diverged`].
    ///
    /// # Errors
    /// Those of [`write_diverged`].
    pub fn write_diverged(&self, folder: &Path) -> Result<PathBuf, TrainError> {
        write_diverged(folder, &self.state, self.saved())
    }

    fn saved(&self) -> impl Iterator<Item = SavedTensor<'_>> {
        let fetch = |index: usize| self.bytes[index].as_slice();
        let tensors = saved_tensors(&self.tensors, self.state.optimizer, fetch);
        let shape = [self.counts.len() as u64];
        let counts = || self.counts.iter().flat_map(|count| count.to_le_bytes()).collect();
        tensors
            .chain([SavedTensor::of_optimizer(COUNTS, DType::I64, &shape, move || Ok(Cow::Owned(counts())))])
    }
}

/// What a checkpoint holds of a state beside the counts of steps. `fetch` gives the bytes of a tensor by its number.
fn saved_tensors<'a>(
    tensors: &'a [StateTensor],
    optimizer: OptimizerKind,
    fetch: impl Fn(usize) -> &'a [u8] + Copy + 'a,
) -> impl Iterator<Item = SavedTensor<'a>> {
    tensors.iter().enumerate().flat_map(move |(index, tensor)| {
        let names = std::iter::once(saved_name(tensor, optimizer)).chain(tensor.also_named.iter().cloned());
        names.map(move |name| {
            let fetch = move || Ok(Cow::Borrowed(fetch(index)));
            if tensor.in_state_dict {
                SavedTensor::of_model(&name, tensor.dtype, &tensor.sizes, fetch)
            } else {
                SavedTensor::of_optimizer(&name, tensor.dtype, &tensor.sizes, fetch)
            }
        })
    })
}

/// What a tensor of the state is called in a checkpoint: parameters and buffers as in the state dict, what the optimizer keeps
/// as `torch.optim` calls it, behind the parameter's name.
fn saved_name(tensor: &StateTensor, optimizer: OptimizerKind) -> String {
    let name = &tensor.name;
    match (tensor.role, optimizer) {
        (Role::Buffer, _) if !tensor.in_state_dict => format!("{name}.buffer"),
        (Role::Parameter | Role::Buffer, _) => name.clone(),
        (Role::First, OptimizerKind::Sgd) => format!("{name}.momentum_buffer"),
        (Role::First, _) => format!("{name}.exp_avg"),
        (Role::Second, _) => format!("{name}.exp_avg_sq"),
    }
}

fn open_source(config: &TaskConfig, program: &Program) -> Result<Arc<dyn RowSource>, TaskError> {
    Ok(match &config.data {
        DataConfig::Files { files, .. } => Arc::new(Dataset::open(files)?),
        DataConfig::Synthetic { rows, .. } => {
            let bounds = program.index_bounds();
            let arrays = program.inputs.iter().enumerate().map(|(index, input)| {
                let InputKind::Tensor { dtype, shape, .. } = &input.kind else {
                    return Err(unfit(&input.name, "it is no tensor, and rows of data are".to_owned()));
                };
                let row_shape: Vec<u64> = shape.iter().skip(1).map(Dim::example).collect();
                let bound = bounds.iter().find(|bound| bound.input == index).map(|bound| bound.rows);
                let info = ArrayInfo::new(&input.name, *dtype, &row_shape)?;
                Ok(SyntheticArray { info, below: bound.unwrap_or(SYNTHETIC_BELOW) })
            });
            let arrays = arrays.collect::<Result<_, TaskError>>()?;
            Arc::new(Synthetic::new(*rows, config.seed, arrays)?)
        }
    })
}

/// The array of every input: of the same name, with rows of its shape and type, in batches of sizes that it takes.
fn feeds(program: &Program, source: &dyn RowSource, sizes: &[u64]) -> Result<Vec<Feed>, TaskError> {
    let arrays = source.arrays();
    let mut inputs = Vec::with_capacity(program.inputs.len());
    for input in &program.inputs {
        let name = &input.name;
        let InputKind::Tensor { dtype, shape, .. } = &input.kind else {
            return Err(unfit(name, "it is no tensor, and rows of data are".to_owned()));
        };
        let index = arrays.iter().position(|array| array.name() == name).ok_or_else(|| {
            let known: Vec<&str> = arrays.iter().map(ArrayInfo::name).collect();
            unfit(name, format!("the data have no array of this name, but {}", known.join(", ")))
        })?;
        let array = &arrays[index];
        if array.dtype() != *dtype {
            return Err(unfit(name, format!("the data are {}, the program takes {dtype}", array.dtype())));
        }
        let Some((rows, row)) = shape.split_first() else {
            return Err(unfit(name, "the program takes one number, not a row for each sample".to_owned()));
        };
        let fits = |(dim, &found): (&Dim, &u64)| match dim {
            Dim::Fixed(extent) => *extent == found,
            Dim::Symbol { min, max, .. } => *min <= found && max.is_none_or(|max| found <= max),
            Dim::Derived { .. } | Dim::Unknown { .. } => true,
        };
        if row.len() != array.row_shape().len() || !row.iter().zip(array.row_shape()).all(fits) {
            let wanted: Vec<u64> = row.iter().map(Dim::example).collect();
            return Err(unfit(
                name,
                format!(
                    "rows of the data have shape {:?}, the program was exported for {wanted:?}",
                    array.row_shape()
                ),
            ));
        }
        if let Some(size) = sizes.iter().find(|size| !fits((rows, size))) {
            return Err(unfit(
                name,
                format!(
                    "a batch has {size} rows, and the program takes {}: choose batch_size and drop_last so that all have, \
                     or export it with another `--batch MIN:MAX`",
                    span(rows)
                ),
            ));
        }
        let (row_shape, row_bytes) = (array.row_shape().to_vec(), array.row_bytes());
        inputs.push(Feed { array: index, dtype: *dtype, row_shape, row_bytes });
    }
    Ok(inputs)
}

/// The sizes that a dimension may have.
fn span(dim: &Dim) -> String {
    match dim {
        Dim::Symbol { min, max: Some(max), .. } => format!("{min} to {max}"),
        Dim::Symbol { min, max: None, .. } => format!("{min} or more"),
        Dim::Fixed(_) | Dim::Derived { .. } | Dim::Unknown { .. } => dim.example().to_string(),
    }
}

fn unfit(input: &str, reason: String) -> TaskError {
    TaskError::Data { input: input.to_owned(), reason }
}

impl Feed {
    /// So many rows that lie at an address.
    fn input(&self, at: DeviceAddress, rows: u64) -> Input {
        let shape = [&[rows], self.row_shape.as_slice()].concat();
        Input::Tensor { at, dtype: self.dtype, shape }
    }
}

impl Upload<'_> {
    /// Enqueues the copies of a batch.
    ///
    /// # Safety
    /// That of [`TrainingTask::step`].
    unsafe fn copy(&self, batch: &mut Batch, layout: &BatchLayout) -> Result<DeviceAddress, RunError> {
        let failed = |error: pswitch_device::DeviceError| RunError {
            class: FaultClass::Model,
            message: error.to_string(),
        };
        for place in layout.places(batch.rows) {
            let from = batch.slice(&place)?;
            // SAFETY: the caller's promise; the batch is loaded over only when the moment behind its copies is passed.
            unsafe { self.stream.copy_in(&from, DeviceAddress(self.at.0 + place.start)) }.map_err(failed)?;
        }
        let moment = batch.take_moment().map_or_else(|| GpuMoment::new(self.stream), Ok).map_err(failed)?;
        self.stream.mark(&moment).map_err(failed)?;
        batch.is_copied_at(moment);
        Ok(self.at)
    }
}
