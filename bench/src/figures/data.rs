//! The measurements of one figure.

use std::time::Duration;

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
    /// How long it took to measure, by what there was to do.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) took: Vec<Took>,
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
    /// `pswitch`, or `load-on-demand`: a model comes as a whole when its request's turn has come, nothing is pipelined, and
    /// what was used longest ago makes room.
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

/// How long something took: to bring it up, to measure it and to end it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Took {
    /// A mechanism; [`LINK`](Self::LINK), [`SERVER`](Self::SERVER) or [`PYTORCH`](Self::PYTORCH).
    pub(crate) what: String,
    /// None where it was for all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) model: Option<String>,
    pub(crate) seconds: f64,
}

impl Took {
    /// A link as slow as a model computes is found.
    pub(crate) const LINK: &str = "link";
    /// The server of pswitch and its plans comes up and ends: what is measured of it stands apart.
    pub(crate) const SERVER: &str = "server";
    /// All rows of PyTorch.
    pub(crate) const PYTORCH: &str = "pytorch";

    pub(crate) fn new(what: &str, model: Option<&str>, time: Duration) -> Self {
        Self { what: what.to_owned(), model: model.map(str::to_owned), seconds: time.as_secs_f64() }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::made_up;
    use super::*;
    use crate::machine::Machine;
    use crate::report::{Goal, Report, Table};

    fn schema() -> jsonschema::Validator {
        let schema: Value = serde_json::from_str(include_str!("../../figure.schema.json")).unwrap();
        jsonschema::validator_for(&schema).unwrap()
    }

    /// What is written of a figure.
    fn written(command: &'static str, results: Value) -> Value {
        let goals = vec![Goal::at_least("a", 1.0, "%", f64::NAN), Goal::below("b", 1.0, "", 0.5)];
        let report = Report { command, tables: vec![Table::new(["a", "b"])], goals, results };
        report.json(&Machine::here(), &["bench".to_owned(), command.to_owned()])
    }

    #[test]
    fn figures_are_as_the_schema_says_and_read_as_they_were_written() {
        let schema = schema();
        for figure in made_up::all() {
            let results = serde_json::to_value(&figure).unwrap();
            let written = written("figure5", results);
            let errors: Vec<_> = schema.iter_errors(&written).map(|error| error.to_string()).collect();
            assert!(errors.is_empty(), "{}: {errors:?}", figure.number);
            assert_eq!(Figure::of(&written["results"]), Some(figure));
        }
    }

    #[test]
    fn what_is_no_figure_is_against_the_schema() {
        let schema = schema();
        let bar = json!({"model": "m", "mechanism": "pswitch", "latencies_ms": [1.0]});
        assert!(schema.is_valid(&written("figure5", json!({"number": 5, "bars": [bar]}))));
        for results in [
            json!({}),
            json!({"number": 4, "bars": [bar]}),
            json!({"number": 6, "bars": [bar]}),
            json!({"number": 5, "bars": []}),
            json!({"number": 5, "bars": [{"model": "m", "mechanism": "pswitch"}]}),
            json!({"number": 5, "bars": [{"model": "m", "mechanism": "pswitch", "latencies_ms": [-1.0]}]}),
            json!({"number": 5, "left_out": [{"mechanism": "mps"}]}),
            json!({"number": 5, "took": [{"what": "mps", "seconds": -1.0}]}),
            json!({"number": 5, "took": [{"seconds": 1.0}]}),
            json!({"number": 5, "colour": "red"}),
        ] {
            assert!(!schema.is_valid(&written("figure5", results.clone())), "{results}");
        }
        assert!(!schema.is_valid(&written("switch", json!({"number": 5}))));
    }

    #[test]
    fn refused_requests_are_not_within_the_slo() {
        let mut load = made_up::loads().loads[0].clone();
        (load.latencies_ms, load.slo_ms, load.refused) = (vec![1.0, 2.0, 3.0], 2.0, 1);
        assert_eq!(load.within_slo(), Some(0.5));
        (load.latencies_ms, load.refused) = (Vec::new(), 0);
        assert_eq!(load.within_slo(), None);
    }
}
