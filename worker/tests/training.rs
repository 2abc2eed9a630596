//! Training against the same loop in eager PyTorch: losses and final states to the last bit, with and without stops.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use pswitch_device::{DeviceAddress, SharedMemory};
use pswitch_model::{Archive, DType, InputKind, StorageId};
use pswitch_protocol::{FaultClass, control};
use pswitch_train::{Optimizer, Role, StateLayout, step_seed};
use pswitch_worker::{
    ExecutionArena, Input, Pace, Phase, RunError, StepEnd, StepOrder, TorchDevice, Trainer,
};
use safetensors::SafeTensors;
use serde_json::Value;

const ARENA_BYTES: u64 = 512 << 20;

/// One libtorch with one arena.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

fn exclusive() -> (MutexGuard<'static, ()>, SharedMemory) {
    let guard = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let arena = SharedMemory::create("arena", ARENA_BYTES).unwrap();
    ExecutionArena::install_on_cpu(DeviceAddress(arena.as_ptr() as u64), ARENA_BYTES);
    (guard, arena)
}

fn folder(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/training").join(name);
    assert!(folder.join("model.pt2").exists(), "{} is missing: run `cargo xtask fixtures`", folder.display());
    folder
}

/// A training program with its state, its data and what eager PyTorch made of them.
struct Task {
    trainer: Trainer,
    state: SharedMemory,
    inputs: Vec<(String, DType)>,
    data: Vec<u8>,
    reference: Vec<u8>,
    manifest: Value,
    run: String,
    batch_size: u64,
    rows: u64,
    seed: u64,
    rate: f64,
    micro_batches: u32,
    clip_norm: Option<f64>,
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap()
}

fn optimizer(run: &Value) -> (Optimizer, f64) {
    let settings = &run["settings"];
    let of = |name: &str| number(&settings[name]);
    let betas = || [number(&settings["betas"][0]), number(&settings["betas"][1])];
    let lr = of("lr");
    let optimizer = match run["optimizer"].as_str().unwrap() {
        "SGD" => Optimizer::Sgd {
            lr,
            momentum: of("momentum"),
            dampening: of("dampening"),
            nesterov: settings["nesterov"].as_bool().unwrap(),
            weight_decay: of("weight_decay"),
        },
        "Adam" => Optimizer::Adam { lr, betas: betas(), eps: of("eps"), weight_decay: of("weight_decay") },
        "AdamW" => Optimizer::AdamW { lr, betas: betas(), eps: of("eps"), weight_decay: of("weight_decay") },
        other => panic!("no optimizer {other}"),
    };
    (optimizer, lr)
}

impl Task {
    fn new(name: &str, run: &str) -> Self {
        let folder = folder(name);
        let read = |file: &str| std::fs::read(folder.join(file)).unwrap();
        let manifest: Value = serde_json::from_slice(&read("manifest.json")).unwrap();
        let archive = Archive::open(&folder.join("model.pt2")).unwrap();
        let program = archive.program();
        let facts = &manifest["runs"][run];
        let (optimizer, rate) = optimizer(facts);
        let layout = StateLayout::new(program, &optimizer).unwrap();
        let state = SharedMemory::create("state", layout.bytes).unwrap();
        let span = program.span();
        for (storage, &offset) in (0..).map(StorageId).zip(&span.offsets) {
            state.write(offset, archive.storage_bytes(storage)).unwrap();
        }
        tch::set_num_threads(i32::try_from(manifest["torch_threads"].as_i64().unwrap()).unwrap());
        let base = DeviceAddress(state.as_ptr() as u64);
        // SAFETY: the state lives as long as the trainer, holds the weights, and is nobody else's.
        let trainer = unsafe { Trainer::build(program, TorchDevice::Cpu, &optimizer, base, &[]) }.unwrap();
        let inputs = program
            .inputs
            .iter()
            .map(|input| match &input.kind {
                InputKind::Tensor { dtype, .. } => (input.name.clone(), *dtype),
                other => panic!("no tensor: {other:?}"),
            })
            .collect();
        let count = |name: &str| manifest[name].as_u64().unwrap();
        Self {
            trainer,
            state,
            inputs,
            data: read("data.safetensors"),
            reference: read("reference.safetensors"),
            run: run.to_owned(),
            batch_size: count("batch_size"),
            rows: count("rows"),
            seed: count("seed"),
            rate,
            micro_batches: u32::try_from(facts["micro_batches"].as_u64().unwrap()).unwrap(),
            clip_norm: facts["max_norm"].as_f64(),
            manifest,
        }
    }

    /// The inputs of a batch: rows in their order, epoch after epoch. The memory is theirs.
    fn batch(&self, index: u64) -> (Vec<Input>, Vec<SharedMemory>) {
        let data = SafeTensors::deserialize(&self.data).unwrap();
        let start = index % self.rows.div_ceil(self.batch_size) * self.batch_size;
        let rows = self.batch_size.min(self.rows - start);
        let mut memory = Vec::new();
        let mut input = |(name, dtype): &(String, DType)| {
            let tensor = data.tensor(name).unwrap();
            let row_bytes = tensor.data().len() / usize::try_from(self.rows).unwrap();
            let mut shape: Vec<u64> = tensor.shape().iter().map(|&size| size as u64).collect();
            shape[0] = rows;
            let (first, count) = (usize::try_from(start).unwrap(), usize::try_from(rows).unwrap());
            // Where the file has them they are not aligned as PyTorch's tensors are.
            let place = SharedMemory::create("batch", (count * row_bytes) as u64).unwrap();
            place.write(0, &tensor.data()[first * row_bytes..(first + count) * row_bytes]).unwrap();
            let at = DeviceAddress(place.as_ptr() as u64);
            memory.push(place);
            Input::Tensor { at, dtype: *dtype, shape }
        };
        let inputs = self.inputs.iter().map(&mut input).collect();
        (inputs, memory)
    }

    fn step(&mut self, step: u64, pace: &dyn Pace, arena: &SharedMemory) -> Result<StepEnd, RunError> {
        let order = StepOrder {
            seed: step_seed(self.seed, step),
            rate: self.rate,
            micro_batches: self.micro_batches,
            clip_norm: self.clip_norm,
        };
        let micro_batches = u64::from(self.micro_batches);
        let batches: Vec<_> =
            (0..micro_batches).map(|index| self.batch(step * micro_batches + index)).collect();
        let scope = ExecutionArena::begin(DeviceAddress(arena.as_ptr() as u64), arena.bytes());
        // SAFETY: the data stays where it is.
        let end = unsafe { self.trainer.step(&order, pace, |index| Ok(batches[index as usize].0.clone())) };
        assert_eq!(scope.end().in_use_bytes, 0, "a step keeps nothing in the arena");
        end
    }

    fn loss(&mut self, step: u64, arena: &SharedMemory) -> f32 {
        match self.step(step, &AtomicU32::new(0), arena).unwrap() {
            #[allow(clippy::cast_possible_truncation)] // it was one
            StepEnd::Finished { loss } => loss as f32,
            stopped @ StepEnd::Stopped { .. } => panic!("nobody stops it: {stopped:?}"),
        }
    }

    fn expected_losses(&self) -> Vec<f32> {
        let reference = SafeTensors::deserialize(&self.reference).unwrap();
        let losses = reference.tensor(&format!("{}.losses", self.run)).unwrap();
        losses.data().as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
    }

    /// Names of parameters and buffers that are not what eager PyTorch has in the end.
    fn differing(&self) -> Vec<String> {
        let reference = SafeTensors::deserialize(&self.reference).unwrap();
        let prefix = format!("{}.final.", self.run);
        let mut compared = 0;
        let mut differing = Vec::new();
        for tensor in &self.trainer.state().tensors {
            if !matches!(tensor.role, Role::Parameter | Role::Buffer) {
                continue;
            }
            let mut found = vec![0; usize::try_from(tensor.bytes()).unwrap()];
            self.state.read(tensor.offset_bytes, &mut found).unwrap();
            for name in [&tensor.name].into_iter().chain(&tensor.also_named) {
                let Ok(expected) = reference.tensor(&format!("{prefix}{name}")) else {
                    continue;
                };
                compared += 1;
                if expected.data() != found {
                    differing.push(name.clone());
                }
            }
        }
        let expected = reference.names().into_iter().filter(|name| name.starts_with(&prefix)).count();
        assert_eq!(compared, expected);
        differing
    }
}

fn trains_as_pytorch_does(name: &str, run: &str) {
    let (_guard, arena) = exclusive();
    let mut task = Task::new(name, run);
    let expected = task.expected_losses();
    assert_eq!(expected.len() as u64, task.manifest["steps"].as_u64().unwrap());
    for (step, expected) in (0..).zip(expected) {
        let loss = task.loss(step, &arena);
        assert_eq!(loss.to_bits(), expected.to_bits(), "step {step}: {loss} and not {expected}");
    }
    assert_eq!(task.differing(), Vec::<String>::new());
    assert!(task.trainer.counts().iter().all(|&count| count == 20));
}

macro_rules! trains {
    ($($test:ident: $fixture:literal $run:literal,)*) => {
        $(#[test] fn $test() { trains_as_pytorch_does($fixture, $run); })*
    };
}

trains! {
    resnet18_sgd: "resnet18" "sgd",
    resnet18_adamw: "resnet18" "adamw",
    bert_sgd: "bert-2-layers" "sgd",
    bert_adamw: "bert-2-layers" "adamw",
    bert_clip_accumulate: "bert-2-layers" "clip-accumulate",
    perceptron_sgd: "perceptron" "sgd",
    perceptron_nesterov: "perceptron" "nesterov",
    perceptron_adam: "perceptron" "adam",
    perceptron_adamw: "perceptron" "adamw",
    perceptron_clip_accumulate: "perceptron" "clip-accumulate",
    tied_sgd: "tied" "sgd",
    tied_clip_accumulate: "tied" "clip-accumulate",
}

/// Stops a step ahead of an operator, forwards or backwards, by its number.
struct StopAt {
    operator: u64,
    asked: AtomicU64,
}

impl StopAt {
    fn new(operator: u64) -> Self {
        Self { operator, asked: AtomicU64::new(0) }
    }
}

impl Pace for StopAt {
    fn stops(&self) -> bool {
        self.asked.fetch_add(1, Ordering::Relaxed) >= self.operator
    }

    fn rests(&self) {}
}

/// Has a step stand still at random moments, as requests do, until all is over.
fn hold_again_and_again(word: &AtomicU32, is_over: &AtomicBool) -> u32 {
    let (mut random, mut holds) = (1_u64, 0);
    while !is_over.load(Ordering::Relaxed) {
        for told in [control::HOLD, control::GO_ON] {
            word.store(told, Ordering::Relaxed);
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            std::thread::sleep(Duration::from_micros((random >> 33) % 3000));
        }
        holds += 1;
    }
    holds
}

#[test]
fn standing_still_changes_nothing_and_nothing_is_computed_twice() {
    let (_guard, arena) = exclusive();
    for (name, run) in [("resnet18", "sgd"), ("perceptron", "clip-accumulate")] {
        let mut task = Task::new(name, run);
        let expected = task.expected_losses();
        let (word, is_over) = (AtomicU32::new(control::GO_ON), AtomicBool::new(false));
        let holds = std::thread::scope(|scope| {
            let holds = scope.spawn(|| hold_again_and_again(&word, &is_over));
            for (step, expected) in (0..).zip(&expected) {
                match task.step(step, &word, &arena).unwrap() {
                    #[allow(clippy::cast_possible_truncation)] // it was one
                    StepEnd::Finished { loss } => assert_eq!((loss as f32).to_bits(), expected.to_bits()),
                    stopped @ StepEnd::Stopped { .. } => panic!("nobody has it end: {stopped:?}"),
                }
            }
            is_over.store(true, Ordering::Relaxed);
            holds.join().unwrap()
        });
        assert!(holds > 0);
        assert_eq!(task.differing(), Vec::<String>::new(), "{name}");
    }
}

#[test]
fn one_that_stands_still_can_be_told_to_end() {
    let (_guard, arena) = exclusive();
    let mut task = Task::new("resnet18", "sgd");
    let word = AtomicU32::new(control::HOLD);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(20));
            word.store(control::END, Ordering::Relaxed);
        });
        let end = task.step(0, &word, &arena).unwrap();
        assert_eq!(end, StepEnd::Stopped { phase: Phase::Forward });
    });
    let expected = task.expected_losses()[0];
    assert_eq!(task.loss(0, &arena).to_bits(), expected.to_bits());
}

/// Stops at random moments until 100 of them have hit a step: the losses are those of a run without stops.
#[test]
fn a_hundred_stops_change_nothing() {
    let (_guard, arena) = exclusive();
    for (name, run, steps, stops) in
        [("resnet18", "sgd", 20, 100), ("perceptron", "clip-accumulate", 300, 100)]
    {
        let mut undisturbed = Task::new(name, run);
        let expected: Vec<f32> = (0..steps).map(|step| undisturbed.loss(step, &arena)).collect();
        // How many operators a step has, forwards and backwards.
        let counted = StopAt::new(u64::MAX);
        Task::new(name, run).step(0, &counted, &arena).unwrap();
        let operators = counted.asked.load(Ordering::Relaxed);
        let mut task = Task::new(name, run);
        let mut phases = [0_u32; 2];
        let mut losses = Vec::new();
        let mut random = 1_u64;
        let mut step = 0;
        while step < steps {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            // Once they have hit often enough, the rest goes undisturbed.
            let is_hit = phases.iter().sum::<u32>() < stops;
            let pace = StopAt::new(if is_hit { (random >> 33) % (operators * 10 / 9) } else { u64::MAX });
            match task.step(step, &pace, &arena).unwrap() {
                #[allow(clippy::cast_possible_truncation)] // it was one
                StepEnd::Finished { loss } => {
                    losses.push(loss as f32);
                    step += 1;
                }
                StepEnd::Stopped { phase } => phases[usize::from(phase == Phase::Backward)] += 1,
            }
        }
        println!("{name}: stopped {} times forwards, {} times backwards", phases[0], phases[1]);
        assert_eq!(losses, expected, "{name}");
        assert!(phases.iter().all(|&hits| hits > 0), "{phases:?}");
        for tensor in &task.trainer.state().tensors {
            let bytes = |state: &SharedMemory| {
                let mut bytes = vec![0; usize::try_from(tensor.bytes()).unwrap()];
                state.read(tensor.offset_bytes, &mut bytes).unwrap();
                bytes
            };
            assert!(bytes(&task.state) == bytes(&undisturbed.state), "{} of {name}", tensor.name);
        }
    }
}

/// Stops ahead of an operator, and keeps what memory has in it then.
struct KeepAt<'a> {
    stop: StopAt,
    memory: [&'a SharedMemory; 2],
    kept: Mutex<Option<[Vec<u8>; 2]>>,
}

/// What the beginning of a memory has in it, where the small fixtures have all of theirs.
fn content(memory: &SharedMemory) -> Vec<u8> {
    let mut content = vec![0; usize::try_from(memory.bytes().min(1 << 20)).unwrap()];
    memory.read(0, &mut content).unwrap();
    content
}

impl Pace for KeepAt<'_> {
    fn stops(&self) -> bool {
        let stops = self.stop.stops();
        let mut kept = self.kept.lock().unwrap();
        if stops && kept.is_none() {
            *kept = Some(self.memory.map(content));
        }
        stops
    }

    fn rests(&self) {}
}

/// Others have its memory from there on.
#[test]
fn a_step_that_is_stopped_writes_nothing_any_more() {
    let (_guard, arena) = exclusive();
    for (name, run) in [("perceptron", "clip-accumulate"), ("tied", "sgd"), ("tied", "clip-accumulate")] {
        let mut task = Task::new(name, run);
        let state = SharedMemory::from_fd(task.state.fd().try_clone_to_owned().unwrap(), task.state.bytes());
        let state = state.unwrap();
        for operator in 0.. {
            let pace =
                KeepAt { stop: StopAt::new(operator), memory: [&arena, &state], kept: Mutex::default() };
            let end = task.step(0, &pace, &arena).unwrap();
            let Some(kept) = pace.kept.into_inner().unwrap() else {
                assert!(operator > 20, "it has {operator} operators");
                break;
            };
            assert!(matches!(end, StepEnd::Stopped { .. }));
            assert!([&arena, &state].map(content) == kept, "{name}, {run}, {operator}");
        }
    }
}

#[test]
fn an_optimizer_can_go_on_from_what_was_kept() {
    let (_guard, arena) = exclusive();
    for run in ["sgd", "adamw"] {
        let mut first = Task::new("perceptron", run);
        let expected = first.expected_losses();
        for step in 0..7 {
            first.loss(step, &arena);
        }
        let mut next = Task::new("perceptron", run);
        let bytes = first.trainer.state().state_bytes;
        let mut kept = vec![0; usize::try_from(bytes).unwrap()];
        first.state.read(0, &mut kept).unwrap();
        let archive = Archive::open(&folder("perceptron").join("model.pt2")).unwrap();
        let (optimizer, _) = optimizer(&next.manifest["runs"][run]);
        let base = DeviceAddress(next.state.as_ptr() as u64);
        // SAFETY: as in `Task::new`.
        next.trainer = unsafe {
            Trainer::build(archive.program(), TorchDevice::Cpu, &optimizer, base, &first.trainer.counts())
        }
        .unwrap();
        next.state.write(0, &kept).unwrap();
        drop(first);
        for step in 7..20 {
            assert_eq!(
                next.loss(step, &arena).to_bits(),
                expected[usize::try_from(step).unwrap()].to_bits(),
                "{run} {step}"
            );
        }
    }
}

#[test]
fn a_loss_that_is_not_finite_leaves_the_state_as_it_was() {
    let (_guard, arena) = exclusive();
    let mut task = Task::new("perceptron", "adamw");
    task.loss(0, &arena);
    let bytes = usize::try_from(task.trainer.state().state_bytes).unwrap();
    let mut before = vec![0; bytes];
    task.state.read(0, &mut before).unwrap();
    let good = std::mem::take(&mut task.data);
    task.data = good.clone();
    {
        let data = SafeTensors::deserialize(&good).unwrap();
        let features = data.tensor("features").unwrap().data();
        let start = features.as_ptr() as usize - good.as_ptr() as usize;
        task.data[start..start + features.len()].as_chunks_mut::<4>().0.fill(f32::NAN.to_le_bytes());
    }
    let error = task.step(1, &AtomicU32::new(0), &arena).unwrap_err();
    assert_eq!(error.class, FaultClass::Model);
    assert!(error.message.contains("the loss is NaN"), "{error}");
    let mut after = vec![0; bytes];
    task.state.read(0, &mut after).unwrap();
    assert!(before == after);
    task.data = good;
    let expected = task.expected_losses();
    assert_eq!(task.loss(1, &arena).to_bits(), expected[1].to_bits());
}

#[test]
fn an_arena_that_is_too_small_fails_the_step_alone() {
    let (_guard, arena) = exclusive();
    let mut task = Task::new("perceptron", "sgd");
    let scope = ExecutionArena::begin(DeviceAddress(arena.as_ptr() as u64), 512);
    let (batch, _memory) = task.batch(0);
    let order = StepOrder { seed: 0, rate: 0.1, micro_batches: 1, clip_norm: None };
    // SAFETY: the data stays where it is.
    let error = unsafe { task.trainer.step(&order, &AtomicU32::new(0), |_| Ok(batch.clone())) }.unwrap_err();
    assert_eq!(error.class, FaultClass::OutOfMemory, "{error}");
    assert_eq!(scope.end().in_use_bytes, 0);
    let expected = task.expected_losses();
    assert_eq!(task.loss(0, &arena).to_bits(), expected[0].to_bits());
}

#[test]
fn a_program_that_returns_no_loss_is_refused() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/fixtures/resnet18/model.pt2");
    let archive = Archive::open(&path).unwrap();
    let optimizer =
        Optimizer::Sgd { lr: 0.1, momentum: 0.0, dampening: 0.0, nesterov: false, weight_decay: 0.0 };
    let layout = StateLayout::new(archive.program(), &optimizer).unwrap();
    let state = SharedMemory::create("state", layout.bytes).unwrap();
    let base = DeviceAddress(state.as_ptr() as u64);
    // SAFETY: the state outlives the trainer, which is never built.
    let refused = unsafe { Trainer::build(archive.program(), TorchDevice::Cpu, &optimizer, base, &[]) };
    let error = refused.err().unwrap().to_string();
    assert!(error.contains("not one scalar"), "{error}");
}
