//! Which path leads where, and all endpoints but inference.

use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::rejection::PathRejection;
use axum::extract::{FromRequestParts, Path, State};
use axum::http::request::Parts;
use axum::http::{HeaderMap, Method, StatusCode, Uri, header};
use axum::response::{IntoResponse, Json, Response};
use axum::routing::{get, post};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::Semaphore;

use super::body::BodyReader;
use super::infer::infer;
use super::reject::Reject;
use super::server::HttpOptions;
use super::training;
use crate::metrics::{Metrics, StatisticsReport};
use crate::service::{DimensionSignature, ErrorClass, InferenceService, ModelState, TensorSignature};

/// Longest body of a request that is no inference: to the repository, or with a training task's configuration.
const MAX_CONTROL_BYTES: u64 = 64 << 10;

/// What all requests share.
#[derive(Clone)]
pub(super) struct App {
    pub(super) service: Arc<dyn InferenceService>,
    pub(super) metrics: Arc<Metrics>,
    pub(super) options: Arc<HttpOptions>,
    /// Memory that JSON may take, in KiB.
    pub(super) json_memory: Arc<Semaphore>,
}

/// All endpoints.
pub(super) fn router(app: App) -> Router {
    let model = |tail: &str| {
        (format!("/v2/models/{{model}}{tail}"), format!("/v2/models/{{model}}/versions/{{version}}{tail}"))
    };
    let mut router = Router::new()
        .route("/v2", get(server_metadata))
        .route("/v2/health/live", get(server_live))
        .route("/v2/health/ready", get(server_ready))
        .route("/v2/models/stats", get(all_statistics))
        .route("/v2/repository/index", get(index).post(index))
        .route("/v2/repository/models/{model}/load", post(load))
        .route("/v2/repository/models/{model}/unload", post(unload))
        .route("/metrics", get(prometheus));
    for (tail, endpoint) in [
        ("", get(model_metadata)),
        ("/ready", get(model_ready)),
        ("/stats", get(model_statistics)),
        ("/infer", post(infer)),
    ] {
        let (unversioned, versioned) = model(tail);
        router = router.route(&unversioned, endpoint.clone()).route(&versioned, endpoint);
    }
    router
        .merge(training::router())
        .fallback(unknown_path)
        .method_not_allowed_fallback(wrong_method)
        .with_state(app)
}

/// The model that a path names.
#[derive(Debug, Deserialize)]
pub(super) struct Target {
    pub(super) model: String,
    pub(super) version: Option<String>,
}

impl<S: Send + Sync> FromRequestParts<S> for Target {
    type Rejection = Reject;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Reject> {
        let path: Result<Path<Self>, PathRejection> = Path::from_request_parts(parts, state).await;
        path.map(|Path(target)| target).map_err(|error| Reject::bad(error.body_text()))
    }
}

async fn unknown_path(method: Method, uri: Uri) -> Reject {
    let message = format!("no such resource: {method} {}", uri.path());
    Reject::new(ErrorClass::NotFound, StatusCode::NOT_FOUND, message)
}

async fn wrong_method(method: Method, uri: Uri) -> Reject {
    let message = format!("{} does not take {method}", uri.path());
    Reject::new(ErrorClass::InvalidRequest, StatusCode::METHOD_NOT_ALLOWED, message)
}

async fn server_metadata() -> Json<Value> {
    Json(json!({
        "name": "pswitch",
        "version": env!("CARGO_PKG_VERSION"),
        "extensions": ["binary_tensor_data", "model_repository", "parameters", "statistics", "training"],
    }))
}

async fn server_live(State(app): State<App>) -> Response {
    let live = app.service.is_live();
    (probe_status(live), Json(json!({ "live": live }))).into_response()
}

async fn server_ready(State(app): State<App>) -> Response {
    // The protocol's text calls the field "live" here too, its implementations "ready".
    let ready = app.service.is_ready();
    (probe_status(ready), Json(json!({ "live": app.service.is_live(), "ready": ready }))).into_response()
}

fn probe_status(good: bool) -> StatusCode {
    if good { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }
}

async fn model_ready(State(app): State<App>, target: Target) -> Result<Response, Reject> {
    let status = app.service.model(&target.model, target.version.as_deref())?;
    let ready = status.state == ModelState::Ready;
    let mut body = json!({ "name": status.name, "ready": ready });
    if !ready {
        let reason = if status.reason.is_empty() { status.state.name() } else { &status.reason };
        body["error"] = format!("model '{}' is not ready: {reason}", status.name).into();
    }
    Ok((probe_status(ready), Json(body)).into_response())
}

async fn model_metadata(State(app): State<App>, target: Target) -> Result<Json<Value>, Reject> {
    let status = app.service.model(&target.model, target.version.as_deref())?;
    let signature = app.service.signature(&target.model, target.version.as_deref())?;
    let tensors = |tensors: &[TensorSignature]| tensors.iter().map(tensor_metadata).collect::<Vec<_>>();
    Ok(Json(json!({
        "name": status.name,
        "versions": [status.version],
        "platform": signature.platform,
        "inputs": tensors(&signature.inputs),
        "outputs": tensors(&signature.outputs),
    })))
}

fn tensor_metadata(tensor: &TensorSignature) -> Value {
    let extent = |dimension: &DimensionSignature| match dimension {
        DimensionSignature::Fixed(extent) => json!(extent),
        DimensionSignature::Dynamic { .. } => json!(-1),
    };
    let mut metadata = json!({
        "name": tensor.name,
        "datatype": tensor.datatype.name(),
        "shape": tensor.shape.iter().map(extent).collect::<Vec<_>>(),
    });
    if tensor.shape.iter().any(|dimension| matches!(dimension, DimensionSignature::Dynamic { .. })) {
        // -1 does not tell how far a dimension may go; this does.
        metadata["parameters"] = json!({ "shape_range": tensor.shape_text() });
    }
    metadata
}

async fn index(State(app): State<App>, headers: HeaderMap, body: Body) -> Result<Json<Value>, Reject> {
    #[derive(Default, Deserialize)]
    struct IndexRequest {
        #[serde(default)]
        ready: bool,
    }
    let body = control_body(&app, &headers, body).await?;
    let request: IndexRequest = if body.is_empty() {
        IndexRequest::default()
    } else {
        let parsed = serde_json::from_slice(&body);
        parsed.map_err(|error| Reject::bad(format!("not an index request in JSON: {error}")))?
    };
    let models = app.service.models();
    let listed = models.iter().filter(|model| !request.ready || model.state == ModelState::Ready);
    let listed = listed.map(|model| {
        json!({
            "name": model.name,
            "version": model.version,
            "state": model.state.name(),
            "reason": model.reason,
        })
    });
    Ok(Json(listed.collect()))
}

async fn load(State(app): State<App>, target: Target, headers: HeaderMap, body: Body) -> Result<(), Reject> {
    check_parameters(&control_body(&app, &headers, body).await?)?;
    Ok(app.service.load(&target.model).await?)
}

async fn unload(
    State(app): State<App>,
    target: Target,
    headers: HeaderMap,
    body: Body,
) -> Result<(), Reject> {
    check_parameters(&control_body(&app, &headers, body).await?)?;
    Ok(app.service.unload(&target.model).await?)
}

/// All of a body that is no inference request's.
pub(super) async fn control_body(app: &App, headers: &HeaderMap, body: Body) -> Result<bytes::Bytes, Reject> {
    let mut reader = BodyReader::new(headers, body, MAX_CONTROL_BYTES, app.options.body_idle_timeout);
    let collected = match reader.check_declared() {
        Ok(()) => reader.take_rest(MAX_CONTROL_BYTES).await,
        Err(reject) => Err(reject),
    };
    if collected.is_err() {
        reader.linger();
    }
    collected
}

/// A load may bring a configuration in Triton's format; to ignore it would load something else than was asked for.
fn check_parameters(body: &[u8]) -> Result<(), Reject> {
    #[derive(Deserialize)]
    struct ControlRequest {
        #[serde(default)]
        parameters: serde_json::Map<String, Value>,
    }
    if body.is_empty() {
        return Ok(());
    }
    let request: ControlRequest = serde_json::from_slice(body)
        .map_err(|error| Reject::bad(format!("not a repository request in JSON: {error}")))?;
    match request.parameters.keys().find(|key| *key != "unload_dependents") {
        None => Ok(()),
        Some(key) => Err(Reject::bad(format!("parameter '{key}' is not supported"))),
    }
}

async fn model_statistics(State(app): State<App>, target: Target) -> Result<Json<StatisticsReport>, Reject> {
    let status = app.service.model(&target.model, target.version.as_deref())?;
    let model_stats = vec![app.metrics.statistics(&status.name, &status.version)];
    Ok(Json(StatisticsReport { model_stats }))
}

async fn all_statistics(State(app): State<App>) -> Json<StatisticsReport> {
    let models = app.service.models();
    let model_stats = models.iter().map(|model| app.metrics.statistics(&model.name, &model.version));
    Json(StatisticsReport { model_stats: model_stats.collect() })
}

async fn prometheus(State(app): State<App>) -> Response {
    let text = app.metrics.prometheus(&app.service.snapshot(), &app.service.training());
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response()
}
