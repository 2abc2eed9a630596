//! What becomes of requests when something goes wrong, or nobody wants them any more.

use std::time::Duration;

use crate::desk::{Desk, Execute, UNIT_BYTES, execute, fault, model, ok, options, rejected};
use pswitch_controller::scheduler::{Action, Event, ModelLimits, Outcome, Rejection, SchedulerOptions};
use pswitch_protocol::{ExecutionFault, FaultClass};

const S: Duration = Duration::from_secs(1);

fn cut() -> Rejection {
    Rejection::TransferFailed { reason: "cut".to_owned() }
}

#[test]
fn a_model_that_raises_is_told_and_the_worker_goes_on() {
    let mut desk = Desk::new(8, &[4]).at_work(1);
    let first = execute(&desk.submit(0, 0));
    assert_eq!(desk.land(first.transfer), []);
    let raised = fault(FaultClass::Input);
    let actions = desk.finish(first.execution, Outcome::Failed(raised.clone()));
    assert_eq!(actions, [rejected(0, Rejection::ExecutionFailed(raised))]);
    let second = execute(&desk.submit(1, 0));
    assert_eq!(second.worker, first.worker);
    assert_eq!(desk.complete(&second), []);
}

#[test]
fn a_request_survives_its_worker() {
    let mut desk = Desk::new(8, &[4]).at_work(2);
    let first = execute(&desk.submit(0, 0));
    assert_eq!(desk.land(first.transfer), []);
    let second = execute(&desk.lose(first.worker));
    assert_eq!((second.request, second.evicted()), (first.request, None));
    assert_ne!(second.worker, first.worker);
    assert_eq!(desk.complete(&second), []);
}

#[test]
fn a_request_is_not_tried_for_ever() {
    let mut desk = Desk::new(8, &[4]).at_work(2);
    let first = execute(&desk.submit(0, 0));
    assert_eq!(desk.submit(1, 0), []);
    assert_eq!(desk.land(first.transfer), []);
    let second = execute(&desk.lose(first.worker));
    assert_eq!(second.request.0, 0, "it keeps its place in the queue");
    assert_eq!(desk.land(second.transfer), []);
    assert_eq!(desk.lose(second.worker), [rejected(0, Rejection::WorkerLost { attempts: 2 })]);
    let other = execute(&desk.ready(7));
    assert_eq!(desk.complete(&other), []);
}

#[test]
fn a_lost_worker_leaves_nothing_while_its_inputs_still_move() {
    // The transfer still reads the slot and writes the arena: neither may be given to another.
    let mut desk = Desk::new(8, &[4]).at_work(3);
    let first = execute(&desk.submit(0, 0));
    assert_eq!(desk.submit(1, 0), []);
    assert_eq!(desk.lose(first.worker), []);
    assert_eq!(desk.scheduler.executing(), 1);
    let again = execute(&desk.land(first.transfer));
    assert_eq!((again.request, again.arena), (first.request, first.arena));

    // The same if nobody wants it any more: the answer frees the slot.
    let Some(second) = desk.complete(&again).iter().find_map(Execute::of) else { panic!("1 waits") };
    assert_eq!(desk.lose(second.worker), []);
    assert_eq!(desk.cancel(1), []);
    assert_eq!(desk.land(second.transfer), [rejected(1, Rejection::Cancelled)]);
}

#[test]
fn what_is_completed_is_answered_before_its_landing_is_heard_of() {
    let mut desk = Desk::new(8, &[4]).at_work(1);
    let first = execute(&desk.submit(0, 0));
    assert_eq!(desk.finish(first.execution, Outcome::Completed), [ok(0)]);
    assert!(!desk.scheduler.is_idle());
    let second = execute(&desk.submit(1, 0));
    assert_eq!(desk.land(first.transfer), []);
    assert_eq!(desk.complete(&second), []);
}

#[test]
fn a_deadline_passes_in_the_queue() {
    let mut desk = Desk::new(8, &[4]).at_work(1);
    let first = execute(&desk.submit(0, 0));
    assert_eq!(desk.submit_until(1, 0, 2 * S), []);
    assert_eq!(desk.tick(), [rejected(1, Rejection::Deadline)]);
    assert_eq!(desk.scheduler.waiting(), 0);
    assert_eq!(desk.complete(&first), []);
    // One that has passed already.
    assert_eq!(desk.submit_until(2, 0, Duration::ZERO), [rejected(2, Rejection::Deadline)]);
}

#[test]
fn a_deadline_passes_under_way() {
    let mut desk = Desk::new(8, &[4]).at_work(1);
    let first = execute(&desk.submit_until(0, 0, 2 * S));
    assert_eq!(desk.land(first.transfer), []);
    assert_eq!(desk.tick(), [Action::Stop { execution: first.execution }]);
    assert_eq!(desk.finish(first.execution, Outcome::Stopped), [rejected(0, Rejection::Deadline)]);
    assert_eq!(desk.scheduler.next_deadline(), None);
}

#[test]
fn a_cancelled_request_is_not_begun() {
    let mut desk = Desk::new(8, &[4]).at_work(1);
    let first = execute(&desk.submit(0, 0));
    assert_eq!(desk.submit_until(1, 0, S), []);
    assert_eq!(desk.cancel(1), [rejected(1, Rejection::Cancelled)]);
    assert_eq!(desk.cancel(1), [], "it is answered");
    assert_eq!(desk.complete(&first), []);
    assert_eq!(desk.cancel(0), [], "so is this");
}

#[test]
fn a_cancelled_execution_is_stopped() {
    let mut desk = Desk::new(8, &[4]).at_work(1);
    let first = execute(&desk.submit(0, 0));
    assert_eq!(desk.land(first.transfer), []);
    assert_eq!(desk.cancel(0), [Action::Stop { execution: first.execution }]);
    assert_eq!(desk.cancel(0), [], "it has been told");
    assert_eq!(desk.finish(first.execution, Outcome::Stopped), [rejected(0, Rejection::Cancelled)]);

    // Completed in the same moment: the answer is there.
    let second = execute(&desk.submit(1, 0));
    assert_eq!(desk.land(second.transfer), []);
    desk.cancel(1);
    assert_eq!(desk.finish(second.execution, Outcome::Completed), [ok(1)]);
}

#[test]
fn no_worker_is_killed_because_a_client_has_gone() {
    let mut desk = Desk::new(8, &[4]).at_work(1);
    let begun = desk.now;
    let first = execute(&desk.submit(0, 0));
    assert_eq!(desk.land(first.transfer), []);
    assert_eq!(desk.cancel(0), [Action::Stop { execution: first.execution }]);
    let limit = options().execution_timeout + options().stop_grace;
    assert_eq!(desk.scheduler.next_deadline(), Some(begun + limit), "only if it takes too long as well");
    assert_eq!(desk.tick(), [Action::Kill { worker: first.worker }]);
    assert_eq!(desk.lose(first.worker), [rejected(0, Rejection::Cancelled)]);
}

#[test]
fn a_hung_worker_is_stopped_then_killed_and_then_comes_the_answer() {
    let mut desk = Desk::new(8, &[4]).at_work(2);
    let first = execute(&desk.submit(0, 0));
    assert_eq!(desk.land(first.transfer), []);
    assert_eq!(desk.submit(1, 0), []);
    assert_eq!(desk.tick(), [Action::Stop { execution: first.execution }]);
    assert_eq!(desk.tick(), [Action::Kill { worker: first.worker }]);
    assert_eq!(desk.scheduler.next_deadline(), None);
    assert_eq!(desk.scheduler.workers().killed, 1);
    let actions = desk.lose(first.worker);
    let limit = options().execution_timeout;
    assert_eq!(actions[0], rejected(0, Rejection::ExecutionTimedOut { limit }), "and is not tried again");
    let second = execute(&actions[1..]);
    assert_eq!(desk.finish(first.execution, Outcome::Completed), [], "it is over");
    assert_eq!(desk.complete(&second), []);
}

#[test]
fn a_worker_may_obey_in_its_last_moment() {
    let mut desk = Desk::new(8, &[4]).at_work(1);
    let first = execute(&desk.submit(0, 0));
    assert_eq!(desk.land(first.transfer), []);
    desk.tick();
    desk.tick();
    let limit = options().execution_timeout;
    let answered = desk.finish(first.execution, Outcome::Stopped);
    assert_eq!(answered, [rejected(0, Rejection::ExecutionTimedOut { limit })]);
    assert_eq!(desk.submit(1, 0), [], "it is going to die: nothing more for it");
    assert_eq!(desk.lose(first.worker), []);
    assert_eq!(execute(&desk.ready(1)).request.0, 1);
}

#[test]
fn a_model_may_have_a_time_of_its_own() {
    let mut desk = Desk::new(8, &[]).at_work(1);
    let limits = ModelLimits { execution_timeout: Some(3 * S), ..ModelLimits::default() };
    desk.scheduler.place(model(0), UNIT_BYTES, 1, limits).unwrap();
    let first = execute(&desk.submit(0, 0));
    assert_eq!(desk.scheduler.next_deadline(), Some(desk.now + 3 * S));
    assert_eq!(desk.land(first.transfer), []);
    desk.tick();
    let stopped = desk.finish(first.execution, Outcome::Stopped);
    assert_eq!(stopped, [rejected(0, Rejection::ExecutionTimedOut { limit: 3 * S })]);
}

#[test]
fn a_time_without_end_is_no_timer() {
    let options =
        SchedulerOptions { execution_timeout: Duration::MAX, stop_grace: Duration::MAX, ..options() };
    let mut desk = Desk::with(8, 1, &[4], options).at_work(1);
    let first = execute(&desk.submit(0, 0));
    assert_eq!(desk.scheduler.next_deadline(), None);
    assert_eq!(desk.cancel(0), [Action::Stop { execution: first.execution }]);
    assert_eq!(desk.scheduler.next_deadline(), None);
}

#[test]
fn a_worker_that_ends_is_given_nothing_and_answers_when_it_is_gone() {
    let mut desk = Desk::with(8, 2, &[4], options()).at_work(2);
    let first = execute(&desk.submit(0, 0));
    assert_eq!(desk.land(first.transfer), []);
    assert_eq!(desk.event(Event::WorkerEnding { worker: first.worker }), []);
    // The other one has work, and this one is not asked though its verdict comes.
    let second = execute(&desk.submit(1, 0));
    assert_ne!(second.worker, first.worker);
    assert_eq!(desk.submit(2, 0), []);
    let raised = fault(FaultClass::Model);
    let actions = desk.finish(first.execution, Outcome::Failed(raised.clone()));
    assert_eq!(actions, [rejected(0, Rejection::ExecutionFailed(raised))]);
    assert_eq!(desk.lose(first.worker), []);
}

#[test]
fn a_stop_that_nobody_asked_for_is_a_loss() {
    let mut desk = Desk::new(8, &[4]).at_work(2);
    let first = execute(&desk.submit(0, 0));
    assert_eq!(desk.land(first.transfer), []);
    let second = execute(&desk.finish(first.execution, Outcome::Stopped));
    assert_eq!(second.request, first.request);
    assert_eq!(desk.land(second.transfer), []);
    let lost = desk.finish(second.execution, Outcome::Stopped);
    assert_eq!(lost, [rejected(0, Rejection::WorkerLost { attempts: 2 })]);
}

#[test]
fn a_failed_transfer_releases_all_that_wait_for_it_and_later_ones_work() {
    let mut desk = Desk::with(8, 2, &[4, 8], options()).at_work(2);
    let one = execute(&desk.submit(0, 1));
    assert_eq!(desk.complete(&one), []);
    let first = execute(&desk.submit(1, 0));
    assert_eq!(first.evicted(), Some(vec![model(1)]));
    let second = execute(&desk.submit(2, 0));
    assert_eq!(desk.submit(3, 0), []);

    let actions = desk.fail(first.transfer);
    assert_eq!(
        actions,
        [Action::Poison { model: model(0) }, Action::PoisonInputs { execution: first.execution },]
    );
    assert_eq!(desk.land(second.transfer), [], "the inputs of the second come, its weights do not");
    let poisoned = || Outcome::Failed(fault(FaultClass::Transfer));
    assert_eq!(
        desk.finish(first.execution, poisoned()),
        [rejected(1, cut())],
        "nothing begins on poisoned doorbells"
    );

    // The last one that waited is out: doorbells are cleared, also those that the transfer was to clear.
    let actions = desk.finish(second.execution, poisoned());
    assert_eq!(actions[..2], [rejected(2, cut()), Action::Clear { models: vec![model(1), model(0)] }]);
    let third = execute(&actions[2..]);
    assert_eq!((third.request.0, third.evicted()), (3, Some(vec![])));
    assert_eq!(desk.complete(&third), []);
}

#[test]
fn a_worker_lost_at_poisoned_doorbells_is_not_the_reason() {
    let mut desk = Desk::new(8, &[4]).at_work(2);
    let first = execute(&desk.submit(0, 0));
    desk.fail(first.transfer);
    assert_eq!(desk.lose(first.worker), [rejected(0, cut()), Action::Clear { models: vec![model(0)] }]);
    let second = execute(&desk.submit(1, 0));
    assert_eq!(desk.complete(&second), []);
}

#[test]
fn inputs_may_fail_alone() {
    let mut desk = Desk::new(8, &[4]).at_work(1);
    let first = execute(&desk.submit(0, 0));
    assert_eq!(desk.complete(&first), []);
    let second = execute(&desk.submit(1, 0));
    assert_eq!(desk.fail(second.transfer), [Action::PoisonInputs { execution: second.execution }]);
    let failed = desk.finish(second.execution, Outcome::Failed(fault(FaultClass::Transfer)));
    assert_eq!(failed, [rejected(1, cut())]);
    assert!(desk.scheduler.model(model(0)).unwrap().present);
}

#[test]
fn a_doorbell_that_never_rings_is_a_failed_transfer() {
    let mut desk = Desk::new(8, &[4]).at_work(1);
    let first = execute(&desk.submit(0, 0));
    assert_eq!(desk.finish(first.execution, Outcome::Failed(fault(FaultClass::Transfer))), []);
    let reason = fault(FaultClass::Transfer).message;
    assert_eq!(desk.land(first.transfer), [rejected(0, Rejection::TransferFailed { reason })]);
}

#[test]
fn a_failed_prefetch_is_not_repeated() {
    let mut desk = Desk::new(8, &[4, 4]).at_work(2);
    let first = execute(&desk.submit(0, 0));
    assert_eq!(desk.submit(1, 1), []);
    let prefetched = desk.land(first.transfer);
    let [Action::Prefetch { transfer, .. }] = prefetched[..] else { panic!("{prefetched:?}") };
    assert_eq!(
        desk.fail(transfer),
        [Action::Poison { model: model(1) }, Action::Clear { models: vec![model(1)] },]
    );
    assert_eq!(desk.submit(2, 0), []);
    // Its turn comes nevertheless, with a load of its own.
    let next = execute(&desk.complete(&first));
    assert_eq!(next.model, model(0));
    let next = execute(&desk.complete(&next));
    assert_eq!((next.model, next.evicted()), (model(1), Some(vec![])));
    assert_eq!(desk.complete(&next), []);
}

#[test]
fn rejections_read_well() {
    let raised = ExecutionFault { class: FaultClass::Input, message: "index 9 is out of range".to_owned() };
    for (rejection, text) in [
        (Rejection::QueueFull { waiting: 4, limit: 4 }, "4 requests wait already, 4 may"),
        (Rejection::ExecutionFailed(raised), "index 9 is out of range"),
        (Rejection::ExecutionTimedOut { limit: 2 * S }, "the execution took longer than 2000 ms"),
        (cut(), "the transfer failed: cut"),
    ] {
        assert_eq!(rejection.to_string(), text);
    }
}
