//! The JSON object of an inference request.

use std::borrow::Cow;
use std::ops::Range;
use std::time::Duration;

use serde::Deserialize;
use serde_json::value::RawValue;

use super::decode::quote;
use super::encode::{Wanted, no_json_form};
use super::reject::Reject;
use crate::service::{Datatype, DimensionSignature, ModelSignature, TensorSpec};

/// An inference request without its tensors' data.
#[derive(Debug)]
pub(super) struct InferRequest {
    pub(super) id: Option<String>,
    /// How long after its arrival the client waits.
    pub(super) timeout: Option<Duration>,
    pub(super) inputs: Vec<TensorSpec>,
    /// Where each input's data is.
    pub(super) sources: Vec<Source>,
    outputs: Option<Vec<RequestedOutput>>,
    binary_output: bool,
}

/// Where an input's data is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Source {
    /// In the JSON object, these bytes of it.
    Json(Range<usize>),
    /// Behind it, so many bytes, after those of the inputs before.
    Binary(u64),
}

#[derive(Debug)]
struct RequestedOutput {
    name: String,
    binary: Option<bool>,
}

#[derive(Deserialize)]
struct RawRequest<'a> {
    id: Option<String>,
    #[serde(borrow)]
    parameters: Option<RawParameters<'a>>,
    #[serde(borrow)]
    inputs: Vec<RawInput<'a>>,
    #[serde(borrow)]
    outputs: Option<Vec<RawOutput<'a>>>,
}

#[derive(Default, Deserialize)]
struct RawParameters<'a> {
    #[serde(borrow)]
    timeout: Option<&'a RawValue>,
    #[serde(borrow)]
    binary_data_output: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct RawInput<'a> {
    #[serde(borrow)]
    name: Cow<'a, str>,
    #[serde(borrow)]
    shape: Option<&'a RawValue>,
    #[serde(borrow)]
    datatype: Option<Cow<'a, str>>,
    #[serde(borrow)]
    parameters: Option<RawInputParameters<'a>>,
    #[serde(borrow)]
    data: Option<&'a RawValue>,
}

#[derive(Default, Deserialize)]
struct RawInputParameters<'a> {
    #[serde(borrow)]
    binary_data_size: Option<&'a RawValue>,
    #[serde(borrow)]
    shared_memory_region: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct RawOutput<'a> {
    name: String,
    #[serde(borrow)]
    parameters: Option<RawOutputParameters<'a>>,
}

#[derive(Default, Deserialize)]
struct RawOutputParameters<'a> {
    #[serde(borrow)]
    binary_data: Option<&'a RawValue>,
    #[serde(borrow)]
    shared_memory_region: Option<&'a RawValue>,
    #[serde(borrow)]
    classification: Option<&'a RawValue>,
}

impl InferRequest {
    /// Reads a request's JSON object.
    ///
    /// # Errors
    /// What is wrong with it, by line and column or by tensor, expected and found.
    pub(super) fn parse(json: &[u8]) -> Result<Self, Reject> {
        let raw: RawRequest<'_> = serde_json::from_slice(json)
            .map_err(|error| Reject::bad(format!("not an inference request in JSON: {error}")))?;
        let parameters = raw.parameters.unwrap_or_default();
        let timeout = parameters
            .timeout
            .map(|value| parse_as::<u64>(value, "parameter 'timeout'", "a number of microseconds"))
            .transpose()?;
        let binary_output = parameters
            .binary_data_output
            .map(|value| parse_as(value, "parameter 'binary_data_output'", "true or false"))
            .transpose()?;
        let mut inputs = Vec::with_capacity(raw.inputs.len());
        let mut sources = Vec::with_capacity(raw.inputs.len());
        for input in &raw.inputs {
            let (spec, source) = input.parse(json)?;
            inputs.push(spec);
            sources.push(source);
        }
        let outputs = raw.outputs.map(|outputs| outputs.into_iter().map(RawOutput::parse).collect());
        Ok(Self {
            id: raw.id,
            timeout: timeout.filter(|timeout_us| *timeout_us > 0).map(Duration::from_micros),
            inputs,
            sources,
            outputs: outputs.transpose()?,
            binary_output: binary_output.unwrap_or(false),
        })
    }

    /// A request without a JSON object: all of the body is the data of the model's only input.
    ///
    /// # Errors
    /// Models with other than one input or with more than one dynamic dimension, lengths that no shape has.
    pub(super) fn raw(signature: &ModelSignature, body_bytes: Option<u64>) -> Result<Self, Reject> {
        let [input] = signature.inputs.as_slice() else {
            return Err(Reject::bad(format!(
                "a raw binary request (Inference-Header-Content-Length: 0) needs a model with one input, this one has {}",
                signature.inputs.len()
            )));
        };
        let Some(body_bytes) = body_bytes else {
            return Err(Reject::input(&input.name, "a raw binary request needs the header Content-Length"));
        };
        let mut fixed_bytes = input.datatype.size_bytes();
        let mut dynamic = Vec::new();
        let mut shape = Vec::with_capacity(input.shape.len());
        for (index, dimension) in input.shape.iter().enumerate() {
            match dimension {
                DimensionSignature::Fixed(extent) => {
                    fixed_bytes = fixed_bytes.saturating_mul(*extent);
                    shape.push(*extent);
                }
                DimensionSignature::Dynamic { .. } => {
                    dynamic.push(index);
                    shape.push(0);
                }
            }
        }
        let wrong_length = || {
            let message = format!(
                "{body_bytes} bytes do not fill shape {} of datatype {}",
                input.shape_text(),
                input.datatype
            );
            Reject::input(&input.name, message)
        };
        match dynamic.as_slice() {
            [] if body_bytes == fixed_bytes => {}
            [index] if fixed_bytes > 0 && body_bytes.is_multiple_of(fixed_bytes) => {
                shape[*index] = body_bytes / fixed_bytes;
            }
            [] | [_] => return Err(wrong_length()),
            _ => {
                let message = format!(
                    "a raw binary request needs at most one dynamic dimension, the shape is {}",
                    input.shape_text()
                );
                return Err(Reject::input(&input.name, message));
            }
        }
        Ok(Self {
            id: None,
            timeout: None,
            inputs: vec![TensorSpec::new(&input.name, input.datatype, shape)],
            sources: vec![Source::Binary(body_bytes)],
            outputs: None,
            binary_output: true,
        })
    }

    /// Bytes of binary data that follow the JSON object; `None` if that does not fit 64 bits.
    pub(super) fn binary_bytes(&self) -> Option<u64> {
        self.sources.iter().try_fold(0u64, |sum, source| match source {
            Source::Json(_) => Some(sum),
            Source::Binary(bytes) => sum.checked_add(*bytes),
        })
    }

    /// Which outputs to send and how: those asked for in the order asked for, or all.
    ///
    /// # Errors
    /// Outputs that the model does not have, asked for twice, or that JSON cannot tell.
    pub(super) fn wanted(&self, signature: &ModelSignature) -> Result<Vec<Wanted>, Reject> {
        let mut wanted: Vec<Wanted> = Vec::with_capacity(signature.outputs.len());
        match &self.outputs {
            None => {
                let all = 0..signature.outputs.len();
                wanted.extend(all.map(|index| Wanted { index, binary: self.binary_output }));
            }
            Some(outputs) => {
                for output in outputs {
                    let Some(index) = signature.output(&output.name) else {
                        return Err(unknown_output(&output.name, signature));
                    };
                    if wanted.iter().any(|other| other.index == index) {
                        return Err(Reject::bad(format!(
                            "output '{}': asked for more than once",
                            output.name
                        )));
                    }
                    wanted.push(Wanted { index, binary: output.binary.unwrap_or(self.binary_output) });
                }
            }
        }
        for Wanted { index, binary } in &wanted {
            let output = &signature.outputs[*index];
            if !binary && !output.datatype.has_json_form() {
                return Err(Reject::bad(no_json_form(&output.name, output.datatype)));
            }
        }
        Ok(wanted)
    }
}

impl RawInput<'_> {
    fn parse(&self, json: &[u8]) -> Result<(TensorSpec, Source), Reject> {
        let name = self.name.as_ref();
        let datatype =
            self.datatype.as_deref().ok_or_else(|| Reject::input(name, "'datatype' is missing"))?;
        let datatype = Datatype::of_tensor(name, datatype)?;
        let shape = self.shape.ok_or_else(|| Reject::input(name, "'shape' is missing"))?;
        let shape: Vec<u64> = serde_json::from_str(shape.get()).map_err(|_| {
            let found = quote(shape.get());
            Reject::input(name, format!("'shape' must be a list of unsigned 64-bit integers, found {found}"))
        })?;
        let spec = TensorSpec::new(name, datatype, shape);
        let Some(bytes) = spec.bytes() else {
            return Err(Reject::input(
                name,
                format!("shape {:?} has more elements than 64 bits count", spec.shape),
            ));
        };
        let parameters = self.parameters.as_ref();
        if parameters.is_some_and(|parameters| parameters.shared_memory_region.is_some()) {
            return Err(Reject::input(name, "this server does not support the shared memory extension"));
        }
        let size = parameters.and_then(|parameters| parameters.binary_data_size);
        let source = match (self.data, size) {
            (Some(data), None) => Source::Json(range_in(json, data.get())),
            (None, Some(size)) => {
                let what = format!("input '{name}': parameter 'binary_data_size'");
                let size: u64 = parse_as(size, &what, "a number of bytes")?;
                if size != bytes {
                    let message = format!(
                        "binary_data_size is {size}, but datatype {datatype} and shape {:?} make {bytes} bytes",
                        spec.shape
                    );
                    return Err(Reject::input(name, message));
                }
                Source::Binary(size)
            }
            (Some(_), Some(_)) => {
                return Err(Reject::input(name, "has both 'data' and the parameter 'binary_data_size'"));
            }
            (None, None) => {
                return Err(Reject::input(
                    name,
                    "has no data: expected 'data' or the parameter 'binary_data_size'",
                ));
            }
        };
        Ok((spec, source))
    }
}

impl RawOutput<'_> {
    fn parse(self) -> Result<RequestedOutput, Reject> {
        let parameters = self.parameters.unwrap_or_default();
        for (parameter, extension) in [
            (parameters.shared_memory_region, "shared memory"),
            (parameters.classification, "classification"),
        ] {
            if parameter.is_some() {
                let message =
                    format!("output '{}': this server does not support the {extension} extension", self.name);
                return Err(Reject::bad(message));
            }
        }
        let what = format!("output '{}': parameter 'binary_data'", self.name);
        let binary =
            parameters.binary_data.map(|value| parse_as(value, &what, "true or false")).transpose()?;
        Ok(RequestedOutput { name: self.name, binary })
    }
}

fn parse_as<'a, T: Deserialize<'a>>(value: &'a RawValue, what: &str, expected: &str) -> Result<T, Reject> {
    serde_json::from_str(value.get())
        .map_err(|_| Reject::bad(format!("{what} must be {expected}, found {}", quote(value.get()))))
}

/// Where a piece that was borrowed from the text stands in it.
fn range_in(text: &[u8], piece: &str) -> Range<usize> {
    let begin = piece.as_ptr() as usize - text.as_ptr() as usize;
    begin..begin + piece.len()
}

fn unknown_output(name: &str, signature: &ModelSignature) -> Reject {
    let names: Vec<String> = signature.outputs.iter().map(|output| format!("'{}'", output.name)).collect();
    Reject::bad(format!(
        "output '{name}': the model has no such output; its outputs are {}",
        names.join(", ")
    ))
}
