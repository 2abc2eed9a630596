use std::io;
use std::path::{Path, PathBuf};

use pswitch_model::DType;
use serde::de::DeserializeOwned;

use super::{CheckpointState, OPTIMIZER, OPTIMIZER_PREFIX, POSITION, file_name};
use crate::TrainError;
use crate::data::TensorFile;

/// A checkpoint, memory-mapped.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    state: CheckpointState,
    file: TensorFile,
}

/// A tensor of a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CheckpointTensor<'a> {
    /// Its name: in the state dict, or in the optimizer's state without [`OPTIMIZER_PREFIX`].
    pub name: &'a str,
    /// Type of its elements.
    pub dtype: DType,
    /// Its shape.
    pub shape: &'a [u64],
    /// Its elements, dense and in C order.
    pub bytes: &'a [u8],
}

impl Checkpoint {
    /// Maps a checkpoint. Its file may be removed while it is open, but not shortened: whoever reads it then dies of a
    /// signal.
    ///
    /// # Errors
    ///
    /// If the file cannot be read, is torn, or is something else than [`write_checkpoint`](crate::write_checkpoint) writes.
    pub fn open(path: &Path) -> Result<Checkpoint, TrainError> {
        let file = TensorFile::open(path)?;
        let state = CheckpointState {
            position: metadata(path, &file, POSITION)?,
            optimizer: metadata(path, &file, OPTIMIZER)?,
        };
        Ok(Checkpoint { path: path.to_owned(), state, file })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where the task was, and with which optimizer.
    pub fn state(&self) -> &CheckpointState {
        &self.state
    }

    /// Parameters and buffers of the model, in the order of their names.
    pub fn model(&self) -> impl Iterator<Item = CheckpointTensor<'_>> {
        self.tensors().filter(|tensor| !tensor.name.starts_with(OPTIMIZER_PREFIX))
    }

    /// Tensors of the optimizer's state, in the order of their names.
    pub fn optimizer(&self) -> impl Iterator<Item = CheckpointTensor<'_>> {
        self.tensors().filter_map(|tensor| {
            let name = tensor.name.strip_prefix(OPTIMIZER_PREFIX)?;
            Some(CheckpointTensor { name, ..tensor })
        })
    }

    fn tensors(&self) -> impl Iterator<Item = CheckpointTensor<'_>> {
        self.file.tensors.iter().map(|tensor| CheckpointTensor {
            name: &tensor.name,
            dtype: tensor.dtype,
            shape: &tensor.shape,
            bytes: &self.file.map[tensor.bytes.clone()],
        })
    }
}

fn metadata<T: DeserializeOwned>(path: &Path, file: &TensorFile, key: &'static str) -> Result<T, TrainError> {
    let Some(text) = file.metadata.get(key) else {
        return Err(TrainError::NotACheckpoint { path: path.to_owned(), missing: key });
    };
    serde_json::from_str(text).map_err(|source| TrainError::CheckpointMetadata {
        path: path.to_owned(),
        key,
        source,
    })
}

/// Opens the checkpoint of the latest step in a folder: none if there is no folder or no checkpoint in it. One that cannot
/// be read is passed over with a warning.
///
/// # Errors
///
/// [`TrainError::Io`] if the folder cannot be listed, [`TrainError::NoCheckpoint`] if there are some and none can be read: to begin
/// anew would lose what they hold.
pub fn latest_checkpoint(folder: &Path) -> Result<Option<Checkpoint>, TrainError> {
    let listing = match file_name::list(folder) {
        Ok(listing) => listing,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(TrainError::Io { path: folder.to_owned(), action: "list", source }),
    };
    let mut refusal = Ok(None);
    for (_, path) in listing.checkpoints {
        match Checkpoint::open(&path) {
            Ok(checkpoint) => return Ok(Some(checkpoint)),
            Err(error) => {
                let shown: &dyn std::error::Error = &error;
                tracing::warn!(file = %path.display(), error = shown, "passing over a checkpoint that cannot be read");
                refusal =
                    Err(TrainError::NoCheckpoint { folder: folder.to_owned(), source: Box::new(error) });
            }
        }
    }
    refusal
}
