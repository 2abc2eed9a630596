//! A model as the server knows it: what it takes and gives, and where a request's tensors lie in a slot.

use std::path::Path;
use std::sync::{Arc, OnceLock};

use pswitch_mem_pool::{ModelId, Range, TENSOR_ALIGNMENT_BYTES, UnsealedSpan};
use pswitch_model::{
    Archive, DType, Dim, Given, IndexBound, Input, InputKind, OutputKind, Program, StorageId, Symbols,
};
use pswitch_transfer::Profile;

use crate::driver::{JobInput, ModelSpec};
use crate::repository::ModelSettings;
use crate::scheduler::ModelLimits;
use crate::service::{
    Datatype, DimensionSignature, ModelSignature, PlacedTensor, ServiceError, TensorSignature, TensorSpec,
};
use crate::slots::Slot;

/// Outputs in their place begin at multiples of this; the worker keeps to it too.
const OUTPUT_ALIGNMENT_BYTES: u64 = 64;

/// Place for an output whose size only the execution tells; if it needs more, it runs again with that much.
const UNKNOWN_OUTPUT_BYTES: u64 = 64 * 1024;

/// A model that was opened and can be served.
#[derive(Debug)]
pub(crate) struct ServedModel {
    pub(crate) spec: Arc<ModelSpec>,
    pub(crate) signature: Arc<ModelSignature>,
    pub(crate) settings: ModelSettings,
    /// Drivers that have placed it, by index.
    pub(crate) devices: Vec<usize>,
    /// What its plans were made from, with the index of the device; none where its layers could not be timed.
    pub(crate) profiles: Vec<(usize, Profile)>,
    /// Inputs whose values must be rows of a table.
    index_bounds: Vec<IndexBound>,
    program: Program,
}

/// Where the tensors of one request lie in its slot.
#[derive(Debug)]
pub(crate) struct SlotLayout {
    /// Inputs in the order in which the client sent them.
    pub(crate) inputs: Vec<PlacedTensor>,
    pub(crate) outputs: Range,
    pub(crate) bytes: u64,
}

impl ServedModel {
    /// What an archive says, before any device has seen it.
    pub(crate) fn new(
        id: ModelId,
        name: &str,
        path: &Path,
        archive: &Archive,
        settings: ModelSettings,
    ) -> Result<Self, String> {
        let program = archive.program().clone();
        let signature = describe(&program)?;
        let spec = ModelSpec {
            id,
            name: name.to_owned(),
            path: path.display().to_string(),
            digest: archive.digest(),
            span_bytes: program.span().used_bytes,
            layers: program.layers(),
            tables: program.tables(),
            example_bytes: example_bytes(&program),
            limits: ModelLimits {
                queue_limit: settings.max_queue,
                execution_timeout: settings.execution_timeout,
            },
            lost: OnceLock::new(),
        };
        Ok(Self {
            spec: Arc::new(spec),
            signature: Arc::new(signature),
            settings,
            devices: Vec::new(),
            profiles: Vec::new(),
            index_bounds: program.index_bounds(),
            program,
        })
    }

    /// Checks a request's inputs and lays them out in a slot, with place for the outputs behind them, after `least_bytes` at the
    /// earliest.
    pub(crate) fn lay_out(
        &self,
        inputs: &[TensorSpec],
        least_bytes: u64,
    ) -> Result<SlotLayout, ServiceError> {
        let order = self.signature.check_inputs(inputs)?;
        let symbols = if self.takes_integers() {
            // Their values come with the tensors' bytes: `job_inputs` checks all together then.
            None
        } else {
            Some(self.bind(order.iter().map(|&place| Given::Shape(&inputs[place].shape)))?)
        };
        let too_large = || ServiceError::TooLarge {
            what: "the request's tensors".to_owned(),
            asked_bytes: u64::MAX,
            limit_bytes: i64::MAX.cast_unsigned(),
        };
        let mut placed: Vec<_> = inputs
            .iter()
            .map(|spec| PlacedTensor { spec: spec.clone(), offset_bytes: 0, bytes: 0 })
            .collect();
        // As in an arena, so that one copy moves them: in the program's order, integers behind what is copied.
        let (integers, tensors): (Vec<usize>, Vec<usize>) =
            order.iter().partition(|&&place| self.is_integer(&inputs[place].name));
        let mut end = 0_u64;
        for place in tensors.into_iter().chain(integers) {
            let bytes = inputs[place].bytes().ok_or_else(too_large)?;
            (placed[place].offset_bytes, placed[place].bytes) = (end, bytes);
            end = end
                .checked_add(bytes)
                .and_then(|end| end.checked_next_multiple_of(TENSOR_ALIGNMENT_BYTES))
                .ok_or_else(too_large)?;
        }
        // What is copied may be longer than the inputs are.
        end = end.max(least_bytes);
        let outputs = Range::new(end, self.output_bytes(symbols.as_ref()).ok_or_else(too_large)?);
        let bytes = end.checked_add(outputs.bytes).ok_or_else(too_large)?;
        Ok(SlotLayout { inputs: placed, outputs, bytes })
    }

    /// A request's inputs in the program's order, from their places in the slot.
    pub(crate) fn job_inputs(
        &self,
        placed: &[PlacedTensor],
        slot: &Slot,
    ) -> Result<Vec<JobInput>, ServiceError> {
        let inputs = self
            .sent_inputs()
            .map(|input| {
                let tensor = placed
                    .iter()
                    .find(|placed| placed.spec.name == input.name)
                    .ok_or_else(|| ServiceError::input(&input.name, "missing"))?;
                match &input.kind {
                    InputKind::SymInt { .. } => {
                        let mut bytes = [0; 8];
                        slot.read(tensor.offset_bytes, &mut bytes)?;
                        Ok(JobInput::Integer(i64::from_le_bytes(bytes)))
                    }
                    InputKind::Tensor { dtype, .. } => Ok(JobInput::Tensor {
                        dtype: schema_code(*dtype),
                        shape: tensor.spec.shape.clone(),
                        at: Range::new(tensor.offset_bytes, tensor.bytes),
                    }),
                    InputKind::Constant(_) => Err(ServiceError::input(&input.name, "fixed at export")),
                }
            })
            .collect::<Result<Vec<_>, _>>()?;
        self.check_indices(placed, slot)?;
        if self.takes_integers() {
            self.bind(inputs.iter().map(|input| match input {
                JobInput::Integer(value) => Given::Int(*value),
                JobInput::Tensor { shape, .. } => Given::Shape(shape),
            }))?;
        }
        Ok(inputs)
    }

    /// How many rows an input numbers, if it is known to number rows.
    pub(crate) fn rows(&self, input: &str) -> Option<u64> {
        let mut bounds = self.index_bounds.iter();
        bounds.find(|bound| self.program.inputs[bound.input].name == input).map(|bound| bound.rows)
    }

    /// Refuses row numbers that no table has.
    fn check_indices(&self, placed: &[PlacedTensor], slot: &Slot) -> Result<(), ServiceError> {
        for bound in &self.index_bounds {
            let input = &self.program.inputs[bound.input];
            let Some(tensor) = placed.iter().find(|placed| placed.spec.name == input.name) else { continue };
            let InputKind::Tensor { dtype, .. } = &input.kind else { continue };
            let mut bytes = vec![0; usize::try_from(tensor.bytes).unwrap_or(usize::MAX)];
            slot.read(tensor.offset_bytes, &mut bytes)?;
            let found = match dtype {
                DType::I64 => {
                    let (words, _) = bytes.as_chunks::<8>();
                    words
                        .iter()
                        .map(|word| i64::from_le_bytes(*word))
                        .find(|&index| outside(index, bound.rows))
                }
                DType::I32 => {
                    let (words, _) = bytes.as_chunks::<4>();
                    let mut indices = words.iter().map(|word| i64::from(i32::from_le_bytes(*word)));
                    indices.find(|&index| outside(index, bound.rows))
                }
                // No other type numbers rows.
                _ => None,
            };
            if let Some(index) = found {
                let message =
                    format!("index out of range: {index} numbers no row of a table of {}", bound.rows);
                return Err(ServiceError::input(&input.name, message));
            }
        }
        Ok(())
    }

    fn takes_integers(&self) -> bool {
        self.program.inputs.iter().any(|input| matches!(input.kind, InputKind::SymInt { .. }))
    }

    fn is_integer(&self, input: &str) -> bool {
        let mut inputs = self.program.inputs.iter();
        inputs.any(|known| known.name == input && matches!(known.kind, InputKind::SymInt { .. }))
    }

    /// Checks how the extents of all inputs relate, and gives the symbols' values.
    fn bind<'a>(&self, given: impl Iterator<Item = Given<'a>>) -> Result<Symbols, ServiceError> {
        let given: Vec<Given<'_>> = given.collect();
        self.program.bind(&given).map_err(|error| ServiceError::InvalidRequest { message: error.to_string() })
    }

    /// Inputs of the shapes that the program was exported with.
    pub(crate) fn example_inputs(&self) -> Vec<TensorSpec> {
        self.sent_inputs()
            .zip(&self.signature.inputs)
            .map(|(input, signature)| {
                let shape = match &input.kind {
                    InputKind::Tensor { shape, .. } => shape.iter().map(Dim::example).collect(),
                    _ => Vec::new(),
                };
                TensorSpec { name: signature.name.clone(), datatype: signature.datatype, shape }
            })
            .collect()
    }

    /// The inputs that clients send.
    fn sent_inputs(&self) -> impl Iterator<Item = &Input> {
        self.program.inputs.iter().filter(|input| !matches!(input.kind, InputKind::Constant(_)))
    }

    /// Bytes for all outputs; none if that overflows.
    fn output_bytes(&self, symbols: Option<&Symbols>) -> Option<u64> {
        self.program.outputs.iter().try_fold(0_u64, |end, output| {
            let bytes = match &output.kind {
                OutputKind::Constant(_) => return Some(end),
                OutputKind::SymInt(_) | OutputKind::SymFloat(_) | OutputKind::SymBool(_) => 8,
                OutputKind::Tensor { dtype, shape, .. } => {
                    let extents: Option<Vec<u64>> =
                        symbols.and_then(|symbols| shape.iter().map(|dim| dim.evaluate(symbols)).collect());
                    match extents {
                        Some(extents) => extents
                            .iter()
                            .try_fold(dtype.size_bytes(), |bytes, &extent| bytes.checked_mul(extent))?,
                        None => UNKNOWN_OUTPUT_BYTES,
                    }
                }
            };
            end.checked_next_multiple_of(OUTPUT_ALIGNMENT_BYTES)?.checked_add(bytes)
        })
    }
}

fn outside(index: i64, rows: u64) -> bool {
    !u64::try_from(index).is_ok_and(|index| index < rows)
}

/// Bytes of the tensors that a request of the shapes at export brings.
fn example_bytes(program: &Program) -> u64 {
    let bytes = |input: &Input| match &input.kind {
        InputKind::Tensor { dtype, shape, .. } => {
            shape.iter().map(Dim::example).fold(dtype.size_bytes(), u64::saturating_mul)
        }
        InputKind::SymInt { .. } | InputKind::Constant(_) => 0,
    };
    program.inputs.iter().map(bytes).fold(0, u64::saturating_add)
}

/// Schema codes of element types are below 256.
fn schema_code(dtype: DType) -> u8 {
    u8::try_from(dtype.schema_code()).unwrap_or(u8::MAX)
}

/// The code of an output's element type as a datatype of the protocol.
pub(crate) fn datatype_of_code(code: u8) -> Option<Datatype> {
    DType::from_schema_code(u64::from(code))?.protocol_name().and_then(Datatype::from_name)
}

/// What a program takes and gives, in the words of the inference protocol.
///
/// # Errors
/// Names the input or output whose element type the protocol does not have.
pub fn describe(program: &Program) -> Result<ModelSignature, String> {
    let datatype = |name: &str, dtype: &DType| {
        dtype.protocol_name().and_then(Datatype::from_name).ok_or_else(|| {
            format!("'{name}' has element type {dtype}, which the inference protocol does not have")
        })
    };
    let tensor = |name: &str, dtype: &DType, shape: &[Dim]| {
        Ok::<_, String>(TensorSignature {
            name: name.to_owned(),
            datatype: datatype(name, dtype)?,
            shape: shape.iter().map(dimension).collect(),
        })
    };
    let scalar =
        |name: &str, datatype| TensorSignature { name: name.to_owned(), datatype, shape: Vec::new() };
    let mut inputs = Vec::new();
    for input in &program.inputs {
        match &input.kind {
            InputKind::Tensor { dtype, shape, .. } => inputs.push(tensor(&input.name, dtype, shape)?),
            InputKind::SymInt { .. } => inputs.push(scalar(&input.name, Datatype::Int64)),
            InputKind::Constant(_) => {}
        }
    }
    let mut outputs = Vec::new();
    for output in &program.outputs {
        match &output.kind {
            OutputKind::Tensor { dtype, shape, .. } => outputs.push(tensor(&output.name, dtype, shape)?),
            OutputKind::SymInt(_) => outputs.push(scalar(&output.name, Datatype::Int64)),
            OutputKind::SymFloat(_) => outputs.push(scalar(&output.name, Datatype::Fp64)),
            OutputKind::SymBool(_) => outputs.push(scalar(&output.name, Datatype::Bool)),
            OutputKind::Constant(_) => {}
        }
    }
    Ok(ModelSignature { platform: "pytorch_export".to_owned(), inputs, outputs })
}

fn dimension(dim: &Dim) -> DimensionSignature {
    match dim {
        Dim::Fixed(extent) => DimensionSignature::Fixed(*extent),
        Dim::Symbol { min, max, .. } => DimensionSignature::Dynamic { min: *min, max: *max },
        Dim::Derived { .. } | Dim::Unknown { .. } => DimensionSignature::Dynamic { min: 0, max: None },
    }
}

/// Copies all of a model's storages that its program uses into its span; `copied` is told the bytes as they go.
pub(crate) fn fill(span: &UnsealedSpan, archive: &Archive, copied: impl Fn(u64)) -> Result<(), String> {
    let layout = archive.program().span();
    // Those that nothing uses come last.
    let used = layout.offsets.iter().take_while(|&&offset| offset < layout.used_bytes);
    for (storage, &offset) in (0..).map(StorageId).zip(used) {
        let bytes = archive.storage_bytes(storage);
        span.write(offset, bytes).map_err(|error| error.to_string())?;
        copied(bytes.len() as u64);
    }
    Ok(())
}
