//! Training: steps of an exported program under autograd, with state that stays in the pool.

mod account;
mod ffi;
mod loader;
mod pace;
mod run_ahead;
mod saver;
mod served;
mod steps;
mod task;

use pswitch_device::DeviceAddress;
use pswitch_model::{OutputKind, Program, ValueId};
use pswitch_protocol::FaultClass;
use pswitch_train::{Optimizer, Role, StateLayout, StateTensor};

use crate::error::{BuildError, RunError};
use crate::executable::{Executable, Input, Purpose, Watch, fault};
use crate::libtorch::{Raised, TorchDevice};
pub use pace::Pace;
pub(crate) use served::ServedTask;
use steps::{BackwardEnd, Steps};
pub(crate) use steps::{GradMode, choose_deterministic_kernels};
pub use task::{PartialSnapshot, Snapshot, TaskStep, TrainingTask, Upload};

/// A training program over its state.
///
/// A step is atomic. Until the optimizer begins, a step that is stopped leaves nothing behind: gradients and activations
/// are thrown away, and buffers (the running statistics of a batch norm) are changed in a copy. From then on it is
/// finished, whoever asks.
///
/// The arithmetic is PyTorch's own, in the order of `torch.optim` with `foreach`: with the same inputs, seeds and threads
/// the losses are those of the same loop in eager PyTorch, bit for bit.
pub struct Trainer {
    executable: Executable,
    steps: Steps,
    loss: ValueId,
    layout: StateLayout,
    worth: StateWorth,
}

/// What a state is worth after the steps that were tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StateWorth {
    /// It is that of whole steps, and can be gone on from.
    Sound,
    /// It is that of whole steps, but the loss of the next one is no number.
    Diverged,
    /// The optimizer has failed within a step.
    Torn,
}

/// What one step is told.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepOrder {
    /// For libtorch's random numbers, which dropout draws: that of the step, so that doing it again gives the same.
    pub seed: u64,
    /// Learning rate.
    pub rate: f64,
    /// Batches whose gradients are added up, at least one. The loss is their mean.
    pub micro_batches: u32,
    /// Largest 2-norm of all gradients together; larger ones are scaled down to it.
    pub clip_norm: Option<f64>,
}

/// How a step ended.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum StepEnd {
    /// The parameters have changed.
    Finished {
        /// The mean loss of its batches.
        loss: f64,
    },
    /// It was stopped, and nothing has changed.
    Stopped {
        /// How far it had come.
        phase: Phase,
    },
}

/// The parts of a step in which it can be stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Computing the loss.
    Forward,
    /// Computing the gradients.
    Backward,
}

impl Trainer {
    /// Prepares a program to be trained, with its state at `base`. `counts` says for every parameter how many steps the
    /// optimizer's state stands for, all none at the start.
    ///
    /// # Safety
    /// The [`bytes`](StateLayout::bytes) of the layout from `base` on must be mapped for as long as the trainer lives, and
    /// nobody else's while it steps. Before the first step they must hold the program's weights and what the optimizer
    /// keeps: zeros, where it has made no step.
    ///
    /// # Errors
    /// [`BuildError`], for a program that is none to be trained with [`BuildError::Training`].
    pub unsafe fn build(
        program: &Program,
        device: TorchDevice,
        optimizer: &Optimizer,
        base: DeviceAddress,
        counts: &[u64],
    ) -> Result<Self, BuildError> {
        let layout = StateLayout::new(program, optimizer)
            .map_err(|error| BuildError::Training { reason: error.to_string() })?;
        let loss = loss_of(program)?;
        let span = program.span();
        let at = |offset: u64| DeviceAddress(base.0 + offset);
        let mut addresses: Vec<DeviceAddress> = program
            .weights
            .iter()
            .map(|weight| at(span.offset(weight.storage) + weight.offset_bytes))
            .collect();
        for buffer in layout.in_role(Role::Buffer) {
            if let Some(copy) = buffer.copy_bytes {
                addresses[buffer.weight] = at(copy);
            }
        }
        let address = |value: ValueId| {
            let index = program.weights.iter().position(|weight| weight.value == value);
            addresses[index.expect("every weight is asked for by its own value")]
        };
        // SAFETY: all addresses lie inside of the layout, whose memory the caller promises; copies of buffers are used by
        // this executable alone.
        let mut executable = unsafe {
            Executable::build_for(
                Purpose::Training,
                program,
                device,
                |weight| address(weight.value),
                |_| None,
            )
        }?;
        let mut steps = Steps::new(optimizer);
        let value = |index: usize| program.weights[index].value;
        for (index, parameter) in layout.in_role(Role::Parameter).enumerate() {
            let kept = [Role::First, Role::Second]
                .map(|role| layout.in_role(role).nth(index).map(|kept| at(kept.offset_bytes)));
            let count = counts.get(index).copied().unwrap_or(0);
            // SAFETY: as above.
            unsafe { steps.add_parameter(executable.values(), value(parameter.weight), kept, count) }
                .map_err(|raised| refused(&parameter.name, raised))?;
        }
        for buffer in layout.in_role(Role::Buffer) {
            let (weight, home) = (&program.weights[buffer.weight], at(buffer.offset_bytes));
            // SAFETY: as above.
            unsafe {
                if buffer.copy_bytes.is_some() && weight.first_use.is_some() {
                    steps.add_buffer(executable.values(), weight.value, home)
                } else {
                    steps.add_frozen(weight, home, device)
                }
            }
            .map_err(|raised| refused(&buffer.name, raised))?;
        }
        Ok(Self { executable, steps, loss, layout, worth: StateWorth::Sound })
    }

    /// Where the state lies.
    pub fn state(&self) -> &StateLayout {
        &self.layout
    }

    /// What the state is worth.
    pub fn worth(&self) -> StateWorth {
        self.worth
    }

    /// For every parameter, in the order of the layout, in how many steps the optimizer has changed it.
    pub fn counts(&self) -> Vec<u64> {
        self.steps.counts()
    }

    /// Says for every parameter how many steps its optimizer's state stands for, when that was [written](Self::write).
    pub fn set_counts(&mut self, counts: &[u64]) {
        self.steps.set_counts(counts);
    }

    /// Copies a tensor of the [state](Self::state) to host memory, dense and in row-major order. Between steps.
    ///
    /// # Errors
    /// What libtorch raised.
    pub fn read(&self, tensor: &StateTensor) -> Result<Vec<u8>, RunError> {
        let mut bytes = vec![0; usize::try_from(tensor.bytes()).unwrap_or(usize::MAX)];
        let index = self.index(tensor)?;
        // SAFETY: there are as many bytes as the tensor has.
        unsafe { self.steps.read(tensor.role, index, &mut bytes) }
            .map_err(|raised| fault(&tensor.name, raised))?;
        Ok(bytes)
    }

    /// Copies it from there.
    ///
    /// # Errors
    /// What libtorch raised; [`FaultClass::Input`] for bytes of another length.
    pub fn write(&mut self, tensor: &StateTensor, bytes: &[u8]) -> Result<(), RunError> {
        let index = self.index(tensor)?;
        if bytes.len() as u64 != tensor.bytes() {
            let message =
                format!("'{}' has {} bytes, {} were given", tensor.name, tensor.bytes(), bytes.len());
            return Err(RunError { class: FaultClass::Input, message });
        }
        // SAFETY: there are as many bytes as the tensor has.
        unsafe { self.steps.write(tensor.role, index, bytes) }.map_err(|raised| fault(&tensor.name, raised))
    }

    /// A tensor's place among those of its role.
    fn index(&self, tensor: &StateTensor) -> Result<usize, RunError> {
        self.layout.in_role(tensor.role).position(|known| known == tensor).ok_or_else(|| RunError {
            class: FaultClass::Input,
            message: format!("'{}' is no tensor of this state", tensor.name),
        })
    }

    /// One step. `batch` gives the inputs of micro-batch after micro-batch; those before are not looked at any more. Ends
    /// early once `pace` says so, between two operators or two operations of the backward pass.
    ///
    /// Inputs should begin at multiples of 64 bytes, as tensors of PyTorch's own do: kernels that find other addresses may
    /// add in another order, and the last bits of a loss differ.
    ///
    /// # Safety
    /// Inputs must be mapped, of the size that type and shape give, until the next are asked for or the step ends.
    ///
    /// # Errors
    /// What `batch` returned, or what libtorch raised; a loss that is not finite is [`FaultClass::Model`]. The state is as
    /// before the step, unless libtorch raised while the optimizer worked, which only a lack of memory makes it.
    pub unsafe fn step(
        &mut self,
        order: &StepOrder,
        pace: &dyn Pace,
        mut batch: impl FnMut(u32) -> Result<Vec<Input>, RunError>,
    ) -> Result<StepEnd, RunError> {
        // SAFETY: the caller's promise is the one asked for.
        let result = unsafe { self.gradients(order, pace, &mut batch) };
        self.executable.clear();
        let result = match result {
            Ok(None) => self.finish(order, pace),
            Ok(Some(phase)) => Ok(StepEnd::Stopped { phase }),
            Err(error) => Err(error),
        };
        self.steps.discard();
        result
    }

    /// Gradients of all micro-batches; the phase in which it was stopped, if it was.
    unsafe fn gradients(
        &mut self,
        order: &StepOrder,
        pace: &dyn Pace,
        batch: &mut impl FnMut(u32) -> Result<Vec<Input>, RunError>,
    ) -> Result<Option<Phase>, RunError> {
        self.steps.begin(order.seed).map_err(|raised| fault("a step", raised))?;
        for index in 0..order.micro_batches.max(1) {
            // Before rows are gathered, which no operator is.
            if pace.stops() {
                return Ok(Some(Phase::Forward));
            }
            let inputs = batch(index)?;
            let mut mode = GradMode::begin();
            // SAFETY: the caller promises the inputs; the state is there.
            let ran = unsafe { self.executable.run_recorded(&inputs, &mut StopWatch(pace), &mut mode) };
            match ran {
                Ok(()) => {}
                Err(error) if error.class == FaultClass::Stopped => return Ok(Some(Phase::Forward)),
                Err(error) => return Err(error),
            }
            mode.set(true);
            let values = self.executable.values();
            let end = self.steps.backward(values, self.loss, order.micro_batches.max(1), pace);
            match end.map_err(|raised| fault("the backward pass", raised))? {
                BackwardEnd::Done => self.executable.clear(),
                BackwardEnd::Stopped => return Ok(Some(Phase::Backward)),
            }
        }
        Ok(None)
    }

    fn finish(&mut self, order: &StepOrder, pace: &dyn Pace) -> Result<StepEnd, RunError> {
        self.steps.fetch_loss().map_err(|raised| fault("the loss", raised))?;
        // Whoever comes meanwhile does not wait for the optimizer as well.
        if pace.finishes() {
            return Ok(StepEnd::Stopped { phase: Phase::Backward });
        }
        let loss = self.steps.loss().map_err(|raised| fault("the loss", raised))?;
        if !loss.is_finite() {
            self.worth = StateWorth::Diverged;
            let message = format!(
                "the loss is {loss}: the step is thrown away, and the state is as before it; lower the learning rate or set \
                 clip_norm, and remove a checkpoint of this very step, should there be one: it gives the same loss again"
            );
            return Err(RunError { class: FaultClass::Model, message });
        }
        let applied = self.steps.apply(order.rate, order.clip_norm, pace);
        self.worth = if applied.is_ok() { StateWorth::Sound } else { StateWorth::Torn };
        applied.map_err(|raised| fault("the optimizer", raised))?;
        Ok(StepEnd::Finished { loss })
    }
}

/// The program's one output.
fn loss_of(program: &Program) -> Result<ValueId, BuildError> {
    let wrong = |found: String| BuildError::Training {
        reason: format!(
            "the program returns {found} and not one scalar, the loss: export a module whose forward returns the loss \
             (`--train`)"
        ),
    };
    match program.outputs.as_slice() {
        [output] => match &output.kind {
            OutputKind::Tensor { value, dtype, shape } if shape.is_empty() && dtype.is_floating_point() => {
                Ok(*value)
            }
            OutputKind::Tensor { dtype, shape, .. } => {
                Err(wrong(format!("a tensor of {dtype} with {} dimensions", shape.len())))
            }
            _ => Err(wrong("no tensor".to_owned())),
        },
        outputs => Err(wrong(format!("{} outputs", outputs.len()))),
    }
}

fn refused(weight: &str, raised: Raised) -> BuildError {
    BuildError::Weight { weight: weight.to_owned(), reason: raised.message }
}

struct StopWatch<'a>(&'a dyn Pace);

impl Watch for StopWatch<'_> {
    fn before(&mut self, _node: usize) -> Result<(), RunError> {
        if !self.0.stops() {
            return Ok(());
        }
        Err(RunError { class: FaultClass::Stopped, message: "the step was stopped".to_owned() })
    }
}
