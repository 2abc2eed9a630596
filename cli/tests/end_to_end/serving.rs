//! Models are served: right to the last bit, with the names of the program, from one device or several.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::ScopedJoinHandle;
use std::time::Duration;

use serde_json::{Value, json};

use crate::support::{Fixture, Models, Serve, Server, Tensor, assert_says, span_bytes};

fn fixtures<const N: usize>(names: [&str; N]) -> [Fixture; N] {
    names.map(Fixture::load)
}

fn check_all<'a>(server: &Server, fixtures: impl IntoIterator<Item = &'a Fixture>) {
    for fixture in fixtures {
        assert!(!fixture.cases.is_empty(), "{} has cases", fixture.name);
        for case in &fixture.cases {
            server.client.check(&fixture.name, case);
        }
    }
}

/// ResNet and BERT among them, in a pool that holds any of the large ones but never all.
#[test]
fn models_that_do_not_all_fit_answer_as_eager_pytorch_does() {
    let served = fixtures([
        "bert-2-layers",
        "bert-dynamic",
        "bfloat16",
        "constants",
        "data-dependent",
        "dynamic-batch",
        "fixed-inputs",
        "float16",
        "in-place",
        "integer-outputs",
        "lists",
        "odd-weights",
        "recurrent",
        "resnet18",
        "resnet18-dynamic",
        "spectrum",
        "symbolic-arithmetic",
        "two-in-three-out",
    ]);
    let refused = fixtures(["conditional", "mutable-buffer"]);
    let models = Models::of(served.iter().chain(&refused));
    // 148 MiB of BERT and twice 45 of ResNet share 160 MiB; activations of five pictures take up to 96.
    // The references were made with two threads, and large operators may add up differently with more or fewer.
    let server =
        Serve::new(models).host(2).flag("--pool-size", "256MiB").flag("--arena-size", "96MiB").start();

    let index = server.client.index();
    assert_eq!(index.len(), served.len() + refused.len());
    for Fixture { name, .. } in &served {
        assert_eq!(index[name], ("READY".to_owned(), String::new()), "{name}");
    }
    for (name, reasons) in [
        ("conditional", ["higher-order operator `cond`", "node `cond`"]),
        ("mutable-buffer", ["writes to 'count'", "must not change its weights or buffers"]),
    ] {
        let (state, reason) = &index[name];
        assert_eq!(state, "UNAVAILABLE", "{name}");
        assert_says(reason, &reasons);
        let refusal = server.client.infer(name, &[]).unwrap_err();
        assert_eq!(refusal.status, 503);
        assert_says(&refusal.error, &reasons);
    }
    for fixture in &served {
        let metadata = server.client.get(&format!("/v2/models/{}", fixture.name)).unwrap().json();
        let names = |key: &str| {
            let tensors = metadata[key].as_array().unwrap().iter();
            tensors.map(|tensor| tensor["name"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
        };
        assert_eq!(names("inputs"), fixture.inputs, "{}", fixture.name);
        assert_eq!(names("outputs"), fixture.outputs, "{}", fixture.name);
    }

    check_all(&server, &served);
    check_all(&server, served.iter().rev());
    let evictions = server.client.metrics()["pswitch_model_evictions_total{model=\"bert-2-layers\"}"];
    assert!(evictions >= 1.0, "the pool was to be too small for all");
    assert_eq!(server.client.metric("pswitch_slot_in_use_bytes"), 0.0, "all slots are free again");
    assert_eq!(server.client.metric("pswitch_worker_restarts_total"), 0.0);
}

#[test]
fn a_model_with_a_dynamic_batch_takes_every_size_in_its_range() {
    let [fixture] = fixtures(["dynamic-batch"]);
    let server = Serve::new(Models::of([&fixture])).host(1).start();
    let metadata = server.client.get("/v2/models/dynamic-batch").unwrap().json();
    assert_eq!(metadata["inputs"][0]["shape"], json!([-1, 3, 20, 20]));
    assert_eq!(fixture.cases.len(), 3);
    check_all(&server, [&fixture]);
    // The same pictures one by one and together: rows of a batch must not mix.
    let case = fixture.cases.iter().max_by_key(|case| case.inputs[0].shape[0]).unwrap();
    let batch = case.inputs[0].shape[0];
    let row = |tensor: &Tensor, index: u64| {
        let bytes = tensor.data.len() / usize::try_from(tensor.shape[0]).unwrap();
        let begin = usize::try_from(index).unwrap() * bytes;
        let mut shape = tensor.shape.clone();
        shape[0] = 1;
        Tensor { shape, data: tensor.data[begin..begin + bytes].to_vec(), ..tensor.clone() }
    };
    for index in 0..batch {
        let answer = server.client.infer("dynamic-batch", &[row(&case.inputs[0], index)]).unwrap();
        assert_eq!(answer.outputs[0].shape, [1, 10]);
        // Kernels may differ between batch sizes, and with them the last bits.
        for (one, other) in floats(&answer.outputs[0]).iter().zip(floats(&row(&case.outputs[0], index))) {
            assert!((one - other).abs() <= 1e-4 * other.abs().max(1.0), "row {index}: {one}, {other}");
        }
    }
}

fn floats(tensor: &Tensor) -> Vec<f32> {
    assert_eq!(tensor.datatype, "FP32");
    let (words, []) = tensor.data.as_chunks::<4>() else { panic!("whole numbers of floats") };
    words.iter().map(|word| f32::from_le_bytes(*word)).collect()
}

#[test]
fn json_in_and_out_loses_nothing() {
    let served = fixtures(["integer-outputs", "two-in-three-out", "bfloat16"]);
    let server = Serve::new(Models::of(&served)).host(1).start();
    for fixture in &served[..2] {
        for case in &fixture.cases {
            let inputs: Vec<Value> = case
                .inputs
                .iter()
                .map(|input| {
                    let Tensor { name, datatype, shape, .. } = input;
                    json!({"name": name, "datatype": datatype, "shape": shape, "data": floats(input)})
                })
                .collect();
            let request = json!({"id": "seventeen", "inputs": inputs});
            let answer = server.client.infer_json(&fixture.name, &request).unwrap();
            assert_eq!(answer.header["id"], "seventeen");
            assert_eq!(answer.header["model_name"], fixture.name);
            let outputs = answer.header["outputs"].as_array().unwrap();
            assert_eq!(outputs.len(), case.outputs.len());
            for (output, expected) in outputs.iter().zip(&case.outputs) {
                assert_eq!(output["name"], expected.name);
                assert_eq!(output["datatype"], expected.datatype);
                assert_eq!(output["shape"], json!(expected.shape));
                let data = output["data"].as_array().unwrap().iter();
                let bytes: Vec<u8> = data.flat_map(|value| bytes_of(value, &expected.datatype)).collect();
                assert_eq!(bytes, expected.data, "{}: {}", fixture.name, expected.name);
            }
        }
    }

    // Nested data, outputs by choice and in another order, one of them as binary data.
    let case = &served[0].cases[0];
    let rows: Vec<Vec<f32>> = floats(&case.inputs[0]).chunks(12).map(<[f32]>::to_vec).collect();
    let request = json!({
        "inputs": [{"name": "features", "datatype": "FP32", "shape": [rows.len(), 12], "data": rows}],
        "outputs": [{"name": "total"}, {"name": "best", "parameters": {"binary_data": true}}],
    });
    let answer = server.client.infer_json("integer-outputs", &request).unwrap();
    let expected = |name: &str| case.outputs.iter().find(|output| output.name == name).unwrap();
    assert_eq!(answer.outputs.len(), 2);
    assert_eq!(bytes_of(&answer.header["outputs"][0]["data"][0], "INT64"), expected("total").data);
    assert_eq!(&answer.outputs[1], expected("best"));

    // What JSON cannot tell is refused before it runs, with the way out.
    let input = &served[2].cases[0].inputs[0];
    let request = json!({"inputs": [input.binary_header()]});
    let refusal = server.client.infer_with("bfloat16", &request, &input.data).unwrap_err();
    assert_eq!(refusal.status, 400);
    assert_says(&refusal.error, &["'low'", "BF16 cannot be written as JSON", "binary_data_output"]);
}

fn bytes_of(value: &Value, datatype: &str) -> Vec<u8> {
    let integer = || value.as_i64().unwrap_or_else(|| panic!("{value} is no {datatype}"));
    match datatype {
        "BOOL" => vec![u8::from(value.as_bool().unwrap())],
        "UINT8" => vec![u8::try_from(integer()).unwrap()],
        "INT8" => i8::try_from(integer()).unwrap().to_le_bytes().to_vec(),
        "INT16" => i16::try_from(integer()).unwrap().to_le_bytes().to_vec(),
        "INT32" => i32::try_from(integer()).unwrap().to_le_bytes().to_vec(),
        "INT64" => integer().to_le_bytes().to_vec(),
        // As JSON has no types, a reader of floats rounds to the nearest.
        "FP32" => value.to_string().parse::<f32>().unwrap().to_le_bytes().to_vec(),
        other => panic!("no {other} here"),
    }
}

#[test]
fn models_come_and_go_through_the_repository() {
    let [first, second, third] = fixtures(["recurrent", "dynamic-batch", "two-in-three-out"]);
    let server = Serve::new(Models::of([&first, &second])).host(1).start();
    let models = &server.models;
    let control = |model: &str, what: &str| {
        server.client.post(&format!("/v2/repository/models/{model}/{what}"), &[], b"").unwrap()
    };
    let state = |model: &str| server.client.index().remove(model);
    check_all(&server, [&first, &second]);

    assert_eq!(control("recurrent", "unload").status, 200);
    assert_eq!(state("recurrent"), Some(("UNAVAILABLE".to_owned(), "unloaded on request".to_owned())));
    let refusal = server.client.infer("recurrent", &first.cases[0].inputs).unwrap_err();
    assert_eq!(refusal.status, 503);
    assert_says(&refusal.error, &["'recurrent'", "unloaded on request"]);
    assert_eq!(server.client.get("/v2/models/recurrent/ready").unwrap().status, 503);
    assert_eq!(server.client.get("/v2/health/ready").unwrap().status, 200, "others are served");
    check_all(&server, [&second]);

    assert_eq!(control("recurrent", "load").status, 200);
    assert_eq!(state("recurrent"), Some(("READY".to_owned(), String::new())));
    check_all(&server, [&first, &second]);

    // One that was not there when the server began, and then another archive under its name.
    assert_eq!(control(&third.name, "load").status, 404);
    models.link(&third.name, &third.archive);
    assert_eq!(control(&third.name, "load").status, 200);
    check_all(&server, [&third]);
    std::fs::remove_file(models.archive(&third.name)).unwrap();
    models.link(&third.name, &second.archive);
    assert_eq!(control(&third.name, "load").status, 200);
    server.client.check(&third.name, &second.cases[0]);

    // Loading what is loaded already, again and again, leaves nothing behind.
    let descriptors = server.process.descriptors();
    for _ in 0..5 {
        assert_eq!(control("recurrent", "load").status, 200);
        check_all(&server, [&first]);
    }
    assert_eq!(server.process.descriptors(), descriptors);

    // One that cannot be loaded says why, then and later.
    models.write("broken", b"no archive");
    let reply = control("broken", "load");
    assert_eq!(reply.status, 503);
    assert_says(&reply.error(), &["'broken'", "model.pt2"]);
    assert_eq!(state("broken").unwrap().0, "UNAVAILABLE");
    assert_says(&server.log(), &["\nbroken is not available: ", "\nrecurrent is ready"]);

    // One that is served goes on when what is to replace it cannot be loaded.
    std::fs::remove_file(models.archive("recurrent")).unwrap();
    models.write("recurrent", b"no archive");
    let reply = control("recurrent", "load");
    assert_eq!(reply.status, 503);
    assert_says(&reply.error(), &["'recurrent'", "model.pt2", "what was loaded before goes on"]);
    assert_eq!(state("recurrent"), Some(("READY".to_owned(), String::new())));
    check_all(&server, [&first]);
    assert_eq!(control("nowhere", "load").status, 404);
    assert_eq!(control("nowhere", "unload").status, 404);
    assert_eq!(server.client.metric("pswitch_worker_restarts_total"), 0.0);
}

#[test]
fn two_devices_serve_at_the_same_time() {
    let served = fixtures(["recurrent", "float16", "bfloat16", "two-in-three-out"]);
    // Neither pool holds the first beside the others, and all move slowly: long enough to see two workers wait for
    // weights. A device has one execution at a time, so two that wait belong to two devices.
    let device = "threads: 1, link: {bandwidth: 40kB/s}";
    let server = Serve::new(Models::of(&served))
        .config(&format!("devices:\n- {{id: host, {device}}}\n- {{id: 'host:1', {device}}}\n"))
        .homes(span_bytes(&served, "recurrent"))
        .start();
    let workers = server.await_workers(4);

    let together = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let clients: Vec<_> = (0..4)
            .map(|client| {
                let (server, served) = (&server, &served);
                scope.spawn(move || {
                    for round in 0..6 {
                        let fixture = &served[(client + round) % served.len()];
                        server.client.check(&fixture.name, &fixture.cases[0]);
                    }
                })
            })
            .collect();
        while !clients.iter().all(ScopedJoinHandle::is_finished) {
            if workers.iter().filter(|worker| worker.waits_at_a_doorbell()).count() == 2 {
                together.store(true, Ordering::Relaxed);
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    });
    assert!(together.into_inner(), "one device served after the other");
    check_all(&server, &served);
    assert_eq!(server.workers(), workers, "no worker was lost");
}
