//! An orderly end: what runs is finished, what is new refused, nothing stays behind.

use nix::sys::signal::Signal;

use crate::faults::SlowLink;
use crate::support::{Client, Fixture, Models, Serve, await_end, eventually};

#[test]
fn on_sigterm_what_runs_is_answered_and_what_is_new_refused() {
    let mut link = SlowLink::serve();
    let processes = link.server.processes();
    std::thread::scope(|scope| {
        let (request, _) = link.begin(scope);
        let client = Client::new(&link.server.url());
        assert!(link.server.process.signal(Signal::SIGTERM));
        // The signal is heard a moment later. A request sent before that would be accepted, and wait for the slow one.
        eventually("the signal is heard", || match client.get("/v2/health/ready") {
            Ok(answer) if answer.status == 200 => Err(format!("{answer:?}")),
            _ => Ok(()),
        });
        assert!(!request.is_finished(), "what runs takes longer than this");
        let refusal = client.infer(&link.slow.name, &link.slow.cases[0].inputs).unwrap_err();
        // Not even connected to, once the last answer is on its way.
        assert!(matches!(refusal.status, 0 | 503), "{refusal:?}");
        if refusal.status == 503 {
            assert_eq!(refusal.error, "the server is shutting down");
        }
        let answer = request.join().unwrap().expect("what runs is answered");
        answer.assert_is(&link.slow.name, &link.slow.cases[0]);
    });
    assert_eq!(link.server.wait(), Some(0));
    await_end(&processes);
}

#[test]
fn an_idle_server_ends_at_once_on_either_signal() {
    let fixture = Fixture::load("integer-outputs");
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let mut server = Serve::new(Models::of([&fixture])).host(1).start();
        let processes = server.processes();
        // A connection that stays open without a request must not hold it up.
        server.client.check("integer-outputs", &fixture.cases[0]);
        assert!(server.process.signal(signal));
        assert_eq!(server.wait(), Some(0), "{signal}");
        await_end(&processes);
    }
}

/// A terminal sends Ctrl-C to every process of the group: workers must leave the end to the server.
#[test]
fn ctrl_c_in_a_terminal_lets_the_request_that_runs_finish() {
    let mut link = SlowLink::serve();
    std::thread::scope(|scope| {
        let (request, _) = link.begin(scope);
        for process in link.server.processes() {
            assert!(process.signal(Signal::SIGINT));
        }
        let answer = request.join().unwrap().expect("what runs is answered");
        answer.assert_is(&link.slow.name, &link.slow.cases[0]);
    });
    assert_eq!(link.server.wait(), Some(0));
}

/// The second signal means it.
#[test]
fn a_second_signal_does_not_wait() {
    let mut link = SlowLink::serve();
    std::thread::scope(|scope| {
        let (request, _) = link.begin(scope);
        assert!(link.server.process.signal(Signal::SIGTERM));
        eventually("the first is heard", || {
            if link.server.log().contains("finishing what runs") { Ok(()) } else { Err(link.server.log()) }
        });
        assert!(link.server.process.signal(Signal::SIGTERM));
        // Answered with a refusal or not at all, depending on what comes first.
        let refusal = request.join().unwrap().unwrap_err();
        assert!(matches!(refusal.status, 0 | 503), "{refusal:?}");
    });
    assert_eq!(link.server.wait(), Some(0));
}
