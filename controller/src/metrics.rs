//! What the server counts about its requests, and how it tells: Prometheus text and the protocol's statistics.
//!
//! Front ends open a [`RequestRecord`] for every inference request and close it with its outcome; one that is
//! dropped unclosed counts as cancelled. The numbers that only the service knows (queue, workers, pool) come from
//! [`InferenceService::snapshot`](crate::InferenceService::snapshot) whenever the metrics are read.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::service::{ErrorClass, Timings};

mod histogram;
mod statistics;
mod text;

use histogram::Histogram;
pub(crate) use statistics::StatisticsReport;

/// Label of requests that failed before their model was known. Names from URLs never become labels: a client could
/// make up any number of them.
const UNKNOWN_MODEL: &str = "";

/// Batch sizes that the statistics tell apart; requests of further sizes count only in the totals.
const MAX_BATCH_SIZES: usize = 64;

/// All counters of a server.
#[derive(Debug, Default)]
pub struct Metrics {
    models: RwLock<BTreeMap<String, Arc<ModelMetrics>>>,
    in_flight: AtomicU64,
    connections: AtomicU64,
}

impl Metrics {
    /// Counters that stand at zero.
    #[must_use]
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Opens the record of an inference request that has just arrived.
    #[must_use]
    pub fn begin(self: &Arc<Self>) -> RequestRecord {
        self.in_flight.fetch_add(1, Ordering::Relaxed);
        RequestRecord { metrics: Arc::clone(self), model: None, begun: Instant::now(), closed: false }
    }

    /// Counts a connection of a client until the guard is dropped.
    #[must_use]
    pub fn connection(self: &Arc<Self>) -> ConnectionRecord {
        self.connections.fetch_add(1, Ordering::Relaxed);
        ConnectionRecord { metrics: Arc::clone(self) }
    }

    fn model(&self, name: &str) -> Arc<ModelMetrics> {
        // The map only ever grows by whole entries, so a panic under the lock leaves it usable.
        if let Some(found) = self.models.read().unwrap_or_else(PoisonError::into_inner).get(name) {
            return Arc::clone(found);
        }
        let mut models = self.models.write().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(models.entry(name.to_owned()).or_default())
    }

    fn all_models(&self) -> Vec<(String, Arc<ModelMetrics>)> {
        let models = self.models.read().unwrap_or_else(PoisonError::into_inner);
        models.iter().map(|(name, model)| (name.clone(), Arc::clone(model))).collect()
    }
}

/// What is counted for one model.
#[derive(Debug, Default)]
struct ModelMetrics {
    succeeded: AtomicU64,
    failed: [AtomicU64; ErrorClass::ALL.len()],
    failed_ns: AtomicU64,
    total: Histogram,
    queue: Histogram,
    switch: Histogram,
    compute: Histogram,
    front_end: Histogram,
    encode_ns: AtomicU64,
    input_bytes: AtomicU64,
    output_bytes: AtomicU64,
    inferences: AtomicU64,
    last_inference_ms: AtomicU64,
    batches: Mutex<BTreeMap<u64, BatchCount>>,
}

/// Executions of one batch size.
#[derive(Debug, Default, Clone, Copy)]
struct BatchCount {
    count: u64,
    switch_ns: u64,
    compute_ns: u64,
    encode_ns: u64,
}

/// What a front end tells about a request that succeeded.
#[derive(Debug, Clone, Copy)]
pub struct Completion {
    /// What the service said.
    pub timings: Timings,
    /// Bytes of tensor data that went in.
    pub input_bytes: u64,
    /// Bytes of tensor data that went out.
    pub output_bytes: u64,
    /// Inferences in the request: the extent of its batch dimension.
    pub batch: u64,
    /// Time to turn the outputs into a response.
    pub encode: Duration,
}

/// The record of one inference request, from its arrival to its response.
#[derive(Debug)]
pub struct RequestRecord {
    metrics: Arc<Metrics>,
    model: Option<Arc<ModelMetrics>>,
    begun: Instant,
    closed: bool,
}

impl RequestRecord {
    /// The request is for this model, which exists.
    pub fn model(&mut self, name: &str) {
        self.model = Some(self.metrics.model(name));
    }

    /// When the request arrived.
    #[must_use]
    pub fn begun(&self) -> Instant {
        self.begun
    }

    /// The request is answered with outputs.
    pub fn complete(mut self, completion: &Completion) {
        self.closed = true;
        let model = self.counted();
        let total = self.begun.elapsed();
        let Completion { timings, input_bytes, output_bytes, batch, encode } = *completion;
        model.succeeded.fetch_add(1, Ordering::Relaxed);
        model.total.observe(total);
        model.queue.observe(timings.queue);
        if timings.switched {
            model.switch.observe(timings.switch);
        }
        model.compute.observe(timings.compute);
        let served = timings.queue + timings.switch + timings.compute;
        model.front_end.observe(total.saturating_sub(served));
        model.encode_ns.fetch_add(nanoseconds(encode), Ordering::Relaxed);
        model.input_bytes.fetch_add(input_bytes, Ordering::Relaxed);
        model.output_bytes.fetch_add(output_bytes, Ordering::Relaxed);
        model.inferences.fetch_add(batch, Ordering::Relaxed);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let now_ms = u64::try_from(now.as_millis()).unwrap_or(u64::MAX);
        model.last_inference_ms.fetch_max(now_ms, Ordering::Relaxed);

        let mut batches = model.batches.lock().unwrap_or_else(PoisonError::into_inner);
        if batches.len() < MAX_BATCH_SIZES || batches.contains_key(&batch) {
            let counted = batches.entry(batch).or_default();
            counted.count += 1;
            counted.switch_ns += nanoseconds(timings.switch);
            counted.compute_ns += nanoseconds(timings.compute);
            counted.encode_ns += nanoseconds(encode);
        }
    }

    /// The request is answered with an error.
    pub fn fail(mut self, class: ErrorClass) {
        self.close_failed(class);
    }

    fn close_failed(&mut self, class: ErrorClass) {
        self.closed = true;
        let model = self.counted();
        if let Some(index) = ErrorClass::ALL.iter().position(|known| *known == class) {
            model.failed[index].fetch_add(1, Ordering::Relaxed);
        }
        model.failed_ns.fetch_add(nanoseconds(self.begun.elapsed()), Ordering::Relaxed);
    }

    fn counted(&self) -> Arc<ModelMetrics> {
        self.model.clone().unwrap_or_else(|| self.metrics.model(UNKNOWN_MODEL))
    }
}

impl Drop for RequestRecord {
    fn drop(&mut self) {
        if !self.closed {
            self.close_failed(ErrorClass::Cancelled);
        }
        self.metrics.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}

/// An open connection.
#[derive(Debug)]
pub struct ConnectionRecord {
    metrics: Arc<Metrics>,
}

impl Drop for ConnectionRecord {
    fn drop(&mut self) {
        self.metrics.connections.fetch_sub(1, Ordering::Relaxed);
    }
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_dropped_unclosed_counts_as_cancelled() {
        let metrics = Metrics::new();
        let mut record = metrics.begin();
        record.model("m");
        assert_eq!(metrics.in_flight.load(Ordering::Relaxed), 1);
        drop(record);
        assert_eq!(metrics.in_flight.load(Ordering::Relaxed), 0);
        let text = metrics.prometheus(&crate::ServiceSnapshot::default(), &[]);
        assert!(text.contains("pswitch_requests_total{model=\"m\",outcome=\"cancelled\"} 1\n"), "{text}");
    }

    #[test]
    fn batch_sizes_are_bounded() {
        let metrics = Metrics::new();
        for batch in 0..1000 {
            let mut record = metrics.begin();
            record.model("m");
            record.complete(&Completion {
                timings: Timings::default(),
                input_bytes: 0,
                output_bytes: 0,
                batch,
                encode: Duration::ZERO,
            });
        }
        let model = metrics.model("m");
        assert_eq!(model.batches.lock().unwrap().len(), MAX_BATCH_SIZES);
        assert_eq!(model.succeeded.load(Ordering::Relaxed), 1000);
    }
}
