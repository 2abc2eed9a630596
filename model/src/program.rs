use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;

use crate::dtype::{DType, Layout, MemoryFormat};
use crate::expr::Expr;

/// An exported program with all names resolved: what an executor needs to run it.
///
/// Every [`ValueId`] in it is an index into [`Program::values`], has exactly one definition (an input, a weight or
/// a node's output) and is defined before its first use in the order of [`Program::nodes`].
#[derive(Debug, Clone, PartialEq)]
pub struct Program {
    /// The version of PyTorch that wrote the archive: `2.11.0+cpu`.
    pub torch_version: String,
    /// What the caller passes, in order (parameters and buffers are [`Program::weights`], not inputs).
    pub inputs: Vec<Input>,
    /// What the program returns, in order.
    pub outputs: Vec<Output>,
    /// Values that have to be copied into inputs or weights after the last node, in order.
    pub mutations: Vec<Mutation>,
    /// Parameters, buffers and constants, in the order of their first use; those that no node uses come last.
    pub weights: Vec<Weight>,
    /// The bytes that weights are views of, in the order of their first use: the order of the span.
    pub storages: Vec<Storage>,
    /// The operators in the order in which they run.
    pub nodes: Vec<Node>,
    /// All values by [`ValueId`].
    pub values: Vec<ValueInfo>,
    /// The ranges of the symbols that stand in shapes and symbolic integers.
    pub symbols: BTreeMap<String, SymbolRange>,
}

/// Index of a value in [`Program::values`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ValueId(pub u32);

impl ValueId {
    /// This value's index in [`Program::values`].
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

impl fmt::Display for ValueId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "%{}", self.0)
    }
}

/// Index of a storage in [`Program::storages`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StorageId(pub u32);

impl StorageId {
    /// This storage's index in [`Program::storages`].
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// The name of a value and what the archive says about it.
#[derive(Debug, Clone, PartialEq)]
pub struct ValueInfo {
    /// The name in the exported graph: `conv2d_3`.
    pub name: String,
    /// What kind of value it is.
    pub kind: ValueKind,
}

/// The kinds of values that nodes exchange.
#[derive(Debug, Clone, PartialEq)]
pub enum ValueKind {
    /// A tensor, with its type and shape if the archive gives them.
    Tensor(Option<TensorMeta>),
    /// An integer known only at run time, with its meaning in terms of symbols if the archive gives one.
    Int(Dim),
    /// A float known only at run time.
    Float,
    /// A truth value known only at run time.
    Bool,
}

/// Type and shape of a tensor at the time of export.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorMeta {
    /// Element type.
    pub dtype: DType,
    /// Sizes.
    pub shape: Vec<Dim>,
    /// Whether gradients flow to it.
    pub requires_grad: bool,
}

/// One size of a tensor, or one symbolic integer.
#[derive(Debug, Clone, PartialEq)]
pub enum Dim {
    /// Always the same.
    Fixed(u64),
    /// Free within a range.
    Symbol {
        /// The symbol's name: `s17`. The same name means the same number everywhere in the program.
        name: String,
        /// Its value in the example that was exported.
        hint: Option<u64>,
        /// Smallest value allowed.
        min: u64,
        /// Largest value allowed; none when there is no limit.
        max: Option<u64>,
    },
    /// Follows from symbols.
    Derived {
        /// How.
        expr: Expr,
        /// Its value in the example that was exported.
        hint: Option<u64>,
    },
    /// Known only at run time (the archive's expression is one that this crate cannot evaluate).
    Unknown {
        /// Its value in the example that was exported.
        hint: Option<u64>,
    },
}

impl Dim {
    /// Its value in the example that was exported, or one that is allowed where the archive does not tell.
    pub fn example(&self) -> u64 {
        match self {
            Self::Fixed(extent) => *extent,
            Self::Symbol { hint, min, .. } => hint.unwrap_or(*min),
            Self::Derived { hint, .. } | Self::Unknown { hint } => hint.unwrap_or(1),
        }
    }
}

/// Smallest and largest value of a symbol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SymbolRange {
    /// Smallest value allowed.
    pub min: u64,
    /// Largest value allowed; none when there is no limit.
    pub max: Option<u64>,
}

/// One input of the program.
#[derive(Debug, Clone, PartialEq)]
pub struct Input {
    /// The name in the exported graph, unique among the inputs.
    pub name: String,
    /// What is passed there.
    pub kind: InputKind,
}

/// What is passed as an input.
#[derive(Debug, Clone, PartialEq)]
pub enum InputKind {
    /// A tensor.
    Tensor {
        /// The value that it becomes.
        value: ValueId,
        /// Element type.
        dtype: DType,
        /// Sizes: fixed, or free within a range.
        shape: Vec<Dim>,
    },
    /// An integer.
    SymInt {
        /// The value that it becomes.
        value: ValueId,
        /// Its meaning and range.
        dim: Dim,
    },
    /// Fixed when the program was exported: callers do not pass it.
    Constant(Constant),
}

/// A constant that is no tensor.
#[derive(Debug, Clone, PartialEq)]
pub enum Constant {
    /// `None`
    None,
    /// `int`
    Int(i64),
    /// `float`
    Float(f64),
    /// `bool`
    Bool(bool),
    /// `str`
    String(String),
}

/// One output of the program.
#[derive(Debug, Clone, PartialEq)]
pub struct Output {
    /// The name in the exported graph, unique among the outputs (a value that is returned again gets a suffix).
    pub name: String,
    /// What is returned there.
    pub kind: OutputKind,
    /// Whether it is the loss of a training program.
    pub is_loss: bool,
}

/// What is returned as an output.
#[derive(Debug, Clone, PartialEq)]
pub enum OutputKind {
    /// A tensor.
    Tensor {
        /// The value returned: a node's output, an input or a weight.
        value: ValueId,
        /// Element type.
        dtype: DType,
        /// Sizes.
        shape: Vec<Dim>,
    },
    /// An integer.
    SymInt(ValueId),
    /// A float.
    SymFloat(ValueId),
    /// A truth value.
    SymBool(ValueId),
    /// Fixed when the program was exported.
    Constant(Constant),
}

/// A value to be copied into an input or a weight after the last node (`into.copy_(from)`). Functional programs have
/// these in place of operators that write in place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mutation {
    /// The new contents.
    pub from: ValueId,
    /// The input or weight that takes them.
    pub into: ValueId,
    /// What kind of thing `into` is.
    pub kind: MutationKind,
}

/// What a [`Mutation`] writes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum MutationKind {
    /// A buffer.
    Buffer,
    /// A parameter.
    Parameter,
    /// An input of the caller's.
    Input,
}

/// One parameter, buffer or constant: a view of a [`Storage`].
#[derive(Debug, Clone, PartialEq)]
pub struct Weight {
    /// The fully qualified name in the module: `layer1.0.conv1.weight`.
    pub name: String,
    /// The value that stands for it in the graph.
    pub value: ValueId,
    /// What kind of weight it is.
    pub kind: WeightKind,
    /// Element type.
    pub dtype: DType,
    /// Sizes.
    pub sizes: Vec<u64>,
    /// Strides, in elements.
    pub strides: Vec<u64>,
    /// Where its bytes are. Tied weights name the same storage.
    pub storage: StorageId,
    /// Where its first element lies in the storage. All its elements lie inside.
    pub offset_bytes: u64,
    /// Whether gradients flow to it.
    pub requires_grad: bool,
    /// The first node that uses it. A weight that is only returned or written at the end counts as used by the last.
    pub first_use: Option<usize>,
}

impl Weight {
    /// Bytes from its first element to behind its last, in whatever order they lie. None if it has no elements.
    pub fn extent_bytes(&self) -> u64 {
        if self.sizes.contains(&0) {
            return 0;
        }
        let last = self.sizes.iter().zip(&self.strides).map(|(size, stride)| (size - 1) * stride);
        (last.sum::<u64>() + 1) * self.dtype.size_bytes()
    }

    /// Whether the two are one tensor under two names: the same elements in the same order.
    pub fn is_same_tensor(&self, other: &Self) -> bool {
        let place = |weight: &Self| (weight.storage, weight.offset_bytes, weight.dtype);
        place(self) == place(other) && self.sizes == other.sizes && self.strides == other.strides
    }
}

/// The kinds of weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WeightKind {
    /// A parameter of the module.
    Parameter,
    /// A buffer of the module.
    Buffer {
        /// Whether the buffer is part of the module's state dict.
        persistent: bool,
    },
    /// A tensor that the program uses and that is no part of the module's state.
    Constant,
}

/// Bytes in the archive that one weight or several (tied or overlapping ones) are views of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Storage {
    /// How many bytes.
    pub bytes: u64,
    /// The first node that uses one of its weights.
    pub first_use: Option<usize>,
    /// Where the bytes lie in the archive file; inside it.
    pub(crate) in_file: Range<usize>,
    /// The index of the entry that they are part of.
    pub(crate) entry: usize,
}

/// One operator call.
#[derive(Debug, Clone, PartialEq)]
pub struct Node {
    /// The name in the exported graph, unique among the nodes.
    pub name: String,
    /// The fully qualified name of the module that it was called in: `layer1.0.conv1`; empty for the root.
    pub module: String,
    /// What is called.
    pub target: Target,
    /// The arguments, in the order of the operator's schema; those left at their defaults are missing.
    pub inputs: Vec<NamedArgument>,
    /// What it returns.
    pub outputs: Vec<NodeOutput>,
    /// The line of Python that it comes from (`model.py:12`), empty if unknown.
    pub place: String,
    /// Whether gradients are recorded here: set inside `torch.no_grad()` and `torch.enable_grad()`, otherwise as the
    /// caller has it.
    pub grad: Option<bool>,
}

/// What a node calls.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Target {
    /// An operator of libtorch's dispatcher: `torch.ops.aten.conv2d.default`.
    Operator {
        /// `aten`
        namespace: String,
        /// `conv2d`
        name: String,
        /// `default`: the overload without a name.
        overload: String,
    },
    /// Arithmetic on symbolic numbers, outside the dispatcher.
    Symbolic(SymbolicOperator),
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Target::Operator { namespace, name, overload } => write!(f, "{namespace}::{name}.{overload}"),
            Target::Symbolic(operator) => f.write_str(operator.python_name()),
        }
    }
}

/// Python's arithmetic on symbolic integers, floats and truth values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SymbolicOperator {
    /// `a + b`
    Add,
    /// `a - b`
    Sub,
    /// `a * b`
    Mul,
    /// `a / b`, always a float
    TrueDiv,
    /// `a // b`, rounded towards minus infinity
    FloorDiv,
    /// `a % b`, with the sign of `b`
    Mod,
    /// `a ** b`
    Pow,
    /// `-a`
    Neg,
    /// `+a`
    Pos,
    /// `a << b`
    LeftShift,
    /// `a >> b`
    RightShift,
    /// `a & b`
    And,
    /// `a | b`
    Or,
    /// `not a`
    Not,
    /// `a == b`
    Eq,
    /// `a != b`
    Ne,
    /// `a < b`
    Lt,
    /// `a <= b`
    Le,
    /// `a > b`
    Gt,
    /// `a >= b`
    Ge,
    /// `max(a, b)`
    Max,
    /// `min(a, b)`
    Min,
    /// `math.trunc(a)`: to an integer, towards zero
    Trunc,
    /// `torch.sym_int(a)`: to an integer, towards zero
    ToInt,
    /// `torch.sym_float(a)`
    ToFloat,
    /// `torch.sym_ite(condition, then, else)`
    IfThenElse,
    /// `math.sqrt(a)`
    Sqrt,
}

/// One argument of a node.
#[derive(Debug, Clone, PartialEq)]
pub struct NamedArgument {
    /// The parameter's name in the operator's schema.
    pub name: String,
    /// Whether it is passed by name.
    pub keyword: bool,
    /// What is passed.
    pub value: Argument,
}

/// What is passed to an operator.
#[derive(Debug, Clone, PartialEq)]
pub enum Argument {
    /// `None`
    None,
    /// A tensor.
    Tensor(ValueId),
    /// A list of tensors.
    Tensors(Vec<ValueId>),
    /// A list of tensors, some of which may be missing.
    OptionalTensors(Vec<Option<ValueId>>),
    /// A list of lists of tensors.
    NestedTensors(Vec<Vec<ValueId>>),
    /// An integer.
    Int(i64),
    /// A list of integers.
    Ints(Vec<i64>),
    /// A list of lists of integers.
    IntLists(Vec<Vec<i64>>),
    /// A float.
    Float(f64),
    /// A list of floats.
    Floats(Vec<f64>),
    /// A truth value.
    Bool(bool),
    /// A list of truth values.
    Bools(Vec<bool>),
    /// A string.
    String(String),
    /// A list of strings.
    Strings(Vec<String>),
    /// A complex number.
    Complex {
        /// Real part.
        re: f64,
        /// Imaginary part.
        im: f64,
    },
    /// An element type.
    ScalarType(DType),
    /// A memory format.
    MemoryFormat(MemoryFormat),
    /// A layout.
    Layout(Layout),
    /// The device that the program was exported on; executors put their own in its place.
    Device {
        /// `cpu`, `cuda`, `meta` ...
        kind: String,
        /// Which one.
        index: Option<u32>,
    },
    /// An integer that may be known only at run time.
    SymInt(Sym<i64>),
    /// A list of those.
    SymInts(Vec<Sym<i64>>),
    /// A float that may be known only at run time.
    SymFloat(Sym<f64>),
    /// A list of those.
    SymFloats(Vec<Sym<f64>>),
    /// A truth value that may be known only at run time.
    SymBool(Sym<bool>),
    /// A list of those.
    SymBools(Vec<Sym<bool>>),
}

/// A number that is either fixed or computed by another node.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Sym<T> {
    /// The result of another node, or an input.
    Value(ValueId),
    /// Fixed when the program was exported.
    Constant(T),
}

/// One return value of an operator.
#[derive(Debug, Clone, PartialEq)]
pub enum NodeOutput {
    /// Nothing: `None` stands where the operator returns an optional tensor, or nobody uses it.
    None,
    /// A tensor.
    Tensor(ValueId),
    /// One list of tensors (`split`, `unbind`).
    Tensors(Vec<ValueId>),
    /// One list of tensors, some of which may be missing.
    OptionalTensors(Vec<Option<ValueId>>),
    /// An integer.
    SymInt(ValueId),
    /// A list of integers, some of them fixed at export.
    SymInts(Vec<Sym<i64>>),
    /// A float.
    SymFloat(ValueId),
    /// A truth value.
    SymBool(ValueId),
}
