//! Switching leaves nothing behind: thousands of requests over models that do not fit together.

use crate::support::{Client, Dice, Fixture, Models, Process, Serve, Server, eventually, span_bytes};

/// Requests whose traces count as warming up: libtorch's caches, the first growth of every heap.
const WARM_UP: usize = 100;
const REQUESTS: usize = 2000;

/// What resident memory may grow by, each less than a hundredth of it: heaps grow by steps of 132 KiB a thread, of which
/// the server has several and a worker one that allocates. A leak of 600 bytes a request exceeds either.
const SERVER_SLACK_BYTES: u64 = 1 << 20;
const WORKER_SLACK_BYTES: u64 = 512 << 10;

/// A process with what it holds.
struct Holding {
    process: Process,
    resident_bytes: u64,
    descriptors: Vec<String>,
}

impl Holding {
    fn of(process: Process) -> Self {
        Self { resident_bytes: process.resident_bytes(), descriptors: process.descriptors(), process }
    }

    fn assert_unchanged(&self) {
        let name = &self.process.name;
        assert!(self.process.is_alive(), "{name} was lost");
        // A connection that a client has closed is gone a moment later.
        eventually(&format!("{name} has the same descriptors"), || {
            let now = self.process.descriptors();
            if now == self.descriptors {
                Ok(())
            } else {
                Err(format!("{now:?}, before {:?}", self.descriptors))
            }
        });
        let slack = if name == "pswitch" { SERVER_SLACK_BYTES } else { WORKER_SLACK_BYTES };
        let (before, now) = (self.resident_bytes, self.process.resident_bytes());
        assert!(
            now <= before + slack.min(before / 100),
            "resident memory of {name} grew from {before} to {now} bytes"
        );
        assert!(
            !self.process.maps().contains("/dev/shm/"),
            "{name} has mapped a named file of shared memory"
        );
    }
}

fn evictions(server: &Server) -> f64 {
    server.client.metric("pswitch_model_evictions_total")
}

/// Sends requests, never two in a row for the same model, and checks every answer.
fn alternate(client: &Client, fixtures: &[Fixture], requests: usize, dice: &mut Dice) {
    let mut last = 0;
    for _ in 0..requests {
        last = (last + 1 + dice.below(fixtures.len() - 1)) % fixtures.len();
        let fixture = &fixtures[last];
        client.check(&fixture.name, &fixture.cases[dice.below(fixture.cases.len())]);
    }
}

#[test]
fn two_thousand_switches_leave_no_trace() {
    // One with many groups, in whose place all of the others lie.
    let mut fixtures = ["bert-dynamic", "recurrent", "dynamic-batch", "float16"].map(Fixture::load);
    // The short sentences: this is about switching, not about computing.
    fixtures[0].cases.truncate(1);
    let server =
        Serve::new(Models::of(&fixtures)).host(2).homes(span_bytes(&fixtures, "bert-dynamic")).start();
    server.await_workers(2);
    let dice = &mut Dice::new(7);
    alternate(&server.client, &fixtures, WARM_UP, dice);

    let before: Vec<Holding> = server.processes().into_iter().map(Holding::of).collect();
    assert_eq!(before.len(), 4, "a server, a zygote, two workers");
    let evicted = evictions(&server);
    alternate(&server.client, &fixtures, REQUESTS - WARM_UP, dice);
    let evicted = evictions(&server) - evicted;
    // Every third request is for BERT, and each time something lay in its place.
    assert!(evicted >= 1000.0, "{evicted} evictions only: the models were to share their place");

    for holding in &before {
        holding.assert_unchanged();
    }
    assert_eq!(server.client.metric("pswitch_slot_in_use_bytes"), 0.0);
    assert_eq!(server.client.metric("pswitch_worker_restarts_total"), 0.0);
    assert_no_shared_memory_is_left();
}

#[test]
fn clients_that_switch_at_random_all_get_their_own_answers() {
    const CLIENTS: usize = 8;
    const EACH: usize = 150;
    // All of a size, so that each overlaps with several others.
    let fixtures = ["dynamic-batch", "float16", "bfloat16", "two-in-three-out"].map(Fixture::load);
    let server =
        Serve::new(Models::of(&fixtures)).host(2).homes(span_bytes(&fixtures, "dynamic-batch")).start();
    server.await_workers(2);
    let crowd = |requests: usize, seed: u64| {
        std::thread::scope(|scope| {
            for client in 0..CLIENTS {
                let (fixtures, client_seed) = (&fixtures, seed * 100 + client as u64);
                let own = Client::new(&server.url());
                scope.spawn(move || alternate(&own, fixtures, requests, &mut Dice::new(client_seed)));
            }
        });
        // Until the clients' connections are closed.
        eventually("the server has one client", || match server.client.metric("pswitch_connections") {
            1.0 => Ok(()),
            other => Err(format!("{other}")),
        });
    };
    crowd(WARM_UP, 1);
    let before: Vec<Holding> = server.processes().into_iter().map(Holding::of).collect();
    let evicted = evictions(&server);
    crowd(EACH, 2);
    assert!(evictions(&server) > evicted, "the models were to share their place");
    for holding in &before {
        holding.assert_unchanged();
    }
    let answered = server.client.metrics();
    for fixture in &fixtures {
        let outcome = |outcome: &str| {
            answered[&format!("pswitch_requests_total{{model=\"{}\",outcome=\"{outcome}\"}}", fixture.name)]
        };
        assert!(outcome("success") > 0.0);
        for failure in ["invalid_request", "busy", "unavailable", "deadline", "execution_failed", "internal"]
        {
            assert_eq!(outcome(failure), 0.0, "{}: {failure}", fixture.name);
        }
    }
    assert_eq!(server.client.metric("pswitch_slot_in_use_bytes"), 0.0);
}

/// All shared memory is without a name, so nothing can be left of it; what others left there is theirs.
fn assert_no_shared_memory_is_left() {
    let Ok(entries) = std::fs::read_dir("/dev/shm") else { return };
    let names: Vec<String> =
        entries.filter_map(|entry| Some(entry.ok()?.file_name().to_string_lossy().into_owned())).collect();
    assert!(!names.iter().any(|name| name.contains("pswitch")), "{names:?}");
}
