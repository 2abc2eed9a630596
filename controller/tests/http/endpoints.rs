//! Every endpoint but inference.

use serde_json::{Value, json};

use crate::harness::Server;

#[test]
fn server_metadata_names_the_extensions() {
    let server = Server::start();
    let response = server.client().get("/v2");
    assert_eq!(response.status, 200);
    let body = response.json();
    assert_eq!(body["name"], "pswitch");
    assert_eq!(body["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(
        body["extensions"],
        json!(["binary_tensor_data", "model_repository", "parameters", "statistics", "training"])
    );
}

#[test]
fn health_probes_answer() {
    let server = Server::start();
    let mut client = server.client();
    let live = client.get("/v2/health/live");
    assert_eq!((live.status, live.json()), (200, json!({"live": true})));
    let ready = client.get("/v2/health/ready");
    assert_eq!((ready.status, ready.json()), (200, json!({"live": true, "ready": true})));
}

#[test]
fn model_metadata_tells_dynamic_dimensions_and_their_range() {
    let server = Server::start();
    let expected = json!({
        "name": "add",
        "versions": ["1"],
        "platform": "fake",
        "inputs": [
            {"name": "a", "datatype": "FP32", "shape": [-1, 4], "parameters": {"shape_range": "[1..8, 4]"}},
            {"name": "b", "datatype": "FP32", "shape": [-1, 4], "parameters": {"shape_range": "[1..8, 4]"}},
        ],
        "outputs": [
            {"name": "sum", "datatype": "FP32", "shape": [-1, 4], "parameters": {"shape_range": "[1..8, 4]"}},
        ],
    });
    let mut client = server.client();
    for path in ["/v2/models/add", "/v2/models/add/versions/1"] {
        let response = client.get(path);
        assert_eq!((response.status, response.json()), (200, expected.clone()), "{path}");
    }
    let scalar = client.get("/v2/models/scalar").json();
    assert_eq!(scalar["inputs"], json!([{"name": "x", "datatype": "INT64", "shape": []}]));
}

#[test]
fn model_ready_tells_why_not() {
    let server = Server::start();
    let mut client = server.client();
    for path in ["/v2/models/add/ready", "/v2/models/add/versions/1/ready"] {
        let response = client.get(path);
        assert_eq!((response.status, response.json()), (200, json!({"name": "add", "ready": true})));
    }
    let response = client.get("/v2/models/broken/ready");
    assert_eq!(response.status, 503);
    assert_eq!(
        response.json(),
        json!({
            "name": "broken",
            "ready": false,
            "error": "model 'broken' is not ready: operator 'custom::op' is not known",
        })
    );
}

#[test]
fn the_index_lists_every_model_or_the_ready_ones() {
    let server = Server::start();
    let mut client = server.client();
    let all = client.post("/v2/repository/index", &[], b"").json();
    let find = |list: &Value, name: &str| {
        list.as_array().unwrap().iter().find(|model| model["name"] == name).cloned()
    };
    assert_eq!(
        find(&all, "add"),
        Some(json!({"name": "add", "version": "1", "state": "READY", "reason": ""}))
    );
    assert_eq!(
        find(&all, "broken"),
        Some(json!({
            "name": "broken",
            "version": "1",
            "state": "UNAVAILABLE",
            "reason": "operator 'custom::op' is not known",
        }))
    );
    assert_eq!(client.get("/v2/repository/index").json(), all);
    let ready = client.post("/v2/repository/index", &[], br#"{"ready": true}"#).json();
    assert_eq!(find(&ready, "broken"), None);
    assert_eq!(ready.as_array().unwrap().len() + 1, all.as_array().unwrap().len());
    let error = client.post("/v2/repository/index", &[], b"{").error(400);
    assert!(error.contains("not an index request in JSON"), "{error}");
}

#[test]
fn loading_goes_to_the_service_and_what_it_lacks_is_501() {
    let server = Server::start();
    let mut client = server.client();
    let loaded = client.post("/v2/repository/models/add/load", &[], b"");
    assert_eq!((loaded.status, loaded.body.len()), (200, 0));
    assert_eq!(client.post("/v2/repository/models/add/load", &[], b"{}").status, 200);
    let error = client.post("/v2/repository/models/nope/load", &[], b"").error(404);
    assert_eq!(error, "unknown model 'nope'");
    let error = client.post("/v2/repository/models/broken/load", &[], b"").error(503);
    assert!(error.contains("custom::op"), "{error}");
    let error =
        client.post("/v2/repository/models/add/load", &[], br#"{"parameters": {"config": "{}"}}"#).error(400);
    assert_eq!(error, "parameter 'config' is not supported");
    let body = br#"{"parameters": {"unload_dependents": true}}"#;
    let error = client.post("/v2/repository/models/add/unload", &[], body).error(501);
    assert_eq!(error, "this server does not support unloading model 'add'");
}

#[test]
fn statistics_count_requests_and_batches() {
    let server = Server::start();
    let mut client = server.client();
    let rows = |count: usize| json!(vec![1.5; count * 4]);
    for batch in [1, 2, 2] {
        let input =
            |name| json!({"name": name, "datatype": "FP32", "shape": [batch, 4], "data": rows(batch)});
        assert_eq!(client.infer("add", &json!({"inputs": [input("a"), input("b")]})).status, 200);
    }
    assert_eq!(client.infer("add", &json!({"inputs": []})).status, 400);
    for path in ["/v2/models/add/stats", "/v2/models/add/versions/1/stats"] {
        let stats = client.get(path).json();
        let stats = &stats["model_stats"][0];
        assert_eq!((&stats["name"], &stats["version"]), (&json!("add"), &json!("1")));
        assert_eq!((&stats["inference_count"], &stats["execution_count"]), (&json!(5), &json!(3)));
        assert!(stats["last_inference"].as_u64().unwrap() > 1_700_000_000_000);
        let phases = &stats["inference_stats"];
        assert_eq!(phases["success"]["count"], 3);
        assert!(phases["success"]["ns"].as_u64().unwrap() > 0);
        assert_eq!(phases["fail"]["count"], 1);
        assert_eq!(phases["queue"], json!({"count": 3, "ns": 9000}));
        assert_eq!(phases["compute_input"], json!({"count": 3, "ns": 15000}));
        assert_eq!(phases["compute_infer"], json!({"count": 3, "ns": 21000}));
        assert!(phases["compute_output"]["ns"].as_u64().unwrap() > 0);
        assert_eq!(phases["cache_hit"], json!({"count": 0, "ns": 0}));
        assert_eq!(stats["batch_stats"][1]["batch_size"], 2);
        assert_eq!(stats["batch_stats"][1]["compute_infer"], json!({"count": 2, "ns": 14000}));
    }
    let all = client.get("/v2/models/stats").json();
    let all = all["model_stats"].as_array().unwrap();
    assert!(
        all.len() > 10 && all.iter().any(|model| model["name"] == "add" && model["execution_count"] == 3)
    );
}

#[test]
fn what_does_not_exist_is_said_so() {
    let server = Server::start();
    let mut client = server.client();
    assert_eq!(client.get("/v2/models/nope").error(404), "unknown model 'nope'");
    assert_eq!(client.get("/v2/models/nope/ready").error(404), "unknown model 'nope'");
    assert_eq!(client.get("/v2/models/nope/stats").error(404), "unknown model 'nope'");
    assert_eq!(
        client.get("/v2/models/add/versions/7").error(404),
        "model 'add' has no version '7', only '1'"
    );
    assert_eq!(client.get("/v2/modles").error(404), "no such resource: GET /v2/modles");
    assert_eq!(client.get("/v2/models/add/infer").error(405), "/v2/models/add/infer does not take GET");
    let error = client.get("/v2/models/broken").error(503);
    assert_eq!(error, "model 'broken' is not ready: operator 'custom::op' is not known");
    assert_eq!(client.get("/v2/models/%ff").status, 400);
}
