//! PyTorch's own latencies of models that are ready, measured in the same run by a process of its own.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::ensure;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::progress;
use crate::pytorch;
use crate::subject::Served;

const MODULE: &str = "pswitch.ready_latency";

/// Requests of each model and kind, after 20 that do not count.
const REQUESTS: &str = "200";

/// Why the tables are without PyTorch.
pub(super) const LEFT_OUT: &str = "left out: no --python";

/// What the module prints.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub(super) struct PyTorch {
    torch: String,
    gpu: Option<String>,
    models: BTreeMap<String, Latencies>,
}

/// Latencies of one model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Latencies {
    pub(super) eager_ms: Quantiles,
    /// As a CUDA graph, inputs and outputs copied around it; only on a GPU.
    pub(super) graph_ms: Option<Quantiles>,
    weights_bytes: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(super) struct Quantiles {
    pub(super) median: f64,
    pub(super) p99: f64,
    pub(super) least: f64,
    pub(super) most: f64,
}

impl PyTorch {
    /// Runs the module, which has ended when this returns and holds no memory of the device any more.
    pub(super) fn measure(python: &Path, served: Served, archives: &[&Path]) -> anyhow::Result<Self> {
        progress::say("PyTorch's own latencies ...");
        let measured: Self = pytorch::run(python, MODULE, served, &["--requests", REQUESTS], archives)?;
        for archive in archives {
            ensure!(measured.of(archive).is_some(), "{MODULE} has not measured {}", archive.display());
        }
        Ok(measured)
    }

    /// The latencies of an archive.
    pub(super) fn of(&self, archive: &Path) -> Option<&Latencies> {
        self.models.get(&pytorch::name(archive)?)
    }
}

/// What a result says of it beside the models.
pub(super) fn facts(measured: Option<&PyTorch>) -> Value {
    match measured {
        Some(PyTorch { torch, gpu, .. }) => json!({"torch": torch, "gpu": gpu}),
        None => json!(LEFT_OUT),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As `python/src/pswitch/ready_latency.py` prints it.
    const PRINTED: &str = r#"{"torch": "2.11.0+cu130", "gpu": "NVIDIA H200", "models": {
        "resnet152": {"eager_ms": {"median": 8.6, "p99": 9.5, "least": 8.25, "most": 10.0},
                      "graph_ms": {"median": 4.5, "p99": 4.75, "least": 4.25, "most": 5.0}, "weights_bytes": 241000000},
        "odd": {"eager_ms": {"median": 1.5, "p99": 1.5, "least": 1.5, "most": 1.5},
                "graph_ms": null, "weights_bytes": 4}}}"#;

    #[test]
    fn models_are_found_by_their_archives() {
        let measured = pytorch::parse::<PyTorch>(MODULE, PRINTED.as_bytes()).unwrap();
        let resnet = measured.of(Path::new("/models/resnet152/model.pt2")).unwrap();
        assert_eq!((resnet.eager_ms.median, resnet.graph_ms.unwrap().p99), (8.6, 4.75));
        assert_eq!(measured.of(Path::new("/models/odd.pt2")).unwrap().graph_ms, None);
        assert_eq!(measured.of(Path::new("/models/odd/other.pt2")), None);
    }

    #[test]
    fn what_is_not_its_output_is_refused() {
        for printed in ["", "Traceback", r#"{"torch": "2.11.0", "models": {}}"#, r#"{"models": []}"#] {
            let parsed = pytorch::parse::<PyTorch>(MODULE, printed.as_bytes());
            // A GPU that is not named is none.
            assert_eq!(parsed.is_ok(), printed.contains("2.11.0"), "{printed}");
        }
    }

    #[test]
    fn facts_say_why_there_are_none() {
        let measured = pytorch::parse::<PyTorch>(MODULE, PRINTED.as_bytes()).unwrap();
        assert_eq!(facts(Some(&measured)), json!({"torch": "2.11.0+cu130", "gpu": "NVIDIA H200"}));
        assert_eq!(facts(None), json!("left out: no --python"));
    }

    #[test]
    fn a_python_that_fails_is_named() {
        let served = Served { device: pswitch_device::DeviceId::Host(0), threads: 1 };
        let error = |python| PyTorch::measure(Path::new(python), served, &[]).unwrap_err().to_string();
        assert_eq!(error("/nowhere/python"), "cannot start /nowhere/python");
        assert!(error("false").starts_with("false -m pswitch.ready_latency failed"), "{}", error("false"));
    }
}
