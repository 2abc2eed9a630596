//! The thread that trains: it does what [`super::book`] says.

mod submission;
mod workers;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, PoisonError, mpsc};
use std::time::{Duration, Instant};

use mio::{Events, Poll};
use pswitch_device::{Device, PinnedMemory};
use pswitch_mem_pool::{Range, TrainingMemory};
use pswitch_protocol::{Region, ToWorker};
use pswitch_train::{FolderClaim, TaskConfig};

use super::book::{Book, TaskAction, TaskEvent, TaskId};
use super::journal::Journal;
use super::places::Places;
use super::worker::{self, Attachment, TaskWorker};
use super::{Gate, Mail, Mailbox, Reply, Statuses, TrainingParts, refused_as_over};
use crate::scheduler::WorkerId;
use crate::service::{CheckpointStatus, Residence, ServiceError, TaskCommand, TaskState, TaskStatus};
use crate::supervisor::Supervisor;

/// Time that a worker has to say that it stands still, before its step is to end, then to end it, and then to tidy up: far longer
/// than any operator takes.
const YIELD_TIMEOUT: Duration = Duration::from_secs(10);

/// The same where it is not known how long a step takes.
const FIRST_STEP_TIMEOUT: Duration = Duration::from_secs(300);

/// Time that a worker has to copy a state.
const COPY_TIMEOUT: Duration = Duration::from_secs(300);

/// Time that a worker has to end when its task is over.
const END_TIMEOUT: Duration = Duration::from_secs(30);

/// How often it is said anew how far tasks are that are not over: they may stand still, and rates are those of the last seconds.
const PUBLISH_EVERY: Duration = Duration::from_secs(1);

/// A task as the thread knows it.
struct Record {
    name: String,
    config: TaskConfig,
    digest: u64,
    /// Where its state lies in the pool; none once it is over and its worker gone.
    state: Option<Range>,
    /// Where its state goes when it makes room for a model.
    saved: Option<PinnedMemory>,
    /// How often it did, for workers that are gone.
    made_room: u64,
    /// It was lost on its way while its last checkpoint was written.
    is_spoilt: bool,
    /// Its folder of checkpoints; none once it is over and its worker gone.
    claim: Option<FolderClaim>,
    worker: Option<TaskWorker>,
    checkpoint: Option<CheckpointStatus>,
    checkpoint_error: String,
    last_yield_us: Option<u64>,
    /// When its worker counts as hung.
    deadline: Option<Instant>,
    /// The most that one of its steps has had of an arena.
    peak_bytes: u64,
    log: PathBuf,
}

impl Record {
    /// Ends its worker if its state is lost, unless that is writing a copy.
    fn end_if_spoilt(&mut self, supervisor: &Supervisor, is_writing: bool) {
        if !is_writing && std::mem::take(&mut self.is_spoilt) {
            tracing::error!(task = self.name, "its state was lost while it made room for a model");
            if let Some(worker) = &self.worker {
                supervisor.kill(worker.id);
            }
        }
    }
}

pub(super) struct Host {
    name: String,
    device: Arc<dyn Device>,
    places: Places,
    attachment: Attachment,
    region: Range,
    /// Whether tasks stand still for requests.
    holds: bool,
    states: TrainingMemory,
    supervisor: Arc<Supervisor>,
    journal: Journal,
    gate: Arc<Gate>,
    book: Book,
    tasks: BTreeMap<TaskId, Record>,
    /// Who waits until a task does as it was told.
    waiting: Vec<(TaskId, TaskCommand, Reply)>,
    /// Workers that may have said more than was read.
    unread: BTreeSet<WorkerId>,
    /// Tasks whose worker could not be started: when to tell of it, and why.
    unstarted: Vec<(Instant, TaskId, String)>,
    begun: Instant,
    /// How long this thread looks for the end of a step that was interrupted before it sleeps, and until when it does.
    spin: Duration,
    spins_until: Instant,
    poll: Poll,
    mailbox: Mailbox,
    statuses: Statuses,
}

impl Host {
    pub(super) fn new(
        parts: TrainingParts,
        places: Places,
        attachment: Attachment,
        gate: Arc<Gate>,
        poll: Poll,
        mailbox: Mailbox,
        statuses: Statuses,
    ) -> std::io::Result<Self> {
        let name = parts.device.properties().id.to_string();
        let journal = Journal::start(&name)?;
        Ok(Self {
            name,
            device: parts.device,
            places,
            attachment,
            region: parts.region,
            holds: !parts.gives_way,
            states: TrainingMemory::new(parts.region),
            supervisor: parts.supervisor,
            journal,
            gate,
            book: Book::new(!parts.gives_way),
            tasks: BTreeMap::new(),
            waiting: Vec::new(),
            unread: BTreeSet::new(),
            unstarted: Vec::new(),
            begun: Instant::now(),
            spin: parts.spin,
            spins_until: Instant::now(),
            poll,
            mailbox,
            statuses,
        })
    }

    pub(super) fn run(mut self, receiver: &mpsc::Receiver<Mail>) {
        let mut events = Events::with_capacity(64);
        loop {
            match self.await_events(&mut events) {
                Err(error) if error.kind() != std::io::ErrorKind::Interrupted => {
                    tracing::error!(%error, "training cannot poll and ends");
                    return;
                }
                _ => {}
            }
            self.unread.extend(events.iter().filter_map(|event| worker::worker_of(event.token())));
            for worker in std::mem::take(&mut self.unread) {
                self.read(worker);
            }
            self.retry();
            self.kill_hung();
            while let Ok(mail) = receiver.try_recv() {
                if !self.take(mail) {
                    return self.end();
                }
            }
            self.choose();
            let (wanted, step) = self.book.demand();
            if self.gate.want(wanted, step) {
                self.places.end_turn();
            }
            self.publish();
        }
    }

    /// Looks for events for a while after an interruption, then sleeps until there are some or something is due.
    fn await_events(&mut self, events: &mut Events) -> std::io::Result<()> {
        while self.unread.is_empty() && Instant::now() < self.spins_until {
            self.poll.poll(events, Some(Duration::ZERO))?;
            if !events.is_empty() {
                return Ok(());
            }
        }
        self.poll.poll(events, self.patience())
    }

    fn now(&self) -> Duration {
        self.begun.elapsed()
    }

    fn feed(&mut self, task: TaskId, event: TaskEvent) {
        let at = self.now();
        self.note_device();
        let actions = self.book.handle(task, event, at);
        self.perform(actions);
    }

    /// Has the book look at the gate and at who is to train.
    fn choose(&mut self) {
        let is_closed = self.note_device();
        let actions = self.book.set_closed(is_closed, self.now());
        self.perform(actions);
        if let (false, Some(id)) = (is_closed, self.book.training())
            && let Some(worker) = self.worker(id)
        {
            // The gate may have closed and opened again since the last look.
            self.gate.let_on(worker.block);
        }
        let used = |(&id, record): (&TaskId, &Record)| {
            record.worker.is_some() && !self.book.leaves_its_place_alone(id)
        };
        let is_used = self.tasks.iter().any(used);
        self.places.update(is_closed, self.book.wants_places(), is_used);
    }

    /// Tells the book what training has of the device now, and says whether that is nothing.
    fn note_device(&mut self) -> bool {
        let is_closed = self.is_closed();
        self.book.note_closed(is_closed);
        self.book.note_away(self.places.are_away(is_closed));
        is_closed
    }

    /// False at the end.
    fn take(&mut self, mail: Mail) -> bool {
        match mail {
            Mail::Submit(task, reply) => {
                let taken = self.submit(*task);
                self.publish();
                let _ = reply.send(taken);
            }
            Mail::Command(name, command, reply) => match self.find(&name) {
                None => {
                    let _ = reply.send(Err(ServiceError::UnknownTask { name }));
                }
                Some(id) => {
                    let over =
                        self.book.view(id, self.now()).map(|view| view.state).filter(|state| state.is_over());
                    if let Some(state) = over {
                        let _ = reply.send(Err(refused_as_over(&name, state)));
                    } else {
                        self.waiting.push((id, command, reply));
                        self.feed(id, TaskEvent::Command(command));
                    }
                }
            },
            Mail::Lost(worker, cause) => self.lose(worker, cause),
            Mail::Connect(driver) => self.places.connect(driver),
            Mail::Admitted => self.places.admitted(),
            Mail::Refused => self.places.refused(),
            // It is published in any case.
            Mail::Moved => {}
            Mail::Spoilt(places) => self.give_up(&places),
            Mail::Stop => return false,
        }
        true
    }

    /// The latest task of a name.
    fn find(&self, name: &str) -> Option<TaskId> {
        self.tasks.iter().rev().find(|(_, record)| record.name == name).map(|(&id, _)| id)
    }

    /// Ends the workers whose states are lost: the tasks go on from their last checkpoints. One that is writing its last has a copy,
    /// and ends if that cannot be written.
    fn give_up(&mut self, places: &[Range]) {
        let spoilt = |record: &Record| record.state.is_some_and(|state| places.contains(&state));
        for (&id, record) in self.tasks.iter_mut().filter(|(_, record)| spoilt(record)) {
            record.is_spoilt = true;
            record.end_if_spoilt(&self.supervisor, self.book.is_writing(id));
        }
    }

    fn put_back(&mut self, state: Range) {
        if let Err(error) = self.states.free(state) {
            tracing::error!(%error, "the state of a training task cannot be freed");
        }
    }

    fn perform(&mut self, actions: Vec<TaskAction>) {
        for action in actions {
            match action {
                TaskAction::Start(id) => self.start(id),
                TaskAction::Prepare(id) => self.prepare(id),
                TaskAction::Train(id) => {
                    let (arena, holds) = (self.arena(), self.holds);
                    let Some(worker) = self.worker(id) else { continue };
                    self.gate.admit(worker.block);
                    let sent = worker.send(&ToWorker::Train { arena, holds });
                    self.check_sent(id, sent);
                }
                TaskAction::Hold(id) => {
                    if let Some(record) = self.tasks.get_mut(&id) {
                        record.last_yield_us = None;
                    }
                    self.gate.hold();
                    self.set_deadline(id, Some(self.hold_timeout(id)));
                }
                TaskAction::Resume(id) => {
                    if let Some(worker) = self.worker(id) {
                        self.gate.admit(worker.block);
                    }
                    // One who has not said that he stands still shows by a step that he lives.
                    if self.tasks.get(&id).is_some_and(|record| record.deadline.is_some()) {
                        self.set_deadline(id, Some(self.hold_timeout(id)));
                    }
                }
                TaskAction::Interrupt(id) => {
                    self.gate.interrupt();
                    self.set_deadline(id, Some(YIELD_TIMEOUT));
                    // To wake up at the end of the step takes 50 us, for which a request waits.
                    self.spins_until = Instant::now() + self.spin;
                }
                TaskAction::Save(id) => {
                    let Some(worker) = self.worker(id) else { continue };
                    let sent = worker.send(&ToWorker::SaveTask);
                    self.set_deadline(id, Some(COPY_TIMEOUT));
                    self.check_sent(id, sent);
                }
                TaskAction::End(id) => {
                    self.say_end(id);
                    let Some(record) = self.tasks.get_mut(&id) else { continue };
                    self.journal.close(&record.log);
                    match &record.worker {
                        // Its state is free when it is gone.
                        Some(worker) => {
                            record.deadline = Some(Instant::now() + END_TIMEOUT);
                            if !worker.send(&ToWorker::Shutdown) {
                                self.supervisor.kill(worker.id);
                            }
                        }
                        None => self.free(id),
                    }
                }
            }
        }
        self.answer();
    }

    /// Answers who waits until a task does as it was told.
    fn answer(&mut self) {
        if self.waiting.is_empty() {
            return;
        }
        let book = &self.book;
        let at = self.now();
        let is_done = |id: TaskId, command: TaskCommand| {
            book.view(id, at).is_none_or(|view| match command {
                TaskCommand::Resume => true,
                TaskCommand::Pause => book.has_paused(id),
                TaskCommand::Stop | TaskCommand::Discard => view.state.is_over() || !book.is_stopping(id),
            })
        };
        let (done, waiting) = std::mem::take(&mut self.waiting)
            .into_iter()
            .partition::<Vec<_>, _>(|(id, command, _)| is_done(*id, *command));
        self.waiting = waiting;
        self.publish();
        for (.., reply) in done {
            let _ = reply.send(Ok(()));
        }
    }

    /// What is left of the region behind all states.
    fn arena(&self) -> Region {
        let states = self.tasks.values().filter_map(|record| record.state);
        let offset = states.map(|state| state.end()).max().unwrap_or(self.region.offset);
        Region { offset, bytes: self.region.end() - offset }
    }

    /// Time that a worker has to say anything once it is to stand still: it may be within an operator, or past the word before
    /// it has seen it and within a step.
    fn hold_timeout(&self, id: TaskId) -> Duration {
        match self.book.step(id) {
            // The first, which nobody knows.
            Duration::ZERO => FIRST_STEP_TIMEOUT,
            step => YIELD_TIMEOUT.max(step * 20),
        }
    }

    fn worker(&self, id: TaskId) -> Option<&TaskWorker> {
        self.tasks.get(&id)?.worker.as_ref()
    }

    /// A worker that cannot be told anything is ended; its loss is heard when it is reaped.
    fn check_sent(&self, id: TaskId, sent: bool) {
        if !sent && let Some(worker) = self.worker(id) {
            self.supervisor.kill(worker.id);
        }
    }

    /// How long to sleep if nothing happens.
    fn patience(&self) -> Option<Duration> {
        if !self.unread.is_empty() {
            return Some(Duration::ZERO);
        }
        let now = Instant::now();
        let retry = self.unstarted.iter().map(|(due, ..)| due.saturating_duration_since(now)).min();
        let opens_in = look_at_gate_in(self.gate.opens_in(), self.book.is_closed());
        let deadlines = self.tasks.values().filter_map(|record| record.deadline);
        let deadline = deadlines.map(|deadline| deadline.saturating_duration_since(now)).min();
        let places = self.places.due().map(|due| due.saturating_duration_since(now));
        let publish = self.tasks.keys().any(|id| !self.book.is_over(*id)).then_some(PUBLISH_EVERY);
        [retry, opens_in, deadline, places, publish].into_iter().flatten().min()
    }

    fn is_closed(&self) -> bool {
        self.gate.opens_in() != Some(Duration::ZERO)
    }

    /// A line for people and one for plots, every so many steps and for the last.
    fn log(&mut self, id: TaskId, steps_done: u64) {
        let (at, total_steps) = (self.now(), self.book.total_steps(id));
        let Some(record) = self.tasks.get(&id) else { return };
        if steps_done < total_steps && !steps_done.is_multiple_of(record.config.log_every_steps) {
            return;
        }
        let Some(line) = self.book.line(id, at) else { return };
        tracing::info!(
            task = record.name,
            step = steps_done,
            of = total_steps,
            loss = line.loss,
            steps_per_s = line.steps_per_s,
            samples_per_s = line.samples_per_s,
            goodput = line.goodput,
            interruptions = line.interruptions,
            interruption_cost_us = line.interruption_cost_us,
            "trained"
        );
        if !record.log.as_os_str().is_empty() {
            self.journal.write(&record.log, line.to_json());
        }
    }

    /// A line for people when a task is over.
    fn say_end(&self, id: TaskId) {
        let (Some(record), Some(view)) = (self.tasks.get(&id), self.book.view(id, self.now())) else {
            return;
        };
        let (task, state, steps) = (&record.name, view.state.name(), view.extent.steps_done);
        if view.state == TaskState::Failed {
            tracing::error!(task, steps, reason = view.reason, "training task failed");
        } else {
            tracing::info!(task, state, steps, reason = view.reason, "training task is over");
        }
    }

    /// Gives back what a task had, its worker being gone.
    fn free(&mut self, id: TaskId) {
        let Some(record) = self.tasks.get_mut(&id) else { return };
        record.claim = None;
        if let Some(state) = record.state.take() {
            self.put_back(state);
        }
    }

    fn publish(&self) {
        let at = self.now();
        let status = |(&id, record): (&TaskId, &Record)| {
            let view = self.book.view(id, at)?;
            let place = self.places.states().zip(record.state);
            let (residence, made_room) =
                place.map_or((Residence::Resident, 0), |(states, state)| states.view(state));
            Some((
                record.name.clone(),
                TaskStatus {
                    name: record.name.clone(),
                    state: view.state,
                    reason: view.reason,
                    device: self.name.clone(),
                    steps_done: view.extent.steps_done,
                    total_steps: view.extent.total_steps,
                    learning_rate: view.rate,
                    progress: view.progress,
                    checkpoint: record.checkpoint.clone(),
                    checkpoint_error: record.checkpoint_error.clone(),
                    last_yield_us: record.last_yield_us,
                    residence,
                    made_room: record.made_room + made_room,
                    log: record.log.clone(),
                },
            ))
        };
        *self.statuses.lock().unwrap_or_else(PoisonError::into_inner) =
            self.tasks.iter().filter_map(status).collect();
    }

    fn end(mut self) {
        for (&id, record) in &self.tasks {
            let lost = self.book.unsaved(id);
            if lost > 0 {
                let (task, reason) = (&record.name, &record.checkpoint_error);
                tracing::error!(task, steps = lost, reason, "ends without a checkpoint of its last steps");
            }
            if let Some(worker) = &record.worker {
                self.supervisor.kill(worker.id);
                self.journal.close(&record.log);
            }
        }
    }
}

/// When to look at the gate if nothing happens before: when it opens. If it has opened since the book was told that it is
/// closed, that is now: nothing else would come of it.
fn look_at_gate_in(opens_in: Option<Duration>, is_thought_closed: bool) -> Option<Duration> {
    opens_in.filter(|rest| is_thought_closed || !rest.is_zero())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gate_that_opens_while_nobody_looks_is_looked_at_at_once() {
        let linger = Duration::from_millis(5);
        assert_eq!(look_at_gate_in(None, true), None, "whoever opens it says so");
        for is_thought_closed in [true, false] {
            assert_eq!(look_at_gate_in(Some(linger), is_thought_closed), Some(linger));
        }
        // Between the look at the gate and going to sleep.
        assert_eq!(look_at_gate_in(Some(Duration::ZERO), true), Some(Duration::ZERO));
        assert_eq!(look_at_gate_in(Some(Duration::ZERO), false), None, "it is known to be open");
    }
}
