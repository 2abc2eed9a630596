//! Models with reference cases, and repositories made of them.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use tempfile::TempDir;

/// A tensor as it travels.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Tensor {
    pub(crate) name: String,
    pub(crate) datatype: String,
    pub(crate) shape: Vec<u64>,
    pub(crate) data: Vec<u8>,
}

/// One call: inputs, and what eager PyTorch answered on this machine.
#[derive(Debug, Clone)]
pub(crate) struct Case {
    pub(crate) inputs: Vec<Tensor>,
    /// In the program's order; empty if the case raises.
    pub(crate) outputs: Vec<Tensor>,
    /// The first line of what PyTorch raised.
    pub(crate) raises: Option<String>,
}

/// An archive with its reference cases, made by `cargo xtask fixtures`.
#[derive(Debug, Clone)]
pub(crate) struct Fixture {
    pub(crate) name: String,
    pub(crate) archive: PathBuf,
    pub(crate) inputs: Vec<String>,
    /// Names of the outputs; constants have none and are not sent.
    pub(crate) outputs: Vec<String>,
    pub(crate) cases: Vec<Case>,
}

impl Fixture {
    pub(crate) fn load(name: &str) -> Self {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/fixtures").join(name);
        let read = |file: &str| {
            std::fs::read(folder.join(file)).unwrap_or_else(|error| {
                panic!("{}/{file}: {error}: run `cargo xtask fixtures`", folder.display())
            })
        };
        let manifest: Value = serde_json::from_slice(&read("manifest.json")).unwrap();
        let bytes = read("cases.safetensors");
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let texts = |key: &str| manifest[key].as_array().unwrap().iter().map(|name| name.as_str());
        // By position, constants included: that is how the cases count.
        let positions: Vec<Option<&str>> = texts("outputs").collect();
        let tensor = |key: String, name: &str| {
            let view = tensors.tensor(&key).unwrap_or_else(|error| panic!("{key}: {error}"));
            Tensor {
                name: name.to_owned(),
                datatype: datatype(view.dtype()).to_owned(),
                shape: view.shape().iter().map(|&extent| extent as u64).collect(),
                data: view.data().to_vec(),
            }
        };
        let inputs: Vec<String> = texts("inputs").flatten().map(str::to_owned).collect();
        let cases = (0..manifest["cases"].as_array().unwrap().len())
            .map(|case| {
                let raises = manifest["cases"][case]["raises"].as_str().map(str::to_owned);
                let outputs = positions.iter().enumerate().filter_map(|(position, name)| {
                    (*name).map(|name| tensor(format!("case{case}.output.{position}"), name))
                });
                Case {
                    inputs: inputs
                        .iter()
                        .map(|name| tensor(format!("case{case}.input.{name}"), name))
                        .collect(),
                    outputs: if raises.is_none() { outputs.collect() } else { Vec::new() },
                    raises,
                }
            })
            .collect();
        let outputs = positions.iter().flatten().map(|&name| name.to_owned()).collect();
        Self { name: name.to_owned(), archive: folder.join("model.pt2"), inputs, outputs, cases }
    }
}

fn datatype(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::BOOL => "BOOL",
        Dtype::U8 => "UINT8",
        Dtype::I8 => "INT8",
        Dtype::I16 => "INT16",
        Dtype::I32 => "INT32",
        Dtype::I64 => "INT64",
        Dtype::F16 => "FP16",
        Dtype::BF16 => "BF16",
        Dtype::F32 => "FP32",
        Dtype::F64 => "FP64",
        other => panic!("{other:?} is in no fixture"),
    }
}

/// A model repository in a folder of its own.
#[derive(Debug)]
pub(crate) struct Models(TempDir);

impl Models {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    /// Fixtures under their own names.
    pub(crate) fn of<'a>(fixtures: impl IntoIterator<Item = &'a Fixture>) -> Self {
        let models = Self::new();
        for fixture in fixtures {
            models.link(&fixture.name, &fixture.archive);
        }
        models
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }

    /// Where a model's archive is or would be; its folder is there afterwards.
    pub(crate) fn archive(&self, name: &str) -> PathBuf {
        let folder = self.path().join(name);
        std::fs::create_dir_all(&folder).unwrap();
        folder.join("model.pt2")
    }

    /// Adds an archive that lies elsewhere.
    pub(crate) fn link(&self, name: &str, archive: &Path) {
        symlink(archive, self.archive(name)).unwrap();
    }

    /// Adds an archive of these bytes.
    pub(crate) fn write(&self, name: &str, archive: &[u8]) {
        std::fs::write(self.archive(name), archive).unwrap();
    }

    /// Gives a model settings.
    pub(crate) fn settings(&self, name: &str, yaml: &str) {
        std::fs::write(self.path().join(name).join("model.yaml"), yaml).unwrap();
    }
}
