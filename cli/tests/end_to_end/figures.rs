//! The figures of the paper on the host: every mechanism with real processes, and what becomes of them when one fails or
//! the measurement is broken off.

use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use nix::sys::signal::Signal;
use serde_json::Value;
use tempfile::TempDir;

use crate::support::{Process, assert_says, await_end, children, eventually, pswitch, run};

/// What a process without a server is called.
const ALONE: &str = "pswitch-alone";

/// A measurement of one figure, with a folder of its own for all that it writes.
struct Bench {
    place: TempDir,
    command: Command,
}

impl Bench {
    /// The smallest that there is: one round, a perceptron that trains, a link that need not be matched.
    fn figure(name: &str) -> Self {
        let place = tempfile::tempdir().unwrap();
        let target = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target").canonicalize().unwrap();
        let program = target.join("training/perceptron");
        assert!(program.exists(), "{} is missing: run `cargo xtask fixtures`", program.display());
        let task = place.path().join("task.yaml");
        let text = format!(
            "program: {0}\noptimizer: {{kind: adamw, lr: 1e-3}}\nlength: {{steps: 10}}\n\
             data: {{files: [{0}/data.safetensors], batch_size: 5}}\n",
            program.display()
        );
        std::fs::write(&task, text).unwrap();
        let temporary = place.path().join("tmp");
        std::fs::create_dir(&temporary).unwrap();
        let mut command = pswitch();
        command.args(["bench", name, "--quick", "--rounds", "1", "--link-bandwidth", "1GB/s"]);
        command.args(["--training-size", "64MiB", "--arena-size", "64MiB", "--model"]);
        command.arg(target.join("fixtures/mobilenet_v3_small"));
        command.arg("--task").arg(task).arg("--out").arg(place.path().join("results"));
        command.env("TMPDIR", temporary);
        Self { place, command }
    }

    /// What it wrote; nothing else is left of it.
    fn results(&self, name: &str) -> Value {
        let left: Vec<PathBuf> = std::fs::read_dir(self.place.path().join("tmp"))
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .collect();
        assert!(left.is_empty(), "{left:?}");
        let text = std::fs::read_to_string(self.place.path().join(format!("results/{name}.json"))).unwrap();
        serde_json::from_str::<Value>(&text).unwrap()["results"].clone()
    }
}

fn names(results: &Value, list: &str) -> Vec<String> {
    let entries = results[list].as_array().map_or(&[][..], Vec::as_slice);
    entries.iter().map(|entry| entry["mechanism"].as_str().unwrap().to_owned()).collect()
}

fn reason<'a>(results: &'a Value, mechanism: &str) -> &'a str {
    let left_out = results["left_out"].as_array().unwrap();
    let entry = left_out.iter().find(|entry| entry["mechanism"] == mechanism).unwrap();
    entry["reason"].as_str().unwrap()
}

/// Checks a figure of bars: these were measured, and those left out.
fn check_bars(name: &str, measured: &[&str], left_out: &[&str]) {
    let mut bench = Bench::figure(name);
    let ended = run(&mut bench.command);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert_says(&ended.stdout, &["median ms", "p99", "wrong outputs: 0 (asked: at most 0): met"]);
    let results = bench.results(name);
    assert_eq!(names(&results, "bars"), measured, "{}", ended.stderr);
    assert_eq!(names(&results, "left_out"), left_out, "{}", ended.stderr);
    for bar in results["bars"].as_array().unwrap() {
        assert!(!bar["latencies_ms"].as_array().unwrap().is_empty(), "{bar}");
        assert!(bar["parts"]["compute_ms"].as_f64().unwrap() > 0.0, "{bar}");
    }
}

#[test]
fn figure_5_has_every_mechanism_but_mps() {
    check_bars("figure5", &["ready", "pswitch", "stop-and-start"], &["mps"]);
}

#[test]
fn figure_6_counts_batches_and_steps_in_turns() {
    let mut bench = Bench::figure("figure6");
    let ended = run(&mut bench.command);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    let results = bench.results("figure6");
    let expected = ["ready", "ready", "pswitch", "pswitch", "stop-and-start", "stop-and-start"];
    assert_eq!(names(&results, "cycles"), expected, "{}", ended.stderr);
    for cycle in results["cycles"].as_array().unwrap() {
        assert_eq!(cycle["steps_per_s"].is_array(), cycle["mechanism"] != "ready", "{cycle}");
    }
}

#[test]
fn figure_7_has_every_way_to_move_weights() {
    check_bars("figure7", &["pswitch", "per-layer", "grouped", "no-optimization"], &[]);
}

#[test]
fn figure_8_leaves_out_what_only_a_gpu_has() {
    check_bars("figure8", &["pswitch", "no-unified", "no-ipc"], &["no-pinned", "managed"]);
}

#[test]
fn figure_9_has_one_process_and_two() {
    check_bars("figure9", &["pswitch", "one-process", "two-processes"], &[]);
}

#[test]
fn figure_10_serves_both_ways_from_one_server() {
    let mut bench = Bench::figure("figure10");
    // Three models, and room for one and a half.
    bench.command.args(["--copies", "3", "--oversubscription", "2", "--load", "0.6", "--seconds", "4"]);
    let ended = run(&mut bench.command);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert_says(&ended.stdout, &["wrong outputs: 0 (asked: at most 0): met"]);
    let results = bench.results("figure10");
    let expected = ["pswitch", "load-on-demand", "pswitch", "load-on-demand"];
    assert_eq!(names(&results, "loads"), expected, "{}", ended.stderr);
    let poisson = results["loads"].as_array().unwrap().iter().filter(|load| load["arrivals"] == "poisson");
    for load in poisson {
        assert!(load["switches"].as_u64().unwrap() > 0, "{load}");
    }
}

/// A measurement that is under way.
struct Running {
    child: Child,
    process: Process,
}

impl Running {
    fn start(bench: &mut Bench) -> Self {
        let child = bench.command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let process = Process::of(i32::try_from(child.id()).unwrap());
        Self { child, process }
    }

    /// A process without a server, once there is one.
    fn alone(&self) -> Process {
        eventually("a process without a server", || {
            let found = children(self.process.pid).into_iter().find(|child| child.name == ALONE);
            found.ok_or_else(|| format!("{:?}", children(self.process.pid)))
        })
    }

    /// Its processes: zygotes, and workers with and without a server.
    fn processes(&self) -> Vec<Process> {
        let own = children(self.process.pid);
        let grandchildren: Vec<_> = own.iter().flat_map(|child| children(child.pid)).collect();
        own.into_iter().chain(grandchildren).collect()
    }

    fn wait(mut self) -> (Option<i32>, String) {
        let mut said = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        (self.child.wait().unwrap().code(), said)
    }
}

#[test]
fn a_mechanism_that_fails_is_left_out_and_the_others_are_kept() {
    let mut bench = Bench::figure("figure9");
    let running = Running::start(&mut bench);
    // The one process of the mechanism that has no other.
    let alone = running.alone();
    assert!(alone.signal(Signal::SIGKILL));
    let (code, said) = running.wait();
    assert_eq!(code, Some(0), "{said}");
    let results = bench.results("figure9");
    assert_eq!(names(&results, "bars"), ["pswitch", "two-processes"], "{said}");
    assert_eq!(names(&results, "left_out"), ["one-process"]);
    assert_says(reason(&results, "one-process"), &["a process ended", "signal: 9"]);
}

#[test]
fn what_is_broken_off_leaves_nothing_but_the_results_so_far() {
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let mut bench = Bench::figure("figure9");
        let running = Running::start(&mut bench);
        let alone = running.alone();
        let processes = running.processes();
        assert!(
            processes.contains(&alone) && processes.iter().any(|process| process.name == "pswitch-zygote")
        );
        assert!(running.process.signal(signal));
        let (code, said) = running.wait();
        assert_eq!(code, Some(0), "{said}");
        await_end(&processes);
        let results = bench.results("figure9");
        assert_eq!(names(&results, "bars"), ["pswitch"], "{said}");
        assert_eq!(names(&results, "left_out"), ["one-process", "two-processes"]);
        assert_eq!(reason(&results, "two-processes"), "interrupted");
    }
}

#[test]
fn processes_die_with_a_measurement_that_is_killed() {
    let mut bench = Bench::figure("figure5");
    let running = Running::start(&mut bench);
    running.alone();
    let processes = running.processes();
    assert!(running.process.signal(Signal::SIGKILL));
    let (code, said) = running.wait();
    assert_eq!(code, None, "{said}");
    await_end(&processes);
}
