//! The life of a worker process: attach, build models, execute, end.

use std::collections::HashMap;
use std::mem::ManuallyDrop;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use pswitch_device::{
    DeviceAddress, DeviceId, LinkThrottle, MemoryHandle, PinnedMemory, SharedMemory, open_device,
};
use pswitch_model::{Archive, Input, InputKind, Weight};
use pswitch_protocol::{
    Attach, Bring, Channel, Elsewhere, Execute, Executed, ExecutionFault, FaultClass, FromWorker, LoadModel,
    PrepareTask, ProtocolError, Region, TaskExtent, ToWorker, WorkerMemory, control,
};

use crate::alone::{self, Alone, Weights};
use crate::arena::ExecutionArena;
use crate::cuda::CudaExecutor;
use crate::error::WorkerError;
use crate::executable::Executable;
use crate::host;
use crate::libtorch::TorchDevice;
use crate::training::{ServedTask, choose_deterministic_kernels};
use crate::work::{Example, Model, Shared, Work};

/// Serves a controller until it says [`ToWorker::Shutdown`] or closes the connection. The process should end then, by
/// `_exit`: CUDA's own exit handlers wait for streams, too.
///
/// # Errors
/// When the connection breaks or the controller breaks the protocol, and when the device fails; failures of models are
/// answers, not errors.
pub fn serve(channel: &Channel) -> Result<(), WorkerError> {
    let Some((first, descriptors)) = channel.receive::<ToWorker>()? else { return Ok(()) };
    let ToWorker::Attach(attach) = first else {
        return Err(WorkerError::Order(format!("the first message is {first:?}, not an attachment")));
    };
    // Never dropped: a worker's process ends with it, and the kernel takes back everything. On a GPU that has failed, or
    // whose stream is stuck at a doorbell, letting go of things in order would wait for ever.
    let mut worker = ManuallyDrop::new(Worker::attach(&attach, descriptors)?);
    channel.send(&FromWorker::Attached, &[])?;
    let spin = Duration::from_micros(attach.spin_us);
    while let Some((message, descriptors)) = channel.receive_spinning::<ToWorker>(spin)? {
        match message {
            ToWorker::Attach(_) => return Err(WorkerError::Order("a second attachment".to_owned())),
            ToWorker::Load(load) => {
                let error = worker.load(&load, descriptors)?.err();
                channel.send(&FromWorker::Loaded { model: load.model, error }, &[])?;
            }
            ToWorker::Unload { model } => worker.unload(model)?,
            ToWorker::Plan { model, wait_nodes, table_nodes } => {
                worker.plan(model, wait_nodes, table_nodes)?;
            }
            // To have woken up is half of it.
            ToWorker::LookOut { rehearse } => {
                if let (true, Executor::Cuda(cuda)) = (rehearse, &worker.executor) {
                    cuda.rehearse()?;
                }
            }
            ToWorker::Execute(execute) => {
                let Ended { result, then } = worker.execute(&execute)?;
                let (execution, ends) = (execute.execution, then.is_err());
                channel.send(&FromWorker::Finished { execution, result, ends }, &[])?;
                then?;
            }
            ToWorker::Bring(order) => worker.bring(&order)?,
            ToWorker::Move { model, part, to } => worker.move_part(model, part, to, descriptors)?,
            ToWorker::SendBack { model } => worker.send_back(model)?,
            ToWorker::Release { model } => worker.release(model)?,
            ToWorker::DropTask => worker.task = None,
            ToWorker::PrepareTask(order) => {
                let result = worker.prepare_task(&order, channel)?;
                channel.send(&FromWorker::TaskReady { result }, &[])?;
            }
            ToWorker::Train { arena, holds } => {
                let Worker { task, shared, executor, .. } = &mut *worker;
                let task = task.as_mut().ok_or_else(no_task)?;
                let gpu = match executor {
                    Executor::Host => None,
                    Executor::Cuda(cuda) => Some(cuda.stream()),
                };
                let pause = task.train(shared, arena, holds, gpu, channel)?;
                channel.send(&FromWorker::TaskPaused(pause), &[])?;
            }
            ToWorker::SaveTask => {
                worker.task.as_mut().ok_or_else(no_task)?.save(channel)?;
            }
            ToWorker::Shutdown => break,
        }
    }
    Ok(())
}

fn not_loaded(model: u32) -> WorkerError {
    WorkerError::Order(format!("model {model}, which is not loaded"))
}

fn no_task() -> WorkerError {
    WorkerError::Order("to train, and no task is prepared".to_owned())
}

/// The end of an execution.
pub(crate) struct Ended {
    pub(crate) result: Result<Executed, ExecutionFault>,
    /// Whether the worker can go on; if not, another one takes over.
    pub(crate) then: Result<(), WorkerError>,
}

/// What executes.
enum Executor {
    Host,
    Cuda(Box<CudaExecutor>),
}

struct Worker {
    shared: Shared,
    executor: Executor,
    torch: TorchDevice,
    models: HashMap<u32, Model>,
    task: Option<ServedTask>,
    /// What copies, in a worker with memory of its own.
    alone: Option<Alone>,
}

impl Worker {
    fn attach(attach: &Attach, descriptors: Vec<OwnedFd>) -> Result<Self, WorkerError> {
        let mut descriptors = descriptors.into_iter();
        let (Some(slots), Some(control)) = (descriptors.next(), descriptors.next()) else {
            return Err(ProtocolError::Descriptors { message: "Attach", found: 0, expected: 3 }.into());
        };
        if attach.deterministic {
            // SAFETY: a worker that attaches has no other thread yet. cuBLAS asks for it.
            unsafe { std::env::set_var("CUBLAS_WORKSPACE_CONFIG", ":4096:8") };
            choose_deterministic_kernels();
        }
        let id: DeviceId = attach.device.id.parse()?;
        let (device, pool) = match &attach.memory {
            WorkerMemory::Pool(handle) => {
                let device = open_device(id, LinkThrottle::default())?;
                let pool = device.open(MemoryHandle::from_parts(handle, descriptors.collect())?)?;
                (device, pool)
            }
            WorkerMemory::Own { bytes, link_bytes_per_s } => {
                let device = open_device(id, alone::throttle(*link_bytes_per_s))?;
                let own = device.allocate(*bytes)?;
                (device, own)
            }
        };
        if attach.device.threads > 0 {
            tch::set_num_threads(i32::try_from(attach.device.threads).unwrap_or(i32::MAX));
        }
        let control = Arc::new(SharedMemory::from_fd(control, attach.control_bytes)?);
        for offset in control::WORDS {
            control.word(attach.control + offset)?;
        }
        let shared = Shared {
            device,
            pool,
            slots: Arc::new(SharedMemory::from_fd(slots, attach.slots_bytes)?),
            control,
            block: attach.control,
            arenas: attach.arenas.clone(),
        };
        let (executor, torch) = match id {
            DeviceId::Host(_) => {
                ExecutionArena::install_on_cpu(shared.pool.address(), shared.pool.bytes());
                (Executor::Host, TorchDevice::Cpu)
            }
            DeviceId::Cuda(ordinal) => {
                let executor = CudaExecutor::attach(ordinal, &shared, attach.waits_by_kernels)?;
                (Executor::Cuda(Box::new(executor)), TorchDevice::Cuda(ordinal))
            }
        };
        let alone = match attach.memory {
            WorkerMemory::Pool(_) => None,
            WorkerMemory::Own { .. } => Some(Alone::new(&shared)?),
        };
        Ok(Self { shared, executor, torch, models: HashMap::new(), task: None, alone })
    }

    /// Builds a model over its home; the inner error is a line for the registry, the outer one ends the worker.
    fn load(
        &mut self,
        load: &LoadModel,
        descriptors: Vec<OwnedFd>,
    ) -> Result<Result<(), String>, WorkerError> {
        match self.build(load, descriptors) {
            Ok(mut model) => {
                if let Executor::Cuda(cuda) = &mut self.executor {
                    cuda.load(load.model, &mut model, &self.shared)?;
                }
                self.models.insert(load.model, model);
                Ok(Ok(()))
            }
            Err(reason) => Ok(Err(reason)),
        }
    }

    fn build(&self, load: &LoadModel, descriptors: Vec<OwnedFd>) -> Result<Model, String> {
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
        let host_span = self.host_span(load, descriptors).map_err(|error| error.to_string())?;
        if host_span.as_ref().is_some_and(|host| host.bytes() < span.used_bytes) {
            return Err(format!("the span in the host store is shorter than {} bytes", span.used_bytes));
        }
        let base = self.shared.slice(load.span).map_err(|error| error.to_string())?.address();
        let place = |base: DeviceAddress, weight: &Weight| {
            DeviceAddress(base.0 + span.offset(weight.storage) + weight.offset_bytes)
        };
        let on_host = |weight: &Weight| {
            let is_table = load.tables.binary_search(&weight.storage.0).is_ok();
            host_span.as_ref().filter(|_| is_table).map(|host| place(host.address(), weight))
        };
        // SAFETY: the addresses lie inside of the home, which is part of the pool, which is mapped for as long as the
        // worker lives, or of the span in the host store, which the model keeps; `execute` waits for the weights at their
        // doorbells.
        let executable =
            unsafe { Executable::build(program, self.torch, |weight| place(base, weight), on_host) }
                .map_err(|error| error.to_string())?;
        let layers = program.layers();
        let weighted = (0..).zip(&layers).filter(|(_, layer)| layer.bytes > 0);
        let weighted_nodes: Vec<u32> = weighted.map(|(node, _)| node).collect();
        let examples = program.inputs.iter().filter_map(example).collect();
        let weights =
            Weights::new(&archive, load, &*self.shared.device).map_err(|error| error.to_string())?;
        Ok(Model {
            name: load.name.clone(),
            executable,
            doorbells: load.doorbells,
            wait_nodes: weighted_nodes.first().copied().into_iter().collect(),
            weighted_nodes,
            table_nodes: Vec::new(),
            _host_span: host_span,
            examples,
            weights,
            lies_at: Some(load.span.offset),
        })
    }

    /// The span in the host store, mapped and pinned here, if tables are to be read from there.
    fn host_span(
        &self,
        load: &LoadModel,
        descriptors: Vec<OwnedFd>,
    ) -> Result<Option<PinnedMemory>, WorkerError> {
        let Some(bytes) = load.host_span_bytes else { return Ok(None) };
        let found = descriptors.len();
        let Ok([descriptor]) = <[OwnedFd; 1]>::try_from(descriptors) else {
            return Err(ProtocolError::Descriptors { message: "Load", found, expected: 1 }.into());
        };
        let span = SharedMemory::from_fd(descriptor, bytes)?;
        Ok(Some(self.shared.device.pin(Arc::new(span))?))
    }

    /// Prepares the task of this worker; the inner error is a line for the controller.
    fn prepare_task(
        &mut self,
        order: &PrepareTask,
        channel: &Channel,
    ) -> Result<Result<TaskExtent, String>, WorkerError> {
        if let Executor::Cuda(cuda) = &self.executor
            && let Err(error) = cuda.prepare_training(&self.shared)
        {
            return Ok(Err(error.to_string()));
        }
        let prepared = ServedTask::prepare(order, &self.shared, channel)?;
        // A checkpoint may be on its way into the state, whose place others may have next.
        if let Executor::Cuda(cuda) = &self.executor {
            cuda.stream().synchronize()?;
        }
        Ok(prepared.map(|task| self.task.insert(task).extent()))
    }

    fn model(&mut self, number: u32) -> Result<&mut Model, WorkerError> {
        self.models.get_mut(&number).ok_or_else(|| not_loaded(number))
    }

    fn bring(&mut self, order: &Bring) -> Result<(), WorkerError> {
        let no_memory = || WorkerError::Order("to bring weights to memory that others write to".to_owned());
        let alone = self.alone.as_mut().ok_or_else(no_memory)?;
        let model = self.models.get(&order.model).ok_or_else(|| not_loaded(order.model))?;
        alone.bring(order, model, &self.shared)
    }

    fn move_part(
        &mut self,
        number: u32,
        part: Region,
        to: Elsewhere,
        descriptors: Vec<OwnedFd>,
    ) -> Result<(), WorkerError> {
        let is_managed = to == Elsewhere::Managed;
        let memory = alone::elsewhere(&*self.shared.device, part.bytes, to, descriptors)?;
        let model = self.models.get_mut(&number).ok_or_else(|| not_loaded(number))?;
        alone::move_part(model, part, memory)?;
        if let Executor::Cuda(cuda) = &mut self.executor {
            if is_managed {
                cuda.load(number, model, &self.shared)?;
            } else {
                cuda.run_without_graphs(number);
            }
        }
        Ok(())
    }

    fn send_back(&mut self, number: u32) -> Result<(), WorkerError> {
        self.settle()?;
        let device = Arc::clone(&self.shared.device);
        self.model(number)?.weights.send_back(&*device)
    }

    fn release(&mut self, number: u32) -> Result<(), WorkerError> {
        self.settle()?;
        self.model(number)?.weights.release();
        Ok(())
    }

    /// Waits until memory that is given back is not copied to or from any more.
    fn settle(&mut self) -> Result<(), WorkerError> {
        Ok(self.alone.as_mut().map_or(Ok(()), Alone::settle)?)
    }

    fn unload(&mut self, model: u32) -> Result<(), WorkerError> {
        self.settle()?;
        self.models.remove(&model);
        if let Executor::Cuda(cuda) = &mut self.executor {
            cuda.unload(model);
        }
        Ok(())
    }

    fn plan(&mut self, number: u32, wait_nodes: Vec<u32>, table_nodes: Vec<u32>) -> Result<(), WorkerError> {
        // A model that could not be built is planned all the same: the controller may not have heard yet.
        let Some(model) = self.models.get_mut(&number) else { return Ok(()) };
        let ascending = wait_nodes.windows(2).all(|pair| pair[0] <= pair[1]);
        let nodes = model.executable.nodes();
        let inside = wait_nodes.iter().chain(&table_nodes).all(|&node| (node as usize) < nodes);
        let words = (wait_nodes.len() + table_nodes.len()) as u64;
        if !ascending || !inside || words * 4 > model.doorbells.bytes {
            return Err(WorkerError::Order(format!(
                "a plan for '{}' that its program cannot follow",
                model.name
            )));
        }
        model.table_nodes = table_nodes;
        model.wait_nodes = wait_nodes;
        if let Executor::Cuda(cuda) = &mut self.executor {
            cuda.plan(number, model, &self.shared)?;
        }
        Ok(())
    }

    /// Runs one execution. The error is the controller's.
    fn execute(&mut self, execute: &Execute) -> Result<Ended, WorkerError> {
        let Some(model) = self.models.get_mut(&execute.model) else {
            return Err(not_loaded(execute.model));
        };
        if model.weights.are_nowhere() {
            return Err(WorkerError::Order(format!("to run '{}', whose weights lie nowhere", model.name)));
        }
        let work = Work::new(execute, model, &self.shared)?;
        let arena = ExecutionArena::begin(work.arena, execute.arena.bytes);
        let (result, then) = match &mut self.executor {
            Executor::Host => (host::run(&self.shared, model, &work)?, Ok(())),
            Executor::Cuda(cuda) => cuda.run(&self.shared, model, &work)?,
        };
        let stats = arena.end();
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
        // What libtorch keeps there the next execution would overwrite: another worker takes over.
        let kept = WorkerError::Kept { bytes: stats.in_use_bytes };
        let then = if stats.in_use_bytes == 0 { then } else { then.and(Err(kept)) };
        Ok(Ended { result, then })
    }
}

/// An input as it was at export; none for those that are fixed.
fn example(input: &Input) -> Option<Example> {
    match &input.kind {
        InputKind::Tensor { dtype, shape, .. } => {
            let shape = shape.iter().map(pswitch_model::Dim::example).collect();
            Some(Example::Tensor { dtype: *dtype, shape })
        }
        InputKind::SymInt { dim, .. } => {
            Some(Example::Integer(i64::try_from(dim.example()).unwrap_or(i64::MAX)))
        }
        InputKind::Constant(_) => None,
    }
}
