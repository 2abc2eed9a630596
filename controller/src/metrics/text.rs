//! The metrics as Prometheus reads them (text exposition format 0.0.4).

use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};

use super::histogram::Histogram;
use super::{Metrics, ModelMetrics};
use crate::service::{ErrorClass, ServiceSnapshot, TaskStatus};

type Histograms<'a> = (&'static str, &'static str, fn(&'a ModelMetrics) -> &'a Histogram);

impl Metrics {
    /// Every metric of the server as Prometheus text.
    #[must_use]
    pub fn prometheus(&self, snapshot: &ServiceSnapshot, tasks: &[TaskStatus]) -> String {
        let mut page = Page::default();
        page.family("pswitch_build_info", "gauge", "Version of the server.");
        page.sample("pswitch_build_info", &[("version", env!("CARGO_PKG_VERSION"))], 1);
        self.write_requests(&mut page);
        write_snapshot(&mut page, snapshot);
        write_training(&mut page, tasks);
        page.text
    }

    fn write_requests(&self, page: &mut Page) {
        let models = self.all_models();
        page.family("pswitch_connections", "gauge", "Open connections of clients.");
        page.sample("pswitch_connections", &[], self.connections.load(Ordering::Relaxed));
        page.family("pswitch_requests_in_flight", "gauge", "Inference requests without an answer yet.");
        page.sample("pswitch_requests_in_flight", &[], self.in_flight.load(Ordering::Relaxed));

        page.family("pswitch_requests_total", "counter", "Inference requests by outcome.");
        for (name, model) in &models {
            let mut outcome = |outcome: &str, count: &AtomicU64| {
                let labels = [("model", name.as_str()), ("outcome", outcome)];
                page.sample("pswitch_requests_total", &labels, count.load(Ordering::Relaxed));
            };
            outcome("success", &model.succeeded);
            for (class, count) in ErrorClass::ALL.iter().zip(&model.failed) {
                outcome(class.name(), count);
            }
        }
        page.family("pswitch_inferences_total", "counter", "Inferences: requests times their batch size.");
        for (name, model) in &models {
            page.model("pswitch_inferences_total", name, model.inferences.load(Ordering::Relaxed));
        }
        page.family("pswitch_input_bytes_total", "counter", "Tensor data of successful requests, in.");
        for (name, model) in &models {
            page.model("pswitch_input_bytes_total", name, model.input_bytes.load(Ordering::Relaxed));
        }
        page.family("pswitch_output_bytes_total", "counter", "Tensor data of successful requests, out.");
        for (name, model) in &models {
            page.model("pswitch_output_bytes_total", name, model.output_bytes.load(Ordering::Relaxed));
        }

        let histograms: [Histograms<'_>; 5] = [
            ("pswitch_request_seconds", "From a request's head to its response.", |model| &model.total),
            ("pswitch_queue_seconds", "Waiting for a turn.", |model| &model.queue),
            ("pswitch_switch_seconds", "Switching to the model, where weights had to move.", |model| {
                &model.switch
            }),
            ("pswitch_compute_seconds", "Computing.", |model| &model.compute),
            ("pswitch_front_end_seconds", "All the rest: receiving, decoding, encoding.", |model| {
                &model.front_end
            }),
        ];
        for (family, help, histogram) in histograms {
            page.family(family, "histogram", help);
            for (name, model) in &models {
                page.histogram(family, name, histogram(model));
            }
        }
    }
}

fn write_snapshot(page: &mut Page, snapshot: &ServiceSnapshot) {
    page.family("pswitch_queued_requests", "gauge", "Requests waiting for their turn.");
    for model in &snapshot.models {
        page.model("pswitch_queued_requests", &model.name, model.queued);
    }
    page.family("pswitch_model_resident", "gauge", "Whether the model's weights are in the pool.");
    for model in &snapshot.models {
        page.model("pswitch_model_resident", &model.name, u64::from(model.resident));
    }
    page.family("pswitch_model_span_bytes", "gauge", "Bytes of the model's span.");
    for model in &snapshot.models {
        page.model("pswitch_model_span_bytes", &model.name, model.span_bytes);
    }
    page.family("pswitch_model_evictions_total", "counter", "Times the model's weights were evicted.");
    for model in &snapshot.models {
        page.model("pswitch_model_evictions_total", &model.name, model.evictions);
    }
    page.family("pswitch_workers", "gauge", "Workers by state.");
    for (state, count) in &snapshot.workers {
        page.sample("pswitch_workers", &[("state", state)], *count);
    }
    let totals = [
        ("pswitch_worker_restarts_total", "counter", "Workers lost and replaced.", snapshot.worker_restarts),
        ("pswitch_pool_bytes", "gauge", "Bytes of the pool.", snapshot.pool_bytes),
        ("pswitch_pool_resident_bytes", "gauge", "Bytes of resident weights.", snapshot.pool_resident_bytes),
        ("pswitch_slot_bytes", "gauge", "Bytes of the slot memory.", snapshot.slot_bytes),
        ("pswitch_slot_in_use_bytes", "gauge", "Bytes that requests hold of it.", snapshot.slot_in_use_bytes),
        (
            "pswitch_transferred_bytes_total",
            "counter",
            "Bytes of weights copied to the device.",
            snapshot.transferred_bytes,
        ),
        (
            "pswitch_device_free_bytes",
            "gauge",
            "Bytes of device memory that no process has allocated.",
            snapshot.device_free_bytes,
        ),
        (
            "pswitch_outside_pool_bytes",
            "gauge",
            "Bytes of device memory that workers have beside the pool and their contexts.",
            snapshot.outside_bytes,
        ),
        (
            "pswitch_outside_pool_allocations",
            "gauge",
            "Allocations outside of the pool that the workers that live have made.",
            snapshot.outside_allocations,
        ),
        ("pswitch_graphs", "gauge", "Graphs that the workers that live have captured.", snapshot.graphs),
    ];
    for (family, kind, help, value) in totals {
        page.family(family, kind, help);
        page.sample(family, &[], value);
    }
}

/// Nothing where nothing was ever trained.
fn write_training(page: &mut Page, tasks: &[TaskStatus]) {
    if tasks.is_empty() {
        return;
    }
    page.family("pswitch_training_task", "gauge", "Training tasks, by their state.");
    for task in tasks {
        page.sample("pswitch_training_task", &[("task", &task.name), ("state", task.state.name())], 1);
    }
    type Counter = (&'static str, &'static str, fn(&TaskStatus) -> u64);
    let counters: [Counter; 6] = [
        ("pswitch_training_steps_total", "Steps computed, those included that were done again.", |task| {
            task.progress.steps_computed
        }),
        ("pswitch_training_interruptions_total", "Times that a task had to wait.", |task| {
            task.progress.interruptions
        }),
        ("pswitch_training_computing_microseconds_total", "Time in steps that were finished.", |task| {
            task.progress.computing_us
        }),
        ("pswitch_training_discarded_microseconds_total", "Time in steps that were thrown away.", |task| {
            task.progress.discarded_us
        }),
        ("pswitch_training_paused_microseconds_total", "Time in which a task had to wait.", |task| {
            task.progress.paused_us
        }),
        ("pswitch_training_made_room_total", "Times that a task's state made room for a model.", |task| {
            task.made_room
        }),
    ];
    for (family, help, of) in counters {
        page.family(family, "counter", help);
        for task in tasks {
            page.sample(family, &[("task", &task.name)], of(task));
        }
    }
}

#[derive(Default)]
struct Page {
    text: String,
}

impl Page {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        self.push(format_args!("# HELP {name} {help}\n# TYPE {name} {kind}\n"));
    }

    fn model(&mut self, name: &str, model: &str, value: u64) {
        self.sample(name, &[("model", model)], value);
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: u64) {
        self.text.push_str(name);
        self.labels(labels);
        self.push(format_args!(" {value}\n"));
    }

    fn histogram(&mut self, name: &str, model: &str, histogram: &Histogram) {
        let mut count = 0;
        for (bound, below) in histogram.cumulative() {
            let bound = if bound.is_finite() { bound.to_string() } else { "+Inf".to_owned() };
            self.sample(&format!("{name}_bucket"), &[("model", model), ("le", &bound)], below);
            count = below;
        }
        let sum_ns = histogram.sum_ns();
        self.push(format_args!("{name}_sum"));
        self.labels(&[("model", model)]);
        self.push(format_args!(" {}.{:09}\n", sum_ns / 1_000_000_000, sum_ns % 1_000_000_000));
        // Of the same reading as the buckets, so that the two agree.
        self.sample(&format!("{name}_count"), &[("model", model)], count);
    }

    fn labels(&mut self, labels: &[(&str, &str)]) {
        for (index, (name, value)) in labels.iter().enumerate() {
            self.text.push(if index == 0 { '{' } else { ',' });
            self.push(format_args!("{name}=\""));
            for character in value.chars() {
                match character {
                    '\\' => self.text.push_str("\\\\"),
                    '"' => self.text.push_str("\\\""),
                    '\n' => self.text.push_str("\\n"),
                    other => self.text.push(other),
                }
            }
            self.text.push('"');
        }
        if !labels.is_empty() {
            self.text.push('}');
        }
    }

    fn push(&mut self, arguments: std::fmt::Arguments<'_>) {
        // Writing to a String cannot fail.
        let _ = self.text.write_fmt(arguments);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_escaped() {
        let mut page = Page::default();
        page.model("m", "a\"b\\c\nd", 7);
        assert_eq!(page.text, "m{model=\"a\\\"b\\\\c\\nd\"} 7\n");
    }

    #[test]
    fn sums_are_exact_decimals() {
        let mut page = Page::default();
        let histogram = Histogram::default();
        histogram.observe(std::time::Duration::from_nanos(1_000_000_042));
        page.histogram("h", "m", &histogram);
        assert!(page.text.contains("h_sum{model=\"m\"} 1.000000042\n"), "{}", page.text);
        assert!(page.text.contains("h_bucket{model=\"m\",le=\"1\"} 0\n"), "{}", page.text);
        assert!(page.text.contains("h_bucket{model=\"m\",le=\"+Inf\"} 1\n"), "{}", page.text);
    }
}
