//! A client of the inference protocol that asserts nothing: tests do.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use ureq::Agent;

use super::{Case, PATIENCE, Tensor};

const HEADER_LENGTH: &str = "Inference-Header-Content-Length";

/// One client; clones share their connections.
#[derive(Debug, Clone)]
pub(crate) struct Client {
    agent: Agent,
    server: String,
}

/// Any response.
#[derive(Debug, Clone)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) body: Vec<u8>,
    header_length: Option<usize>,
}

/// Outputs of a model.
#[derive(Debug, Clone)]
pub(crate) struct Answer {
    pub(crate) header: Value,
    pub(crate) outputs: Vec<Tensor>,
}

/// What the server says instead of outputs, or with status 0 what the connection came to.
#[derive(Debug, Clone)]
pub(crate) struct Refusal {
    pub(crate) status: u16,
    pub(crate) error: String,
}

impl Client {
    /// A client with connections of its own.
    pub(crate) fn new(server: &str) -> Self {
        let config = Agent::config_builder()
            .http_status_as_error(false)
            // Longer than the server's own time-out for requests.
            .timeout_global(Some(PATIENCE))
            .build();
        Self { agent: config.into(), server: server.to_owned() }
    }

    pub(crate) fn get(&self, path: &str) -> Result<Reply, Refusal> {
        Reply::of(self.agent.get(format!("{}{path}", self.server)).call())
    }

    pub(crate) fn post(&self, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Result<Reply, Refusal> {
        let mut request = self.agent.post(format!("{}{path}", self.server));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        Reply::of(request.send(body))
    }

    /// Sends a case with binary tensors in both directions.
    pub(crate) fn infer(&self, model: &str, inputs: &[Tensor]) -> Result<Answer, Refusal> {
        let header = json!({
            "inputs": inputs.iter().map(Tensor::binary_header).collect::<Vec<_>>(),
            "parameters": {"binary_data_output": true},
        });
        let data: Vec<u8> = inputs.iter().flat_map(|input| &input.data).copied().collect();
        self.infer_with(model, &header, &data)
    }

    /// Sends a request that the test has made up itself: a JSON object with binary data behind it.
    pub(crate) fn infer_with(&self, model: &str, header: &Value, data: &[u8]) -> Result<Answer, Refusal> {
        let json = serde_json::to_vec(header).unwrap();
        let length = json.len().to_string();
        let path = format!("/v2/models/{model}/infer");
        self.post(&path, &[(HEADER_LENGTH, &length)], &[json.as_slice(), data].concat())?.answer()
    }

    /// Sends a JSON object and nothing else.
    pub(crate) fn infer_json(&self, model: &str, request: &Value) -> Result<Answer, Refusal> {
        self.post(&format!("/v2/models/{model}/infer"), &[], request.to_string().as_bytes())?.answer()
    }

    /// Sends a case and asserts that the answer is eager PyTorch's to the last bit.
    #[track_caller]
    pub(crate) fn check(&self, model: &str, case: &Case) {
        match self.infer(model, &case.inputs) {
            Ok(answer) => answer.assert_is(model, case),
            Err(refusal) => panic!("{model}: {refusal:?}"),
        }
    }

    /// State and reason of every model in the repository.
    pub(crate) fn index(&self) -> BTreeMap<String, (String, String)> {
        let reply = self.post("/v2/repository/index", &[], b"").unwrap();
        assert_eq!(reply.status, 200);
        let text = |entry: &Value, key: &str| entry[key].as_str().unwrap().to_owned();
        let entries = reply.json();
        let entries = entries.as_array().unwrap().iter();
        entries.map(|entry| (text(entry, "name"), (text(entry, "state"), text(entry, "reason")))).collect()
    }

    /// Every sample of the server's metrics, as `name{labels}`.
    pub(crate) fn metrics(&self) -> BTreeMap<String, f64> {
        let reply = self.get("/metrics").unwrap();
        assert_eq!(reply.status, 200);
        let text = String::from_utf8(reply.body).unwrap();
        let sample = |line: &str| {
            let (name, value) = line.rsplit_once(' ').unwrap();
            (name.to_owned(), value.parse().unwrap())
        };
        text.lines().filter(|line| !line.starts_with('#')).map(sample).collect()
    }

    /// The sum of all samples of one metric.
    pub(crate) fn metric(&self, name: &str) -> f64 {
        let of_name = |sample: &str| sample.split('{').next() == Some(name);
        self.metrics().iter().filter(|(sample, _)| of_name(sample)).map(|(_, value)| value).sum()
    }
}

impl Reply {
    fn of(result: Result<ureq::http::Response<ureq::Body>, ureq::Error>) -> Result<Self, Refusal> {
        let broken = |error: ureq::Error| Refusal { status: 0, error: error.to_string() };
        let mut response = result.map_err(broken)?;
        let header_length =
            response.headers().get(HEADER_LENGTH).map(|value| value.to_str().unwrap().parse().unwrap());
        let body = response.body_mut().with_config().limit(1 << 30).read_to_vec().map_err(broken)?;
        Ok(Self { status: response.status().as_u16(), body, header_length })
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&self.body)))
    }

    /// The message of a refusal.
    pub(crate) fn error(&self) -> String {
        self.json()["error"].as_str().unwrap_or_default().to_owned()
    }

    fn answer(self) -> Result<Answer, Refusal> {
        if self.status != 200 {
            return Err(Refusal { status: self.status, error: self.error() });
        }
        let (json, mut data) = self.body.split_at(self.header_length.unwrap_or(self.body.len()));
        let header: Value = serde_json::from_slice(json).unwrap();
        let mut outputs = Vec::new();
        for output in header["outputs"].as_array().unwrap() {
            let bytes = output["parameters"]["binary_data_size"].as_u64().unwrap_or(0);
            let (own, rest) = data.split_at(usize::try_from(bytes).unwrap());
            data = rest;
            outputs.push(Tensor {
                name: output["name"].as_str().unwrap().to_owned(),
                datatype: output["datatype"].as_str().unwrap().to_owned(),
                shape: output["shape"].as_array().unwrap().iter().map(|n| n.as_u64().unwrap()).collect(),
                data: own.to_vec(),
            });
        }
        assert!(data.is_empty(), "{} bytes behind the last output", data.len());
        Ok(Answer { header, outputs })
    }
}

impl Answer {
    /// Asserts names, types, shapes and every bit of the outputs.
    #[track_caller]
    pub(crate) fn assert_is(&self, model: &str, case: &Case) {
        let names = |tensors: &[Tensor]| tensors.iter().map(|t| t.name.clone()).collect::<Vec<_>>();
        assert_eq!(names(&self.outputs), names(&case.outputs), "{model}: outputs");
        for (found, expected) in self.outputs.iter().zip(&case.outputs) {
            let Tensor { name, datatype, shape, data } = found;
            assert_eq!((datatype, shape), (&expected.datatype, &expected.shape), "{model}: output {name}");
            let wrong = data.iter().zip(&expected.data).filter(|(one, other)| one != other).count();
            assert!(data == &expected.data, "{model}: {wrong} of {} bytes of {name} differ", data.len());
        }
    }
}

impl Tensor {
    /// An input's entry in a request that brings its data behind the JSON object.
    pub(crate) fn binary_header(&self) -> Value {
        json!({
            "name": self.name,
            "datatype": self.datatype,
            "shape": self.shape,
            "parameters": {"binary_data_size": self.data.len()},
        })
    }
}
