//! Random histories: whatever happens, in whatever order, the judge of [`World`] is content with every action, and when
//! nothing more goes wrong everything comes to an end.

use std::time::Duration;

use proptest::collection::vec;
use proptest::prelude::*;

use pswitch_controller::scheduler::{Homes, SchedulerOptions};

use crate::world::World;

#[derive(Debug, Clone, Copy)]
enum Step {
    Submit { model: usize, deadline_ms: Option<u64> },
    Cancel(usize),
    WorkerReady(usize),
    Work(usize),
    Raise(usize),
    EndWith(usize),
    Echo(usize),
    Crash(usize),
    Hang(usize),
    Reap(usize),
    Transfer(usize),
    BreakTransfer,
    Deliver,
    Advance { ms: u64 },
    Tick,
    PlaceModel { units: u64 },
    RemoveModel(usize),
    Hold(bool),
    Train(bool),
    Drain,
    Homes(Homes),
}

#[derive(Debug, Clone)]
struct Setting {
    home_units: u64,
    arenas: u64,
    training_units: u64,
    workers: u32,
    model_units: Vec<u64>,
    options: SchedulerOptions,
}

fn homes() -> impl Strategy<Value = Homes> {
    prop_oneof![Just(Homes::Fixed), Just(Homes::LeastRecentlyUsed)]
}

fn settings() -> impl Strategy<Value = Setting> {
    let options = (1..6_u32, 0..300_u64, 1..30_usize, 1..4_u32, homes()).prop_map(
        |(in_a_row, wait, queue, attempts, homes)| SchedulerOptions {
            max_consecutive: in_a_row,
            max_wait: Duration::from_millis(wait),
            queue_limit: queue,
            execution_timeout: Duration::from_millis(400),
            stop_grace: Duration::from_millis(50),
            attempts,
            prefetch: true,
            homes,
        },
    );
    let model_units = vec(1..14_u64, 1..7);
    (6..13_u64, 1..4_u64, 0..7_u64, 1..5_u32, model_units, options).prop_map(
        |(home_units, arenas, training_units, workers, model_units, options)| Setting {
            home_units,
            arenas,
            training_units,
            workers,
            model_units,
            options,
        },
    )
}

/// What happens while nothing goes wrong.
fn healthy() -> BoxedStrategy<Step> {
    prop_oneof![
        8 => (0..8_usize).prop_map(|model| Step::Submit { model, deadline_ms: None }),
        2 => any::<usize>().prop_map(Step::WorkerReady),
        8 => any::<usize>().prop_map(Step::Work),
        6 => any::<usize>().prop_map(Step::Transfer),
        4 => Just(Step::Deliver),
        2 => (0..60_u64).prop_map(|ms| Step::Advance { ms }),
        2 => any::<bool>().prop_map(Step::Hold),
        4 => any::<bool>().prop_map(Step::Train),
        1 => homes().prop_map(Step::Homes),
    ]
    .boxed()
}

fn anything() -> BoxedStrategy<Step> {
    prop_oneof![
        20 => healthy(),
        3 => (0..8_usize, 0..500_u64)
            .prop_map(|(model, ms)| Step::Submit { model, deadline_ms: Some(ms) }),
        2 => any::<usize>().prop_map(Step::Cancel),
        1 => any::<usize>().prop_map(Step::Raise),
        1 => any::<usize>().prop_map(Step::EndWith),
        1 => any::<usize>().prop_map(Step::Echo),
        1 => any::<usize>().prop_map(Step::Crash),
        1 => any::<usize>().prop_map(Step::Hang),
        3 => any::<usize>().prop_map(Step::Reap),
        1 => Just(Step::BreakTransfer),
        1 => Just(Step::Tick),
        1 => (1..14_u64).prop_map(|units| Step::PlaceModel { units }),
        1 => any::<usize>().prop_map(Step::RemoveModel),
    ]
    .boxed()
}

fn begin(setting: &Setting) -> World {
    let Setting { home_units, arenas, training_units, workers, .. } = *setting;
    let mut world = World::new(home_units, arenas, training_units, workers, setting.options.clone());
    for units in &setting.model_units {
        world.place_model(*units);
    }
    world
}

fn take(world: &mut World, step: Step) {
    match step {
        Step::Submit { model, deadline_ms } => world.submit(model, deadline_ms.map(Duration::from_millis)),
        Step::Cancel(nth) => world.cancel(nth),
        Step::WorkerReady(nth) => world.worker_ready(nth),
        Step::Work(nth) => world.work(nth),
        Step::Raise(nth) => world.raise(nth),
        Step::EndWith(nth) => world.end_with(nth),
        Step::Echo(nth) => world.echo(nth),
        Step::Crash(nth) => world.crash(nth),
        Step::Hang(nth) => world.hang(nth),
        Step::Reap(nth) => world.reap(nth),
        Step::Transfer(nth) => world.transfer(nth),
        Step::BreakTransfer => world.break_transfer(),
        Step::Deliver => world.deliver(),
        Step::Advance { ms } => world.advance(Duration::from_millis(ms)),
        Step::Tick => world.tick(),
        Step::PlaceModel { units } => world.place_model(units),
        Step::RemoveModel(nth) => world.remove_model(nth),
        Step::Hold(held) => world.hold(held),
        Step::Train(trains) => world.train(trains),
        Step::Drain => world.drain(),
        Step::Homes(homes) => world.set_homes(homes),
    }
}

proptest! {
    /// Whatever goes wrong.
    #[test]
    fn every_request_is_answered_once(
        setting in settings(),
        steps in vec(anything(), 1..250),
        drain_at in proptest::option::of(0..250_usize),
    ) {
        let mut world = begin(&setting);
        for (index, step) in steps.into_iter().enumerate() {
            if Some(index) == drain_at {
                take(&mut world, Step::Drain);
            }
            take(&mut world, step);
        }
        world.settle();
    }

    /// If nothing goes wrong, and the queue has room, every request of a model that fits is served.
    #[test]
    fn every_request_is_served_by_healthy_workers(
        mut setting in settings(),
        steps in vec(healthy(), 1..250),
    ) {
        setting.options.queue_limit = 1000;
        setting.options.execution_timeout = Duration::from_secs(3600);
        setting.model_units.retain(|units| *units <= setting.home_units);
        let mut world = begin(&setting);
        for step in steps {
            let step = match step {
                Step::Submit { model, .. } if setting.model_units.is_empty() => Step::Work(model),
                Step::Submit { model, deadline_ms } => {
                    Step::Submit { model: model % setting.model_units.len(), deadline_ms }
                }
                step => step,
            };
            take(&mut world, step);
        }
        world.settle();
        prop_assert!(world.answers().all(Result::is_ok));
    }
}

/// What was fetched ahead of its turn is there then, and in the way of nobody who waits.
#[test]
fn what_has_been_fetched_begins_at_once_if_it_can() {
    let ms = Duration::from_millis;
    let setting = Setting {
        home_units: 7,
        arenas: 1,
        training_units: 5,
        workers: 2,
        model_units: vec![1, 1, 3, 1, 1, 1],
        options: SchedulerOptions {
            max_consecutive: 1,
            max_wait: Duration::ZERO,
            queue_limit: 3,
            execution_timeout: ms(400),
            stop_grace: ms(50),
            attempts: 1,
            prefetch: true,
            homes: Homes::LeastRecentlyUsed,
        },
    };
    let submit = |model: usize| Step::Submit { model, deadline_ms: None };
    let mut world = begin(&setting);
    for step in [
        Step::Hold(true),
        submit(5),
        Step::Submit { model: 5, deadline_ms: Some(1) },
        Step::WorkerReady(0),
        Step::RemoveModel(0),
        submit(2),
        Step::Train(true),
        Step::Hold(false),
        Step::EndWith(0),
        Step::BreakTransfer,
        Step::WorkerReady(0),
        Step::Reap(0),
        Step::Deliver,
    ] {
        take(&mut world, step);
    }
    world.settle();
}
