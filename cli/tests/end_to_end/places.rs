//! Places that are given anew: who was used longest ago makes room, and models answer right wherever they lie.

use nix::sys::signal::Signal;

use crate::support::{Dice, Fixture, Models, Serve, Server, assert_says, eventually, span_bytes};

const HOMES: &str = "homes: least-recently-used\n";

fn resident(server: &Server, name: &str) -> bool {
    server.client.metrics()[&format!("pswitch_model_resident{{model=\"{name}\"}}")] == 1.0
}

fn evictions(server: &Server, fixture: &Fixture) -> f64 {
    server.client.metrics()[&format!("pswitch_model_evictions_total{{model=\"{}\"}}", fixture.name)]
}

/// Asks each once, in this order.
fn ask<'a>(server: &Server, fixtures: impl IntoIterator<Item = &'a Fixture>) {
    for fixture in fixtures {
        server.client.check(&fixture.name, &fixture.cases[0]);
    }
}

#[test]
fn who_was_used_longest_ago_makes_room_for_a_third() {
    let [one, other, third] = ["float16", "bfloat16", "two-in-three-out"].map(Fixture::load);
    let bytes = span_bytes(std::slice::from_ref(&one), &one.name);
    let models = Models::of([&one, &other, &third]);
    let server = Serve::new(models).host(1).config(HOMES).homes(2 * bytes).start();
    for [older, newer] in [[&one, &other], [&other, &one]] {
        // Whatever lay where: the second that comes leaves half of the room in one piece, if it is not the other half.
        ask(&server, [older, newer, older, newer]);
        assert!(resident(&server, &older.name) && resident(&server, &newer.name));
        let evictions = || [older, newer, &third].map(|fixture| evictions(&server, fixture));
        let before = evictions();
        ask(&server, [&third]);
        let evicted: Vec<f64> = evictions().iter().zip(before).map(|(now, before)| now - before).collect();
        assert_eq!(evicted, [1.0, 0.0, 0.0], "{} was used before {}", older.name, newer.name);
        assert!(resident(&server, &newer.name) && resident(&server, &third.name));
    }
    assert_eq!(server.client.metric("pswitch_worker_restarts_total"), 0.0);
}

#[test]
fn models_answer_right_wherever_they_lie() {
    // One has many groups, one writes to its weights, which is noticed by where they lie.
    let mut served = ["recurrent", "dynamic-batch", "float16", "bfloat16", "odd-weights", "two-in-three-out"]
        .map(Fixture::load)
        .to_vec();
    let writes = Fixture::load("writes-through-dropout");
    // The largest and one of the others.
    let homes = span_bytes(&served, "recurrent") + span_bytes(&served, "float16");
    let models = Models::of(served.iter().chain([&writes]));
    let server = Serve::new(models).host(2).config(HOMES).homes(homes).start();
    served.iter_mut().for_each(|fixture| fixture.cases.retain(|case| case.raises.is_none()));
    let dice = &mut Dice::new(11);
    let mut ask_at_random = |requests: usize| {
        for _ in 0..requests {
            let fixture = &served[dice.below(served.len())];
            server.client.check(&fixture.name, &fixture.cases[dice.below(fixture.cases.len())]);
            if dice.below(4) == 0 {
                let refusal = server.client.infer(&writes.name, &writes.cases[0].inputs).unwrap_err();
                assert_says(&refusal.error, &["write to the model's weights"]);
            }
        }
    };
    ask_at_random(300);
    // A worker that takes another's place has built its models over homes in which they do not lie.
    for worker in server.await_workers(2) {
        assert!(worker.signal(Signal::SIGKILL));
    }
    // A request that comes to both before they are seen to be gone is lost.
    eventually("both are replaced", || {
        let restarts = server.client.metric("pswitch_worker_restarts_total");
        if restarts == 2.0 { Ok(()) } else { Err(format!("{restarts} restarts")) }
    });
    ask_at_random(100);
    for action in ["unload", "load"] {
        let reply = server.client.post(&format!("/v2/repository/models/recurrent/{action}"), &[], b"");
        assert_eq!(reply.unwrap().status, 200);
    }
    ask_at_random(100);
    let evicted = server.client.metric("pswitch_model_evictions_total");
    assert!(evicted > 200.0, "{evicted} evictions only: the models were to share the pool");
    assert_eq!(server.client.metric("pswitch_slot_in_use_bytes"), 0.0);
}
