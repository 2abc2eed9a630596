#![doc = include_str!("../README.md")]

mod archive;
mod bounds;
mod container;
mod dtype;
mod error;
mod expr;
mod limits;
mod program;
mod resolve;
mod schema;
mod span;
mod srepr;
mod symbolic;
mod symbols;
mod tables;
mod values;
mod zip;

pub use archive::Archive;
pub use bounds::IndexBound;
pub use dtype::{DType, Layout, MemoryFormat};
pub use error::ModelError;
pub use expr::Expr;
pub use limits::Limits;
pub use program::{
    Argument, Constant, Dim, Input, InputKind, Mutation, MutationKind, NamedArgument, Node, NodeOutput,
    Output, OutputKind, Program, Storage, StorageId, Sym, SymbolRange, SymbolicOperator, Target, TensorMeta,
    ValueId, ValueInfo, ValueKind, Weight, WeightKind,
};
pub use span::{Layer, Span};
pub use symbols::{Given, Symbols};
pub use tables::Table;

/// The schema version that this crate follows. Archives of other minor versions are read as far as they use nothing
/// newer; other major versions are refused.
pub const SUPPORTED_SCHEMA: &str = "8.17";
