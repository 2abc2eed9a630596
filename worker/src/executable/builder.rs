//! Turns the nodes of a program into prepared calls.

use std::collections::HashMap;

use pswitch_model::{
    Argument, Node, NodeOutput, Program, Sym, SymbolicOperator, Target, ValueId, Weight, WeightKind,
};

use super::{Action, Purpose, WRITES_NO_DATA};
use crate::aliasing::last_write;
use crate::error::BuildError;
use crate::libtorch::{ArgumentIndex, Call, CallBuilder, Number, Raised, RaisedFault, TorchDevice};

fn place(node: &Node) -> String {
    if node.place.is_empty() { String::new() } else { format!(" ({})", node.place) }
}

pub(super) fn label(node: &Node) -> String {
    format!("{} in node '{}'{}", node.target, node.name, place(node))
}

fn weight_aliases(program: &Program) -> HashMap<ValueId, usize> {
    program.weights.iter().enumerate().map(|(index, weight)| (weight.value, index)).collect()
}

/// Turns nodes into actions, in their order.
pub(super) struct Builder<'a> {
    program: &'a Program,
    device: TorchDevice,
    /// Values that share memory with a weight, as far as the operators' schemas tell, and which weight.
    aliases: HashMap<ValueId, usize>,
    /// The first node behind the last write, where the program's device is another than the one it was exported on.
    reshapes_from: Option<usize>,
    purpose: Purpose,
}

impl<'a> Builder<'a> {
    pub(super) fn new(program: &'a Program, device: TorchDevice, purpose: Purpose) -> Self {
        let reshapes_from = match device {
            TorchDevice::Cpu => None,
            TorchDevice::Cuda(_) => Some(last_write(program).map_or(0, |last| last + 1)),
        };
        Self { program, device, aliases: weight_aliases(program), reshapes_from, purpose }
    }

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

    pub(super) fn action(&mut self, index: usize, node: &Node) -> Result<Action, BuildError> {
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
                    self.check_write(node, &self.program.weights[weight])?;
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

    /// A served model changes nothing of its own, a training program its buffers alone: parameters are the optimizer's.
    fn check_write(&self, node: &Node, weight: &Weight) -> Result<(), BuildError> {
        let (node, place, name) = (node.name.clone(), place(node), weight.name.clone());
        match (self.purpose, weight.kind) {
            (Purpose::Serving, _) => Err(BuildError::ChangesState { node, place, weight: name }),
            (Purpose::Training, WeightKind::Buffer { .. }) => Ok(()),
            (Purpose::Training, _) => Err(BuildError::ChangesParameter { node, place, weight: name }),
        }
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
