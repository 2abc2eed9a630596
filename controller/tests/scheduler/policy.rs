//! Which request is served next, where its weights come from, and in which order.

use std::time::Duration;

use crate::desk::{Desk, Execute, UNIT_BYTES, execute, model, ok, options, rejected};
use pswitch_controller::scheduler::{
    Action, Event, ModelLimits, Outcome, Rejection, SchedulerOptions, WorkerId,
};
use pswitch_mem_pool::{ArenaId, ModelId, PoolError};

const MS: Duration = Duration::from_millis(1);

#[test]
fn weights_move_once_and_stay() {
    let mut desk = Desk::new(8, &[4]).at_work(1);
    let first = execute(&desk.submit(0, 0));
    assert_eq!((first.model, first.arena, &first.evicted()), (model(0), ArenaId(0), &Some(vec![])));
    assert_eq!(desk.complete(&first), []);
    let second = execute(&desk.submit(1, 0));
    assert_eq!(second.evicted(), None, "it is resident");
    assert_eq!(desk.complete(&second), []);
    let counts = desk.scheduler.model(model(0)).unwrap();
    assert_eq!((counts.loads, counts.evictions, counts.present), (1, 0, true));
    assert!(desk.scheduler.is_idle());
}

#[test]
fn what_is_in_the_way_is_evicted() {
    let mut desk = Desk::new(8, &[4, 4, 8]).at_work(1);
    for id in [0, 1] {
        let running = execute(&desk.submit(u64::from(id), id));
        assert_eq!(desk.complete(&running), []);
    }
    let large = execute(&desk.submit(2, 2));
    assert_eq!(large.evicted(), Some(vec![model(0), model(1)]));
    assert_eq!(desk.complete(&large), []);
    assert_eq!(desk.scheduler.model(model(1)).unwrap().evictions, 1);
}

#[test]
fn the_worker_that_finished_last_goes_on() {
    let mut desk = Desk::new(8, &[4]).at_work(2);
    let mut running = execute(&desk.submit(0, 0));
    let mut workers = vec![running.worker];
    for request in 1..4 {
        assert_eq!(desk.submit(request, 0), []);
        running = execute(&desk.complete(&running));
        workers.push(running.worker);
    }
    assert_eq!(workers, [0, 0, 0, 0].map(WorkerId), "it is awake, and the others stand by");
}

#[test]
fn the_worker_that_is_next_is_the_one_that_executes_next() {
    let mut desk = Desk::new(8, &[4]).at_work(3);
    assert_eq!(desk.scheduler.next_worker(), Some(WorkerId(0)));
    for request in 0..3 {
        let next = desk.scheduler.next_worker();
        let running = execute(&desk.submit(request, 0));
        assert_eq!(next, Some(running.worker));
        assert_eq!(desk.scheduler.next_worker(), None, "the one that executes will be, and others may sleep");
        assert_eq!(desk.complete(&running), []);
    }
    desk.lose(WorkerId(0));
    assert_eq!(desk.scheduler.next_worker(), Some(WorkerId(1)));
}

#[test]
fn requests_of_one_model_are_served_before_the_next_switch() {
    let mut desk = Desk::new(4, &[4, 4]).at_work(2);
    let first = execute(&desk.submit(0, 0));
    for (request, id) in [(1, 1), (2, 0), (3, 1), (4, 0)] {
        assert_eq!(desk.submit(request, id), [], "there is one arena, and no room to prefetch");
    }
    assert_eq!(desk.drain(first), [(0, 0), (2, 0), (4, 0), (1, 1), (3, 1)]);
}

#[test]
fn others_wait_for_a_bounded_number_of_requests() {
    let mut desk = Desk::new(4, &[4, 4]).at_work(2);
    let first = execute(&desk.submit(0, 0));
    assert_eq!(desk.submit(1, 1), []);
    for request in 2..10 {
        assert_eq!(desk.submit(request, 0), []);
    }
    // The first began while nobody else waited: three in a row after it.
    let order: Vec<_> = desk.drain(first).into_iter().map(|(request, _)| request).collect();
    assert_eq!(order, [0, 2, 3, 4, 1, 5, 6, 7, 8, 9]);
}

#[test]
fn a_turn_ends_even_if_all_older_requests_are_of_one_model() {
    let mut desk = Desk::new(4, &[4, 4]).at_work(2);
    let first = execute(&desk.submit(0, 0));
    for request in 1..6 {
        assert_eq!(desk.submit(request, 0), []);
    }
    assert_eq!(desk.submit(6, 1), []);
    assert_eq!(desk.submit(7, 1), []);
    let order: Vec<_> = desk.drain(first).into_iter().map(|(request, _)| request).collect();
    assert_eq!(order, [0, 1, 2, 3, 6, 7, 4, 5]);
}

#[test]
fn two_resident_models_do_not_starve_a_third() {
    // 0 and 1 are resident side by side, 2 needs the place of 0.
    let mut desk = Desk::new(8, &[4, 4, 4]).at_work(2);
    for id in [0, 1] {
        let running = execute(&desk.submit(u64::from(id), id));
        assert_eq!(desk.complete(&running), []);
    }
    let mut running = execute(&desk.submit(10, 0));
    assert_eq!(desk.submit(11, 2), []);
    for served in 0.. {
        assert!(served <= 3, "an older request is passed over");
        // Both resident models always have a request that waits.
        assert_eq!(desk.submit(20 + 2 * served, 0), []);
        assert_eq!(desk.submit(21 + 2 * served, 1), []);
        running = desk.complete(&running).iter().find_map(Execute::of).unwrap();
        if running.model == model(2) {
            break;
        }
    }
    assert_eq!(running.evicted(), Some(vec![model(0)]));
}

#[test]
fn who_has_waited_too_long_goes_first() {
    let mut desk = Desk::new(4, &[4, 4]).at_work(2);
    let first = execute(&desk.submit(0, 0));
    assert_eq!(desk.submit(1, 1), []);
    desk.wait(60 * MS);
    assert_eq!(desk.submit(2, 0), []);
    desk.wait(41 * MS);
    let next = execute(&desk.complete(&first));
    assert_eq!((next.request.0, next.evicted()), (1, Some(vec![model(0)])));
    assert_eq!(desk.drain(next), [(1, 1), (2, 0)]);
}

#[test]
fn turns_last_when_everybody_has_waited_too_long() {
    let mut desk = Desk::new(4, &[4, 4]).at_work(2);
    let first = execute(&desk.submit(0, 0));
    for request in 1..9 {
        assert_eq!(desk.submit(request, u32::from(request % 2 == 1)), []);
    }
    desk.wait(200 * MS);
    let models: Vec<_> = desk.drain(first).into_iter().map(|(_, id)| id).collect();
    assert_eq!(models, [0, 0, 0, 0, 1, 1, 1, 0, 1], "a switch for every request helps nobody");
}

#[test]
fn the_next_model_is_fetched_while_another_executes() {
    let mut desk = Desk::new(8, &[4, 4, 8]).at_work(2);
    let first = execute(&desk.submit(0, 0));
    assert_eq!(desk.submit(1, 1), [], "the link is busy with the first");
    let prefetched = desk.land(first.transfer);
    let [Action::Prefetch { transfer, model: fetched, load }] = &prefetched[..] else {
        panic!("{prefetched:?}")
    };
    assert_eq!((*fetched, &load.evicted), (model(1), &vec![]));
    let actions = desk.finish(first.execution, Outcome::Completed);
    assert_eq!(actions[0], ok(0));
    let second = execute(&actions[1..]);
    assert_eq!((second.model, second.evicted()), (model(1), None), "its weights are on their way");
    assert_eq!(desk.land(*transfer), []);
    assert_eq!(desk.complete(&second), []);
    assert!(desk.scheduler.is_idle());
}

#[test]
fn nothing_is_fetched_ahead_where_that_is_turned_off() {
    let mut desk = Desk::with(8, 1, &[4, 4], SchedulerOptions { prefetch: false, ..options() }).at_work(2);
    let first = execute(&desk.submit(0, 0));
    assert_eq!(desk.submit(1, 1), []);
    assert_eq!(desk.land(first.transfer), [], "there is room for it");
    let second = execute(&desk.finish(first.execution, Outcome::Completed)[1..]);
    assert_eq!((second.model, second.evicted()), (model(1), Some(vec![])), "it comes when its turn has come");
}

#[test]
fn fetching_ahead_is_turned_on_and_off_while_requests_come() {
    let mut desk = Desk::new(8, &[4, 4]).at_work(2);
    desk.scheduler.set_prefetch(false);
    let first = execute(&desk.submit(0, 0));
    assert_eq!(desk.submit(1, 1), []);
    assert_eq!(desk.land(first.transfer), [], "there is room for it");
    desk.scheduler.set_prefetch(true);
    let fetched = desk.submit(2, 1);
    assert!(matches!(fetched[..], [Action::Prefetch { model: ModelId(1), .. }]), "{fetched:?}");
}

#[test]
fn nothing_is_fetched_into_a_place_that_is_held_or_wanted() {
    // 0 | 1 side by side, 2 over both, 3 over 0 or 1.
    let mut desk = Desk::new(8, &[4, 4, 8]).at_work(2);
    let one = execute(&desk.submit(0, 1));
    assert_eq!(desk.complete(&one), []);
    let first = execute(&desk.submit(1, 0));
    assert_eq!(desk.land(first.transfer), []);
    assert_eq!(desk.submit(2, 2), [], "its place is held by the execution");
    assert_eq!(desk.submit(3, 1), [], "it is there");
    let third = desk.complete(&first);
    assert_eq!(execute(&third).model, model(1));
}

#[test]
fn nothing_is_fetched_in_the_way_of_the_oldest() {
    let mut desk = Desk::new(8, &[4, 4, 8]).at_work(2);
    let first = execute(&desk.submit(0, 0));
    assert_eq!(desk.submit(1, 2), [], "it needs the place of 0 and that of 1");
    assert_eq!(desk.submit(2, 1), []);
    assert_eq!(desk.drain(first), [(0, 0), (1, 2), (2, 1)]);
}

#[test]
fn who_was_fetched_goes_before_who_came_later() {
    // 1 has been fetched; 2, which needs its place, has waited for too long by then, as 1 has.
    let mut desk = Desk::new(8, &[4, 4, 8]).at_work(2);
    let first = execute(&desk.submit(0, 0));
    assert_eq!(desk.submit(1, 1), []);
    let prefetched = desk.land(first.transfer);
    let [Action::Prefetch { transfer, .. }] = prefetched[..] else { panic!("{prefetched:?}") };
    assert_eq!(desk.submit(2, 2), []);
    assert_eq!(desk.land(transfer), []);
    desk.wait(200 * MS);
    assert_eq!(desk.drain(first), [(0, 0), (1, 1), (2, 2)]);
}

#[test]
fn what_was_fetched_in_vain_is_evicted() {
    let mut desk = Desk::new(8, &[4, 4, 8]).at_work(2);
    let first = execute(&desk.submit(0, 0));
    assert_eq!(desk.submit(1, 1), []);
    let prefetched = desk.land(first.transfer);
    let [Action::Prefetch { transfer, .. }] = prefetched[..] else { panic!("{prefetched:?}") };
    assert_eq!(desk.submit(2, 2), []);
    assert_eq!(desk.cancel(1), [rejected(1, Rejection::Cancelled)]);
    // Its place is not free before it has landed.
    assert_eq!(desk.complete(&first), []);
    let large = execute(&desk.land(transfer));
    assert_eq!(large.evicted(), Some(vec![model(0), model(1)]));
    assert_eq!(desk.complete(&large), []);
}

#[test]
fn arenas_are_used_side_by_side() {
    let mut desk = Desk::with(8, 2, &[4, 4], options()).at_work(3);
    let first = execute(&desk.submit(0, 0));
    let second = execute(&desk.submit(1, 1));
    assert_eq!((first.arena, second.arena), (ArenaId(0), ArenaId(1)));
    assert_ne!(first.worker, second.worker);
    assert_eq!(desk.submit(2, 0), [], "no arena is free");
    assert_eq!(desk.scheduler.executing(), 2);
    let third = execute(&desk.complete(&second));
    assert_eq!((third.model, third.arena, third.evicted()), (model(0), ArenaId(1), None));
    assert_eq!(desk.complete(&third), []);
    assert_eq!(desk.complete(&first), []);
}

#[test]
fn two_executions_may_share_one_load() {
    let mut desk = Desk::with(8, 2, &[4], options()).at_work(2);
    let first = execute(&desk.submit(0, 0));
    let second = execute(&desk.submit(1, 0));
    assert_eq!((first.evicted(), second.evicted()), (Some(vec![]), None));
    assert_ne!(first.transfer, second.transfer, "each has inputs of its own");
    assert_eq!(desk.complete(&first), []);
    assert_eq!(desk.complete(&second), []);
}

#[test]
fn overlapping_executions_of_one_model_do_not_keep_another_out() {
    let mut desk = Desk::with(8, 2, &[8, 4, 4], options()).at_work(3);
    let mut running = vec![execute(&desk.submit(0, 0)), execute(&desk.submit(1, 0))];
    assert_eq!(desk.submit(2, 1), []);
    desk.wait(200 * MS);
    // There is always another request of 0, and an execution of it that began before.
    let mut began = None;
    for request in 3..7 {
        assert_eq!(desk.submit(request, 0), []);
        if running.is_empty() {
            break;
        }
        let current = running.remove(0);
        let actions = desk.complete(&current);
        running.extend(actions.iter().find_map(Execute::of));
        began = running.iter().find(|execution| execution.model == model(1)).cloned();
        if began.is_some() {
            break;
        }
    }
    let began = began.expect("1 has its turn");
    assert_eq!(began.evicted(), Some(vec![model(0)]));
}

#[test]
fn queues_are_bounded() {
    let mut desk = Desk::with(8, 1, &[4], SchedulerOptions { queue_limit: 2, ..options() }).at_work(1);
    let limits = ModelLimits { queue_limit: Some(1), ..ModelLimits::default() };
    desk.scheduler.place(model(9), UNIT_BYTES, 1, limits).unwrap();
    let first = execute(&desk.submit(0, 0));
    assert!(desk.submit(1, 9).iter().all(|action| !matches!(action, Action::Reply { .. })));
    assert_eq!(desk.submit(2, 9), [rejected(2, Rejection::QueueFull { waiting: 1, limit: 1 })]);
    assert_eq!(desk.submit(3, 0), []);
    assert_eq!(desk.submit(4, 0), [rejected(4, Rejection::QueueFull { waiting: 2, limit: 2 })]);
    assert_eq!(desk.scheduler.waiting(), 2);
    assert_eq!(desk.scheduler.model(model(9)).unwrap().waiting, 1);
    desk.complete(&first);
    assert_eq!(desk.scheduler.waiting(), 1);
}

#[test]
fn what_can_never_fit_is_refused_with_the_numbers() {
    let mut desk = Desk::new(8, &[4]).at_work(1);
    let error = desk.scheduler.place(model(1), 9 * UNIT_BYTES, 1, ModelLimits::default()).unwrap_err();
    assert!(matches!(error, PoolError::NeverFits { .. }), "{error}");
    let rejection = Rejection::NeverFits { asked_bytes: 9 * UNIT_BYTES, capacity_bytes: 8 * UNIT_BYTES };
    assert_eq!(desk.submit(0, 1), [rejected(0, rejection)]);
    assert_eq!(desk.event(Event::ModelRemoved { model: model(1) }), [Action::Forget { model: model(1) }]);
    assert_eq!(desk.submit(1, 1), [rejected(1, Rejection::UnknownModel)]);
    desk.scheduler.place(model(1), 8 * UNIT_BYTES, 1, ModelLimits::default()).unwrap();
    assert_eq!(execute(&desk.submit(2, 1)).model, model(1));
}

#[test]
fn models_come_and_go_while_others_are_served() {
    let mut desk = Desk::new(8, &[4]).at_work(2);
    let first = execute(&desk.submit(0, 0));
    assert_eq!(desk.submit(1, 0), []);
    desk.scheduler.place(model(1), 4 * UNIT_BYTES, 1, ModelLimits::default()).unwrap();
    assert_eq!(desk.submit(2, 1), []);

    // What waits for it is refused, what runs is finished; then it is forgotten.
    let removed = desk.event(Event::ModelRemoved { model: model(0) });
    assert_eq!(removed, [rejected(1, Rejection::ModelRemoved)]);
    assert_eq!(desk.submit(3, 0), [rejected(3, Rejection::ModelRemoved)]);
    assert!(matches!(desk.land(first.transfer)[..], [Action::Prefetch { .. }]));
    let actions = desk.finish(first.execution, Outcome::Completed);
    assert_eq!(actions[..2], [ok(0), Action::Forget { model: model(0) }]);
    assert_eq!(execute(&actions[2..]).model, model(1));
    assert_eq!(desk.submit(4, 0), [rejected(4, Rejection::UnknownModel)]);
    assert_eq!(desk.scheduler.model(model(0)), None);
    assert_eq!(desk.event(Event::ModelRemoved { model: model(0) }), []);
}

#[test]
fn a_model_that_moves_is_forgotten_when_it_has_landed() {
    let mut desk = Desk::new(8, &[4, 4]).at_work(2);
    let first = execute(&desk.submit(0, 0));
    assert_eq!(desk.submit(1, 1), []);
    let prefetched = desk.land(first.transfer);
    let [Action::Prefetch { transfer, .. }] = prefetched[..] else { panic!("{prefetched:?}") };
    let removed = desk.event(Event::ModelRemoved { model: model(1) });
    assert_eq!(removed, [rejected(1, Rejection::ModelRemoved)]);
    assert_eq!(desk.land(transfer), [Action::Forget { model: model(1) }]);
    assert_eq!(desk.complete(&first), []);
}

#[test]
fn draining_finishes_what_was_accepted() {
    let mut desk = Desk::new(8, &[4]).at_work(1);
    let first = execute(&desk.submit(0, 0));
    assert_eq!(desk.submit(1, 0), []);
    assert_eq!(desk.event(Event::Draining), []);
    assert_eq!(desk.submit(2, 0), [rejected(2, Rejection::Draining)]);
    let second = execute(&desk.complete(&first));
    assert!(!desk.scheduler.is_idle());
    assert_eq!(desk.complete(&second), []);
    assert!(desk.scheduler.is_idle());
}

#[test]
fn a_request_that_needs_more_room_runs_again_while_draining() {
    let mut desk = Desk::new(8, &[4]).at_work(1);
    let first = execute(&desk.submit(0, 0));
    assert_eq!(desk.event(Event::Draining), []);
    assert_eq!(desk.complete(&first), [], "it is answered, and its outputs did not fit");
    let again = Event::Resubmitted { request: first.request, model: first.model, deadline: None };
    let second = execute(&desk.event(again));
    assert_eq!(second.request, first.request);
    assert_ne!(second.execution, first.execution);
    assert_eq!(desk.complete(&second), []);
    assert!(desk.scheduler.is_idle());
}

#[test]
fn nothing_begins_without_a_worker() {
    let mut desk = Desk::new(8, &[4]);
    assert!(matches!(desk.submit(0, 0)[..], [Action::Prefetch { .. }]), "but weights may come already");
    let counts = |desk: &Desk| desk.scheduler.workers().by_name();
    assert_eq!(desk.event(Event::WorkerStarting { worker: WorkerId(0) }), []);
    assert_eq!(counts(&desk)[0], ("starting", 1));
    assert_eq!(execute(&desk.event(Event::WorkerReady { worker: WorkerId(0) })).request.0, 0);
    assert_eq!(counts(&desk)[2], ("active", 1));
}

/// Model 0 lies beside training, model 1 in its place.
#[test]
fn training_keeps_its_place_and_gives_it_away_when_it_leaves() {
    let mut desk = Desk::beside_training(8, 4, &[4, 4]).at_work(2);
    assert_eq!(desk.event(Event::TrainingAsks), [Action::AdmitTraining]);
    // It computes. Who lies in its place waits, who does not begins at once.
    assert_eq!(desk.submit(0, 1), []);
    let beside = execute(&desk.submit(1, 0));
    assert_eq!((beside.model, &beside.evicted()), (model(0), &Some(vec![])));
    assert_eq!(desk.complete(&beside), []);
    let over = execute(&desk.event(Event::TrainingLeaves));
    assert_eq!((over.model, &over.evicted()), (model(1), &Some(vec![ModelId::TRAINING])));
    // Requests go first. Then it comes back, and is admitted when it is there.
    assert_eq!(desk.event(Event::TrainingAsks), []);
    let back = desk.complete(&over);
    let [Action::BringBack { transfer, load }] = &back[..] else { panic!("{back:?}") };
    assert_eq!(load.evicted, [model(1)]);
    assert_eq!(desk.submit(2, 1), []);
    // It landed behind a request that it would be in the way of.
    let over = execute(&desk.land(*transfer));
    assert_eq!((over.model, &over.evicted()), (model(1), &Some(vec![ModelId::TRAINING])));
    desk.complete(&over);
}

#[test]
fn training_is_told_when_it_cannot_be_brought_back() {
    let mut desk = Desk::beside_training(4, 4, &[4]).at_work(1);
    let over = execute(&desk.submit(0, 0));
    assert_eq!(desk.complete(&over), []);
    for _ in 0..2 {
        let back = desk.event(Event::TrainingAsks);
        let [Action::BringBack { transfer, .. }] = &back[..] else { panic!("{back:?}") };
        assert!(desk.fail(*transfer).contains(&Action::RefuseTraining));
    }
}

#[test]
fn held_requests_let_training_in() {
    let mut desk = Desk::beside_training(4, 4, &[4]).at_work(2);
    let over = execute(&desk.submit(0, 0));
    desk.submit(1, 0);
    assert_eq!(desk.event(Event::Hold), []);
    assert_eq!(desk.event(Event::TrainingAsks), []);
    let back = desk.complete(&over);
    let [Action::BringBack { transfer, .. }] = &back[..] else { panic!("{back:?}") };
    assert_eq!(desk.land(*transfer), [Action::AdmitTraining]);
    assert_eq!(desk.event(Event::Release), []);
    execute(&desk.event(Event::TrainingLeaves));
}
