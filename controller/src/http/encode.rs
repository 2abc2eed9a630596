//! Answers as responses: JSON written straight from the slot, binary data not written at all.

use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderName, HeaderValue, header};
use axum::response::Response;
use bytes::Bytes;
use serde::Serialize;

use super::body::Pieces;
use super::reject::Reject;
use crate::service::{Answer, Datatype, OutputTensor, Timings};

/// The header that tells where binary data begins.
pub(super) static HEADER_LENGTH: HeaderName = HeaderName::from_static("inference-header-content-length");
static SERVER_TIMING: HeaderName = HeaderName::from_static("server-timing");

/// An output that the client wants and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Wanted {
    /// Its place in the signature and in the answer.
    pub(super) index: usize,
    /// As binary data, not JSON.
    pub(super) binary: bool,
}

/// What stands in a response beside the answer.
#[derive(Debug)]
pub(super) struct Frame {
    pub(super) model: String,
    pub(super) version: String,
    pub(super) id: Option<String>,
    pub(super) wanted: Vec<Wanted>,
}

/// A response's JSON object and the binary data behind it.
pub(super) struct Encoded {
    json: Vec<u8>,
    binary: Vec<Bytes>,
    timings: Timings,
}

/// Writes the JSON object of a response.
///
/// # Errors
/// An element that JSON cannot tell, by output, index and value.
pub(super) fn encode(frame: &Frame, answer: &Answer) -> Result<Encoded, Reject> {
    let mut json = Vec::with_capacity(1024);
    let mut binary = Vec::new();
    json.push(b'{');
    if let Some(id) = &frame.id {
        field(&mut json, "id", id);
        json.push(b',');
    }
    field(&mut json, "model_name", &frame.model);
    json.push(b',');
    field(&mut json, "model_version", &frame.version);
    json.push(b',');
    field(&mut json, "parameters", &ResponseParameters::from(answer.timings));
    json.extend_from_slice(b",\"outputs\":[");
    for (position, wanted) in frame.wanted.iter().enumerate() {
        let output = &answer.outputs[wanted.index];
        if position > 0 {
            json.push(b',');
        }
        json.push(b'{');
        field(&mut json, "name", &output.spec.name);
        json.push(b',');
        field(&mut json, "datatype", output.spec.datatype.name());
        json.push(b',');
        field(&mut json, "shape", &output.spec.shape);
        json.push(b',');
        if wanted.binary {
            field(&mut json, "parameters", &BinarySize { binary_data_size: output.data.len() });
            binary.push(output.data.clone());
        } else {
            json.extend_from_slice(b"\"data\":[");
            write_data(output, &mut json)?;
            json.push(b']');
        }
        json.push(b'}');
    }
    json.extend_from_slice(b"]}");
    Ok(Encoded { json, binary, timings: answer.timings })
}

impl Encoded {
    /// The response: nothing is copied any more.
    pub(super) fn into_response(self) -> Response {
        let header_bytes = self.json.len();
        let content_type =
            if self.binary.is_empty() { "application/json" } else { "application/octet-stream" };
        let is_binary = !self.binary.is_empty();
        let body = Pieces::new(std::iter::once(Bytes::from(self.json)).chain(self.binary));
        let length = body.length();
        let mut response = Response::new(Body::new(body));
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
        headers.insert(header::CONTENT_LENGTH, HeaderValue::from(length));
        if is_binary {
            headers.insert(HEADER_LENGTH.clone(), HeaderValue::from(header_bytes));
        }
        if let Ok(timing) = HeaderValue::from_str(&server_timing(self.timings)) {
            headers.insert(SERVER_TIMING.clone(), timing);
        }
        response
    }
}

#[derive(Serialize)]
struct BinarySize {
    binary_data_size: usize,
}

#[derive(Serialize)]
struct ResponseParameters {
    queue_us: f64,
    switch_us: f64,
    compute_us: f64,
    switched: bool,
}

impl From<Timings> for ResponseParameters {
    fn from(timings: Timings) -> Self {
        Self {
            queue_us: microseconds(timings.queue),
            switch_us: microseconds(timings.switch),
            compute_us: microseconds(timings.compute),
            switched: timings.switched,
        }
    }
}

fn microseconds(duration: Duration) -> f64 {
    // Nanoseconds of a request's life are whole numbers far below 2^53.
    duration.as_nanos() as f64 / 1e3
}

fn server_timing(timings: Timings) -> String {
    let milliseconds = |duration: Duration| microseconds(duration) / 1e3;
    format!(
        "queue;dur={:.3}, switch;dur={:.3}, compute;dur={:.3}",
        milliseconds(timings.queue),
        milliseconds(timings.switch),
        milliseconds(timings.compute)
    )
}

fn field<T: Serialize + ?Sized>(json: &mut Vec<u8>, name: &str, value: &T) {
    json.push(b'"');
    json.extend_from_slice(name.as_bytes());
    json.extend_from_slice(b"\":");
    write_value(json, value);
}

fn write_value<T: Serialize + ?Sized>(json: &mut Vec<u8>, value: &T) {
    // Strings, numbers and structs of them always have a JSON form, and a Vec takes all that is written.
    let written = serde_json::to_writer(json, value);
    debug_assert!(written.is_ok(), "{written:?}");
}

/// Writes a tensor's elements with commas between, floating-point numbers as short as they can be read back exactly.
fn write_data(output: &OutputTensor, json: &mut Vec<u8>) -> Result<(), Reject> {
    let data: &[u8] = &output.data;
    macro_rules! integers {
        ($type:ty) => {{
            write_elements(data, json, |bytes, json| {
                write_value(json, &<$type>::from_le_bytes(bytes));
                Ok(())
            })
        }};
    }
    macro_rules! floats {
        ($type:ty) => {{
            write_elements(data, json, |bytes, json| {
                let value = <$type>::from_le_bytes(bytes);
                if !value.is_finite() {
                    return Err(value.to_string());
                }
                write_value(json, &value);
                Ok(())
            })
        }};
    }
    json.reserve(data.len() * 2);
    let written = match output.spec.datatype {
        Datatype::Bool => write_elements(data, json, |[byte], json| {
            json.extend_from_slice(if byte == 0 { b"false" } else { b"true" });
            Ok(())
        }),
        Datatype::Uint8 => integers!(u8),
        Datatype::Uint16 => integers!(u16),
        Datatype::Uint32 => integers!(u32),
        Datatype::Uint64 => integers!(u64),
        Datatype::Int8 => integers!(i8),
        Datatype::Int16 => integers!(i16),
        Datatype::Int32 => integers!(i32),
        Datatype::Int64 => integers!(i64),
        Datatype::Fp32 => floats!(f32),
        Datatype::Fp64 => floats!(f64),
        Datatype::Fp16 | Datatype::Bf16 => {
            return Err(Reject::bad(no_json_form(&output.spec.name, output.spec.datatype)));
        }
    };
    written.map_err(|(index, value)| {
        Reject::bad(format!(
            "output '{}': data[{index}] is {value}, which JSON cannot tell; ask for binary data (\"parameters\": \
             {{\"binary_data\": true}} of the output or {{\"binary_data_output\": true}} of the request)",
            output.spec.name
        ))
    })
}

/// Why an output cannot be told as JSON.
pub(super) fn no_json_form(name: &str, datatype: Datatype) -> String {
    format!(
        "output '{name}': {datatype} cannot be written as JSON; ask for binary data (\"parameters\": \
         {{\"binary_data\": true}} of the output or {{\"binary_data_output\": true}} of the request)"
    )
}

fn write_elements<const SIZE: usize>(
    data: &[u8],
    json: &mut Vec<u8>,
    write: impl Fn([u8; SIZE], &mut Vec<u8>) -> Result<(), String>,
) -> Result<(), (usize, String)> {
    let (elements, _) = data.as_chunks::<SIZE>();
    for (index, element) in elements.iter().enumerate() {
        if index > 0 {
            json.push(b',');
        }
        write(*element, json).map_err(|value| (index, value))?;
    }
    Ok(())
}
