//! The driver's workers: forked, heard, and lost.

use std::time::{Duration, Instant};

use pswitch_mem_pool::ModelId;
use pswitch_protocol::FromWorker;

use super::Driver;
use super::mail::Mail;
use crate::scheduler::{Event, ExecutionId, Outcome, WorkerId};
use crate::supervisor::Loss;

/// Workers in a row that may die while they build a model before it is given up.
const DEADLY_BUILDS: u32 = 5;

/// The engine rehearses no more often, and so often while the driver looks for what comes and nothing runs.
const REHEARSE_EVERY: Duration = Duration::from_micros(200);

/// Workers in a row that may die before they have attached to the device before the server gives up.
const UNATTACHED_DEATHS: u32 = 10;

impl Driver {
    /// Forks as many workers as are missing.
    pub(super) fn fork_missing(&mut self) {
        while self.links.len() < self.workers && !self.stopped {
            let mailbox = self.mailbox.clone();
            let lost = Box::new(move |worker, loss| {
                mailbox.put(match loss {
                    Loss::Exited(cause) => Mail::Exited { worker, cause },
                    Loss::NotForked(reason) => Mail::ForkFailed { worker, reason },
                });
            });
            let forked = self.supervisor.fork(lost).and_then(|(worker, channel)| {
                self.links.add(worker, channel, self.poll.registry(), &self.attachment, &self.models)?;
                Ok(worker)
            });
            match forked {
                Ok(worker) => {
                    self.starting.insert(worker, Instant::now());
                    self.feed(Event::WorkerStarting { worker });
                }
                Err(error) => {
                    tracing::error!(%error, "a worker cannot be forked");
                    self.links.note_loss(false, Instant::now());
                    return;
                }
            }
        }
    }

    /// Has the worker that executes next look for its order, in case it sleeps; this thread looks for mail, now that it has
    /// had some. To wake up takes both some 50 us, which pass while the inputs come.
    pub(super) fn look_out(&mut self) {
        let trains = self.gate.as_ref().is_some_and(|gate| gate.somebody_trains());
        let rehearse = self.running.is_empty() && !trains;
        if let Some(link) = self.scheduler.next_worker().and_then(|worker| self.links.get_mut(worker)) {
            link.look_out(rehearse, Instant::now());
        }
        self.rehearse();
    }

    /// Has the engine do what a transfer begins with, for nothing, unless it did a moment ago or has work. In the milliseconds
    /// since the last transfer its code and data have left the processor's caches.
    pub(super) fn rehearse(&mut self) {
        if self.rehearsed_at.elapsed() < REHEARSE_EVERY {
            return;
        }
        let is_gpu = self.device.properties().gpu.is_some();
        if is_gpu
            && self.running.is_empty()
            && let Err(error) = self.engine.rehearse()
        {
            // A transfer will fail as well, and say so to whom it concerns.
            tracing::debug!(error = &error as &dyn std::error::Error, "the engine cannot rehearse");
        }
        self.rehearsed_at = Instant::now();
    }

    /// Reads what a worker has said, to the last word.
    pub(super) fn read(&mut self, worker: WorkerId) {
        loop {
            let Some(link) = self.links.get(worker) else { return };
            match link.channel.receive::<FromWorker>() {
                Ok(Some((message, _))) => self.hear(worker, message),
                // Closed: its loss is reported when it is reaped, and until then it may still write. One that has
                // closed its connection and lives on has to go.
                Ok(None) => return self.supervisor.kill(worker),
                Err(error) if error.would_block() => return,
                Err(error) => return self.break_with(worker, &error.to_string()),
            }
        }
    }

    /// A worker that does not keep to the protocol is killed; its loss is reported when it is reaped.
    pub(super) fn break_with(&mut self, worker: WorkerId, reason: &str) {
        tracing::error!(%worker, reason, "broke the protocol and is replaced");
        self.supervisor.kill(worker);
    }

    fn hear(&mut self, worker: WorkerId, message: FromWorker) {
        let Some(link) = self.links.get_mut(worker) else { return };
        link.heard();
        match message {
            FromWorker::Attached if link.attached => self.break_with(worker, "it attached twice"),
            FromWorker::Attached => {
                link.attached = true;
                self.unattached_deaths = 0;
                self.check_ready(worker);
            }
            FromWorker::Loaded { model, error } => {
                let model = ModelId(model);
                if link.building != Some(model) {
                    return self.break_with(worker, "it built a model that it was not told to");
                }
                if let Err(reason) = link.built(model, error.is_none(), &self.models) {
                    return self.break_with(worker, &reason.to_string());
                }
                if let Some(homed) = self.models.get_mut(&model) {
                    homed.deaths = 0;
                }
                self.note_built(model, error);
                self.check_ready(worker);
            }
            FromWorker::TaskReady { .. }
            | FromWorker::TaskStep(_)
            | FromWorker::TaskSaved { .. }
            | FromWorker::TaskCopied
            | FromWorker::TaskHeld { .. }
            | FromWorker::TaskLeft { .. }
            | FromWorker::TaskPaused(_) => self.break_with(worker, "it trains, and was not told to"),
            FromWorker::Finished { execution, result, ends } => {
                let execution = ExecutionId(execution);
                match self.running.get_mut(&execution) {
                    Some(running) if running.worker == worker && running.result.is_none() => {
                        let outcome = Outcome::of(&result);
                        if outcome != Outcome::Completed {
                            self.unclear_inputs[running.arena.0 as usize] = true;
                        }
                        running.result = Some(result);
                        self.held_back.forget(worker);
                        if ends {
                            self.feed(Event::WorkerEnding { worker });
                        }
                        // The device may be at work on what failed until its worker is gone: see `lose`.
                        if !ends || outcome == Outcome::Completed {
                            self.feed(Event::ExecutionFinished { execution, outcome });
                        }
                    }
                    _ => self.break_with(worker, "it finished an execution that it does not run"),
                }
            }
        }
    }

    /// Tells the scheduler of a worker that has built everything.
    fn check_ready(&mut self, worker: WorkerId) {
        let Some(link) = self.links.get_mut(worker) else { return };
        if link.attached && link.unbuilt.is_empty() && !link.ready {
            link.ready = true;
            self.links.note_ready();
            if let Some(begin) = self.starting.remove(&worker) {
                tracing::info!(%worker, ms = begin.elapsed().as_millis(), "ready");
            }
            self.feed(Event::WorkerReady { worker });
        }
    }

    /// Answers who waits for a model to be placed: when all workers have built it, or one could not.
    pub(super) fn note_built(&mut self, model: ModelId, error: Option<String>) {
        if let Some(reason) = error {
            match self.placing.remove(&model) {
                Some(done) => drop(done.send(Err(reason))),
                None => self.withdraw(model, reason),
            }
        } else if self.links.all_built(model)
            && let Some(done) = self.placing.remove(&model)
        {
            if let Some(homed) = self.models.get_mut(&model) {
                homed.in_service = true;
            }
            let _ = done.send(Ok(()));
        }
    }

    /// Takes a model out of service that a worker could not build in another's place, as when its archive is gone: any
    /// execution may come to that worker, and it would die of it.
    fn withdraw(&mut self, model: ModelId, reason: String) {
        let Some(homed) = self.models.get(&model).filter(|homed| homed.in_service) else { return };
        tracing::error!(
            model = homed.spec.name,
            reason,
            "a new worker cannot build it: it is out of service"
        );
        let reason = format!("a new worker could not build it: {reason}; load it again");
        if homed.spec.lost.set(reason).is_ok() {
            self.feed(Event::ModelRemoved { model });
        }
    }

    pub(super) fn lose(&mut self, worker: WorkerId) {
        let link = self.links.remove(worker, self.poll.registry());
        self.starting.remove(&worker);
        self.held_back.forget(worker);
        self.links.note_loss(link.as_ref().is_some_and(|link| link.ready), Instant::now());
        if link.as_ref().is_some_and(|link| !link.attached) {
            self.unattached_deaths += 1;
            if self.unattached_deaths == UNATTACHED_DEATHS {
                tracing::error!("no worker can start on this device: {UNATTACHED_DEATHS} have died in a row");
                self.supervisor.fail();
            }
        }
        // A device that cannot start workers at all kills no model: this one had got as far as attaching.
        if let Some(model) = link.filter(|link| link.attached).and_then(|link| link.building) {
            self.note_death_over(model);
        }
        self.worker_restarts += 1;
        let mut told = Vec::new();
        for (&execution, running) in self.running.iter().filter(|(_, running)| running.worker == worker) {
            self.unclear_inputs[running.arena.0 as usize] = true;
            told.extend(running.result.as_ref().map(|result| (execution, Outcome::of(result))));
        }
        // What it had said before it ended; nothing works on that any more.
        for (execution, outcome) in told {
            self.feed(Event::ExecutionFinished { execution, outcome });
        }
        self.feed(Event::WorkerLost { worker });
        // What it executed has been answered or has begun anew elsewhere, under another number.
        self.running.retain(|_, running| running.worker != worker);
    }

    /// Gives up on a model that workers die over while they build it.
    fn note_death_over(&mut self, model: ModelId) {
        let Some(homed) = self.models.get_mut(&model) else { return };
        homed.deaths += 1;
        if homed.deaths >= DEADLY_BUILDS {
            self.note_built(model, Some(format!("{DEADLY_BUILDS} workers have died while they built it")));
        }
    }
}
