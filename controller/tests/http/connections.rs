//! Clients that leave, stall or do not read, and the server's end.

use std::io::Write;
use std::net::TcpStream;
use std::time::{Duration, Instant};

use pswitch_controller::HttpOptions;
use serde_json::json;

use crate::harness::Server;

const JSON: &str = r#"{"inputs":[{"name":"x","shape":[1],"datatype":"FP32","data":[1]}]}"#;

fn hanging_request() -> Vec<u8> {
    let length = JSON.len();
    format!("POST /v2/models/hangs/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n{JSON}")
        .into_bytes()
}

#[test]
fn a_client_that_leaves_cancels_its_request() {
    let server = Server::start();
    let mut client = server.client();
    client.send(&hanging_request()).unwrap();
    server.wait_until_held();
    drop(client);
    server.wait_until_free();
    let metrics = String::from_utf8(server.client().get("/metrics").body).unwrap();
    assert!(
        metrics.contains("pswitch_requests_total{model=\"hangs\",outcome=\"cancelled\"} 1\n"),
        "{metrics}"
    );
    assert!(metrics.contains("pswitch_requests_in_flight 0\n"), "{metrics}");
}

#[test]
fn a_client_that_leaves_in_the_middle_of_its_body_frees_the_slot() {
    let server = Server::start();
    let mut client = server.client();
    let json =
        r#"{"inputs":[{"name":"x","shape":[9],"datatype":"FP32","parameters":{"binary_data_size":36}}]}"#;
    let head = format!(
        "POST /v2/models/echo-fp32/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\
         Inference-Header-Content-Length: {}\r\n\r\n{json}",
        json.len() + 36,
        json.len()
    );
    client.send(head.as_bytes()).unwrap();
    client.send(&[0; 20]).unwrap();
    server.wait_until_held();
    drop(client);
    server.wait_until_free();
}

#[test]
fn a_body_that_stalls_is_given_up() {
    let options = HttpOptions { body_idle_timeout: Duration::from_millis(100), ..HttpOptions::default() };
    let server = Server::with_options(options);
    let mut client = server.client();
    let head =
        "POST /v2/models/echo-fp32/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{\"inputs\"";
    client.send(head.as_bytes()).unwrap();
    let error = client.response().unwrap().error(408);
    assert_eq!(error, "the body stopped arriving: 9 of 100 bytes came, then none for 0.1 s");
}

#[test]
fn a_head_that_stalls_is_given_up() {
    let options = HttpOptions { head_timeout: Duration::from_millis(100), ..HttpOptions::default() };
    let server = Server::with_options(options);
    let mut client = server.client();
    client.send(b"GET /v2 HTTP/1.1\r\nHo").unwrap();
    assert!(client.response().is_none_or(|response| response.status == 408));
}

#[test]
fn a_response_that_nobody_reads_gives_its_slot_back() {
    let options = HttpOptions { write_timeout: Duration::from_millis(500), ..HttpOptions::default() };
    let server = Server::with_options(options);
    // More than the sockets' buffers take.
    let elements = 12 << 20;
    let json = json!({
        "inputs": [{
            "name": "x", "shape": [elements], "datatype": "FP32", "parameters": {"binary_data_size": elements * 4},
        }],
        "parameters": {"binary_data_output": true},
    })
    .to_string();
    let mut stream = TcpStream::connect(server.address).unwrap();
    let head = format!(
        "POST /v2/models/echo-fp32/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\
         Inference-Header-Content-Length: {}\r\n\r\n{json}",
        json.len() + elements * 4,
        json.len()
    );
    stream.write_all(head.as_bytes()).unwrap();
    stream.write_all(&vec![0; elements * 4]).unwrap();
    server.wait_until_held();
    server.wait_until_free();
    drop(stream);
}

#[test]
fn one_connection_serves_many_requests_and_pipelines() {
    let server = Server::start();
    let mut client = server.client();
    for _ in 0..50 {
        assert_eq!(client.get("/v2/health/live").status, 200);
    }
    let length = JSON.len();
    let one = format!(
        "POST /v2/models/echo-fp32/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n{JSON}"
    );
    client.send(one.repeat(3).as_bytes()).unwrap();
    for _ in 0..3 {
        assert_eq!(client.response().unwrap().status, 200);
    }
}

#[test]
fn an_error_does_not_cost_a_large_body_its_answer() {
    let server = Server::start();
    let mut client = server.client();
    let request = json!({"inputs": [{
        "name": "x", "shape": [8 << 20], "datatype": "INT64", "parameters": {"binary_data_size": 64 << 20},
    }]});
    // Refused at its head; the client writes all of it before it reads.
    let error = client.infer_binary("echo-fp32", &request, &vec![0; 64 << 20]).error(400);
    assert_eq!(error, "input 'x': expected datatype FP32, found INT64");
    assert_eq!(client.get("/v2/health/live").status, 200);
}

#[test]
fn pictures_are_classified() {
    let server = Server::start();
    let pixels = 2 * 3 * 224 * 224 * 4;
    let request = json!({
        "inputs": [{
            "name": "x", "shape": [2, 3, 224, 224], "datatype": "FP32", "parameters": {"binary_data_size": pixels},
        }],
        "parameters": {"binary_data_output": true},
    });
    let response = server.client().infer_binary("classify", &request, &vec![0; pixels]);
    assert_eq!(response.parts().1, [0; 8000]);
}

#[test]
fn a_client_that_asks_first_is_told_to_go_on_or_not() {
    let server = Server::start();
    let mut client = server.client();
    let length = JSON.len();
    let head = |model: &str| {
        format!(
            "POST /v2/models/{model}/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\nExpect: 100-continue\r\n\r\n"
        )
    };
    client.send(head("echo-fp32").as_bytes()).unwrap();
    client.send(JSON.as_bytes()).unwrap();
    assert_eq!(client.response().unwrap().status, 200);
    client.send(head("nope").as_bytes()).unwrap();
    assert_eq!(client.response().unwrap().error(404), "unknown model 'nope'");
}

#[test]
fn connections_over_the_limit_wait_for_their_turn() {
    let server = Server::with_options(HttpOptions { max_connections: 1, ..HttpOptions::default() });
    let mut first = server.client();
    assert_eq!(first.get("/v2/health/live").status, 200);
    let mut second = server.client();
    second.send(b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    assert_eq!(first.get("/v2/health/live").status, 200);
    drop(first);
    assert_eq!(second.response().unwrap().status, 200);
}

#[test]
fn stopping_lets_requests_end_and_closes_idle_connections() {
    let mut server = Server::start();
    let mut idle = server.client();
    assert_eq!(idle.get("/v2/health/live").status, 200);
    let mut busy = server.client();
    let body = json!({
        "inputs": [{"name": "x", "shape": [1], "datatype": "FP32", "data": [1]}],
        "parameters": {"timeout": 300_000},
    })
    .to_string();
    let length = body.len();
    let request =
        format!("POST /v2/models/hangs/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n{body}");
    busy.send(request.as_bytes()).unwrap();
    server.wait_until_held();
    server.tell_to_stop();
    assert!(idle.response().is_none(), "an idle connection is closed");
    assert_eq!(busy.response().unwrap().status, 504, "a request that runs comes to its end");
    let address = server.address;
    server.wait();
    assert!(TcpStream::connect(address).is_err(), "nobody listens any more");
}

#[test]
fn stopping_cuts_off_what_outlasts_the_grace() {
    let options = HttpOptions { shutdown_grace: Duration::from_millis(100), ..HttpOptions::default() };
    let mut server = Server::with_options(options);
    let mut client = server.client();
    client.send(&hanging_request()).unwrap();
    server.wait_until_held();
    let begun = Instant::now();
    server.tell_to_stop();
    assert!(client.response().is_none());
    assert!(begun.elapsed() >= Duration::from_millis(90));
    server.wait_until_free();
    server.wait();
}

#[test]
fn a_port_in_use_is_an_error() {
    let server = Server::start();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let bound = pswitch_controller::HttpServer::bind(
        server.address,
        crate::fake::FakeService::new(4096),
        pswitch_controller::Metrics::new(),
        HttpOptions::default(),
    );
    let error = runtime.block_on(bound).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::AddrInUse);
}
