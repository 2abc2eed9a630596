use std::path::Path;

use crate::container::Container;
use crate::error::ModelError;
use crate::limits::Limits;
use crate::program::{Program, StorageId};
use crate::resolve;

/// An opened `.pt2` archive: its program, and its weights as bytes of a memory map.
#[derive(Debug)]
pub struct Archive {
    container: Container,
    program: Program,
}

impl Archive {
    /// Opens an archive with the default [`Limits`]. Weights are mapped, not read.
    ///
    /// The file must not be shortened or overwritten while it is open (reading a page that is gone ends the process);
    /// to replace a model, write a new file and rename it over the old one.
    ///
    /// # Errors
    ///
    /// Every [`ModelError`] but those about inputs: for files that cannot be read, are damaged, are not what
    /// `torch.export.save` of PyTorch 2.11 writes, or hold programs that use what is not supported.
    pub fn open(path: &Path) -> Result<Archive, ModelError> {
        Archive::open_with(path, &Limits::default())
    }

    /// As [`Archive::open`], with other limits.
    ///
    /// # Errors
    ///
    /// As [`Archive::open`].
    pub fn open_with(path: &Path, limits: &Limits) -> Result<Archive, ModelError> {
        let container = Container::open(path, limits)?;
        let program = resolve::program(&container, limits)?;
        Ok(Archive { container, program })
    }

    /// The file that was opened.
    pub fn path(&self) -> &Path {
        &self.container.file
    }

    /// The program.
    pub fn program(&self) -> &Program {
        &self.program
    }

    /// The bytes of a storage, straight from the file's map, little-endian.
    ///
    /// # Panics
    ///
    /// If `storage` is not one of this archive's program.
    pub fn storage_bytes(&self, storage: StorageId) -> &[u8] {
        &self.container.map[self.program.storages[storage.index()].in_file.clone()]
    }

    /// Reads all of the archive's tensors once and compares them with their checksums.
    ///
    /// # Errors
    ///
    /// [`ModelError::Entry`], with the entry that is damaged.
    pub fn verify(&self) -> Result<(), ModelError> {
        for storage in &self.program.storages {
            self.container.check_sum(&self.container.directory.entries[storage.entry])?;
        }
        Ok(())
    }

    /// A number that stays the same as long as the archive's contents do (names, sizes and checksums of its entries),
    /// wherever and under whatever name it lies: the key for what is worth keeping about a model.
    pub fn digest(&self) -> u64 {
        // FNV-1a: stable over time and machines, which the standard library's hashers are not.
        let mut hash = 0xcbf2_9ce4_8422_2325_u64;
        let mut add = |bytes: &[u8]| {
            for byte in bytes {
                hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
            }
        };
        for entry in &self.container.directory.entries {
            add(self.container.short_name(entry).as_bytes());
            add(&entry.size_bytes.to_le_bytes());
            add(&entry.crc32.to_le_bytes());
        }
        hash
    }
}
