//! Runs an archive on the inputs of its reference cases and compares with what eager PyTorch gave, bit for bit.

use std::fmt::Write as _;
use std::path::Path;

use pswitch_device::{DeviceAddress, SharedMemory};
use pswitch_model::{Archive, Input as ProgramInput, InputKind};
use pswitch_worker::{Executable, ExecutionArena, Input, RunError, TorchDevice, Watch};
use safetensors::SafeTensors;

/// An archive over a span of its own.
pub(crate) struct Loaded {
    pub(crate) archive: Archive,
    pub(crate) executable: Executable,
    _span: SharedMemory,
}

/// Position, shape and bytes of an output.
pub(crate) type Output = (usize, Vec<u64>, Vec<u8>);

/// Watches nothing.
pub(crate) struct Unwatched;

impl Watch for Unwatched {
    fn before(&mut self, _node: usize) -> Result<(), RunError> {
        Ok(())
    }
}

pub(crate) fn load(path: &Path) -> Result<Loaded, String> {
    let archive = Archive::open(path).map_err(|error| error.to_string())?;
    let program = archive.program();
    let layout = program.span();
    let span = SharedMemory::create("span", layout.bytes.max(1)).map_err(|error| error.to_string())?;
    for (storage, &offset) in (0..).map(pswitch_model::StorageId).zip(&layout.offsets) {
        span.write(offset, archive.storage_bytes(storage)).map_err(|error| error.to_string())?;
    }
    let base = span.as_ptr() as u64;
    // SAFETY: the span lives in the same struct as the executable and holds all weights.
    let executable = unsafe {
        Executable::build(
            program,
            TorchDevice::Cpu,
            |weight| DeviceAddress(base + layout.offset(weight.storage) + weight.offset_bytes),
            |_| None,
        )
    }
    .map_err(|error| error.to_string())?;
    Ok(Loaded { archive, executable, _span: span })
}

/// The reference cases beside an archive.
pub(crate) struct Cases {
    bytes: Vec<u8>,
    pub(crate) threads: i32,
    pub(crate) count: usize,
}

impl Cases {
    pub(crate) fn read(folder: &Path) -> Self {
        let bytes =
            std::fs::read(folder.join("cases.safetensors")).expect("the cases lie beside the archive");
        let (_, header) = SafeTensors::read_metadata(&bytes).expect("the cases are safetensors");
        let fact = |name: &str| header.metadata().as_ref().and_then(|map| map.get(name)?.parse().ok());
        let count = fact("cases").expect("the cases are counted");
        let threads = fact("torch_threads").expect("the threads are recorded");
        Self { threads: i32::try_from(threads).unwrap(), count, bytes }
    }

    fn tensors(&self) -> SafeTensors<'_> {
        SafeTensors::deserialize(&self.bytes).expect("read before")
    }

    /// Runs a case and returns the outputs by position; constants have none.
    pub(crate) fn run(&self, case: usize, loaded: &mut Loaded) -> Result<Vec<Output>, String> {
        self.run_watched(case, loaded, &mut Unwatched)
    }

    pub(crate) fn run_watched(
        &self,
        case: usize,
        loaded: &mut Loaded,
        watch: &mut impl Watch,
    ) -> Result<Vec<Output>, String> {
        let tensors = self.tensors();
        let program = loaded.archive.program();
        // Kept until the outputs are read: an output may be a view of an input.
        let mut memory = Vec::new();
        let mut inputs = Vec::new();
        for ProgramInput { name, kind } in &program.inputs {
            let stored = || {
                tensors
                    .tensor(&format!("case{case}.input.{name}"))
                    .map_err(|error| format!("input {name}: {error}"))
            };
            match kind {
                InputKind::Constant(_) => {}
                InputKind::SymInt { .. } => {
                    let bytes: [u8; 8] = stored()?.data().try_into().map_err(|_| "an integer has 8 bytes")?;
                    inputs.push(Input::Integer(i64::from_le_bytes(bytes)));
                }
                InputKind::Tensor { dtype, .. } => {
                    let tensor = stored()?;
                    let shared = SharedMemory::create("input", (tensor.data().len() as u64).max(1)).unwrap();
                    shared.write(0, tensor.data()).unwrap();
                    let at = DeviceAddress(shared.as_ptr() as u64);
                    memory.push(shared);
                    let shape = tensor.shape().iter().map(|&size| size as u64).collect();
                    inputs.push(Input::Tensor { at, dtype: *dtype, shape });
                }
            }
        }
        // SAFETY: inputs and span are mapped and filled.
        unsafe { loaded.executable.run(&inputs, watch) }.map_err(|error| error.to_string())?;
        let shapes = loaded.executable.outputs().map_err(|error| error.to_string())?;
        let places = program.outputs.iter().enumerate().filter(|(_, output)| output.kind.value().is_some());
        let mut outputs = Vec::new();
        for ((index, shape), (place, _)) in shapes.into_iter().enumerate().zip(places) {
            let mut bytes = vec![0; usize::try_from(shape.bytes()).unwrap()];
            // SAFETY: there is room for just that many bytes.
            unsafe { loaded.executable.copy_output(index, bytes.as_mut_ptr()) }
                .map_err(|error| error.to_string())?;
            outputs.push((place, shape.shape, bytes));
        }
        loaded.executable.clear();
        Ok(outputs)
    }

    /// Says how the outputs of a case differ from eager PyTorch's; empty if they are equal to the last bit.
    pub(crate) fn compare(&self, case: usize, outputs: &[Output]) -> String {
        let tensors = self.tensors();
        let mut differences = String::new();
        let mut compared = 0;
        for (place, shape, bytes) in outputs {
            // What eager PyTorch returns as None is no output there.
            let Ok(expected) = tensors.tensor(&format!("case{case}.output.{place}")) else { continue };
            compared += 1;
            let expected_shape: Vec<u64> = expected.shape().iter().map(|&size| size as u64).collect();
            if &expected_shape != shape {
                let _ = write!(differences, "output {place}: shape {shape:?}, expected {expected_shape:?}; ");
            } else if expected.data() != bytes {
                let wrong = expected.data().iter().zip(bytes).filter(|(a, b)| a != b).count();
                let _ = write!(differences, "output {place}: {wrong} of {} bytes differ; ", bytes.len());
            }
        }
        let prefix = format!("case{case}.output.");
        let expected = tensors.names().into_iter().filter(|name| name.starts_with(&prefix)).count();
        if compared == 0 || compared > expected {
            let _ = write!(differences, "{compared} outputs compared, {expected} expected");
        }
        differences
    }
}

/// Runs every case of a folder, with the allocator of a worker.
pub(crate) fn check(folder: &Path, arena: &SharedMemory) -> Result<usize, String> {
    let cases = Cases::read(folder);
    tch::set_num_threads(cases.threads);
    let mut loaded = load(&folder.join("model.pt2"))?;
    let base = DeviceAddress(arena.as_ptr() as u64);
    for case in 0..cases.count {
        let scope = ExecutionArena::begin(base, arena.bytes());
        let outputs = cases.run(case, &mut loaded);
        let stats = scope.end();
        let differences = cases.compare(case, &outputs.map_err(|error| format!("case {case}: {error}"))?);
        if !differences.is_empty() {
            return Err(format!("case {case}: {differences}"));
        }
        if stats.in_use_bytes != 0 {
            return Err(format!("case {case}: libtorch kept {} bytes of the arena", stats.in_use_bytes));
        }
        if stats.peak_bytes == 0 {
            return Err(format!("case {case}: nothing was allocated from the arena"));
        }
    }
    Ok(cases.count)
}

/// An arena for tests, taken over by libtorch's allocator.
pub(crate) fn arena(bytes: u64) -> SharedMemory {
    let arena = SharedMemory::create("arena", bytes).expect("memory for the arena");
    ExecutionArena::install_on_cpu(DeviceAddress(arena.as_ptr() as u64), arena.bytes());
    arena
}
