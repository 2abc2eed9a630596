use std::collections::HashMap;

use crate::container::check_stored;
use crate::dtype::DType;
use crate::error::ModelError;
use crate::program::{Dim, OutputKind, Storage, StorageId, ValueId, ValueKind, Weight};
use crate::resolve::signature::WeightSpec;
use crate::resolve::{Problem, Resolver, dims};
use crate::schema::{self, PayloadConfig, PayloadMeta};
use crate::span::ALIGNMENT_BYTES;

/// The layout code of strided tensors.
const STRIDED: u64 = 7;

/// A weight whose place in its entry is known.
struct Located {
    weight: Weight,
    /// The entry's index in the archive's directory.
    entry: usize,
    /// Where its elements begin and end in the entry.
    begin: u64,
    end: u64,
}

impl Resolver<'_> {
    /// Finds the weights' bytes and puts weights and storages in the order of their first use.
    pub(super) fn weights(&mut self, program: &str) -> Result<(Vec<Weight>, Vec<Storage>), ModelError> {
        let payloads = Payloads::read(self, program)?;
        let specs = std::mem::take(&mut self.weight_specs);
        let mut uses = self.uses(&specs)?;
        let mut located = Vec::with_capacity(specs.len());
        for spec in specs {
            let use_of = uses.remove(&spec.value);
            let name = spec.name.clone();
            let weight = self.locate(&payloads, spec, use_of.map(|(_, node)| node));
            let weight = weight.map_err(|problem| self.weight_error(&name, problem))?;
            located.push((use_of.map_or(usize::MAX, |(position, _)| position), weight));
        }
        // Stable: what nobody uses stays in the order of the signature, at the end.
        located.sort_by_key(|(position, _)| *position);
        // One storage for every entry: the bytes between the first and the last that its weights use.
        let mut storages: Vec<Storage> = Vec::new();
        let mut parts: Vec<(u64, u64)> = Vec::new();
        let mut of_entry: HashMap<usize, usize> = HashMap::new();
        for (_, Located { weight, entry, begin, end }) in &located {
            match of_entry.get(entry).and_then(|index| parts.get_mut(*index)) {
                Some(part) => *part = (part.0.min(*begin), part.1.max(*end)),
                None => {
                    of_entry.insert(*entry, storages.len());
                    parts.push((*begin, *end));
                    storages.push(Storage {
                        bytes: 0,
                        first_use: weight.first_use,
                        in_file: 0..0,
                        entry: *entry,
                    });
                }
            }
        }
        for (storage, (begin, end)) in storages.iter_mut().zip(&mut parts) {
            // A view keeps the alignment that it has in the whole: kernels may choose their path by it.
            *begin -= *begin % ALIGNMENT_BYTES;
            storage.bytes = *end - *begin;
            let start = self.container.directory.entries[storage.entry].range.start;
            storage.in_file = start + to_usize(*begin)..start + to_usize(*end);
        }
        let mut weights = Vec::with_capacity(located.len());
        for (_, Located { mut weight, entry, begin, .. }) in located {
            let index = of_entry[&entry];
            weight.storage = StorageId(u32::try_from(index).unwrap_or(u32::MAX));
            weight.offset_bytes = begin - parts[index].0;
            weights.push(weight);
        }
        Ok((weights, storages))
    }

    /// For every value that nodes or outputs use: its place in the order of first uses, and the node. What only the
    /// program's end uses counts as used by the last node.
    fn uses(&self, specs: &[WeightSpec]) -> Result<HashMap<ValueId, (usize, usize)>, ModelError> {
        let mut uses = HashMap::new();
        for (index, node) in self.nodes.iter().enumerate() {
            for value in node.inputs.iter().flat_map(|input| input.value.values()) {
                let position = uses.len();
                uses.entry(value).or_insert((position, index));
            }
        }
        let returned = self.outputs.iter().filter_map(|output| match output.kind {
            OutputKind::Tensor { value, .. } => Some(value),
            _ => None,
        });
        let written = self.mutations.iter().flat_map(|mutation| [mutation.from, mutation.into]);
        for value in returned.chain(written) {
            let position = uses.len();
            if let Some(last) = self.nodes.len().checked_sub(1) {
                uses.entry(value).or_insert((position, last));
            } else if let Some(weight) = specs.iter().find(|weight| weight.value == value) {
                let problem = "is returned by a program that computes nothing, which is not supported";
                return Err(self.weight_error(&weight.name, problem));
            }
        }
        Ok(uses)
    }

    fn locate(
        &self,
        payloads: &Payloads,
        spec: WeightSpec,
        first_use: Option<usize>,
    ) -> Result<Located, Problem> {
        let WeightSpec { name, value, kind } = spec;
        let (folder, payload) = payloads.get(&name).ok_or("is in none of the archive's lists of tensors")?;
        if payload.use_pickle {
            return Err(
                "is pickled (a tensor subclass), which is not supported; only plain tensors are".into()
            );
        }
        let meta = payload.tensor_meta.as_ref().ok_or("has neither type nor shape")?;
        let dtype = dims::dtype(meta.dtype)?;
        if meta.layout != STRIDED {
            return Err(format!(
                "has the layout {}; only strided tensors ({STRIDED}) are supported",
                meta.layout
            )
            .into());
        }
        self.check_dimensions(meta.sizes.len())?;
        self.check_dimensions(meta.strides.len())?;
        let sizes = meta.sizes.iter().map(|size| fixed("size", size)).collect::<Result<Vec<_>, _>>()?;
        let strides =
            meta.strides.iter().map(|stride| fixed("stride", stride)).collect::<Result<Vec<_>, _>>()?;
        let offset = fixed("storage offset", &meta.storage_offset)?;
        self.compare(value, dtype, &sizes)?;

        let (begin, end) = extent(dtype, &sizes, &strides, offset)?;
        let (found, limit) = (end - begin, self.limits.tensor_bytes);
        if found > limit {
            return Err(Problem::Limit {
                what: format!("the number of bytes of weight `{name}`"),
                found,
                limit,
            });
        }
        let path = format!("{folder}{}", payload.path_name);
        let missing = || format!("is to be in entry `{path}`, which is missing");
        let index = self.container.position(&path).ok_or_else(missing)?;
        let entry = &self.container.directory.entries[index];
        check_stored(entry).map_err(|reason| format!("is in entry `{path}`, which {reason}"))?;
        let entry_bytes = entry.range.len() as u64;
        if end > entry_bytes || !entry_bytes.is_multiple_of(dtype.size_bytes()) {
            return Err(format!(
                "of type {dtype}, sizes {sizes:?}, strides {strides:?} and offset {offset} ends at byte {end} of entry \
                 `{path}`, which has {entry_bytes} bytes"
            )
            .into());
        }
        let requires_grad = meta.requires_grad;
        let storage = StorageId(0);
        let weight = Weight {
            name,
            value,
            kind,
            dtype,
            sizes,
            strides,
            storage,
            offset_bytes: 0,
            requires_grad,
            first_use,
        };
        Ok(Located { weight, entry: index, begin, end })
    }

    /// Whether the stored tensor is the one that the graph was made for.
    fn compare(&self, value: ValueId, dtype: DType, sizes: &[u64]) -> Result<(), Problem> {
        let ValueKind::Tensor(Some(meta)) = &self.values[value.index()].kind else { return Ok(()) };
        let same = meta.dtype == dtype
            && meta.shape.len() == sizes.len()
            && meta.shape.iter().zip(sizes).all(|(dim, size)| *dim == Dim::Fixed(*size));
        if same {
            return Ok(());
        }
        let shape: Vec<String> = meta.shape.iter().map(Dim::to_string).collect();
        let graph = format!("{} [{}]", meta.dtype, shape.join(", "));
        Err(format!("is stored as {dtype} {sizes:?}; in the graph it is {graph}").into())
    }

    fn weight_error(&self, name: &str, problem: impl Into<Problem>) -> ModelError {
        let file = self.container.file.clone();
        match problem.into() {
            Problem::Reason(reason) => ModelError::Weight { file, weight: name.to_owned(), reason },
            Problem::Limit { what, found, limit } => ModelError::Limit { file, what, found, limit },
        }
    }
}

/// The archive's two lists of tensors: the state dict, and constants with the buffers that are not part of it.
struct Payloads {
    weights: HashMap<String, PayloadMeta>,
    constants: HashMap<String, PayloadMeta>,
}

const WEIGHTS: &str = "data/weights/";
const CONSTANTS: &str = "data/constants/";

impl Payloads {
    fn read(resolver: &Resolver<'_>, program: &str) -> Result<Payloads, ModelError> {
        let container = resolver.container;
        let read = |folder: &str, kind: &str| {
            if container.find(&format!("{folder}{program}.pt")).is_some() {
                let reason =
                    "holds pickled tensors of an older PyTorch; export the model again with PyTorch 2.11";
                return Err(container.entry_error(&format!("{folder}{program}.pt"), reason));
            }
            let config: PayloadConfig = container.json(&format!("{folder}{program}_{kind}_config.json"))?;
            Ok(config.config)
        };
        Ok(Payloads { weights: read(WEIGHTS, "weights")?, constants: read(CONSTANTS, "constants")? })
    }

    /// The folder and description of a tensor.
    fn get(&self, name: &str) -> Option<(&'static str, &PayloadMeta)> {
        let weight = self.weights.get(name).map(|payload| (WEIGHTS, payload));
        weight.or_else(|| self.constants.get(name).map(|payload| (CONSTANTS, payload)))
    }
}

fn fixed(what: &str, number: &schema::SymInt) -> Result<u64, Problem> {
    match number {
        schema::SymInt::AsInt(value) => u64::try_from(*value).map_err(|_| {
            format!("has the {what} {value}; supported are numbers that are not negative").into()
        }),
        schema::SymInt::AsExpr(expr) => {
            Err(format!("has the {what} `{:.100}`; supported are fixed numbers", expr.expr_str).into())
        }
    }
}

/// The bytes of its storage between which a tensor's elements lie.
fn extent(dtype: DType, sizes: &[u64], strides: &[u64], offset: u64) -> Result<(u64, u64), Problem> {
    if sizes.len() != strides.len() {
        return Err(format!("has {} sizes and {} strides", sizes.len(), strides.len()).into());
    }
    let elements = || {
        if sizes.contains(&0) {
            return Some(0);
        }
        // Also the number of elements must fit, although strides of zero can make the extent small.
        sizes.iter().try_fold(1_u64, |product, size| product.checked_mul(*size))?;
        let mut last = 0_u64;
        for (size, stride) in sizes.iter().zip(strides) {
            last = last.checked_add((size - 1).checked_mul(*stride)?)?;
        }
        last.checked_add(1)
    };
    let bytes = || {
        let begin = offset.checked_mul(dtype.size_bytes())?;
        let end = elements()?.checked_mul(dtype.size_bytes())?.checked_add(begin)?;
        i64::try_from(end).ok().map(|_| (begin, end))
    };
    bytes().ok_or_else(|| {
        format!("of sizes {sizes:?}, strides {strides:?} and offset {offset} has more bytes than 63 bits can count").into()
    })
}

/// For offsets into an entry, which have been checked against its length.
fn to_usize(offset: u64) -> usize {
    usize::try_from(offset).unwrap_or(usize::MAX)
}
