//! Prometheus text: well-formed, right, and nothing in it that nobody sets.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::json;

use crate::harness::Server;

fn scrape(server: &Server) -> String {
    let response = server.client().get("/metrics");
    assert_eq!(response.status, 200);
    assert_eq!(response.header("content-type"), Some("text/plain; version=0.0.4"));
    String::from_utf8(response.body).unwrap()
}

fn one_of_each(server: &Server) {
    let mut client = server.client();
    let good = json!({"inputs": [{"name": "x", "shape": [2], "datatype": "FP32", "data": [1, 2]}]});
    assert_eq!(client.infer("echo-fp32", &good).status, 200);
    for model in ["fails", "full", "draining", "late", "cancelled", "internal", "nope"] {
        assert!(client.infer(model, &good).status >= 400);
    }
    assert_eq!(client.infer("echo-fp32", &json!({"inputs": []})).status, 400);
    let large = json!({"inputs": [{"name": "x", "shape": [1u64 << 40], "datatype": "FP32", "data": []}]});
    assert_eq!(client.infer("echo-fp32", &large).status, 413);
}

#[test]
fn every_metric_is_set_by_somebody() {
    let server = Server::start();
    one_of_each(&server);
    let mut hanging = server.client();
    let body = r#"{"inputs":[{"name":"x","shape":[1],"datatype":"FP32","data":[1]}]}"#;
    let head = format!(
        "POST /v2/models/hangs/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    hanging.send(head.as_bytes()).unwrap();
    server.wait_until_held();

    let text = scrape(&server);
    let families: BTreeSet<&str> =
        text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next()).collect();
    assert!(families.len() > 15, "{families:?}");
    let mut unset = families.clone();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let (name, value) = line.rsplit_once(' ').unwrap();
        let name = name.split('{').next().unwrap();
        let value: f64 = value.parse().unwrap();
        let family = ["_bucket", "_sum", "_count"].iter().find_map(|suffix| name.strip_suffix(suffix));
        let family = family.filter(|family| families.contains(family)).unwrap_or(name);
        assert!(families.contains(family), "{line} belongs to no family");
        if value > 0.0 {
            unset.remove(family);
        }
    }
    assert!(unset.is_empty(), "nothing sets {unset:?}\n{text}");
}

#[test]
fn outcomes_are_counted_by_model_and_class() {
    let server = Server::start();
    one_of_each(&server);
    let text = scrape(&server);
    for (model, outcome) in [
        ("echo-fp32", "success"),
        ("echo-fp32", "invalid_request"),
        ("echo-fp32", "too_large"),
        ("fails", "execution_failed"),
        ("full", "busy"),
        ("draining", "unavailable"),
        ("late", "deadline"),
        ("cancelled", "cancelled"),
        ("internal", "internal"),
        // Names that clients make up never become labels.
        ("", "not_found"),
    ] {
        let line = format!("pswitch_requests_total{{model=\"{model}\",outcome=\"{outcome}\"}} 1\n");
        assert!(text.contains(&line), "{line}{text}");
    }
    assert!(!text.contains("nope"), "{text}");
    assert!(text.contains("pswitch_input_bytes_total{model=\"echo-fp32\"} 8\n"), "{text}");
    assert!(text.contains("pswitch_queue_seconds_sum{model=\"echo-fp32\"} 0.000003000\n"), "{text}");
    assert!(text.contains("pswitch_workers{state=\"standby\"} 1\n"), "{text}");
}

#[test]
fn histograms_hold_together() {
    let server = Server::start();
    for _ in 0..3 {
        one_of_each(&server);
    }
    let text = scrape(&server);
    let mut buckets: BTreeMap<&str, Vec<u64>> = BTreeMap::new();
    for line in text.lines().filter(|line| line.contains("_bucket{model=\"echo-fp32\"")) {
        let (name, value) = line.rsplit_once(' ').unwrap();
        buckets.entry(name.split("_bucket").next().unwrap()).or_default().push(value.parse().unwrap());
    }
    assert_eq!(buckets.len(), 5);
    for (family, counts) in buckets {
        assert!(counts.is_sorted(), "{family}: {counts:?}");
        assert_eq!(counts.last(), Some(&3), "{family}: {counts:?}");
        assert!(text.contains(&format!("{family}_count{{model=\"echo-fp32\"}} 3\n")), "{family}");
    }
}
