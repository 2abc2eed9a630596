//! A program made ready to run: every operator found, every argument in place, every weight a view of the span.

mod builder;
mod places;

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};

use pswitch_device::DeviceAddress;
use pswitch_model::{
    DType, InputKind, MutationKind, OutputKind, Program, Sym, SymbolicOperator, ValueId, Weight, WeightKind,
};
use pswitch_protocol::FaultClass;

use crate::cuda::CudaLibtorch;
use crate::error::{BuildError, RunError};
use crate::libtorch::{Call, InferenceMode, Number, Raised, RaisedFault, TorchDevice, Values, View};
use crate::symbolic;
use crate::training::GradMode;
use builder::{Builder, label};

/// Operators whose schema says that they write, though they change nothing but how a tensor is seen by autograd.
pub(crate) const WRITES_NO_DATA: [&str; 2] = ["detach_", "requires_grad_"];

/// What happens between the nodes of an execution: waiting for groups, watching the stop flag, taking times.
pub trait Watch {
    /// Called before a node is launched.
    ///
    /// # Errors
    /// Ends the execution with the given error.
    fn before(&mut self, node: usize) -> Result<(), RunError>;
}

/// One input of an execution.
#[derive(Debug, Clone, PartialEq)]
pub enum Input {
    /// A dense row-major tensor.
    Tensor {
        /// Its first byte on the device.
        at: DeviceAddress,
        /// Element type.
        dtype: DType,
        /// Sizes, outermost first.
        shape: Vec<u64>,
    },
    /// An integer.
    Integer(i64),
}

/// Type and shape of one output of an execution.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutputShape {
    /// Element type.
    pub dtype: DType,
    /// Sizes, outermost first; empty for a number.
    pub shape: Vec<u64>,
}

impl OutputShape {
    /// Size of the tensor, dense.
    pub fn bytes(&self) -> u64 {
        self.shape.iter().product::<u64>() * self.dtype.size_bytes()
    }
}

/// What an executable is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// Outputs; nothing that stays is changed, and nothing recorded for gradients.
    Serving,
    /// Gradients of the parameters; buffers are changed.
    Training,
}

enum Action {
    Call(Call),
    Symbolic { operator: SymbolicOperator, operands: Vec<Sym<Number>>, into: ValueId },
}

struct Step {
    action: Action,
    /// Values that nothing needs after this step.
    releases: Vec<ValueId>,
    /// Node and place, for messages.
    label: String,
    /// Whether a training run records it for gradients.
    records: bool,
}

/// A program over a span, ready to run any number of times, one run at a time.
///
/// Outputs stay until [`clear`](Self::clear) or the next run. All activations come from libtorch's allocator, which
/// [`ExecutionArena`](crate::ExecutionArena) points at an arena.
pub struct Executable {
    values: Values,
    steps: Vec<Step>,
    inputs: Vec<ValueId>,
    outputs: Vec<ValueId>,
    /// What a run leaves in the table beside weights: inputs and outputs.
    transient: Vec<ValueId>,
    /// Weights that may be read from the host.
    tables: Vec<Table>,
    /// Where they are read from now; unknown if a change failed midway.
    tables_on_host: Option<bool>,
    /// Parameters that are one tensor with an earlier one.
    tied: Vec<(ValueId, ValueId)>,
    device: TorchDevice,
}

/// A weight with two places.
struct Table {
    weight: Weight,
    home: DeviceAddress,
    host: DeviceAddress,
}

impl Executable {
    /// Prepares a program whose weights lie at the addresses that `address` gives. Nothing is read from there yet.
    /// `on_host` gives a second address of those that a worker may read from host memory meanwhile.
    ///
    /// # Safety
    /// The addresses must be those of the program's span, mapped for as long as the executable lives; they need not
    /// hold the weights before the node that uses them runs. Those on the host hold them always.
    ///
    /// # Errors
    /// [`BuildError`] names the node that cannot be prepared.
    pub unsafe fn build(
        program: &Program,
        device: TorchDevice,
        address: impl Fn(&Weight) -> DeviceAddress,
        on_host: impl Fn(&Weight) -> Option<DeviceAddress>,
    ) -> Result<Self, BuildError> {
        // SAFETY: the caller's promises are those asked for.
        unsafe { Self::build_for(Purpose::Serving, program, device, address, on_host) }
    }

    /// As [`build`](Self::build), for a program that is served or trained.
    ///
    /// # Safety
    /// As [`build`](Self::build). To train, the memory of buffers must be this executable's alone.
    ///
    /// # Errors
    /// As [`build`](Self::build).
    pub(crate) unsafe fn build_for(
        purpose: Purpose,
        program: &Program,
        device: TorchDevice,
        address: impl Fn(&Weight) -> DeviceAddress,
        on_host: impl Fn(&Weight) -> Option<DeviceAddress>,
    ) -> Result<Self, BuildError> {
        let mut values = Values::new(program.values.len());
        let span = program.span();
        // Weights that nothing uses come last and never move: there is no memory to view.
        let used = |weight: &&Weight| span.offset(weight.storage) < span.used_bytes;
        for weight in program.weights.iter().filter(used) {
            // SAFETY: the caller promises that the span stays mapped.
            unsafe { values.set_view(weight.value, address(weight), &view_of(weight), device) }.map_err(
                |raised| BuildError::Weight { weight: weight.name.clone(), reason: raised.message },
            )?;
        }
        let tied = tied_weights(program);
        for &(first, tied) in &tied {
            values.share(first, tied);
        }
        let is_changed = |weight: &Weight| {
            purpose == Purpose::Training && matches!(weight.kind, WeightKind::Buffer { .. })
        };
        for weight in program.weights.iter().filter(used).filter(|weight| !is_changed(weight)) {
            let bytes = weight.extent_bytes();
            values.protect(address(weight), bytes);
            if let Some(host) = on_host(weight) {
                values.protect(host, bytes);
            }
        }
        let table = |weight: &Weight| {
            Some(Table { weight: weight.clone(), home: address(weight), host: on_host(weight)? })
        };
        let tables = program.weights.iter().filter(used).filter_map(table).collect();
        let mut builder = Builder::new(program, device, purpose);
        let mut steps = Vec::with_capacity(program.nodes.len());
        for (index, (node, releases)) in program.nodes.iter().zip(program.last_uses()).enumerate() {
            let action = builder.action(index, node)?;
            steps.push(Step { action, releases, label: label(node), records: node.grad.unwrap_or(true) });
        }
        // An input that a program writes to is this execution's own copy; a weight is everybody's.
        if let Some(mutation) = program.mutations.iter().find(|mutation| mutation.kind != MutationKind::Input)
        {
            return Err(BuildError::ChangesState {
                node: "the program's end".to_owned(),
                place: String::new(),
                weight: program.values[mutation.into.index()].name.clone(),
            });
        }
        let inputs: Vec<ValueId> = program
            .inputs
            .iter()
            .filter_map(|input| match &input.kind {
                InputKind::Tensor { value, .. } | InputKind::SymInt { value, .. } => Some(*value),
                InputKind::Constant(_) => None,
            })
            .collect();
        let outputs: Vec<ValueId> = program
            .outputs
            .iter()
            .filter_map(|output| match &output.kind {
                OutputKind::Tensor { value, .. } => Some(*value),
                OutputKind::SymInt(value) | OutputKind::SymFloat(value) | OutputKind::SymBool(value) => {
                    Some(*value)
                }
                OutputKind::Constant(_) => None,
            })
            .collect();
        let weights: HashSet<ValueId> = program.weights.iter().map(|weight| weight.value).collect();
        let transient =
            inputs.iter().chain(&outputs).copied().filter(|value| !weights.contains(value)).collect();
        let tables_on_host = Some(false);
        Ok(Self { values, steps, inputs, outputs, transient, tables, tables_on_host, tied, device })
    }

    /// Runs the program. On the CPU the outputs are there when it returns; on a GPU their computation is enqueued.
    ///
    /// # Safety
    /// The inputs must be mapped, of the size that type and shape give, and stay so until [`clear`](Self::clear); the
    /// weights must lie in the span whenever `watch` lets the node go on that uses them.
    ///
    /// # Errors
    /// What `watch` returned, or what libtorch raised, with the node and its place. The table is clean either way.
    pub unsafe fn run(&mut self, inputs: &[Input], watch: &mut impl Watch) -> Result<(), RunError> {
        let _mode = InferenceMode::begin();
        // SAFETY: the caller's promises are those asked for.
        unsafe { self.run_cleanly(inputs, watch, |_| ()) }
    }

    /// As [`run`](Self::run), and what gradients need is recorded, within a [`GradMode`].
    ///
    /// # Safety
    /// As [`run`](Self::run).
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub(crate) unsafe fn run_recorded(
        &mut self,
        inputs: &[Input],
        watch: &mut impl Watch,
        mode: &mut GradMode,
    ) -> Result<(), RunError> {
        // SAFETY: the caller's promises are those asked for.
        unsafe { self.run_cleanly(inputs, watch, |step| mode.set(step.records)) }
    }

    unsafe fn run_cleanly(
        &mut self,
        inputs: &[Input],
        watch: &mut impl Watch,
        ahead: impl FnMut(&Step),
    ) -> Result<(), RunError> {
        self.clear();
        // SAFETY: the caller's promises are those of `try_run`.
        let result = unsafe { self.try_run(inputs, watch, ahead) };
        if result.is_err() {
            self.clear_all();
        }
        result
    }

    unsafe fn try_run(
        &mut self,
        inputs: &[Input],
        watch: &mut impl Watch,
        mut ahead: impl FnMut(&Step),
    ) -> Result<(), RunError> {
        if inputs.len() != self.inputs.len() {
            return Err(RunError {
                class: FaultClass::Input,
                message: format!("the program takes {} inputs, {} came", self.inputs.len(), inputs.len()),
            });
        }
        for (input, &value) in inputs.iter().zip(&self.inputs) {
            match input {
                Input::Integer(integer) => self.values.set_number(value, Number::Int(*integer)),
                // SAFETY: the caller promises that the input's memory outlives the run.
                Input::Tensor { at, dtype, shape } => unsafe {
                    let view = View { dtype: *dtype, sizes: shape, strides: None, requires_grad: false };
                    self.values
                        .set_view(value, *at, &view, self.device)
                        .map_err(|raised| fault("an input", raised))?;
                },
            }
        }
        for (index, step) in self.steps.iter().enumerate() {
            watch.before(index)?;
            ahead(step);
            match &step.action {
                Action::Call(call) => {
                    call.run(&mut self.values).map_err(|raised| fault(&step.label, raised))?;
                }
                Action::Symbolic { operator, operands, into } => {
                    let number = symbolic_step(&self.values, *operator, operands).map_err(|reason| {
                        RunError { class: FaultClass::Model, message: format!("{}: {reason}", step.label) }
                    })?;
                    self.values.set_number(*into, number);
                }
            }
            self.values.clear(&step.releases);
        }
        Ok(())
    }

    /// Number of nodes: `watch` sees the numbers below it.
    pub fn nodes(&self) -> usize {
        self.steps.len()
    }

    /// Types and shapes of the outputs of the last run, in the program's order, those fixed at export left out.
    ///
    /// # Errors
    /// If an output is neither tensor nor number, or of a type that cannot be sent.
    pub fn outputs(&self) -> Result<Vec<OutputShape>, RunError> {
        self.outputs.iter().map(|&value| self.output_shape(value)).collect()
    }

    fn output_shape(&self, value: ValueId) -> Result<OutputShape, RunError> {
        let unsendable =
            |what: String| RunError { class: FaultClass::Model, message: format!("an output is {what}") };
        match (self.values.shape(value), self.values.number(value)) {
            (Some((code, shape)), _) => DType::from_c10_code(code)
                .map(|dtype| OutputShape { dtype, shape })
                .ok_or_else(|| unsendable(format!("a tensor of c10 type {code}, which has no name here"))),
            (None, Some(number)) => {
                let dtype = match number {
                    Number::Int(_) => DType::I64,
                    Number::Float(_) => DType::F64,
                    Number::Bool(_) => DType::Bool,
                };
                Ok(OutputShape { dtype, shape: Vec::new() })
            }
            (None, None) => Err(unsendable("missing".to_owned())),
        }
    }

    /// The table, for what is done to its values beside running the program.
    pub(crate) fn values(&mut self) -> &mut Values {
        &mut self.values
    }

    /// Number of outputs, those fixed at export left out.
    pub(crate) fn output_count(&self) -> usize {
        self.outputs.len()
    }

    /// Output `index` of the last run on a GPU: its type and shape, and its value if it is a number, or where it lies,
    /// dense. It stays there until [`clear`](Self::clear).
    pub(crate) fn output_on_gpu(
        &mut self,
        index: usize,
        libtorch: &CudaLibtorch,
    ) -> Result<(OutputShape, Option<Number>, DeviceAddress), RunError> {
        let value = self.outputs[index];
        let _mode = InferenceMode::begin();
        let shape = self.output_shape(value)?;
        if let Some(number) = self.values.number(value) {
            return Ok((shape, Some(number), DeviceAddress(0)));
        }
        let at = self.values.on_gpu(value, libtorch).map_err(|raised| fault("an output", raised))?;
        Ok((shape, None, at))
    }

    /// Copies output `index` of the last run to host memory, dense and in row-major order.
    ///
    /// # Safety
    /// `to` must be valid for writes of [`OutputShape::bytes`] bytes.
    ///
    /// # Errors
    /// What libtorch raised.
    pub unsafe fn copy_output(&self, index: usize, to: *mut u8) -> Result<(), RunError> {
        let value = self.outputs[index];
        match self.values.number(value) {
            // SAFETY: the caller promises room for the number's bytes; nothing is said about alignment.
            Some(number) => unsafe {
                match number {
                    Number::Int(value) => to.cast::<i64>().write_unaligned(value),
                    Number::Float(value) => to.cast::<f64>().write_unaligned(value),
                    Number::Bool(value) => to.write(u8::from(value)),
                }
            },
            None => {
                let _mode = InferenceMode::begin();
                // SAFETY: the caller promises room for the tensor's bytes.
                unsafe { self.values.copy_out(value, to) }.map_err(|raised| fault("an output", raised))?;
            }
        }
        Ok(())
    }

    /// Drops inputs and outputs of the last run; weights stay.
    pub fn clear(&mut self) {
        self.values.clear(&self.transient);
    }

    /// Drops everything but the weights, after a run that ended midway.
    fn clear_all(&mut self) {
        for step in &self.steps {
            self.values.clear(&step.releases);
        }
        self.clear();
    }
}

fn symbolic_step(
    values: &Values,
    operator: SymbolicOperator,
    operands: &[Sym<Number>],
) -> Result<Number, String> {
    let operands: Vec<Number> = operands
        .iter()
        .map(|operand| match *operand {
            Sym::Constant(number) => Ok(number),
            Sym::Value(id) => values.number(id).ok_or_else(|| format!("{id} holds no number")),
        })
        .collect::<Result<_, String>>()?;
    symbolic::evaluate(operator, &operands)
}

pub(crate) fn fault(label: &str, raised: Raised) -> RunError {
    let class = match raised.fault {
        RaisedFault::Input => FaultClass::Input,
        RaisedFault::OutOfMemory => FaultClass::OutOfMemory,
        RaisedFault::UnknownOperator | RaisedFault::Argument | RaisedFault::Model => FaultClass::Model,
    };
    RunError { class, message: format!("{label}: {}", raised.message) }
}

/// Weights that are one tensor under several names, as pairs of the first and another: to autograd they must be one, too.
fn tied_weights(program: &Program) -> Vec<(ValueId, ValueId)> {
    let mut firsts: HashMap<_, ValueId> = HashMap::new();
    let mut tied = Vec::new();
    for weight in program.weights.iter().filter(|weight| weight.requires_grad) {
        let tensor = (weight.storage, weight.offset_bytes, weight.dtype, &weight.sizes, &weight.strides);
        match firsts.entry(tensor) {
            Entry::Occupied(first) => tied.push((*first.get(), weight.value)),
            Entry::Vacant(place) => {
                place.insert(weight.value);
            }
        }
    }
    tied
}

fn view_of(weight: &Weight) -> View<'_> {
    View {
        dtype: weight.dtype,
        sizes: &weight.sizes,
        strides: Some(&weight.strides),
        requires_grad: weight.requires_grad,
    }
}
