//! The life of a worker process: attach, build models, execute, end.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use pswitch_device::{
    Device, DeviceAddress, DeviceError, DeviceId, DeviceMemory, DeviceSlice, ExecutionStream, LinkThrottle,
    MemoryHandle, SharedMemory, doorbell, open_device,
};
use pswitch_model::{Archive, DType};
use pswitch_protocol::{
    Attach, Channel, Execute, Executed, ExecutionFault, FaultClass, FromWorker, InputValue, LoadModel,
    PlacedTensor, ProtocolError, Region, ToWorker, monotonic_ns,
};

use crate::cpu_arena::CpuArena;
use crate::error::{RunError, WorkerError};
use crate::executable::{Executable, Input, OutputShape, Watch};
use crate::libtorch::TorchDevice;

/// Outputs begin at multiples of this in their slot, so that every element type is aligned.
const OUTPUT_ALIGNMENT_BYTES: u64 = 64;

/// Longest that a worker which waits for a group does not look at its stop flag.
const STOP_LATENCY: Duration = Duration::from_millis(20);

/// Serves a controller until it says [`ToWorker::Shutdown`] or closes the connection.
///
/// # Errors
/// When the connection breaks or the controller breaks the protocol; failures of models are answers, not errors.
pub fn serve(channel: &Channel) -> Result<(), WorkerError> {
    let Some((first, descriptors)) = channel.receive::<ToWorker>()? else { return Ok(()) };
    let ToWorker::Attach(attach) = first else {
        return Err(WorkerError::Order(format!("the first message is {first:?}, not an attachment")));
    };
    let mut worker = Worker::attach(&attach, descriptors)?;
    channel.send(&FromWorker::Attached, &[])?;
    while let Some((message, _)) = channel.receive::<ToWorker>()? {
        match message {
            ToWorker::Attach(_) => return Err(WorkerError::Order("a second attachment".to_owned())),
            ToWorker::Load(load) => {
                let error = worker.load(&load).err();
                channel.send(&FromWorker::Loaded { model: load.model, error }, &[])?;
            }
            ToWorker::Unload { model } => drop(worker.models.remove(&model)),
            ToWorker::Plan { model, wait_nodes } => worker.plan(model, wait_nodes)?,
            ToWorker::Execute(execute) => {
                let (result, kept_bytes) = worker.execute(&execute)?;
                channel.send(&FromWorker::Finished { execution: execute.execution, result }, &[])?;
                if kept_bytes > 0 {
                    // What libtorch keeps there the next execution would overwrite: another worker takes over.
                    return Err(WorkerError::Kept { bytes: kept_bytes });
                }
            }
            ToWorker::Shutdown => break,
        }
    }
    Ok(())
}

struct Model {
    name: String,
    executable: Executable,
    doorbells: Region,
    /// For every group the node that waits at its doorbell.
    wait_nodes: Vec<u32>,
}

struct Worker {
    device: Arc<dyn Device>,
    pool: Arc<dyn DeviceMemory>,
    slots: SharedMemory,
    control: SharedMemory,
    stop_flag: u64,
    models: HashMap<u32, Model>,
}

impl Worker {
    fn attach(attach: &Attach, descriptors: Vec<OwnedFd>) -> Result<Self, WorkerError> {
        let mut descriptors = descriptors.into_iter();
        let (Some(slots), Some(control)) = (descriptors.next(), descriptors.next()) else {
            return Err(ProtocolError::Descriptors { message: "Attach", found: 0, expected: 3 }.into());
        };
        let id: DeviceId = attach.device.id.parse()?;
        let device = open_device(id, LinkThrottle::default())?;
        let pool = device.open(MemoryHandle::from_parts(&attach.pool, descriptors.collect())?)?;
        if attach.device.threads > 0 {
            tch::set_num_threads(i32::try_from(attach.device.threads).unwrap_or(i32::MAX));
        }
        CpuArena::install(pool.address(), pool.bytes());
        let control = SharedMemory::from_fd(control, attach.control_bytes)?;
        control.word(attach.stop_flag)?;
        Ok(Self {
            device,
            pool,
            slots: SharedMemory::from_fd(slots, attach.slots_bytes)?,
            control,
            stop_flag: attach.stop_flag,
            models: HashMap::new(),
        })
    }

    fn address(&self, region: Region) -> Result<DeviceAddress, DeviceError> {
        Ok(DeviceSlice::new(self.pool.clone(), region.offset, region.bytes)?.address())
    }

    /// Builds a model over its home; the error is a line for the registry.
    fn load(&mut self, load: &LoadModel) -> Result<(), String> {
        let archive = Archive::open(Path::new(&load.path)).map_err(|error| error.to_string())?;
        if archive.digest() != load.digest {
            return Err(format!("'{}' has changed since the server read it; load it again", load.path));
        }
        let program = archive.program();
        let span = program.span();
        if span.used_bytes > load.span.bytes {
            return Err(format!(
                "a span of {} bytes does not fit its home of {}",
                span.used_bytes, load.span.bytes
            ));
        }
        let base = self.address(load.span).map_err(|error| error.to_string())?;
        // SAFETY: the addresses lie inside of the home, which is part of the pool, which is mapped for as long as the
        // worker lives; `execute` waits for the weights at their doorbells.
        let executable = unsafe {
            Executable::build(program, TorchDevice::Cpu, |weight| {
                DeviceAddress(base.0 + span.offset(weight.storage) + weight.offset_bytes)
            })
        }
        .map_err(|error| error.to_string())?;
        let wait_nodes = program.layers().iter().position(|layer| layer.bytes > 0);
        let wait_nodes = wait_nodes.into_iter().filter_map(|node| u32::try_from(node).ok()).collect();
        let model = Model { name: load.name.clone(), executable, doorbells: load.doorbells, wait_nodes };
        self.models.insert(load.model, model);
        Ok(())
    }

    fn plan(&mut self, model: u32, wait_nodes: Vec<u32>) -> Result<(), WorkerError> {
        // A model that could not be built is planned all the same: the controller may not have heard yet.
        let Some(model) = self.models.get_mut(&model) else { return Ok(()) };
        let ascending = wait_nodes.windows(2).all(|pair| pair[0] < pair[1]);
        let inside = wait_nodes.last().is_none_or(|&last| (last as usize) < model.executable.nodes());
        if !ascending || !inside || wait_nodes.len() as u64 * 4 > model.doorbells.bytes {
            return Err(WorkerError::Order(format!(
                "a plan for '{}' that its program cannot follow",
                model.name
            )));
        }
        model.wait_nodes = wait_nodes;
        Ok(())
    }

    /// Runs one execution. The inner error is the execution's, the outer one the controller's; the number is how many
    /// bytes of the arena libtorch did not give back.
    fn execute(&mut self, execute: &Execute) -> Result<(Result<Executed, ExecutionFault>, u64), WorkerError> {
        let Some(model) = self.models.get_mut(&execute.model) else {
            return Err(WorkerError::Order(format!(
                "an execution of model {}, which is not loaded",
                execute.model
            )));
        };
        let word = |offset| DeviceSlice::new(self.pool.clone(), offset, 4);
        let base = DeviceSlice::new(self.pool.clone(), execute.arena.offset, execute.arena.bytes)?.address();
        let mut inputs = Vec::with_capacity(execute.inputs.len());
        for input in &execute.inputs {
            inputs.push(match input {
                InputValue::Integer(value) => Input::Integer(*value),
                InputValue::Tensor(tensor) => placed_input(&self.pool, tensor)?,
            });
        }
        let deadline = Instant::now() + Duration::from_millis(execute.doorbell_timeout_ms);
        let input_doorbell = word(execute.input_doorbell)?;
        let mut doorbells = Vec::with_capacity(model.wait_nodes.len());
        for (&node, offset) in model.wait_nodes.iter().zip((model.doorbells.offset..).step_by(4)) {
            doorbells.push((node, word(offset)?));
        }
        if let Some(profile) = execute.profile
            && profile.bytes < 4 * model.executable.nodes() as u64
        {
            return Err(WorkerError::Order("a profile without room for every node".to_owned()));
        }
        let mut watch = ExecutionWatch {
            device: &*self.device,
            doorbells: doorbells.into_iter().peekable(),
            deadline,
            stop: self.control.word(self.stop_flag)?,
            waited: Duration::ZERO,
            first_group_ns: None,
            profile: execute.profile.map(|_| Vec::with_capacity(model.executable.nodes())),
        };
        let arena = CpuArena::begin(base, execute.arena.bytes);
        let result = watch
            .wait(&input_doorbell)
            .and_then(|()| {
                // A doorbell for inputs is rung for one execution: whoever has waited for it clears it.
                self.device.set_word(&input_doorbell, doorbell::CLEAR).map_err(|error| transfer_fault(&error))
            })
            .and_then(|()| {
                watch.waited = Duration::ZERO;
                let begin_ns = monotonic_ns();
                // SAFETY: the inputs lie in the pool, inside of what the controller has leased to this execution; the
                // watch waits for each group before the node that uses it.
                unsafe { model.executable.run(&inputs, &mut watch) }?;
                let outputs = write_outputs(&model.executable, &self.slots, execute.outputs)?;
                let waited_ns = u64::try_from(watch.waited.as_nanos()).unwrap_or(u64::MAX);
                let first_layer_ns = watch.first_group_ns.unwrap_or(begin_ns);
                Ok(Executed { outputs, first_layer_ns, finished_ns: monotonic_ns(), waited_ns })
            });
        let profile = watch.profile.take().map(|times| node_times(&times));
        model.executable.clear();
        let stats = arena.end();
        if let (Some(region), Some(times), Ok(_)) = (execute.profile, profile, &result) {
            self.slots.write(region.offset, &times)?;
        }
        let result = result.map_err(|error| {
            let mut message = error.message;
            if error.class == FaultClass::OutOfMemory {
                message = format!(
                    "{message}: of the arena's {} bytes up to {} were in use; give the device a larger \
                         arena_size or send a smaller batch",
                    stats.capacity_bytes, stats.peak_bytes
                );
            }
            ExecutionFault { class: error.class, message }
        });
        Ok((result, stats.in_use_bytes))
    }
}

fn placed_input(pool: &Arc<dyn DeviceMemory>, tensor: &PlacedTensor) -> Result<Input, WorkerError> {
    let dtype = DType::from_schema_code(u64::from(tensor.dtype))
        .ok_or_else(|| WorkerError::Order(format!("an input of unknown type {}", tensor.dtype)))?;
    let bytes = tensor.shape.iter().try_fold(dtype.size_bytes(), |bytes, &size| bytes.checked_mul(size));
    if bytes != Some(tensor.at.bytes) {
        return Err(WorkerError::Order(format!(
            "an input of shape {:?} in {} bytes",
            tensor.shape, tensor.at.bytes
        )));
    }
    let at = DeviceSlice::new(pool.clone(), tensor.at.offset, tensor.at.bytes)?.address();
    Ok(Input::Tensor { at, dtype, shape: tensor.shape.clone() })
}

fn write_outputs(
    executable: &Executable,
    slots: &SharedMemory,
    room: Region,
) -> Result<Vec<PlacedTensor>, RunError> {
    let shapes = executable.outputs()?;
    let mut placed = Vec::with_capacity(shapes.len());
    let mut offset = 0_u64;
    for shape in &shapes {
        placed.push((offset, shape.bytes()));
        offset = (offset + shape.bytes()).next_multiple_of(OUTPUT_ALIGNMENT_BYTES);
    }
    let inside = room.offset.checked_add(room.bytes).is_some_and(|end| end <= slots.bytes());
    let needed_bytes = placed.last().map_or(0, |(offset, bytes)| offset + bytes);
    if needed_bytes > room.bytes || !inside {
        return Err(RunError {
            class: FaultClass::OutputsTooLarge { needed_bytes },
            message: format!("the outputs need {needed_bytes} bytes, their place has {}", room.bytes),
        });
    }
    shapes
        .into_iter()
        .zip(placed)
        .enumerate()
        .map(|(index, (OutputShape { dtype, shape }, (offset, bytes)))| {
            let at = Region { offset: room.offset + offset, bytes };
            // Offsets are inside of a mapping, so they fit an address.
            #[allow(clippy::cast_possible_truncation)]
            let at_byte = at.offset as usize;
            // SAFETY: `room` is inside of the mapping and given to this execution alone.
            unsafe { executable.copy_output(index, slots.as_ptr().add(at_byte)) }?;
            // Schema codes of element types are below 256.
            let dtype = u8::try_from(dtype.schema_code()).unwrap_or(u8::MAX);
            Ok(PlacedTensor { dtype, shape, at })
        })
        .collect()
}

/// Waits for groups, watches the stop flag and takes the time of every node.
struct ExecutionWatch<'a, D: Iterator<Item = (u32, DeviceSlice)>> {
    device: &'a dyn Device,
    doorbells: std::iter::Peekable<D>,
    deadline: Instant,
    stop: &'a AtomicU32,
    waited: Duration,
    /// When the first group had landed.
    first_group_ns: Option<u64>,
    /// When each node was launched, and how much waiting there was before.
    profile: Option<Vec<(Instant, Duration)>>,
}

impl<D: Iterator<Item = (u32, DeviceSlice)>> ExecutionWatch<'_, D> {
    fn wait(&mut self, word: &DeviceSlice) -> Result<(), RunError> {
        let begin = Instant::now();
        loop {
            let until = self.deadline.min(Instant::now() + STOP_LATENCY);
            match self.device.wait_doorbell(ExecutionStream::Host, word, until) {
                Ok(()) => break,
                Err(DeviceError::TimedOut { .. }) if until < self.deadline => self.check_stop()?,
                Err(error) => return Err(transfer_fault(&error)),
            }
        }
        self.waited += begin.elapsed();
        Ok(())
    }

    fn check_stop(&self) -> Result<(), RunError> {
        if self.stop.load(Ordering::Relaxed) == 0 {
            return Ok(());
        }
        Err(RunError { class: FaultClass::Stopped, message: "the execution was stopped".to_owned() })
    }
}

impl<D: Iterator<Item = (u32, DeviceSlice)>> Watch for ExecutionWatch<'_, D> {
    fn before(&mut self, node: usize) -> Result<(), RunError> {
        self.check_stop()?;
        if let Some((_, word)) = self.doorbells.next_if(|(first, _)| *first as usize == node) {
            self.wait(&word)?;
            self.first_group_ns.get_or_insert_with(monotonic_ns);
        }
        if let Some(profile) = &mut self.profile {
            profile.push((Instant::now(), self.waited));
        }
        Ok(())
    }
}

fn transfer_fault(error: &DeviceError) -> RunError {
    RunError { class: FaultClass::Transfer, message: error.to_string() }
}

/// Microseconds of every node as little-endian `f32`, waiting left out; the last one ends now.
fn node_times(launches: &[(Instant, Duration)]) -> Vec<u8> {
    let end = launches.last().map(|&(_, waited)| (Instant::now(), waited));
    let next = launches.iter().skip(1).copied().chain(end);
    launches
        .iter()
        .zip(next)
        .flat_map(|(&(begin, waited_before), (end, waited_after))| {
            let busy = (end - begin).saturating_sub(waited_after - waited_before);
            (busy.as_secs_f32() * 1e6).to_le_bytes()
        })
        .collect()
}
