use std::borrow::Cow;
use std::collections::BTreeMap;
use std::error::Error;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use pswitch_model::DType;
use safetensors::tensor::TensorInfo;
use serde::Serialize;

use super::{Checkpoint, CheckpointState, FORMAT, OPTIMIZER, OPTIMIZER_PREFIX, POSITION, file_name, folder};
use crate::TrainError;
use crate::data::{MOST_HEADER_BYTES, file_type};

/// A tensor to be written.
pub struct SavedTensor<'a> {
    /// As it stands in the file.
    name: String,
    is_optimizer: bool,
    dtype: DType,
    shape: Vec<u64>,
    fetch: Fetch<'a>,
}

type Fetch<'a> = Box<dyn FnOnce() -> Result<Cow<'a, [u8]>, Box<dyn Error + Send + Sync>> + 'a>;

impl<'a> SavedTensor<'a> {
    /// A parameter or buffer of the model, under its name in the state dict. `fetch` gives its elements, dense and in C
    /// order, when their turn comes: borrowed from host memory, or copied from a device. A name that begins with
    /// [`OPTIMIZER_PREFIX`] is refused when it is written.
    pub fn of_model<F>(name: &str, dtype: DType, shape: &[u64], fetch: F) -> SavedTensor<'a>
    where
        F: FnOnce() -> Result<Cow<'a, [u8]>, Box<dyn Error + Send + Sync>> + 'a,
    {
        let (name, shape) = (name.to_owned(), shape.to_vec());
        SavedTensor { name, is_optimizer: false, dtype, shape, fetch: Box::new(fetch) }
    }

    /// As [`of_model`](Self::of_model), for a tensor of the optimizer's state. In the file its name begins with
    /// [`OPTIMIZER_PREFIX`].
    pub fn of_optimizer<F>(name: &str, dtype: DType, shape: &[u64], fetch: F) -> SavedTensor<'a>
    where
        F: FnOnce() -> Result<Cow<'a, [u8]>, Box<dyn Error + Send + Sync>> + 'a,
    {
        let optimizer = SavedTensor::of_model(name, dtype, shape, fetch);
        SavedTensor { name: format!("{OPTIMIZER_PREFIX}{name}"), is_optimizer: true, ..optimizer }
    }
}

/// Writes the state of a task to `step-00000123.safetensors` in `folder`, which is made if it does not exist, and removes
/// older checkpoints of the folder until `keep` are left, the new one among them. Returns the new file.
///
/// The file is there as a whole or not at all, whenever the process or the machine dies: it is written under another name,
/// flushed to the disk and renamed. One tensor at a time is in memory. `safetensors.torch.load_file` reads it; what it
/// gives, without the names that begin with [`OPTIMIZER_PREFIX`], is a state dict.
///
/// The folder belongs to one task, one writer at a time, which a [`FolderClaim`](super::FolderClaim) makes sure of. Only
/// checkpoints are removed, as told by their names and their contents, and what writers that were killed left behind; later
/// steps than the new one's stay.
///
/// # Errors
///
/// [`TrainError::Io`] if the disk is full or fails; [`TrainError::TensorBytes`] if a tensor cannot be fetched; and what is
/// wrong with the tensors. No part of a file is left behind then, and the older checkpoints stay.
pub fn write_checkpoint<'a>(
    folder: &Path,
    keep: u32,
    state: &CheckpointState,
    tensors: impl IntoIterator<Item = SavedTensor<'a>>,
) -> Result<PathBuf, TrainError> {
    let step = state.position.step;
    let path = write(folder, &file_name::of(step), state, tensors)?;
    prune(folder, step, keep);
    Ok(path)
}

/// Writes the state of a task whose next loss is no number to `diverged-00000123.safetensors` in `folder`, as
/// [`write_checkpoint`] does. Who looks for the latest checkpoint passes it over, and none is removed for it.
///
/// # Errors
///
/// Those of [`write_checkpoint`].
pub fn write_diverged<'a>(
    folder: &Path,
    state: &CheckpointState,
    tensors: impl IntoIterator<Item = SavedTensor<'a>>,
) -> Result<PathBuf, TrainError> {
    write(folder, &file_name::of_diverged(state.position.step), state, tensors)
}

fn write<'a>(
    folder: &Path,
    name: &str,
    state: &CheckpointState,
    tensors: impl IntoIterator<Item = SavedTensor<'a>>,
) -> Result<PathBuf, TrainError> {
    let mut tensors: Vec<_> = tensors.into_iter().collect();
    // Larger elements first, so that all are aligned: PyTorch cannot view others in place.
    tensors.sort_by_key(|tensor| std::cmp::Reverse(tensor.dtype.size_bytes()));

    let path = folder.join(name);
    let header = header(&path, state, &tensors)?;
    let failed = |action| move |source| TrainError::Io { path: folder.to_owned(), action, source };
    folder::make(folder)?;

    let partial = Partial::create(folder.join(file_name::of_partial(name)))?;
    partial.write(&header)?;
    for tensor in tensors {
        partial.write_tensor(tensor)?;
    }
    partial.finish(&path)?;
    // The new name is on the disk when the folder is.
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(failed("flush"))?;
    Ok(path)
}

/// Whether [`write_checkpoint`] could write these tensors. Nothing is fetched and nothing written.
///
/// # Errors
///
/// What is wrong with them: [`TrainError::TensorName`], [`TrainError::ElementType`], [`TrainError::TensorTooLarge`],
/// [`TrainError::CheckpointHeader`].
pub fn check_checkpoint<'a>(
    folder: &Path,
    state: &CheckpointState,
    tensors: impl IntoIterator<Item = SavedTensor<'a>>,
) -> Result<(), TrainError> {
    let tensors: Vec<_> = tensors.into_iter().collect();
    header(&folder.join(file_name::of(state.position.step)), state, &tensors).map(|_| ())
}

/// A file that is removed again unless it is finished.
struct Partial {
    path: PathBuf,
    file: File,
}

impl Partial {
    fn create(path: PathBuf) -> Result<Partial, TrainError> {
        match File::create(&path) {
            Ok(file) => Ok(Partial { path, file }),
            Err(source) => Err(TrainError::Io { path, action: "create", source }),
        }
    }

    fn failed(&self, action: &'static str) -> impl FnOnce(io::Error) -> TrainError {
        move |source| TrainError::Io { path: self.path.clone(), action, source }
    }

    fn write(&self, bytes: &[u8]) -> Result<(), TrainError> {
        (&self.file).write_all(bytes).map_err(self.failed("write"))
    }

    fn write_tensor(&self, tensor: SavedTensor<'_>) -> Result<(), TrainError> {
        let needed_bytes = tensor.bytes()?;
        let SavedTensor { name, fetch, .. } = tensor;
        let bytes = match fetch() {
            Ok(bytes) => bytes,
            Err(source) => return Err(TrainError::TensorBytes { tensor: name, source }),
        };
        if bytes.len() as u64 != needed_bytes {
            return Err(TrainError::TensorLength { tensor: name, needed_bytes, found_bytes: bytes.len() });
        }
        self.write(&bytes)
    }

    fn finish(self, path: &Path) -> Result<(), TrainError> {
        self.file.sync_all().map_err(self.failed("flush"))?;
        fs::rename(&self.path, path).map_err(self.failed("rename"))
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        // After `finish` there is no such file any more.
        match fs::remove_file(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(file = %self.path.display(), %error, "cannot remove an unfinished checkpoint");
            }
            _ => {}
        }
    }
}

impl SavedTensor<'_> {
    fn bytes(&self) -> Result<u64, TrainError> {
        self.dtype.dense_bytes(&self.shape).ok_or_else(|| self.too_large())
    }

    fn too_large(&self) -> TrainError {
        TrainError::TensorTooLarge { tensor: self.name.clone(), shape: self.shape.clone() }
    }
}

/// A value of the header's map.
#[derive(Serialize)]
#[serde(untagged)]
enum Entry {
    Metadata(BTreeMap<&'static str, String>),
    Tensor(TensorInfo),
}

const METADATA: &str = "__metadata__";

/// All that is ahead of the tensors' bytes: the length of the map, and the map.
fn header(path: &Path, state: &CheckpointState, tensors: &[SavedTensor<'_>]) -> Result<Vec<u8>, TrainError> {
    let written = "numbers and names can be written as JSON";
    let metadata = BTreeMap::from([
        (FORMAT.0, FORMAT.1.to_owned()),
        (POSITION, serde_json::to_string(&state.position).expect(written)),
        (OPTIMIZER, serde_json::to_string(&state.optimizer).expect(written)),
    ]);
    let mut entries = BTreeMap::from([(METADATA, Entry::Metadata(metadata))]);
    let mut end = 0usize;
    for tensor in tensors {
        let refused = |reason| TrainError::TensorName { tensor: tensor.name.clone(), reason };
        if tensor.name == METADATA {
            return Err(refused("the file format has something else of this name"));
        }
        if !tensor.is_optimizer && tensor.name.starts_with(OPTIMIZER_PREFIX) {
            return Err(refused("names that begin with `optimizer.` are for the optimizer's state"));
        }
        let info = tensor.info(path, end)?;
        end = info.data_offsets.1;
        if entries.insert(&tensor.name, Entry::Tensor(info)).is_some() {
            return Err(refused("another one has this name"));
        }
    }
    let mut map = serde_json::to_vec(&entries).expect(written);
    // The tensors begin at a multiple of 8 bytes.
    map.resize(map.len().next_multiple_of(8), b' ');
    if map.len() as u64 > MOST_HEADER_BYTES {
        return Err(TrainError::CheckpointHeader { header_bytes: map.len(), most_bytes: MOST_HEADER_BYTES });
    }
    Ok([&(map.len() as u64).to_le_bytes(), map.as_slice()].concat())
}

impl SavedTensor<'_> {
    fn info(&self, path: &Path, begin: usize) -> Result<TensorInfo, TrainError> {
        let dtype = file_type(self.dtype).ok_or_else(|| TrainError::ElementType {
            tensor: self.name.clone(),
            path: path.to_owned(),
            found: self.dtype.to_string(),
        })?;
        let bytes = usize::try_from(self.bytes()?).ok();
        let end = bytes.and_then(|bytes| begin.checked_add(bytes)).ok_or_else(|| self.too_large())?;
        let shape = self.shape.iter().map(|dim| usize::try_from(*dim)).collect::<Result<_, _>>();
        let shape = shape.map_err(|_| self.too_large())?;
        Ok(TensorInfo { dtype, shape, data_offsets: (begin, end) })
    }
}

/// Removes what is not needed any more. The new checkpoint is written: nothing here makes that undone.
fn prune(folder: &Path, newest: u64, keep: u32) {
    let listing = match file_name::list(folder) {
        Ok(listing) => listing,
        Err(error) => {
            tracing::warn!(folder = %folder.display(), %error, "cannot list old checkpoints to remove them");
            return;
        }
    };
    // Files that cannot be read are none of ours, and those of later steps belong to another run of the task.
    let older = listing.checkpoints.into_iter().filter(|(step, _)| *step < newest).map(|(_, path)| path);
    let older = older.filter(|path| Checkpoint::open(path).is_ok());
    for path in older.skip(keep.saturating_sub(1) as usize).chain(listing.partial) {
        match fs::remove_file(&path) {
            Ok(()) => tracing::debug!(file = %path.display(), "removed an old checkpoint"),
            Err(error) => tracing::warn!(file = %path.display(), %error, "cannot remove an old checkpoint"),
        }
    }
}
