//! States of tasks make room for models where a pool has none for both, and nothing is lost by it.

use nix::sys::signal::Signal;
use serde_json::Value;

use crate::support::{Fixture, Models, Serve, Server, assert_says, eventually, pswitch, run, span_bytes};
use crate::training::{
    Place, await_state, await_steps, beside_requests, check_against_a_whole_run, status, submit,
    training_worker,
};

/// Training has a part of the pool that the model lies in, from its first byte to its last.
fn serve(fixture: &Fixture) -> Serve {
    let homes_bytes = span_bytes(std::slice::from_ref(fixture), &fixture.name);
    serve_with(fixture, homes_bytes, 1 << 20)
}

/// The model lies in the part of training, which is much longer: the state can be set aside.
fn serve_with_memory_to_spare(fixture: &Fixture) -> Serve {
    serve_with(fixture, 64 << 20, 64 << 20)
}

fn serve_with(fixture: &Fixture, homes_bytes: u64, training_bytes: u64) -> Serve {
    Serve::new(Models::of(std::slice::from_ref(fixture)))
        .host(2)
        .homes(homes_bytes)
        .flag("--training-size", training_bytes)
        .flags(&["--training-gives-way"])
}

fn steps(status: &Value) -> u64 {
    status["steps_done"].as_u64().unwrap()
}

fn made_room(status: &Value) -> u64 {
    status["made_room"].as_u64().unwrap()
}

/// Does something while requests never end, and the state of a task has gone to the host for them.
fn while_out(server: &Server, fixture: &Fixture, name: &str, something: impl FnOnce()) {
    beside_requests(server, fixture, || {
        eventually("the state is on the host", || {
            let status = status(&server.client, name);
            if status["residence"] == "host" { Ok(()) } else { Err(status.to_string()) }
        });
        something();
    });
}

#[test]
fn a_state_makes_room_and_comes_back_as_it_was() {
    check_that_it_comes_back(serve);
}

#[test]
fn a_state_that_is_set_aside_comes_back_as_it_was() {
    check_that_it_comes_back(serve_with_memory_to_spare);
}

fn check_that_it_comes_back(serve: fn(&Fixture) -> Serve) {
    let (fixture, place) = (Fixture::load("bert-dynamic"), Place::new());
    let server = serve(&fixture).start();
    let (code, taken) = submit(&server.client, "moved", &place.task("moved", 4000));
    assert_eq!(code, 201, "{taken}");
    for _ in 0..20 {
        let before = steps(&status(&server.client, "moved"));
        let trained = await_steps(&server.client, "moved", before + 3);
        assert!(trained["state"] != "finished", "it ends before it was moved enough: {trained}");
        server.client.check(&fixture.name, &fixture.cases[0]);
    }
    let moved = await_state(&server.client, "moved", "finished");
    assert!(made_room(&moved) >= 20, "{moved}");
    let metric = server.client.metrics()["pswitch_training_made_room_total{task=\"moved\"}"];
    assert!(metric >= 20.0, "{metric}");
    submit(&server.client, "unmoved", &place.task("unmoved", 4000));
    let unmoved = await_state(&server.client, "unmoved", "finished");
    assert_eq!((made_room(&unmoved), unmoved["residence"].as_str()), (0, Some("resident")));
    assert_eq!(moved["progress"]["last_loss"], unmoved["progress"]["last_loss"]);
    assert!(place.checkpoint("moved", 4000) == place.checkpoint("unmoved", 4000));
    let listed = run(pswitch().args(["train", "show", "moved"]).env("PSWITCH_SERVER", server.url()));
    assert_says(&listed.stdout, &["made room"]);
}

#[test]
fn a_task_whose_worker_is_killed_while_its_state_is_out_goes_on_from_the_checkpoint() {
    let (fixture, place) = (Fixture::load("bert-dynamic"), Place::new());
    let server = serve(&fixture).start();
    let executing = server.await_workers(2);
    submit(&server.client, "killed", &place.task("killed", 1500));
    for kills in 1..=3_u64 {
        await_steps(&server.client, "killed", 60 + 100 * kills);
        while_out(&server, &fixture, "killed", || {
            assert!(training_worker(&server, &executing).signal(Signal::SIGKILL));
            // It cannot be prepared anew while requests have the device.
            await_state(&server.client, "killed", "preparing");
        });
    }
    let killed = await_state(&server.client, "killed", "finished");
    assert!(made_room(&killed) >= 3, "{killed}");
    check_against_a_whole_run(&server.client, &place, "killed", 1500);
}

#[test]
fn a_state_comes_back_to_be_written_down_when_the_server_ends() {
    let (fixture, place) = (Fixture::load("bert-dynamic"), Place::new());
    let config = place.task("ended", 1500);
    let mut server = serve(&fixture).flag("--train", format!("ended={}", config.display())).start();
    await_steps(&server.client, "ended", 75);
    let mut ended_at = 0;
    while_out(&server, &fixture, "ended", || {
        ended_at = steps(&status(&server.client, "ended"));
    });
    assert!(server.process.signal(Signal::SIGTERM));
    assert_eq!(server.wait(), Some(0));
    drop(server);
    let server = serve(&fixture).flag("--train", format!("ended={}", config.display())).start();
    let resumed = eventually("it is prepared", || {
        let status = status(&server.client, "ended");
        if steps(&status) > 0 { Ok(status) } else { Err(status.to_string()) }
    });
    assert!(steps(&resumed) >= ended_at, "{resumed}");
    await_state(&server.client, "ended", "finished");
    check_against_a_whole_run(&server.client, &place, "ended", 1500);
}

/// Its state comes for a turn and goes after it, again and again; it is even prepared in one.
#[test]
fn a_task_has_its_share_although_its_state_has_to_come_for_it() {
    let (fixture, place) = (Fixture::load("bert-dynamic"), Place::new());
    let server = serve(&fixture).flag("--training-share", "0.3").start();
    beside_requests(&server, &fixture, || {
        submit(&server.client, "shared", &place.task("shared", 1_000_000));
        for _ in 0..3 {
            let before = status(&server.client, "shared");
            await_steps(&server.client, "shared", steps(&before) + 1);
            eventually("it makes room", || {
                let now = status(&server.client, "shared");
                if made_room(&now) > made_room(&before) { Ok(()) } else { Err(now.to_string()) }
            });
        }
    });
}
