use std::fs::File;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use serde::de::DeserializeOwned;

use crate::error::ModelError;
use crate::limits::Limits;
use crate::zip::{Directory, Entry};

/// A mapped archive whose layout is that of `torch.export.save`: one top folder, under it `archive_format`,
/// `archive_version`, `byteorder`, `models/NAME.json` and what belongs to it.
#[derive(Debug)]
pub(crate) struct Container {
    pub(crate) file: PathBuf,
    pub(crate) map: Mmap,
    pub(crate) directory: Directory,
    /// The top folder.
    root: String,
    limits: Limits,
}

impl Container {
    pub(crate) fn open(path: &Path, limits: &Limits) -> Result<Container, ModelError> {
        let failed = |action| move |source| ModelError::Io { file: path.to_owned(), action, source };
        let file = File::open(path).map_err(failed("open"))?;
        let metadata = file.metadata().map_err(failed("open"))?;
        if !metadata.is_file() || metadata.len() == 0 {
            let reason = if metadata.is_file() { "it is empty" } else { "it is not a regular file" };
            return Err(ModelError::NotAZip { file: path.to_owned(), reason: reason.to_owned() });
        }
        // SAFETY: the map is only read, and as bytes, for which every value is valid. What remains is that the file must
        // not be shortened while it is mapped; `Archive::open` asks that of its caller.
        let map = unsafe { Mmap::map(&file) }.map_err(failed("map"))?;
        let directory = Directory::read(path, &map, limits)?;
        let root = find_root(path, &directory)?;
        let container = Container { file: path.to_owned(), map, directory, root, limits: *limits };
        container.check_versions()?;
        Ok(container)
    }

    fn check_versions(&self) -> Result<(), ModelError> {
        for (entry, what, supported, required) in [
            ("archive_format", "the archive's format", "pt2", true),
            ("archive_version", "the archive's version", "0", true),
            // PyTorch takes archives without this entry for little-endian ones.
            ("byteorder", "the archive's byte order", "little", false),
        ] {
            if !required && self.find(entry).is_none() {
                continue;
            }
            let found = String::from_utf8_lossy(self.bytes(entry, 64)?).trim().to_owned();
            if found != supported {
                let (file, supported) = (self.file.clone(), supported.to_owned());
                return Err(ModelError::Version { file, what, found, supported });
            }
        }
        Ok(())
    }

    /// The index of the entry of this name under the top folder.
    pub(crate) fn position(&self, name: &str) -> Option<usize> {
        self.directory.position(&format!("{}/{name}", self.root))
    }

    /// The entry of this name under the top folder.
    pub(crate) fn find(&self, name: &str) -> Option<&Entry> {
        self.position(name).map(|index| &self.directory.entries[index])
    }

    /// The name of the one program in the archive: `model` unless its author chose another.
    pub(crate) fn program_name(&self) -> Result<&str, ModelError> {
        let programs: Vec<&str> = self
            .directory
            .entries
            .iter()
            .filter_map(|entry| {
                entry.name.strip_prefix(&self.root)?.strip_prefix("/models/")?.strip_suffix(".json")
            })
            .collect();
        let reason = match programs.as_slice() {
            [name] => return Ok(name),
            [] => "it holds no program (no entry `models/*.json`)".to_owned(),
            _ => format!("it holds {} programs ({}); one is supported", programs.len(), programs.join(", ")),
        };
        Err(ModelError::NotAnExport { file: self.file.clone(), reason })
    }

    /// The contents of an entry that has to be there, of at most `limit` bytes, after comparing their checksum.
    fn bytes(&self, name: &str, limit: u64) -> Result<&[u8], ModelError> {
        let Some(entry) = self.find(name) else { return Err(self.entry_error(name, "is missing")) };
        check_stored(entry).map_err(|reason| self.entry_error(name, &reason))?;
        if entry.size_bytes > limit {
            let (file, what) = (self.file.clone(), format!("the size of entry `{name}`"));
            return Err(ModelError::Limit { file, what, found: entry.size_bytes, limit });
        }
        self.check_sum(entry)?;
        Ok(&self.map[entry.range.clone()])
    }

    /// Parses an entry that has to be there.
    pub(crate) fn json<T: DeserializeOwned>(&self, name: &str) -> Result<T, ModelError> {
        serde_json::from_slice(self.bytes(name, self.limits.json_bytes)?).map_err(|source| ModelError::Json {
            file: self.file.clone(),
            entry: name.to_owned(),
            source,
        })
    }

    /// Compares an entry's bytes with their checksum.
    pub(crate) fn check_sum(&self, entry: &Entry) -> Result<(), ModelError> {
        let found = crc32fast::hash(&self.map[entry.range.clone()]);
        if found == entry.crc32 {
            return Ok(());
        }
        let reason = format!("is damaged: its checksum is {found:08x}, it should be {:08x}", entry.crc32);
        Err(self.entry_error(self.short_name(entry), &reason))
    }

    /// An entry's name without the top folder.
    pub(crate) fn short_name<'a>(&self, entry: &'a Entry) -> &'a str {
        entry.name.strip_prefix(&self.root).and_then(|name| name.strip_prefix('/')).unwrap_or(&entry.name)
    }

    pub(crate) fn entry_error(&self, entry: &str, reason: &str) -> ModelError {
        ModelError::Entry { file: self.file.clone(), entry: entry.to_owned(), reason: reason.to_owned() }
    }
}

/// Whether an entry's bytes can be used as they lie in the file; otherwise, why not.
pub(crate) fn check_stored(entry: &Entry) -> Result<(), String> {
    if entry.method != 0 {
        return Err(format!(
            "is compressed (method {}); archives must store entries as they are",
            entry.method
        ));
    }
    let stored_bytes = entry.range.len() as u64;
    if stored_bytes != entry.size_bytes {
        return Err(format!("has {stored_bytes} bytes; the directory promises {}", entry.size_bytes));
    }
    Ok(())
}

fn find_root(file: &Path, directory: &Directory) -> Result<String, ModelError> {
    let root_of = |entry: &str| {
        directory.entries.iter().find_map(|other| {
            let root = other.name.strip_suffix(entry)?.strip_suffix('/')?;
            (!root.contains('/')).then(|| root.to_owned())
        })
    };
    if let Some(root) = root_of("archive_format") {
        return Ok(root);
    }
    let reason = if root_of("constants.pkl").is_some() {
        "it is a TorchScript archive; export the model with torch.export instead"
    } else if directory.position("serialized_exported_program.json").is_some() {
        "an older PyTorch wrote it; export the model again with PyTorch 2.11"
    } else {
        "it has no entry `archive_format`"
    };
    Err(ModelError::NotAnExport { file: file.to_owned(), reason: reason.to_owned() })
}
