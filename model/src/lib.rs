//! Reader of `torch.export` archives (`.pt2`): graph, weights in order of use, inputs and outputs.

mod dtype;
mod expr;
mod program;
mod symbolic;

pub use dtype::{DType, Layout, MemoryFormat};
pub use expr::Expr;
pub use program::{
    Argument, Constant, Dim, Input, InputKind, Mutation, MutationKind, NamedArgument, Node, NodeOutput,
    Output, OutputKind, Program, Storage, StorageId, Sym, SymbolRange, SymbolicOperator, Target, TensorMeta,
    ValueId, ValueInfo, ValueKind, Weight, WeightKind,
};
