//! From what stands in the JSON to a program: names become value numbers, sub-graphs that change nothing are inlined,
//! and whatever is inconsistent or not supported is refused by name.

mod arguments;
mod dims;
mod inline;
mod nodes;
mod signature;
mod weights;

use std::collections::{BTreeMap, HashMap, HashSet};

use crate::container::Container;
use crate::error::ModelError;
use crate::limits::Limits;
use crate::program::{
    Dim, Input, Mutation, Node, Output, Program, SymbolRange, ValueId, ValueInfo, ValueKind,
};
use crate::schema;

/// The schema's major version that is read here; minor versions only add to it.
const SCHEMA_MAJOR: i64 = 8;

/// Reads and resolves the program of an archive.
pub(crate) fn program(container: &Container, limits: &Limits) -> Result<Program, ModelError> {
    let name = container.program_name()?;
    let entry = format!("models/{name}.json");
    let schema::Versioned { schema_version: version } = container.json(&entry)?;
    if version.major != SCHEMA_MAJOR {
        return Err(ModelError::Version {
            file: container.file.clone(),
            what: "the schema's version",
            found: format!("{}.{}", version.major, version.minor),
            supported: crate::SUPPORTED_SCHEMA.to_owned(),
        });
    }
    let exported: schema::ExportedProgram = container.json(&entry)?;
    let mut resolver = Resolver::new(container, limits, &exported.range_constraints)?;
    let graph = exported.graph_module.graph;
    let mut scope = Scope::new(graph.tensor_values, graph.sym_int_values);
    resolver.inputs(&mut scope, graph.inputs, exported.graph_module.signature.input_specs)?;
    for node in graph.nodes {
        resolver.node(&mut scope, node)?;
    }
    resolver.outputs(&scope, graph.outputs, exported.graph_module.signature.output_specs)?;
    let (weights, storages) = resolver.weights(name)?;
    Ok(Program {
        torch_version: exported.torch_version,
        inputs: resolver.inputs,
        outputs: resolver.outputs,
        mutations: resolver.mutations,
        weights,
        storages,
        nodes: resolver.nodes,
        values: resolver.values,
        symbols: resolver.symbols,
    })
}

/// Why something cannot be resolved; whoever knows the place makes a [`ModelError`] of it.
enum Problem {
    /// Found, and what is supported.
    Reason(String),
    /// Over a limit.
    Limit { what: String, found: u64, limit: u64 },
}

impl From<String> for Problem {
    fn from(reason: String) -> Self {
        Problem::Reason(reason)
    }
}

impl From<&str> for Problem {
    fn from(reason: &str) -> Self {
        Problem::Reason(reason.to_owned())
    }
}

/// The names that one graph sees: a sub-graph sees its own only.
struct Scope {
    names: HashMap<String, ValueId>,
    tensors: HashMap<String, schema::TensorMeta>,
    ints: HashMap<String, schema::SymInt>,
    /// What is put before the names of a sub-graph's nodes and values.
    prefix: String,
    /// Whether gradients are switched on or off around this graph.
    grad: Option<bool>,
    depth: u64,
}

impl Scope {
    fn new(tensors: HashMap<String, schema::TensorMeta>, ints: HashMap<String, schema::SymInt>) -> Scope {
        Scope { names: HashMap::new(), tensors, ints, prefix: String::new(), grad: None, depth: 0 }
    }

    /// The value of a name.
    fn value(&self, name: &str) -> Result<ValueId, Problem> {
        let undefined = || format!("uses `{name}`, which no input and no earlier node defines");
        self.names.get(name).copied().ok_or_else(|| undefined().into())
    }
}

/// The kinds of values, without what else is known of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Tensor,
    Int,
    Float,
    Bool,
}

impl Kind {
    fn of(kind: &ValueKind) -> Kind {
        match kind {
            ValueKind::Tensor(_) => Kind::Tensor,
            ValueKind::Int(_) => Kind::Int,
            ValueKind::Float => Kind::Float,
            ValueKind::Bool => Kind::Bool,
        }
    }

    fn describe(self) -> &'static str {
        match self {
            Kind::Tensor => "a tensor",
            Kind::Int => "an integer",
            Kind::Float => "a float",
            Kind::Bool => "a truth value",
        }
    }
}

/// What has been resolved so far.
struct Resolver<'a> {
    container: &'a Container,
    limits: &'a Limits,
    symbols: BTreeMap<String, SymbolRange>,
    /// Expressions that have been parsed: most sizes of a program are the same few.
    parsed: HashMap<String, Dim>,
    values: Vec<ValueInfo>,
    inputs: Vec<Input>,
    outputs: Vec<Output>,
    mutations: Vec<Mutation>,
    /// Inputs by name, with their values as far as they are tensors.
    input_values: HashMap<String, Option<ValueId>>,
    weight_specs: Vec<signature::WeightSpec>,
    weight_values: HashMap<String, ValueId>,
    nodes: Vec<Node>,
    node_names: HashSet<String>,
}

impl<'a> Resolver<'a> {
    fn new(
        container: &'a Container,
        limits: &'a Limits,
        ranges: &HashMap<String, schema::RangeConstraint>,
    ) -> Result<Self, ModelError> {
        Ok(Resolver {
            container,
            limits,
            symbols: dims::symbols(container, ranges)?,
            parsed: HashMap::new(),
            values: Vec::new(),
            inputs: Vec::new(),
            outputs: Vec::new(),
            mutations: Vec::new(),
            input_values: HashMap::new(),
            weight_specs: Vec::new(),
            weight_values: HashMap::new(),
            nodes: Vec::new(),
            node_names: HashSet::new(),
        })
    }

    /// Gives `name` a value of its own.
    fn define(&mut self, scope: &mut Scope, name: &str, kind: ValueKind) -> Result<ValueId, Problem> {
        self.check_name(name)?;
        let found = self.values.len() as u64 + 1;
        let limit = self.limits.values.min(u64::from(u32::MAX));
        if found > limit {
            return Err(Problem::Limit { what: "the number of values".to_owned(), found, limit });
        }
        let id = ValueId(u32::try_from(self.values.len()).map_err(|_| "has too many values")?);
        self.bind(scope, name, id)?;
        self.values.push(ValueInfo { name: format!("{}{name}", scope.prefix), kind });
        Ok(id)
    }

    /// Lets `name` stand for a value that exists.
    fn bind(&self, scope: &mut Scope, name: &str, id: ValueId) -> Result<(), Problem> {
        self.check_name(name)?;
        match scope.names.insert(name.to_owned(), id) {
            None => Ok(()),
            Some(_) => Err(format!("defines `{name}` a second time").into()),
        }
    }

    /// The value of a name, which must be of this kind.
    fn value_of(&self, scope: &Scope, name: &str, kind: Kind) -> Result<ValueId, Problem> {
        let id = scope.value(name)?;
        let found = Kind::of(&self.values[id.index()].kind);
        if found == kind {
            return Ok(id);
        }
        Err(format!("takes `{name}` for {}; it is {}", kind.describe(), found.describe()).into())
    }

    fn check_name(&self, name: &str) -> Result<(), Problem> {
        let (found, limit) = (name.len() as u64, self.limits.name_bytes);
        if found > limit {
            let start: String = name.chars().take(40).collect();
            return Err(Problem::Limit {
                what: format!("the length of the name `{start}...`"),
                found,
                limit,
            });
        }
        Ok(())
    }

    fn signature_error(&self, what: &'static str, name: &str, problem: impl Into<Problem>) -> ModelError {
        let file = self.container.file.clone();
        match problem.into() {
            Problem::Reason(reason) => ModelError::Signature { file, what, name: name.to_owned(), reason },
            Problem::Limit { what, found, limit } => ModelError::Limit { file, what, found, limit },
        }
    }
}
