//! An inference service without models: it echoes, adds, waits and fails, over real slot memory.

// Benchmarks and examples take this file from elsewhere, and look for its modules there.
#[path = "fake/tasks.rs"]
mod tasks;

use std::sync::Arc;
use std::time::{Duration, Instant};

use pswitch_controller::{
    Answer, Datatype, DimensionSignature, InferOptions, InferenceService, ModelSignature, ModelSnapshot,
    ModelState, ModelStatus, OutputTensor, PlacedTensor, ServiceError, ServiceFuture, ServiceSnapshot, Slot,
    SlotMemory, Submission, TaskCommand, TaskStatus, TensorSignature, TensorSpec, Timings,
};
use pswitch_device::SharedMemory;

use self::tasks::Tasks;

/// Room for outputs that are not inputs.
const OUTPUT_BYTES: u64 = 128 << 10;

/// Models that end in an error, by name.
const FAILING: [&str; 9] = [
    "fails",
    "full",
    "draining",
    "loses-worker",
    "late",
    "stopped",
    "cancelled",
    "untransferable",
    "internal",
];

/// The service. Its models:
///
/// | name | inputs | outputs |
/// | --- | --- | --- |
/// | `add` | `a`, `b` FP32 `[1..8, 4]` | `sum` FP32 `[-1, 4]` |
/// | `echo-D` for every datatype D | `x` D `[0..]` | `y` D `[-1]` |
/// | `parts` | `x` FP32 `[0..1024]` | `y` FP32 `[-1]`, `n` INT64 `[]`, `h` FP16 `[2]` |
/// | `classify` | `x` FP32 `[1..32, 3, 224, 224]` | `y` FP32 `[-1, 1000]`, zeros |
/// | `scalar` | `x` INT64 `[]` | `y` INT64 `[]` |
/// | `hangs` | `x` FP32 `[0..]` | never |
/// | `lies` | `x` FP32 `[0..]` | `y`, shorter than its shape |
/// | `broken` | not loaded | |
/// | one for every kind of failure | `x` FP32 `[0..]` | |
///
/// Training tasks are taken and commanded, but train nothing: see [`Tasks`].
pub(crate) struct FakeService {
    slots: Arc<SlotMemory>,
    tasks: Tasks,
}

impl FakeService {
    /// A service whose requests share so much slot memory.
    pub(crate) fn new(slot_bytes: u64) -> Arc<Self> {
        let shared = SharedMemory::create("fake-slots", slot_bytes).expect("the test machine has memory");
        Arc::new(Self { slots: SlotMemory::new(Arc::new(shared)), tasks: Tasks::default() })
    }

    fn names() -> Vec<String> {
        let mut names: Vec<String> =
            Datatype::ALL.iter().map(|datatype| format!("echo-{}", datatype.name().to_lowercase())).collect();
        names.extend(["add", "classify", "parts", "scalar", "hangs", "lies", "broken"].map(str::to_owned));
        names.extend(FAILING.map(str::to_owned));
        names.sort();
        names
    }

    fn compute(
        &self,
        model: &str,
        inputs: &[PlacedTensor],
        mut slot: Slot,
    ) -> Result<Vec<OutputTensor>, ServiceError> {
        let x = inputs.first().cloned().ok_or(ServiceError::Cancelled)?;
        let output = |name: &str, datatype, shape: &[u64]| TensorSpec::new(name, datatype, shape);
        let read = |input: &PlacedTensor, slot: &Slot| {
            let mut bytes = vec![0; usize::try_from(input.bytes).unwrap_or(0)];
            let read = self.slots.shared().read(slot.offset_bytes() + input.offset_bytes, &mut bytes);
            read.map(|()| bytes).map_err(|error| ServiceError::Internal { message: error.to_string() })
        };
        match model {
            "add" => {
                let (a, b) = (read(&inputs[0], &slot)?, read(&inputs[1], &slot)?);
                let (a, b) = (a.as_chunks::<4>().0, b.as_chunks::<4>().0);
                let sums = a.iter().zip(b).map(|(a, b)| f32::from_le_bytes(*a) + f32::from_le_bytes(*b));
                let sums: Vec<u8> = sums.flat_map(f32::to_le_bytes).collect();
                slot.write(x.offset_bytes, &sums)?;
                let data = slot.freeze().view(x.offset_bytes, x.bytes)?;
                Ok(vec![OutputTensor { spec: output("sum", x.spec.datatype, &x.spec.shape), data }])
            }
            "classify" => {
                let spec = output("y", x.spec.datatype, &[x.spec.shape[0], 1000]);
                let zeros = [0; 4000];
                for image in 0..x.spec.shape[0] {
                    slot.write(x.bytes + image * 4000, &zeros)?;
                }
                let data = slot.freeze().view(x.bytes, x.spec.shape[0] * 4000)?;
                Ok(vec![OutputTensor { spec, data }])
            }
            "parts" => {
                let end = x.offset_bytes + x.bytes.next_multiple_of(8);
                slot.write(end, &x.spec.shape[0].to_le_bytes())?;
                slot.write(end + 8, &[0x00, 0x3c, 0x00, 0xc0])?;
                let slot = slot.freeze();
                Ok(vec![
                    OutputTensor {
                        spec: output("y", x.spec.datatype, &x.spec.shape),
                        data: slot.view(x.offset_bytes, x.bytes)?,
                    },
                    OutputTensor { spec: output("n", Datatype::Int64, &[]), data: slot.view(end, 8)? },
                    OutputTensor { spec: output("h", Datatype::Fp16, &[2]), data: slot.view(end + 8, 4)? },
                ])
            }
            _ => {
                let bytes = if model == "lies" { x.bytes - 1 } else { x.bytes };
                let data = slot.freeze().view(x.offset_bytes, bytes)?;
                Ok(vec![OutputTensor { spec: output("y", x.spec.datatype, &x.spec.shape), data }])
            }
        }
    }
}

impl InferenceService for FakeService {
    fn is_live(&self) -> bool {
        true
    }

    fn is_ready(&self) -> bool {
        true
    }

    fn models(&self) -> Vec<ModelStatus> {
        Self::names().iter().filter_map(|name| self.model(name, None).ok()).collect()
    }

    fn model(&self, name: &str, version: Option<&str>) -> Result<ModelStatus, ServiceError> {
        if !Self::names().iter().any(|known| known == name) {
            return Err(ServiceError::UnknownModel { model: name.to_owned() });
        }
        if let Some(version) = version.filter(|version| *version != "1") {
            let (model, version, available) = (name.to_owned(), version.to_owned(), "1".to_owned());
            return Err(ServiceError::UnknownVersion { model, version, available });
        }
        let (state, reason) = match name {
            "broken" => (ModelState::Unavailable, "operator 'custom::op' is not known".to_owned()),
            _ => (ModelState::Ready, String::new()),
        };
        Ok(ModelStatus { name: name.to_owned(), version: "1".to_owned(), state, reason })
    }

    fn signature(&self, name: &str, version: Option<&str>) -> Result<Arc<ModelSignature>, ServiceError> {
        let status = self.model(name, version)?;
        if status.state != ModelState::Ready {
            return Err(ServiceError::ModelUnavailable { model: status.name, reason: status.reason });
        }
        let tensor = |name: &str, datatype, shape: Vec<DimensionSignature>| TensorSignature {
            name: name.to_owned(),
            datatype,
            shape,
        };
        let any = DimensionSignature::Dynamic { min: 0, max: None };
        let (inputs, outputs) = match name {
            "add" => {
                let batch = DimensionSignature::Dynamic { min: 1, max: Some(8) };
                let shape = vec![batch, DimensionSignature::Fixed(4)];
                let input = |name| tensor(name, Datatype::Fp32, shape.clone());
                (vec![input("a"), input("b")], vec![input("sum")])
            }
            "parts" => {
                let some = DimensionSignature::Dynamic { min: 0, max: Some(1024) };
                let outputs = vec![
                    tensor("y", Datatype::Fp32, vec![some.clone()]),
                    tensor("n", Datatype::Int64, vec![]),
                    tensor("h", Datatype::Fp16, vec![DimensionSignature::Fixed(2)]),
                ];
                (vec![tensor("x", Datatype::Fp32, vec![some])], outputs)
            }
            "classify" => {
                let batch = DimensionSignature::Dynamic { min: 1, max: Some(32) };
                let shape = |rest: &[u64]| {
                    let rest = rest.iter().map(|extent| DimensionSignature::Fixed(*extent));
                    std::iter::once(batch.clone()).chain(rest).collect()
                };
                let inputs = vec![tensor("x", Datatype::Fp32, shape(&[3, 224, 224]))];
                (inputs, vec![tensor("y", Datatype::Fp32, shape(&[1000]))])
            }
            "scalar" => {
                (vec![tensor("x", Datatype::Int64, vec![])], vec![tensor("y", Datatype::Int64, vec![])])
            }
            _ => {
                let datatype = name.strip_prefix("echo-").map(str::to_uppercase);
                let datatype = datatype.and_then(|name| Datatype::from_name(&name)).unwrap_or(Datatype::Fp32);
                (vec![tensor("x", datatype, vec![any.clone()])], vec![tensor("y", datatype, vec![any])])
            }
        };
        Ok(Arc::new(ModelSignature { platform: "fake".to_owned(), inputs, outputs }))
    }

    fn reserve(
        &self,
        name: &str,
        version: Option<&str>,
        inputs: &[TensorSpec],
    ) -> Result<Submission, ServiceError> {
        let signature = self.signature(name, version)?;
        signature.check_inputs(inputs)?;
        let (placed, end) = PlacedTensor::place(inputs)?;
        let slot = self.slots.reserve(end.saturating_add(OUTPUT_BYTES))?;
        Submission::new(name, placed, slot)
    }

    fn infer(&self, submission: Submission, options: InferOptions) -> ServiceFuture<'_, Answer> {
        Box::pin(async move {
            let (model, mut inputs, slot) = submission.into_parts()?;
            if model == "hangs" {
                // Holds the slot, as a worker would, until it is cancelled or its deadline passes.
                let begun = Instant::now();
                match options.deadline {
                    Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
                    None => std::future::pending().await,
                }
                drop(slot);
                return Err(ServiceError::DeadlineExceeded { waited: begun.elapsed() });
            }
            if let Some(failure) = failure(&model) {
                return Err(failure);
            }
            inputs.sort_by(|a, b| a.spec.name.cmp(&b.spec.name));
            let outputs = self.compute(&model, &inputs, slot)?;
            let timings = Timings {
                queue: Duration::from_micros(3),
                switch: Duration::from_micros(5),
                compute: Duration::from_micros(7),
                switched: true,
            };
            Ok(Answer { outputs, timings })
        })
    }

    fn load(&self, name: &str) -> ServiceFuture<'_, ()> {
        let found = self.signature(name, None).map(|_| ());
        Box::pin(async move { found })
    }

    fn submit_training(&self, name: &str, config: &str) -> ServiceFuture<'_, TaskStatus> {
        let taken = self.tasks.submit(name, config);
        Box::pin(async move { taken })
    }

    fn training(&self) -> Vec<TaskStatus> {
        self.tasks.all()
    }

    fn command_training(&self, name: &str, command: TaskCommand) -> ServiceFuture<'_, TaskStatus> {
        let obeyed = self.tasks.command(name, command);
        Box::pin(async move { obeyed })
    }

    fn snapshot(&self) -> ServiceSnapshot {
        let model = ModelSnapshot {
            name: "add".to_owned(),
            queued: 1,
            resident: true,
            span_bytes: 512,
            evictions: 2,
        };
        ServiceSnapshot {
            models: vec![model],
            workers: vec![("active", 1), ("standby", 1)],
            worker_restarts: 3,
            pool_bytes: 4096,
            pool_resident_bytes: 512,
            slot_bytes: self.slots.capacity_bytes(),
            slot_in_use_bytes: self.slots.in_use_bytes(),
            transferred_bytes: 1024,
            device_free_bytes: 4096,
            outside_bytes: 512,
            outside_allocations: 3,
            graphs: 5,
        }
    }
}

fn failure(model: &str) -> Option<ServiceError> {
    let model = model.to_owned();
    Some(match model.as_str() {
        "fails" => ServiceError::ExecutionFailed { model, message: "index 7 is out of range".to_owned() },
        "full" => ServiceError::QueueFull { queued: 64, limit: 64 },
        "draining" => ServiceError::Draining,
        "loses-worker" => ServiceError::WorkerLost { attempts: 2, reason: "killed by signal 9".to_owned() },
        "late" => ServiceError::DeadlineExceeded { waited: Duration::from_micros(1500) },
        "stopped" => ServiceError::ExecutionTimedOut { limit: Duration::from_secs(30) },
        "cancelled" => ServiceError::Cancelled,
        "untransferable" => ServiceError::TransferFailed { model, message: "link down".to_owned() },
        "internal" => ServiceError::Internal { message: "a bug".to_owned() },
        _ => return None,
    })
}
