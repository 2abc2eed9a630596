/// The largest archive that is accepted. Every size taken from a file is held against one of these, or against the
/// length of the file, before anything of that size is allocated or computed with.
///
/// ```
/// let limits = pswitch_model::Limits { nodes: 10_000, ..Default::default() };
/// assert!(limits.json_bytes > 0);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Entries of the zip archive: 100,000.
    pub entries: u64,
    /// Bytes of one JSON entry: 512 MiB. (BERT-base has 2 MB.)
    pub json_bytes: u64,
    /// Operators, after sub-graphs have been inlined: 1,000,000.
    pub nodes: u64,
    /// Values: 4,000,000.
    pub values: u64,
    /// Parameters, buffers and constants: 1,000,000.
    pub weights: u64,
    /// Dimensions of one tensor: 64, PyTorch's own limit.
    pub dimensions: u64,
    /// Bytes of one stored tensor: 1 TiB.
    pub tensor_bytes: u64,
    /// Bytes of one name (of a value, node, weight, module or operator): 4,096.
    pub name_bytes: u64,
    /// Bytes of one symbolic expression: 65,536. Expressions nested deeper than 64 levels count as unknown.
    pub expression_bytes: u64,
    /// Sub-graphs within sub-graphs: 16. (JSON itself may be nested 128 levels deep.)
    pub graph_depth: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            entries: 100_000,
            json_bytes: 512 << 20,
            nodes: 1_000_000,
            values: 4_000_000,
            weights: 1_000_000,
            dimensions: 64,
            tensor_bytes: 1 << 40,
            name_bytes: 4096,
            expression_bytes: 65_536,
            graph_depth: 16,
        }
    }
}
