//! Training tasks: taken, shown, told to do something, and refused.

use serde_json::json;

use crate::harness::Server;

const CONFIG: &str = "program: step.pt2\n";

#[test]
fn a_task_is_taken_shown_and_listed() {
    let server = Server::start();
    let mut client = server.client();
    let none = client.get("/v2/training/tasks");
    assert_eq!((none.status, none.json()), (200, json!([])));

    let taken = client.post("/v2/training/tasks/resnet-18_v1.5", &[], CONFIG.as_bytes());
    let expected = json!({
        "name": "resnet-18_v1.5",
        "state": "preparing",
        "reason": "",
        "device": "host",
        "steps_done": 1,
        "total_steps": CONFIG.len(),
        "learning_rate": 0.25,
        "progress": {
            "steps_done": 1,
            "steps_computed": 1,
            "goodput": 1.0,
            "steps_per_s": 1.0,
            "samples_per_s": 8.0,
            "samples": 8,
            "last_loss": 0.5,
            "computing_us": 1_000_000,
            "discarded_us": 0,
            "interruptions": 0,
            "paused_us": 0,
            "by_reason": {},
        },
        "checkpoint": null,
        "checkpoint_error": "",
        "last_yield_us": 850,
        "residence": "host",
        "made_room": 3,
        "log": "/logs/resnet-18_v1.5.jsonl",
    });
    assert_eq!((taken.status, taken.json()), (201, expected.clone()));
    assert_eq!(taken.header("content-type"), Some("application/json"));

    let shown = client.get("/v2/training/tasks/resnet-18_v1.5");
    assert_eq!((shown.status, shown.json()), (200, expected.clone()));
    assert_eq!(client.post("/v2/training/tasks/bert", &[], CONFIG.as_bytes()).status, 201);
    let all = client.get("/v2/training/tasks").json();
    assert_eq!((&all[0]["name"], &all[1]), (&json!("bert"), &expected));
}

#[test]
fn commands_go_to_the_task() {
    let server = Server::start();
    let mut client = server.client();
    assert_eq!(client.post("/v2/training/tasks/t", &[], CONFIG.as_bytes()).status, 201);
    for (command, state) in [("pause", "paused"), ("resume", "training"), ("stop", "stopped")] {
        let told = client.post(&format!("/v2/training/tasks/t/{command}"), &[], b"");
        assert_eq!((told.status, &told.json()["state"]), (200, &json!(state)));
        assert_eq!(client.get("/v2/training/tasks/t").json()["state"], state);
    }
    let error = client.post("/v2/training/tasks/t/pause", &[], b"").error(400);
    assert_eq!(error, "training task 't' is over");
    // Its name is free again.
    assert_eq!(client.post("/v2/training/tasks/t", &[], CONFIG.as_bytes()).status, 201);
    let error = client.post("/v2/training/tasks/t", &[], CONFIG.as_bytes()).error(400);
    assert_eq!(error, "training task 't' is not over");
}

#[test]
fn what_is_not_there_is_said_so() {
    let server = Server::start();
    let mut client = server.client();
    assert_eq!(client.get("/v2/training/tasks/nope").error(404), "unknown training task 'nope'");
    for command in ["pause", "resume", "stop"] {
        let path = format!("/v2/training/tasks/nope/{command}");
        assert_eq!(client.post(&path, &[], b"").error(404), "unknown training task 'nope'");
        assert_eq!(client.get(&path).error(405), format!("{path} does not take GET"));
    }
    let error = client.post("/v2/training/tasks", &[], CONFIG.as_bytes()).error(405);
    assert_eq!(error, "/v2/training/tasks does not take POST");
    let error = client.post("/v2/training/tasks/nope/hurry", &[], b"").error(404);
    assert_eq!(error, "no such resource: POST /v2/training/tasks/nope/hurry");
}

#[test]
fn names_follow_the_rules_of_models() {
    let server = Server::start();
    let mut client = server.client();
    let rule = "it must begin with a letter or a digit and go on with letters, digits, '.', '_' and '-'";
    for (written, name) in
        [("..%2Fetc", "../etc"), ("a%2Fb", "a/b"), ("-a", "-a"), ("a%20b", "a b"), ("a%0Ab", "a\\nb")]
    {
        let path = format!("/v2/training/tasks/{written}");
        let expected = format!("'{name}' is not a training task's name: {rule}");
        assert_eq!(client.post(&path, &[], CONFIG.as_bytes()).error(400), expected);
        assert_eq!(client.get(&path).error(400), expected);
        assert_eq!(client.post(&format!("{path}/stop"), &[], b"").error(400), expected);
    }
    let long = format!("/v2/training/tasks/{}", "x".repeat(129));
    assert!(client.get(&long).error(400).ends_with("it must be 1 to 128 bytes long"));
    assert!(client.get("/v2/training/tasks/%ff").error(400).contains("UTF-8"));
    assert_eq!(client.get("/v2/training/tasks").json(), json!([]));
}

#[test]
fn configurations_that_cannot_be_taken() {
    let server = Server::start();
    let mut client = server.client();
    let path = "/v2/training/tasks/t";
    let largest = vec![b'#'; 64 << 10];
    assert_eq!(client.post(path, &[], &largest).json()["total_steps"], 64 << 10);
    assert_eq!(client.post(&format!("{path}/stop"), &[], b"").status, 200);

    let larger = vec![b'#'; (64 << 10) + 1];
    let error = client.post(path, &[], &larger).error(413);
    assert_eq!(error, "a request's body of 65537 bytes exceeds the limit of 65536 bytes");
    // A body in chunks does not say how long it is.
    let mut chunked =
        format!("POST {path} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n10001\r\n");
    chunked += &"#".repeat(65537);
    let mut other = server.client();
    other.send((chunked + "\r\n0\r\n\r\n").as_bytes()).unwrap();
    assert!(other.response().unwrap().error(413).contains("exceeds the limit of 65536 bytes"));

    let error = client.post(path, &[], b"program: \xff").error(400);
    assert!(error.starts_with("the task's configuration is not UTF-8: invalid utf-8"), "{error}");
    assert_eq!(client.post(path, &[], b"wrong: 1").error(400), "unknown field `wrong`");
    assert_eq!(client.get(path).json()["state"], "stopped");
}

#[test]
fn failures_of_the_service_have_their_status() {
    let server = Server::start();
    let mut client = server.client();
    for (task, status, message) in [
        ("full", 429, "64 requests wait already, the limit is 64"),
        ("draining", 503, "the server is shutting down"),
        ("internal", 500, "internal error: a bug"),
    ] {
        let response = client.post(&format!("/v2/training/tasks/{task}"), &[], CONFIG.as_bytes());
        assert_eq!(response.error(status), message);
        assert_eq!(response.header("retry-after"), (status == 429).then_some("1"));
    }
}
