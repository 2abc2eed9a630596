//! Training beside serving: tasks give way to requests, survive kills and restarts, and lose nothing by it.

use std::collections::BTreeMap;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::Value;
use tempfile::TempDir;

use crate::commands::assert_ended;
use crate::support::{
    Client, Dice, Fixture, Models, Process, Serve, Server, assert_says, await_end, eventually, pswitch, run,
};

fn program() -> PathBuf {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/training/perceptron");
    assert!(folder.join("model.pt2").exists(), "{} is missing: run `cargo xtask fixtures`", folder.display());
    folder.canonicalize().unwrap()
}

/// A place for configurations and checkpoints.
pub(crate) struct Place(TempDir);

impl Place {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    /// Puts a file where a task has its checkpoints.
    fn block(&self, name: &str) -> PathBuf {
        let folder = self.0.path().join(name);
        eventually("a file is where the checkpoints were", || {
            // One may be written meanwhile.
            let _ = std::fs::remove_dir_all(&folder);
            std::fs::write(&folder, "").map_err(|error| error.to_string())
        });
        folder
    }

    /// Writes the configuration of a task of so many steps, with a folder for its checkpoints.
    pub(crate) fn task(&self, name: &str, steps: u32) -> PathBuf {
        let program = program();
        let text = format!(
            "program: {0}\noptimizer: {{kind: adamw, lr: 1e-3}}\nschedule: {{kind: cosine, warm_up: 10}}\n\
             length: {{steps: {steps}}}\ndata: {{files: [{0}/data.safetensors], batch_size: 5}}\n\
             checkpoint: {{folder: {1}, every_steps: 50}}\n",
            program.display(),
            self.0.path().join(name).display()
        );
        let path = self.0.path().join(format!("{name}.yaml"));
        std::fs::write(&path, text).unwrap();
        path
    }

    /// The checkpoint of a step.
    pub(crate) fn checkpoint(&self, name: &str, step: u32) -> Vec<u8> {
        let path = self.0.path().join(name).join(format!("step-{step:08}.safetensors"));
        std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    }
}

fn serve(fixture: &Fixture) -> Serve {
    Serve::new(Models::of([fixture])).host(1).flag("--training-size", "64MiB")
}

pub(crate) fn submit(client: &Client, name: &str, config: &Path) -> (u16, Value) {
    let text = std::fs::read(config).unwrap();
    let reply = client.post(&format!("/v2/training/tasks/{name}"), &[], &text).unwrap();
    (reply.status, serde_json::from_slice(&reply.body).unwrap())
}

pub(crate) fn command(client: &Client, name: &str, command: &str) -> Value {
    let reply = client.post(&format!("/v2/training/tasks/{name}/{command}"), &[], b"").unwrap();
    let body: Value = serde_json::from_slice(&reply.body).unwrap();
    assert_eq!(reply.status, 200, "{command}: {body}");
    body
}

pub(crate) fn status(client: &Client, name: &str) -> Value {
    let reply = client.get(&format!("/v2/training/tasks/{name}")).unwrap();
    assert_eq!(reply.status, 200);
    serde_json::from_slice(&reply.body).unwrap()
}

pub(crate) fn await_state(client: &Client, name: &str, wanted: &str) -> Value {
    eventually(&format!("task {name} is {wanted}"), || {
        let status = status(client, name);
        if status["state"] == wanted { Ok(status) } else { Err(status.to_string()) }
    })
}

pub(crate) fn await_steps(client: &Client, name: &str, steps: u64) -> Value {
    eventually(&format!("task {name} has {steps} steps"), || {
        let status = status(client, name);
        if status["steps_done"].as_u64().unwrap() >= steps { Ok(status) } else { Err(status.to_string()) }
    })
}

/// Trains the same once more, with nothing in between: a task that is over has come to the same state, to the last bit.
pub(crate) fn check_against_a_whole_run(client: &Client, place: &Place, name: &str, steps: u32) {
    submit(client, "whole", &place.task("whole", steps));
    await_state(client, "whole", "finished");
    assert!(place.checkpoint(name, steps) == place.checkpoint("whole", steps));
}

/// Does something while requests never end.
pub(crate) fn beside_requests(server: &Server, fixture: &Fixture, something: impl FnOnce()) {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let end = EndOnDrop(&stop);
        // Two clients, so that there is always a request.
        for _ in 0..2 {
            scope.spawn(|| {
                let client = Client::new(&server.url());
                while !stop.load(Ordering::Relaxed) {
                    client.check(&fixture.name, &fixture.cases[0]);
                }
            });
        }
        something();
        drop(end);
    });
}

/// Ends the clients, also when the test fails.
struct EndOnDrop<'a>(&'a AtomicBool);

impl Drop for EndOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// The worker that trains: it is none of those that execute.
pub(crate) fn training_worker(server: &Server, others: &[Process]) -> Process {
    eventually("a training worker is there", || {
        let found = server.workers().into_iter().find(|worker| others.iter().all(|it| it.pid != worker.pid));
        found.ok_or_else(|| "there is none".to_owned())
    })
}

#[test]
fn a_task_gives_way_to_requests_and_loses_nothing_by_it() {
    let (fixture, place) = (Fixture::load("resnet18"), Place::new());
    let server = serve(&fixture).start();
    let (code, taken) = submit(&server.client, "disturbed", &place.task("disturbed", 1500));
    assert_eq!((code, &taken["name"]), (201, &"disturbed".into()), "{taken}");
    await_steps(&server.client, "disturbed", 5);
    let mut interruptions = 0;
    let mut requests = 0;
    while interruptions < 20 {
        server.client.check(&fixture.name, &fixture.cases[requests % fixture.cases.len()]);
        requests += 1;
        let status = status(&server.client, "disturbed");
        interruptions = status["progress"]["interruptions"].as_u64().unwrap();
        assert!(status["state"] != "finished", "it ends before it was disturbed enough: {status}");
    }
    let disturbed = await_state(&server.client, "disturbed", "finished");
    assert_eq!(disturbed["steps_done"], 1500);
    // It stood still in the middle of steps, and none was computed twice.
    assert_eq!(disturbed["progress"]["goodput"], 1.0);
    let config = place.task("undisturbed", 1500);
    let train = |arguments: &[&str]| {
        let ended = run(pswitch().arg("train").args(arguments).env("PSWITCH_SERVER", server.url()));
        assert_eq!(ended.code, Some(0), "{arguments:?}: {}", ended.stderr);
        ended.stdout
    };
    train(&["submit", "undisturbed", config.to_str().unwrap()]);
    let undisturbed = await_state(&server.client, "undisturbed", "finished");
    assert_eq!(undisturbed["progress"]["interruptions"], 0);
    assert_eq!(undisturbed["progress"]["goodput"], 1.0);
    assert_eq!(disturbed["progress"]["last_loss"], undisturbed["progress"]["last_loss"]);
    assert!(place.checkpoint("disturbed", 1500) == place.checkpoint("undisturbed", 1500));
    let metrics = server.client.metrics();
    let of = |name: &str, labels: &str| metrics[&format!("pswitch_training_{name}{{{labels}}}")];
    assert_eq!(of("task", "task=\"disturbed\",state=\"finished\""), 1.0);
    assert!(of("steps_total", "task=\"disturbed\"") >= 1500.0);
    assert!(of("interruptions_total", "task=\"disturbed\"") >= 20.0);
    assert_eq!(of("discarded_microseconds_total", "task=\"undisturbed\""), 0.0);
    let log = std::fs::read_to_string(disturbed["log"].as_str().unwrap()).unwrap();
    assert_eq!(log.lines().count(), 150, "a line for every tenth step");
    let facts = ["loss", "steps_per_s", "samples_per_s", "goodput", "interruptions", "interruption_cost_us"];
    let lines = server.log();
    assert_says(lines.lines().find(|line| line.contains("trained")).expect("it is logged"), &facts);
    assert_says(&train(&["list"]), &["NAME", "disturbed", "undisturbed", "1500/1500", "finished"]);
    assert_says(&train(&["show", "disturbed"]), &["finished", "1500/1500", "step-00001500.safetensors"]);
    let picture = place.0.path().join("loss.svg");
    train(&["plot", disturbed["log"].as_str().unwrap(), "--out", picture.to_str().unwrap()]);
    assert_says(&std::fs::read_to_string(picture).unwrap(), &["<svg", "loss"]);
}

#[test]
fn a_task_pauses_stops_and_goes_on_in_the_next_server() {
    let (fixture, place) = (Fixture::load("integer-outputs"), Place::new());
    let config = place.task("task", 2000);
    let mut server = serve(&fixture).flag("--train", format!("task={}", config.display())).start();
    await_steps(&server.client, "task", 20);
    let paused = command(&server.client, "task", "pause");
    assert_eq!(paused["state"], "paused");
    let at = status(&server.client, "task")["steps_done"].as_u64().unwrap();
    server.client.check(&fixture.name, &fixture.cases[0]);
    assert_eq!(status(&server.client, "task")["steps_done"], at);
    command(&server.client, "task", "resume");
    await_steps(&server.client, "task", at + 10);
    let stopped = command(&server.client, "task", "stop");
    assert_eq!(
        (&stopped["state"], &stopped["checkpoint"]["step"]),
        (&"stopped".into(), &stopped["steps_done"])
    );
    let stopped_at = stopped["steps_done"].as_u64().unwrap();
    assert!(stopped_at < 2000);
    // What is over can be submitted again, and goes on.
    assert_eq!(submit(&server.client, "task", &config).0, 201);
    let resumed = await_steps(&server.client, "task", stopped_at + 5);
    assert!(resumed["progress"]["steps_done"].as_u64().unwrap() < stopped_at + 2000);
    // An orderly end writes a checkpoint as well.
    assert!(server.process.signal(Signal::SIGTERM));
    assert_eq!(server.wait(), Some(0));
    drop(server);
    let server = serve(&fixture).flag("--train", format!("task={}", config.display())).start();
    let again = await_state(&server.client, "task", "finished");
    assert_eq!(again["steps_done"], 2000);
    check_against_a_whole_run(&server.client, &place, "task", 2000);
}

#[test]
fn a_training_worker_that_is_killed_is_replaced_and_goes_on_from_the_checkpoint() {
    const KILLS: u64 = 20;
    const STEPS: u32 = 2500;
    let (fixture, place) = (Fixture::load("integer-outputs"), Place::new());
    let server = serve(&fixture).start();
    let executing = server.await_workers(2);
    submit(&server.client, "killed", &place.task("killed", STEPS));
    let dice = &mut Dice::new(5);
    for kills in 1..=KILLS {
        // Some way on, and then at any moment of a step, or of a checkpoint.
        await_steps(&server.client, "killed", 60 + 100 * kills + dice.below(60) as u64);
        std::thread::sleep(Duration::from_micros(dice.below(3000) as u64));
        let worker = training_worker(&server, &executing);
        assert!(worker.signal(Signal::SIGKILL));
        eventually("the loss is noticed", || {
            let status = status(&server.client, "killed");
            let failures = &status["progress"]["by_reason"]["failure"]["interruptions"];
            if failures.as_u64() >= Some(kills) { Ok(()) } else { Err(status.to_string()) }
        });
        server.client.check(&fixture.name, &fixture.cases[0]);
    }
    let killed = await_state(&server.client, "killed", "finished");
    assert!(killed["progress"]["goodput"].as_f64().unwrap() < 1.0, "{killed}");
    check_against_a_whole_run(&server.client, &place, "killed", STEPS);
    // The curve as well: steps that were computed again have the losses that they had.
    let whole = curve(&status(&server.client, "whole"));
    let whole: BTreeMap<u64, Value> = whole.into_iter().collect();
    for (step, loss) in curve(&killed) {
        assert_eq!(Some(&loss), whole.get(&step), "step {step}");
    }
}

/// Steps that were logged, and their losses.
fn curve(task: &Value) -> Vec<(u64, Value)> {
    let log = std::fs::read_to_string(task["log"].as_str().unwrap()).unwrap();
    let line = |line: &str| -> Value { serde_json::from_str(line).unwrap() };
    let points: Vec<_> =
        log.lines().map(line).map(|line| (line["step"].as_u64().unwrap(), line["loss"].clone())).collect();
    assert!(points.len() > 100 && points.iter().all(|(_, loss)| loss.is_number()), "{log}");
    points
}

#[test]
fn a_training_worker_that_hangs_holds_nobody_up_and_is_replaced() {
    let (fixture, place) = (Fixture::load("integer-outputs"), Place::new());
    let server = serve(&fixture).start();
    let executing = server.await_workers(2);
    submit(&server.client, "hung", &place.task("hung", 800));
    await_steps(&server.client, "hung", 60);
    let worker = training_worker(&server, &executing);
    assert!(worker.signal(Signal::SIGSTOP));
    server.client.check(&fixture.name, &fixture.cases[0]);
    await_end(&[worker]);
    server.client.check(&fixture.name, &fixture.cases[0]);
    let hung = await_state(&server.client, "hung", "finished");
    assert_eq!(hung["progress"]["by_reason"]["failure"]["interruptions"].as_u64(), Some(1), "{hung}");
    check_against_a_whole_run(&server.client, &place, "hung", 800);
}

/// What a task has learned is not lost to a disk that is full when it ends, and nobody waits for the disk.
#[test]
fn a_last_checkpoint_is_tried_until_it_is_there() {
    let (fixture, place) = (Fixture::load("integer-outputs"), Place::new());
    let server = serve(&fixture).start();
    submit(&server.client, "blocked", &place.task("blocked", 1200));
    await_steps(&server.client, "blocked", 60);
    let folder = place.block("blocked");
    await_steps(&server.client, "blocked", 1200);
    let told = eventually("that it cannot be written is told", || {
        let status = status(&server.client, "blocked");
        if status["checkpoint_error"] == "" { Err(status.to_string()) } else { Ok(status) }
    });
    assert_ne!(told["state"], "finished", "{told}");
    server.client.check(&fixture.name, &fixture.cases[0]);
    // Another task trains meanwhile.
    submit(&server.client, "other", &place.task("other", 300));
    await_state(&server.client, "other", "finished");
    let blocked = status(&server.client, "blocked");
    assert!(blocked["state"] == "waiting" && blocked["checkpoint_error"] != "", "{blocked}");
    std::fs::remove_file(&folder).unwrap();
    await_state(&server.client, "blocked", "finished");
    check_against_a_whole_run(&server.client, &place, "blocked", 1200);
}

#[test]
fn a_task_whose_checkpoints_cannot_be_written_can_be_ended() {
    let (fixture, place) = (Fixture::load("integer-outputs"), Place::new());
    let server = serve(&fixture).start();
    submit(&server.client, "blocked", &place.task("blocked", 100_000));
    await_steps(&server.client, "blocked", 60);
    place.block("blocked");
    // What it has learned is kept ...
    let stop = |flags: &[&str]| {
        let stop = ["train", "stop", "blocked"];
        run(pswitch().args(stop).args(flags).env("PSWITCH_SERVER", server.url()))
    };
    assert_ended(&stop(&[]), 5, &["blocked is paused", "no checkpoint", "--discard"]);
    let kept = status(&server.client, "blocked");
    assert!(kept["state"] == "paused" && kept["checkpoint_error"] != "", "{kept}");
    // ... unless nobody wants it.
    assert_eq!(stop(&["--discard"]).code, Some(0));
    assert_eq!(status(&server.client, "blocked")["state"], "stopped");
    server.client.check(&fixture.name, &fixture.cases[0]);
}

#[test]
fn a_task_whose_loss_is_no_number_ends_and_keeps_its_state() {
    let (fixture, place) = (Fixture::load("integer-outputs"), Place::new());
    let config = place.task("wild", 60);
    let calm = std::fs::read_to_string(&config).unwrap();
    let calm = calm.replace("{kind: adamw, lr: 1e-3}", "{kind: sgd, lr: 1e-3}");
    std::fs::write(
        &config,
        calm.replace("lr: 1e-3", "lr: 1e8").replace("every_steps: 50", "every_steps: 1000"),
    )
    .unwrap();
    let server = serve(&fixture).start();
    let submitted = run(pswitch()
        .args(["train", "submit", "wild", config.to_str().unwrap()])
        .env("PSWITCH_SERVER", server.url()));
    assert!(matches!(submitted.code, Some(0 | 5)), "{submitted:?}");
    let failed = await_state(&server.client, "wild", "failed");
    let done = failed["steps_done"].as_u64().unwrap();
    assert!(done > 0, "{failed}");
    assert_says(failed["reason"].as_str().unwrap(), &[&format!("step {done}: the loss is "), "clip_norm"]);
    let kept = place.0.path().join(format!("wild/diverged-{done:08}.safetensors"));
    assert!(failed["checkpoint"]["path"] == kept.to_str().unwrap() && kept.exists(), "{failed}");
    server.client.check(&fixture.name, &fixture.cases[0]);
    // It goes on from what was there before, which is nothing yet.
    std::fs::write(&config, calm).unwrap();
    assert_eq!(submit(&server.client, "wild", &config).0, 201);
    assert_eq!(await_state(&server.client, "wild", "finished")["progress"]["steps_computed"], 60);
    assert!(kept.exists());
}

#[test]
fn two_tasks_take_turns() {
    let (fixture, place) = (Fixture::load("integer-outputs"), Place::new());
    let server = serve(&fixture).start();
    for name in ["one", "two"] {
        assert_eq!(submit(&server.client, name, &place.task(name, 600)).0, 201);
    }
    for name in ["one", "two"] {
        await_state(&server.client, name, "finished");
    }
    assert!(place.checkpoint("one", 600) == place.checkpoint("two", 600));
}

#[test]
fn what_cannot_be_trained_is_told_and_serving_goes_on() {
    let (fixture, place) = (Fixture::load("integer-outputs"), Place::new());
    let server = serve(&fixture).start();
    let good = place.task("good", 100_000);
    let text = std::fs::read_to_string(&good).unwrap();
    let write = |text: String| {
        let path = place.0.path().join("bad.yaml");
        std::fs::write(&path, text).unwrap();
        path
    };
    for (bad, parts) in [
        (text.replace("lr: 1e-3", "lr: -1"), vec!["lr", "-1"]),
        (text.replace("batch_size: 5", "batch_sise: 5"), vec!["batch_sise"]),
        (text.replace("perceptron\n", "nowhere\n"), vec!["nowhere"]),
    ] {
        let (code, refusal) = submit(&server.client, "bad", &write(bad));
        assert_eq!(code, 400, "{refusal}");
        assert_says(refusal["error"].as_str().unwrap(), &parts);
    }
    // What only a worker finds out.
    let serving = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/fixtures/recurrent");
    let program = format!("program: {}", serving.canonicalize().unwrap().display());
    let no_loss = text.lines().skip(1).fold(program, |all, line| format!("{all}\n{line}"));
    for (name, bad, parts) in [
        ("no-loss", no_loss, vec!["not one scalar"]),
        ("wrong-rows", text.replace("batch_size: 5", "batch_size: 22"), vec!["a batch has 1 rows"]),
    ] {
        assert_eq!(submit(&server.client, name, &write(bad)).0, 201);
        let failed = await_state(&server.client, name, "failed");
        assert_says(failed["reason"].as_str().unwrap(), &parts);
    }
    assert_eq!(submit(&server.client, "good", &good).0, 201);
    let (code, refusal) = submit(&server.client, "good", &good);
    assert_eq!(code, 400);
    assert_says(refusal["error"].as_str().unwrap(), &["good", "not over"]);
    let (code, refusal) = submit(&server.client, "same-folder", &good);
    assert_eq!(code, 400);
    assert_says(refusal["error"].as_str().unwrap(), &["another task", "/good"]);
    symlink(place.0.path().join("good"), place.0.path().join("link")).unwrap();
    let (code, refusal) = submit(&server.client, "linked", &write(text.replace("/good,", "/link,")));
    assert_eq!(code, 400);
    assert_says(refusal["error"].as_str().unwrap(), &["another task", "/link"]);
    server.client.check(&fixture.name, &fixture.cases[0]);
    assert_eq!(server.client.get("/v2/training/tasks/none").unwrap().status, 404);

    let listed =
        run(pswitch().args(["train", "list", "--format", "json"]).env("PSWITCH_SERVER", server.url()));
    assert_eq!(listed.code, Some(0), "{}", listed.stderr);
    let listed: Value = serde_json::from_str(&listed.stdout).unwrap();
    let names: Vec<&str> =
        listed.as_array().unwrap().iter().filter_map(|task| task["name"].as_str()).collect();
    assert_eq!(names, ["good", "no-loss", "wrong-rows"]);
}

#[test]
fn what_cannot_be_taken_at_the_start_is_shown() {
    let (fixture, place) = (Fixture::load("integer-outputs"), Place::new());
    let config = place.task("late", 12);
    let nowhere = place.0.path().join("nowhere.yaml");
    let server = serve(&fixture).flag("--train", format!("late={}", nowhere.display())).start();
    let refused = status(&server.client, "late");
    assert_eq!(refused["state"], "failed");
    assert_says(refused["reason"].as_str().unwrap(), &["nowhere.yaml"]);
    let train =
        |arguments: &[&str]| run(pswitch().arg("train").args(arguments).env("PSWITCH_SERVER", server.url()));
    assert_says(&train(&["list"]).stdout, &["late", "failed"]);
    assert_ended(&train(&["stop", "late"]), 5, &["is over: it is failed"]);
    // Its name is free.
    assert_eq!(train(&["submit", "late", config.to_str().unwrap()]).code, Some(0));
    let finished = await_state(&server.client, "late", "finished");
    assert_eq!(server.client.get("/v2/training/tasks").unwrap().status, 200);
    // The tenth, and the last one however many there are.
    let log = std::fs::read_to_string(finished["log"].as_str().unwrap()).unwrap();
    assert_eq!(log.lines().count(), 2, "{log}");
    // A mistake that only a worker finds is told as well.
    let text = std::fs::read_to_string(&config).unwrap().replace("batch_size: 5", "batch_size: 22");
    std::fs::write(&config, text).unwrap();
    assert_ended(&train(&["submit", "other", config.to_str().unwrap()]), 5, &["cannot be trained"]);
}

#[test]
fn without_room_for_training_tasks_are_refused() {
    let (fixture, place) = (Fixture::load("integer-outputs"), Place::new());
    let server = Serve::new(Models::of([&fixture])).host(1).start();
    let (code, refusal) = submit(&server.client, "task", &place.task("task", 10));
    assert_eq!(code, 501, "{refusal}");
    assert_says(refusal["error"].as_str().unwrap(), &["training_size"]);
}

/// Requests that follow each other without an end leave nothing to a task, unless it has a share.
#[test]
fn a_share_of_the_device_is_kept_from_requests_that_never_end() {
    let (fixture, place) = (Fixture::load("resnet18"), Place::new());
    let server = serve(&fixture).flag("--training-share", "0.3").start();
    let (code, taken) = submit(&server.client, "shared", &place.task("shared", 1_000_000));
    assert_eq!(code, 201, "{taken}");
    await_steps(&server.client, "shared", 5);
    beside_requests(&server, &fixture, || {
        let from = status(&server.client, "shared")["steps_done"].as_u64().unwrap();
        let (mut steps, mut requests) = (from, 0);
        while steps < from + 50 || requests < 20 {
            server.client.check(&fixture.name, &fixture.cases[requests % fixture.cases.len()]);
            requests += 1;
            steps = status(&server.client, "shared")["steps_done"].as_u64().unwrap();
        }
    });
}

/// Tasks that are over can be asked for; of very many, the last hundred.
#[test]
fn a_list_of_tasks_has_an_end() {
    let (fixture, place) = (Fixture::load("resnet18"), Place::new());
    let server = serve(&fixture).start();
    let missing = place.0.path().join("missing.yaml");
    let text = std::fs::read_to_string(place.task("any", 20)).unwrap();
    // Its rows are not there: it fails when its worker opens them, and is over.
    std::fs::write(&missing, text.replace("data.safetensors", "missing.safetensors")).unwrap();
    for task in 0..103 {
        let name = format!("task-{task}");
        let (code, taken) = submit(&server.client, &name, &missing);
        assert_eq!(code, 201, "{taken}");
        await_state(&server.client, &name, "failed");
    }
    let reply = server.client.get("/v2/training/tasks").unwrap();
    let listed: Value = serde_json::from_slice(&reply.body).unwrap();
    let count = listed.as_array().unwrap().len();
    assert!((100..103).contains(&count), "{count}");
    assert_eq!(server.client.get("/v2/training/tasks/task-102").unwrap().status, 200);
    assert_eq!(server.client.get("/v2/training/tasks/task-0").unwrap().status, 404);
}
