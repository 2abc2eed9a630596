//! The part of a controller that a worker needs: a pool, slots, messages, and copies with their doorbells.

use std::collections::HashMap;
use std::fmt;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use pswitch_device::{
    CopyStream, Device, DeviceId, DeviceMemory, DeviceSlice, HostSlice, LinkThrottle, PinnedMemory,
    SharedMemory, doorbell, open_device,
};
use pswitch_mem_pool::{ArenaDivision, Range};
use pswitch_model::{Archive, InputKind, Layer, StorageId, Table};
use pswitch_protocol::{
    Attach, Channel, DeviceSpec, Execute, ExecutionFault, FromWorker, InputValue, LoadModel, PROFILE_COSTS,
    PlacedTensor, Region, ToWorker, WorkerMemory, control,
};
use safetensors::SafeTensors;

const DOORBELLS_BYTES: u64 = 1 << 20;
const HOMES_BYTES: u64 = 2 << 30;
/// Where models are built, and another place for their spans.
pub(crate) const OWN_HOME: u64 = DOORBELLS_BYTES;
pub(crate) const OTHER_HOME: u64 = OWN_HOME + HOMES_BYTES / 2;
const ARENA: Range = Range::new(DOORBELLS_BYTES + HOMES_BYTES, 2 << 30);
const SLOTS_BYTES: u64 = 256 << 20;
/// Outputs in the slots; inputs lie before, a profile behind.
const OUTPUTS: Region = Region { offset: 96 << 20, bytes: 96 << 20 };
const PROFILE: Region = Region { offset: 192 << 20, bytes: 64 << 20 };

/// How the weights of an execution come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Arrival {
    /// Every layer with bytes is a group.
    EveryLayer,
    /// One group for all.
    Whole,
    /// Every layer is a group, and tables are read from the host: they do not come at all.
    HostTables,
    /// They are there.
    Resident,
    /// Not at all.
    Never,
    /// Every layer with bytes is a group, and only the first two come.
    TwoLayers,
    /// Not at all, and their doorbells say so.
    Poisoned,
}

pub(crate) fn fixtures() -> PathBuf {
    let folder = std::env::var_os("PSWITCH_FIXTURES")
        .expect("PSWITCH_FIXTURES names the folder that `python -m pswitch.gpu_models --fixtures` made");
    PathBuf::from(folder)
}

pub(crate) fn fixture(name: &str) -> PathBuf {
    let folder = fixtures().join(name);
    assert!(folder.join("model.pt2").exists(), "{} is missing", folder.display());
    folder
}

pub(crate) fn folders() -> Vec<PathBuf> {
    let entries = std::fs::read_dir(fixtures()).expect("the folder of fixtures can be read");
    let mut folders: Vec<PathBuf> = entries
        .map(|entry| entry.expect("the folder can be read").path())
        .filter(|folder| folder.join("model.pt2").exists() && folder.join("cases.safetensors").exists())
        .collect();
    folders.sort();
    folders
}

/// Whether a fixture is there to be refused.
pub(crate) fn is_refused(folder: &Path) -> bool {
    has_tag(folder, "refused")
}

/// Whether the program writes to what is one copy for all executions.
pub(crate) fn writes_to_weights(folder: &Path) -> bool {
    has_tag(folder, "mutable-buffer")
}

fn has_tag(folder: &Path, tag: &str) -> bool {
    std::fs::read_to_string(folder.join("manifest.json"))
        .is_ok_and(|manifest| manifest.contains(&format!("\"{tag}\"")))
}

/// Inputs and what eager PyTorch made of them on this GPU.
pub(crate) struct Case {
    bytes: Arc<Vec<u8>>,
    index: usize,
    /// What all bytes of the inputs are instead, if it is given.
    pub(crate) input_byte: Option<u8>,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "case {}", self.index)
    }
}

/// Place among the program's outputs, shape and bytes.
pub(crate) type Output = (usize, Vec<u64>, Vec<u8>);

impl Case {
    pub(crate) fn all(folder: &Path) -> Vec<Self> {
        let bytes = Arc::new(std::fs::read(folder.join("cases.safetensors")).expect("the cases can be read"));
        let (_, header) = SafeTensors::read_metadata(&bytes).expect("the cases are safetensors");
        let facts = header.metadata().as_ref().expect("the cases have facts");
        assert!(facts.get("device").is_some_and(|device| device != "cpu"), "made on a GPU: {facts:?}");
        let count = facts["cases"].parse().expect("the cases are counted");
        (0..count).map(|index| Self { bytes: Arc::clone(&bytes), index, input_byte: None }).collect()
    }

    fn tensors(&self) -> SafeTensors<'_> {
        SafeTensors::deserialize(&self.bytes).expect("read before")
    }

    /// Whether eager PyTorch raised: then there are no outputs.
    pub(crate) fn raises(&self) -> bool {
        let prefix = format!("case{}.output.", self.index);
        !self.tensors().names().iter().any(|name| name.starts_with(&prefix))
    }

    fn input(&self, name: &str) -> (Vec<u64>, Vec<u8>) {
        let tensors = self.tensors();
        let tensor =
            tensors.tensor(&format!("case{}.input.{name}", self.index)).expect("every input is there");
        let mut data = tensor.data().to_vec();
        if let Some(byte) = self.input_byte {
            data.fill(byte);
        }
        (tensor.shape().iter().map(|&size| size as u64).collect(), data)
    }

    pub(crate) fn difference(&self, outputs: &[Output]) -> Option<String> {
        let tensors = self.tensors();
        let mut compared = 0;
        for (place, shape, bytes) in outputs {
            let Ok(expected) = tensors.tensor(&format!("case{}.output.{place}", self.index)) else {
                continue;
            };
            compared += 1;
            let expected_shape: Vec<u64> = expected.shape().iter().map(|&size| size as u64).collect();
            if &expected_shape != shape {
                return Some(format!("output {place} has shape {shape:?} and not {expected_shape:?}"));
            }
            if expected.data() != bytes {
                let differing = expected.data().iter().zip(bytes).filter(|(a, b)| a != b).count();
                return Some(format!("{differing} of {} bytes of output {place} differ", bytes.len()));
            }
        }
        (compared == 0).then(|| "no output was compared".to_owned())
    }
}

/// Bytes of a span: the first one, how many, and the node that waits for them.
type Part = (u64, u64, u32);

struct Loaded {
    path: PathBuf,
    archive: Archive,
    layers: Vec<Layer>,
    span: PinnedMemory,
    tables: Vec<Table>,
    wait_nodes: Vec<u32>,
}

/// A worker and what it is given.
pub(crate) struct Desk {
    device: Arc<dyn Device>,
    pool: Arc<dyn DeviceMemory>,
    slots: PinnedMemory,
    control: SharedMemory,
    copies: Box<dyn CopyStream>,
    worker: Child,
    channel: Channel,
    models: HashMap<u32, Loaded>,
    executions: u64,
    /// Where spans lie that executions use.
    pub(crate) home: u64,
    /// Whether executions compute nothing before they are let go.
    pub(crate) held_back: bool,
    /// Whether the next worker has the GPU to itself while it executes, and may wait by kernels.
    pub(crate) waits_by_kernels: bool,
    pub(crate) doorbell_timeout: Duration,
}

fn start_worker() -> (Child, Channel) {
    let (ours, theirs) = Channel::pair().unwrap();
    let stdin: OwnedFd = theirs.as_fd().try_clone_to_owned().unwrap();
    let worker = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "worker_process", "--ignored", "--nocapture"])
        .stdin(Stdio::from(stdin))
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    (worker, ours)
}

impl Desk {
    pub(crate) fn new() -> Self {
        let (worker, channel) = start_worker();
        let device = open_device(DeviceId::Cuda(0), LinkThrottle::default()).expect("there is a GPU");
        let slots = Arc::new(SharedMemory::create("slots", SLOTS_BYTES).unwrap());
        let desk = Self {
            pool: device.allocate(ARENA.end()).unwrap(),
            slots: device.pin(slots).unwrap(),
            control: SharedMemory::create("control", control::BLOCK_BYTES).unwrap(),
            copies: device.copy_stream("weights").unwrap(),
            device,
            worker,
            channel,
            models: HashMap::new(),
            executions: 0,
            home: OWN_HOME,
            held_back: false,
            waits_by_kernels: true,
            doorbell_timeout: Duration::from_secs(60),
        };
        desk.attach();
        desk
    }

    fn attach(&self) {
        let (pool, descriptors) = self.pool.export().unwrap().into_parts();
        assert!(descriptors.is_empty());
        let attach = Attach {
            worker: 0,
            device: DeviceSpec { id: "cuda:0".to_owned(), threads: 0 },
            memory: WorkerMemory::Pool(pool),
            slots_bytes: SLOTS_BYTES,
            arenas: vec![Region { offset: ARENA.offset, bytes: ARENA.bytes }],
            control: 0,
            control_bytes: control::BLOCK_BYTES,
            spin_us: 0,
            waits_by_kernels: self.waits_by_kernels,
            deterministic: false,
        };
        let descriptors = [self.slots.memory().fd(), self.control.fd()];
        self.channel.send(&ToWorker::Attach(attach), &descriptors).unwrap();
        assert_eq!(self.hear(), FromWorker::Attached);
    }

    fn hear(&self) -> FromWorker {
        self.channel.receive().unwrap().expect("the worker is still there").0
    }

    /// Whether the worker says nothing for as long.
    pub(crate) fn is_silent(&self, time: Duration) -> bool {
        std::thread::sleep(time);
        self.channel.set_nonblocking(true).unwrap();
        let received = self.channel.receive::<FromWorker>();
        self.channel.set_nonblocking(false).unwrap();
        matches!(received, Err(error) if error.would_block())
    }

    /// Lets go who is held back now, and all who come, or none.
    pub(crate) fn let_go(&self, let_go: bool) {
        self.control.word(control::LET_GO).unwrap().store(u32::from(let_go), Ordering::SeqCst);
    }

    /// Fills the begin of the outputs' place, so that what an earlier execution left is not taken for another's.
    pub(crate) fn wipe_outputs(&self) {
        self.slots.memory().write(OUTPUTS.offset, &[0xFF; 1 << 16]).unwrap();
    }

    /// Kills the worker, whatever it does, and starts another over the same pool.
    pub(crate) fn replace_worker(&mut self) {
        self.worker.kill().unwrap();
        self.worker.wait().unwrap();
        self.clear_words(0, DOORBELLS_BYTES / 4 / 1024);
        let word = ArenaDivision::doorbell_of(ARENA);
        self.device.set_word(&self.slice(word), doorbell::CLEAR).unwrap();
        (self.worker, self.channel) = start_worker();
        self.attach();
    }

    pub(crate) fn exit_code(&mut self) -> Option<i32> {
        self.worker.wait().unwrap().code()
    }

    pub(crate) fn outside_allocations(&self) -> u32 {
        self.control.word(control::ALLOCATIONS).unwrap().load(Ordering::Relaxed)
    }

    pub(crate) fn graphs(&self) -> u32 {
        self.control.word(control::GRAPHS).unwrap().load(Ordering::Relaxed)
    }

    pub(crate) fn free_bytes(&self) -> u64 {
        self.device.free_bytes().unwrap()
    }

    fn slice(&self, range: Range) -> DeviceSlice {
        DeviceSlice::new(Arc::clone(&self.pool), range.offset, range.bytes).unwrap()
    }

    fn word(&self, index: u64) -> DeviceSlice {
        self.slice(Range::new(4 * index, 4))
    }

    fn clear_words(&mut self, first: u64, count: u64) {
        let words = self.slice(Range::new(4 * first, 4 * count));
        self.copies.clear_words(&words).unwrap();
        self.copies.record().unwrap().wait(Instant::now() + Duration::from_secs(30)).unwrap();
    }

    /// One model at a time: all have the same homes.
    pub(crate) fn load(&mut self, folder: &Path) -> Result<u32, String> {
        let path = folder.join("model.pt2");
        let archive = Archive::open(&path).map_err(|error| error.to_string())?;
        let layout = archive.program().span();
        assert!(layout.used_bytes <= HOMES_BYTES / 2, "{} is too large", folder.display());
        let span = Arc::new(SharedMemory::create("span", layout.bytes.max(512)).unwrap());
        for (storage, &offset) in (0..).map(StorageId).zip(&layout.offsets) {
            span.write(offset, archive.storage_bytes(storage)).unwrap();
        }
        let span = self.device.pin(span).unwrap();
        let model = u32::try_from(self.executions).unwrap() + 1;
        self.executions += 1;
        let (layers, tables) = (archive.program().layers(), archive.program().tables());
        self.models.insert(model, Loaded { path, archive, layers, span, tables, wait_nodes: Vec::new() });
        self.load_again(model).map(|()| model)
    }

    pub(crate) fn load_again(&mut self, model: u32) -> Result<(), String> {
        let loaded = self.models.get_mut(&model).unwrap();
        loaded.wait_nodes.clear();
        let load = LoadModel {
            model,
            name: loaded.path.display().to_string(),
            path: loaded.path.display().to_string(),
            digest: loaded.archive.digest(),
            span: Region { offset: OWN_HOME, bytes: HOMES_BYTES / 2 },
            doorbells: Region { offset: 0, bytes: DOORBELLS_BYTES },
            tables: loaded.tables.iter().map(|table| table.storage.0).collect(),
            host_span_bytes: Some(loaded.span.bytes()),
            keeps_weights: false,
        };
        let span = loaded.span.memory().fd();
        self.channel.send(&ToWorker::Load(load), &[span]).unwrap();
        match self.hear() {
            FromWorker::Loaded { error, .. } => error.map_or(Ok(()), Err),
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn unload(&mut self, model: u32) {
        self.models.remove(&model);
        self.channel.send(&ToWorker::Unload { model }, &[]).unwrap();
    }

    /// The groups, and the tables, which are not among them.
    fn groups(&self, model: u32, arrival: Arrival) -> (Vec<Part>, Vec<Part>) {
        let loaded = &self.models[&model];
        let mut groups: Vec<Part> = Vec::new();
        let mut end = 0;
        for layer in &loaded.layers {
            let node = u32::try_from(layer.node).unwrap();
            let (layer_begin, layer_end) = (end, end + layer.bytes);
            end = layer_end;
            let inside =
                loaded.tables.iter().filter(|table| (layer_begin..layer_end).contains(&table.offset));
            let mut begin = layer_begin;
            // What lies before each table, and what is left behind the last.
            let mut parts: Vec<(u64, u64)> = Vec::new();
            for table in inside {
                parts.push((begin, table.offset));
                begin = table.offset + table.bytes;
            }
            parts.push((begin, layer_end));
            for (from, to) in parts.into_iter().filter(|(from, to)| from < to) {
                match groups.last_mut() {
                    Some(last) if arrival == Arrival::Whole && last.0 + last.1 == from => last.1 += to - from,
                    Some(last) if last.0 + last.1 == from && last.2 == node => last.1 += to - from,
                    _ => groups.push((from, to - from, node)),
                }
            }
        }
        // One wait a node: parts of one layer on both sides of a table are waited for together, at the later word.
        groups.dedup_by(|later, earlier| {
            let same = later.2 == earlier.2;
            assert!(!same, "a layer with a table in its middle");
            same
        });
        let tables = loaded.tables.iter();
        let tables =
            tables.map(|table| (table.offset, table.bytes, u32::try_from(table.node).unwrap())).collect();
        (groups, tables)
    }

    fn order(&mut self, model: u32, case: &Case, arrival: Arrival, profile: Option<Region>) -> Execute {
        let loaded = &self.models[&model];
        let inputs: Vec<_> = loaded
            .archive
            .program()
            .inputs
            .iter()
            .filter(|input| !matches!(input.kind, InputKind::Constant(_)))
            .map(|input| (input.kind.clone(), case.input(&input.name)))
            .collect();
        let sizes = inputs.iter().filter_map(|(kind, (_, data))| {
            matches!(kind, InputKind::Tensor { .. }).then_some(data.len() as u64)
        });
        let division = ArenaDivision::new(ARENA, sizes).unwrap();
        let mut places = division.inputs.iter();
        let mut offset = 0_u64;
        let mut values = Vec::new();
        for (kind, (shape, data)) in inputs {
            values.push(match kind {
                InputKind::Tensor { dtype, .. } => {
                    let place = *places.next().unwrap();
                    self.slots.memory().write(offset, &data).unwrap();
                    let from = HostSlice::new(self.slots.clone(), offset, data.len() as u64).unwrap();
                    let to = self.slice(place);
                    self.copies.copy_in(&from, &to).unwrap();
                    offset = (offset + data.len() as u64).next_multiple_of(512);
                    InputValue::Tensor(PlacedTensor {
                        dtype: u8::try_from(dtype.schema_code()).unwrap(),
                        shape,
                        at: Region { offset: place.offset, bytes: place.bytes },
                    })
                }
                _ => InputValue::Integer(i64::from_le_bytes(data.try_into().unwrap())),
            });
        }
        assert!(offset <= OUTPUTS.offset);
        let doorbell = self.slice(division.doorbell);
        self.copies.write_word(&doorbell, doorbell::RUNG).unwrap();
        self.executions += 1;
        Execute {
            execution: self.executions,
            model,
            inputs: values,
            input_doorbell: division.doorbell.offset,
            home: self.home,
            arena: Region { offset: division.activations.offset, bytes: division.activations.bytes },
            resident: arrival == Arrival::Resident,
            held_back: self.held_back,
            host_tables: arrival == Arrival::HostTables,
            outputs: OUTPUTS,
            profile,
            doorbell_timeout_ms: u64::try_from(self.doorbell_timeout.as_millis()).unwrap(),
        }
    }

    fn start(&mut self, model: u32, case: &Case, arrival: Arrival, profile: Option<Region>) {
        let (groups, tables) = self.groups(model, arrival);
        let nodes = |groups: &[Part]| groups.iter().map(|&(.., node)| node).collect::<Vec<u32>>();
        let (wait_nodes, table_nodes) = (nodes(&groups), nodes(&tables));
        if arrival != Arrival::Resident {
            // What an earlier execution left: no weights, no rung doorbells.
            self.clear_words(0, (groups.len() + tables.len()) as u64);
            self.wipe_home(model);
            if self.models[&model].wait_nodes != wait_nodes {
                let plan = ToWorker::Plan { model, wait_nodes: wait_nodes.clone(), table_nodes };
                self.channel.send(&plan, &[]).unwrap();
                self.models.get_mut(&model).unwrap().wait_nodes = wait_nodes;
            }
        }
        let order = self.order(model, case, arrival, profile);
        self.channel.send(&ToWorker::Execute(order), &[]).unwrap();
        let words = groups.len() + tables.len();
        let mut sent: Vec<(u64, Part)> = (0..).zip(groups.into_iter().chain(tables)).collect();
        match arrival {
            Arrival::EveryLayer | Arrival::Whole | Arrival::HostTables | Arrival::TwoLayers => {
                match arrival {
                    Arrival::HostTables => sent.truncate(words - self.models[&model].tables.len()),
                    Arrival::TwoLayers => sent.truncate(2),
                    _ => {}
                }
                for (index, (offset, bytes, _)) in sent {
                    let from = HostSlice::new(self.models[&model].span.clone(), offset, bytes).unwrap();
                    let to = self.slice(Range::new(self.home + offset, bytes));
                    let word = self.word(index);
                    self.copies.copy_in(&from, &to).unwrap();
                    self.copies.write_word(&word, doorbell::RUNG).unwrap();
                }
            }
            Arrival::Poisoned => {
                for index in 0..words as u64 {
                    self.device.set_word(&self.word(index), doorbell::POISONED).unwrap();
                }
            }
            Arrival::Resident | Arrival::Never => {}
        }
    }

    /// Fills the home with what is no number, so that an operator that does not wait shows.
    fn wipe_home(&mut self, model: u32) {
        let bytes = self.models[&model].span.bytes();
        let garbage = SharedMemory::create("garbage", bytes).unwrap();
        garbage.write(0, &vec![0xFF; usize::try_from(bytes).unwrap()]).unwrap();
        let from = self.device.pin(Arc::new(garbage)).unwrap();
        let to = self.slice(Range::new(self.home, bytes));
        self.copies.copy_in(&HostSlice::new(from, 0, bytes).unwrap(), &to).unwrap();
        self.copies.record().unwrap().wait(Instant::now() + Duration::from_secs(30)).unwrap();
    }

    /// Begins an execution. Its end comes by [`finish`](Self::finish), if somebody waits for it.
    pub(crate) fn begin(&mut self, model: u32, case: &Case, arrival: Arrival) {
        self.start(model, case, arrival, None);
    }

    pub(crate) fn run(
        &mut self,
        model: u32,
        case: &Case,
        arrival: Arrival,
    ) -> Result<Vec<Output>, ExecutionFault> {
        self.start(model, case, arrival, None);
        self.finish(model)
    }

    pub(crate) fn finish(&self, model: u32) -> Result<Vec<Output>, ExecutionFault> {
        let FromWorker::Finished { execution, result, .. } = self.hear() else { panic!("no end came") };
        assert_eq!(execution, self.executions);
        let outputs = self.models[&model].archive.program().outputs.iter().enumerate();
        let places = outputs.filter_map(|(place, output)| output.kind.value().map(|_| place));
        Ok(places
            .zip(result?.outputs)
            .map(|(place, tensor)| {
                let mut bytes = vec![0; usize::try_from(tensor.at.bytes).unwrap()];
                self.slots.memory().read(tensor.at.offset, &mut bytes).unwrap();
                (place, tensor.shape, bytes)
            })
            .collect())
    }

    /// Microseconds of every node; of a wait, and of a copy with its doorbell.
    pub(crate) fn profile(&mut self, model: u32, case: &Case) -> (Vec<f32>, [f32; 2]) {
        self.start(model, case, Arrival::EveryLayer, Some(PROFILE));
        self.finish(model).unwrap();
        let nodes = self.models[&model].layers.len();
        let costs = usize::try_from(PROFILE_COSTS).unwrap();
        let mut bytes = vec![0; 4 * (nodes + costs)];
        self.slots.memory().read(PROFILE.offset, &mut bytes).unwrap();
        let words = bytes.as_chunks::<4>().0.iter().map(|word| f32::from_le_bytes(*word));
        let mut times: Vec<f32> = words.collect();
        let costs = times.split_off(nodes);
        (times, costs.try_into().unwrap())
    }
}

impl Drop for Desk {
    fn drop(&mut self) {
        let _ = self.worker.kill();
        let _ = self.worker.wait();
    }
}
