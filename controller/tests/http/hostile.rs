//! Whatever comes over the wire: an answer or a closed connection, never a panic, and others are served on.

use std::cell::RefCell;
use std::sync::Once;
use std::sync::atomic::{AtomicUsize, Ordering};

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use serde_json::json;

use crate::client::Client;
use crate::harness::{Server, THREAD_NAME};

static PANICS: AtomicUsize = AtomicUsize::new(0);

/// Counts panics of servers' threads from now on.
fn watch_panics() {
    static WATCHING: Once = Once::new();
    WATCHING.call_once(|| {
        let hook = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if std::thread::current().name() == Some(THREAD_NAME) {
                PANICS.fetch_add(1, Ordering::Relaxed);
            }
            hook(info);
        }));
    });
}

fn assert_well(server: &Server) {
    assert_eq!(PANICS.load(Ordering::Relaxed), 0, "a thread of the server panicked");
    let request = json!({"inputs": [{"name": "x", "shape": [1], "datatype": "FP32", "data": [1]}]});
    assert_eq!(server.client().infer("echo-fp32", &request).status, 200);
    server.wait_until_free();
}

fn runner(cases: u32) -> TestRunner {
    TestRunner::new(Config { cases, failure_persistence: None, ..Config::default() })
}

#[test]
fn random_bytes_are_answered_or_cut_off() {
    watch_panics();
    let server = Server::start();
    let bytes = proptest::collection::vec(any::<u8>(), 1..2000);
    runner(64)
        .run(&bytes, |mut bytes| {
            let mut client = server.client();
            bytes.extend_from_slice(b"\r\n\r\n");
            // The server may close before all is sent.
            let _ = client.send(&bytes);
            drop(client);
            Ok(())
        })
        .unwrap();
    assert_well(&server);
}

#[test]
fn requests_with_bytes_changed_are_answered_or_cut_off() {
    watch_panics();
    let server = Server::start();
    let json = json!({
        "id": "1",
        "inputs": [
            {"name": "a", "shape": [1, 4], "datatype": "FP32", "data": [[1, 2, 3, 4]]},
            {"name": "b", "shape": [1, 4], "datatype": "FP32", "parameters": {"binary_data_size": 16}},
        ],
        "outputs": [{"name": "sum", "parameters": {"binary_data": true}}],
    })
    .to_string();
    let mut request = format!(
        "POST /v2/models/add/infer HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {}\r\n\
         Inference-Header-Content-Length: {}\r\n\r\n{json}",
        json.len() + 16,
        json.len()
    )
    .into_bytes();
    request.extend_from_slice(&[0; 16]);
    let change = (0..request.len(), any::<u8>());
    runner(256)
        .run(&proptest::collection::vec(change, 1..4), |changes| {
            let mut changed = request.clone();
            for (place, byte) in changes {
                changed[place] = byte;
            }
            let mut client = server.client();
            let _ = client.send(&changed);
            // A length that grew makes the server wait for more.
            client.finish_sending();
            if let Some(response) = client.response() {
                prop_assert!((200..=505).contains(&response.status));
            }
            Ok(())
        })
        .unwrap();
    assert_well(&server);
}

#[test]
fn json_made_of_anything_is_answered() {
    watch_panics();
    let server = Server::start();
    let client = RefCell::new(server.client());
    let leaf = prop_oneof![
        Just(json!(null)),
        any::<bool>().prop_map(|value| json!(value)),
        any::<i64>().prop_map(|value| json!(value)),
        any::<f64>().prop_map(|value| json!(value)),
        "[a-z\\[\\]{},\"\\\\]{0,8}".prop_map(|value| json!(value)),
    ];
    let value = leaf.prop_recursive(4, 64, 6, |inner| {
        let keys = prop_oneof![
            Just("name"),
            Just("shape"),
            Just("datatype"),
            Just("data"),
            Just("parameters"),
            Just("binary_data_size"),
        ];
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..6).prop_map(|list| json!(list)),
            proptest::collection::vec((keys, inner), 0..6).prop_map(|entries| entries
                .into_iter()
                .map(|(key, value)| (key.to_owned(), value))
                .collect()),
        ]
    });
    runner(256)
        .run(&(value.clone(), value), |(data, other)| {
            let mut client = client.borrow_mut();
            let request = json!({"inputs": [{"name": "x", "shape": [2], "datatype": "FP32", "data": data}]});
            prop_assert!(matches!(client.infer("echo-fp32", &request).status, 200 | 400));
            let request = json!({"inputs": other, "outputs": data, "parameters": other});
            prop_assert!(matches!(client.infer("echo-fp32", &request).status, 200 | 400));
            Ok(())
        })
        .unwrap();
    assert_well(&server);
}

#[test]
fn json_ever_so_deep_costs_no_stack() {
    watch_panics();
    let server = Server::start();
    let deep = "[".repeat(1 << 20) + &"]".repeat(1 << 20);
    let mut client = server.client();
    let mut post = |body: String| client.post("/v2/models/echo-fp32/infer", &[], body.as_bytes());
    let data = format!(r#"{{"inputs":[{{"name":"x","shape":[1],"datatype":"FP32","data":{deep}}}]}}"#);
    assert_eq!(post(data).error(400), "input 'x': data[0] is a list, shape [1] nests 1 deep");
    for field in ["id", "inputs", "outputs", "parameters"] {
        assert_eq!(post(format!(r#"{{"{field}":{deep},"inputs":[]}}"#)).status, 400);
    }
    let shape = format!(r#"{{"inputs":[{{"name":"x","shape":{deep},"datatype":"FP32","data":[]}}]}}"#);
    assert!(post(shape).error(400).starts_with("input 'x': 'shape' must be a list"));
    let ignored =
        format!(r#"{{"ignored":{deep},"inputs":[{{"name":"x","shape":[1],"datatype":"FP32","data":[1]}}]}}"#);
    assert!(matches!(post(ignored).status, 200 | 400));
    let index = client.post("/v2/repository/index", &[], "[".repeat(60_000).as_bytes());
    assert_eq!(index.status, 400);
    assert_well(&server);
}

#[test]
fn shapes_cannot_make_the_server_promise_memory() {
    watch_panics();
    let server = Server::start();
    let mut client = server.client();
    for extent in [1u64 << 32, 1 << 40, 1 << 61, u64::MAX / 4, u64::MAX] {
        let request = json!({"inputs": [{"name": "x", "shape": [extent], "datatype": "FP32", "data": [1]}]});
        let status = client.infer("echo-fp32", &request).status;
        assert!(matches!(status, 400 | 413), "{extent}: {status}");
    }
    let rank = vec![1; 100_000];
    let request = json!({"inputs": [{"name": "x", "shape": rank, "datatype": "FP32", "data": [1]}]});
    assert_eq!(client.infer("echo-fp32", &request).status, 400);
    assert_well(&server);
}

#[test]
fn heads_too_large_or_malformed_are_refused() {
    watch_panics();
    let server = Server::start();
    let connect = || Client::connect(server.address);
    let large = format!("GET /v2 HTTP/1.1\r\nHost: x\r\nX: {}\r\n\r\n", "y".repeat(1 << 20));
    let mut client = connect();
    let _ = client.send(large.as_bytes());
    assert!(client.response().is_none_or(|response| response.status == 431));
    for head in [
        "POST /v2/models/add/infer HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        "POST /v2/models/add/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        "POST /v2/models/add/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999999999999\r\n\r\n",
        "POST /v2/models/add/infer HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        "GET /v2 HTTP/9.9\r\n\r\n",
        "\0\0\0\0\r\n\r\n",
    ] {
        let mut client = connect();
        client.send(head.as_bytes()).unwrap();
        client.finish_sending();
        assert!(client.response().is_none_or(|response| response.status >= 400), "{head}");
    }
    assert_well(&server);
}
