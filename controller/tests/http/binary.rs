//! Inference with the binary tensor data extension.

use pswitch_controller::Datatype;
use serde_json::{Value, json};

use crate::harness::Server;

fn floats(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn binary_input(name: &str, shape: Value, bytes: usize) -> Value {
    json!({"name": name, "shape": shape, "datatype": "FP32", "parameters": {"binary_data_size": bytes}})
}

#[test]
fn every_datatype_goes_round_as_bytes() {
    let server = Server::start();
    let mut client = server.client();
    for datatype in Datatype::ALL {
        let size = usize::try_from(datatype.size_bytes()).unwrap();
        let data: Vec<u8> = (0..6 * size).map(|index| u8::from(index % 3 == 0)).collect();
        let request = json!({
            "inputs": [{
                "name": "x", "shape": [6], "datatype": datatype.name(),
                "parameters": {"binary_data_size": data.len()},
            }],
            "parameters": {"binary_data_output": true},
        });
        let model = format!("echo-{}", datatype.name().to_lowercase());
        let response = client.infer_binary(&model, &request, &data);
        assert_eq!(response.status, 200, "{datatype}: {response:?}");
        assert_eq!(response.header("content-type"), Some("application/octet-stream"));
        let (json, binary) = response.parts();
        assert_eq!(
            json["outputs"],
            json!([{
                "name": "y", "shape": [6], "datatype": datatype.name(),
                "parameters": {"binary_data_size": data.len()},
            }])
        );
        assert_eq!(binary, data, "{datatype}");
    }
}

#[test]
fn json_and_binary_mix_in_both_directions() {
    let server = Server::start();
    let mut client = server.client();
    // The binary input stands behind a JSON one, and is the first of the binary data all the same.
    let request = json!({"inputs": [
        {"name": "a", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]},
        binary_input("b", json!([1, 4]), 16),
    ]});
    let response = client.infer_binary("add", &request, &floats(&[10.0, 20.0, 30.0, 40.0]));
    assert_eq!(response.header("content-type"), Some("application/json"));
    assert_eq!(response.json()["outputs"][0]["data"], json!([11.0, 22.0, 33.0, 44.0]));

    let request = json!({
        "inputs": [{"name": "x", "shape": [2], "datatype": "FP32", "data": [1, 2]}],
        "parameters": {"binary_data_output": true},
        "outputs": [{"name": "h"}, {"name": "n", "parameters": {"binary_data": false}}, {"name": "y"}],
    });
    let response = client.infer("parts", &request);
    let (json, binary) = response.parts();
    assert_eq!(
        json["outputs"],
        json!([
            {"name": "h", "shape": [2], "datatype": "FP16", "parameters": {"binary_data_size": 4}},
            {"name": "n", "shape": [], "datatype": "INT64", "data": [2]},
            {"name": "y", "shape": [2], "datatype": "FP32", "parameters": {"binary_data_size": 8}},
        ])
    );
    let mut expected = vec![0x00, 0x3c, 0x00, 0xc0];
    expected.extend(floats(&[1.0, 2.0]));
    assert_eq!(binary, expected);
}

#[test]
fn two_binary_inputs_follow_each_other() {
    let server = Server::start();
    let request = json!({
        "inputs": [binary_input("b", json!([1, 4]), 16), binary_input("a", json!([1, 4]), 16)],
        "outputs": [{"name": "sum", "parameters": {"binary_data": true}}],
    });
    let mut data = floats(&[1.0, 2.0, 3.0, 4.0]);
    data.extend(floats(&[0.5, 0.5, 0.5, 0.5]));
    let response = server.client().infer_binary("add", &request, &data);
    assert_eq!(response.parts().1, floats(&[1.5, 2.5, 3.5, 4.5]));
    server.wait_until_free();
}

#[test]
fn a_body_in_chunks_is_cut_anywhere() {
    let server = Server::start();
    let mut client = server.client();
    let json = json!({
        "inputs": [binary_input("x", json!([100]), 400)],
        "parameters": {"binary_data_output": true},
    });
    let json = json.to_string().into_bytes();
    let data: Vec<u8> = (0..400u32).map(|index| (index % 251) as u8).collect();
    for piece in [1, 7, 64, 10_000] {
        let mut request = format!(
            "POST /v2/models/echo-fp32/infer HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\
             Inference-Header-Content-Length: {}\r\n\r\n",
            json.len()
        )
        .into_bytes();
        for chunk in [json.as_slice(), &data].concat().chunks(piece) {
            request.extend(format!("{:x}\r\n", chunk.len()).into_bytes());
            request.extend_from_slice(chunk);
            request.extend_from_slice(b"\r\n");
        }
        request.extend_from_slice(b"0\r\n\r\n");
        client.send(&request).unwrap();
        let response = client.response().unwrap();
        assert_eq!(response.status, 200, "{response:?}");
        assert_eq!(response.parts().1, data);
    }
}

#[test]
fn a_raw_request_is_nothing_but_data() {
    let server = Server::start();
    let mut client = server.client();
    let raw = [("Inference-Header-Content-Length", "0")];
    let response = client.post("/v2/models/parts/infer", &raw, &floats(&[1.0, 2.0, 3.0]));
    let (json, binary) = response.parts();
    assert_eq!(json["outputs"][0]["shape"], json!([3]));
    assert_eq!(json["outputs"][1]["parameters"], json!({"binary_data_size": 8}));
    assert_eq!(binary.len(), 12 + 8 + 4);
    assert_eq!(binary[12..20], 3i64.to_le_bytes());

    let response = client.post("/v2/models/scalar/infer", &raw, &7i64.to_le_bytes());
    assert_eq!(response.parts().1, 7i64.to_le_bytes());

    let error = client.post("/v2/models/parts/infer", &raw, &[0; 7]).error(400);
    assert_eq!(error, "input 'x': 7 bytes do not fill shape [0..1024] of datatype FP32");
    let error = client.post("/v2/models/scalar/infer", &raw, &[0; 16]).error(400);
    assert_eq!(error, "input 'x': 16 bytes do not fill shape [] of datatype INT64");
    let error = client.post("/v2/models/parts/infer", &raw, &[0; 4 * 1025]).error(400);
    assert_eq!(
        error,
        "input 'x': dimension 0 must be 0..1024, found 1025 (shape [1025], expected [0..1024])"
    );
    let error = client.post("/v2/models/add/infer", &raw, &[0; 16]).error(400);
    assert_eq!(
        error,
        "a raw binary request (Inference-Header-Content-Length: 0) needs a model with one input, this one has 2"
    );
}

#[test]
fn empty_tensors_have_no_bytes() {
    let server = Server::start();
    let request = json!({
        "inputs": [binary_input("x", json!([0]), 0)],
        "parameters": {"binary_data_output": true},
    });
    let response = server.client().infer_binary("echo-fp32", &request, &[]);
    let (json, binary) = response.parts();
    assert_eq!(json["outputs"][0]["parameters"], json!({"binary_data_size": 0}));
    assert!(binary.is_empty());
}

#[test]
fn lengths_that_disagree_are_told() {
    let server = Server::start();
    let mut client = server.client();
    let request = |bytes: usize| json!({"inputs": [binary_input("x", json!([2]), bytes)]});
    let error = client.infer_binary("echo-fp32", &request(12), &[0; 12]).error(400);
    assert_eq!(error, "input 'x': binary_data_size is 12, but datatype FP32 and shape [2] make 8 bytes");

    let length = request(8).to_string().len();
    for (sent, total) in [(7, length + 7), (9, length + 9)] {
        let error = client.infer_binary("echo-fp32", &request(8), &vec![0; sent]).error(400);
        assert_eq!(
            error,
            format!(
                "the body has {total} bytes (Content-Length), but the JSON object of {length} bytes and the inputs' \
                 binary data of 8 bytes make {}",
                length + 8
            )
        );
    }
    // Binary data without the header that tells where it begins.
    let error = client.infer("echo-fp32", &request(8)).error(400);
    assert_eq!(
        error,
        "input 'x': binary data needs the header Inference-Header-Content-Length with the length of the JSON object"
    );
}

#[test]
fn lengths_of_a_chunked_body_are_checked_as_it_comes() {
    let server = Server::start();
    let mut client = server.client();
    let json = json!({"inputs": [binary_input("x", json!([2]), 8)]}).to_string();
    let mut send = |binary: &[u8]| {
        let total = json.len() + binary.len();
        let mut request = format!(
            "POST /v2/models/echo-fp32/infer HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\
             Inference-Header-Content-Length: {}\r\n\r\n{total:x}\r\n{json}",
            json.len()
        )
        .into_bytes();
        request.extend_from_slice(binary);
        request.extend_from_slice(b"\r\n0\r\n\r\n");
        client.send(&request).unwrap();
        client.response().unwrap().error(400)
    };
    assert_eq!(send(&[0; 5]), "input 'x': the body ends inside its binary data: expected 8 bytes, found 5");
    let error = send(&[0; 11]);
    assert!(error.starts_with("the body goes on after the last tensor"), "{error}");
    assert!(error.ends_with("at least 3 more came"), "{error}");
    server.wait_until_free();
}

#[test]
fn wrong_header_lengths_are_told() {
    let server = Server::start();
    let mut client = server.client();
    let body = json!({"inputs": []}).to_string();
    let mut error = |length: &str| {
        let headers = [("Inference-Header-Content-Length", length)];
        client.post("/v2/models/echo-fp32/infer", &headers, body.as_bytes()).error(400)
    };
    for wrong in ["x", "-1", "+5", "1.5", "99999999999999999999", ""] {
        let expected = format!(
            "the header Inference-Header-Content-Length must be a number of bytes, found \"{wrong}\""
        );
        assert_eq!(error(wrong), expected);
    }
    assert_eq!(
        error("100"),
        "Inference-Header-Content-Length is 100, more than the body's Content-Length of 13"
    );
    // Cut inside the JSON object.
    let cut = error("5");
    assert!(cut.starts_with("not an inference request in JSON: EOF"), "{cut}");
    let twice = [("Inference-Header-Content-Length", "13"), ("Inference-Header-Content-Length", "13")];
    let error = client.post("/v2/models/echo-fp32/infer", &twice, body.as_bytes()).error(400);
    assert_eq!(error, "the header Inference-Header-Content-Length is given more than once");
}

#[test]
fn a_bool_is_zero_or_one() {
    let server = Server::start();
    let request = json!({"inputs": [{
        "name": "x", "shape": [3], "datatype": "BOOL", "parameters": {"binary_data_size": 3},
    }]});
    let error = server.client().infer_binary("echo-bool", &request, &[1, 0, 2]).error(400);
    assert_eq!(error, "input 'x': byte 2 of BOOL data must be 0 or 1, found 2");
}

#[test]
fn half_precision_travels_as_binary_only() {
    let server = Server::start();
    let mut client = server.client();
    for datatype in ["FP16", "BF16"] {
        let model = format!("echo-{}", datatype.to_lowercase());
        let json_input = json!({"name": "x", "shape": [1], "datatype": datatype, "data": [1]});
        let request = json!({"inputs": [json_input], "parameters": {"binary_data_output": true}});
        let error = client.infer(&model, &request).error(400);
        assert_eq!(
            error,
            format!(
                "input 'x': {datatype} cannot be written as JSON; send it with the binary tensor data extension \
                 (binary_data_size)"
            )
        );
        // Said before the model runs, not after.
        let input =
            json!({"name": "x", "shape": [1], "datatype": datatype, "parameters": {"binary_data_size": 2}});
        let error = client.infer_binary(&model, &json!({"inputs": [input]}), &[0, 0]).error(400);
        assert!(
            error.starts_with(&format!("output 'y': {datatype} cannot be written as JSON; ask for binary")),
            "{error}"
        );
    }
}
