//! The values that arguments and results name.

use std::fmt;

use crate::program::{Argument, Dim, NodeOutput, Sym, ValueId};

impl Argument {
    /// Every value in this argument, in order.
    pub fn values(&self) -> Vec<ValueId> {
        match self {
            Argument::Tensor(value) => vec![*value],
            Argument::Tensors(values) => values.clone(),
            Argument::OptionalTensors(values) => values.iter().flatten().copied().collect(),
            Argument::NestedTensors(lists) => lists.concat(),
            Argument::SymInt(number) => number.value().into_iter().collect(),
            Argument::SymInts(numbers) => numbers.iter().filter_map(Sym::value).collect(),
            Argument::SymFloat(number) => number.value().into_iter().collect(),
            Argument::SymFloats(numbers) => numbers.iter().filter_map(Sym::value).collect(),
            Argument::SymBool(number) => number.value().into_iter().collect(),
            Argument::SymBools(numbers) => numbers.iter().filter_map(Sym::value).collect(),
            Argument::None
            | Argument::Int(_)
            | Argument::Ints(_)
            | Argument::IntLists(_)
            | Argument::Float(_)
            | Argument::Floats(_)
            | Argument::Bool(_)
            | Argument::Bools(_)
            | Argument::String(_)
            | Argument::Strings(_)
            | Argument::Complex { .. }
            | Argument::ScalarType(_)
            | Argument::MemoryFormat(_)
            | Argument::Layout(_)
            | Argument::Device { .. } => Vec::new(),
        }
    }
}

impl NodeOutput {
    /// Every value that this return value defines, in order.
    pub fn values(&self) -> Vec<ValueId> {
        match self {
            NodeOutput::None => Vec::new(),
            NodeOutput::Tensor(value)
            | NodeOutput::SymInt(value)
            | NodeOutput::SymFloat(value)
            | NodeOutput::SymBool(value) => vec![*value],
            NodeOutput::Tensors(values) => values.clone(),
            NodeOutput::OptionalTensors(values) => values.iter().flatten().copied().collect(),
            NodeOutput::SymInts(numbers) => numbers.iter().filter_map(Sym::value).collect(),
        }
    }
}

impl<T> Sym<T> {
    /// The value that it is; none for a constant.
    pub fn value(&self) -> Option<ValueId> {
        match self {
            Sym::Value(value) => Some(*value),
            Sym::Constant(_) => None,
        }
    }
}

impl fmt::Display for Dim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Dim::Fixed(size) => write!(f, "{size}"),
            Dim::Symbol { name, .. } => f.write_str(name),
            Dim::Derived { expr, .. } => write!(f, "{expr}"),
            Dim::Unknown { .. } => f.write_str("?"),
        }
    }
}
