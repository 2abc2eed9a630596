//! Where models go that move in, if they go where those lie that were used longest ago.

use pswitch_controller::scheduler::{Action, Event, Homes, Outcome, SchedulerOptions};
use pswitch_mem_pool::ModelId;

use crate::desk::{Desk, Execute, execute, model, ok, options};

/// As many units for homes, and models of these sizes, which were used in this order.
fn desk(home_units: u64, arenas: u64, model_units: &[u64], used: &[u32]) -> Desk {
    let options = SchedulerOptions { homes: Homes::LeastRecentlyUsed, ..options() };
    let mut desk = Desk::with(home_units, arenas, model_units, options).at_work(2);
    for (request, id) in (100..).zip(used) {
        assert_eq!(use_once(&mut desk, request, *id).evicted().unwrap_or_default(), []);
    }
    desk
}

/// Serves one request from its begin to its end.
#[track_caller]
fn use_once(desk: &mut Desk, request: u64, id: u32) -> Execute {
    let running = execute(&desk.submit(request, id));
    assert_eq!(desk.complete(&running), []);
    running
}

fn fix_homes(desk: &mut Desk) -> Vec<Action> {
    desk.event(Event::Homes { homes: Homes::Fixed })
}

#[test]
fn who_was_used_longest_ago_makes_room() {
    for (used, evicted, place) in [([0, 1], 0, 0), ([1, 0], 1, 4)] {
        let mut desk = desk(8, 1, &[4, 4, 4], &[0, 1]);
        for (request, id) in (0..).zip(used) {
            assert_eq!(use_once(&mut desk, request, id).evicted(), None, "both have room");
        }
        let third = use_once(&mut desk, 2, 2);
        assert_eq!((third.evicted(), third.place()), (Some(vec![model(evicted)]), place));
        // The other is the older one now, and makes room for the first.
        let back = use_once(&mut desk, 3, evicted);
        assert_eq!((back.evicted(), back.place()), (Some(vec![model(1 - evicted)]), 4 - place));
    }
}

#[test]
fn whose_going_does_not_help_stays() {
    // 0 of 2 units at 0, 1 of 4 at 2, 2 of 6 at 6.
    let mut desk = desk(12, 1, &[2, 4, 6, 6], &[0, 1, 2]);
    use_once(&mut desk, 0, 1);
    let large = use_once(&mut desk, 1, 3);
    assert_eq!((large.evicted(), large.place()), (Some(vec![model(2)]), 6));
    assert_eq!(use_once(&mut desk, 2, 0).evicted(), None, "it was older, and lies elsewhere");
}

#[test]
fn the_first_gap_is_taken_and_nobody_goes_for_it() {
    let mut desk = desk(12, 1, &[4, 4, 2, 2, 4], &[0, 1, 2]);
    // In the place of 0, which is longer.
    let shorter = use_once(&mut desk, 0, 4);
    assert_eq!((shorter.evicted(), shorter.place()), (Some(vec![model(0)]), 0));
    let beside = use_once(&mut desk, 1, 3);
    assert_eq!((beside.evicted(), beside.place()), (Some(vec![]), 10));
}

#[test]
fn who_is_used_now_stays() {
    let mut desk = desk(8, 2, &[4, 4, 4], &[0, 1]);
    let oldest = execute(&desk.submit(0, 0));
    desk.land(oldest.transfer);
    let third = execute(&desk.submit(1, 2));
    assert_eq!((third.evicted(), third.place()), (Some(vec![model(1)]), 4));
}

#[test]
fn who_was_evicted_comes_back_when_its_doorbells_are_clear() {
    let mut desk = desk(8, 2, &[4, 4, 4], &[0, 1]);
    let third = execute(&desk.submit(0, 2));
    assert_eq!(third.evicted(), Some(vec![model(0)]));
    assert_eq!(desk.submit(1, 0), [], "the transfer that clears them is under way, though 1 could go");
    let back = execute(&desk.land(third.transfer));
    assert_eq!((back.model, back.evicted()), (model(0), Some(vec![model(1)])));

    // One that fails clears them when nobody waits for it any more.
    let mut desk = self::desk(8, 2, &[4, 4, 4], &[0, 1]);
    let third = execute(&desk.submit(0, 2));
    assert_eq!(desk.submit(1, 0), []);
    assert_eq!(
        desk.fail(third.transfer),
        [Action::Poison { model: model(2) }, Action::PoisonInputs { execution: third.execution }]
    );
    let actions = desk.finish(third.execution, Outcome::Stopped);
    let clear = Action::Clear { models: vec![model(0), model(2)] };
    assert!(actions.contains(&clear), "{actions:?}");
    let back = actions.iter().find_map(Execute::of).unwrap();
    assert_eq!((back.model, back.evicted(), back.place()), (model(0), Some(vec![]), 0));
}

#[test]
fn only_the_oldest_is_fetched_ahead_and_drives_nobody_out_who_is_wanted() {
    let mut desk = desk(8, 1, &[4, 4, 4, 4], &[0, 1]);
    let running = execute(&desk.submit(0, 1));
    for (request, id) in [(1, 0), (2, 2), (3, 3)] {
        assert_eq!(desk.submit(request, id), []);
    }
    assert_eq!(desk.land(running.transfer), [], "0 is wanted, and 1 is used");
    assert_eq!(desk.cancel(1).len(), 2, "0 may go now");
    let fetched = desk.scheduler.ledger().state(model(2)).unwrap();
    assert_eq!(fetched.to_string(), "moving");
}

#[test]
fn who_lies_elsewhere_goes_home_when_homes_are_fixed_again() {
    // 2 has its home over that of 0.
    let mut desk = desk(8, 1, &[4, 4, 4], &[0, 1, 0]);
    let away = use_once(&mut desk, 0, 2);
    assert_eq!((away.evicted(), away.place()), (Some(vec![model(1)]), 4));
    assert_eq!(fix_homes(&mut desk), [Action::Clear { models: vec![model(2)] }]);
    let counts = desk.scheduler.model(model(2)).unwrap();
    assert_eq!((counts.present, counts.loads, counts.evictions), (false, 1, 1));
    assert!(desk.scheduler.model(model(0)).unwrap().present, "it was at home");
    let home = use_once(&mut desk, 1, 2);
    assert_eq!((home.evicted(), home.place()), (Some(vec![model(0)]), 0));
    assert_eq!(use_once(&mut desk, 2, 1).place(), 4);
}

#[test]
fn who_is_used_elsewhere_goes_home_afterwards() {
    let mut desk = desk(8, 1, &[4, 4, 4], &[0, 1, 0]);
    let away = execute(&desk.submit(0, 2));
    assert_eq!(away.place(), 4);
    assert_eq!(fix_homes(&mut desk), []);
    assert_eq!(desk.submit(1, 1), [], "there is one arena");
    assert_eq!(desk.land(away.transfer), []);
    let mut actions = desk.finish(away.execution, Outcome::Completed);
    let next = execute(&actions.split_off(2));
    assert_eq!(actions, [ok(0), Action::Clear { models: vec![model(2)] }]);
    assert_eq!((next.model, next.evicted(), next.place()), (model(1), Some(vec![]), 4));
}

#[test]
fn training_makes_room_in_its_turn_and_comes_back_to_its_place() {
    let options = SchedulerOptions { homes: Homes::LeastRecentlyUsed, ..options() };
    let mut desk = Desk::beside_training_with(8, 4, &[4, 4], options).at_work(2);
    assert_eq!(use_once(&mut desk, 0, 0).place(), 4);
    // Training has never been used.
    let over = use_once(&mut desk, 1, 1);
    assert_eq!((over.evicted(), over.place()), (Some(vec![ModelId::TRAINING]), 0));
    let back = desk.event(Event::TrainingAsks);
    let [Action::BringBack { transfer, load }] = &back[..] else { panic!("{back:?}") };
    assert_eq!(load.evicted, [model(1)]);
    assert_eq!(desk.land(*transfer), [Action::AdmitTraining]);
    desk.event(Event::TrainingLeaves);
    // It was used last.
    let other = use_once(&mut desk, 2, 1);
    assert_eq!((other.evicted(), other.place()), (Some(vec![model(0)]), 4));
}
