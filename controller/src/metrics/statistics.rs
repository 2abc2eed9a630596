//! The metrics as the protocol's statistics extension tells them.
//!
//! Its phases are those of a server that copies inputs and outputs; ours map onto them like this: `compute_input` is
//! the switch, `compute_infer` the computation, `compute_output` the building of the response.

use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use serde::Serialize;

use super::Metrics;

#[derive(Debug, Serialize)]
pub(crate) struct StatisticsReport {
    pub(crate) model_stats: Vec<ModelStatistics>,
}

#[derive(Debug, Serialize)]
pub(crate) struct ModelStatistics {
    name: String,
    version: String,
    last_inference: u64,
    inference_count: u64,
    execution_count: u64,
    inference_stats: InferenceStatistics,
    batch_stats: Vec<BatchStatistics>,
}

#[derive(Debug, Serialize)]
struct InferenceStatistics {
    success: DurationStatistic,
    fail: DurationStatistic,
    queue: DurationStatistic,
    compute_input: DurationStatistic,
    compute_infer: DurationStatistic,
    compute_output: DurationStatistic,
    cache_hit: DurationStatistic,
    cache_miss: DurationStatistic,
}

#[derive(Debug, Serialize)]
struct BatchStatistics {
    batch_size: u64,
    compute_input: DurationStatistic,
    compute_infer: DurationStatistic,
    compute_output: DurationStatistic,
}

#[derive(Debug, Default, Serialize)]
struct DurationStatistic {
    count: u64,
    ns: u64,
}

impl Metrics {
    /// What was counted for a model since the server's start; zeros if nothing was.
    pub(crate) fn statistics(&self, name: &str, version: &str) -> ModelStatistics {
        let model = self.model(name);
        let succeeded = model.succeeded.load(Ordering::Relaxed);
        let phase = |ns: u64| DurationStatistic { count: succeeded, ns };
        let batches = model.batches.lock().unwrap_or_else(PoisonError::into_inner);
        let batch_stats = batches.iter().map(|(batch_size, counted)| {
            let phase = |ns| DurationStatistic { count: counted.count, ns };
            BatchStatistics {
                batch_size: *batch_size,
                compute_input: phase(counted.switch_ns),
                compute_infer: phase(counted.compute_ns),
                compute_output: phase(counted.encode_ns),
            }
        });
        ModelStatistics {
            name: name.to_owned(),
            version: version.to_owned(),
            last_inference: model.last_inference_ms.load(Ordering::Relaxed),
            inference_count: model.inferences.load(Ordering::Relaxed),
            execution_count: succeeded,
            inference_stats: InferenceStatistics {
                success: phase(model.total.sum_ns()),
                fail: DurationStatistic {
                    count: model.failed.iter().map(|count| count.load(Ordering::Relaxed)).sum(),
                    ns: model.failed_ns.load(Ordering::Relaxed),
                },
                queue: phase(model.queue.sum_ns()),
                compute_input: phase(model.switch.sum_ns()),
                compute_infer: phase(model.compute.sum_ns()),
                compute_output: phase(model.encode_ns.load(Ordering::Relaxed)),
                cache_hit: DurationStatistic::default(),
                cache_miss: DurationStatistic::default(),
            },
            batch_stats: batch_stats.collect(),
        }
    }
}
