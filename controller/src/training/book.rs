//! Which task trains, as a state machine without IO.
//!
//! At most one task computes at a time, and none while requests have the device. Tasks that could compute take turns, each
//! for a time in proportion to its weight: the one with the least time by its weight goes on.

use std::collections::BTreeMap;
use std::time::Duration;

use pswitch_protocol::{TaskExtent, TaskPause, TaskStep};
use pswitch_train::{InterruptionReason, Progress, ProgressEvent, ProgressLine};

use crate::service::{TaskCommand, TaskState};

/// How long a task computes before it is another's turn.
const TURN: Duration = Duration::from_secs(1);

/// Workers that a task may lose in a row without a step that counts.
const MOST_DEATHS: u32 = 5;

/// Over how much time the rates are taken that are shown.
const WINDOW: Duration = Duration::from_secs(10);

/// A task, numbered in the order of submission.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct TaskId(pub(super) u32);

/// What happened to a task.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum TaskEvent {
    /// Its worker is there.
    Attached,
    /// Its worker has prepared it, or cannot.
    Ready(Result<TaskExtent, String>),
    /// A step counts.
    Step(TaskStep),
    /// A checkpoint of so many steps was written, or not.
    Saved { step: u64, written: bool },
    /// All that a checkpoint needs of its state is copied.
    Copied,
    /// It stands still, where the gate has it do so.
    Held,
    /// It was told to stand still and has said nothing since: perhaps it waits for a GPU that stands still already.
    Stuck,
    /// Its step ends before it is whole, and touches its place no more.
    Left,
    /// It computes no more until it is told to.
    Paused(TaskPause),
    /// Its worker is gone.
    Lost(String),
    /// Somebody wants something of it.
    Command(TaskCommand),
}

/// What is to be done, in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TaskAction {
    /// Fork a worker.
    Start(TaskId),
    /// Have its worker prepare the task. Nobody trains now, so that its state may lie where an arena was.
    Prepare(TaskId),
    /// Let it train.
    Train(TaskId),
    /// Have it stand still where it is.
    Hold(TaskId),
    /// Let it go on from there.
    Resume(TaskId),
    /// Have its step end.
    Interrupt(TaskId),
    /// Have it write a checkpoint.
    Save(TaskId),
    /// End its worker, and free its state.
    End(TaskId),
}

/// States of a task.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// It needs a worker.
    Queued,
    /// Its worker starts.
    Starting,
    /// Its worker could prepare it.
    Attached,
    /// Its worker prepares it.
    Preparing,
    /// Prepared, and computing nothing.
    Idle,
    /// It computes.
    Training {
        since: Duration,
    },
    /// It was told to stand still.
    Holding {
        since: Duration,
    },
    /// It stands still within a step, or between two.
    Held {
        since: Duration,
    },
    /// It was told to end its step.
    Yielding {
        since: Duration,
        reason: InterruptionReason,
    },
    /// Its step ends, and has left its place alone since; it has not said yet that it is tidied up.
    Ending {
        reason: InterruptionReason,
    },
    /// Its state is copied for its last checkpoint.
    Saving,
    /// Its last checkpoint is written, behind which it is over. It needs neither the device nor its place.
    Writing(TaskState),
    Over(TaskState),
}

#[derive(Debug)]
struct Task {
    weight: f64,
    has_checkpoints: bool,
    phase: Phase,
    /// Time that it has had, by its weight.
    pass: f64,
    is_paused: bool,
    is_stopping: bool,
    /// It cannot go on, for its `reason`, and is over when its state is written down.
    fails: bool,
    /// When it came to its end, its worker touched nothing in the pool any more.
    has_left: bool,
    /// Workers lost since it got further than ever.
    deaths: u32,
    /// The most steps that it ever had.
    furthest: u64,
    /// Steps of the last checkpoint.
    saved: u64,
    extent: TaskExtent,
    rate: Option<f64>,
    /// How long a step takes: the last that counts, or longer, if more than that was thrown away.
    step: Duration,
    is_interrupted: bool,
    progress: Progress,
    /// When it came to its end.
    over_at: Option<Duration>,
    reason: String,
}

/// All tasks of a device.
#[derive(Debug, Default)]
pub(super) struct Book {
    tasks: BTreeMap<TaskId, Task>,
    /// Whether tasks stand still for requests; else their steps end.
    holds: bool,
    is_closed: bool,
    /// Models may lie where states do: no state can be filled, used or written down.
    is_away: bool,
}

/// What there is to say of a task.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct TaskView {
    pub(super) state: TaskState,
    pub(super) reason: String,
    pub(super) extent: TaskExtent,
    pub(super) rate: Option<f64>,
    pub(super) progress: pswitch_train::ProgressReport,
}

impl Book {
    /// One without tasks. With `holds` tasks stand still for requests; else their steps end.
    pub(super) fn new(holds: bool) -> Self {
        Self { holds, ..Self::default() }
    }

    /// Takes a task. It needs a worker first.
    pub(super) fn submit(&mut self, task: TaskId, weight: f64, has_checkpoints: bool, at: Duration) {
        let record = Task {
            weight,
            has_checkpoints,
            phase: Phase::Queued,
            pass: 0.0,
            is_paused: false,
            is_stopping: false,
            fails: false,
            has_left: false,
            deaths: 0,
            furthest: 0,
            saved: 0,
            extent: TaskExtent { steps_done: 0, total_steps: 0 },
            rate: None,
            step: Duration::ZERO,
            is_interrupted: false,
            progress: Progress::new(0, at, WINDOW),
            over_at: None,
            reason: String::new(),
        };
        self.tasks.insert(task, record);
    }

    /// Takes what happened and returns what is to be done. `at` never goes back.
    pub(super) fn handle(&mut self, id: TaskId, event: TaskEvent, at: Duration) -> Vec<TaskAction> {
        let mut actions = Vec::new();
        let is_step = matches!(event, TaskEvent::Step(_));
        let comes_back = matches!(event, TaskEvent::Ready(Ok(_)) | TaskEvent::Command(TaskCommand::Resume));
        let others = self
            .tasks
            .iter()
            .filter(|(other, task)| **other != id && (task.is_under_way() || task.could_train()));
        let least = others.map(|(_, task)| task.pass).min_by(f64::total_cmp);
        if let Some(task) = self.tasks.get_mut(&id)
            && !task.is_over()
        {
            if comes_back && let Some(least) = least {
                // One that could not compute for a while does not catch up.
                task.pass = task.pass.max(least);
            }
            if let (TaskEvent::Held, Phase::Training { since }, true) = (&event, task.phase, self.is_closed) {
                // Training, the gate was faster than the news of it -> Holding.
                task.phase = Phase::Holding { since };
            }
            task.handle(id, event, at, &mut actions);
            task.over_at = task.is_over().then_some(at);
        }
        self.dispatch(at, is_step, &mut actions);
        actions
    }

    /// Says who has the device, for the events to come.
    pub(super) fn note_closed(&mut self, is_closed: bool) {
        self.is_closed = is_closed;
    }

    /// What it was told last of who has the device.
    pub(super) fn is_closed(&self) -> bool {
        self.is_closed
    }

    /// Says whether models may lie where states do, for the events to come.
    pub(super) fn note_away(&mut self, is_away: bool) {
        self.is_away = is_away;
    }

    /// Requests have the device, or have it no more; or time has passed.
    pub(super) fn set_closed(&mut self, is_closed: bool, at: Duration) -> Vec<TaskAction> {
        self.is_closed = is_closed;
        let mut actions = Vec::new();
        self.dispatch(at, false, &mut actions);
        actions
    }

    /// Forgets a task that is over; others stay.
    pub(super) fn forget(&mut self, id: TaskId) {
        if self.tasks.get(&id).is_some_and(Task::is_over) {
            self.tasks.remove(&id);
        }
    }

    pub(super) fn view(&self, id: TaskId, at: Duration) -> Option<TaskView> {
        let task = self.tasks.get(&id)?;
        Some(TaskView {
            state: task.state(),
            reason: task.reason.clone(),
            extent: task.extent,
            rate: task.rate,
            progress: task.progress.report(task.over_at.unwrap_or(at)),
        })
    }

    /// Whether a task computes or could, or needs its place for something else, and how long the longest step takes of those that do.
    pub(super) fn demand(&self) -> (bool, Duration) {
        let wants = |task: &&Task| {
            task.could_train() || task.wants_to_go_on() || (self.is_away && task.needs_its_place())
        };
        let wanting = || self.tasks.values().filter(wants);
        (wanting().next().is_some(), wanting().map(|task| task.step).max().unwrap_or_default())
    }

    /// Whether a task has something to do in its place, or does it.
    pub(super) fn wants_places(&self) -> bool {
        let is_at_it =
            |task: &Task| task.is_under_way() || matches!(task.phase, Phase::Preparing | Phase::Saving);
        self.tasks.values().any(|task| is_at_it(task) || task.needs_its_place() || task.could_train())
    }

    /// Whether the worker of a task, should it have one, touches nothing in the pool.
    pub(super) fn leaves_its_place_alone(&self, id: TaskId) -> bool {
        self.tasks.get(&id).is_none_or(Task::leaves_its_place_alone)
    }

    /// Whether its step ends for a request, or stood still for one before it did.
    pub(super) fn gives_way(&self, id: TaskId) -> bool {
        self.tasks.get(&id).is_some_and(|task| {
            task.ends_for() == InterruptionReason::Request && !matches!(task.phase, Phase::Held { .. })
        })
    }

    /// Whether it has come to its end; one that is not known has.
    pub(super) fn is_over(&self, id: TaskId) -> bool {
        self.tasks.get(&id).is_none_or(Task::is_over)
    }

    /// Whether its last checkpoint is written: its worker has a copy of its state, which is used no more if that succeeds.
    pub(super) fn is_writing(&self, id: TaskId) -> bool {
        self.tasks.get(&id).is_some_and(|task| matches!(task.phase, Phase::Writing(_)))
    }

    /// Whether it trains, or would go on within a step.
    pub(super) fn is_under_way(&self, id: TaskId) -> bool {
        self.tasks.get(&id).is_some_and(Task::is_under_way)
    }

    /// Steps that it has in all.
    pub(super) fn total_steps(&self, id: TaskId) -> u64 {
        self.tasks.get(&id).map(|task| task.extent.total_steps).unwrap_or_default()
    }

    /// Steps that are in no checkpoint, of a task that has some and is not over.
    pub(super) fn unsaved(&self, id: TaskId) -> u64 {
        let unsaved = |task: &Task| task.extent.steps_done.saturating_sub(task.saved);
        let task = self.tasks.get(&id).filter(|task| task.has_checkpoints && !task.is_over());
        task.map_or(0, unsaved)
    }

    /// Who is to train now.
    pub(super) fn training(&self) -> Option<TaskId> {
        self.tasks.keys().copied().find(|&id| self.trains(id))
    }

    /// How long a step of it takes, as far as is known.
    pub(super) fn step(&self, id: TaskId) -> Duration {
        self.tasks.get(&id).map(|task| task.step).unwrap_or_default()
    }

    /// Whether it is to train now.
    pub(super) fn trains(&self, id: TaskId) -> bool {
        self.tasks.get(&id).is_some_and(|task| matches!(task.phase, Phase::Training { .. }))
    }

    /// Whether it computes, as far as is known, and was not told to end its step.
    pub(super) fn could_end(&self, id: TaskId) -> bool {
        let could = |task: &Task| matches!(task.phase, Phase::Training { .. } | Phase::Holding { .. });
        self.tasks.get(&id).is_some_and(could)
    }

    /// Whether it computes nothing since it was told to pause, or is to pause no more.
    pub(super) fn has_paused(&self, id: TaskId) -> bool {
        !self.is_under_way(id) || self.tasks.get(&id).is_none_or(|task| !task.is_paused)
    }

    /// Whether it is on its way to an end that it was told to come to.
    pub(super) fn is_stopping(&self, id: TaskId) -> bool {
        self.tasks.get(&id).is_some_and(|task| task.is_stopping)
    }

    /// A line for the log of a task.
    pub(super) fn line(&self, id: TaskId, at: Duration) -> Option<ProgressLine> {
        let task = self.tasks.get(&id)?;
        Some(task.progress.line(at, task.rate?))
    }

    /// `between_steps`: whoever computes has just finished one, so that least is lost if another has its turn.
    fn dispatch(&mut self, at: Duration, between_steps: bool, actions: &mut Vec<TaskAction>) {
        for (&id, task) in self.tasks.iter_mut().filter(|_| !self.is_away) {
            if task.is_to_save() {
                // Idle, told to stop or failed -> Saving.
                task.phase = Phase::Saving;
                actions.push(TaskAction::Save(id));
            }
        }
        for (&id, task) in self.tasks.iter_mut().filter(|(_, task)| task.phase == Phase::Queued) {
            // Queued -> Starting.
            task.phase = Phase::Starting;
            actions.push(TaskAction::Start(id));
        }
        let attached: Vec<TaskId> =
            self.tasks.iter().filter(|(_, task)| task.phase == Phase::Attached).map(|(&id, _)| id).collect();
        let under_way = self.tasks.iter().find(|(_, task)| task.is_under_way()).map(|(&id, _)| id);
        if let Some(id) = under_way {
            let others = self.tasks.iter().any(|(&other, task)| other != id && task.could_train());
            let (is_closed, holds) = (self.is_closed, self.holds);
            let Some(task) = self.tasks.get_mut(&id) else { return };
            let (since, is_training) = match task.phase {
                Phase::Training { since } => (since, true),
                Phase::Holding { since } | Phase::Held { since } => (since, false),
                _ => return,
            };
            let has_had_its_turn = others && at.saturating_sub(since) >= TURN;
            let reason = if is_closed && !holds {
                Some(InterruptionReason::Request)
            } else if task.is_paused || task.is_stopping {
                Some(InterruptionReason::Command)
            } else if !attached.is_empty() || (has_had_its_turn && is_training && between_steps) {
                Some(InterruptionReason::Turn)
            } else {
                None
            };
            match reason {
                Some(reason) => {
                    // Training, Holding or Held, told to end -> Yielding.
                    task.phase = Phase::Yielding { since, reason };
                    actions.push(TaskAction::Interrupt(id));
                }
                None if is_closed && is_training => {
                    // Training, told to hold -> Holding.
                    task.phase = Phase::Holding { since };
                    actions.push(TaskAction::Hold(id));
                }
                None if !is_closed && !is_training => {
                    // Holding or Held, the device is free -> Training.
                    task.phase = Phase::Training { since };
                    task.go_on(at);
                    actions.push(TaskAction::Resume(id));
                }
                None => {}
            }
            return;
        }
        if self.is_away {
            return;
        }
        for id in attached {
            if let Some(task) = self.tasks.get_mut(&id) {
                // Attached, nobody trains -> Preparing.
                task.phase = Phase::Preparing;
                actions.push(TaskAction::Prepare(id));
            }
        }
        if self.is_closed {
            return;
        }
        let ready = self.tasks.iter_mut().filter(|(_, task)| task.could_train());
        let next = ready.min_by(|(_, one), (_, other)| one.pass.total_cmp(&other.pass));
        if let Some((&id, task)) = next {
            // Idle, its turn -> Training.
            task.phase = Phase::Training { since: at };
            task.go_on(at);
            actions.push(TaskAction::Train(id));
        }
    }
}

impl Task {
    fn is_over(&self) -> bool {
        matches!(self.phase, Phase::Over(_))
    }

    /// Whether it computes, or has something in an arena.
    fn is_under_way(&self) -> bool {
        matches!(
            self.phase,
            Phase::Training { .. }
                | Phase::Holding { .. }
                | Phase::Held { .. }
                | Phase::Yielding { .. }
                | Phase::Ending { .. }
        )
    }

    fn leaves_its_place_alone(&self) -> bool {
        match self.phase {
            Phase::Queued
            | Phase::Starting
            | Phase::Attached
            | Phase::Idle
            | Phase::Ending { .. }
            | Phase::Writing(_) => true,
            Phase::Over(_) => self.has_left,
            Phase::Preparing
            | Phase::Training { .. }
            | Phase::Holding { .. }
            | Phase::Held { .. }
            | Phase::Yielding { .. }
            | Phase::Saving => false,
        }
    }

    /// Why its step ends, if it does.
    fn ends_for(&self) -> InterruptionReason {
        match self.phase {
            Phase::Yielding { reason, .. } | Phase::Ending { reason } => reason,
            // The gate was faster than the news of it.
            _ => InterruptionReason::Request,
        }
    }

    fn wants_to_go_on(&self) -> bool {
        self.is_under_way() && !self.is_paused && !self.is_stopping
    }

    fn is_to_save(&self) -> bool {
        self.phase == Phase::Idle && (self.is_stopping || self.fails) && self.has_checkpoints
    }

    /// To be prepared, or to be written down.
    fn needs_its_place(&self) -> bool {
        self.phase == Phase::Attached || self.is_to_save()
    }

    fn could_train(&self) -> bool {
        self.phase == Phase::Idle && !self.is_paused && !self.is_stopping && !self.fails
    }

    fn state(&self) -> TaskState {
        match self.phase {
            Phase::Queued | Phase::Starting | Phase::Attached | Phase::Preparing => TaskState::Preparing,
            Phase::Training { .. } => TaskState::Training,
            _ if self.is_paused && !self.is_over() => TaskState::Paused,
            Phase::Idle
            | Phase::Holding { .. }
            | Phase::Held { .. }
            | Phase::Yielding { .. }
            | Phase::Ending { .. }
            | Phase::Saving
            | Phase::Writing(_) => TaskState::Waiting,
            Phase::Over(state) => state,
        }
    }

    fn note(&mut self, at: Duration, event: ProgressEvent) {
        if let Err(error) = self.progress.handle(at, event) {
            tracing::error!(%error, "the account of a training task is wrong");
            debug_assert!(false, "{error}");
        }
    }

    fn interrupt(&mut self, at: Duration, reason: InterruptionReason) {
        if !std::mem::replace(&mut self.is_interrupted, true) {
            self.note(at, ProgressEvent::InterruptionBegan { reason });
        }
    }

    /// An interruption is over, if there was one.
    fn go_on(&mut self, at: Duration) {
        if std::mem::take(&mut self.is_interrupted) {
            self.note(at, ProgressEvent::InterruptionEnded);
        }
    }

    fn end(&mut self, id: TaskId, state: TaskState, reason: String, actions: &mut Vec<TaskAction>) {
        self.has_left = self.leaves_its_place_alone();
        self.phase = Phase::Over(state);
        self.reason = reason;
        actions.push(TaskAction::End(id));
    }

    fn handle(&mut self, id: TaskId, event: TaskEvent, at: Duration, actions: &mut Vec<TaskAction>) {
        match event {
            TaskEvent::Attached => {
                if self.phase == Phase::Starting {
                    // Starting, it is there -> Attached.
                    self.phase = Phase::Attached;
                }
            }
            TaskEvent::Ready(Ok(extent)) => {
                // Preparing, prepared -> Idle.
                if self.progress.report(at).steps_computed == 0 && !self.is_interrupted {
                    // From the checkpoint of an earlier server.
                    self.progress = Progress::new(extent.steps_done, at, WINDOW);
                } else {
                    // From one of its own, which may be later than the last that was told of.
                    self.note(at, ProgressEvent::Resumed { steps_done: extent.steps_done });
                }
                self.extent = extent;
                self.furthest = self.furthest.max(extent.steps_done);
                self.saved = extent.steps_done;
                self.phase = Phase::Idle;
                self.stop_if_told(id, actions);
            }
            TaskEvent::Ready(Err(reason)) => self.end(id, TaskState::Failed, reason, actions),
            TaskEvent::Step(step) => {
                // It did not stand still yet, or its step ends after it did.
                self.go_on(at);
                if let Phase::Held { since } = self.phase {
                    // Held, a step -> Holding.
                    self.phase = Phase::Holding { since };
                }
                self.extent.steps_done = step.step + 1;
                // Steps that are done again prove nothing.
                if self.extent.steps_done > self.furthest {
                    (self.furthest, self.deaths) = (self.extent.steps_done, 0);
                }
                self.rate = Some(step.rate);
                let (loss, samples) = (step.loss, step.samples);
                let duration = Duration::from_nanos(step.took_ns);
                self.note(at, ProgressEvent::StepFinished { loss, samples, duration });
                self.pass += duration.as_secs_f64() / self.weight;
                self.step = duration;
            }
            TaskEvent::Saved { step, written } => {
                if written {
                    self.saved = self.saved.max(step);
                }
                // One that was being written before is another step's.
                if step == self.extent.steps_done {
                    match self.phase {
                        // Writing, written, or failed before -> Over.
                        Phase::Writing(end) if written || self.fails => {
                            self.end(id, end, self.reason.clone(), actions);
                        }
                        // Writing, not written -> Writing: its worker tries again.
                        Phase::Writing(TaskState::Finished) => self.is_stopping = false,
                        Phase::Writing(_) => {
                            // Writing, not written -> Idle, paused: what it has learned is not thrown away.
                            self.phase = Phase::Idle;
                            (self.is_stopping, self.is_paused) = (false, true);
                        }
                        // Saving: what was tried before. Its state is being copied for another.
                        _ => {}
                    }
                }
            }
            TaskEvent::Copied => {
                if self.phase == Phase::Saving {
                    // Saving, copied -> Writing.
                    let end = if self.fails { TaskState::Failed } else { TaskState::Stopped };
                    self.phase = Phase::Writing(end);
                }
            }
            TaskEvent::Held => {
                // One that goes on already has been heard late, or the gate has opened again before the book has looked at it.
                if let Phase::Holding { since } = self.phase {
                    // Holding, it stands still -> Held.
                    self.phase = Phase::Held { since };
                    self.interrupt(at, InterruptionReason::Request);
                }
            }
            TaskEvent::Stuck => {
                if let Phase::Holding { since } | Phase::Training { since } = self.phase {
                    // Holding, or told to go on before it did, silent for too long -> Yielding.
                    self.phase = Phase::Yielding { since, reason: InterruptionReason::Request };
                    actions.push(TaskAction::Interrupt(id));
                }
            }
            TaskEvent::Left => {
                if self.is_under_way() {
                    // Under way, its step ends -> Ending.
                    self.phase = Phase::Ending { reason: self.ends_for() };
                }
            }
            TaskEvent::Paused(TaskPause::Stopped { discarded_ns, .. }) => {
                let reason = self.ends_for();
                if let Some(nanos) = discarded_ns {
                    self.go_on(at);
                    let duration = Duration::from_nanos(nanos);
                    self.note(at, ProgressEvent::StepDiscarded { duration });
                    // It takes longer than that.
                    self.step = self.step.max(duration * 2);
                    self.pass += duration.as_secs_f64() / self.weight;
                }
                // Under way, stopped -> Idle.
                self.interrupt(at, reason);
                self.phase = Phase::Idle;
                self.stop_if_told(id, actions);
            }
            TaskEvent::Paused(TaskPause::Finished) => {
                // Under way, finished -> Idle.
                self.phase = Phase::Idle;
                if self.has_checkpoints && self.saved < self.extent.steps_done {
                    // Idle, finished -> Writing.
                    self.phase = Phase::Writing(TaskState::Finished);
                } else {
                    self.end(id, TaskState::Finished, String::new(), actions);
                }
            }
            TaskEvent::Paused(TaskPause::Failed { reason, is_sound }) => {
                // Under way, failed -> Idle, and Saving then, or Over.
                self.phase = Phase::Idle;
                if is_sound && self.has_checkpoints && self.saved < self.extent.steps_done {
                    (self.fails, self.reason) = (true, reason);
                } else {
                    self.end(id, TaskState::Failed, reason, actions);
                }
            }
            TaskEvent::Lost(cause) => self.lost(id, &cause, at, actions),
            TaskEvent::Command(TaskCommand::Pause) => self.is_paused = true,
            TaskEvent::Command(TaskCommand::Resume) => self.is_paused = false,
            TaskEvent::Command(TaskCommand::Stop) => {
                self.is_stopping = true;
                self.stop_if_told(id, actions);
            }
            TaskEvent::Command(TaskCommand::Discard) => {
                (self.is_stopping, self.has_checkpoints) = (true, false);
                if self.fails {
                    // Idle, Saving or Writing, told to do without -> Failed.
                    self.end(id, TaskState::Failed, self.reason.clone(), actions);
                } else if matches!(self.phase, Phase::Saving | Phase::Writing(_)) {
                    // Saving or Writing, told to do without -> Stopped.
                    self.end(id, TaskState::Stopped, String::new(), actions);
                }
                self.stop_if_told(id, actions);
            }
        }
    }

    /// Any phase, the worker is gone -> Queued; or Over, if it has failed or is to stop, or lost too many.
    fn lost(&mut self, id: TaskId, cause: &str, at: Duration, actions: &mut Vec<TaskAction>) {
        self.deaths += 1;
        self.extent.steps_done = self.saved.min(self.extent.steps_done);
        self.note(at, ProgressEvent::Resumed { steps_done: self.extent.steps_done });
        self.interrupt(at, InterruptionReason::Failure);
        if self.fails {
            self.end(id, TaskState::Failed, self.reason.clone(), actions);
        } else if self.is_stopping {
            self.end(id, TaskState::Stopped, format!("its worker was lost ({cause})"), actions);
        } else if self.deaths >= MOST_DEATHS {
            let reason = format!("{MOST_DEATHS} workers were lost in a row, the last with {cause}");
            self.end(id, TaskState::Failed, reason, actions);
        } else {
            self.phase = Phase::Queued;
        }
    }

    /// Idle, told to stop -> Stopped where there is no place for checkpoints. Not prepared yet -> Stopped.
    fn stop_if_told(&mut self, id: TaskId, actions: &mut Vec<TaskAction>) {
        if !self.is_stopping {
            return;
        }
        match self.phase {
            // It is saved first, which needs its place.
            Phase::Idle if self.has_checkpoints => {}
            Phase::Idle | Phase::Queued | Phase::Starting | Phase::Attached | Phase::Preparing => {
                self.end(id, TaskState::Stopped, String::new(), actions);
            }
            Phase::Training { .. }
            | Phase::Holding { .. }
            | Phase::Held { .. }
            | Phase::Yielding { .. }
            | Phase::Ending { .. }
            | Phase::Saving
            | Phase::Writing(_)
            | Phase::Over(_) => {}
        }
    }
}

#[cfg(test)]
mod tests;
