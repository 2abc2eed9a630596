use std::fs::File;
use std::path::Path;

use memmap2::Mmap;

use crate::TrainError;

/// Maps a file that has at least one byte.
pub(super) fn map(path: &Path) -> Result<Mmap, TrainError> {
    let failed = |action| move |source| TrainError::Io { path: path.to_owned(), action, source };
    // Asked by name first: opening a pipe would wait for its other end.
    let metadata = path.metadata().map_err(failed("open"))?;
    if !metadata.is_file() {
        return Err(TrainError::NotAFile { path: path.to_owned() });
    }
    if metadata.len() == 0 {
        return Err(TrainError::EmptyFile { path: path.to_owned() });
    }
    let file = File::open(path).map_err(failed("open"))?;
    // SAFETY: the map is only read, and as bytes, for which every value is valid. What remains is that the file must not
    // be shortened while it is mapped; `Dataset::open` and `Checkpoint::open` ask that of their callers.
    unsafe { Mmap::map(&file) }.map_err(failed("map"))
}
