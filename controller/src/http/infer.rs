//! One inference request from its head to its response.

use std::sync::Arc;
use std::time::Instant;

use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use tokio::sync::OwnedSemaphorePermit;
use tracing::Instrument as _;

use super::body::{BodyReader, check_size};
use super::decode::decode_json;
use super::encode::{Frame, HEADER_LENGTH, encode};
use super::reject::Reject;
use super::request::{InferRequest, Source};
use super::routes::{App, Target};
use crate::metrics::{Completion, RequestRecord};
use crate::service::{
    Answer, Datatype, DimensionSignature, ErrorClass, InferOptions, ModelSignature, ServiceError, Submission,
};

/// JSON from this size on is read and written on a thread that may block, not between other requests' IO.
const LONG_JSON_BYTES: usize = 256 << 10;

/// `POST /v2/models/M[/versions/V]/infer`
pub(super) async fn infer(
    State(app): State<App>,
    target: Target,
    headers: HeaderMap,
    body: Body,
) -> Response {
    let mut record = app.metrics.begin();
    let options = &app.options;
    let mut reader = BodyReader::new(&headers, body, options.max_body_bytes, options.body_idle_timeout);
    let span = tracing::debug_span!("infer", model = target.model, id = tracing::field::Empty);
    match run(&app, &target, &headers, &mut reader, &mut record).instrument(span.clone()).await {
        Ok((completion, response)) => {
            tracing::debug!(parent: &span, timings = ?completion.timings, total = ?record.begun().elapsed());
            record.complete(&completion);
            response
        }
        Err(reject) => {
            tracing::debug!(parent: &span, status = reject.status.as_u16(), "{}", reject.message);
            record.fail(reject.class);
            reader.linger();
            reject.into_response()
        }
    }
}

/// How a body is made up.
enum Layout {
    /// JSON and nothing else.
    Json,
    /// A JSON object of this length, then binary data.
    Binary(u64),
    /// Binary data and nothing else.
    Raw,
}

async fn run(
    app: &App,
    target: &Target,
    headers: &HeaderMap,
    reader: &mut BodyReader,
    record: &mut RequestRecord,
) -> Result<(Completion, Response), Reject> {
    let status = app.service.model(&target.model, target.version.as_deref())?;
    record.model(&status.name);
    let signature = app.service.signature(&target.model, target.version.as_deref())?;
    check_encoding(headers)?;
    reader.check_declared()?;
    let layout = layout(headers, reader.declared())?;

    let (request, json, _budget) = match layout {
        Layout::Raw => (InferRequest::raw(&signature, reader.declared())?, Bytes::new(), None),
        Layout::Json | Layout::Binary(_) => {
            let (json, budget) = take_json(app, &layout, reader).await?;
            let parsed = json.clone();
            let request = off_thread(json.len(), move || InferRequest::parse(&parsed)).await??;
            (request, json, Some(budget))
        }
    };
    if let Some(id) = &request.id {
        tracing::Span::current().record("id", id);
    }
    check_lengths(&layout, &request, json.len() as u64, reader.declared())?;
    let wanted = request.wanted(&signature)?;

    let submission = app.service.reserve(&target.model, target.version.as_deref(), &request.inputs)?;
    let submission = fill_from_json(&request, json, submission).await?;
    let submission = fill_from_body(&request, reader, submission).await?;
    reader.expect_end().await?;

    let batch = batch(&signature, &request);
    let input_bytes = submission.inputs().iter().map(|input| input.bytes).sum();
    let deadline = request.timeout.and_then(|timeout| record.begun().checked_add(timeout));
    let options = InferOptions { id: request.id.clone().unwrap_or_default(), deadline };
    let answer = app.service.infer(submission, options).await?;

    let answered = Instant::now();
    check_answer(&signature, &answer)?;
    let timings = answer.timings;
    let sent = wanted.iter().map(|wanted| &answer.outputs[wanted.index].data);
    let output_bytes = sent.map(|data| data.len() as u64).sum();
    let text_bytes = wanted.iter().filter(|wanted| !wanted.binary);
    let text_bytes = text_bytes.map(|wanted| answer.outputs[wanted.index].data.len()).sum();
    let frame = Frame { model: status.name, version: status.version, id: request.id, wanted };
    let encoded = off_thread(text_bytes, move || encode(&frame, &answer)).await??;
    let completion = Completion { timings, input_bytes, output_bytes, batch, encode: answered.elapsed() };
    Ok((completion, encoded.into_response()))
}

fn check_encoding(headers: &HeaderMap) -> Result<(), Reject> {
    match headers.get(header::CONTENT_ENCODING) {
        None => Ok(()),
        Some(encoding) if encoding == "identity" => Ok(()),
        Some(encoding) => {
            let message = format!("compressed bodies are not supported, found Content-Encoding {encoding:?}");
            Err(Reject::new(ErrorClass::InvalidRequest, StatusCode::UNSUPPORTED_MEDIA_TYPE, message))
        }
    }
}

fn layout(headers: &HeaderMap, declared: Option<u64>) -> Result<Layout, Reject> {
    let mut lengths = headers.get_all(&HEADER_LENGTH).iter();
    let Some(length) = lengths.next() else { return Ok(Layout::Json) };
    if lengths.next().is_some() {
        return Err(Reject::bad("the header Inference-Header-Content-Length is given more than once"));
    }
    let digits = length.to_str().ok().filter(|text| text.bytes().all(|byte| byte.is_ascii_digit()));
    let Some(length) = digits.and_then(|text| text.parse::<u64>().ok()) else {
        return Err(Reject::bad(format!(
            "the header Inference-Header-Content-Length must be a number of bytes, found {length:?}"
        )));
    };
    if let Some(declared) = declared.filter(|declared| length > *declared) {
        return Err(Reject::bad(format!(
            "Inference-Header-Content-Length is {length}, more than the body's Content-Length of {declared}"
        )));
    }
    Ok(if length == 0 { Layout::Raw } else { Layout::Binary(length) })
}

/// Collects the JSON part of the body, within the memory that all requests together may take for JSON.
async fn take_json(
    app: &App,
    layout: &Layout,
    reader: &mut BodyReader,
) -> Result<(Bytes, OwnedSemaphorePermit), Reject> {
    let limit_bytes = app.options.max_json_bytes;
    let length = match layout {
        Layout::Binary(length) => Some(*length),
        Layout::Json | Layout::Raw => reader.declared(),
    };
    if let Some(length) = length {
        check_size("JSON", length, limit_bytes)?;
    }
    let budget = app.json_budget(length.unwrap_or(limit_bytes))?;
    let json = match layout {
        Layout::Binary(length) => reader.take(*length, "the JSON object").await?,
        Layout::Json | Layout::Raw => reader.take_rest(limit_bytes).await?,
    };
    Ok((json, budget))
}

/// Compares what the headers say about the body with what the JSON object says.
fn check_lengths(
    layout: &Layout,
    request: &InferRequest,
    json_bytes: u64,
    declared: Option<u64>,
) -> Result<(), Reject> {
    if matches!(layout, Layout::Json) {
        let binary = request.sources.iter().position(|source| matches!(source, Source::Binary(_)));
        return match binary {
            None => Ok(()),
            Some(index) => Err(Reject::input(
                &request.inputs[index].name,
                "binary data needs the header Inference-Header-Content-Length with the length of the JSON object",
            )),
        };
    }
    let Some(total) = request.binary_bytes().and_then(|binary_bytes| binary_bytes.checked_add(json_bytes))
    else {
        return Err(Reject::bad("the inputs' binary_data_size add up to more than 64 bits"));
    };
    match declared {
        Some(declared) if declared != total => Err(Reject::bad(format!(
            "the body has {declared} bytes (Content-Length), but the JSON object of {json_bytes} bytes and the inputs' \
             binary data of {} bytes make {total}",
            total - json_bytes
        ))),
        _ => Ok(()),
    }
}

async fn fill_from_json(
    request: &InferRequest,
    json: Bytes,
    mut submission: Submission,
) -> Result<Submission, Reject> {
    let inputs: Vec<_> = (request.inputs.iter().zip(&request.sources).enumerate())
        .filter_map(|(index, (spec, source))| match source {
            Source::Json(range) => Some((index, spec.clone(), range.clone())),
            Source::Binary(_) => None,
        })
        .collect();
    if inputs.is_empty() {
        return Ok(submission);
    }
    let filled = off_thread(json.len(), move || {
        for (index, spec, range) in inputs {
            // The range was cut from text that the parser has seen to be UTF-8.
            let text = str::from_utf8(&json[range])
                .map_err(|error| ServiceError::input(&spec.name, error.to_string()))?;
            decode_json(&spec, text, &mut |bytes| submission.append(index, bytes))?;
        }
        Ok::<_, ServiceError>(submission)
    });
    Ok(filled.await??)
}

async fn fill_from_body(
    request: &InferRequest,
    reader: &mut BodyReader,
    mut submission: Submission,
) -> Result<Submission, Reject> {
    for (index, (spec, source)) in request.inputs.iter().zip(&request.sources).enumerate() {
        let Source::Binary(bytes) = source else { continue };
        let mut missing = *bytes;
        while missing > 0 {
            let Some(piece) = reader.next(missing).await? else {
                let message = format!(
                    "the body ends inside its binary data: expected {bytes} bytes, found {}",
                    bytes - missing
                );
                return Err(Reject::input(&spec.name, message));
            };
            if spec.datatype == Datatype::Bool {
                check_bools(&spec.name, bytes - missing, &piece)?;
            }
            submission.append(index, &piece)?;
            missing -= piece.len() as u64;
        }
    }
    Ok(submission)
}

/// A BOOL of another value than 0 and 1 would be undefined behaviour in some kernels.
fn check_bools(name: &str, begin: u64, piece: &[u8]) -> Result<(), Reject> {
    match piece.iter().position(|byte| *byte > 1) {
        None => Ok(()),
        Some(index) => {
            let place = begin + index as u64;
            Err(Reject::input(
                name,
                format!("byte {place} of BOOL data must be 0 or 1, found {}", piece[index]),
            ))
        }
    }
}

/// Inferences in a request: the extent of the first input's first dimension if that is dynamic.
fn batch(signature: &ModelSignature, request: &InferRequest) -> u64 {
    let Some(first) = signature.inputs.first() else { return 1 };
    let is_batch = matches!(first.shape.first(), Some(DimensionSignature::Dynamic { .. }));
    let found = request.inputs.iter().find(|input| input.name == first.name);
    found.and_then(|input| input.shape.first()).copied().filter(|_| is_batch).unwrap_or(1)
}

fn check_answer(signature: &ModelSignature, answer: &Answer) -> Result<(), Reject> {
    let counts = (answer.outputs.len(), signature.outputs.len());
    if counts.0 != counts.1 {
        let message = format!("the model gave {} outputs, its signature has {}", counts.0, counts.1);
        return Err(ServiceError::Internal { message }.into());
    }
    for output in &answer.outputs {
        if output.spec.bytes() != Some(output.data.len() as u64) {
            let message = format!(
                "output '{}' of datatype {} and shape {:?} came with {} bytes",
                output.spec.name,
                output.spec.datatype,
                output.spec.shape,
                output.data.len()
            );
            return Err(ServiceError::Internal { message }.into());
        }
    }
    Ok(())
}

/// Runs work on JSON of this size where it does not hold up other requests.
async fn off_thread<T: Send + 'static>(
    json_bytes: usize,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Reject> {
    if json_bytes < LONG_JSON_BYTES {
        return Ok(work());
    }
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|error| ServiceError::Internal { message: error.to_string() }.into())
}

impl App {
    fn json_budget(&self, bytes: u64) -> Result<OwnedSemaphorePermit, Reject> {
        let kibibytes = u32::try_from(bytes.div_ceil(1024)).unwrap_or(u32::MAX);
        Arc::clone(&self.json_memory).try_acquire_many_owned(kibibytes).map_err(|_| {
            let free = self.json_memory.available_permits() as u64 * 1024;
            let limit = self.options.json_memory_bytes;
            let message = format!(
                "no room for {bytes} bytes of JSON now: other requests hold {} of {limit} bytes",
                limit.saturating_sub(free)
            );
            Reject::new(ErrorClass::Busy, StatusCode::TOO_MANY_REQUESTS, message)
        })
    }
}
