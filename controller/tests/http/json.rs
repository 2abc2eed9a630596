//! Inference with tensors as JSON.

use serde_json::{Value, json};

use crate::client::Client;
use crate::harness::Server;

fn add(a: Value, b: Value, shape: Value) -> Value {
    json!({"inputs": [
        {"name": "a", "shape": shape, "datatype": "FP32", "data": a},
        {"name": "b", "shape": shape, "datatype": "FP32", "data": b},
    ]})
}

fn echo(client: &mut Client, datatype: &str, shape: Value, data: Value) -> crate::client::Response {
    let request = json!({"inputs": [{"name": "x", "shape": shape, "datatype": datatype, "data": data}]});
    client.infer(&format!("echo-{}", datatype.to_lowercase()), &request)
}

#[test]
fn flat_and_nested_lists_mean_the_same() {
    let server = Server::start();
    let mut client = server.client();
    let flat = json!([1, 2.5, -3, 4e-1, 5, 6, 7, 8]);
    let nested = json!([[10, 20, 30, 40], [50, 60, 70, 80]]);
    let response = client.infer("add", &add(flat, nested, json!([2, 4])));
    assert_eq!(response.status, 200, "{response:?}");
    assert_eq!(response.header("content-type"), Some("application/json"));
    assert_eq!(response.header("inference-header-content-length"), None);
    let body = response.json();
    assert_eq!(body["model_name"], "add");
    assert_eq!(body["model_version"], "1");
    assert_eq!(body.get("id"), None);
    let expected = json!([11.0, 22.5, 27.0, 40.4, 55.0, 66.0, 77.0, 88.0]);
    assert_eq!(
        body["outputs"],
        json!([{"name": "sum", "datatype": "FP32", "shape": [2, 4], "data": expected}])
    );
}

#[test]
fn inputs_come_in_any_order_and_by_version() {
    let server = Server::start();
    let request = json!({"inputs": [
        {"name": "b", "shape": [1, 4], "datatype": "FP32", "data": [1, 1, 1, 1]},
        {"name": "a", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]},
    ]});
    let mut client = server.client();
    let response = client.post("/v2/models/add/versions/1/infer", &[], request.to_string().as_bytes());
    assert_eq!(response.json()["outputs"][0]["data"], json!([2.0, 3.0, 4.0, 5.0]));
}

#[test]
fn the_id_comes_back_and_times_are_told() {
    let server = Server::start();
    let mut request = add(json!([0, 0, 0, 0]), json!([0, 0, 0, 0]), json!([1, 4]));
    request["id"] = json!("a \"quoted\" id \u{1f600}");
    let response = server.client().infer("add", &request);
    let body = response.json();
    assert_eq!(body["id"], request["id"]);
    assert_eq!(
        body["parameters"],
        json!({"queue_us": 3.0, "switch_us": 5.0, "compute_us": 7.0, "switched": true})
    );
    assert_eq!(
        response.header("server-timing"),
        Some("queue;dur=0.003, switch;dur=0.005, compute;dur=0.007")
    );
}

#[test]
fn unknown_fields_and_parameters_are_ignored() {
    let server = Server::start();
    let mut request = add(json!([0, 0, 0, 0]), json!([0, 0, 0, 0]), json!([1, 4]));
    request["model_name"] = json!("add");
    request["parameters"] = json!({"my_parameter": {"deep": [1]}, "priority": 3, "timeout": 0});
    request["inputs"][0]["parameters"] = json!({"anything": true});
    request["inputs"][0]["more"] = json!(null);
    request["outputs"] = json!([{"name": "sum", "parameters": {"other": 1}, "x": 1}]);
    assert_eq!(server.client().infer("add", &request).status, 200);
}

#[test]
fn every_datatype_of_json_goes_round() {
    let server = Server::start();
    let mut client = server.client();
    for (datatype, data) in [
        ("BOOL", json!([true, false])),
        ("UINT8", json!([0, 255])),
        ("UINT16", json!([0, 65535])),
        ("UINT32", json!([0, u32::MAX])),
        ("UINT64", json!([0, u64::MAX])),
        ("INT8", json!([-128, 127])),
        ("INT16", json!([-32768, 32767])),
        ("INT32", json!([i32::MIN, i32::MAX])),
        ("INT64", json!([i64::MIN, i64::MAX])),
        ("FP32", json!([0.1, -1.5])),
        ("FP64", json!([0.1, 2.5e-308])),
    ] {
        let response = echo(&mut client, datatype, json!([2]), data.clone());
        assert_eq!(response.status, 200, "{datatype}: {response:?}");
        let output = &response.json()["outputs"][0];
        assert_eq!((&output["datatype"], &output["shape"]), (&json!(datatype), &json!([2])));
        assert_eq!(output["data"], data, "{datatype}");
    }
}

#[test]
fn scalars_and_empty_tensors_are_tensors() {
    let server = Server::start();
    let mut client = server.client();
    for data in [json!([5]), json!(5)] {
        let request = json!({"inputs": [{"name": "x", "shape": [], "datatype": "INT64", "data": data}]});
        let output = &client.infer("scalar", &request).json()["outputs"][0];
        assert_eq!((&output["shape"], &output["data"]), (&json!([]), &json!([5])));
    }
    let output = &echo(&mut client, "FP32", json!([0]), json!([])).json()["outputs"][0];
    assert_eq!((&output["shape"], &output["data"]), (&json!([0]), &json!([])));
}

#[test]
fn only_the_outputs_asked_for_are_sent_in_their_order() {
    let server = Server::start();
    let mut client = server.client();
    let mut request = json!({"inputs": [{"name": "x", "shape": [2], "datatype": "FP32", "data": [1, 2]}]});
    request["outputs"] = json!([{"name": "n"}, {"name": "y"}]);
    let body = client.infer("parts", &request).json();
    assert_eq!(
        body["outputs"],
        json!([
            {"name": "n", "datatype": "INT64", "shape": [], "data": [2]},
            {"name": "y", "datatype": "FP32", "shape": [2], "data": [1.0, 2.0]},
        ])
    );
    request["outputs"] = json!([]);
    assert_eq!(client.infer("parts", &request).json()["outputs"], json!([]));
}

#[test]
fn long_json_goes_both_ways() {
    let server = Server::start();
    let data: Vec<f64> = (0..200_000).map(|index| f64::from(index) * 0.1).collect();
    let response = echo(&mut server.client(), "FP64", json!([data.len()]), json!(data));
    assert_eq!(response.status, 200);
    assert_eq!(response.json()["outputs"][0]["data"], json!(data));
}

#[test]
fn wrong_data_is_named_with_place_expected_and_found() {
    let server = Server::start();
    let mut client = server.client();
    let mut check = |datatype: &str, shape: Value, data: Value, expected: &str| {
        let error = echo(&mut client, datatype, shape, data).error(400);
        assert_eq!(error, format!("input 'x': {expected}"));
    };
    check(
        "INT8",
        json!([2]),
        json!([0, 128]),
        "data[1] must be in the range of INT8, -128 to 127, found 128",
    );
    check("UINT8", json!([1]), json!([-1]), "data[0] must be in the range of UINT8, 0 to 255, found -1");
    check("INT64", json!([1]), json!([1.5]), "data[0] must be an integer of datatype INT64, found 1.5");
    check("INT64", json!([1]), json!([true]), "data[0] must be an integer of datatype INT64, found true");
    check("BOOL", json!([2]), json!([true, 1]), "data[1] must be true or false (datatype BOOL), found 1");
    check("FP32", json!([1]), json!([null]), "data[0] must be a number of datatype FP32, found null");
    check(
        "FP32",
        json!([1]),
        json!([1e39]),
        "data[0] must be in the range of FP32, up to 3.4028235e38, found 1e+39",
    );
    check(
        "FP32",
        json!([1]),
        json!(["a, b]"]),
        "data[0] must be a number of datatype FP32, found \"a, b]\"]",
    );
    check(
        "FP32",
        json!([1]),
        json!([{"a": 1}]),
        "data[0] must be a number of datatype FP32, found {\"a\":1}]",
    );
    check("FP32", json!([3]), json!([1, 2]), "data has 2 elements, shape [3] has 3");
    check("FP32", json!([1]), json!([1, 2]), "data has more elements than the 1 of shape [1]");
    check("FP32", json!([1]), json!([[1]]), "data[0] is a list, shape [1] nests 1 deep");
    check("FP32", json!([2]), json!([1, [2]]), "data[1] is a list among numbers");
    let bare =
        "data must be a list: give all elements in one flat list or in lists nested as shape [1], found 7";
    check("FP32", json!([1]), json!(7), bare);
    let long = format!("\"{}\"", "z".repeat(100));
    let quoted = format!("data[0] must be a number of datatype FP32, found \"{}...", "z".repeat(39));
    check("FP32", json!([1]), serde_json::from_str(&format!("[{long}]")).unwrap(), &quoted);
}

#[test]
fn wrong_nesting_is_named() {
    let server = Server::start();
    let mut client = server.client();
    let mut check = |data: Value, expected: &str| {
        let error =
            client.infer("add", &add(data, json!([0, 0, 0, 0, 0, 0, 0, 0]), json!([2, 4]))).error(400);
        assert_eq!(error, format!("input 'a': {expected}"));
    };
    check(json!([[1, 2, 3, 4], [1, 2, 3]]), "data[1] has 3 items, shape [2, 4] wants 4");
    check(json!([[1, 2, 3, 4]]), "data has 1 items, shape [2, 4] wants 2");
    check(json!([[1, 2, 3, 4], [1, 2, 3, [4]]]), "data[1][3] is a list, shape [2, 4] nests 2 deep");
    check(
        json!([[1, 2, 3, 4], 5]),
        "data[1] must be a list: give all elements in one flat list or in lists nested as shape [2, 4], found 5",
    );
    check(json!([1, [2]]), "data[1] is a list among numbers");
}

#[test]
fn not_a_number_is_refused_as_json_and_sent_as_binary() {
    let server = Server::start();
    let mut client = server.client();
    let binary: Vec<u8> = [1.0, f32::NAN].into_iter().flat_map(f32::to_le_bytes).collect();
    let mut request = json!({"inputs": [{
        "name": "x", "shape": [2], "datatype": "FP32", "parameters": {"binary_data_size": 8},
    }]});
    let error = client.infer_binary("echo-fp32", &request, &binary).error(400);
    assert_eq!(
        error,
        "output 'y': data[1] is NaN, which JSON cannot tell; ask for binary data (\"parameters\": \
         {\"binary_data\": true} of the output or {\"binary_data_output\": true} of the request)"
    );
    request["parameters"] = json!({"binary_data_output": true});
    assert_eq!(client.infer_binary("echo-fp32", &request, &binary).parts().1, binary);
}
