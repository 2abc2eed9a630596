//! The command line: what it prints, and the exit codes that `pswitch --help` documents.

use std::net::TcpListener;
use std::process::Command;

use serde_json::{Value, json};

use crate::support::{Ended, Fixture, Models, Serve, Tensor, assert_says, pswitch, run};

#[track_caller]
pub(crate) fn assert_ended(ended: &Ended, code: i32, says: &[&str]) {
    assert_eq!(ended.code, Some(code), "{ended:?}");
    if code == 0 {
        assert_says(&ended.stdout, says);
    } else {
        assert_says(&ended.stderr, says);
        assert_eq!(ended.stdout, "", "errors go to standard error");
        assert!(!ended.stderr.contains("panicked"), "{}", ended.stderr);
    }
}

pub(crate) fn command(arguments: &[&str]) -> Ended {
    run(pswitch().args(arguments))
}

#[test]
fn wrong_usage_is_2() {
    for (arguments, says) in [
        (vec!["serve", "--pool-size", "8 apples"], vec!["--pool-size", "8 apples", "8GiB"]),
        (vec!["serve", "--device", "tpu"], vec!["--device", "tpu"]),
        (vec!["serve", "--http", "localhost"], vec!["--http", "localhost"]),
        (vec!["serve", "--plan", "best"], vec!["--plan", "best"]),
        (vec!["serve", "--link-per-copy-us", "slow"], vec!["--link-per-copy-us", "slow"]),
        (vec!["serve", "--wrokers", "3"], vec!["--wrokers", "--workers"]),
        (vec!["infer", "m", "--input", "x"], vec!["--input", "NAME=VALUE"]),
        (vec!["plan-groups"], vec!["MODEL", "--profile"]),
        (vec!["profile"], vec!["MODEL"]),
        (vec!["train", "submit", "a/b", "c.yaml"], vec!["a/b"]),
        (vec!["train", "plot", "progress.jsonl", "--out", "loss.pdf"], vec!["loss.pdf", ".svg"]),
        (vec!["serve", "--train", "task"], vec!["--train", "NAME=FILE"]),
        (vec!["bench"], vec!["Usage", "switching", "start-up"]),
        (vec!["bench", "switch", "--switches", "19"], vec!["--switches", "19"]),
        (vec!["bench", "plan", "--rounds", "4"], vec!["--rounds", "4"]),
        (vec![], vec!["Usage"]),
    ] {
        assert_ended(&command(&arguments), 2, &says);
    }
}

#[test]
fn help_shows_examples_and_exit_codes() {
    let help = command(&["--help"]);
    assert_eq!(help.code, Some(0));
    // Lines end where the terminal is narrow.
    let words = help.stdout.split_whitespace().collect::<Vec<_>>().join(" ");
    assert_says(
        &words,
        &["Exit codes: 0 success", "3 a file", "4 no server answers", "5 the server refused"],
    );
    for name in ["serve", "infer", "models", "plan-groups", "train", "bench"] {
        assert_ended(&command(&[name, "--help"]), 0, &["Examples:", &format!("pswitch {name} ")]);
    }
    assert_ended(&command(&["--version"]), 0, &["pswitch 0."]);
}

#[test]
fn a_benchmark_that_cannot_measure_is_1() {
    for (arguments, says) in [
        (vec!["sweep", "/nowhere.json"], "pswitch: cannot read /nowhere.json"),
        (vec!["switch", "--model", "/nowhere/a", "/nowhere/b"], "pswitch: there is no /nowhere/a/model.pt2"),
        (vec!["switching", "--log", "a=b=c"], "is no log filter"),
    ] {
        assert_ended(&command(&[vec!["bench"], arguments].concat()), 1, &[says]);
    }
}

#[test]
fn files_that_cannot_be_used_are_3() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let nowhere = folder.path().join("nowhere").to_str().unwrap().to_owned();
    let serve = |config: &str| command(&["serve", "--config", config, "--http", "127.0.0.1:0"]);

    let typo = write("typo.yaml", "repository: models\nlimits:\n  max_weight: 1\n");
    assert_ended(&serve(&typo), 3, &["typo.yaml", "unknown field `max_weight`", "line 3 column 3"]);
    let range = write("range.yaml", "devices: [{id: host, workers: 1}]\n");
    assert_ended(&serve(&range), 3, &["range.yaml", "workers", "from 2 to 64", "line 1 column"]);
    let twice = write("twice.yaml", "devices: [{id: host}, {id: host}]\n");
    assert_ended(&serve(&twice), 3, &["devices[1].id", "host is there already"]);
    let broken = write("broken.yaml", "devices: [\n");
    assert_ended(&serve(&broken), 3, &["broken.yaml", "line 2 column 1"]);
    assert_ended(&serve(&nowhere), 3, &["cannot read the configuration", "nowhere"]);
    assert_ended(
        &command(&["serve", &nowhere, "--device", "host"]),
        3,
        &["cannot read the model repository", "nowhere"],
    );
    let too_small = command(&["serve", "--pool-size", "1MiB", "--arena-size", "2MiB"]);
    assert_ended(&too_small, 3, &["arena_size", "2MiB", "1MiB"]);
    assert_ended(&command(&["serve", "--log", "a=b=c"]), 3, &["`a=b=c` is no log filter"]);

    assert_ended(&command(&["models", &nowhere]), 3, &["cannot read the model repository", "nowhere"]);
}

#[test]
fn a_server_that_cannot_start_is_1() {
    let fixture = Fixture::load("integer-outputs");
    let models = Models::of([&fixture]);
    let serve = |arguments: &[&str]| {
        run(pswitch().arg("serve").arg(models.path()).args(["--threads", "1"]).args(arguments))
    };
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let ended = serve(&["--device", "host", "--http", &address]);
    assert_ended(
        &ended,
        1,
        &[&format!("cannot listen on {address}"), "choose another address with --http", "in use"],
    );

    let ended = serve(&["--device", "host", "--http", "127.0.0.1:0", "--pool-size", "4KiB"]);
    assert_ended(
        &ended,
        1,
        &["the pool cannot be set up", "can never fit", "4096 bytes", "make the pool larger"],
    );

    let ended = serve(&["--device", "cuda:99", "--http", "127.0.0.1:0"]);
    assert_ended(&ended, 1, &["device cuda:99 is not available"]);
}

#[test]
fn infer_takes_texts_and_files_and_prints_or_saves() {
    let fixture = Fixture::load("two-in-three-out");
    let server = Serve::new(Models::of([&fixture])).host(1).start();
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let case = &fixture.cases[0];
    let [image, text] = case.inputs.as_slice() else { panic!("two inputs") };
    std::fs::write(path("image.npy"), npy(image)).unwrap();
    std::fs::write(path("text.json"), nested(text).to_string()).unwrap();
    let infer = |arguments: &[&str]| {
        let server = ["--server", &server.url()].map(str::to_owned);
        run(pswitch().args(["infer", "two-in-three-out"]).args(server).args(arguments))
    };
    let image_from_file = format!("image_features={}", path("image.npy"));
    let text_from_file = format!("text_features={}", path("text.json"));
    let inputs = ["-i", image_from_file.as_str(), "-i", text_from_file.as_str()];

    let json = infer(&[&inputs[..], &["--print", "json"]].concat());
    assert_ended(&json, 0, &[]);
    let printed: Value = serde_json::from_str(&json.stdout).unwrap();
    for output in &case.outputs {
        assert_eq!(flat(&printed[&output.name]), output.data, "{}", output.name);
    }

    // The same inputs as texts; outputs as files, and as a summary with the times of the request.
    let as_text = format!("image_features={}", nested(image));
    let saved = infer(&["-i", &as_text, inputs[2], inputs[3], "--save", &path("outputs")]);
    assert_ended(&saved, 0, &["FP32 [3", "queue ", "switch ", "compute ", " ms"]);
    for output in &case.outputs {
        let file = std::fs::read(folder.path().join(format!("outputs/{}.npy", output.name))).unwrap();
        assert!(file.starts_with(b"\x93NUMPY") && file.ends_with(&output.data), "{}", output.name);
    }

    let refused = infer(&["-i", &as_text]);
    assert_ended(&refused, 5, &["the server refused", "400", "'text_features'"]);
    let unknown = run(pswitch().args(["infer", "nobody", "--server", &server.url()]));
    assert_ended(&unknown, 5, &["404", "unknown model 'nobody'"]);
    assert_ended(&infer(&["-i", "picture=[1]"]), 3, &["no input 'picture'", "image_features, text_features"]);
    let missing = format!("image_features={}", path("nowhere.npy"));
    assert_ended(&infer(&["-i", &missing]), 3, &["nowhere.npy"]);
    assert_ended(
        &infer(&["-i", "image_features=[[1], 2]"]),
        3,
        &["input 'image_features'", "a list is expected"],
    );

    let listed = run(pswitch().args(["models", "--server", &server.url()]));
    assert_ended(&listed, 0, &["two-in-three-out (version 1)  READY", "in  image_features FP32 [-1, 16]"]);
    let listed = run(pswitch().args(["models", "--format", "json"]).env("PSWITCH_SERVER", server.url()));
    let rows: Value = serde_json::from_str(&listed.stdout).unwrap();
    assert_eq!(rows[0]["name"], "two-in-three-out");
    assert_eq!(rows[0]["state"], "READY");
}

#[test]
fn no_server_is_4() {
    // An address that was free a moment ago, and that nobody else takes: it is bound but does not listen.
    let socket = nix::sys::socket::socket(
        nix::sys::socket::AddressFamily::Inet,
        nix::sys::socket::SockType::Stream,
        nix::sys::socket::SockFlag::empty(),
        None,
    )
    .unwrap();
    let any = nix::sys::socket::SockaddrIn::new(127, 0, 0, 1, 0);
    nix::sys::socket::bind(std::os::fd::AsRawFd::as_raw_fd(&socket), &any).unwrap();
    let bound: nix::sys::socket::SockaddrIn =
        nix::sys::socket::getsockname(std::os::fd::AsRawFd::as_raw_fd(&socket)).unwrap();
    let url = format!("http://127.0.0.1:{}", bound.port());
    for arguments in [vec!["infer", "resnet18", "--server", &url], vec!["models", "--server", &url]] {
        assert_ended(
            &command(&arguments),
            4,
            &["the server cannot be reached", &format!("no answer from {url}")],
        );
    }
}

#[test]
fn models_lists_a_folder_without_a_server() {
    let fixtures = ["dynamic-batch", "conditional", "integer-outputs"].map(Fixture::load);
    let models = Models::of(&fixtures);
    std::fs::create_dir(models.path().join(".git")).unwrap();
    std::fs::write(models.path().join("README.md"), "models").unwrap();
    models.settings("integer-outputs", "version: 3\n");
    let listed = run(pswitch().arg("models").arg(models.path()));
    assert_ended(
        &listed,
        0,
        &[
            "dynamic-batch (version 1)  READABLE  8.50 KiB, 8 layers",
            "in  image FP32 [1..8, 3, 20, 20]",
            "out logits FP32",
            "conditional (version 1)  BROKEN",
            "higher-order operator `cond`",
            "integer-outputs (version 3)  READABLE",
            "out positive BOOL",
        ],
    );
    let listed = run(pswitch().args(["models", "--format", "json"]).arg(models.path()));
    let rows: Value = serde_json::from_str(&listed.stdout).unwrap();
    let names: Vec<&str> = rows.as_array().unwrap().iter().map(|row| row["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["conditional", "dynamic-batch", "integer-outputs"]);
    assert_eq!(rows[1]["weight_bytes"], 8704);
    assert_eq!(rows[1]["layers"], 8);
    assert_eq!(rows[0]["state"], "BROKEN");
}

#[test]
fn completions_are_scripts_for_their_shells() {
    for shell in ["bash", "elvish", "fish", "powershell", "zsh"] {
        assert_ended(
            &command(&["completions", shell]),
            0,
            &["pswitch", "serve", "plan-groups", "link-bandwidth"],
        );
    }
    let folder = tempfile::tempdir().unwrap();
    let script = folder.path().join("pswitch.bash");
    std::fs::write(&script, command(&["completions", "bash"]).stdout).unwrap();
    let checked = run(Command::new("bash").arg("-n").arg(&script));
    assert_eq!((checked.code, checked.stderr.as_str()), (Some(0), ""));
    assert_ended(&command(&["completions", "tcsh"]), 2, &["tcsh", "fish"]);
}

/// A reader that has seen enough is no failure.
#[test]
fn a_closed_pipe_ends_the_output_quietly() {
    let models = Models::of([&Fixture::load("integer-outputs")]);
    let script = format!(
        "{} models {} | true; exit ${{PIPESTATUS[0]}}",
        env!("CARGO_BIN_EXE_pswitch"),
        models.path().display()
    );
    let ended = run(Command::new("bash").args(["-c", &script]));
    assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""));
}

/// A tensor as JSON, nested as its shape is; of two dimensions.
fn nested(tensor: &Tensor) -> Value {
    let columns = usize::try_from(tensor.shape[1]).unwrap();
    let (words, _) = tensor.data.as_chunks::<4>();
    let values: Vec<f32> = words.iter().map(|word| f32::from_le_bytes(*word)).collect();
    json!(values.chunks(columns).collect::<Vec<_>>())
}

/// The bytes of floats that are nested in JSON.
fn flat(value: &Value) -> Vec<u8> {
    match value {
        Value::Array(items) => items.iter().flat_map(flat).collect(),
        number => number.to_string().parse::<f32>().unwrap().to_le_bytes().to_vec(),
    }
}

/// A .npy file, as `numpy.save` would write it.
fn npy(tensor: &Tensor) -> Vec<u8> {
    assert_eq!(tensor.datatype, "FP32");
    let shape: String = tensor.shape.iter().map(|extent| format!("{extent},")).collect();
    let mut header = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({shape}), }}");
    while (header.len() + 11) % 64 != 0 {
        header.push(' ');
    }
    header.push('\n');
    let length = u16::try_from(header.len()).unwrap().to_le_bytes();
    [b"\x93NUMPY\x01\x00".as_slice(), &length, header.as_bytes(), &tensor.data].concat()
}
