//! The server as its front ends see it.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use pswitch_mem_pool::Range;
use pswitch_protocol::{PROFILE_COSTS, monotonic_ns};
use tokio::sync::oneshot;

use super::devices::ServedDevice;
use super::model::{ServedModel, SlotLayout, datatype_of_code};
use super::{Server, profiling, training};
use crate::driver::{Finished, Job, JobTimes, Mail, Mailbox, PROFILE_ALIGNMENT_BYTES};
use crate::scheduler::RequestId;
use crate::service::{
    Answer, InferOptions, InferenceService, ModelSignature, ModelSnapshot, ModelState, ModelStatus,
    OutputTensor, PlacedTensor, ServiceError, ServiceFuture, ServiceSnapshot, Submission, TaskCommand,
    TaskStatus, TensorSpec, Timings,
};
use crate::slots::Slot;

/// Time that one run of a profile may take, queueing included.
const PROFILE_TIMEOUT: Duration = Duration::from_secs(120);

impl InferenceService for Server {
    fn is_live(&self) -> bool {
        !*self.failed.borrow()
    }

    fn is_ready(&self) -> bool {
        let working = |view: &crate::driver::DriverView| {
            view.workers.iter().any(|(state, count)| matches!(*state, "standby" | "active") && *count > 0)
        };
        self.is_live()
            && self.loaded.load(Ordering::Acquire)
            && !self.draining.load(Ordering::Acquire)
            && self.devices.iter().any(|device| device.driver.view().read(working))
    }

    fn models(&self) -> Vec<ModelStatus> {
        self.read().iter().map(|(name, registered)| registered.status(name)).collect()
    }

    fn model(&self, name: &str, version: Option<&str>) -> Result<ModelStatus, ServiceError> {
        let status =
            self.status_of(name).ok_or_else(|| ServiceError::UnknownModel { model: name.to_owned() })?;
        status.of_version(version)
    }

    fn signature(&self, name: &str, version: Option<&str>) -> Result<Arc<ModelSignature>, ServiceError> {
        self.served(name, version).map(|served| Arc::clone(&served.signature))
    }

    fn reserve(
        &self,
        name: &str,
        version: Option<&str>,
        inputs: &[TensorSpec],
    ) -> Result<Submission, ServiceError> {
        if self.draining.load(Ordering::Acquire) {
            return Err(ServiceError::Draining);
        }
        let served = self.served(name, version)?;
        let SlotLayout { inputs, bytes, .. } = served.lay_out(inputs, self.least_copy_bytes())?;
        let submission = Submission::new(name, inputs, self.slots.reserve(bytes)?)?;
        self.devices[self.route(&served)].driver.announce();
        Ok(submission)
    }

    fn infer(&self, submission: Submission, options: InferOptions) -> ServiceFuture<'_, Answer> {
        Box::pin(async move {
            let (name, placed, slot) = submission.into_parts()?;
            let served = self.served(&name, None)?;
            let specs: Vec<TensorSpec> = placed.iter().map(|placed| placed.spec.clone()).collect();
            let layout = served.lay_out(&specs, self.least_copy_bytes())?;
            if layout.inputs != placed || layout.bytes > slot.bytes() {
                // Loaded anew, with another signature, while the request came in.
                let reason = "it was loaded anew while the request came in; send it again".to_owned();
                return Err(ServiceError::ModelUnavailable { model: name, reason });
            }
            let inputs = served.job_inputs(&placed, &slot)?;
            let own = served.settings.deadline.unwrap_or(self.config.limits.request_timeout);
            let latest = Instant::now() + own;
            let (answer, answered) = oneshot::channel();
            let job = Job {
                request: self.next_request(),
                model: served.spec.id,
                inputs,
                outputs: layout.outputs,
                profile: None,
                slot,
                deadline: Some(options.deadline.map_or(latest, |deadline| deadline.min(latest))),
                submitted_ns: monotonic_ns(),
                answer,
            };
            let finished = self.run(self.route(&served), job, answered).await?;
            answer_of(&served, finished)
        })
    }

    fn load(&self, name: &str) -> ServiceFuture<'_, ()> {
        let name = name.to_owned();
        Box::pin(async move {
            // Loading goes on when the client is gone: a model half loaded helps nobody.
            let task = tokio::spawn(self.this()?.reload(name));
            task.await.map_err(|error| ServiceError::Internal { message: error.to_string() })?
        })
    }

    fn unload(&self, name: &str) -> ServiceFuture<'_, ()> {
        let name = name.to_owned();
        Box::pin(async move {
            self.model(&name, None)?;
            let server = self.this()?;
            let task = tokio::spawn(async move { server.retire(&name, ModelState::Unavailable).await });
            task.await.map_err(|error| ServiceError::Internal { message: error.to_string() })?
        })
    }

    fn submit_training(&self, name: &str, config: &str) -> ServiceFuture<'_, TaskStatus> {
        let (name, config) = (name.to_owned(), training::parse(config));
        Box::pin(async move { self.take_task(&name, config?).await })
    }

    fn training(&self) -> Vec<TaskStatus> {
        self.tasks()
    }

    fn command_training(&self, name: &str, command: TaskCommand) -> ServiceFuture<'_, TaskStatus> {
        let name = name.to_owned();
        Box::pin(async move { self.command_task(&name, command).await })
    }

    fn snapshot(&self) -> ServiceSnapshot {
        let mut snapshot = ServiceSnapshot {
            slot_bytes: self.slots.capacity_bytes(),
            slot_in_use_bytes: self.slots.in_use_bytes(),
            ..ServiceSnapshot::default()
        };
        let views: Vec<_> = self.devices.iter().map(|device| device.driver.view().get()).collect();
        for (device, view) in self.devices.iter().zip(&views) {
            snapshot.pool_bytes += device.pool_bytes;
            snapshot.pool_resident_bytes += view.resident_bytes;
            snapshot.worker_restarts += view.worker_restarts;
            snapshot.transferred_bytes += view.transferred_bytes;
            // A device that cannot tell is in no state to be measured.
            snapshot.device_free_bytes += device.device.free_bytes().unwrap_or(0);
            snapshot.outside_bytes += view.outside.bytes;
            snapshot.outside_allocations += view.outside.allocations;
            snapshot.graphs += view.outside.graphs;
            for &(state, count) in &view.workers {
                match snapshot.workers.iter_mut().find(|(name, _)| *name == state) {
                    Some((_, sum)) => *sum += count as u64,
                    None => snapshot.workers.push((state, count as u64)),
                }
            }
        }
        for (name, registered) in self.read().iter() {
            let Some(served) = &registered.served else { continue };
            let id = served.spec.id;
            snapshot.models.push(ModelSnapshot {
                name: name.clone(),
                queued: views.iter().map(|view| view.queued.get(&id).copied().unwrap_or(0) as u64).sum(),
                resident: views.iter().any(|view| view.resident.contains(&id)),
                span_bytes: served.spec.span_bytes,
                evictions: views.iter().map(|view| view.evictions.get(&id).copied().unwrap_or(0)).sum(),
            });
        }
        snapshot
    }
}

impl Server {
    pub(super) fn served(&self, name: &str, version: Option<&str>) -> Result<Arc<ServedModel>, ServiceError> {
        let status = self.model(name, version)?;
        let served = self.read().get(name).and_then(|registered| registered.served.clone());
        served.filter(|_| status.state == ModelState::Ready).ok_or_else(|| ServiceError::ModelUnavailable {
            model: status.name,
            reason: if status.reason.is_empty() { status.state.name().to_lowercase() } else { status.reason },
        })
    }

    /// The shortest copy of inputs, to any of the devices.
    fn least_copy_bytes(&self) -> u64 {
        let of = |device: &ServedDevice| device.device.properties().least_copy_bytes;
        self.devices.iter().map(of).max().unwrap_or(0)
    }

    fn next_request(&self) -> RequestId {
        RequestId(self.next_request.fetch_add(1, Ordering::Relaxed))
    }

    /// The device for a request: the least busy, where a switch counts as two requests that wait.
    fn route(&self, served: &ServedModel) -> usize {
        let load = |index: usize| {
            self.devices[index].driver.view().read(|view| {
                let waiting = view.queued.values().sum::<usize>() + view.executing;
                waiting + if view.resident.contains(&served.spec.id) { 0 } else { 2 }
            })
        };
        served.devices.iter().copied().min_by_key(|&index| load(index)).unwrap_or(0)
    }

    /// Hands a job to a driver and waits for its end; dropping the future cancels it.
    async fn run(
        &self,
        device: usize,
        job: Job,
        answered: oneshot::Receiver<Result<Finished, ServiceError>>,
    ) -> Result<Finished, ServiceError> {
        let mailbox = self.devices[device].driver.mailbox();
        let mut cancel = CancelOnDrop { mailbox, request: Some(job.request) };
        mailbox.put(Mail::Submit(Box::new(job)));
        let result = answered.await;
        cancel.request = None;
        result.unwrap_or(Err(ServiceError::Draining))
    }

    /// The times of a model's layers on a device, run by run; the first run, which warms up, is left out.
    pub(super) async fn time_layers(
        &self,
        served: &ServedModel,
        device: usize,
    ) -> Result<Vec<Vec<f32>>, ServiceError> {
        let inputs = served.example_inputs();
        let layout = served.lay_out(&inputs, self.least_copy_bytes())?;
        let times = Range::new(
            layout.bytes.next_multiple_of(PROFILE_ALIGNMENT_BYTES),
            4 * (served.spec.layers.len() as u64 + PROFILE_COSTS),
        );
        let mut runs = Vec::with_capacity(profiling::RUNS);
        for run in 0..=profiling::RUNS {
            let mut slot = self.slots.reserve(times.end())?;
            for input in &layout.inputs {
                let rows = served.rows(&input.spec.name);
                fill(&mut slot, input, &profiling::example_values(input.spec.datatype, rows))?;
            }
            let (answer, answered) = oneshot::channel();
            let job = Job {
                request: self.next_request(),
                model: served.spec.id,
                inputs: served.job_inputs(&layout.inputs, &slot)?,
                outputs: layout.outputs,
                profile: Some(times),
                slot,
                deadline: Some(Instant::now() + PROFILE_TIMEOUT),
                submitted_ns: monotonic_ns(),
                answer,
            };
            let finished = self.run(device, job, answered).await?;
            if run > 0 {
                let place = finished.profile.unwrap_or(times);
                let mut bytes = vec![0; usize::try_from(times.bytes).unwrap_or(0)];
                finished.slot.read(place.offset, &mut bytes)?;
                let (words, _) = bytes.as_chunks::<4>();
                runs.push(words.iter().map(|word| f32::from_le_bytes(*word)).collect());
            }
        }
        Ok(runs)
    }
}

/// Writes a block again and again; slots come with what the request before left in them.
fn fill(slot: &mut Slot, input: &PlacedTensor, block: &[u8]) -> Result<(), ServiceError> {
    let mut done = 0;
    while done < input.bytes {
        let step = (input.bytes - done).min(block.len() as u64);
        // At most the length of the block.
        #[allow(clippy::cast_possible_truncation)]
        slot.write(input.offset_bytes + done, &block[..step as usize])?;
        done += step;
    }
    Ok(())
}

struct CancelOnDrop<'a> {
    mailbox: &'a Mailbox,
    request: Option<RequestId>,
}

impl Drop for CancelOnDrop<'_> {
    fn drop(&mut self) {
        if let Some(request) = self.request {
            self.mailbox.put(Mail::Cancel(request));
        }
    }
}

fn answer_of(served: &ServedModel, finished: Finished) -> Result<Answer, ServiceError> {
    let Finished { slot, outputs, times, .. } = finished;
    let internal = |message: String| ServiceError::Internal { message };
    if outputs.len() != served.signature.outputs.len() {
        return Err(internal(format!(
            "{} outputs came, {} were due",
            outputs.len(),
            served.signature.outputs.len()
        )));
    }
    let begin = slot.offset_bytes();
    let slot = slot.freeze();
    let outputs = outputs
        .into_iter()
        .zip(&served.signature.outputs)
        .map(|(output, signature)| {
            let datatype = datatype_of_code(output.dtype).ok_or_else(|| {
                internal(format!("output '{}' has type code {}", signature.name, output.dtype))
            })?;
            let offset = output
                .at
                .offset
                .checked_sub(begin)
                .ok_or_else(|| internal("an output outside".to_owned()))?;
            let spec = TensorSpec { name: signature.name.clone(), datatype, shape: output.shape };
            Ok(OutputTensor { spec, data: slot.view(offset, output.at.bytes)? })
        })
        .collect::<Result<Vec<_>, ServiceError>>()?;
    let timings = timings(&times);
    tracing::debug!(
        model = served.spec.name,
        queue_us = timings.queue.as_micros(),
        switch_us = timings.switch.as_micros(),
        compute_us = timings.compute.as_micros(),
        computed_us = times.finished_ns.saturating_sub(times.first_layer_ns) / 1000,
        stalled_us = times.waited_ns / 1000,
        switched = timings.switched,
        "done"
    );
    Ok(Answer { outputs, timings })
}

fn timings(times: &JobTimes) -> Timings {
    let between = |from: u64, to: u64| Duration::from_nanos(to.saturating_sub(from));
    let (switch, compute_from) = if times.switched {
        (between(times.decided_ns, times.first_layer_ns), times.first_layer_ns)
    } else {
        (Duration::ZERO, times.decided_ns)
    };
    Timings {
        queue: between(times.submitted_ns, times.decided_ns),
        switch,
        compute: between(compute_from, times.finished_ns),
        switched: times.switched,
    }
}
