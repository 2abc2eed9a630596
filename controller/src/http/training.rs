//! The endpoints of training tasks.

use axum::Router;
use axum::body::Body;
use axum::extract::rejection::PathRejection;
use axum::extract::{FromRequestParts, Path, State};
use axum::http::request::Parts;
use axum::http::{HeaderMap, StatusCode};
use axum::response::Json;
use axum::routing::{MethodRouter, get, post};

use super::reject::Reject;
use super::routes::{App, control_body};
use crate::error::ControllerError;
use crate::repository::ModelName;
use crate::service::{ServiceError, TaskCommand, TaskStatus};

/// The endpoints, to be merged with the others.
pub(super) fn router() -> Router<App> {
    Router::new()
        .route("/v2/training/tasks", get(list))
        .route("/v2/training/tasks/{task}", get(show).post(submit))
        .route("/v2/training/tasks/{task}/pause", command(TaskCommand::Pause))
        .route("/v2/training/tasks/{task}/resume", command(TaskCommand::Resume))
        .route("/v2/training/tasks/{task}/stop", command(TaskCommand::Stop))
        .route("/v2/training/tasks/{task}/discard", command(TaskCommand::Discard))
}

/// The name of the task in a path. It follows the rules for models' names.
struct TaskName(String);

impl<S: Send + Sync> FromRequestParts<S> for TaskName {
    type Rejection = Reject;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Reject> {
        let path: Result<Path<String>, PathRejection> = Path::from_request_parts(parts, state).await;
        let Path(name) = path.map_err(|error| Reject::bad(error.body_text()))?;
        match name.parse::<ModelName>() {
            Ok(_) => Ok(Self(name)),
            Err(ControllerError::ModelName { name, reason }) => {
                Err(Reject::bad(format!("'{name}' is not a training task's name: {reason}")))
            }
            Err(error) => Err(Reject::bad(error.to_string())),
        }
    }
}

async fn list(State(app): State<App>) -> Json<Vec<TaskStatus>> {
    Json(app.service.training())
}

async fn show(State(app): State<App>, TaskName(name): TaskName) -> Result<Json<TaskStatus>, Reject> {
    let found = app.service.training().into_iter().find(|task| task.name == name);
    found.map(Json).ok_or_else(|| ServiceError::UnknownTask { name }.into())
}

async fn submit(
    State(app): State<App>,
    TaskName(name): TaskName,
    headers: HeaderMap,
    body: Body,
) -> Result<(StatusCode, Json<TaskStatus>), Reject> {
    let body = control_body(&app, &headers, body).await?;
    let config = std::str::from_utf8(&body)
        .map_err(|error| Reject::bad(format!("the task's configuration is not UTF-8: {error}")))?;
    let task = app.service.submit_training(&name, config).await?;
    Ok((StatusCode::CREATED, Json(task)))
}

fn command(command: TaskCommand) -> MethodRouter<App> {
    post(async move |State(app): State<App>, TaskName(name): TaskName| {
        let task = app.service.command_training(&name, command).await?;
        Ok::<_, Reject>(Json(task))
    })
}
