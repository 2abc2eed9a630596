use std::fs::{self, File, TryLockError};
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::TrainError;

/// What is locked of a folder. It stays behind, empty.
const LOCK: &str = ".lock";

/// Linux's "no locks available", for which [`io::ErrorKind`] has no name.
const ENOLCK: i32 = 37;

/// How often it is tried to claim a folder that is another's.
const TRY_EVERY: Duration = Duration::from_millis(20);

/// A folder of checkpoints that no other claim has while this lives, whatever process asks and by whatever path. A process that
/// is killed leaves none behind. Who removes the folder, or `.lock` in it, takes it away.
#[derive(Debug)]
pub struct FolderClaim {
    _lock: File,
}

impl FolderClaim {
    /// Claims a folder, which is made if it does not exist. One who has it may be about to end, for which it is waited as long as
    /// `patience`.
    ///
    /// # Errors
    ///
    /// [`TrainError::FolderTaken`] if it is another's by then; [`TrainError::Io`] if it cannot be made or written to. Where the file
    /// system has no locks there is a warning, and nobody is kept out.
    pub fn new(folder: &Path, patience: Duration) -> Result<FolderClaim, TrainError> {
        let failed = |action| move |source| TrainError::Io { path: folder.to_owned(), action, source };
        make(folder)?;
        let path = folder.join(LOCK);
        let lock = File::options().create(true).append(true).open(path).map_err(failed("write to"))?;
        let begun = Instant::now();
        loop {
            match lock.try_lock() {
                Ok(()) => return Ok(FolderClaim { _lock: lock }),
                Err(TryLockError::Error(error))
                    if error.kind() == io::ErrorKind::Unsupported || error.raw_os_error() == Some(ENOLCK) =>
                {
                    tracing::warn!(folder = %folder.display(), %error, "it cannot be locked: two tasks could write there");
                    return Ok(FolderClaim { _lock: lock });
                }
                Err(TryLockError::Error(source)) => return Err(failed("lock")(source)),
                Err(TryLockError::WouldBlock) if begun.elapsed() >= patience => {
                    return Err(TrainError::FolderTaken { path: folder.to_owned() });
                }
                Err(TryLockError::WouldBlock) => std::thread::sleep(TRY_EVERY),
            }
        }
    }
}

/// Makes a folder, unless it is there, which outlives the machine if what is written to it does.
pub(super) fn make(folder: &Path) -> Result<(), TrainError> {
    let failed = |action| move |source| TrainError::Io { path: folder.to_owned(), action, source };
    let missing: Vec<&Path> = folder.ancestors().take_while(|path| !path.is_dir()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    fs::create_dir_all(folder).map_err(failed("make the folder"))?;
    // A name is on the disk when the folder is that has it.
    for parent in missing.into_iter().filter_map(Path::parent) {
        let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
        File::open(parent).and_then(|parent| parent.sync_all()).map_err(failed("flush what holds"))?;
    }
    Ok(())
}
