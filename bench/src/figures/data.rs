//! The measurements of one figure.

use serde::{Deserialize, Serialize};

/// Everything that was measured for one figure; what it stands for in JSON.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Figure {
    /// As the paper numbers them, 5 to 9; 10 is ours.
    pub(crate) number: u8,
    /// Latencies by model and mechanism: figures 5, 7, 8 and 9.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) bars: Vec<Bar>,
    /// Throughput and latency by scheduling cycle: figure 6.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) cycles: Vec<Cycle>,
    /// Many models under a load: figure 10.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) loads: Vec<Load>,
    /// What could not be measured, and why.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) left_out: Vec<LeftOut>,
}

impl Figure {
    /// The figure that a command's results are; none of commands that measure something else.
    pub(crate) fn of(results: &serde_json::Value) -> Option<Self> {
        Self::deserialize(results).ok()
    }
}

/// One bar: a mechanism that answered requests for a model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Bar {
    pub(crate) model: String,
    /// The mechanism or variant, as the flags name it: `ready`, `pswitch`, `mps`, `stop-and-start`, `per-layer` ...; rows
    /// of PyTorch itself begin with `pytorch-`.
    pub(crate) mechanism: String,
    /// Latencies as a client of the front end saw them, in the order of the requests, warm-up left out; milliseconds.
    pub(crate) latencies_ms: Vec<f64>,
    /// Medians of what the server says of the same requests; none for rows that have no server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) parts: Option<Parts>,
}

/// Where the time of a request went, as the server tells it; milliseconds, medians.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Parts {
    /// Waiting for its turn.
    pub(crate) queue_ms: f64,
    /// Training computed on after the request had come; none without training.
    pub(crate) stop_ms: f64,
    /// From the decision until the first layer could compute: copies, processes, initialisation.
    pub(crate) switch_ms: f64,
    /// From there to the outputs.
    pub(crate) compute_ms: f64,
    /// What is left of the client's latency: the front end, both ways.
    pub(crate) reply_ms: f64,
}

/// One length of a scheduling cycle: training and inference take turns of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Cycle {
    pub(crate) mechanism: String,
    pub(crate) model: String,
    pub(crate) cycle_s: f64,
    /// Batches answered within each interval of inference, a second.
    pub(crate) batches_per_s: Vec<f64>,
    /// Latencies of all requests that were answered within their interval; milliseconds.
    pub(crate) latencies_ms: Vec<f64>,
    /// Training steps in each interval of training, a second; none where nothing trains.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) steps_per_s: Vec<f64>,
}

/// One load on many models.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Load {
    /// `pswitch`, or `load-on-demand`: least recently used models make room, and nothing is pipelined.
    pub(crate) mechanism: String,
    /// `poisson` or `bursty`.
    pub(crate) arrivals: String,
    /// How many models are served.
    pub(crate) models: usize,
    /// All their weights over the room that the pool has for weights.
    pub(crate) oversubscription: f64,
    /// Requests a second that were sent.
    pub(crate) requests_per_s: f64,
    /// From the moment at which a request was to be sent to its answer; milliseconds.
    pub(crate) latencies_ms: Vec<f64>,
    /// What a request may take; the share of those that took no more is worked out from `latencies_ms`.
    pub(crate) slo_ms: f64,
    /// Requests that were refused.
    pub(crate) refused: usize,
    /// Requests that found their model elsewhere.
    pub(crate) switches: usize,
    /// Training steps a second meanwhile, over those without requests.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) training_kept: Option<f64>,
}

impl Load {
    /// The share of all requests that were answered within the SLO: those that were refused were not. None without any.
    pub(crate) fn within_slo(&self) -> Option<f64> {
        let sent = self.latencies_ms.len() + self.refused;
        let within = self.latencies_ms.iter().filter(|latency| **latency <= self.slo_ms).count();
        // Counts of some thousands.
        #[allow(clippy::cast_precision_loss)]
        let share = within as f64 / sent as f64;
        (sent > 0).then_some(share)
    }
}

/// A mechanism that this machine cannot run, or that failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct LeftOut {
    pub(crate) mechanism: String,
    /// Where only for one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) model: Option<String>,
    pub(crate) reason: String,
}
