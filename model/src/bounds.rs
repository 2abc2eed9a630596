use crate::program::{Argument, InputKind, Program, Target};

/// An input whose values are row numbers of a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IndexBound {
    /// The input's index in [`Program::inputs`].
    pub input: usize,
    /// Each of its values must be less than this, and not negative.
    pub rows: u64,
}

impl Program {
    /// Inputs that an embedding reads rows by, as they come. Where rows are missing, a CPU raises, but a GPU ends the
    /// process: so whoever takes requests had better look first.
    pub fn index_bounds(&self) -> Vec<IndexBound> {
        let mut bounds: Vec<IndexBound> = Vec::new();
        for node in &self.nodes {
            let is_embedding = matches!(
                &node.target,
                Target::Operator { namespace, name, .. } if namespace == "aten" && name == "embedding"
            );
            let argument = |name: &str| match &node.inputs.iter().find(|input| input.name == name)?.value {
                Argument::Tensor(id) => Some(*id),
                _ => None,
            };
            let (true, Some(table), Some(indices)) = (is_embedding, argument("weight"), argument("indices"))
            else {
                continue;
            };
            let weight = self.weights.iter().find(|weight| weight.value == table);
            let input = self.inputs.iter().position(
                |input| matches!(&input.kind, InputKind::Tensor { value, .. } if *value == indices),
            );
            let (Some(&rows), Some(input)) = (weight.and_then(|weight| weight.sizes.first()), input) else {
                continue;
            };
            match bounds.iter_mut().find(|bound| bound.input == input) {
                Some(bound) => bound.rows = bound.rows.min(rows),
                None => bounds.push(IndexBound { input, rows }),
            }
        }
        bounds
    }
}
