//! Which values may share memory, and when that memory is written last: by the operators' schemas.

use pswitch_model::{Argument, NodeOutput, Program, Target, ValueId};

use crate::libtorch::CallBuilder;

/// The last writes of a program, by the memory that they go to.
pub(crate) struct Writes {
    /// For every value another one that it may share memory with, or itself.
    parent: Vec<usize>,
    /// For every root of `parent` the last node that writes to any value of its tree.
    last_write: Vec<Option<usize>>,
}

impl Writes {
    /// Operators that libtorch does not have are taken for harmless: the program will be refused anyway.
    pub(crate) fn of(program: &Program) -> Self {
        let count = program.values.len();
        let mut writes = Self { parent: (0..count).collect(), last_write: vec![None; count] };
        for (index, node) in program.nodes.iter().enumerate() {
            let Target::Operator { namespace, name, overload } = &node.target else { continue };
            let overload = if overload == "default" { "" } else { overload };
            let Ok(builder) = CallBuilder::new(&format!("{namespace}::{name}"), overload, count) else {
                continue;
            };
            for argument in &node.inputs {
                let Some(place) = builder.argument(&argument.name) else { continue };
                let values: Vec<ValueId> = match &argument.value {
                    Argument::Tensor(id) => vec![*id],
                    Argument::Tensors(ids) => ids.clone(),
                    _ => continue,
                };
                for value in values {
                    if builder.aliases(place) {
                        for output in node.outputs.iter().flat_map(NodeOutput::values) {
                            writes.join(value, output);
                        }
                    }
                    if builder.writes(place) {
                        let root = writes.root(value.index());
                        writes.last_write[root] = Some(index);
                    }
                }
            }
        }
        writes
    }

    /// Whether a node behind `node` may write to memory that `value` shares.
    pub(crate) fn come_after(&self, node: usize, value: ValueId) -> bool {
        self.last_write[self.root(value.index())].is_some_and(|last| last > node)
    }

    fn root(&self, mut value: usize) -> usize {
        while self.parent[value] != value {
            value = self.parent[value];
        }
        value
    }

    fn join(&mut self, one: ValueId, other: ValueId) {
        let (one, other) = (self.root(one.index()), self.root(other.index()));
        if one != other {
            self.parent[other] = one;
            self.last_write[one] = self.last_write[one].max(self.last_write[other]);
        }
    }
}
