//! What the driver does for each of the scheduler's actions.

use std::time::Duration;

use pswitch_device::{DeviceSlice, doorbell};
use pswitch_mem_pool::{ArenaDivision, ArenaId, ModelId, Residency};
use pswitch_protocol::{
    Execute, ExecutionFault, FaultClass, InputValue, PlacedTensor, Region, ToWorker, monotonic_ns,
};
use pswitch_transfer::{CopyIn, Transfer, TransferId};

use super::inputs::{InputCopy, joined};
use super::refusal::service_error;
use super::{Driver, Finished, JobInput, JobTimes, ModelSpec, Running};
use crate::scheduler::{Action, Event, ExecutionId, Load, Outcome, Rejection, RequestId, WorkerId};
use crate::service::ServiceError;
use crate::training::{MadeRoom, Room, Unused};

/// Inputs that take longer to cross a link than a worker to launch.
const LONG_INPUTS_BYTES: u64 = 1 << 20;

/// The parts of [`Action::Execute`].
struct Dispatch {
    execution: ExecutionId,
    request: RequestId,
    worker: WorkerId,
    model: ModelId,
    arena: ArenaId,
    transfer: TransferId,
    load: Option<Load>,
}

impl Driver {
    pub(super) fn perform(&mut self, action: Action) {
        match action {
            Action::Execute { execution, request, worker, model, arena, transfer, load } => {
                let dispatch = Dispatch { execution, request, worker, model, arena, transfer, load };
                self.execute(&dispatch);
            }
            Action::Prefetch { transfer, model, load } => {
                let mut prefetch = Transfer::new(transfer);
                // For whoever comes: most requests read tables from the host.
                let loaded =
                    self.lay(model, &load).and_then(|()| self.load(&mut prefetch, model, &load, true, None));
                let start = || self.engine.start(prefetch).map_err(|error| error.to_string());
                if let Err(reason) = loaded.and_then(|()| start()) {
                    self.refuse_transfer(transfer, reason);
                }
            }
            Action::Poison { model } => self.set_doorbells(model, doorbell::POISONED),
            Action::Clear { models } => {
                for model in models {
                    self.set_doorbells(model, doorbell::CLEAR);
                }
            }
            Action::PoisonInputs { execution } => {
                if let Some(arena) = self.running.get(&execution).map(|running| running.arena) {
                    // The worker may have cleared it already and never see the poison.
                    self.unclear_inputs[arena.0 as usize] = true;
                    self.set_input_doorbell(arena, doorbell::POISONED);
                }
            }
            Action::Stop { execution } => {
                if let Some(running) = self.running.get(&execution) {
                    self.links.set_stop(running.worker, true);
                }
            }
            Action::Kill { worker } => {
                tracing::error!(%worker, "did not stop in time and is killed");
                self.supervisor.kill(worker);
            }
            Action::Reply { request, result } => self.reply(request, result),
            Action::Forget { model } => self.forget(model),
            Action::BringBack { transfer, load } => {
                if let Err(reason) = self.bring_back(transfer, &load) {
                    self.refuse_transfer(transfer, reason);
                }
            }
            Action::AdmitTraining => self.room.iter().for_each(Room::admit),
            Action::RefuseTraining => self.room.iter().for_each(Room::refuse),
        }
    }

    /// Tells the worker to run and starts the transfer of the inputs, and behind them of the weights if they must come.
    fn execute(&mut self, dispatch: &Dispatch) {
        let decided_ns = monotonic_ns();
        let running = Running {
            request: dispatch.request,
            worker: dispatch.worker,
            arena: dispatch.arena,
            decided_ns,
            // Also by a prefetch that is still under way.
            switched: self.scheduler.ledger().state(dispatch.model) == Ok(Residency::Moving),
            result: None,
        };
        self.running.insert(dispatch.execution, running);
        if self.unclear_inputs[dispatch.arena.0 as usize] {
            self.set_input_doorbell(dispatch.arena, doorbell::CLEAR);
            self.unclear_inputs[dispatch.arena.0 as usize] = false;
        }
        self.links.set_stop(dispatch.worker, false);
        self.hold_back(dispatch.execution, dispatch.worker);
        let (execution, transfer) = (dispatch.execution, dispatch.transfer);
        let laid = dispatch.load.as_ref().map_or(Ok(()), |load| self.lay(dispatch.model, load));
        match laid.and_then(|()| self.prepare(dispatch)) {
            Ok((message, prepared)) => {
                let prepared_ns = monotonic_ns();
                let tell = || {
                    let from_ns = monotonic_ns();
                    let link = self.links.get(dispatch.worker);
                    let sent = link.map_or(Ok(()), |link| link.channel.send(&message, &[]));
                    tracing::debug!(%execution, from_ns, to_ns = monotonic_ns(), "told");
                    sent
                };
                let input_bytes: u64 = prepared.inputs.iter().map(|copy| copy.from.bytes()).sum();
                // Whoever takes longer goes first: the worker to launch, and to wake up if it sleeps, or what it waits for to
                // cross the link.
                let is_asleep = self.attachment.spin.is_zero();
                let launches_longer =
                    input_bytes < LONG_INPUTS_BYTES && (prepared.groups.is_empty() || is_asleep);
                let (told, started) = if launches_longer {
                    (Some(tell()), self.engine.start(prepared))
                } else {
                    let mut told = None;
                    let started = self.engine.start_and(prepared, || told = Some(tell()));
                    (told, started)
                };
                let is_told = told.is_some();
                tracing::debug!(
                    %execution,
                    transfer = transfer.0,
                    decided_ns,
                    prepared_ns,
                    enqueued_ns = monotonic_ns(),
                    "enqueued"
                );
                if let Some(Err(error)) = told {
                    // It is gone or does not read: its loss answers the request or has it tried again.
                    self.break_with(dispatch.worker, &error.to_string());
                }
                if let Err(error) = started {
                    let reason = error.to_string();
                    self.refuse_transfer(transfer, reason.clone());
                    if !is_told {
                        self.end_untold(execution, reason);
                    }
                }
            }
            Err(reason) => {
                // Nobody was told anything: neither transfer nor worker would ever report.
                self.refuse_transfer(transfer, reason.clone());
                self.end_untold(execution, reason);
            }
        }
    }

    /// Reports that a transfer did not begin.
    fn refuse_transfer(&mut self, transfer: TransferId, reason: String) {
        self.room.iter().for_each(|room| room.states.refused(transfer));
        self.pending.push_back(Event::TransferFailed { transfer, reason });
    }

    /// Reports the end of an execution that no worker was told of.
    fn end_untold(&mut self, execution: ExecutionId, reason: String) {
        let fault = ExecutionFault { class: FaultClass::Transfer, message: reason };
        self.pending.push_back(Event::ExecutionFinished { execution, outcome: Outcome::Failed(fault) });
    }

    /// The message and the transfer of an execution.
    fn prepare(&self, dispatch: &Dispatch) -> Result<(ToWorker, Transfer), String> {
        let text = |error: &dyn std::error::Error| error.to_string();
        let job = self.jobs.get(&dispatch.request).ok_or("the request is gone")?;
        let arena = self.pool.layout().arenas[dispatch.arena.0 as usize];
        let division = ArenaDivision::new(arena, job.tensor_bytes()).map_err(|error| text(&error))?;
        let mut places = division.inputs.into_iter();
        let input_doorbell = self.pool.slice(division.doorbell).map_err(|error| text(&error))?;
        let mut transfer = Transfer::new(dispatch.transfer);
        let mut inputs = Vec::with_capacity(job.inputs.len());
        let mut copies = Vec::with_capacity(job.inputs.len());
        for input in &job.inputs {
            inputs.push(match input {
                JobInput::Tensor { dtype, shape, at } => {
                    let place = places.next().ok_or("an input has no place")?;
                    copies.push(InputCopy { from: *at, to: place });
                    let at = Region { offset: place.offset, bytes: place.bytes };
                    InputValue::Tensor(PlacedTensor { dtype: *dtype, shape: shape.clone(), at })
                }
                JobInput::Integer(value) => InputValue::Integer(*value),
            });
        }
        let least_bytes = self.device.properties().least_copy_bytes;
        for copy in joined(copies, least_bytes, job.slot.bytes(), division.doorbell.offset) {
            let from = self.slot_slice(job, copy.from).map_err(|error| text(&error))?;
            let to = self.pool.slice(copy.to).map_err(|error| text(&error))?;
            transfer.inputs.push(CopyIn { from, to });
        }
        let homed = self.models.get(&dispatch.model).ok_or("the model is gone")?;
        let host_tables = homed.reads_host_tables(job.tensor_bytes().sum());
        let in_slot = |range: pswitch_mem_pool::Range| Region {
            offset: job.slot.offset_bytes() + range.offset,
            bytes: range.bytes,
        };
        let message = ToWorker::Execute(Execute {
            execution: dispatch.execution.0,
            model: dispatch.model.0,
            inputs,
            input_doorbell: input_doorbell.offset(),
            home: homed.place.offset,
            arena: Region { offset: division.activations.offset, bytes: division.activations.bytes },
            resident: self.scheduler.ledger().state(dispatch.model) == Ok(Residency::Resident),
            held_back: self.held_back.holds(dispatch.worker, dispatch.execution),
            host_tables,
            outputs: in_slot(job.outputs),
            profile: job.profile.map(in_slot),
            doorbell_timeout_ms: u64::try_from(self.doorbell_timeout(dispatch.model).as_millis())
                .unwrap_or(u64::MAX),
        });
        transfer.input_doorbell = Some(input_doorbell);
        if let Some(load) = &dispatch.load {
            // No model lies there but this one, and nothing of a step is used any more.
            let unused = load.evicted.contains(&ModelId::TRAINING).then(|| Unused {
                range: self.pool.layout().training,
                least_bytes: self.device.properties().least_copy_within_bytes,
            });
            self.load(&mut transfer, dispatch.model, load, host_tables, unused)?;
        }
        Ok((message, transfer))
    }

    /// Has a model's weights go where a load says.
    fn lay(&mut self, model: ModelId, load: &Load) -> Result<(), String> {
        let Some(homed) = self.models.get_mut(&model) else { return Ok(()) };
        homed.lie_at(load.place, &self.pool).map_err(|error| error.to_string())
    }

    /// Adds a model's weights to a transfer, and what makes room for them. State goes to what is `unused` if it may: on a GPU
    /// that takes the compute engine, which is for requests to have and not for weights that come in advance.
    fn load(
        &self,
        transfer: &mut Transfer,
        model: ModelId,
        load: &Load,
        host_tables: bool,
        unused: Option<Unused>,
    ) -> Result<(), String> {
        transfer.clear = self.used_doorbells(&load.evicted);
        let Some(homed) = self.models.get(&model) else { return Ok(()) };
        transfer.groups.extend(homed.load(host_tables).cloned());
        if let Some(room) = &self.room {
            let made = room.states.make_room(transfer.id, homed.place, unused);
            let MadeRoom { save, set_aside } = made.map_err(|error| error.to_string())?;
            (transfer.save, transfer.set_aside) = (save, set_aside);
        }
        Ok(())
    }

    /// Starts the way back of all states that made room.
    fn bring_back(&self, id: TransferId, load: &Load) -> Result<(), String> {
        let room = self.room.as_ref().ok_or("nothing gives way here")?;
        let clear = self.used_doorbells(&load.evicted);
        let back = room.states.bring_back(id, clear).map_err(|error| error.to_string())?;
        self.engine.bring_back(back).map_err(|error| error.to_string())
    }

    /// What has to be cleared before models that are evicted may come back.
    fn used_doorbells(&self, evicted: &[ModelId]) -> Vec<DeviceSlice> {
        let homed = evicted.iter().filter_map(|model| self.models.get(model));
        homed.filter_map(|homed| homed.used_doorbells.clone()).collect()
    }

    /// How long a worker waits for weights: longer than an execution may take, so that it is told to stop first.
    fn doorbell_timeout(&self, model: ModelId) -> Duration {
        let own = self.models.get(&model).and_then(|homed| homed.spec.limits.execution_timeout);
        own.unwrap_or(self.options.execution_timeout) + self.options.stop_grace
    }

    fn set_doorbells(&self, model: ModelId, value: u32) {
        let Some(homed) = self.models.get(&model) else { return };
        let words: Vec<_> = homed.used_doorbells.iter().flat_map(|range| range.words()).collect();
        if let Err(error) = self.device.set_words(&words, value) {
            tracing::error!(%model, %error, "doorbells cannot be set");
        }
    }

    fn set_input_doorbell(&self, arena: ArenaId, value: u32) {
        let place = ArenaDivision::doorbell_of(self.pool.layout().arenas[arena.0 as usize]);
        let set = self
            .pool
            .slice(place)
            .map_err(|error| error.to_string())
            .and_then(|word| self.device.set_word(&word, value).map_err(|error| error.to_string()));
        if let Err(error) = set {
            tracing::error!(%arena, error, "an input doorbell cannot be set");
        }
    }

    /// Answers a request, unless its outputs need more room than they had: then it runs once more.
    fn reply(&mut self, request: RequestId, result: Result<(), Rejection>) {
        let execution = self
            .running
            .iter()
            .find_map(|(&execution, running)| (running.request == request).then_some(execution));
        let running = execution.and_then(|execution| self.running.remove(&execution));
        let Some(mut job) = self.jobs.remove(&request) else { return };
        if let Err(Rejection::ExecutionFailed(ExecutionFault {
            class: FaultClass::OutputsTooLarge { needed_bytes },
            ..
        })) = result
        {
            match job.grow_outputs(needed_bytes) {
                Ok(()) => {
                    let event = Event::Resubmitted { request, model: job.model, deadline: job.deadline };
                    self.jobs.insert(request, job);
                    self.pending.push_back(event);
                }
                Err(error) => drop(job.answer.send(Err(error))),
            }
            return;
        }
        let answer = match (result, running.as_ref().and_then(|running| running.result.clone())) {
            (Ok(()), Some(Ok(executed))) => {
                let decided_ns = running.as_ref().map_or(0, |running| running.decided_ns);
                let times = JobTimes {
                    submitted_ns: job.submitted_ns,
                    decided_ns,
                    first_layer_ns: executed.first_layer_ns,
                    finished_ns: executed.finished_ns,
                    waited_ns: executed.waited_ns,
                    switched: running.is_some_and(|running| running.switched),
                };
                Ok(Finished { slot: job.slot, outputs: executed.outputs, profile: job.profile, times })
            }
            (Ok(()), _) => {
                Err(ServiceError::Internal { message: "an answer without an execution".to_owned() })
            }
            (Err(rejection), _) => Err(self.refusal(job.model, job.submitted_ns, rejection)),
        };
        // Whoever asked may have gone; the slot is free again either way.
        let _ = job.answer.send(answer);
    }

    fn refusal(&self, model: ModelId, submitted_ns: u64, rejection: Rejection) -> ServiceError {
        let waited = Duration::from_nanos(monotonic_ns().saturating_sub(submitted_ns));
        match self.models.get(&model).map(|homed| &*homed.spec) {
            Some(ModelSpec { name, lost, .. }) => match (rejection, lost.get()) {
                (Rejection::ModelRemoved, Some(reason)) => {
                    ServiceError::ModelUnavailable { model: name.clone(), reason: reason.clone() }
                }
                (rejection, _) => service_error(rejection, name, waited),
            },
            None => service_error(rejection, &model.to_string(), waited),
        }
    }

    fn forget(&mut self, model: ModelId) {
        // Whoever gets these words next expects them clear.
        self.set_doorbells(model, doorbell::CLEAR);
        self.models.remove(&model);
        self.plans.remove(&model);
        for (_, link) in self.links.iter_mut() {
            // A worker that cannot be told is lost anyway.
            let _ = link.channel.send(&ToWorker::Unload { model: model.0 }, &[]);
        }
        if let Some(done) = self.removing.remove(&model) {
            let _ = done.send(());
        }
    }
}
