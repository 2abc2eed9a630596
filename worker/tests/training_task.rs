//! Whole tasks: from a configuration to checkpoints, with kills in between.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::AtomicU32;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use pswitch_device::{DeviceAddress, DeviceId, LinkThrottle, SharedMemory, open_device};
use pswitch_model::{Archive, StorageId};
use pswitch_train::{Role, StateLayout, TaskConfig, TrainError, latest_checkpoint};
use pswitch_worker::{ExecutionArena, PartialSnapshot, Snapshot, TaskError, TaskStep, TrainingTask};
use safetensors::SafeTensors;

const ARENA_BYTES: u64 = 64 << 20;

/// Where the child finds its configuration.
const CONFIG: &str = "PSWITCH_TEST_TASK";

/// One libtorch with one arena.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

fn turn() -> MutexGuard<'static, ()> {
    ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner)
}

fn folder() -> PathBuf {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/training/perceptron");
    assert!(folder.join("model.pt2").exists(), "{} is missing: run `cargo xtask fixtures`", folder.display());
    folder.canonicalize().unwrap()
}

/// The perceptron over its own rows: 23 of them, so that the last batch of an epoch has three.
fn config(rest: &str) -> TaskConfig {
    let folder = folder();
    let folder = folder.display();
    TaskConfig::from_yaml(&format!(
        "program: {folder}/model.pt2\nseed: 7\n{rest}\n{}",
        if rest.contains("data:") {
            String::new()
        } else {
            format!("data: {{files: [{folder}/data.safetensors], batch_size: 5}}")
        }
    ))
    .unwrap()
}

/// The arena of this process.
fn arena() -> DeviceAddress {
    static ARENA: OnceLock<SharedMemory> = OnceLock::new();
    let arena = ARENA.get_or_init(|| {
        let arena = SharedMemory::create("arena", ARENA_BYTES).unwrap();
        ExecutionArena::install_on_cpu(DeviceAddress(arena.as_ptr() as u64), ARENA_BYTES);
        arena
    });
    DeviceAddress(arena.as_ptr() as u64)
}

/// A task over memory of its own.
struct Rig {
    task: TrainingTask,
    state: SharedMemory,
}

impl Rig {
    fn new(config: &TaskConfig) -> Result<Self, TaskError> {
        let archive = Archive::open(&config.program).unwrap();
        let program = archive.program();
        let layout = StateLayout::new(program, &config.optimizer)?;
        let state = SharedMemory::create("state", layout.bytes).unwrap();
        for (storage, &offset) in (0..).map(StorageId).zip(&program.span().offsets) {
            state.write(offset, archive.storage_bytes(storage)).unwrap();
        }
        tch::set_num_threads(1);
        let base = DeviceAddress(state.as_ptr() as u64);
        let device = open_device(DeviceId::Host(0), LinkThrottle::default()).unwrap();
        // SAFETY: the state lives beside the task, holds the weights, and is nobody else's.
        let task = unsafe { TrainingTask::build(config, &archive, device.as_ref(), base) }?;
        Ok(Self { task, state })
    }

    fn step(&mut self) -> f64 {
        let scope = ExecutionArena::begin(arena(), ARENA_BYTES);
        // SAFETY: nothing is uploaded.
        let end = unsafe { self.task.step(&AtomicU32::new(0), None) }.unwrap();
        assert_eq!(scope.end().in_use_bytes, 0);
        match end {
            TaskStep::Finished { loss, .. } => loss,
            TaskStep::Stopped => panic!("nobody stops it"),
        }
    }

    fn snapshot(&self) -> Snapshot {
        self.task.snapshot(&mut PartialSnapshot::default(), || true).unwrap().expect("it goes on")
    }

    fn losses(&mut self) -> Vec<f64> {
        let mut losses = Vec::new();
        while !self.task.is_finished() {
            losses.push(self.step());
        }
        losses
    }

    fn state(&self) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(self.state.bytes()).unwrap()];
        self.state.read(0, &mut bytes).unwrap();
        bytes
    }
}

#[test]
fn in_the_order_of_the_file_it_is_pytorchs_loop() {
    let _turn = turn();
    let folder = folder();
    let mut rig = Rig::new(&config(&format!(
        "optimizer: {{kind: adamw, lr: 1e-3, weight_decay: 0.05}}\nlength: {{steps: 20}}\naccumulate: 2\nclip_norm: 0.5\n\
         data: {{files: [{}/data.safetensors], batch_size: 5, shuffle: false}}",
        folder.display()
    )))
    .unwrap();
    let reference = std::fs::read(folder.join("reference.safetensors")).unwrap();
    let reference = SafeTensors::deserialize(&reference).unwrap();
    let expected = reference.tensor("clip-accumulate.losses").unwrap();
    let expected: Vec<f32> =
        expected.data().as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
    #[allow(clippy::cast_possible_truncation)] // they were that
    let losses: Vec<f32> = rig.losses().iter().map(|loss| *loss as f32).collect();
    assert_eq!(losses, expected);
}

const SHUFFLED: &str = "optimizer: {kind: sgd, lr: 0.05, momentum: 0.9}\nschedule: {kind: cosine, warm_up: 5}\nlength: {epochs: 8}";

#[test]
fn a_task_goes_on_from_any_checkpoint_as_if_it_had_never_stopped() {
    let _turn = turn();
    let config = config(SHUFFLED);
    let mut whole = Rig::new(&config).unwrap();
    assert_eq!(whole.task.total_steps(), 40);
    let losses = whole.losses();
    for stop_at in [0, 1, 13, 39] {
        let place = tempfile::tempdir().unwrap();
        let mut first = Rig::new(&config).unwrap();
        for expected in &losses[..stop_at] {
            assert_eq!(first.step().to_bits(), expected.to_bits());
        }
        first.snapshot().write(place.path(), 2).unwrap();
        drop(first);
        let mut next = Rig::new(&config).unwrap();
        next.task.resume(&latest_checkpoint(place.path()).unwrap().unwrap()).unwrap();
        assert_eq!(next.task.steps_done(), stop_at as u64);
        let rest = next.losses();
        assert_eq!(rest, losses[stop_at..], "from step {stop_at}");
        let kept = usize::try_from(
            StateLayout::new(Archive::open(&config.program).unwrap().program(), &config.optimizer)
                .unwrap()
                .state_bytes,
        )
        .unwrap();
        assert!(next.state()[..kept] == whole.state()[..kept]);
    }
}

#[test]
fn a_checkpoint_of_another_task_is_refused() {
    let _turn = turn();
    let place = tempfile::tempdir().unwrap();
    let mut rig = Rig::new(&config(SHUFFLED)).unwrap();
    rig.step();
    rig.snapshot().write(place.path(), 1).unwrap();
    let checkpoint = latest_checkpoint(place.path()).unwrap().unwrap();
    let mut other = Rig::new(&config("optimizer: {kind: adamw, lr: 0.1}\nlength: {steps: 3}")).unwrap();
    let before = other.state();
    let error = other.task.resume(&checkpoint).unwrap_err().to_string();
    assert!(error.contains("made with sgd") && error.contains("adamw"), "{error}");
    assert!(other.state() == before && other.task.steps_done() == 0);
}

#[test]
fn a_snapshot_that_is_taken_in_parts_is_the_same() {
    let _turn = turn();
    let (whole, parts) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let mut rig = Rig::new(&config(SHUFFLED)).unwrap();
    rig.step();
    rig.snapshot().write(whole.path(), 1).unwrap();
    let (mut part, mut interruptions) = (PartialSnapshot::default(), 0);
    let snapshot = loop {
        // One tensor at a time.
        let mut tensors = 0..1;
        match rig.task.snapshot(&mut part, || tensors.next().is_some()).unwrap() {
            Some(snapshot) => break snapshot,
            None => interruptions += 1,
        }
    };
    assert!(interruptions > 2);
    let path = snapshot.write(parts.path(), 1).unwrap();
    let name = path.file_name().unwrap();
    assert!(std::fs::read(&path).unwrap() == std::fs::read(whole.path().join(name)).unwrap());
}

#[test]
fn what_cannot_be_written_is_an_error_and_the_task_goes_on() {
    let _turn = turn();
    let mut rig = Rig::new(&config(SHUFFLED)).unwrap();
    let expected = Rig::new(&config(SHUFFLED)).unwrap().losses();
    assert_eq!(rig.step().to_bits(), expected[0].to_bits());
    let error = rig.snapshot().write(Path::new("/dev/null/nowhere"), 2).unwrap_err();
    assert!(error.to_string().contains("/dev/null/nowhere"), "{error}");
    assert_eq!(rig.step().to_bits(), expected[1].to_bits());
}

#[test]
fn data_that_do_not_fit_are_told_apart() {
    let _turn = turn();
    let place = tempfile::tempdir().unwrap();
    let write = |name: &str, dtype: safetensors::Dtype, shape: &[usize]| {
        let bytes = vec![0_u8; shape.iter().product::<usize>() * dtype.bitsize() / 8];
        let view = safetensors::tensor::TensorView::new(dtype, shape.to_vec(), &bytes).unwrap();
        let path = place.path().join(format!("{name}-{dtype:?}-{}.safetensors", shape.len()));
        safetensors::serialize_to_file([(name, view)], None, &path).unwrap();
        path.display().to_string()
    };
    let labels = write("labels", safetensors::Dtype::I64, &[40]);
    let good = write("features", safetensors::Dtype::F32, &[40, 7]);
    let with = |files: &str, rest: &str| {
        let config = config(&format!(
            "optimizer: {{kind: sgd, lr: 0.1}}\nlength: {{steps: 3}}\ndata: {{files: [{files}], {rest}}}"
        ));
        Rig::new(&config).err().map(|error| error.to_string())
    };
    assert_eq!(with(&format!("{good}, {labels}"), "batch_size: 8"), None);
    // More than the program takes, and than there are.
    assert_eq!(with(&format!("{good}, {labels}"), "batch_size: 1000"), None);
    let wide = write("features", safetensors::Dtype::F64, &[40, 7]);
    let deep = write("features", safetensors::Dtype::F32, &[40, 7, 1]);
    let cases = [
        (labels.clone(), "batch_size: 8", vec!["features", "no array", "labels"]),
        (format!("{wide}, {labels}"), "batch_size: 8", vec!["features", "float64", "float32"]),
        (format!("{deep}, {labels}"), "batch_size: 8", vec!["features", "[7, 1]", "[7]"]),
        (
            format!("{good}, {labels}"),
            "batch_size: 1",
            vec!["a batch has 1 rows", "takes 2 to 64", "--batch"],
        ),
        // 39 and 1.
        (format!("{good}, {labels}"), "batch_size: 39", vec!["a batch has 1 rows", "drop_last"]),
        (place.path().join("none.npy").display().to_string(), "batch_size: 8", vec!["none.npy"]),
    ];
    for (files, rest, words) in cases {
        let error = with(&files, rest).expect("it is refused");
        assert!(words.iter().all(|word| error.contains(word)), "{error}: {words:?}");
    }
}

#[test]
fn synthetic_rows_train_too() {
    let _turn = turn();
    let config = config(
        "optimizer: {kind: adam, lr: 1e-3}\nlength: {epochs: 2}\ndata: {synthetic: {rows: 20, batch_size: 4}}",
    );
    let losses = Rig::new(&config).unwrap().losses();
    assert_eq!(losses.len(), 10);
    assert_eq!(losses, Rig::new(&config).unwrap().losses());
    assert!(losses.iter().all(|loss| loss.is_finite()));
}

fn layout_of(fixture: &str) -> Result<StateLayout, TrainError> {
    let path =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/fixtures").join(fixture).join("model.pt2");
    let optimizer = config(SHUFFLED).optimizer;
    StateLayout::new(Archive::open(&path).unwrap().program(), &optimizer)
}

/// A program uses one of their names, and not always the first; a state dict has them all.
#[test]
fn tied_parameters_are_one_with_all_their_names() {
    let layout = layout_of("gpt2").unwrap();
    let of = |name: &str| layout.in_role(Role::Parameter).find(|tensor| tensor.name == name);
    let first = of("model.transformer.wte.weight").expect("the first name counts");
    assert_eq!(first.also_named, ["model.lm_head.weight"]);
    assert_eq!(layout.in_role(Role::Parameter).next(), Some(first), "in the order of the module");
    assert!(of("model.lm_head.weight").is_none());
    assert!(layout.in_role(Role::Buffer).all(|tensor| !tensor.name.contains("wte")));
}

#[test]
fn buffers_that_share_memory_with_others_are_refused() {
    let error = layout_of("odd-weights").unwrap_err().to_string();
    assert!(error.contains("shares memory") || error.contains("overlap"), "{error}");
}

/// The child of the next test: trains from the latest checkpoint, and says every loss.
#[test]
#[ignore = "the process that another test kills"]
fn child() {
    let config = TaskConfig::open(Path::new(&std::env::var_os(CONFIG).unwrap())).unwrap();
    let checkpoints = config.checkpoint.clone().unwrap();
    let mut rig = Rig::new(&config).unwrap();
    if let Some(checkpoint) = latest_checkpoint(&checkpoints.folder).unwrap() {
        rig.task.resume(&checkpoint).unwrap();
    }
    let mut out = std::io::stdout();
    while !rig.task.is_finished() {
        let step = rig.task.steps_done();
        let loss = rig.step();
        writeln!(out, "\nstep {step} {:x}", loss.to_bits()).unwrap();
        std::thread::sleep(Duration::from_millis(2));
        if rig.task.steps_done().is_multiple_of(checkpoints.every_steps) {
            rig.snapshot().write(&checkpoints.folder, checkpoints.keep).unwrap();
        }
    }
    writeln!(out, "\nfinished").unwrap();
}

#[test]
fn a_process_that_is_killed_twenty_times_has_the_losses_of_one_that_was_not() {
    let place = tempfile::tempdir().unwrap();
    let text = format!(
        "program: {0}/model.pt2\nseed: 7\noptimizer: {{kind: adamw, lr: 1e-3}}\nlength: {{steps: 400}}\n\
         data: {{files: [{0}/data.safetensors], batch_size: 5}}\n\
         checkpoint: {{folder: {1}/checkpoints, every_steps: 7}}",
        folder().display(),
        place.path().display()
    );
    let path = place.path().join("task.yaml");
    std::fs::write(&path, text).unwrap();
    let expected: Vec<u64> = {
        let _turn = turn();
        let losses = Rig::new(&TaskConfig::open(&path).unwrap()).unwrap().losses();
        losses.iter().map(|loss| loss.to_bits()).collect()
    };
    let mut random = 1_u64;
    let (mut kills, mut seen) = (0, vec![false; expected.len()]);
    loop {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child", "--ignored", "--nocapture", "--test-threads", "1"])
            .env(CONFIG, &path)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        // At some line of its output, or in what comes right behind.
        let lines = usize::try_from((random >> 33) % 40).unwrap() + 1;
        let mut finished = false;
        let out = BufReader::new(child.stdout.take().unwrap());
        for (index, line) in out.lines().map_while(Result::ok).filter(|line| !line.is_empty()).enumerate() {
            if let Some(rest) = line.strip_prefix("step ") {
                let (step, bits) = rest.split_once(' ').unwrap();
                let step: usize = step.parse().unwrap();
                let bits = u64::from_str_radix(bits, 16).unwrap();
                assert_eq!(bits, expected[step], "step {step} after {kills} kills");
                seen[step] = true;
            }
            finished |= line == "finished";
            if index >= lines && kills < 20 && !finished {
                std::thread::sleep(Duration::from_micros((random >> 20) % 4000));
                child.kill().unwrap();
                kills += 1;
                break;
            }
        }
        let status = child.wait().unwrap();
        if finished {
            break;
        }
        assert!(!status.success() && kills <= 20, "{status}");
    }
    assert_eq!(kills, 20);
    assert!(seen.iter().all(|seen| *seen));
}
