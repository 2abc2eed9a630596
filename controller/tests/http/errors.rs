//! What is wrong with requests, and what goes wrong behind them.

use pswitch_controller::HttpOptions;
use serde_json::{Value, json};

use crate::harness::Server;

fn input() -> Value {
    json!({"name": "x", "shape": [1], "datatype": "FP32", "data": [1]})
}

#[test]
fn every_failure_of_the_service_has_its_status() {
    let server = Server::start();
    let mut client = server.client();
    for (model, status, message) in [
        ("fails", 500, "model 'fails' failed: index 7 is out of range"),
        ("full", 429, "64 requests wait already, the limit is 64"),
        ("draining", 503, "the server is shutting down"),
        ("loses-worker", 503, "lost 2 worker(s) in the middle of this request: killed by signal 9"),
        ("late", 504, "the request's deadline passed after 1.500 ms"),
        ("stopped", 504, "the execution was stopped after 30000.000 ms, the server's limit"),
        ("cancelled", 503, "the request was cancelled"),
        ("untransferable", 500, "moving the weights of model 'untransferable' failed: link down"),
        ("internal", 500, "internal error: a bug"),
        ("broken", 503, "model 'broken' is not ready: operator 'custom::op' is not known"),
        ("nope", 404, "unknown model 'nope'"),
    ] {
        let response = client.infer(model, &json!({"inputs": [input()]}));
        assert_eq!(response.error(status), message);
        assert_eq!(response.header("retry-after"), (status == 429).then_some("1"));
    }
    let error = client.infer("lies", &json!({"inputs": [input()]})).error(500);
    assert_eq!(error, "internal error: output 'y' of datatype FP32 and shape [1] came with 3 bytes");
    server.wait_until_free();
}

#[test]
fn requests_that_are_not_the_protocols_are_told_where() {
    let server = Server::start();
    let mut client = server.client();
    let mut error = |body: &str| client.post("/v2/models/echo-fp32/infer", &[], body.as_bytes()).error(400);
    let prefix = "not an inference request in JSON: ";
    assert_eq!(error(""), format!("{prefix}EOF while parsing a value at line 1 column 0"));
    assert_eq!(error("{}"), format!("{prefix}missing field `inputs` at line 1 column 2"));
    assert!(error("[]").starts_with(prefix));
    assert!(error("nonsense").starts_with(prefix));
    assert!(error(r#"{"inputs": 5}"#).contains("invalid type: integer `5`, expected a sequence"));
    assert!(error(r#"{"inputs": [{}]}"#).contains("missing field `name`"));
    assert!(error(r#"{"inputs": [], "inputs": []}"#).contains("duplicate field `inputs`"));
    assert!(error(r#"{"inputs": [], "id": 7}"#).contains("expected a string"));
    assert!(error(r#"{"inputs": []} trailing"#).contains("trailing characters"));
    assert!(error(r#"{"inputs": [{"name": "x", "data": [NaN]}]}"#).starts_with(prefix));
}

#[test]
fn tensors_that_do_not_fit_are_named() {
    let server = Server::start();
    let mut client = server.client();
    let mut error = |change: &dyn Fn(&mut Value)| {
        let mut request = json!({"inputs": [input()]});
        change(&mut request);
        client.infer("echo-fp32", &request).error(400)
    };
    let x = "input 'x': ";
    assert_eq!(
        error(&|r| r["inputs"][0]["name"] = json!("z")),
        "input 'z': the model has no such input; its inputs are 'x'"
    );
    assert_eq!(
        error(&|r| r["inputs"] = json!([])),
        format!("{x}missing; the request has 0 input(s), the model takes 1: 'x'")
    );
    assert_eq!(error(&|r| r["inputs"] = json!([input(), input()])), format!("{x}given more than once"));
    assert_eq!(
        error(&|r| r["inputs"][0]["datatype"] = json!("INT64")),
        format!("{x}expected datatype FP32, found INT64")
    );
    assert!(
        error(&|r| r["inputs"][0]["datatype"] = json!("FP8"))
            .starts_with("input 'x': unknown datatype 'FP8', expected one of BOOL, ")
    );
    assert!(
        error(&|r| r["inputs"][0]["datatype"] = json!("BYTES"))
            .starts_with("input 'x': datatype BYTES is not supported")
    );
    let shape = "'shape' must be a list of unsigned 64-bit integers, found ";
    assert_eq!(error(&|r| r["inputs"][0]["shape"] = json!([-1])), format!("{x}{shape}[-1]"));
    assert_eq!(error(&|r| r["inputs"][0]["shape"] = json!([1.5])), format!("{x}{shape}[1.5]"));
    assert_eq!(error(&|r| r["inputs"][0]["shape"] = json!("1")), format!("{x}{shape}\"1\""));
    assert_eq!(
        error(&|r| r["inputs"][0]["shape"] = json!([1, 1])),
        format!("{x}expected 1 dimension(s), shape [0..], found 2 with shape [1, 1]")
    );
    assert_eq!(
        error(&|r| r["inputs"][0]["shape"] = json!([u64::MAX, 8])),
        format!("{x}shape [18446744073709551615, 8] has more elements than 64 bits count")
    );
    for field in ["shape", "datatype"] {
        let without = |r: &mut Value| {
            r["inputs"][0].as_object_mut().unwrap().remove(field);
        };
        assert_eq!(error(&without), format!("{x}'{field}' is missing"));
    }
    let without = |r: &mut Value| {
        r["inputs"][0].as_object_mut().unwrap().remove("data");
    };
    assert_eq!(
        error(&without),
        format!("{x}has no data: expected 'data' or the parameter 'binary_data_size'")
    );
    let size =
        |size: Value| move |r: &mut Value| r["inputs"][0]["parameters"] = json!({"binary_data_size": size});
    assert_eq!(error(&size(json!(4))), format!("{x}has both 'data' and the parameter 'binary_data_size'"));
    let region = |r: &mut Value| r["inputs"][0]["parameters"] = json!({"shared_memory_region": "r"});
    assert_eq!(error(&region), format!("{x}this server does not support the shared memory extension"));
}

#[test]
fn outputs_and_parameters_that_do_not_fit_are_named() {
    let server = Server::start();
    let mut client = server.client();
    let mut error = |field: &str, value: Value| {
        let mut request = json!({"inputs": [input()]});
        request[field] = value;
        client.infer("echo-fp32", &request).error(400)
    };
    assert_eq!(
        error("outputs", json!([{"name": "z"}])),
        "output 'z': the model has no such output; its outputs are 'y'"
    );
    assert_eq!(
        error("outputs", json!([{"name": "y"}, {"name": "y"}])),
        "output 'y': asked for more than once"
    );
    assert_eq!(
        error("outputs", json!([{"name": "y", "parameters": {"binary_data": 1}}])),
        "output 'y': parameter 'binary_data' must be true or false, found 1"
    );
    assert_eq!(
        error("outputs", json!([{"name": "y", "parameters": {"classification": 3}}])),
        "output 'y': this server does not support the classification extension"
    );
    assert_eq!(
        error("outputs", json!([{"name": "y", "parameters": {"shared_memory_region": "r"}}])),
        "output 'y': this server does not support the shared memory extension"
    );
    assert_eq!(
        error("parameters", json!({"timeout": -5})),
        "parameter 'timeout' must be a number of microseconds, found -5"
    );
    assert_eq!(
        error("parameters", json!({"binary_data_output": "yes"})),
        "parameter 'binary_data_output' must be true or false, found \"yes\""
    );
}

#[test]
fn a_timeout_becomes_the_deadline() {
    let server = Server::start();
    let request = json!({"inputs": [input()], "parameters": {"timeout": 20_000}});
    let begun = std::time::Instant::now();
    let error = server.client().infer("hangs", &request).error(504);
    assert!(error.starts_with("the request's deadline passed after"), "{error}");
    assert!(begun.elapsed() >= std::time::Duration::from_millis(19));
    server.wait_until_free();
}

#[test]
fn sizes_over_the_limits_are_told_with_numbers() {
    let options = HttpOptions { max_body_bytes: 1000, max_json_bytes: 500, ..HttpOptions::default() };
    let server = Server::with_options(options);
    let mut client = server.client();
    let error = client.post("/v2/models/echo-fp32/infer", &[], &[b' '; 1001]).error(413);
    assert_eq!(error, "a request's body of 1001 bytes exceeds the limit of 1000 bytes");
    // The connection goes on: the body was read to its end.
    let error = client.post("/v2/models/echo-fp32/infer", &[], &[b' '; 501]).error(413);
    assert_eq!(error, "JSON of 501 bytes exceeds the limit of 500 bytes");
    let header = [("Inference-Header-Content-Length", "600")];
    let error = client.post("/v2/models/echo-fp32/infer", &header, &[b' '; 700]).error(413);
    assert_eq!(error, "JSON of 600 bytes exceeds the limit of 500 bytes");

    let chunked = "POST /v2/models/echo-fp32/infer HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n";
    let chunk = format!("200\r\n{}\r\n", " ".repeat(0x200));
    client.send(format!("{chunked}{chunk}{chunk}0\r\n\r\n").as_bytes()).unwrap();
    assert!(client.response().unwrap().error(413).contains("exceeds the limit of"));
    assert_eq!(client.infer("echo-fp32", &json!({"inputs": [input()]})).status, 200);
}

#[test]
fn tensors_larger_than_all_slot_memory_are_told() {
    let server = Server::start();
    let elements: u64 = 1 << 30;
    let request = json!({"inputs": [{"name": "x", "shape": [elements], "datatype": "FP32", "data": [1]}]});
    let error = server.client().infer("echo-fp32", &request).error(413);
    assert!(error.ends_with("bytes exceeds the limit of 67108864 bytes"), "{error}");
}

#[test]
fn slot_memory_that_is_taken_is_busy_not_wrong() {
    let server = Server::start();
    let elements = 10 << 20;
    let mut holder = server.client();
    let hold = json!({"inputs": [{
        "name": "x", "shape": [elements], "datatype": "FP32", "parameters": {"binary_data_size": elements * 4},
    }]});
    let head = hold.to_string();
    let post = format!(
        "POST /v2/models/echo-fp32/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\
         Inference-Header-Content-Length: {}\r\n\r\n{head}",
        head.len() + elements * 4,
        head.len()
    );
    holder.send(post.as_bytes()).unwrap();
    server.wait_until_held();
    let response = server.client().infer_binary("echo-fp32", &hold, &vec![0; elements * 4]);
    let error = response.error(429);
    assert!(error.starts_with("no room for 42074112 bytes of tensors now: "), "{error}");
    assert_eq!(response.header("retry-after"), Some("1"));
    drop(holder);
    server.wait_until_free();
}

#[test]
fn memory_for_json_is_bounded_over_all_requests() {
    let options =
        HttpOptions { max_json_bytes: 64 << 10, json_memory_bytes: 100 << 10, ..HttpOptions::default() };
    let server = Server::with_options(options);
    let mut holder = server.client();
    let head = "POST /v2/models/echo-fp32/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 65536\r\n\r\n{";
    holder.send(head.as_bytes()).unwrap();
    let mut client = server.client();
    while !String::from_utf8(client.get("/metrics").body).unwrap().contains("pswitch_requests_in_flight 1\n")
    {
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    // The head was read; so will be what came with it.
    std::thread::sleep(std::time::Duration::from_millis(20));
    let response = client.post("/v2/models/echo-fp32/infer", &[], &[b' '; 65536]);
    let error = response.error(429);
    assert_eq!(error, "no room for 65536 bytes of JSON now: other requests hold 65536 of 102400 bytes");
    assert_eq!(client.infer("echo-fp32", &json!({"inputs": [input()]})).status, 200);
}

#[test]
fn compressed_bodies_are_refused() {
    let server = Server::start();
    let headers = [("Content-Encoding", "gzip")];
    let error = server.client().post("/v2/models/echo-fp32/infer", &headers, b"\x1f\x8b").error(415);
    assert_eq!(error, "compressed bodies are not supported, found Content-Encoding \"gzip\"");
    let headers = [("Content-Encoding", "identity")];
    let body = json!({"inputs": [input()]}).to_string();
    assert_eq!(server.client().post("/v2/models/echo-fp32/infer", &headers, body.as_bytes()).status, 200);
}
