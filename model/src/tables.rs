use crate::program::{Argument, Dim, Program, StorageId, Target, ValueId, ValueKind};
use crate::span::aligned;

/// A weight of which an execution reads some rows only: the table of an embedding.
///
/// It need not be where the rest is computed: an operator that reads rows can read them from far away, and few rows of a
/// long table are read faster so than the table is moved (DeepPlan, EuroSys 2023, calls it direct host access).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table {
    /// Its bytes: this weight's alone.
    pub storage: StorageId,
    /// Where they begin in the span.
    pub offset: u64,
    /// How many of the span they take, a multiple of 512.
    pub bytes: u64,
    /// The first node that reads from it.
    pub node: usize,
    /// Bytes that all nodes together read in an execution of the shapes of the export, if no row is read twice.
    pub read_bytes: u64,
}

impl Program {
    /// The tables among the weights, in the order of the span: dense matrices that nothing uses but `aten.embedding`.
    pub fn tables(&self) -> Vec<Table> {
        let span = self.span();
        let table = |(index, storage): (u32, &crate::program::Storage)| {
            let id = StorageId(index);
            let mut weights = self.weights.iter().filter(|weight| weight.storage == id);
            let (weight, None) = (weights.next()?, weights.next()) else { return None };
            let &[_, columns] = weight.sizes.as_slice() else { return None };
            let dense = weight.strides == [columns, 1] && weight.offset_bytes == 0;
            if !dense || self.leaves(weight.value) {
                return None;
            }
            let rows = self.rows_read(weight.value)?;
            let read_bytes = rows.checked_mul(columns)?.checked_mul(weight.dtype.size_bytes())?;
            let (offset, bytes, node) = (span.offset(id), aligned(storage.bytes), storage.first_use?);
            Some(Table { storage: id, offset, bytes, node, read_bytes })
        };
        (0..).zip(&self.storages).filter_map(table).collect()
    }

    /// Whether a value is an output or written back at the end.
    fn leaves(&self, value: ValueId) -> bool {
        self.outputs.iter().any(|output| output.kind.value() == Some(value))
            || self.mutations.iter().any(|mutation| mutation.from == value || mutation.into == value)
    }

    /// Rows that embeddings read of a value; none if anything else uses it.
    fn rows_read(&self, table: ValueId) -> Option<u64> {
        let mut rows = 0_u64;
        for node in &self.nodes {
            let uses = node.inputs.iter().filter(|input| input.value.values().contains(&table));
            let uses: Vec<&str> = uses.map(|input| input.name.as_str()).collect();
            if uses.is_empty() {
                continue;
            }
            let is_embedding = matches!(
                &node.target,
                Target::Operator { namespace, name, overload }
                    if namespace == "aten" && name == "embedding" && overload == "default"
            );
            if !is_embedding || uses != ["weight"] {
                return None;
            }
            let indices = node.inputs.iter().find(|input| input.name == "indices")?;
            let Argument::Tensor(indices) = &indices.value else { return None };
            let ValueKind::Tensor(Some(meta)) = &self.values[indices.index()].kind else { return None };
            let read = meta.shape.iter().map(Dim::example).try_fold(1_u64, u64::checked_mul)?;
            rows = rows.checked_add(read)?;
        }
        (rows > 0).then_some(rows)
    }
}
