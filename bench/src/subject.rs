//! A model to be measured: its archive, and inputs whose right outputs are known where reference cases lie beside it.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};
use pswitch_controller::{
    Datatype, DimensionSignature, ModelSignature, TensorSignature, TensorSpec, describe,
};
use pswitch_device::DeviceId;
use pswitch_model::Archive;
use safetensors::SafeTensors;

use crate::random::Random;

/// Cases beside an archive, as `python -m pswitch.fixtures` writes them.
const CASES: &str = "cases.safetensors";

/// What cases name as their device that were not made on a GPU.
const CPU: &str = "cpu";

/// What answers are compared with where no reference holds.
const FIRST_ANSWER: &str = "the first answer";

/// An archive that a benchmark serves.
#[derive(Debug)]
pub(crate) struct Subject {
    pub(crate) name: String,
    pub(crate) archive: PathBuf,
    /// Bytes of the weights that move: those that some node uses.
    pub(crate) span_bytes: u64,
    pub(crate) signature: ModelSignature,
    /// Positions among the program's outputs of those that an answer brings.
    outputs: Vec<usize>,
    cases: Option<Cases>,
}

#[derive(Debug)]
struct Cases {
    bytes: Vec<u8>,
    count: u32,
    references: References,
}

/// Where reference outputs were made.
#[derive(Debug, Clone, PartialEq, Eq)]
struct References {
    /// `cpu`, or a GPU's name.
    device: String,
    threads: u32,
}

/// Where a model is served: kernels differ between devices and numbers of threads, and with them the last bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Served {
    pub(crate) device: DeviceId,
    /// Threads that one operator may use on the CPU.
    pub(crate) threads: u32,
}

/// Shape and bytes of a tensor.
pub(crate) type Tensor = (Vec<u64>, Vec<u8>);

/// A request's tensors.
#[derive(Debug, Clone)]
pub(crate) struct Example {
    pub(crate) inputs: Vec<(TensorSpec, Vec<u8>)>,
    /// What eager PyTorch answers, where that is known.
    pub(crate) outputs: Option<Vec<Tensor>>,
    /// Whose outputs every answer is compared with, in words.
    pub(crate) reference: String,
}

impl Subject {
    /// Opens `PATH/model.pt2`, or `PATH` itself if that is a file.
    pub(crate) fn open(path: &Path) -> anyhow::Result<Self> {
        let is_file = path.is_file();
        let archive = if is_file { path.to_owned() } else { path.join("model.pt2") };
        let archive = archive.canonicalize().with_context(|| {
            format!(
                "there is no {}; `cargo xtask fixtures` makes those of target/fixtures",
                archive.display()
            )
        })?;
        let folder = archive.parent().unwrap_or(Path::new("."));
        let named = if is_file && path.file_name().is_some_and(|name| name != "model.pt2") {
            archive.file_stem()
        } else {
            folder.file_name()
        };
        let opened = Archive::open(&archive)?;
        let program = opened.program();
        Ok(Self {
            name: named.map_or_else(|| "model".to_owned(), |name| name.to_string_lossy().into_owned()),
            span_bytes: program.span().used_bytes,
            signature: describe(program).map_err(anyhow::Error::msg)?,
            outputs: (0..)
                .zip(&program.outputs)
                .filter_map(|(place, output)| output.kind.value().map(|_| place))
                .collect(),
            cases: Cases::read(&folder.join(CASES))?,
            archive,
        })
    }

    /// With how many threads its reference outputs were made, if there are any.
    pub(crate) fn reference_threads(&self) -> Option<u32> {
        self.cases.as_ref().map(|cases| cases.references.threads)
    }

    /// The first reference case, with its outputs if they were made on such a device; else inputs of the least shapes.
    pub(crate) fn example(&self, served: Served) -> anyhow::Result<Example> {
        let Some(cases) = &self.cases else {
            let inputs = self.signature.inputs.iter().map(synthetic).collect::<anyhow::Result<_>>()?;
            return Ok(Example { inputs, outputs: None, reference: FIRST_ANSWER.to_owned() });
        };
        self.case(cases, &SafeTensors::deserialize(&cases.bytes)?, 0, served)
    }

    /// As [`example`](Self::example), and those further cases that have the shapes of the first and an answer: where
    /// inputs take turns, an answer that was left over is a wrong one.
    pub(crate) fn examples(&self, served: Served) -> anyhow::Result<Vec<Example>> {
        let first = self.example(served)?;
        let specs = first.specs();
        let mut examples = vec![first];
        if let Some(cases) = &self.cases {
            let tensors = SafeTensors::deserialize(&cases.bytes)?;
            let has_outputs = |case: &u32| {
                self.outputs.iter().all(|place| tensors.tensor(&format!("case{case}.output.{place}")).is_ok())
            };
            for case in (1..cases.count).filter(has_outputs) {
                let example = self.case(cases, &tensors, case, served)?;
                if example.specs() == specs {
                    examples.push(example);
                }
            }
        }
        Ok(examples)
    }

    fn case(
        &self,
        cases: &Cases,
        tensors: &SafeTensors<'_>,
        case: u32,
        served: Served,
    ) -> anyhow::Result<Example> {
        let tensor = |name: String| -> Option<Tensor> {
            let tensor = tensors.tensor(&name).ok()?;
            let shape = tensor.shape().iter().map(|&extent| extent as u64).collect();
            Some((shape, tensor.data().to_vec()))
        };
        let inputs = self.signature.inputs.iter().map(|input| {
            let (shape, data) = tensor(format!("case{case}.input.{}", input.name))
                .with_context(|| format!("the cases of '{}' lack input '{}'", self.name, input.name))?;
            let spec = TensorSpec::new(&input.name, input.datatype, shape);
            ensure!(spec.bytes() == Some(data.len() as u64), "input '{}' is of another type", input.name);
            Ok((spec, data))
        });
        let outputs = self.outputs.iter().map(|place| tensor(format!("case{case}.output.{place}")));
        let outputs: Option<Vec<Tensor>> = outputs.collect();
        let holds = cases.references.hold_for(served);
        let reference = match &outputs {
            Some(_) if holds => cases.references.name(),
            Some(_) => format!("{FIRST_ANSWER}; the case is {}'s", cases.references.made_on()),
            None => format!("{FIRST_ANSWER}; the case has none"),
        };
        let inputs = inputs.collect::<anyhow::Result<_>>()?;
        Ok(Example { inputs, outputs: outputs.filter(|_| holds), reference })
    }
}

impl Example {
    /// What its inputs are.
    pub(crate) fn specs(&self) -> Vec<TensorSpec> {
        self.inputs.iter().map(|(spec, _)| spec.clone()).collect()
    }
}

impl References {
    /// From the facts that a file of cases states.
    fn of(facts: &HashMap<String, String>) -> Option<Self> {
        let threads = facts.get("torch_threads")?.parse().ok()?;
        let device = facts.get("device").map_or(CPU, String::as_str).to_owned();
        Some(Self { device, threads })
    }

    /// Whether kernels of the same kind answer.
    fn hold_for(&self, served: Served) -> bool {
        match served.device {
            DeviceId::Host(_) => self.device == CPU && self.threads == served.threads,
            DeviceId::Cuda(_) => self.device != CPU,
        }
    }

    fn name(&self) -> String {
        if self.device == CPU {
            "eager PyTorch".to_owned()
        } else {
            format!("eager PyTorch on {}", self.device)
        }
    }

    fn made_on(&self) -> String {
        match self.threads {
            _ if self.device != CPU => self.device.clone(),
            1 => format!("{CPU} with 1 thread"),
            threads => format!("{CPU} with {threads} threads"),
        }
    }
}

impl Cases {
    fn read(path: &Path) -> anyhow::Result<Option<Self>> {
        if !path.exists() {
            return Ok(None);
        }
        let bytes = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        let (_, header) = SafeTensors::read_metadata(&bytes)?;
        let facts = header.metadata().as_ref();
        let references = facts.and_then(References::of);
        let references = references.with_context(|| format!("{} names no torch_threads", path.display()))?;
        let count = facts.and_then(|facts| facts.get("cases")?.parse().ok()).unwrap_or(1);
        Ok(Some(Self { bytes, count, references }))
    }
}

/// An input of the least shape: numbers between -1 and 1, or zeros where a number is an index, as likely as not.
fn synthetic(input: &TensorSignature) -> anyhow::Result<(TensorSpec, Vec<u8>)> {
    let shape: Vec<u64> = input
        .shape
        .iter()
        .map(|dimension| match dimension {
            DimensionSignature::Fixed(extent) => *extent,
            DimensionSignature::Dynamic { min, .. } => (*min).max(1),
        })
        .collect();
    let spec = TensorSpec::new(&input.name, input.datatype, shape);
    let bytes = spec.bytes().and_then(|bytes| usize::try_from(bytes).ok());
    let bytes = bytes.with_context(|| format!("input '{}' is too large", input.name))?;
    let data = if input.datatype == Datatype::Fp32 {
        numbers().flat_map(f32::to_le_bytes).take(bytes).collect()
    } else {
        vec![0; bytes]
    };
    Ok((spec, data))
}

/// Numbers between -1 and 1, the same every time.
fn numbers() -> impl Iterator<Item = f32> {
    let mut random = Random::new(0);
    std::iter::repeat_with(move || {
        // 24 bits, which a `f32` holds.
        #[allow(clippy::cast_possible_truncation)]
        let share = random.share() as f32;
        share * 2.0 - 1.0
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_fill_the_range() {
        let drawn: Vec<f32> = numbers().take(10_000).collect();
        let mean = drawn.iter().sum::<f32>() / 10_000.0;
        assert!(drawn.iter().all(|number| (-1.0..1.0).contains(number)) && mean.abs() < 0.05, "{mean}");
        assert_eq!(drawn[..10], numbers().take(10).collect::<Vec<_>>()[..]);
    }

    #[test]
    fn inputs_are_of_the_least_shape() {
        let dimensions = |datatype| TensorSignature {
            name: "x".to_owned(),
            datatype,
            shape: vec![DimensionSignature::Dynamic { min: 0, max: None }, DimensionSignature::Fixed(3)],
        };
        let (spec, data) = synthetic(&dimensions(Datatype::Fp32)).unwrap();
        assert_eq!((spec.shape, data.len()), (vec![1, 3], 12));
        assert!(data.iter().any(|byte| *byte != 0));
        let (_, data) = synthetic(&dimensions(Datatype::Int64)).unwrap();
        assert_eq!(data, [0; 24]);
    }

    /// References as a file of cases states them.
    fn references(device: Option<&str>) -> References {
        let device = device.map(|device| ("device".to_owned(), device.to_owned()));
        let facts = [("torch_threads".to_owned(), "2".to_owned())].into_iter().chain(device);
        References::of(&facts.collect()).unwrap()
    }

    #[test]
    fn references_hold_for_the_kind_of_device_that_made_them() {
        let host = |threads| Served { device: DeviceId::Host(0), threads };
        let gpu = |threads| Served { device: DeviceId::Cuda(1), threads };
        let held = |device, served| references(device).hold_for(served);
        assert!(held(None, host(2)) && held(Some("cpu"), host(2)));
        assert!(!held(None, host(1)) && !held(None, gpu(2)) && !held(Some("cpu"), gpu(2)));
        // Threads of the CPU have no part in what a GPU computes.
        assert!(held(Some("NVIDIA H200"), gpu(1)) && !held(Some("NVIDIA H200"), host(2)));
        assert_eq!(References::of(&HashMap::new()), None);
    }

    #[test]
    fn references_say_where_they_were_made() {
        let [cpu, gpu] = [None, Some("NVIDIA H200")].map(references);
        assert_eq!(
            (cpu.name(), cpu.made_on()),
            ("eager PyTorch".to_owned(), "cpu with 2 threads".to_owned())
        );
        assert_eq!(
            (gpu.name().as_str(), gpu.made_on().as_str()),
            ("eager PyTorch on NVIDIA H200", "NVIDIA H200")
        );
    }

    #[test]
    fn an_archive_that_is_not_there_is_named() {
        let error = Subject::open(Path::new("/nowhere/resnet")).unwrap_err().to_string();
        assert!(error.starts_with("there is no /nowhere/resnet/model.pt2"), "{error}");
    }
}
