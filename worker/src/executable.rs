//! A program made ready to run: every operator found, every argument in place, every weight a view of the span.

use std::collections::{HashMap, HashSet};

use pswitch_device::DeviceAddress;
use pswitch_model::{
    Argument, DType, InputKind, MutationKind, Node, NodeOutput, OutputKind, Program, Sym, SymbolicOperator,
    Target, ValueId, Weight,
};
use pswitch_protocol::FaultClass;

use crate::aliasing::last_write;
use crate::cuda::CudaLibtorch;
use crate::error::{BuildError, RunError};
use crate::libtorch::{
    ArgumentIndex, Call, CallBuilder, InferenceMode, Number, Raised, RaisedFault, TorchDevice, Values, View,
};
use crate::symbolic;

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
        for weight in program.weights.iter().filter(used) {
            let bytes = span_bytes(weight);
            values.protect(address(weight), bytes);
            if let Some(host) = on_host(weight) {
                values.protect(host, bytes);
            }
        }
        let table = |weight: &Weight| {
            Some(Table { weight: weight.clone(), home: address(weight), host: on_host(weight)? })
        };
        let tables = program.weights.iter().filter(used).filter_map(table).collect();
        let reshapes_from = match device {
            TorchDevice::Cpu => None,
            TorchDevice::Cuda(_) => Some(last_write(program).map_or(0, |last| last + 1)),
        };
        let mut builder = Builder { program, device, aliases: weight_aliases(program), reshapes_from };
        let mut steps = Vec::with_capacity(program.nodes.len());
        for (index, (node, releases)) in program.nodes.iter().zip(program.last_uses()).enumerate() {
            steps.push(Step { action: builder.action(index, node)?, releases, label: label(node) });
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
        Ok(Self { values, steps, inputs, outputs, transient, tables, tables_on_host: Some(false), device })
    }

    /// Whether there are weights that can be read from the host.
    pub(crate) fn has_tables(&self) -> bool {
        !self.tables.is_empty()
    }

    /// Says where the next runs read those weights from that can be read from the host.
    ///
    /// # Errors
    /// If libtorch refuses the view.
    pub(crate) fn read_tables(&mut self, from_host: bool) -> Result<(), RunError> {
        if self.tables_on_host == Some(from_host) {
            return Ok(());
        }
        self.tables_on_host = None;
        for Table { weight, home, host } in &self.tables {
            let address = if from_host { *host } else { *home };
            // SAFETY: whoever built the executable promised that both stay mapped.
            unsafe { self.values.set_view(weight.value, address, &view_of(weight), self.device) }
                .map_err(|raised| fault("a table", raised))?;
        }
        self.tables_on_host = Some(from_host);
        Ok(())
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
        self.clear();
        let _mode = InferenceMode::begin();
        // SAFETY: the caller's promises are those of `try_run`.
        let result = unsafe { self.try_run(inputs, watch) };
        if result.is_err() {
            self.clear_all();
        }
        result
    }

    unsafe fn try_run(&mut self, inputs: &[Input], watch: &mut impl Watch) -> Result<(), RunError> {
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

fn fault(label: &str, raised: Raised) -> RunError {
    let class = match raised.fault {
        RaisedFault::Input => FaultClass::Input,
        RaisedFault::OutOfMemory => FaultClass::OutOfMemory,
        RaisedFault::UnknownOperator | RaisedFault::Argument | RaisedFault::Model => FaultClass::Model,
    };
    RunError { class, message: format!("{label}: {}", raised.message) }
}

fn place(node: &Node) -> String {
    if node.place.is_empty() { String::new() } else { format!(" ({})", node.place) }
}

fn label(node: &Node) -> String {
    format!("{} in node '{}'{}", node.target, node.name, place(node))
}

/// Bytes from a weight's first element to behind its last, in whatever order they lie.
fn span_bytes(weight: &Weight) -> u64 {
    if weight.sizes.contains(&0) {
        return 0;
    }
    let last = weight.sizes.iter().zip(&weight.strides).map(|(size, stride)| (size - 1) * stride);
    (last.sum::<u64>() + 1) * weight.dtype.size_bytes()
}

fn view_of(weight: &Weight) -> View<'_> {
    View {
        dtype: weight.dtype,
        sizes: &weight.sizes,
        strides: Some(&weight.strides),
        requires_grad: weight.requires_grad,
    }
}

fn weight_aliases(program: &Program) -> HashMap<ValueId, usize> {
    program.weights.iter().enumerate().map(|(index, weight)| (weight.value, index)).collect()
}

/// Turns nodes into actions, in their order.
struct Builder<'a> {
    program: &'a Program,
    device: TorchDevice,
    /// Values that share memory with a weight, as far as the operators' schemas tell, and which weight.
    aliases: HashMap<ValueId, usize>,
    /// The first node behind the last write, where the program's device is another than the one it was exported on.
    reshapes_from: Option<usize>,
}

impl Builder<'_> {
    /// Whether a node is a view that may as well be a copy.
    ///
    /// An export leaves out copies that its own device did not need: the CPU's attention, say, returns other strides than
    /// a GPU's, and what could be viewed there cannot here. `reshape` views where it can and copies where it cannot, which
    /// nobody notices unless something is written to later on.
    fn is_reshape(&self, index: usize, node: &Node) -> bool {
        let is_view = matches!(
            &node.target,
            Target::Operator { namespace, name, overload }
                if namespace == "aten" && name == "view" && overload == "default"
        );
        is_view && self.reshapes_from.is_some_and(|first| index >= first)
    }

    fn action(&mut self, index: usize, node: &Node) -> Result<Action, BuildError> {
        match &node.target {
            Target::Symbolic(operator) => Self::symbolic(node, *operator),
            Target::Operator { namespace, name, overload } => {
                let overload = if overload == "default" { "" } else { overload };
                let reshapes = self.is_reshape(index, node);
                let name = if reshapes { "reshape" } else { name };
                let builder =
                    CallBuilder::new(&format!("{namespace}::{name}"), overload, self.program.values.len())
                        .map_err(|raised| self.refused(node, raised))?;
                self.call(node, name, builder).map(Action::Call)
            }
        }
    }

    fn symbolic(node: &Node, operator: SymbolicOperator) -> Result<Action, BuildError> {
        let unfit = |what: &str| BuildError::Argument {
            node: node.name.clone(),
            place: place(node),
            target: node.target.to_string(),
            reason: what.to_owned(),
        };
        let operands = node
            .inputs
            .iter()
            .map(|argument| match &argument.value {
                Argument::Int(value) | Argument::SymInt(Sym::Constant(value)) => {
                    Ok(Sym::Constant(Number::Int(*value)))
                }
                Argument::Float(value) | Argument::SymFloat(Sym::Constant(value)) => {
                    Ok(Sym::Constant(Number::Float(*value)))
                }
                Argument::Bool(value) | Argument::SymBool(Sym::Constant(value)) => {
                    Ok(Sym::Constant(Number::Bool(*value)))
                }
                Argument::SymInt(Sym::Value(id))
                | Argument::SymFloat(Sym::Value(id))
                | Argument::SymBool(Sym::Value(id)) => Ok(Sym::Value(*id)),
                other => Err(unfit(&format!("operand '{}' is no number: {other:?}", argument.name))),
            })
            .collect::<Result<Vec<_>, _>>()?;
        match node.outputs.as_slice() {
            [NodeOutput::SymInt(id) | NodeOutput::SymFloat(id) | NodeOutput::SymBool(id)] => {
                Ok(Action::Symbolic { operator, operands, into: *id })
            }
            _ => Err(unfit("it does not return one number")),
        }
    }

    fn call(&mut self, node: &Node, name: &str, mut builder: CallBuilder) -> Result<Call, BuildError> {
        let mut aliased = None;
        for argument in &node.inputs {
            // What `view` calls its size `reshape` calls a shape.
            let renamed = if name == "reshape" && argument.name == "size" { "shape" } else { &argument.name };
            let Some(index) = builder.argument(renamed) else {
                return Err(self.unfit(node, format!("it has no argument '{}'", argument.name)));
            };
            let cudnn = argument.name == "cudnn_enabled" && matches!(self.device, TorchDevice::Cuda(_));
            if cudnn {
                // A machine without a GPU exports `false`; the same program is meant to use cuDNN where there is one.
                builder.set_number(index, Number::Bool(true));
            } else {
                self.set(&mut builder, index, &argument.value)
                    .map_err(|reason| self.unfit(node, format!("argument '{}': {reason}", argument.name)))?;
            }
            for weight in argument.value.values().iter().filter_map(|id| self.aliases.get(id).copied()) {
                if builder.writes(index) && !WRITES_NO_DATA.contains(&name) {
                    return Err(BuildError::ChangesState {
                        node: node.name.clone(),
                        place: place(node),
                        weight: self.program.weights[weight].name.clone(),
                    });
                }
                if builder.aliases(index) {
                    aliased = Some(weight);
                }
            }
        }
        for output in &node.outputs {
            let returned = match output {
                NodeOutput::None => vec![None],
                NodeOutput::Tensor(id)
                | NodeOutput::SymInt(id)
                | NodeOutput::SymFloat(id)
                | NodeOutput::SymBool(id) => {
                    vec![Some(*id)]
                }
                NodeOutput::Tensors(ids) => ids.iter().copied().map(Some).collect(),
                NodeOutput::OptionalTensors(ids) => ids.clone(),
                NodeOutput::SymInts(ints) => ints
                    .iter()
                    .map(|int| match int {
                        Sym::Value(id) => Some(*id),
                        Sym::Constant(_) => None,
                    })
                    .collect(),
            };
            match output {
                NodeOutput::Tensors(_) | NodeOutput::OptionalTensors(_) | NodeOutput::SymInts(_) => {
                    builder.add_output_list(&returned);
                }
                _ => builder.add_output(returned[0]),
            }
            if let Some(weight) = aliased {
                self.aliases.extend(returned.into_iter().flatten().map(|id| (id, weight)));
            }
        }
        builder.finish().map_err(|raised| self.refused(node, raised))
    }

    fn set(
        &self,
        builder: &mut CallBuilder,
        index: ArgumentIndex,
        argument: &Argument,
    ) -> Result<(), String> {
        match argument {
            Argument::None => builder.set_none(index),
            Argument::Tensor(id)
            | Argument::SymInt(Sym::Value(id))
            | Argument::SymFloat(Sym::Value(id))
            | Argument::SymBool(Sym::Value(id)) => builder.set_value(index, *id),
            Argument::Tensors(ids) => {
                builder.set_tensors(index, &ids.iter().copied().map(Some).collect::<Vec<_>>())
            }
            Argument::OptionalTensors(ids) => builder.set_tensors(index, ids),
            Argument::Int(value) | Argument::SymInt(Sym::Constant(value)) => {
                builder.set_number(index, Number::Int(*value));
            }
            Argument::Float(value) | Argument::SymFloat(Sym::Constant(value)) => {
                builder.set_number(index, Number::Float(*value));
            }
            Argument::Bool(value) | Argument::SymBool(Sym::Constant(value)) => {
                builder.set_number(index, Number::Bool(*value));
            }
            Argument::Ints(ints) => {
                builder.set_ints(index, &ints.iter().copied().map(Sym::Constant).collect::<Vec<_>>());
            }
            Argument::SymInts(ints) => builder.set_ints(index, ints),
            Argument::Floats(floats) => builder.set_floats(index, floats),
            Argument::SymFloats(floats) => builder.set_floats(index, &constants(floats)?),
            Argument::Bools(bools) => builder.set_bools(index, bools),
            Argument::SymBools(bools) => builder.set_bools(index, &constants(bools)?),
            Argument::String(text) => builder.set_string(index, text),
            Argument::Strings(texts) => builder.set_strings(index, texts).map_err(|raised| raised.message)?,
            Argument::Complex { re, im } => builder.set_complex(index, *re, *im),
            Argument::ScalarType(dtype) => {
                builder.set_number(index, Number::Int(i64::from(dtype.c10_code())))
            }
            Argument::MemoryFormat(format) => {
                builder.set_number(index, Number::Int(i64::from(format.c10_code())))
            }
            Argument::Layout(layout) => builder.set_number(index, Number::Int(i64::from(layout.c10_code()))),
            Argument::Device { kind, .. } if kind == "meta" => builder.set_meta_device(index),
            Argument::Device { .. } => builder.set_device(index, self.device),
            Argument::NestedTensors(_) | Argument::IntLists(_) => {
                return Err("lists of lists are not supported".to_owned());
            }
        }
        Ok(())
    }

    fn refused(&self, node: &Node, raised: Raised) -> BuildError {
        match raised.fault {
            RaisedFault::UnknownOperator => BuildError::UnknownOperator {
                node: node.name.clone(),
                place: place(node),
                reason: raised.message,
            },
            _ => self.unfit(node, raised.message),
        }
    }

    fn unfit(&self, node: &Node, reason: String) -> BuildError {
        BuildError::Argument {
            node: node.name.clone(),
            place: place(node),
            target: node.target.to_string(),
            reason,
        }
    }
}

fn constants<T: Copy>(list: &[Sym<T>]) -> Result<Vec<T>, String> {
    list.iter()
        .map(|entry| match entry {
            Sym::Constant(value) => Ok(*value),
            Sym::Value(id) => {
                Err(format!("{id}, known only at run time, in a list of floats or bools is not supported"))
            }
        })
        .collect()
}
