//! Tensors of every datatype go round in both encodings without a bit changed.

use std::cell::RefCell;

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use pswitch_controller::Datatype;
use serde_json::{Value, json};

use crate::client::Client;
use crate::harness::Server;

/// Elements of a datatype as bytes, all bit patterns that are finite (or 0 and 1).
fn elements(datatype: Datatype) -> BoxedStrategy<Vec<u8>> {
    let size = usize::try_from(datatype.size_bytes()).unwrap();
    let element = proptest::collection::vec(any::<u8>(), size).prop_map(move |mut bytes| {
        match datatype {
            Datatype::Bool => bytes[0] &= 1,
            Datatype::Fp32 if !f32::from_le_bytes(bytes.clone().try_into().unwrap()).is_finite() => {
                bytes[3] ^= 0x40
            }
            Datatype::Fp64 if !f64::from_le_bytes(bytes.clone().try_into().unwrap()).is_finite() => {
                bytes[7] ^= 0x40
            }
            _ => {}
        }
        bytes
    });
    proptest::collection::vec(element, 0..300).prop_map(|elements| elements.concat()).boxed()
}

fn infer(
    client: &mut Client,
    datatype: Datatype,
    input: &Value,
    binary: &[u8],
    binary_output: bool,
) -> (Value, Vec<u8>) {
    let request = json!({"inputs": [input], "parameters": {"binary_data_output": binary_output}});
    let model = format!("echo-{}", datatype.name().to_lowercase());
    let is_binary = input.get("data").is_none();
    let response = if is_binary {
        client.infer_binary(&model, &request, binary)
    } else {
        client.infer(&model, &request)
    };
    assert_eq!(response.status, 200, "{}", String::from_utf8_lossy(&response.body));
    if binary_output {
        let (json, binary) = response.parts();
        (json["outputs"][0].clone(), binary.to_vec())
    } else {
        (response.json()["outputs"][0].clone(), Vec::new())
    }
}

#[test]
fn json_and_binary_data_are_the_same_tensors() {
    let server = Server::start();
    let client = RefCell::new(server.client());
    for datatype in Datatype::ALL.into_iter().filter(|datatype| datatype.has_json_form()) {
        let mut runner =
            TestRunner::new(Config { cases: 24, failure_persistence: None, ..Config::default() });
        let checked = runner.run(&elements(datatype), |bytes| {
            let mut client = client.borrow_mut();
            let count = bytes.len() as u64 / datatype.size_bytes();
            let described = json!({"name": "x", "datatype": datatype.name(), "shape": [count]});
            let mut as_binary = described.clone();
            as_binary["parameters"] = json!({"binary_data_size": bytes.len()});
            // Binary in, JSON out; that JSON in, binary out: the bytes of the beginning.
            let (output, _) = infer(&mut client, datatype, &as_binary, &bytes, false);
            let mut as_json = described;
            as_json["data"] = output["data"].clone();
            let (_, back) = infer(&mut client, datatype, &as_json, &[], true);
            prop_assert_eq!(back, bytes);
            Ok(())
        });
        checked.unwrap_or_else(|error| panic!("{datatype}: {error}"));
    }
}

#[test]
fn any_text_of_numbers_is_decoded_to_the_nearest_value() {
    let server = Server::start();
    let client = RefCell::new(server.client());
    let mut runner = TestRunner::new(Config { cases: 64, failure_persistence: None, ..Config::default() });
    let number =
        proptest::string::string_regex("-?(0|[1-9][0-9]{0,20})(\\.[0-9]{1,25})?([eE][+-]?[0-3]?[0-9])?")
            .unwrap();
    let numbers = proptest::collection::vec(number, 1..50);
    let checked = runner.run(&numbers, |texts| {
        let request = format!(
            r#"{{"inputs":[{{"name":"x","datatype":"FP64","shape":[{}],"data":[{}]}}],"parameters":{{"binary_data_output":true}}}}"#,
            texts.len(),
            texts.join(" ,\n")
        );
        let response = client.borrow_mut().post("/v2/models/echo-fp64/infer", &[], request.as_bytes());
        prop_assert_eq!(response.status, 200, "{}", String::from_utf8_lossy(&response.body));
        let expected: Vec<u8> =
            texts.iter().flat_map(|text| text.parse::<f64>().unwrap().to_le_bytes()).collect();
        prop_assert_eq!(response.parts().1, expected);
        Ok(())
    });
    checked.unwrap();
}
