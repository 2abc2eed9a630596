use crate::program::{OutputKind, Program, StorageId, ValueId};

/// Every storage begins at a multiple of this.
pub(crate) const ALIGNMENT_BYTES: u64 = 512;

/// Where a program's storages lie when they are packed into one contiguous range of bytes: in the order of their first
/// use, each at a multiple of 512 bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Span {
    /// The first byte of each storage, by [`StorageId`].
    pub offsets: Vec<u64>,
    /// How many bytes the program uses: all storages but those that no node uses, which come last. A multiple of 512.
    pub used_bytes: u64,
    /// How many bytes all storages take. A multiple of 512.
    pub bytes: u64,
}

impl Span {
    /// The first byte of a storage.
    ///
    /// # Panics
    ///
    /// If `storage` is not one of the program that this span was made for.
    pub fn offset(&self, storage: StorageId) -> u64 {
        self.offsets[storage.index()]
    }
}

/// One step of a program's execution with the weights that it is the first to use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layer {
    /// The node's name, unique in the program.
    pub name: String,
    /// The node's index in [`Program::nodes`].
    pub node: usize,
    /// Bytes of the span that this node is the first to use, up to the next multiple of 512.
    pub bytes: u64,
}

impl Program {
    /// How the program's storages are laid out in a span.
    pub fn span(&self) -> Span {
        let mut span = Span { offsets: Vec::with_capacity(self.storages.len()), used_bytes: 0, bytes: 0 };
        for storage in &self.storages {
            span.offsets.push(span.bytes);
            span.bytes = span.bytes.saturating_add(aligned(storage.bytes));
            if storage.first_use.is_some() {
                span.used_bytes = span.bytes;
            }
        }
        span
    }

    /// One layer for every node, in order. Their bytes add up to [`Span::used_bytes`], and every prefix of them is a
    /// prefix of the span.
    pub fn layers(&self) -> Vec<Layer> {
        let layer = |(node, name): (usize, &str)| Layer { name: name.to_owned(), node, bytes: 0 };
        let mut layers: Vec<Layer> =
            self.nodes.iter().map(|node| node.name.as_str()).enumerate().map(layer).collect();
        for storage in &self.storages {
            if let Some(layer) = storage.first_use.and_then(|node| layers.get_mut(node)) {
                layer.bytes = layer.bytes.saturating_add(aligned(storage.bytes));
            }
        }
        layers
    }

    /// For every node, the values that nothing needs after it: an executor can let go of them then. Values that are
    /// never used die where they are defined.
    ///
    /// Not among them are inputs, weights, outputs and what is copied into inputs or weights at the end: they live as
    /// long as the execution. A value may be a view of another; letting go of it means giving up one's reference, not
    /// freeing memory that the other still has.
    pub fn last_uses(&self) -> Vec<Vec<ValueId>> {
        let mut last: Vec<Option<usize>> = vec![None; self.values.len()];
        for (index, node) in self.nodes.iter().enumerate() {
            let defined = node.outputs.iter().flat_map(|output| output.values());
            // Inputs and weights have no node that defines them.
            for value in defined {
                last[value.index()] = Some(index);
            }
            for value in node.inputs.iter().flat_map(|input| input.value.values()) {
                last[value.index()] = last[value.index()].map(|_| index);
            }
        }
        for output in &self.outputs {
            if let Some(value) = output.kind.value() {
                last[value.index()] = None;
            }
        }
        for mutation in &self.mutations {
            last[mutation.from.index()] = None;
        }
        let mut dying = vec![Vec::new(); self.nodes.len()];
        for (value, node) in (0..).map(ValueId).zip(last) {
            if let Some(node) = node {
                dying[node].push(value);
            }
        }
        dying
    }
}

impl OutputKind {
    /// The value that is returned; none for constants.
    pub fn value(&self) -> Option<ValueId> {
        match self {
            OutputKind::Tensor { value, .. }
            | OutputKind::SymInt(value)
            | OutputKind::SymFloat(value)
            | OutputKind::SymBool(value) => Some(*value),
            OutputKind::Constant(_) => None,
        }
    }
}

pub(crate) fn aligned(bytes: u64) -> u64 {
    bytes.checked_next_multiple_of(ALIGNMENT_BYTES).unwrap_or(u64::MAX)
}
