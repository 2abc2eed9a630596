//! The workers of training tasks: started, told, heard, and lost.

use std::time::{Duration, Instant};

use pswitch_protocol::{FromWorker, TaskPause, ToWorker, control, monotonic_ns};

use super::super::book::{TaskEvent, TaskId};
use super::super::{MOST_TASKS, Mail, worker};
use super::{Host, Record, YIELD_TIMEOUT};
use crate::scheduler::WorkerId;
use crate::service::CheckpointStatus;
use crate::supervisor::Loss;

/// After so long a worker that could not be started is tried again.
const RETRY: Duration = Duration::from_millis(200);

/// Time that a worker has to attach, and to prepare a task.
const STARTUP_TIMEOUT: Duration = Duration::from_secs(300);

/// Messages of a worker that are read before others have their turn.
const MOST_MESSAGES: usize = 16;

impl Host {
    pub(super) fn start(&mut self, id: TaskId) {
        let taken: Vec<u64> =
            self.tasks.values().filter_map(|record| Some(record.worker.as_ref()?.block)).collect();
        let Some(record) = self.tasks.get_mut(&id) else { return };
        let mut blocks = (0..MOST_TASKS).map(|block| block * control::BLOCK_BYTES);
        let block = blocks.find(|block| !taken.contains(block)).unwrap_or(0);
        self.attachment.wipe(block);
        let mailbox = self.mailbox.clone();
        let lost = Box::new(move |worker, loss| {
            let cause = match loss {
                Loss::Exited(cause) => cause.to_string(),
                Loss::NotForked(reason) => reason,
            };
            mailbox.put(Mail::Lost(worker, cause));
        });
        let (registry, deterministic) = (self.poll.registry(), record.config.deterministic);
        match self.attachment.start(&self.supervisor, lost, block, registry, deterministic) {
            Ok(worker) => {
                record.worker = Some(worker);
                record.deadline = Some(Instant::now() + STARTUP_TIMEOUT);
            }
            // Not at once: what is wrong now may be better in a while, and other actions are to be done first.
            Err(reason) => self.unstarted.push((Instant::now() + RETRY, id, reason)),
        }
    }

    pub(super) fn prepare(&mut self, id: TaskId) {
        let Some(record) = self.tasks.get(&id) else { return };
        let (Some(worker), Some(state)) = (&record.worker, record.state) else { return };
        let sent = match worker::prepare(&record.name, &record.config, record.digest, state) {
            Ok(order) => worker.send(&ToWorker::PrepareTask(order)),
            Err(reason) => {
                tracing::error!(task = record.name, reason, "cannot be told to a worker");
                false
            }
        };
        if let (Some(states), Some(saved)) = (self.places.states(), &record.saved) {
            states.add(state, saved.clone());
        }
        self.set_deadline(id, Some(STARTUP_TIMEOUT));
        self.check_sent(id, sent);
    }

    fn task_of(&self, worker: WorkerId) -> Option<TaskId> {
        let is_its = |record: &Record| record.worker.as_ref().is_some_and(|known| known.id == worker);
        self.tasks.iter().find(|(_, record)| is_its(record)).map(|(&id, _)| id)
    }

    /// Reads some of what a worker has said; the rest comes behind what others want.
    pub(super) fn read(&mut self, worker: WorkerId) {
        for _ in 0..MOST_MESSAGES {
            let Some(id) = self.task_of(worker) else { return };
            let Some(known) = self.worker(id) else { return };
            match known.receive() {
                Ok(Some(message)) => self.hear(id, message),
                Ok(None) => return,
                Err(reason) => {
                    tracing::error!(%worker, reason, "broke with training and is ended");
                    return self.supervisor.kill(worker);
                }
            }
        }
        self.unread.insert(worker);
    }

    pub(super) fn set_deadline(&mut self, id: TaskId, within: Option<Duration>) {
        if let Some(record) = self.tasks.get_mut(&id) {
            record.deadline = within.map(|within| Instant::now() + within);
        }
    }

    /// It has done what it had so long for. One that is over still has to end.
    fn clear_deadline(&mut self, id: TaskId) {
        if !self.book.is_over(id) {
            self.set_deadline(id, None);
        }
    }

    /// Kills workers that do not come to an end with what they were told.
    pub(super) fn kill_hung(&mut self) {
        let now = Instant::now();
        let is_late = |record: &Record| record.deadline.is_some_and(|deadline| deadline <= now);
        let late: Vec<TaskId> =
            self.tasks.iter().filter(|(_, record)| is_late(record)).map(|(&id, _)| id).collect();
        for id in late {
            self.set_deadline(id, None);
            if self.book.could_end(id) {
                self.feed(id, TaskEvent::Stuck);
            } else if let Some(record) = self.tasks.get(&id)
                && let Some(worker) = &record.worker
            {
                if self.book.is_over(id) {
                    tracing::warn!(task = record.name, worker = %worker.id, "has not ended in time and is killed");
                } else {
                    tracing::error!(task = record.name, worker = %worker.id, "hangs and is killed");
                }
                self.supervisor.kill(worker.id);
            }
        }
    }

    /// Tells of workers that could not be started, when it is time to try again.
    pub(super) fn retry(&mut self) {
        let now = Instant::now();
        let (due, later) = std::mem::take(&mut self.unstarted).into_iter().partition(|(due, ..)| *due <= now);
        self.unstarted = later;
        let due: Vec<(Instant, TaskId, String)> = due;
        for (_, id, reason) in due {
            self.feed(id, TaskEvent::Lost(reason));
        }
    }

    fn hear(&mut self, id: TaskId, message: FromWorker) {
        match message {
            FromWorker::Attached => {
                self.clear_deadline(id);
                self.feed(id, TaskEvent::Attached);
            }
            FromWorker::TaskReady { result } => {
                self.clear_deadline(id);
                if let (Ok(extent), Some(record)) = (&result, self.tasks.get(&id)) {
                    tracing::info!(
                        task = record.name,
                        done = extent.steps_done,
                        steps = extent.total_steps,
                        "training task prepared"
                    );
                }
                self.feed(id, TaskEvent::Ready(result));
            }
            FromWorker::TaskStep(step) => {
                if self.book.trains(id) {
                    self.set_deadline(id, None);
                }
                if let Some(record) = self.tasks.get_mut(&id) {
                    record.peak_bytes = record.peak_bytes.max(step.peak_bytes);
                }
                self.feed(id, TaskEvent::Step(step));
                self.log(id, step.step + 1);
            }
            FromWorker::TaskSaved { step, result } => {
                let Some(record) = self.tasks.get_mut(&id) else { return };
                let written = result.is_ok();
                match result {
                    Ok(path) => {
                        record.checkpoint = Some(CheckpointStatus { step, path: path.into() });
                        record.checkpoint_error.clear();
                    }
                    Err(reason) => {
                        tracing::warn!(task = record.name, step, reason, "no checkpoint was written");
                        record.checkpoint_error = reason;
                    }
                }
                self.feed(id, TaskEvent::Saved { step, written });
                let is_writing = self.book.is_writing(id);
                if let Some(record) = self.tasks.get_mut(&id) {
                    record.end_if_spoilt(&self.supervisor, is_writing);
                }
            }
            FromWorker::TaskCopied => {
                self.clear_deadline(id);
                self.feed(id, TaskEvent::Copied);
            }
            FromWorker::TaskHeld { at_ns } => {
                // One who is to end by now still has to.
                if self.book.could_end(id) {
                    self.set_deadline(id, None);
                }
                self.note_yield(id, at_ns);
                self.feed(id, TaskEvent::Held);
            }
            FromWorker::TaskLeft { at_ns } => {
                self.spins_until = Instant::now();
                // It has to say as well that it has tidied up.
                self.set_deadline(id, Some(YIELD_TIMEOUT));
                self.note_yield(id, at_ns);
                self.feed(id, TaskEvent::Left);
            }
            FromWorker::TaskPaused(pause) => {
                self.spins_until = Instant::now();
                self.gate.vacate();
                self.clear_deadline(id);
                // A step that was thrown away has been left before.
                if let TaskPause::Stopped { at_ns, discarded_ns: None } = pause {
                    self.note_yield(id, at_ns);
                }
                let has_finished = pause == TaskPause::Finished;
                self.feed(id, TaskEvent::Paused(pause));
                if has_finished {
                    self.forget_state(id);
                }
            }
            FromWorker::Loaded { .. } | FromWorker::Finished { .. } => {
                if let Some(worker) = self.worker(id) {
                    self.supervisor.kill(worker.id);
                }
            }
        }
    }

    /// What lies in a task's place makes no room any more: nobody wants it.
    fn forget_state(&mut self, id: TaskId) {
        if let (Some(states), Some(record)) = (self.places.states(), self.tasks.get_mut(&id))
            && let Some(state) = record.state
        {
            record.made_room += states.view(state).1;
            states.remove(state);
        }
    }

    /// Keeps how long a task has computed since requests took the device, if it gives way to them. They may be over by now.
    fn note_yield(&mut self, id: TaskId, at_ns: u64) {
        let gives_way = self.is_closed() && self.book.gives_way(id);
        // One that stood still already did so before.
        let nanos = at_ns.saturating_sub(self.gate.closed_ns());
        if let Some(record) = self.tasks.get_mut(&id)
            && gives_way
        {
            record.last_yield_us = Some(nanos / 1000);
            let heard_ns = monotonic_ns();
            tracing::debug!(task = record.name, at_ns, heard_ns, yield_us = nanos / 1000, "gave way");
        }
    }

    pub(super) fn lose(&mut self, worker: WorkerId, cause: String) {
        let Some(id) = self.task_of(worker) else { return };
        let is_over = self.book.is_over(id);
        if let Some(record) = self.tasks.get_mut(&id) {
            record.deadline = None;
            record.is_spoilt = false;
            if let Some(mut gone) = record.worker.take() {
                gone.deregister(self.poll.registry());
            }
            if !is_over {
                tracing::error!(task = record.name, %worker, cause, "the worker of a training task is lost");
            }
        }
        self.forget_state(id);
        if self.book.is_under_way(id) {
            self.gate.vacate();
        }
        if is_over {
            self.free(id);
        } else {
            self.feed(id, TaskEvent::Lost(cause));
        }
    }
}
