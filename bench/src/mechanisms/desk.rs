//! What workers that are alone are told: to allocate, to load a model, to bring its weights, to run it, to train.

use std::ffi::OsString;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context as _, bail, ensure};
use pswitch_controller::{Bandwidth, PlacedTensor as Input, Slot, SlotMemory};
use pswitch_device::{DeviceId, SharedMemory};
use pswitch_mem_pool::{ArenaDivision, Range};
use pswitch_model::{Archive, InputKind, Layer};
use pswitch_protocol::{
    Attach, Bring, DeviceSpec, Execute, Executed, FromWorker, InputValue, LoadModel, PlacedTensor,
    PrepareTask, Region, ToWorker, WorkerMemory, control,
};
use pswitch_train::{StateLayout, TaskConfig};
use pswitch_transfer::Plan;

use super::process::Process;
use crate::subject::{Served, Subject};

/// Memory that requests are cut from: one at a time.
const SLOTS_BYTES: u64 = 64 << 20;

/// Room for the outputs of a request.
const OUTPUTS_BYTES: u64 = 16 << 20;

/// Room for doorbells, a word a group.
const DOORBELLS_BYTES: u64 = 64 << 10;

/// How long workers of GPUs look for the next message before they sleep: as those of a server.
const SPIN_US: u64 = 2000;

/// The number of the model in every worker: there is one.
pub(super) const MODEL: u32 = 0;

/// A model and a task, and where they lie in the memory of a worker that is alone.
pub(crate) struct Desk {
    served: Served,
    link: Option<Bandwidth>,
    name: String,
    path: PathBuf,
    pub(super) archive: Archive,
    layers: Vec<Layer>,
    pub(super) slots: Arc<SlotMemory>,
    pub(super) room: Room,
    task: PrepareTask,
    training_bytes: u64,
}

/// Places in a worker's memory.
#[derive(Debug, Clone, Copy)]
pub(super) struct Room {
    pub(super) doorbells: Region,
    pub(super) span: Region,
    pub(super) arena: Region,
}

impl Room {
    pub(super) fn bytes(&self) -> u64 {
        self.arena.offset + self.arena.bytes
    }
}

/// A request in a slot.
pub(crate) struct Request {
    pub(super) inputs: Vec<Input>,
    pub(super) slot: Slot,
}

/// An execution that was told, and what has to be copied for it.
pub(super) struct Order {
    /// From the slot memory to the worker's memory.
    pub(super) inputs: Vec<(Region, Region)>,
    pub(super) execute: Execute,
}

/// A part of a span that moves at once, and the node that waits for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Group {
    pub(super) part: Region,
    pub(super) node: u32,
}

impl Desk {
    pub(crate) fn new(
        subject: &Subject,
        served: Served,
        link: Option<Bandwidth>,
        arena_bytes: u64,
        task: &TaskConfig,
        training_bytes: u64,
    ) -> anyhow::Result<Self> {
        let archive = Archive::open(&subject.archive)?;
        let region = |offset: u64, bytes: u64| Region { offset, bytes };
        let doorbells = region(0, DOORBELLS_BYTES);
        let span = region(DOORBELLS_BYTES, archive.program().span().bytes.max(512).next_multiple_of(512));
        let arena = region(span.offset + span.bytes, arena_bytes);
        let program = Archive::open(&task.archive())?;
        let state_bytes = StateLayout::new(program.program(), &task.optimizer)?.bytes;
        ensure!(
            state_bytes < training_bytes,
            "a training size of {training_bytes} bytes does not hold a state of {state_bytes}"
        );
        Ok(Self {
            served,
            link,
            name: subject.name.clone(),
            path: subject.archive.clone(),
            layers: archive.program().layers(),
            archive,
            slots: SlotMemory::new(Arc::new(SharedMemory::create("pswitch-slots", SLOTS_BYTES)?)),
            room: Room { doorbells, span, arena },
            task: PrepareTask {
                name: "bench".to_owned(),
                config: serde_json::to_string(task)?,
                digest: program.digest(),
                state: region(0, state_bytes),
            },
            training_bytes,
        })
    }

    pub(super) fn device(&self) -> DeviceId {
        self.served.device
    }

    pub(super) fn link(&self) -> Option<Bandwidth> {
        self.link
    }

    /// Bytes of a worker's memory that may serve or train, one at a time.
    pub(super) fn either_bytes(&self) -> u64 {
        self.training_bytes.max(self.room.bytes())
    }

    pub(super) fn training_bytes(&self) -> u64 {
        self.training_bytes
    }

    /// Starts a process with so many bytes of memory of its own. With `graphs` it captures what it loads, which takes long
    /// and pays for one that answers again and again.
    pub(super) fn start(
        &self,
        environment: &[(&'static str, OsString)],
        bytes: u64,
        graphs: bool,
    ) -> anyhow::Result<Process> {
        // Given in whole bytes.
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        let link_bytes_per_s = self.link.map(|link| link.bytes_per_s() as u64);
        self.attach(environment, WorkerMemory::Own { bytes, link_bytes_per_s }, &[], graphs)
    }

    /// Starts a process with memory that somebody else has allocated, or its own.
    pub(super) fn attach(
        &self,
        environment: &[(&'static str, OsString)],
        memory: WorkerMemory,
        handle: &[OwnedFd],
        graphs: bool,
    ) -> anyhow::Result<Process> {
        let mut process = Process::start(environment)?;
        let attach = Attach {
            worker: 0,
            device: DeviceSpec { id: self.served.device.to_string(), threads: self.served.threads },
            memory,
            slots_bytes: SLOTS_BYTES,
            arenas: if graphs { vec![self.room.arena] } else { Vec::new() },
            control: 0,
            control_bytes: control::BLOCK_BYTES,
            spin_us: if matches!(self.served.device, DeviceId::Cuda(_)) { SPIN_US } else { 0 },
            waits_by_kernels: false,
            deterministic: false,
        };
        let control = process.control().fd().try_clone_to_owned()?;
        let mut descriptors = vec![self.slots.shared().fd(), control.as_fd()];
        descriptors.extend(handle.iter().map(AsFd::as_fd));
        process.send(&ToWorker::Attach(attach), &descriptors)?;
        Ok(process)
    }

    /// Has a process prepare the task, and does not wait.
    pub(super) fn prepare(&self, process: &mut Process) -> anyhow::Result<()> {
        process.send(&ToWorker::PrepareTask(self.task.clone()), &[])
    }

    /// Has a process prepare the task and train. Its memory, of so many bytes, is the task's.
    pub(super) fn train(&self, process: &mut Process, bytes: u64) -> anyhow::Result<()> {
        self.prepare(process)?;
        process.train(&self.training_order(bytes))
    }

    /// To begin or to go on, in a process whose task is prepared or will be by then.
    pub(super) fn training_order(&self, bytes: u64) -> ToWorker {
        let offset = self.task.state.offset + self.task.state.bytes;
        ToWorker::Train { arena: Region { offset, bytes: bytes - offset }, holds: false }
    }

    /// Has a process build the model, with or without a copy of the weights, and waits until it has.
    pub(super) fn load(&self, process: &mut Process, keeps_weights: bool) -> anyhow::Result<()> {
        let load = LoadModel {
            model: MODEL,
            name: self.name.clone(),
            path: self.path.display().to_string(),
            digest: self.archive.digest(),
            span: self.room.span,
            doorbells: self.room.doorbells,
            tables: Vec::new(),
            host_span_bytes: None,
            keeps_weights,
        };
        process.send(&ToWorker::Load(load), &[])?;
        match process.hear()? {
            FromWorker::Loaded { error: None, .. } => Ok(()),
            FromWorker::Loaded { error: Some(reason), .. } => bail!("the model cannot be loaded: {reason}"),
            other => bail!("a process that loads says {other:?}"),
        }
    }

    /// Tells a process for which groups it has to wait.
    pub(super) fn plan(&self, process: &mut Process, groups: &[Group]) -> anyhow::Result<()> {
        let wait_nodes = groups.iter().map(|group| group.node).collect();
        process.send(&ToWorker::Plan { model: MODEL, wait_nodes, table_nodes: Vec::new() }, &[])
    }

    /// All weights at once.
    pub(super) fn whole(&self) -> Vec<Region> {
        let bytes = self.archive.program().span().used_bytes;
        if bytes == 0 { Vec::new() } else { vec![Region { offset: 0, bytes }] }
    }

    /// The groups of a plan, as parts of the span.
    pub(super) fn groups(&self, plan: &Plan) -> anyhow::Result<Vec<Group>> {
        let cuts: Vec<_> = plan.groups.iter().map(|group| (group.first_layer, group.last_layer)).collect();
        groups(&self.layers, &cuts).context("the plan is another model's")
    }

    /// What it takes to run a request; `resident` says that the weights lie in their place.
    pub(super) fn order(&self, request: &Request, resident: bool) -> anyhow::Result<Order> {
        let begin = request.slot.offset_bytes();
        let mut sent = Vec::new();
        for input in &self.archive.program().inputs {
            if matches!(input.kind, InputKind::Constant(_)) {
                continue;
            }
            let placed = request.inputs.iter().find(|placed| placed.spec.name == input.name);
            sent.push((&input.kind, placed.with_context(|| format!("input '{}' is missing", input.name))?));
        }
        let tensors = sent.iter().filter(|(kind, _)| matches!(kind, InputKind::Tensor { .. }));
        let arena = Range::new(self.room.arena.offset, self.room.arena.bytes);
        let division = ArenaDivision::new(arena, tensors.map(|(_, placed)| placed.bytes))?;
        let mut places = division.inputs.iter().map(|place| region(*place));
        let (mut inputs, mut values) = (Vec::new(), Vec::new());
        for (kind, placed) in sent {
            let from = Region { offset: begin + placed.offset_bytes, bytes: placed.bytes };
            if let InputKind::Tensor { dtype, .. } = kind {
                let at = places.next().context("an input without a place")?;
                let dtype = u8::try_from(dtype.schema_code())?;
                let shape = placed.spec.shape.clone();
                values.push(InputValue::Tensor(PlacedTensor { dtype, shape, at }));
                inputs.push((from, at));
            } else {
                let mut bytes = [0; 8];
                request.slot.read(placed.offset_bytes, &mut bytes)?;
                values.push(InputValue::Integer(i64::from_le_bytes(bytes)));
            }
        }
        let offset = request.slot.bytes() - OUTPUTS_BYTES;
        let execute = Execute {
            execution: 0,
            model: MODEL,
            inputs: values,
            input_doorbell: division.doorbell.offset,
            home: self.room.span.offset,
            arena: region(division.activations),
            resident,
            held_back: false,
            host_tables: false,
            outputs: Region { offset: begin + offset, bytes: OUTPUTS_BYTES },
            profile: None,
            doorbell_timeout_ms: 60_000,
        };
        Ok(Order { inputs, execute })
    }

    /// Has a process bring a request's inputs, and these parts of the weights, and run it; waits for the end.
    pub(super) fn bring_and_run(
        &self,
        process: &mut Process,
        request: &Request,
        groups: Vec<Region>,
    ) -> anyhow::Result<Executed> {
        let Order { inputs, execute } = self.order(request, groups.is_empty())?;
        let bring = Bring { model: MODEL, inputs, input_doorbell: execute.input_doorbell, groups };
        process.send(&ToWorker::Bring(bring), &[])?;
        process.send(&ToWorker::Execute(execute), &[])?;
        Self::await_outputs(process)
    }

    /// Has a process bring parts of the weights, with no request there.
    pub(super) fn bring(&self, process: &mut Process, groups: Vec<Region>) -> anyhow::Result<()> {
        let arena = Range::new(self.room.arena.offset, self.room.arena.bytes);
        let input_doorbell = ArenaDivision::doorbell_of(arena).offset;
        let bring = Bring { model: MODEL, inputs: Vec::new(), input_doorbell, groups };
        process.send(&ToWorker::Bring(bring), &[])
    }

    pub(super) fn await_outputs(process: &mut Process) -> anyhow::Result<Executed> {
        match process.hear()? {
            FromWorker::Finished { result: Ok(executed), .. } => Ok(executed),
            FromWorker::Finished { result: Err(fault), .. } => bail!("the request failed: {}", fault.message),
            other => bail!("a process that runs a request says {other:?}"),
        }
    }

    /// Bytes of a slot for inputs of so many bytes.
    pub(super) fn slot_bytes(input_bytes: u64) -> u64 {
        input_bytes.next_multiple_of(512) + OUTPUTS_BYTES
    }
}

fn region(range: Range) -> Region {
    Region { offset: range.offset, bytes: range.bytes }
}

/// Cuts a span between layers; groups without bytes are none. Nothing if there are no such layers.
fn groups(layers: &[Layer], cuts: &[(usize, usize)]) -> Option<Vec<Group>> {
    let (mut found, mut offset) = (Vec::new(), 0);
    for &(first, last) in cuts {
        let layers = layers.get(first..=last)?;
        let bytes = layers.iter().map(|layer| layer.bytes).sum();
        if let Some(waits) = layers.iter().find(|layer| layer.bytes > 0) {
            let node = u32::try_from(waits.node).ok()?;
            found.push(Group { part: Region { offset, bytes }, node });
        }
        offset += bytes;
    }
    Some(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_cut_between_layers_and_wait_for_their_first_bytes() {
        let layers: Vec<Layer> = (0..)
            .zip([0, 512, 0, 1024, 0])
            .map(|(node, bytes)| Layer { name: String::new(), node, bytes })
            .collect();
        let group = |offset, bytes, node| Group { part: Region { offset, bytes }, node };
        assert_eq!(groups(&layers, &[(0, 4)]), Some(vec![group(0, 1536, 1)]));
        assert_eq!(groups(&layers, &[(0, 1), (2, 4)]), Some(vec![group(0, 512, 1), group(512, 1024, 3)]));
        assert_eq!(groups(&layers, &[(0, 3), (4, 4)]), Some(vec![group(0, 1536, 1)]));
        assert_eq!(groups(&layers, &[(0, 5)]), None);
    }
}
