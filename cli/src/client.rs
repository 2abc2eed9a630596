//! A small client of the Open Inference Protocol, for `infer` and `models`, and of training tasks, for `train`.

use std::time::Duration;

use anyhow::{Context as _, anyhow};
use pswitch_controller::TaskStatus;
use serde::Deserialize;
use serde_json::Value;
use ureq::http::Response;
use ureq::{Agent, Body};

use crate::exit::{Classify as _, Failure};

const HEADER_LENGTH: &str = "Inference-Header-Content-Length";

/// Largest answer that is read.
const MAX_ANSWER_BYTES: u64 = 4 << 30;

pub(crate) struct Client {
    agent: Agent,
    server: String,
}

/// One line of the repository index.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct IndexEntry {
    pub(crate) name: String,
    #[serde(default)]
    pub(crate) version: String,
    #[serde(default)]
    pub(crate) state: String,
    #[serde(default)]
    pub(crate) reason: String,
}

/// A tensor of a model's metadata.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct TensorMetadata {
    pub(crate) name: String,
    pub(crate) datatype: String,
    pub(crate) shape: Vec<i64>,
}

/// A model's metadata.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct ModelMetadata {
    pub(crate) inputs: Vec<TensorMetadata>,
    pub(crate) outputs: Vec<TensorMetadata>,
}

/// JSON header and binary data of an answer.
#[derive(Debug)]
pub(crate) struct BinaryAnswer {
    pub(crate) header: Value,
    pub(crate) data: Vec<u8>,
}

impl Client {
    pub(crate) fn new(server: &str, timeout: Option<Duration>) -> Self {
        // Statuses are looked at here: the body of a refusal says why.
        let config = Agent::config_builder().http_status_as_error(false).timeout_global(timeout).build();
        Self { agent: config.into(), server: server.trim_end_matches('/').to_owned() }
    }

    pub(crate) fn index(&self) -> anyhow::Result<Vec<IndexEntry>> {
        let url = format!("{}/v2/repository/index", self.server);
        let mut response = self.accept(self.agent.post(&url).send_empty())?;
        response.body_mut().read_json().context("the repository index is not what was expected")
    }

    pub(crate) fn metadata(&self, model: &str) -> anyhow::Result<ModelMetadata> {
        let url = format!("{}/v2/models/{model}", self.server);
        let mut response = self.accept(self.agent.get(&url).call())?;
        response.body_mut().read_json().context("the model's metadata is not what was expected")
    }

    pub(crate) fn tasks(&self) -> anyhow::Result<Vec<TaskStatus>> {
        let url = format!("{}/v2/training/tasks", self.server);
        let mut response = self.accept(self.agent.get(&url).call())?;
        response.body_mut().read_json().context("the list of training tasks is not what was expected")
    }

    pub(crate) fn task(&self, name: &str) -> anyhow::Result<TaskStatus> {
        let url = format!("{}/v2/training/tasks/{name}", self.server);
        task(self.accept(self.agent.get(&url).call())?)
    }

    pub(crate) fn submit_task(&self, name: &str, config: &str) -> anyhow::Result<TaskStatus> {
        let url = format!("{}/v2/training/tasks/{name}", self.server);
        task(self.accept(self.agent.post(&url).content_type("application/json").send(config))?)
    }

    /// Tells a task to `pause`, `resume` or `stop`.
    pub(crate) fn command_task(&self, name: &str, command: &str) -> anyhow::Result<TaskStatus> {
        let url = format!("{}/v2/training/tasks/{name}/{command}", self.server);
        task(self.accept(self.agent.post(&url).send_empty())?)
    }

    /// Sends a request whose tensors follow its JSON header.
    pub(crate) fn infer(
        &self,
        model: &str,
        header: &Value,
        tensors: &[Vec<u8>],
    ) -> anyhow::Result<BinaryAnswer> {
        let url = format!("{}/v2/models/{model}/infer", self.server);
        let json = serde_json::to_vec(header)?;
        let body = [json.as_slice()]
            .into_iter()
            .chain(tensors.iter().map(Vec::as_slice))
            .collect::<Vec<_>>()
            .concat();
        let request = self.agent.post(&url).header(HEADER_LENGTH, json.len().to_string());
        let mut response = self.accept(request.content_type("application/octet-stream").send(body))?;
        let length =
            response.headers().get(HEADER_LENGTH).and_then(|value| value.to_str().ok()?.parse().ok());
        let answer = response.body_mut().with_config().limit(MAX_ANSWER_BYTES).read_to_vec();
        let mut answer = answer.context("the answer broke off").class(Failure::Unreachable)?;
        let length: usize = length.unwrap_or(answer.len());
        let data = if length <= answer.len() { answer.split_off(length) } else { Vec::new() };
        let header = serde_json::from_slice(&answer).context("the answer is not JSON")?;
        Ok(BinaryAnswer { header, data })
    }

    fn accept(&self, result: Result<Response<Body>, ureq::Error>) -> anyhow::Result<Response<Body>> {
        let mut response =
            result.with_context(|| format!("no answer from {}", self.server)).class(Failure::Unreachable)?;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let body = response.body_mut().read_to_string().unwrap_or_default();
        let reason = serde_json::from_str::<Value>(&body)
            .ok()
            .and_then(|value| value.get("error")?.as_str().map(str::to_owned))
            .unwrap_or(body);
        Err(anyhow!("{status}: {reason}")).class(Failure::Refused)
    }
}

fn task(mut response: Response<Body>) -> anyhow::Result<TaskStatus> {
    response.body_mut().read_json().context("the training task is not what was expected")
}
