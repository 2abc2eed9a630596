//! The account of a task over the events that it is told of.

use std::time::Duration;

use proptest::prelude::*;
use pswitch_train::{InterruptionReason, Progress, ProgressEvent, ProgressLine, ProgressReport, TrainError};

const WINDOW: Duration = Duration::from_secs(10);

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn finished(loss: f64) -> ProgressEvent {
    ProgressEvent::StepFinished { loss, samples: 8, duration: ms(100) }
}

fn began(reason: InterruptionReason) -> ProgressEvent {
    ProgressEvent::InterruptionBegan { reason }
}

/// A step every 100 ms, from `from` on.
fn steps(progress: &mut Progress, from: Duration, count: u32) -> Duration {
    let mut at = from;
    for _ in 0..count {
        at += ms(100);
        progress.handle(at, finished(1.0)).unwrap();
    }
    at
}

#[test]
fn nothing_has_happened_at_first() {
    let progress = Progress::new(500, ms(3), WINDOW);
    let report = progress.report(ms(3));
    assert_eq!((report.steps_done, report.steps_computed, report.goodput), (500, 0, None));
    assert_eq!((report.steps_per_s, report.samples_per_s, report.last_loss), (0.0, 0.0, None));
    assert_eq!((report.interruptions, report.interruption_cost_us()), (0, 0));
}

#[test]
fn steps_that_are_discarded_or_lost_lower_goodput() {
    let mut progress = Progress::new(100, ms(0), WINDOW);
    let at = steps(&mut progress, ms(0), 6);
    progress.handle(at, ProgressEvent::StepDiscarded { duration: ms(40) }).unwrap();
    progress.handle(at, ProgressEvent::StepDiscarded { duration: ms(20) }).unwrap();
    let report = progress.report(at);
    assert_eq!((report.steps_done, report.steps_computed, report.goodput), (106, 8, Some(0.75)));
    assert_eq!((report.computing_us, report.discarded_us, report.samples), (600_000, 60_000, 48));

    progress.handle(at, ProgressEvent::Resumed { steps_done: 102 }).unwrap();
    let report = progress.report(at);
    assert_eq!((report.steps_done, report.goodput), (102, Some(0.25)));
    // Further back than this run began: no more can be lost than was computed.
    progress.handle(at, ProgressEvent::Resumed { steps_done: 50 }).unwrap();
    assert_eq!((progress.report(at).steps_done, progress.report(at).goodput), (50, Some(0.0)));
}

#[test]
fn steps_that_a_checkpoint_holds_count_though_they_were_given_up() {
    let mut progress = Progress::new(0, ms(0), WINDOW);
    let at = steps(&mut progress, ms(0), 6);
    progress.handle(at, ProgressEvent::StepDiscarded { duration: ms(40) }).unwrap();
    progress.handle(at, ProgressEvent::StepDiscarded { duration: ms(40) }).unwrap();
    // The worker is lost: as far as anybody knows, its last checkpoint was that of the second step.
    progress.handle(at, ProgressEvent::Resumed { steps_done: 2 }).unwrap();
    assert_eq!((progress.report(at).steps_done, progress.report(at).goodput), (2, Some(0.25)));
    // There is a later one.
    progress.handle(at, ProgressEvent::Resumed { steps_done: 4 }).unwrap();
    assert_eq!((progress.report(at).steps_done, progress.report(at).goodput), (4, Some(0.5)));
    // More than this run computed: no more than that can be kept of it.
    progress.handle(at, ProgressEvent::Resumed { steps_done: 40 }).unwrap();
    assert_eq!((progress.report(at).steps_done, progress.report(at).goodput), (40, Some(0.75)));
}

#[test]
fn rates_are_those_of_the_window() {
    let mut progress = Progress::new(0, ms(0), WINDOW);
    // Before the window is full, rates are over what there is of it.
    let mut at = steps(&mut progress, ms(0), 20);
    assert_eq!((progress.report(at).steps_per_s, progress.report(at).samples_per_s), (10.0, 80.0));
    at = steps(&mut progress, at, 180);
    assert_eq!(progress.report(at).steps_per_s, 10.0);
    // An interruption shows at once, and is forgotten when it leaves the window.
    progress.handle(at, began(InterruptionReason::Turn)).unwrap();
    at += ms(5000);
    assert_eq!(progress.report(at).steps_per_s, 5.0);
    at += ms(20_000);
    assert_eq!(progress.report(at).steps_per_s, 0.0);
    progress.handle(at, ProgressEvent::InterruptionEnded).unwrap();
    at = steps(&mut progress, at, 50);
    assert_eq!(progress.report(at).steps_per_s, 5.0);
    at = steps(&mut progress, at, 50);
    assert_eq!(progress.report(at).steps_per_s, 10.0);
}

#[test]
fn fast_steps_have_a_shorter_window() {
    let mut progress = Progress::new(0, ms(0), WINDOW);
    for at in 1..=9000 {
        progress.handle(ms(at), finished(0.0)).unwrap();
    }
    assert!((progress.report(ms(9000)).steps_per_s - 1000.0).abs() < 1e-6);
    // Twice as fast: seen after half a second.
    for at in 0..1200 {
        progress.handle(ms(9000) + Duration::from_micros(500) * (at + 1), finished(0.0)).unwrap();
    }
    assert!((progress.report(ms(9600)).steps_per_s - 2000.0).abs() < 1e-6);
}

#[test]
fn interruptions_are_counted_by_reason_and_while_they_last() {
    let mut progress = Progress::new(0, ms(0), WINDOW);
    for (at, event) in [
        (10, began(InterruptionReason::Request)),
        (15, ProgressEvent::InterruptionEnded),
        (20, began(InterruptionReason::Turn)),
        (50, ProgressEvent::InterruptionEnded),
        (60, ProgressEvent::StepDiscarded { duration: ms(7) }),
        (60, began(InterruptionReason::Request)),
    ] {
        progress.handle(ms(at), event).unwrap();
    }
    let report = progress.report(ms(80));
    assert_eq!((report.interruptions, report.paused_us), (3, 55_000));
    assert_eq!(report.interruption_cost_us(), 62_000);
    let requests = report.by_reason[&InterruptionReason::Request];
    assert_eq!((requests.interruptions, requests.paused_us), (2, 25_000));
    assert_eq!(report.by_reason.len(), 2);

    progress.handle(ms(90), ProgressEvent::InterruptionEnded).unwrap();
    assert_eq!(progress.report(ms(200)).paused_us, 65_000);
}

#[test]
fn events_out_of_order_are_refused_and_change_nothing() {
    let mut progress = Progress::new(0, ms(0), WINDOW);
    let error = progress.handle(ms(1), ProgressEvent::InterruptionEnded);
    assert!(matches!(error, Err(TrainError::NotInterrupted)));
    progress.handle(ms(2), began(InterruptionReason::Turn)).unwrap();
    let before = progress.report(ms(9));
    let error = progress.handle(ms(3), began(InterruptionReason::Request));
    assert!(matches!(error, Err(TrainError::AlreadyInterrupted)));
    for event in [finished(1.0), ProgressEvent::StepDiscarded { duration: ms(1) }] {
        assert!(matches!(progress.handle(ms(3), event), Err(TrainError::StepWhileInterrupted)));
    }
    assert_eq!(progress.report(ms(9)), before);
    // A worker that dies while the task is interrupted takes steps with it.
    progress.handle(ms(3), ProgressEvent::Resumed { steps_done: 0 }).unwrap();
}

#[test]
fn lines_are_json_that_is_read_back() {
    let mut progress = Progress::new(9, ms(0), WINDOW);
    progress.handle(ms(500), finished(0.25)).unwrap();
    let line = progress.line(ms(500), 0.1);
    let text = line.to_json();
    assert_eq!(
        text,
        "{\"at_us\":500000,\"step\":10,\"loss\":0.25,\"lr\":0.1,\"steps_per_s\":2.0,\"samples_per_s\":16.0,\
         \"goodput\":1.0,\"interruptions\":0,\"interruption_cost_us\":0}\n"
    );
    assert_eq!(serde_json::from_str::<ProgressLine>(&text).unwrap(), line);

    // A loss that blew up is no number in JSON.
    progress.handle(ms(600), finished(f64::NAN)).unwrap();
    let text = progress.line(ms(600), 0.1).to_json();
    assert!(text.contains("\"loss\":null"), "{text}");
    assert_eq!(serde_json::from_str::<ProgressLine>(&text).unwrap().loss, None);
    let report = serde_json::to_string(&progress.report(ms(600))).unwrap();
    assert_eq!(serde_json::from_str::<ProgressReport>(&report).unwrap().steps_done, 11);
}

fn any_event() -> impl Strategy<Value = ProgressEvent> {
    prop_oneof![
        4 => (0u64..1000).prop_map(|samples| ProgressEvent::StepFinished {
            loss: 1.0,
            samples,
            duration: ms(samples)
        }),
        2 => (0u64..50).prop_map(|time| ProgressEvent::StepDiscarded { duration: ms(time) }),
        1 => (0u64..9).prop_map(|steps_done| ProgressEvent::Resumed { steps_done }),
        2 => Just(began(InterruptionReason::Request)),
        2 => Just(ProgressEvent::InterruptionEnded),
    ]
}

proptest! {
    /// Whatever happens in whatever order: the account adds up.
    #[test]
    fn the_account_adds_up(events in proptest::collection::vec((0u64..3000, any_event()), 0..200)) {
        let mut progress = Progress::new(0, ms(0), WINDOW);
        let (mut at, mut paused, mut since, mut done, mut computed) = (0, 0, None, 0u64, 0);
        for (step, event) in events {
            at += step;
            if progress.handle(ms(at), event).is_ok() {
                match event {
                    ProgressEvent::StepFinished { .. } => (done, computed) = (done + 1, computed + 1),
                    ProgressEvent::StepDiscarded { .. } => computed += 1,
                    ProgressEvent::Resumed { steps_done } => done = steps_done,
                    ProgressEvent::InterruptionBegan { .. } => since = Some(at),
                    _ => paused += at - since.take().unwrap(),
                }
            }
            let report = progress.report(ms(at));
            prop_assert_eq!((report.steps_done, report.steps_computed), (done, computed));
            prop_assert_eq!(report.paused_us, 1000 * (paused + since.map_or(0, |since| at - since)));
            prop_assert_eq!(report.goodput.is_some(), computed > 0);
            prop_assert!((0.0..=1.0).contains(&report.goodput.unwrap_or(0.0)));
            prop_assert!(report.steps_per_s.is_finite() && report.steps_per_s >= 0.0);
        }
    }
}
