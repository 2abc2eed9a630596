//! Executions on a GPU: graphs captured over a model's home and an arena, with waits for its groups between them.
//!
//! Graphs belong to one model, one home, one arena and one set of input shapes: one graph for weights that are there, and for
//! weights on their way two, or one, with the waits for the groups' doorbells between and inside of them. Graphs for the shapes of
//! the export are captured when a model is loaded, over its own home; others when they come for the second time, and so are
//! those for another home: where places are given anew, a model of many seldom has the same twice, and operators that are
//! launched one by one are launched while the weights are on their way. What cannot be captured runs operator by operator on
//! the same stream.

mod graphs;
mod launch;
mod libtorch;
mod profile;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use pswitch_device::{
    DeviceError, DeviceId, DeviceSlice, GpuMoment, GpuRehearsal, GpuStream, HostSlice, PinnedMemory,
};
use pswitch_mem_pool::{ArenaDivision, Range};
use pswitch_protocol::{Executed, FaultClass, InputValue, PlacedTensor, Region, control, monotonic_ns};

use crate::arena::ExecutionArena;
use crate::error::{RunError, WorkerError};
use crate::libtorch::Number;
use crate::work::{Example, Model, Shared, Work, place_outputs, placed_input, schema_code};
use graphs::{Captured, GraphSet, ModelGraphs};
use launch::{Launch, Produced, Segment, gpu_fault};
pub(crate) use libtorch::CudaLibtorch;

/// How long a wait for the GPU goes without asking whether it has failed.
const CHECK_EVERY: Duration = Duration::from_millis(1);

/// A graph of some hundred kernels takes 0.1 ms to be launched; inputs of so many bytes take longer to come.
const ONE_GRAPH_FROM_INPUT_BYTES: u64 = 6 << 20;

/// Allocations of libtorch outside of executions, and how many bytes of those are alive. One worker has one GPU.
static ALLOCATIONS: AtomicU32 = AtomicU32::new(0);
static OUTSIDE_BYTES: AtomicI64 = AtomicI64::new(0);

extern "C" fn note_outside(bytes: i64) {
    if bytes > 0 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
    }
    OUTSIDE_BYTES.fetch_add(bytes, Ordering::Relaxed);
}

/// What a worker executes with on a GPU.
pub(crate) struct CudaExecutor {
    libtorch: CudaLibtorch,
    ordinal: u32,
    stream: GpuStream,
    slots: PinnedMemory,
    /// The word by which an execution that is held back is let go.
    let_go: HostSlice,
    rehearsal: GpuRehearsal,
    /// When the first layer of the last execution began, and when its outputs were there.
    first: GpuMoment,
    last: GpuMoment,
    models: HashMap<u32, ModelGraphs>,
    captured: u32,
}

impl CudaExecutor {
    /// Loads libtorch's CUDA libraries and makes all that does not belong to a model.
    pub(crate) fn attach(ordinal: u32, shared: &Shared, waits_by_kernels: bool) -> Result<Self, WorkerError> {
        let libtorch = CudaLibtorch::open()?;
        let stream = open_stream(shared.device.properties().id, waits_by_kernels)?;
        ExecutionArena::lie_in(shared.pool.address(), shared.pool.bytes());
        libtorch.attach(ordinal, &stream, note_outside)?;
        let slots = shared.device.pin(Arc::clone(&shared.slots))?;
        let words = shared.device.pin(Arc::clone(&shared.control))?;
        let let_go = HostSlice::new(words, shared.block + control::LET_GO, 4)?;
        let (first, last) = (GpuMoment::new(&stream)?, GpuMoment::new(&stream)?);
        let rehearsal = GpuRehearsal::new(&stream)?;
        let models = HashMap::new();
        let executor =
            Self { libtorch, ordinal, stream, slots, let_go, rehearsal, first, last, models, captured: 0 };
        executor.tell(shared)?;
        Ok(executor)
    }

    /// The stream on which everything is computed.
    pub(crate) fn stream(&self) -> &GpuStream {
        &self.stream
    }

    /// Does what an execution begins with, for nothing: the next one is launched faster.
    pub(crate) fn rehearse(&self) -> Result<(), WorkerError> {
        Ok(self.rehearsal.run(&self.stream)?)
    }

    /// Makes what backward passes need beside the pool.
    pub(crate) fn prepare_training(&self, shared: &Shared) -> Result<(), WorkerError> {
        self.libtorch.prepare_training(self.ordinal)?;
        self.tell(shared)
    }

    /// Puts what the worker has beside the pool where its controller looks for it.
    fn tell(&self, shared: &Shared) -> Result<(), WorkerError> {
        let word = |offset| shared.control.word(shared.block + offset);
        word(control::ALLOCATIONS)?.store(ALLOCATIONS.load(Ordering::Relaxed), Ordering::Relaxed);
        let outside_kib = OUTSIDE_BYTES.load(Ordering::Relaxed).max(0) / 1024;
        word(control::OUTSIDE_KIB)?.store(u32::try_from(outside_kib).unwrap_or(u32::MAX), Ordering::Relaxed);
        word(control::GRAPHS)?.store(self.captured, Ordering::Relaxed);
        Ok(())
    }

    /// Captures a model that was just built for the shapes of its export, in every arena.
    pub(crate) fn load(
        &mut self,
        number: u32,
        model: &mut Model,
        shared: &Shared,
    ) -> Result<(), WorkerError> {
        let mut graphs = ModelGraphs::default();
        for &arena in &shared.arenas {
            let Some((inputs, region, doorbell)) = example_inputs(&model.examples, arena) else { continue };
            let mut set = GraphSet::of_export(model.weights.home().offset, inputs, region, doorbell);
            match self.capture_alone(model, &set, shared, Weights::Resident)? {
                Ok(captured) => {
                    set.put(Weights::Resident, captured);
                    graphs.add(set);
                }
                // Other shapes may fit.
                Err(error) if error.class != FaultClass::Model => {
                    tracing::warn!(model = model.name, reason = error.message, "not captured");
                    break;
                }
                Err(error) => {
                    graphs.refuse(&model.name, error);
                    break;
                }
            }
        }
        self.models.insert(number, graphs);
        self.tell(shared)
    }

    /// Has a model run operator by operator: its weights do not stay where a graph would look for them.
    pub(crate) fn run_without_graphs(&mut self, number: u32) {
        self.models.insert(number, ModelGraphs::refused("its weights move"));
    }

    pub(crate) fn unload(&mut self, number: u32) {
        self.models.remove(&number);
    }

    /// Captures the graphs that wait anew: the model's groups are others from now on.
    pub(crate) fn plan(
        &mut self,
        number: u32,
        model: &mut Model,
        shared: &Shared,
    ) -> Result<(), WorkerError> {
        let Some(mut graphs) = self.models.remove(&number) else { return Ok(()) };
        let own_home = model.weights.home().offset;
        for set in graphs.sets_mut() {
            // Where else the weights come is seen when they do.
            if set.home != own_home {
                set.forget_cold();
                continue;
            }
            // As the last execution asked for it, or as most will.
            let host_tables = set.cold_host_tables().unwrap_or(model.executable.has_tables());
            let weights = Weights::Moving { host_tables };
            set.forget_cold();
            match self.capture_alone(model, set, shared, weights)? {
                Ok(captured) => set.put(weights, captured),
                // It is tried again when it is needed.
                Err(error) => tracing::warn!(model = model.name, reason = error.message, "not captured"),
            }
        }
        self.models.insert(number, graphs);
        self.tell(shared)
    }

    /// Captures outside of an execution: addresses of the arena are used, its memory is not. The inner error is the
    /// model's.
    fn capture_alone(
        &mut self,
        model: &mut Model,
        set: &GraphSet,
        shared: &Shared,
        weights: Weights,
    ) -> Result<Result<Captured, RunError>, WorkerError> {
        let base = shared.slice(set.arena)?.address();
        let arena = ExecutionArena::begin(base, set.arena.bytes);
        let result = self.capture(model, set, shared, weights);
        match arena.end().in_use_bytes {
            0 => Ok(result),
            bytes => Err(WorkerError::Kept { bytes }),
        }
    }

    /// Captures an execution, within an arena that was begun.
    fn capture(
        &mut self,
        model: &mut Model,
        set: &GraphSet,
        shared: &Shared,
        weights: Weights,
    ) -> Result<Captured, RunError> {
        model.lie_at(set.home, shared)?;
        let faulty = |error: WorkerError| RunError { class: FaultClass::Model, message: error.to_string() };
        let inputs: Vec<_> = set
            .inputs
            .iter()
            .map(|input| placed_input(shared, input))
            .collect::<Result<_, _>>()
            .map_err(faulty)?;
        let groups = weights.groups(model, shared).map_err(|error| gpu_fault(&error))?;
        let launch = Launch {
            libtorch: &self.libtorch,
            stream: &self.stream,
            inputs: &inputs,
            groups: &groups,
            host_tables: weights.are_read_from_host(),
            stamps: &[],
            in_one: tensor_bytes(&set.inputs) >= ONE_GRAPH_FROM_INPUT_BYTES,
            stop: None,
        };
        let (outputs, segments) = launch.capture(&mut model.executable)?;
        let graphs = u32::try_from(segments.len()).unwrap_or(u32::MAX);
        self.captured = self.captured.wrapping_add(graphs);
        Ok(Captured { outputs, segments })
    }

    /// Runs one execution. The inner error is the execution's, the outer one the device's or the controller's.
    #[allow(clippy::type_complexity)] // two ends of one execution
    pub(crate) fn run(
        &mut self,
        shared: &Shared,
        model: &mut Model,
        work: &Work<'_>,
    ) -> Result<(Result<Executed, RunError>, Result<(), WorkerError>), WorkerError> {
        let number = work.order.model;
        let mut graphs = self.models.remove(&number).unwrap_or_default();
        let result = match work.order.profile {
            Some(times) => self.profile(shared, model, work, times),
            None if graphs.refusal.is_none() => self.run_graph(shared, model, work, &mut graphs),
            None => self.run_eagerly(shared, model, work),
        };
        self.models.insert(number, graphs);
        model.executable.clear();
        self.tell(shared)?;
        Ok(match result {
            Ok(executed) => (Ok(executed), Ok(())),
            Err(Failure::Execution(error)) => (Err(error), Ok(())),
            Err(Failure::Gpu(error @ WorkerError::Device(DeviceError::TimedOut { .. }))) => {
                let message = "inputs or weights did not come in time".to_owned();
                (Err(RunError { class: FaultClass::Transfer, message }), Err(error))
            }
            Err(Failure::Gpu(error)) => {
                let reason = match &error {
                    WorkerError::Device(error) => error.to_string(),
                    error => error.to_string(),
                };
                let message = format!("the GPU failed under it, an index out of range perhaps: {reason}");
                (Err(RunError { class: FaultClass::Model, message }), Err(error))
            }
        })
    }

    fn run_graph(
        &mut self,
        shared: &Shared,
        model: &mut Model,
        work: &Work<'_>,
        graphs: &mut ModelGraphs,
    ) -> Result<Executed, Failure> {
        let begun_ns = monotonic_ns();
        let weights = Weights::of(work, model);
        let index = graphs.find_or_add(work.order);
        if graphs.set(index).captured(weights).is_none() {
            // To capture takes longer than to run: shapes have to come twice.
            if !graphs.set(index).is_worth_it() {
                return self.run_eagerly(shared, model, work);
            }
            match self.capture(model, graphs.set(index), shared, weights) {
                Ok(captured) => graphs.set_mut(index).put(weights, captured),
                Err(error) => {
                    graphs.remove(index);
                    let executed = self.run_eagerly(shared, model, work)?;
                    // It runs so, and not as a graph.
                    if error.class == FaultClass::Model {
                        graphs.refuse(&model.name, error);
                    }
                    return Ok(executed);
                }
            }
        }
        let Some(Captured { outputs, segments }) = graphs.set(index).captured(weights) else {
            unreachable!("captured above")
        };
        let placed = place(outputs, work, shared)?;
        let first = segments.first().map_or(&[][..], |segment| segment.waits.as_slice());
        self.begin(work, first)?;
        let mut first_launched_ns = 0;
        for (number, Segment { waits, graph }) in segments.iter().enumerate() {
            if number > 0 {
                self.stream.wait(waits)?;
            }
            // SAFETY: home and arena are mapped and leased to this execution; the graph's last launch is over.
            unsafe { graph.launch(&self.stream) }?;
            if number == 0 {
                first_launched_ns = monotonic_ns();
            }
        }
        self.finish(outputs, &placed, shared)?;
        let launched_ns = monotonic_ns();
        self.wait_until_done(work)?;
        let executed = self.executed(placed)?;
        tracing::debug!(
            model = model.name,
            ?weights,
            graphs = segments.len(),
            execution = work.order.execution,
            read_ns = work.read_ns,
            begun_ns,
            first_launched_ns,
            launched_ns,
            first_layer_ns = executed.first_layer_ns,
            finished_ns = executed.finished_ns,
            "done"
        );
        Ok(executed)
    }

    fn run_eagerly(
        &mut self,
        shared: &Shared,
        model: &mut Model,
        work: &Work<'_>,
    ) -> Result<Executed, Failure> {
        model.lie_at(work.order.home, shared)?;
        let weights = Weights::of(work, model);
        let groups = weights.groups(model, shared)?;
        let launch = Launch {
            libtorch: &self.libtorch,
            stream: &self.stream,
            inputs: &work.inputs,
            groups: &groups,
            host_tables: weights.are_read_from_host(),
            stamps: &[],
            in_one: false,
            stop: Some(shared.control.word(shared.block + control::STOP)?),
        };
        self.begin(work, &[])?;
        let launched = launch.run(&mut model.executable).and_then(|outputs| {
            let placed = place(&outputs, work, shared)?;
            self.finish(&outputs, &placed, shared).map_err(|error| gpu_fault(&error))?;
            Ok(placed)
        });
        match launched {
            Ok(placed) => {
                self.wait_until_done(work)?;
                self.executed(placed)
            }
            Err(error) => {
                self.libtorch.clear_error();
                // The arena goes to others next: what was launched must be over.
                self.wait_until_idle(work)?;
                Err(Failure::Execution(error))
            }
        }
    }

    /// What comes ahead of the operators: waiting for the inputs and for the first weights, which one operation does as
    /// fast as for either.
    fn begin(&self, work: &Work<'_>, first_waits: &[DeviceSlice]) -> Result<(), DeviceError> {
        self.stream.expect();
        // What comes last is waited for first: a GPU that stands still for a word takes some time to notice that it rang (some
        // 20 us by an operation of the stream), and need not do so twice. A doorbell for inputs is rung for one execution:
        // whoever has waited for it clears it.
        self.stream.wait_and_clear(first_waits, &work.input_doorbell)?;
        if work.order.held_back {
            self.stream.hold_back(&self.let_go)?;
        }
        self.stream.mark(&self.first)
    }

    /// What comes behind the operators: the outputs go to their places, and this process is told.
    fn finish(
        &self,
        outputs: &[Produced],
        placed: &[PlacedTensor],
        shared: &Shared,
    ) -> Result<(), DeviceError> {
        for (output, PlacedTensor { at: Region { offset, bytes }, .. }) in outputs.iter().zip(placed) {
            match output.number {
                Some(Number::Int(value)) => shared.slots.write(*offset, &value.to_le_bytes())?,
                Some(Number::Float(value)) => shared.slots.write(*offset, &value.to_le_bytes())?,
                Some(Number::Bool(value)) => shared.slots.write(*offset, &[u8::from(value)])?,
                None => {
                    let to = HostSlice::new(self.slots.clone(), *offset, *bytes)?;
                    // SAFETY: the output lies in the arena or in the home, dense, until the execution is over.
                    unsafe { self.stream.copy_out(output.at, &to) }?;
                }
            }
        }
        self.stream.mark(&self.last)?;
        self.stream.announce()
    }

    /// What to say of an execution that is done.
    fn executed(&self, outputs: Vec<PlacedTensor>) -> Result<Executed, Failure> {
        let finished_ns = monotonic_ns();
        let computed_us = self.last.us_since(&self.first).map_err(Failure::of_device)?;
        // Microseconds of one execution, not negative.
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        let computed_ns = (computed_us.max(0.0) * 1e3) as u64;
        // The stream waits by itself: nobody here knows for how long.
        Ok(Executed {
            outputs,
            first_layer_ns: finished_ns.saturating_sub(computed_ns),
            finished_ns,
            waited_ns: 0,
        })
    }

    /// Waits for the announcement at the end of an execution, by looking: sleeping would cost more than is left.
    fn wait_until_done(&self, work: &Work<'_>) -> Result<(), Failure> {
        let mut check_at = Instant::now() + CHECK_EVERY;
        loop {
            for _ in 0..64 {
                if self.stream.is_done() {
                    return Ok(());
                }
                std::hint::spin_loop();
            }
            let now = Instant::now();
            if now >= check_at {
                check_at = now + CHECK_EVERY;
                self.stream.is_idle().map_err(Failure::of_device)?;
                check_deadline(work, now)?;
            }
        }
    }

    fn wait_until_idle(&self, work: &Work<'_>) -> Result<(), Failure> {
        while !self.stream.is_idle().map_err(Failure::of_device)? {
            check_deadline(work, Instant::now())?;
            std::thread::sleep(Duration::from_micros(50));
        }
        Ok(())
    }
}

/// A stream that waits by kernels, if it may and the driver can compile one.
fn open_stream(id: DeviceId, waits_by_kernels: bool) -> Result<GpuStream, DeviceError> {
    if waits_by_kernels {
        match GpuStream::open_waiting_by_kernels(id) {
            Err(error) => tracing::warn!(%error, "waits are operations of the stream, which take longer"),
            opened => return opened,
        }
    }
    GpuStream::open(id)
}

/// Where an execution finds the model's weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Weights {
    /// In their home.
    Resident,
    /// On their way there, group by group; tables may be read from the host store meanwhile.
    Moving { host_tables: bool },
}

impl Weights {
    fn of(work: &Work<'_>, model: &Model) -> Self {
        if work.order.resident || (model.wait_nodes.is_empty() && model.table_nodes.is_empty()) {
            return Self::Resident;
        }
        Self::Moving { host_tables: work.order.host_tables && model.executable.has_tables() }
    }

    fn are_read_from_host(self) -> bool {
        self == Self::Moving { host_tables: true }
    }

    /// What is waited for.
    fn groups(self, model: &Model, shared: &Shared) -> Result<Vec<launch::Group>, DeviceError> {
        match self {
            Self::Resident => Ok(Vec::new()),
            Self::Moving { host_tables } => model.groups(shared, host_tables),
        }
    }
}

/// Where the outputs go.
fn place(outputs: &[Produced], work: &Work<'_>, shared: &Shared) -> Result<Vec<PlacedTensor>, RunError> {
    let shapes: Vec<_> = outputs.iter().map(|output| output.shape.clone()).collect();
    place_outputs(&shapes, work.order.outputs, &shared.slots)
}

/// A stream that is stuck at a doorbell cannot be taken back: its process has to end.
fn check_deadline(work: &Work<'_>, now: Instant) -> Result<(), Failure> {
    if now < work.deadline {
        return Ok(());
    }
    let waited = Duration::from_millis(work.order.doorbell_timeout_ms);
    Err(Failure::Gpu(DeviceError::TimedOut { what: "the end of an execution", waited }.into()))
}

/// Why an execution gave no outputs.
enum Failure {
    /// For a reason of its own: the next may come.
    Execution(RunError),
    /// The GPU, or its driver, will do nothing more for this process.
    Gpu(WorkerError),
}

impl Failure {
    fn of_device(error: DeviceError) -> Self {
        Self::Gpu(error.into())
    }
}

impl From<RunError> for Failure {
    fn from(error: RunError) -> Self {
        Self::Execution(error)
    }
}

impl From<DeviceError> for Failure {
    fn from(error: DeviceError) -> Self {
        Self::of_device(error)
    }
}

fn tensor_bytes(inputs: &[InputValue]) -> u64 {
    let bytes = |input: &InputValue| match input {
        InputValue::Tensor(tensor) => tensor.at.bytes,
        InputValue::Integer(_) => 0,
    };
    inputs.iter().map(bytes).sum()
}

/// Inputs of the export's shapes in their places of an arena, what is left of it, and their doorbell; none if they do not
/// fit.
fn example_inputs(examples: &[Example], arena: Region) -> Option<(Vec<InputValue>, Region, u64)> {
    let bytes = |example: &Example| match example {
        Example::Integer(_) => None,
        Example::Tensor { dtype, shape } => {
            Some(shape.iter().try_fold(dtype.size_bytes(), |bytes, &size| bytes.checked_mul(size)))
        }
    };
    let sizes: Vec<u64> = examples.iter().filter_map(bytes).collect::<Option<_>>()?;
    let division = ArenaDivision::new(Range::new(arena.offset, arena.bytes), sizes).ok()?;
    let region = |range: Range| Region { offset: range.offset, bytes: range.bytes };
    let mut places = division.inputs.iter().copied();
    let inputs = examples.iter().map(|example| match example {
        Example::Integer(value) => Some(InputValue::Integer(*value)),
        Example::Tensor { dtype, shape } => Some(InputValue::Tensor(PlacedTensor {
            dtype: schema_code(*dtype),
            shape: shape.clone(),
            at: region(places.next()?),
        })),
    });
    let inputs = inputs.collect::<Option<_>>()?;
    Some((inputs, region(division.activations), division.doorbell.offset))
}
