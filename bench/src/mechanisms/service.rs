//! A mechanism behind the front end that pswitch has: whoever asks cannot tell them apart.

use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, anyhow};
use pswitch_controller::{
    Answer, InferOptions, InferenceService, ModelSignature, ModelState, ModelStatus, OutputTensor,
    PlacedTensor, ServiceError, ServiceFuture, ServiceSnapshot, Slot, Submission, TensorSpec, Timings,
};
use pswitch_protocol::{Executed, monotonic_ns};
use tokio::sync::oneshot;

use super::desk::{Desk, Request};
use crate::subject::Subject;

/// How often a mechanism looks at what its processes have said, when nobody asks anything of it.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// One way to give a device to a request, and back to training.
pub(crate) trait Procedure {
    /// Gives the device to training, which begins while the caller goes on. What a request would find in its place
    /// because of the one before is gone.
    fn train(&mut self) -> anyhow::Result<()>;

    /// Whether training computes.
    fn is_training(&mut self) -> anyhow::Result<bool>;

    /// Steps of training so far.
    fn steps(&mut self) -> anyhow::Result<u64>;

    /// Runs a request.
    fn answer(&mut self, request: &Request) -> anyhow::Result<Answered>;
}

/// A request that was run.
pub(crate) struct Answered {
    pub(super) executed: Executed,
    /// When training computed no more, by `CLOCK_MONOTONIC`; none where it goes on, or had ended before.
    pub(super) stopped_ns: Option<u64>,
    /// Whether the device had to be given to the model first.
    pub(super) switched: bool,
}

type Turn = Box<dyn FnOnce(&mut (dyn Procedure + 'static)) + Send>;

/// A mechanism and the thread on which it does everything, one thing after the other: its processes die with that thread.
pub(crate) struct Mechanism {
    turns: Mutex<Option<mpsc::Sender<Turn>>>,
    thread: Mutex<Option<JoinHandle<()>>>,
    desk: Arc<Desk>,
    name: String,
    signature: Arc<ModelSignature>,
    /// How long training computed on after the last request, in nanoseconds.
    stopped_ns: Arc<Mutex<Option<u64>>>,
}

impl Mechanism {
    /// Starts a mechanism on a thread of its own.
    pub(crate) fn start<P: Procedure + 'static>(
        subject: &Subject,
        desk: Arc<Desk>,
        make: impl FnOnce(Arc<Desk>) -> anyhow::Result<P> + Send + 'static,
    ) -> anyhow::Result<Arc<Self>> {
        let (turns, queue) = mpsc::channel::<Turn>();
        let (started, start) = mpsc::channel();
        let shared = Arc::clone(&desk);
        let thread = std::thread::Builder::new()
            .name("mechanism".to_owned())
            .spawn(move || {
                let mut procedure = match make(shared) {
                    Ok(procedure) => procedure,
                    Err(error) => {
                        let _ = started.send(Err(error));
                        return;
                    }
                };
                if started.send(Ok(())).is_ok() {
                    take_turns(&mut procedure, &queue);
                }
            })
            .context("cannot start a thread")?;
        start.recv().map_err(|_| anyhow!("the mechanism's thread panicked")).flatten()?;
        Ok(Arc::new(Self {
            turns: Mutex::new(Some(turns)),
            thread: Mutex::new(Some(thread)),
            desk,
            name: subject.name.clone(),
            signature: Arc::new(subject.signature.clone()),
            stopped_ns: Arc::default(),
        }))
    }

    /// Has it do something, and waits until it has.
    pub(crate) fn ask<T: Send + 'static>(
        &self,
        ask: impl FnOnce(&mut (dyn Procedure + 'static)) -> anyhow::Result<T> + Send + 'static,
    ) -> anyhow::Result<T> {
        let (answer, answered) = mpsc::channel();
        self.put(Box::new(move |procedure| {
            let _ = answer.send(ask(procedure));
        }));
        answered.recv().map_err(|_| anyhow!("the mechanism is gone")).flatten()
    }

    /// How long training computed on after the last request; none if it had not to stop.
    pub(crate) fn stopped(&self) -> Option<Duration> {
        self.stopped_ns.lock().unwrap_or_else(PoisonError::into_inner).map(Duration::from_nanos)
    }

    /// Ends it with all its processes, and returns when they are gone.
    pub(crate) fn stop(&self) -> anyhow::Result<()> {
        self.turns.lock().unwrap_or_else(PoisonError::into_inner).take();
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        let ended = thread.map_or(Ok(()), JoinHandle::join);
        ended.map_err(|_| anyhow!("the mechanism's thread panicked"))
    }

    /// A turn that nobody takes is dropped, and whoever waits for its answer sees that.
    fn put(&self, turn: Turn) {
        if let Some(turns) = &*self.turns.lock().unwrap_or_else(PoisonError::into_inner) {
            let _ = turns.send(turn);
        }
    }

    fn check_name(&self, name: &str) -> Result<(), ServiceError> {
        if name == self.name { Ok(()) } else { Err(ServiceError::UnknownModel { model: name.to_owned() }) }
    }

    fn answer(&self, executed: Executed, slot: Slot, timings: Timings) -> Result<Answer, ServiceError> {
        let internal = |message: &str| ServiceError::Internal { message: message.to_owned() };
        let begin = slot.offset_bytes();
        let slot = slot.freeze();
        if executed.outputs.len() != self.signature.outputs.len() {
            return Err(internal("another number of outputs than the model has"));
        }
        let outputs = executed.outputs.into_iter().zip(&self.signature.outputs);
        let outputs = outputs
            .map(|(output, signature)| {
                let offset = output.at.offset.checked_sub(begin);
                let offset = offset.ok_or_else(|| internal("an output outside of its slot"))?;
                let spec = TensorSpec::new(&signature.name, signature.datatype, output.shape);
                Ok(OutputTensor { spec, data: slot.view(offset, output.at.bytes)? })
            })
            .collect::<Result<Vec<_>, ServiceError>>()?;
        Ok(Answer { outputs, timings })
    }
}

impl Drop for Mechanism {
    fn drop(&mut self) {
        // A thread that panicked has dropped its processes all the same.
        let _ = self.stop();
    }
}

/// Until nobody can ask any more.
fn take_turns(procedure: &mut (dyn Procedure + 'static), queue: &mpsc::Receiver<Turn>) {
    loop {
        match queue.recv_timeout(LOOK_EVERY) {
            Ok(turn) => turn(procedure),
            // Reads what training says of its steps, before the socket is full. Whoever asks next hears of an error.
            Err(RecvTimeoutError::Timeout) => drop(procedure.steps()),
            Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}

impl InferenceService for Mechanism {
    fn is_live(&self) -> bool {
        true
    }

    fn is_ready(&self) -> bool {
        true
    }

    fn models(&self) -> Vec<ModelStatus> {
        vec![ModelStatus {
            name: self.name.clone(),
            version: "1".to_owned(),
            state: ModelState::Ready,
            reason: String::new(),
        }]
    }

    fn model(&self, name: &str, version: Option<&str>) -> Result<ModelStatus, ServiceError> {
        self.check_name(name)?;
        let status = self.models().remove(0);
        status.of_version(version)
    }

    fn signature(&self, name: &str, version: Option<&str>) -> Result<Arc<ModelSignature>, ServiceError> {
        self.model(name, version)?;
        Ok(Arc::clone(&self.signature))
    }

    fn reserve(
        &self,
        name: &str,
        version: Option<&str>,
        inputs: &[TensorSpec],
    ) -> Result<Submission, ServiceError> {
        self.signature(name, version)?.check_inputs(inputs)?;
        let (placed, bytes) = PlacedTensor::place(inputs)?;
        Submission::new(name, placed, self.desk.slots.reserve(Desk::slot_bytes(bytes))?)
    }

    fn infer(&self, submission: Submission, _options: InferOptions) -> ServiceFuture<'_, Answer> {
        let submitted_ns = monotonic_ns();
        Box::pin(async move {
            let (_, inputs, slot) = submission.into_parts()?;
            let (answer, answered) = oneshot::channel();
            let stopped = Arc::clone(&self.stopped_ns);
            self.put(Box::new(move |procedure| {
                let decided_ns = monotonic_ns();
                let request = Request { inputs, slot };
                let done = procedure.answer(&request);
                if let Ok(done) = &done {
                    *stopped.lock().unwrap_or_else(PoisonError::into_inner) =
                        done.stopped_ns.map(|at_ns| at_ns.saturating_sub(decided_ns));
                }
                let _ = answer.send(done.map(|done| (done, request.slot, decided_ns)));
            }));
            let gone = || ServiceError::Internal { message: "the mechanism is gone".to_owned() };
            let (done, slot, decided_ns) = answered
                .await
                .map_err(|_| gone())?
                .map_err(|error| ServiceError::Internal { message: format!("{error:#}") })?;
            let Executed { first_layer_ns, finished_ns, .. } = done.executed;
            let between = |from: u64, to: u64| Duration::from_nanos(to.saturating_sub(from));
            let computes_from = if done.switched { first_layer_ns } else { decided_ns };
            let timings = Timings {
                queue: between(submitted_ns, decided_ns),
                switch: between(decided_ns, computes_from),
                compute: between(computes_from, finished_ns),
                switched: done.switched,
            };
            self.answer(done.executed, slot, timings)
        })
    }

    fn snapshot(&self) -> ServiceSnapshot {
        ServiceSnapshot {
            slot_bytes: self.desk.slots.capacity_bytes(),
            slot_in_use_bytes: self.desk.slots.in_use_bytes(),
            ..ServiceSnapshot::default()
        }
    }
}
