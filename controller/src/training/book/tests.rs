use proptest::prelude::*;

use super::*;

/// What a worker does, as a test plays it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Worker {
    None,
    Starting,
    Attached,
    Preparing,
    Idle,
    Training,
    Holding,
    Held,
    Stopping,
    Ending,
    /// It copies its state.
    Saving,
    /// It writes what it has copied.
    Writing,
    /// The same when all its steps are done: until it is there.
    WritingLast,
}

/// Tasks with workers that do as they are told, in their own time.
struct World {
    book: Book,
    closed: bool,
    away: bool,
    at: Duration,
    workers: BTreeMap<TaskId, Worker>,
    ended: BTreeMap<TaskId, bool>,
    /// Steps that count, and steps of the last checkpoint.
    done: BTreeMap<TaskId, (u64, u64)>,
    trained: BTreeMap<TaskId, Duration>,
}

const STEPS: u64 = 12;
const STEP: Duration = Duration::from_millis(400);

impl World {
    /// Tasks whose steps end for requests.
    fn new(weights: &[f64]) -> Self {
        Self::with(weights, false)
    }

    fn with(weights: &[f64], holds: bool) -> Self {
        let mut world = Self {
            book: Book::new(holds),
            closed: false,
            away: false,
            at: Duration::ZERO,
            workers: BTreeMap::new(),
            ended: BTreeMap::new(),
            done: BTreeMap::new(),
            trained: BTreeMap::new(),
        };
        for (number, &weight) in (0..).zip(weights) {
            let id = TaskId(number);
            world.workers.insert(id, Worker::None);
            world.ended.insert(id, false);
            world.done.insert(id, (0, 0));
            world.trained.insert(id, Duration::ZERO);
            world.book.submit(id, weight, number % 2 == 0, world.at);
        }
        let actions = world.book.set_closed(false, world.at);
        world.perform(actions);
        world
    }

    fn computing(&self) -> usize {
        let computes =
            |worker: &&Worker| matches!(worker, Worker::Training | Worker::Holding | Worker::Stopping);
        self.workers.values().filter(computes).count()
    }

    /// Workers that have something in an arena.
    fn under_way(&self) -> usize {
        let keeps = |worker: &&Worker| matches!(worker, Worker::Held | Worker::Ending);
        self.computing() + self.workers.values().filter(keeps).count()
    }

    fn perform(&mut self, actions: Vec<TaskAction>) {
        for action in actions {
            match action {
                TaskAction::Start(id) => {
                    assert_eq!(self.workers[&id], Worker::None, "{action:?}");
                    self.workers.insert(id, Worker::Starting);
                }
                TaskAction::Prepare(id) => {
                    assert!(!self.away, "models may lie in its place");
                    assert_eq!((self.workers[&id], self.under_way()), (Worker::Attached, 0), "{action:?}");
                    self.workers.insert(id, Worker::Preparing);
                }
                TaskAction::Train(id) => {
                    assert_eq!((self.workers[&id], self.under_way()), (Worker::Idle, 0), "{action:?}");
                    assert!(!self.closed && !self.away, "nobody trains while others have the device");
                    self.workers.insert(id, Worker::Training);
                }
                TaskAction::Hold(id) => {
                    assert_eq!((self.workers[&id], self.closed), (Worker::Training, true), "{action:?}");
                    self.workers.insert(id, Worker::Holding);
                }
                TaskAction::Resume(id) => {
                    assert!(matches!(self.workers[&id], Worker::Holding | Worker::Held), "{action:?}");
                    assert!(!self.closed, "nobody trains while others have the device");
                    self.workers.insert(id, Worker::Training);
                }
                TaskAction::Interrupt(id) => {
                    let worker = self.workers[&id];
                    assert!(
                        matches!(worker, Worker::Training | Worker::Holding | Worker::Held),
                        "{action:?} of {worker:?}"
                    );
                    self.workers.insert(id, Worker::Stopping);
                }
                TaskAction::Save(id) => {
                    assert!(!self.away, "models may lie in its place");
                    assert_eq!(self.workers[&id], Worker::Idle, "{action:?}");
                    self.workers.insert(id, Worker::Saving);
                }
                TaskAction::End(id) => {
                    assert!(!std::mem::replace(self.ended.get_mut(&id).unwrap(), true), "{id:?} ends twice");
                    let worker = self.workers.insert(id, Worker::None);
                    let (touches, is_there) = match worker {
                        Some(Worker::Preparing | Worker::Saving) => (true, true),
                        worker => (false, worker != Some(Worker::None)),
                    };
                    // Until it is gone.
                    assert!(!is_there || self.book.leaves_its_place_alone(id) != touches, "{worker:?}");
                }
            }
        }
    }

    fn feed(&mut self, id: TaskId, event: TaskEvent) {
        let actions = self.book.handle(id, event, self.at);
        self.perform(actions);
    }

    fn close(&mut self, closed: bool) {
        self.closed = closed;
        self.look();
    }

    /// Models may lie where states do, or not.
    fn leave(&mut self, away: bool) {
        self.away = away;
        self.book.note_away(away);
        self.look();
    }

    fn look(&mut self) {
        let closed = self.closed;
        let actions = self.book.set_closed(closed, self.at);
        self.perform(actions);
    }

    /// The next that a worker does by itself; `whole` says whether a step is finished before it stops.
    fn advance(&mut self, id: TaskId, whole: bool) {
        self.at += STEP;
        let (done, saved) = self.done[&id];
        match self.workers[&id] {
            Worker::None | Worker::Attached | Worker::Idle | Worker::Held => {}
            Worker::Starting => {
                self.workers.insert(id, Worker::Attached);
                self.feed(id, TaskEvent::Attached);
            }
            Worker::Preparing => {
                self.workers.insert(id, Worker::Idle);
                self.done.insert(id, (saved, saved));
                self.feed(id, TaskEvent::Ready(Ok(TaskExtent { steps_done: saved, total_steps: STEPS })));
            }
            Worker::Stopping if !whole => {
                self.workers.insert(id, Worker::Ending);
                self.feed(id, TaskEvent::Left);
                assert!(self.book.leaves_its_place_alone(id));
            }
            Worker::Ending => {
                self.workers.insert(id, Worker::Idle);
                self.feed(
                    id,
                    TaskEvent::Paused(TaskPause::Stopped { discarded_ns: Some(1_000_000), at_ns: 0 }),
                );
            }
            Worker::Holding if !whole => {
                self.workers.insert(id, Worker::Held);
                self.feed(id, TaskEvent::Held);
            }
            Worker::Training | Worker::Holding | Worker::Stopping if done == STEPS => {
                let writes = id.0.is_multiple_of(2) && saved < done;
                if writes && !whole {
                    // It is there before the worker comes to say that it has finished.
                    self.save(id);
                }
                let then = if writes && whole { Worker::WritingLast } else { Worker::Idle };
                self.workers.insert(id, then);
                self.feed(id, TaskEvent::Paused(TaskPause::Finished));
            }
            Worker::Training | Worker::Holding | Worker::Stopping => {
                self.done.insert(id, (done + 1, saved));
                *self.trained.get_mut(&id).unwrap() += STEP;
                let took_ns = u64::try_from(STEP.as_nanos()).unwrap();
                self.feed(
                    id,
                    TaskEvent::Step(TaskStep {
                        step: done,
                        loss: 1.0,
                        rate: 0.1,
                        samples: 4,
                        took_ns,
                        peak_bytes: 0,
                    }),
                );
            }
            Worker::Saving => {
                // One that was under way is told of first.
                if done > 0 {
                    self.feed(id, TaskEvent::Saved { step: done - 1, written: true });
                }
                assert!(!self.book.leaves_its_place_alone(id));
                if !whole {
                    // An earlier one of the same step could not be written: it is copied once more.
                    self.feed(id, TaskEvent::Saved { step: done, written: false });
                    assert!(!self.book.leaves_its_place_alone(id));
                }
                self.workers.insert(id, Worker::Writing);
                self.feed(id, TaskEvent::Copied);
                assert!(self.book.leaves_its_place_alone(id));
            }
            Worker::Writing if whole => self.save(id),
            Worker::Writing => {
                self.workers.insert(id, Worker::Idle);
                self.feed(id, TaskEvent::Saved { step: done, written: false });
            }
            Worker::WritingLast if whole => self.save(id),
            Worker::WritingLast => self.feed(id, TaskEvent::Saved { step: done, written: false }),
        }
    }

    /// A checkpoint is there.
    fn save(&mut self, id: TaskId) {
        let (done, _) = self.done[&id];
        self.done.insert(id, (done, done));
        self.feed(id, TaskEvent::Saved { step: done, written: true });
    }

    /// The step of a worker that was told to end it ends.
    fn end_step(&mut self, id: TaskId) {
        self.advance(id, false);
        assert_eq!((self.workers[&id], self.under_way()), (Worker::Ending, 1));
        self.advance(id, false);
    }

    /// A worker attaches, and prepares the task.
    fn come_up(&mut self, id: TaskId) {
        self.advance(id, true);
        self.advance(id, true);
    }

    /// Its worker is gone; `silent` says whether it has written a checkpoint that it did not come to tell of.
    fn lose(&mut self, id: TaskId, silent: bool) {
        if self.workers[&id] == Worker::None {
            return;
        }
        self.workers.insert(id, Worker::None);
        let (done, saved) = self.done[&id];
        let saved = if silent { done } else { saved };
        self.done.insert(id, (saved, saved));
        self.feed(id, TaskEvent::Lost("signal 9".to_owned()));
    }

    /// Its step fails, if it computes one.
    fn fail(&mut self, id: TaskId, is_sound: bool) {
        if matches!(self.workers[&id], Worker::Training | Worker::Holding | Worker::Stopping) {
            self.workers.insert(id, Worker::Idle);
            let reason = "the loss is NaN".to_owned();
            self.feed(id, TaskEvent::Paused(TaskPause::Failed { reason, is_sound }));
        }
    }

    fn state(&self, id: TaskId) -> TaskState {
        self.book.view(id, self.at).unwrap().state
    }
}

#[derive(Debug, Clone)]
enum Happening {
    Close(bool),
    /// A worker has stood still for requests that are over by now.
    HeldLate(u32),
    /// A worker does not say that it stands still.
    Stuck(u32),
    Leave(bool),
    Advance(u32, bool),
    Lose(u32, bool),
    /// A step fails; whether its state is as before it.
    Fail(u32, bool),
    Command(u32, TaskCommand),
}

fn happening() -> impl Strategy<Value = Happening> {
    let command = prop_oneof![4 => Just(TaskCommand::Pause), 4 => Just(TaskCommand::Resume), 1 => Just(TaskCommand::Stop), 1 => Just(TaskCommand::Discard)];
    prop_oneof![
        3 => any::<bool>().prop_map(Happening::Close),
        1 => (0..3_u32).prop_map(Happening::HeldLate),
        1 => (0..3_u32).prop_map(Happening::Stuck),
        3 => any::<bool>().prop_map(Happening::Leave),
        12 => (0..3_u32, any::<bool>()).prop_map(|(task, whole)| Happening::Advance(task, whole)),
        1 => (0..3_u32, any::<bool>()).prop_map(|(task, silent)| Happening::Lose(task, silent)),
        1 => (0..3_u32, any::<bool>()).prop_map(|(task, is_sound)| Happening::Fail(task, is_sound)),
        2 => (0..3_u32, command).prop_map(|(task, command)| Happening::Command(task, command)),
    ]
}

proptest! {
    /// Whatever happens: one at a time, none beside requests; and in the end everything is over.
    #[test]
    fn tasks_take_turns_and_come_to_an_end(
        holds in any::<bool>(),
        happenings in prop::collection::vec(happening(), 0..200),
    ) {
        let mut world = World::with(&[1.0, 2.0, 1.0], holds);
        for happening in happenings {
            match happening {
                Happening::Close(closed) => world.close(closed),
                Happening::HeldLate(task) => {
                    if matches!(world.workers[&TaskId(task)], Worker::Training | Worker::Holding) {
                        world.feed(TaskId(task), TaskEvent::Held);
                    }
                }
                Happening::Stuck(task) => {
                    if world.book.could_end(TaskId(task)) {
                        world.feed(TaskId(task), TaskEvent::Stuck);
                        prop_assert_eq!(world.workers[&TaskId(task)], Worker::Stopping);
                    }
                }
                // Where they hold, no model comes into their places.
                Happening::Leave(away) => world.leave(away && !holds),
                Happening::Advance(task, whole) => world.advance(TaskId(task), whole),
                Happening::Lose(task, silent) => world.lose(TaskId(task), silent),
                Happening::Fail(task, is_sound) => world.fail(TaskId(task), is_sound),
                Happening::Command(task, command) => world.feed(TaskId(task), TaskEvent::Command(command)),
            }
            prop_assert!(world.under_way() <= 1);
            prop_assert!(!world.closed || !world.workers.values().any(|worker| *worker == Worker::Training));
            for id in (0..3).map(TaskId) {
                let (view, worker) = (world.book.view(id, world.at).unwrap(), world.workers[&id]);
                prop_assert_eq!(view.state.is_over(), world.ended[&id], "{:?}", id);
                prop_assert_eq!(view.state == TaskState::Training, worker == Worker::Training, "{:?}", id);
                prop_assert!(view.extent.steps_done <= STEPS);
                prop_assert_eq!(view.progress.steps_done, view.extent.steps_done, "{:?}", id);
            }
        }
        world.leave(false);
        world.close(false);
        for id in (0..3).map(TaskId) {
            world.feed(id, TaskEvent::Command(TaskCommand::Resume));
        }
        for round in 0..1000_u32 {
            world.advance(TaskId(round % 3), true);
        }
        for id in (0..3).map(TaskId) {
            let view = world.book.view(id, world.at).unwrap();
            prop_assert!(view.state.is_over(), "{:?}: {:?}", id, view);
            if view.state == TaskState::Finished {
                prop_assert_eq!(view.extent.steps_done, STEPS);
            }
        }
    }
}

fn alone() -> (World, TaskId) {
    let mut world = World::new(&[1.0]);
    world.come_up(TaskId(0));
    assert_eq!(world.state(TaskId(0)), TaskState::Training);
    (world, TaskId(0))
}

#[test]
fn it_gives_way_to_requests_and_goes_on_behind_them() {
    let (mut world, task) = alone();
    world.advance(task, true);
    world.close(true);
    assert!(world.state(task) == TaskState::Waiting && world.book.gives_way(task));
    world.end_step(task);
    world.at += Duration::from_secs(1);
    assert_eq!(world.workers[&task], Worker::Idle);
    world.close(false);
    assert_eq!(world.state(task), TaskState::Training);
    let report = world.book.view(task, world.at).unwrap().progress;
    assert_eq!((report.interruptions, report.steps_done, report.steps_computed), (1, 1, 2));
    assert_eq!(report.paused_us, 1_000_000);
}

#[test]
fn one_that_stands_still_for_requests_loses_nothing() {
    let mut world = World::with(&[1.0], true);
    let task = TaskId(0);
    world.come_up(task);
    world.advance(task, true);
    world.close(true);
    assert_eq!((world.workers[&task], world.state(task)), (Worker::Holding, TaskState::Waiting));
    world.advance(task, false);
    assert!(!world.book.leaves_its_place_alone(task), "its step is under way");
    world.at += Duration::from_secs(1);
    world.close(false);
    assert_eq!((world.workers[&task], world.state(task)), (Worker::Training, TaskState::Training));
    world.advance(task, true);
    let report = world.book.view(task, world.at).unwrap().progress;
    assert_eq!((report.interruptions, report.steps_done, report.steps_computed), (1, 2, 2));
    assert_eq!((report.paused_us, report.goodput), (1_000_000, Some(1.0)));
    // If it ends while it stands still, that is for nobody who waits.
    world.close(true);
    assert!(world.book.gives_way(task));
    world.advance(task, false);
    assert!(!world.book.gives_way(task));
    world.feed(task, TaskEvent::Command(TaskCommand::Pause));
    assert!(world.workers[&task] == Worker::Stopping && !world.book.gives_way(task));
    world.end_step(task);
}

#[test]
fn a_turn_ends_between_steps_though_requests_were_there_for_longer() {
    let mut world = World::with(&[1.0, 1.0], true);
    let (one, other) = (TaskId(0), TaskId(1));
    world.come_up(one);
    world.come_up(other);
    for _ in 0..4 {
        world.advance(other, true);
        world.advance(one, true);
    }
    for _ in 0..30 {
        // Whoever is under way is held for longer than a turn, and then has time for a step.
        world.close(true);
        for id in [one, other] {
            if world.workers[&id] == Worker::Holding {
                world.advance(id, false);
            }
        }
        world.at += TURN * 2;
        world.close(false);
        for id in [one, other] {
            world.advance(id, world.workers[&id] == Worker::Training);
        }
    }
    for id in [one, other] {
        assert!(world.done[&id].0 > 3, "{id:?}: {:?}", world.done);
    }
}

#[test]
fn one_may_stand_still_before_the_book_has_looked_at_the_gate() {
    let mut world = World::with(&[1.0], true);
    let task = TaskId(0);
    world.come_up(task);
    world.closed = true;
    world.book.note_closed(true);
    world.workers.insert(task, Worker::Held);
    world.feed(task, TaskEvent::Held);
    world.look();
    assert_eq!((world.state(task), world.book.could_end(task)), (TaskState::Waiting, false));
    world.close(false);
    assert_eq!((world.state(task), world.workers[&task]), (TaskState::Training, Worker::Training));
    assert_eq!(world.book.view(task, world.at).unwrap().progress.interruptions, 1);
}

#[test]
fn one_that_stands_still_ends_its_step_for_another_that_is_to_be_prepared() {
    let mut world = World::with(&[1.0, 1.0], true);
    let (one, other) = (TaskId(0), TaskId(1));
    world.come_up(one);
    world.close(true);
    world.advance(one, false);
    assert_eq!(world.workers[&one], Worker::Held);
    world.advance(other, true);
    assert_eq!((world.workers[&one], world.workers[&other]), (Worker::Stopping, Worker::Attached));
    world.end_step(one);
    assert_eq!((world.workers[&one], world.workers[&other]), (Worker::Idle, Worker::Preparing));
    let report = world.book.view(one, world.at).unwrap().progress;
    assert_eq!((report.steps_done, report.steps_computed, report.interruptions), (0, 1, 2));
}

#[test]
fn nothing_is_done_with_a_state_where_models_may_lie() {
    let mut world = World::new(&[1.0]);
    let task = TaskId(0);
    world.leave(true);
    world.advance(task, true);
    // A worker is there, and waits for the state's place.
    assert_eq!((world.workers[&task], world.book.wants_places()), (Worker::Attached, true));
    assert!(world.book.leaves_its_place_alone(task));
    world.leave(false);
    assert!(world.workers[&task] == Worker::Preparing && !world.book.leaves_its_place_alone(task));
    world.leave(true);
    world.advance(task, true);
    assert_eq!((world.state(task), world.book.wants_places()), (TaskState::Waiting, true));
    world.feed(task, TaskEvent::Command(TaskCommand::Pause));
    assert!(!world.book.wants_places() && world.book.leaves_its_place_alone(task));
    world.feed(task, TaskEvent::Command(TaskCommand::Stop));
    assert!(world.book.wants_places() && world.book.demand().0);
    world.leave(false);
    assert_eq!(world.workers[&task], Worker::Saving);
    assert!(!world.book.leaves_its_place_alone(task));
    world.advance(task, true);
    // It is copied, and a disk may take its time.
    assert_eq!((world.state(task), world.book.wants_places()), (TaskState::Paused, false));
    assert!(world.book.leaves_its_place_alone(task));
    world.leave(true);
    world.advance(task, true);
    assert_eq!((world.state(task), world.book.wants_places()), (TaskState::Stopped, false));
}

#[test]
fn nobody_waits_for_a_last_checkpoint_but_its_task() {
    let mut world = World::new(&[1.0, 1.0]);
    let (one, other) = (TaskId(0), TaskId(1));
    world.come_up(one);
    while world.workers[&one] != Worker::WritingLast {
        world.advance(one, true);
    }
    // The disk is full.
    world.advance(one, false);
    assert_eq!(world.state(one), TaskState::Waiting);
    world.come_up(other);
    for done in 1..3 {
        world.advance(other, true);
        assert_eq!(world.done[&other].0, done);
        world.advance(one, false);
    }
    // To be told to stop changes nothing of that.
    world.feed(one, TaskEvent::Command(TaskCommand::Stop));
    assert!(world.book.is_stopping(one));
    world.advance(one, false);
    assert_eq!((world.state(one), world.book.is_stopping(one)), (TaskState::Waiting, false));
    world.advance(one, true);
    assert_eq!((world.state(one), world.state(other)), (TaskState::Finished, TaskState::Training));
}

#[test]
fn one_that_is_to_do_without_a_checkpoint_ends_whatever_it_does() {
    for steps in [1, usize::try_from(STEPS).unwrap() + 1] {
        let (mut world, task) = alone();
        for _ in 0..steps {
            world.advance(task, true);
        }
        if world.workers[&task] == Worker::Training {
            world.feed(task, TaskEvent::Command(TaskCommand::Stop));
            world.end_step(task);
            world.advance(task, true);
        }
        assert!(matches!(world.workers[&task], Worker::Writing | Worker::WritingLast));
        world.feed(task, TaskEvent::Command(TaskCommand::Discard));
        assert_eq!(world.state(task), TaskState::Stopped);
    }
    let (mut world, task) = alone();
    world.feed(task, TaskEvent::Command(TaskCommand::Discard));
    world.end_step(task);
    assert_eq!(world.state(task), TaskState::Stopped);
}

#[test]
fn one_that_fails_is_over_when_its_state_is_written_down() {
    for is_written in [true, false] {
        let (mut world, task) = alone();
        world.advance(task, true);
        world.fail(task, true);
        assert_eq!((world.state(task), world.workers[&task]), (TaskState::Waiting, Worker::Saving));
        world.advance(task, true);
        assert_eq!((world.state(task), world.workers[&task]), (TaskState::Waiting, Worker::Writing));
        world.advance(task, is_written);
        let view = world.book.view(task, world.at).unwrap();
        assert_eq!((view.state, view.reason.as_str()), (TaskState::Failed, "the loss is NaN"));
    }
    // Nothing was learned, nobody knows what, its worker dies, or somebody does not want to wait.
    for end in 0..4 {
        let (mut world, task) = alone();
        if end > 0 {
            world.advance(task, true);
        }
        world.fail(task, end != 1);
        match end {
            2 => world.lose(task, false),
            3 => world.feed(task, TaskEvent::Command(TaskCommand::Discard)),
            _ => {}
        }
        let view = world.book.view(task, world.at).unwrap();
        assert_eq!((view.state, view.reason.as_str()), (TaskState::Failed, "the loss is NaN"), "{end}");
    }
}

#[test]
fn only_what_is_over_is_forgotten() {
    let (mut world, task) = alone();
    world.book.forget(task);
    assert_eq!(world.state(task), TaskState::Training);
    world.fail(task, false);
    world.book.forget(task);
    assert_eq!(world.book.view(task, world.at), None);
    // A late word of its worker is of nobody.
    assert_eq!(world.book.handle(task, TaskEvent::Lost("late".to_owned()), world.at), []);
}

#[test]
fn the_account_of_one_that_is_over_stands_still() {
    let (mut world, task) = alone();
    world.advance(task, true);
    world.feed(task, TaskEvent::Command(TaskCommand::Discard));
    world.end_step(task);
    let ended = world.book.view(task, world.at).unwrap();
    assert_eq!(ended.state, TaskState::Stopped);
    let later = world.book.view(task, world.at + Duration::from_secs(60)).unwrap();
    assert_eq!(later.progress, ended.progress);
}

#[test]
fn turns_are_as_long_as_weights_say() {
    let mut world = World::new(&[1.0, 3.0]);
    // No task ends while this is looked at.
    for _ in 0..16 {
        for id in [TaskId(0), TaskId(1)] {
            world.advance(id, true);
            if world.workers[&id] == Worker::Stopping {
                world.advance(id, false);
            }
        }
    }
    let (one, three) = (world.done[&TaskId(0)].0, world.done[&TaskId(1)].0);
    assert!(one > 0 && three > one, "{one} and {three}");
}

#[test]
fn a_task_that_loses_its_workers_fails_in_the_end() {
    let (mut world, task) = alone();
    for _ in 1..MOST_DEATHS {
        world.lose(task, false);
        assert_eq!(world.state(task), TaskState::Preparing);
        world.come_up(task);
    }
    world.lose(task, false);
    assert_eq!(world.state(task), TaskState::Failed);
    let reason = world.book.view(task, world.at).unwrap().reason;
    assert!(reason.contains("5 workers") && reason.contains("signal 9"), "{reason}");
}

#[test]
fn steps_behind_the_last_checkpoint_do_not_count_when_a_worker_is_lost() {
    let (mut world, task) = alone();
    for _ in 0..3 {
        world.advance(task, true);
    }
    world.feed(task, TaskEvent::Saved { step: 2, written: true });
    world.done.insert(task, (3, 2));
    world.lose(task, false);
    let view = world.book.view(task, world.at).unwrap();
    assert_eq!(view.extent.steps_done, 2);
    assert_eq!((view.progress.steps_done, view.progress.steps_computed), (2, 3));
}

#[test]
fn a_checkpoint_counts_though_its_worker_was_lost_before_it_told_of_it() {
    let (mut world, task) = alone();
    for _ in 0..3 {
        world.advance(task, true);
    }
    world.lose(task, true);
    assert_eq!(world.book.view(task, world.at).unwrap().progress.steps_done, 0);
    world.come_up(task);
    let view = world.book.view(task, world.at).unwrap();
    assert_eq!((view.extent.steps_done, view.progress.steps_done), (3, 3));
    assert_eq!((view.progress.steps_computed, view.progress.goodput), (3, Some(1.0)));
    // It is lost again: what was found counts.
    world.lose(task, false);
    assert_eq!(world.book.view(task, world.at).unwrap().progress.steps_done, 3);
}

#[test]
fn a_task_that_is_stopped_writes_a_last_checkpoint() {
    let (mut world, task) = alone();
    world.feed(task, TaskEvent::Command(TaskCommand::Stop));
    assert_eq!(world.workers[&task], Worker::Stopping);
    world.end_step(task);
    assert_eq!(world.workers[&task], Worker::Saving);
    world.advance(task, true);
    assert_eq!((world.workers[&task], world.state(task)), (Worker::Writing, TaskState::Waiting));
    world.advance(task, true);
    assert_eq!(world.state(task), TaskState::Stopped);
}
