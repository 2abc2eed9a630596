//! Requests that are wrong, and pools that are too small: each is told why, and the next request is right.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;

use serde_json::{Value, json};

use crate::support::{Case, Fixture, Models, Refusal, Serve, Server, Tensor, assert_says};

/// A request's header for all of a case's inputs, as binary data.
fn header(case: &Case) -> Value {
    json!({"inputs": case.inputs.iter().map(Tensor::binary_header).collect::<Vec<_>>()})
}

fn data(case: &Case) -> Vec<u8> {
    case.inputs.iter().flat_map(|input| &input.data).copied().collect()
}

#[test]
fn a_request_that_does_not_fit_the_model_is_told_where() {
    let fixture = Fixture::load("two-in-three-out");
    let server = Serve::new(Models::of([&fixture])).host(1).start();
    let workers = server.await_workers(2);
    let case = &fixture.cases[0];
    let [image, text] = case.inputs.as_slice() else { panic!("two inputs") };
    assert_eq!((&image.shape, &text.shape), (&vec![3, 16], &vec![3, 8]));

    let changed = |change: &dyn Fn(&mut Vec<Tensor>)| {
        let mut inputs = case.inputs.clone();
        change(&mut inputs);
        server.client.infer("two-in-three-out", &inputs).unwrap_err()
    };
    let zeros = |rows: u64, columns: u64| vec![0; usize::try_from(rows * columns * 4).unwrap()];
    let resized = |index: usize, shape: [u64; 2]| {
        changed(&|inputs| {
            inputs[index].data = zeros(shape[0], shape[1]);
            inputs[index].shape = shape.to_vec();
        })
    };
    let with_header = |change: &dyn Fn(&mut Value)| {
        let mut header = header(case);
        change(&mut header);
        server.client.infer_with("two-in-three-out", &header, &data(case)).unwrap_err()
    };
    let json = |text: &str| {
        let reply = server.client.post("/v2/models/two-in-three-out/infer", &[], text.as_bytes()).unwrap();
        Refusal { status: reply.status, error: reply.error() }
    };
    let with_data = |datatype: &str, values: &str| {
        json(&format!(
            r#"{{"inputs": [{{"name": "image_features", "datatype": "{datatype}", "shape": [1, 16], "data": {values}}},
                {{"name": "text_features", "datatype": "FP32", "shape": [1, 8], "data": [0, 0, 0, 0, 0, 0, 0, 0]}}]}}"#
        ))
    };

    let told: Vec<(&str, Refusal, &[&str])> = vec![
        ("an input missing", changed(&|inputs| drop(inputs.pop())), &["'text_features'", "missing"]),
        ("another name", changed(&|inputs| inputs[1].name = "text".into()), &["'text'", "text_features"]),
        (
            "an input too many",
            changed(&|inputs| inputs.push(Tensor { name: "third".into(), ..image.clone() })),
            &["'third'"],
        ),
        ("an input twice", changed(&|inputs| inputs.push(image.clone())), &["'image_features'"]),
        ("no input", changed(&Vec::clear), &["missing"]),
        (
            "another type",
            changed(&|inputs| inputs[0].datatype = "INT32".into()),
            &["'image_features'", "FP32", "INT32"],
        ),
        ("no type", changed(&|inputs| inputs[0].datatype = "FP31".into()), &["'image_features'", "FP31"]),
        ("too few dimensions", changed(&|inputs| inputs[0].shape = vec![48]), &["'image_features'", "[48]"]),
        ("another width", resized(0, [3, 17]), &["'image_features'", "16", "17"]),
        ("nothing in the batch", resized(0, [0, 16]), &["'image_features'", "1..16", "0"]),
        ("too much in the batch", resized(0, [17, 16]), &["'image_features'", "1..16", "17"]),
        ("batches that differ", resized(1, [2, 8]), &["text_features", "2", "3"]),
        (
            "bytes of another length",
            with_header(&|h| h["inputs"][0]["parameters"]["binary_data_size"] = 8.into()),
            &["'image_features'", "binary_data_size is 8", "192 bytes"],
        ),
        (
            "a length that overflows",
            with_header(&|h| h["inputs"][0]["shape"] = json!([1_u64 << 40, 1_u64 << 40])),
            &["'image_features'", "64 bits"],
        ),
        (
            "a negative length",
            with_header(&|h| h["inputs"][0]["shape"] = json!([-3, 16])),
            &["'image_features'", "[-3,16]"],
        ),
        (
            "no shape",
            with_header(&|h| h["inputs"][0]["shape"] = json!("wide")),
            &["'image_features'", "'shape'", "\"wide\""],
        ),
        (
            "an output that is not there",
            with_header(&|h| h["outputs"] = json!([{"name": "classes"}])),
            &["'classes'", "its outputs are"],
        ),
        ("no object", json("[]"), &["not an inference request"]),
        ("nothing", json(""), &["not an inference request"]),
        ("no JSON", json("{\"inputs\": [,]}"), &["line 1 column 13"]),
        ("deep JSON", json(&"[".repeat(100_000)), &["not an inference request"]),
        ("deep data", with_data("FP32", &"[".repeat(100_000)), &["not an inference request"]),
        ("too few values", with_data("FP32", "[1, 2]"), &["'image_features'", "16", "2"]),
        (
            "a text as a value",
            with_data("FP32", r#"["a", 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]"#),
            &["'image_features'", "\"a\""],
        ),
        (
            "a value too large",
            with_data("FP32", "[1e39, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]"),
            &["'image_features'", "1e39"],
        ),
    ];
    for (what, refusal, says) in &told {
        assert_eq!(refusal.status, 400, "{what}: {refusal:?}");
        assert_says(&refusal.error, says);
        assert!(refusal.error.len() < 500, "{what}: {}", refusal.error);
    }

    let infer = "/v2/models/two-in-three-out/infer";
    let post = |path: &str, headers: &[(&str, &str)]| {
        let reply = server.client.post(path, headers, header(case).to_string().as_bytes()).unwrap();
        (reply.status, reply.error())
    };
    let told = [
        ("unknown model", post("/v2/models/nobody/infer", &[]), 404, "unknown model 'nobody'"),
        ("unknown version", post("/v2/models/two-in-three-out/versions/7/infer", &[]), 404, "no version '7'"),
        ("unknown path", post("/v2/models/two-in-three-out/guess", &[]), 404, "no such resource"),
        ("another method", post("/v2/models/two-in-three-out", &[]), 405, "does not take POST"),
        ("compressed", post(infer, &[("Content-Encoding", "gzip")]), 415, "gzip"),
        (
            "a header beyond the body",
            post(infer, &[("Inference-Header-Content-Length", "99999")]),
            400,
            "99999",
        ),
        ("a header of no length", post(infer, &[("Inference-Header-Content-Length", "-1")]), 400, "-1"),
        ("binary data without a header", post(infer, &[]), 400, "Inference-Header-Content-Length"),
    ];
    for (what, (status, error), expected, says) in told {
        assert_eq!(status, expected, "{what}: {error}");
        assert_says(&error, &[says]);
    }

    server.client.check(&fixture.name, case);
    assert_eq!(server.await_workers(2), workers, "no worker had anything to do with it");
    assert_eq!(server.client.metric("pswitch_slot_in_use_bytes"), 0.0);
    let metrics = server.client.metrics();
    let refused = metrics["pswitch_requests_total{model=\"two-in-three-out\",outcome=\"invalid_request\"}"];
    assert!(refused >= 25.0, "{refused} are counted");
}

#[test]
fn a_body_over_the_limit_is_refused_whether_it_says_its_length_or_not() {
    let fixture = Fixture::load("dynamic-batch");
    let server = Serve::new(Models::of([&fixture]))
        .config("devices: [{id: host, threads: 1}]\nhttp: {max_body_size: 16KiB}\nslot_memory_size: 1MiB\n")
        .start();
    // 4,800 bytes a picture: three fit, seven do not.
    let [one, .., seven] = fixture.cases.as_slice() else { panic!("three cases") };
    let refusal = server.client.infer("dynamic-batch", &seven.inputs).unwrap_err();
    assert_eq!(refusal.status, 413);
    assert_says(&refusal.error, &["16384 bytes"]);
    server.client.check("dynamic-batch", one);

    // In chunks, the length shows only as they come.
    let mut stream = TcpStream::connect(&server.address).unwrap();
    let head = "POST /v2/models/dynamic-batch/infer HTTP/1.1\r\nHost: pswitch\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n";
    stream.write_all(head.as_bytes()).unwrap();
    for _ in 0..20 {
        let chunk = [b"400\r\n".as_slice(), &[b' '; 1024], b"\r\n"].concat();
        // The server may have heard enough before the last.
        if stream.write_all(&chunk).is_err() {
            break;
        }
    }
    let _ = stream.write_all(b"0\r\n\r\n");
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    let answer = String::from_utf8_lossy(&answer);
    assert_says(&answer, &["HTTP/1.1 413", "16384 bytes"]);
    server.client.check("dynamic-batch", one);
    assert_eq!(server.client.metric("pswitch_slot_in_use_bytes"), 0.0);
}

#[test]
fn a_model_that_raises_takes_its_request_down_and_nothing_else() {
    let [lookup, other] = ["lookup", "data-dependent"].map(Fixture::load);
    let server = Serve::new(Models::of([&lookup, &other])).host(1).start();
    let workers = server.await_workers(2);
    // A row of a parameter that is not there, which only the operator finds out.
    let mut inputs = lookup.cases[0].inputs.clone();
    let positions = inputs.iter_mut().find(|input| input.name == "positions").unwrap();
    positions.data = [99_i64.to_le_bytes(), 0_i64.to_le_bytes(), 1_i64.to_le_bytes()].concat();
    // A row of an embedding that is not there.
    let raising = lookup.cases.iter().find(|case| case.raises.is_some()).unwrap();
    // Often enough to reach both workers, and for both to be asked again.
    for _ in 0..6 {
        let refusal = server.client.infer("lookup", &inputs).unwrap_err();
        assert_eq!(refusal.status, 400);
        assert_says(&refusal.error, &["'lookup'", "aten::index", "node 'selected'", "out of bounds"]);
        assert!(!refusal.error.contains('\n'), "one line: {}", refusal.error);
        let refusal = server.client.infer("lookup", &raising.inputs).unwrap_err();
        assert_eq!(refusal.status, 400);
        assert_says(&refusal.error, &["'ids'", "index out of range", "a table of 20"]);
        for fixture in [&lookup, &other] {
            for case in fixture.cases.iter().filter(|case| case.raises.is_none()) {
                server.client.check(&fixture.name, case);
            }
        }
    }
    assert_eq!(server.await_workers(2), workers, "the workers are the same");
    assert_eq!(server.client.metric("pswitch_slot_in_use_bytes"), 0.0);
}

#[test]
fn a_model_that_the_pool_can_never_hold_is_left_out() {
    let [large, small] = ["recurrent", "integer-outputs"].map(Fixture::load);
    let server = Serve::new(Models::of([&large, &small])).host(1).homes(12 << 10).start();
    let (state, reason) = server.client.index().remove("recurrent").unwrap();
    assert_eq!(state, "UNAVAILABLE");
    assert_says(&reason, &["25600 bytes", "never fit", "12288 bytes"]);
    let refusal = server.client.infer("recurrent", &large.cases[0].inputs).unwrap_err();
    assert_eq!(refusal.status, 503);
    assert_says(&refusal.error, &["'recurrent'", "25600 bytes", "12288 bytes"]);
    server.client.check("integer-outputs", &small.cases[0]);
}

#[test]
fn an_arena_that_is_too_small_for_a_request_says_so() {
    let fixture = Fixture::load("dynamic-batch");
    let serve = |arena: &str| {
        let serve = Serve::new(Models::of([&fixture])).host(1).flag("--pool-size", "1MiB");
        serve.flag("--arena-size", arena).start()
    };
    let [one, .., seven] = fixture.cases.as_slice() else { panic!("three cases") };
    let refused = |server: &Server| server.client.infer("dynamic-batch", &seven.inputs).unwrap_err();

    // Room for the pictures but not for what is computed from them.
    let server = serve("64KiB");
    let refusal = refused(&server);
    assert_eq!(refusal.status, 500, "{refusal:?}");
    assert_says(&refusal.error, &["'dynamic-batch'", "the arena has no room", "arena_size", "smaller batch"]);
    server.client.check("dynamic-batch", one);
    assert_eq!(server.client.metric("pswitch_worker_restarts_total"), 0.0);

    // Not even for the pictures.
    let server = serve("32KiB");
    let refusal = refused(&server);
    assert_eq!(refusal.status, 413, "{refusal:?}");
    assert_says(&refusal.error, &["the request's inputs", "33792 bytes", "32256 bytes"]);
    server.client.check("dynamic-batch", one);
}

#[test]
fn a_full_queue_and_a_passed_deadline_are_told_apart() {
    let link = crate::faults::SlowLink::serve();
    let client = &link.server.client;
    let inputs = &link.slow.cases[0].inputs;
    std::thread::scope(|scope| {
        let (running, _) = link.begin(scope);
        let request = json!({
            "inputs": inputs.iter().map(Tensor::binary_header).collect::<Vec<_>>(),
            "parameters": {"timeout": 1000},
        });
        let refusal = client.infer_with(&link.slow.name, &request, &data(&link.slow.cases[0])).unwrap_err();
        assert_eq!(refusal.status, 504);
        assert_says(&refusal.error, &["deadline passed"]);
        running.join().unwrap().unwrap().assert_is(&link.slow.name, &link.slow.cases[0]);
    });
    assert_eq!(client.metric("pswitch_worker_restarts_total"), 0.0);

    let fixture = Fixture::load("recurrent");
    let models = Models::of([&fixture]);
    models.settings("recurrent", "max_queue: 1\n");
    let server = Serve::new(models).host(1).flag("--link-bandwidth", "2kB/s").start();
    // Its input alone takes a fifth of a second: one executes, one waits, the third is one too many.
    let case = &fixture.cases[0];
    let (answered, refused): (Vec<_>, Vec<_>) = std::thread::scope(|scope| {
        let requests: Vec<_> =
            (0..8).map(|_| scope.spawn(|| server.client.infer("recurrent", &case.inputs))).collect();
        requests.into_iter().map(|request| request.join().unwrap()).partition(Result::is_ok)
    });
    assert!(
        answered.len() >= 2 && !refused.is_empty(),
        "{} answered, {} refused",
        answered.len(),
        refused.len()
    );
    answered.into_iter().for_each(|answer| answer.unwrap().assert_is("recurrent", case));
    for refusal in refused.into_iter().map(Result::unwrap_err) {
        assert_eq!(refusal.status, 429);
        assert_says(&refusal.error, &["1 requests wait already, the limit is 1"]);
    }
}
