//! Archives for tests: the fixtures, and fixtures with something changed.

use std::io::{Cursor, Read, Write};
use std::path::PathBuf;

use pswitch_model::{Archive, ModelError};
use serde_json::Value;
use tempfile::NamedTempFile;
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipArchive, ZipWriter};

pub(crate) const NAMES: [&str; 11] = [
    "two_inputs",
    "weights",
    "constants",
    "no_grad",
    "autocast_off",
    "norm_functional",
    "writes_input",
    "derived",
    "item",
    "lists",
    "integer_input",
];

pub(crate) const MODEL: &str = "models/model.json";
pub(crate) const WEIGHTS: &str = "data/weights/model_weights_config.json";

pub(crate) fn path(name: &str) -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures")).join(format!("{name}.pt2"))
}

pub(crate) fn open(name: &str) -> Archive {
    Archive::open(&path(name)).unwrap()
}

/// A fixture in pieces, to be changed and put together again by another implementation of the format.
#[derive(Clone)]
pub(crate) struct Pieces {
    pub(crate) root: String,
    /// Names without the top folder.
    pub(crate) entries: Vec<(String, Vec<u8>)>,
}

impl Pieces {
    pub(crate) fn of(name: &str) -> Pieces {
        let mut zip = ZipArchive::new(std::fs::File::open(path(name)).unwrap()).unwrap();
        let entries = (0..zip.len())
            .map(|index| {
                let mut entry = zip.by_index(index).unwrap();
                let mut contents = Vec::new();
                entry.read_to_end(&mut contents).unwrap();
                (entry.name().split_once('/').unwrap().1.to_owned(), contents)
            })
            .collect();
        Pieces { root: name.to_owned(), entries }
    }

    pub(crate) fn get(&mut self, entry: &str) -> &mut Vec<u8> {
        &mut self.entries.iter_mut().find(|(name, _)| name == entry).unwrap().1
    }

    pub(crate) fn set(mut self, entry: &str, contents: &[u8]) -> Pieces {
        *self.get(entry) = contents.to_vec();
        self
    }

    pub(crate) fn without(mut self, entry: &str) -> Pieces {
        let before = self.entries.len();
        self.entries.retain(|(name, _)| name != entry);
        assert_eq!(self.entries.len() + 1, before, "no entry {entry}");
        self
    }

    pub(crate) fn edit(mut self, entry: &str, edit: impl FnOnce(&mut Value)) -> Pieces {
        let contents = self.get(entry);
        let mut json = serde_json::from_slice(contents).unwrap();
        edit(&mut json);
        *contents = serde_json::to_vec(&json).unwrap();
        self
    }

    pub(crate) fn bytes(&self, method: CompressionMethod) -> Vec<u8> {
        let mut writer = ZipWriter::new(Cursor::new(Vec::new()));
        for (name, contents) in &self.entries {
            let options = SimpleFileOptions::default().compression_method(method);
            writer.start_file(format!("{}/{name}", self.root), options).unwrap();
            writer.write_all(contents).unwrap();
        }
        writer.finish().unwrap().into_inner()
    }

    pub(crate) fn open(&self) -> Result<Archive, ModelError> {
        open_bytes(&self.bytes(CompressionMethod::Stored))
    }

    /// What is said when this archive is opened, with its causes.
    pub(crate) fn refusal(&self) -> String {
        describe(&self.open().expect_err("was accepted"))
    }
}

pub(crate) fn open_bytes(bytes: &[u8]) -> Result<Archive, ModelError> {
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    // The map outlives the name.
    Archive::open(file.path())
}

pub(crate) fn describe(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {}", describe(source)),
        None => error.to_string(),
    }
}

/// Asserts that a message holds all of these.
#[track_caller]
pub(crate) fn assert_says(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "`{message}` does not say `{part}`");
    }
}

/// The nodes of the model's graph.
pub(crate) fn nodes(model: &mut Value) -> &mut Vec<Value> {
    model["graph_module"]["graph"]["nodes"].as_array_mut().unwrap()
}
