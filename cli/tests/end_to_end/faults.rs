//! Workers die, hang and are killed: requests are answered right or with a reason, and nothing else is disturbed.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::thread::{ScopedJoinHandle, sleep};
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::json;

use crate::support::{
    Answer, Case, Client, Dice, Fixture, Models, Process, Refusal, Serve, Server, assert_says, await_end,
    children, eventually, span_bytes,
};

/// A model that takes two seconds to come, and one that drives it out in a tenth: their inputs are short, their
/// weights share one place, and the link is slow.
pub(crate) struct SlowLink {
    pub(crate) server: Server,
    pub(crate) slow: Fixture,
    quick: Fixture,
}

impl SlowLink {
    pub(crate) fn serve() -> Self {
        let [slow, quick] = ["recurrent", "integer-outputs"].map(Fixture::load);
        let server = Serve::new(Models::of([&slow, &quick]))
            .host(1)
            .flag("--link-bandwidth", "8kB/s")
            .homes(span_bytes(std::slice::from_ref(&slow), &slow.name))
            .start();
        server.await_workers(2);
        Self { server, slow, quick }
    }

    /// Sends a request for the slow model when the quick one is in its place, and returns when a worker has begun it
    /// and waits for weights.
    pub(crate) fn begin<'scope>(
        &'scope self,
        scope: &'scope std::thread::Scope<'scope, '_>,
    ) -> (ScopedJoinHandle<'scope, Result<Answer, Refusal>>, Process) {
        self.check_quick();
        let request = scope.spawn(|| self.server.client.infer(&self.slow.name, &self.slow.cases[0].inputs));
        let worker = self.waiting_worker();
        assert!(!request.is_finished(), "the transfer takes longer than this");
        (request, worker)
    }

    /// The worker that waits for weights, as soon as there is one.
    pub(crate) fn waiting_worker(&self) -> Process {
        eventually("a worker waits for weights", || {
            let workers = self.server.workers();
            workers.iter().find(|w| w.waits_at_a_doorbell()).cloned().ok_or_else(|| format!("{workers:?}"))
        })
    }

    pub(crate) fn check_slow(&self) {
        self.server.client.check(&self.slow.name, &self.slow.cases[0]);
    }

    pub(crate) fn check_quick(&self) {
        self.server.client.check(&self.quick.name, &self.quick.cases[0]);
    }
}

#[test]
fn a_request_whose_worker_is_killed_is_tried_again() {
    let link = SlowLink::serve();
    let SlowLink { server, slow, .. } = &link;
    let before = server.workers();
    std::thread::scope(|scope| {
        let (request, worker) = link.begin(scope);
        assert!(worker.signal(Signal::SIGKILL));
        let answer = request.join().unwrap().expect("the other worker answers");
        answer.assert_is(&slow.name, &slow.cases[0]);
        assert!(!worker.is_alive());
    });
    let after = server.await_workers(2);
    assert_eq!(after.iter().filter(|worker| before.contains(worker)).count(), 1, "{before:?}, {after:?}");
    assert_eq!(server.client.metric("pswitch_worker_restarts_total"), 1.0);
    link.check_slow();
    link.check_quick();
    assert_eq!(server.client.metric("pswitch_slot_in_use_bytes"), 0.0);
}

#[test]
fn a_request_that_loses_every_worker_says_so() {
    let link = SlowLink::serve();
    std::thread::scope(|scope| {
        let (request, first) = link.begin(scope);
        assert!(first.signal(Signal::SIGKILL));
        let second = eventually("the other worker waits for weights", || match link.waiting_worker() {
            worker if worker == first => Err("the first still does".to_owned()),
            worker => Ok(worker),
        });
        assert!(second.signal(Signal::SIGKILL));
        let refusal = request.join().unwrap().unwrap_err();
        assert_eq!(refusal.status, 503);
        assert_says(&refusal.error, &["lost 2 worker(s) in the middle of this request"]);
    });
    // Workers that are not there yet hold requests up, not back.
    link.check_slow();
    link.check_quick();
    link.server.await_workers(2);
    assert_eq!(link.server.client.metric("pswitch_worker_restarts_total"), 2.0);
}

#[test]
fn a_server_outlives_ten_workers() {
    let fixtures = ["dynamic-batch", "recurrent", "float16", "two-in-three-out"].map(Fixture::load);
    let server = Serve::new(Models::of(&fixtures)).host(1).homes(span_bytes(&fixtures, "recurrent")).start();
    server.await_workers(2);
    let ended = std::sync::atomic::AtomicBool::new(false);
    let (answered, refused) = std::thread::scope(|scope| {
        let clients: Vec<_> = (0..2)
            .map(|seed| {
                let (server, fixtures, ended) = (&server, &fixtures, &ended);
                scope.spawn(move || {
                    let mut dice = Dice::new(seed);
                    let (mut answered, mut refused) = (0, 0);
                    while !ended.load(std::sync::atomic::Ordering::Relaxed) {
                        let fixture = &fixtures[dice.below(fixtures.len())];
                        let case = &fixture.cases[0];
                        match server.client.infer(&fixture.name, &case.inputs) {
                            Ok(answer) => {
                                answer.assert_is(&fixture.name, case);
                                answered += 1;
                            }
                            Err(Refusal { status: 503, error }) => {
                                assert_says(&error, &["lost 2 worker(s)"]);
                                refused += 1;
                            }
                            Err(other) => panic!("{other:?}"),
                        }
                    }
                    (answered, refused)
                })
            })
            .collect();
        let mut dice = Dice::new(3);
        // One that was killed a moment ago may be listed still, and takes another signal.
        let mut killed = std::collections::BTreeSet::new();
        while killed.len() < 10 {
            sleep(Duration::from_millis(dice.below(150) as u64));
            let workers = server.workers();
            if workers.is_empty() {
                continue;
            }
            let worker = &workers[dice.below(workers.len())];
            if !killed.contains(&worker.pid) && worker.signal(Signal::SIGKILL) {
                killed.insert(worker.pid);
            }
        }
        ended.store(true, std::sync::atomic::Ordering::Relaxed);
        let counts = clients.into_iter().map(|client| client.join().unwrap());
        counts.fold((0, 0), |sum, each| (sum.0 + each.0, sum.1 + each.1))
    });
    assert!(answered > refused, "{answered} requests were answered, {refused} refused");
    server.await_workers(2);
    for fixture in &fixtures {
        server.client.check(&fixture.name, &fixture.cases[0]);
    }
    assert_eq!(server.client.metric("pswitch_worker_restarts_total"), 10.0);
    assert_eq!(server.client.metric("pswitch_slot_in_use_bytes"), 0.0);
}

/// What a worker that is replaced builds is read from the repository again.
#[test]
fn a_worker_is_replaced_although_an_archive_is_gone() {
    let fixtures = ["recurrent", "dynamic-batch"].map(Fixture::load);
    let server = Serve::new(Models::of(&fixtures)).host(1).start();
    let workers = server.await_workers(2);
    std::fs::remove_file(server.models.archive("recurrent")).unwrap();
    for worker in &workers {
        assert!(worker.signal(Signal::SIGKILL));
    }
    eventually("the workers are replaced", || match server.client.metric("pswitch_worker_restarts_total") {
        2.0 => Ok(()),
        other => Err(format!("{other} restarts")),
    });
    let replaced = server.await_workers(2);
    for _ in 0..3 {
        let refusal = server.client.infer("recurrent", &fixtures[0].cases[0].inputs).unwrap_err();
        assert_eq!(refusal.status, 503, "{refusal:?}");
        assert_says(&refusal.error, &["'recurrent'", "model.pt2"]);
        server.client.check("dynamic-batch", &fixtures[1].cases[0]);
    }
    assert_eq!(server.await_workers(2), replaced, "a model that cannot be built costs no worker");
    let (state, reason) = server.client.index().remove("recurrent").unwrap();
    assert_eq!(state, "UNAVAILABLE");
    assert_says(&reason, &["model.pt2"]);

    server.models.link("recurrent", &fixtures[0].archive);
    assert_eq!(server.client.post("/v2/repository/models/recurrent/load", &[], b"").unwrap().status, 200);
    server.client.check("recurrent", &fixtures[0].cases[0]);
}

#[test]
fn a_worker_that_hangs_is_replaced_while_others_go_on() {
    let [hung, going] = ["recurrent", "integer-outputs"].map(Fixture::load);
    // Two executions at a time: one will hang, the other must not. All look before they sleep, so that requests are announced.
    let server = Serve::new(Models::of([&hung, &going]))
        .config(
            "devices: [{id: host, arenas: 2, workers: 3, threads: 1, spin_us: 300, pool_size: 64MiB, arena_size: 8MiB}]\n\
             limits: {execution_timeout_ms: 3000, stop_grace_ms: 200}\n",
        )
        .start();
    let workers = server.await_workers(3);
    let stopped = &workers[0];
    assert!(stopped.signal(Signal::SIGSTOP));
    let (refusals, answers) = std::thread::scope(|scope| {
        // Two at a time, and by the worker that finished last: which of many are given to the one that is stopped is chance.
        const AT_ONCE: usize = 8;
        let wave = || -> Vec<_> {
            let request = |_| scope.spawn(|| server.client.infer("recurrent", &hung.cases[0].inputs));
            let requests: Vec<_> = (0..AT_ONCE).map(request).collect();
            eventually("all but one are answered", || {
                match requests.iter().filter(|request| request.is_finished()).count() {
                    answered if answered + 1 >= AT_ONCE => Ok(()),
                    answered => Err(format!("{answered} are")),
                }
            });
            // One that is not stuck is answered by then, long before one that is.
            sleep(Duration::from_millis(500));
            requests
        };
        let is_stuck = |requests: &Vec<ScopedJoinHandle<'_, _>>| requests.iter().any(|it| !it.is_finished());
        let requests = std::iter::repeat_with(wave).take(100).find(is_stuck);
        let requests = requests.expect("the stopped worker is given a request");
        for _ in 0..20 {
            server.client.check("integer-outputs", &going.cases[0]);
        }
        let ends: Vec<_> = requests.into_iter().map(|request| request.join().unwrap()).collect();
        let (answers, refusals): (Vec<_>, Vec<_>) = ends.into_iter().partition(Result::is_ok);
        (refusals, answers)
    });
    for answer in answers {
        answer.unwrap().assert_is("recurrent", &hung.cases[0]);
    }
    let [Err(refusal)] = refusals.as_slice() else { panic!("one request hangs: {refusals:?}") };
    assert_eq!(refusal.status, 504);
    assert_says(&refusal.error, &["stopped after 3000.000 ms"]);
    let replaced = server.await_workers(3);
    assert!(!stopped.is_alive());
    assert_eq!(replaced.iter().filter(|worker| workers.contains(worker)).count(), 2);
    for _ in 0..6 {
        server.client.check("recurrent", &hung.cases[0]);
    }
}

#[test]
fn a_client_that_leaves_holds_nobody_up() {
    let link = SlowLink::serve();
    let SlowLink { server, slow, .. } = &link;
    link.check_quick();
    let mut stream = TcpStream::connect(&server.address).unwrap();
    stream.write_all(&request_bytes(&slow.name, &slow.cases[0])).unwrap();
    link.waiting_worker();
    assert!(server.client.metric("pswitch_requests_in_flight") >= 1.0);
    drop(stream);
    eventually("the request is given up", || match server.client.metric("pswitch_requests_in_flight") {
        0.0 => Ok(()),
        other => Err(format!("{other} are in flight")),
    });
    link.check_quick();
    link.check_slow();
    let metrics = server.client.metrics();
    assert_eq!(metrics["pswitch_requests_total{model=\"recurrent\",outcome=\"cancelled\"}"], 1.0);
    assert_eq!(metrics["pswitch_worker_restarts_total"], 0.0, "nobody is killed because a client leaves");
    eventually("its slot is free", || match server.client.metric("pswitch_slot_in_use_bytes") {
        0.0 => Ok(()),
        other => Err(format!("{other} bytes are in use")),
    });

    // One that leaves in the middle of its own request.
    let bytes = request_bytes(&slow.name, &slow.cases[0]);
    for sent in [10, bytes.len() / 2, bytes.len() - 1] {
        let mut stream = TcpStream::connect(&server.address).unwrap();
        stream.write_all(&bytes[..sent]).unwrap();
    }
    // One that sends all and reads nothing: what it is owed waits in its socket.
    let mut stream = TcpStream::connect(&server.address).unwrap();
    stream.write_all(&bytes).unwrap();
    link.check_quick();
    link.check_slow();
    let mut first = [0; 12];
    stream.read_exact(&mut first).unwrap();
    assert_eq!(&first, b"HTTP/1.1 200");
}

/// A whole request with JSON data, as it goes over the connection.
fn request_bytes(model: &str, case: &Case) -> Vec<u8> {
    let inputs: Vec<_> = case.inputs.iter().map(crate::support::Tensor::binary_header).collect();
    let header = json!({"inputs": inputs, "parameters": {"binary_data_output": true}}).to_string();
    let data: Vec<u8> = case.inputs.iter().flat_map(|input| &input.data).copied().collect();
    let head = format!(
        "POST /v2/models/{model}/infer HTTP/1.1\r\nHost: pswitch\r\nInference-Header-Content-Length: {}\r\n\
         Content-Length: {}\r\n\r\n",
        header.len(),
        header.len() + data.len()
    );
    [head.as_bytes(), header.as_bytes(), &data].concat()
}

#[test]
fn without_its_zygote_a_server_ends_and_takes_all_with_it() {
    let fixture = Fixture::load("recurrent");
    let mut server = Serve::new(Models::of([&fixture])).host(1).start();
    let processes = server.processes();
    assert_eq!(processes.len(), 4);
    assert!(server.zygote().signal(Signal::SIGKILL));
    assert_eq!(server.wait(), Some(1));
    assert_says(&server.log(), &["pswitch: the zygote is gone, and with it all workers"]);
    await_end(&processes);
}

#[test]
fn a_server_that_is_killed_leaves_no_process_behind() {
    let link = SlowLink::serve();
    let mut processes = Vec::new();
    std::thread::scope(|scope| {
        let (request, _) = link.begin(scope);
        processes = link.server.processes();
        // Not even processes that cannot do anything about it themselves.
        for process in &processes[1..] {
            assert!(process.signal(Signal::SIGSTOP));
        }
        assert!(link.server.process.signal(Signal::SIGKILL));
        assert_eq!(request.join().unwrap().unwrap_err().status, 0, "the connection breaks");
    });
    assert_eq!(processes.len(), 4);
    await_end(&processes);
    assert!(children(link.server.process.pid).is_empty());
}

#[test]
fn a_worker_that_is_killed_while_idle_is_replaced_unnoticed() {
    let fixture = Fixture::load("recurrent");
    let server = Serve::new(Models::of([&fixture])).host(1).start();
    let client = Client::new(&server.url());
    for killed in 1..=4 {
        let worker = &server.await_workers(2)[killed % 2];
        assert!(worker.signal(Signal::SIGKILL));
        // No request comes to harm, whether the loss has been heard of or not.
        client.check("recurrent", &fixture.cases[0]);
        eventually("it is replaced", || match client.metric("pswitch_worker_restarts_total") {
            restarts if restarts == killed as f64 => Ok(()),
            restarts => Err(format!("{restarts} restarts")),
        });
    }
}
