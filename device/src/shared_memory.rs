use std::num::NonZeroUsize;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::{self, NonNull};
use std::sync::atomic::AtomicU32;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::libc::c_void;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use nix::sys::stat::fstat;
use nix::unistd::ftruncate;

use crate::{DeviceError, streaming};

const WORD_BYTES: u64 = 4;

/// Zero-filled memory that several processes can map, made by `memfd_create` and sealed against any change of its size.
///
/// Reads and writes go through raw copies, never through references, because another process may hold the same bytes.
/// Nothing here orders two users of one range: ranges are handed out exclusively (by the ledger, the arenas and the
/// slots), and a range changes hands through a word of shared memory that is stored with release and loaded with
/// acquire ordering, or through a message. Two users who break that rule read garbage, as with any shared memory, but
/// stay inside the mapping.
#[derive(Debug)]
pub struct SharedMemory {
    // Unmapped in `drop`; the mapping does not need the descriptor, which is kept for handing the memory on.
    start: NonNull<c_void>,
    length: NonZeroUsize,
    bytes: u64,
    fd: OwnedFd,
}

// SAFETY: the mapping belongs to the whole process and is not tied to the thread that made it.
unsafe impl Send for SharedMemory {}
// SAFETY: `&SharedMemory` gives out only raw copies inside the mapping and atomics (see the type's documentation for
// who orders them); its own fields never change after construction.
unsafe impl Sync for SharedMemory {}

impl SharedMemory {
    /// Makes `bytes` of zeros; `name` shows up in `/proc/PID/maps`.
    ///
    /// # Errors
    /// [`DeviceError::EmptyAllocation`] for zero bytes, [`DeviceError::System`] when the kernel refuses.
    pub fn create(name: &str, bytes: u64) -> Result<Self, DeviceError> {
        if bytes == 0 {
            return Err(DeviceError::EmptyAllocation);
        }
        let size = i64::try_from(bytes)
            .map_err(|_| DeviceError::System { call: "ftruncate", source: Errno::EFBIG })?;
        let fd = memfd_create(name, MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)
            .map_err(DeviceError::system("memfd_create"))?;
        ftruncate(&fd, size).map_err(DeviceError::system("ftruncate"))?;
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        fcntl(&fd, FcntlArg::F_ADD_SEALS(seals)).map_err(DeviceError::system("fcntl(F_ADD_SEALS)"))?;
        Self::map(fd, bytes)
    }

    /// Maps memory received from another process, which said that it has `bytes`.
    ///
    /// The size is checked, and so is the seal against shrinking: without it the sender could cut the file short later
    /// and every access to the lost pages would kill this process with SIGBUS.
    ///
    /// # Errors
    /// [`DeviceError::Unsealed`], [`DeviceError::WrongFileSize`], [`DeviceError::EmptyAllocation`] or
    /// [`DeviceError::System`].
    pub fn from_fd(fd: OwnedFd, bytes: u64) -> Result<Self, DeviceError> {
        if bytes == 0 {
            return Err(DeviceError::EmptyAllocation);
        }
        // Files that know no seals answer with an error: they can be shrunk as well.
        let seals = fcntl(&fd, FcntlArg::F_GET_SEALS).map_err(|_| DeviceError::Unsealed)?;
        if !SealFlag::from_bits_retain(seals).contains(SealFlag::F_SEAL_SHRINK) {
            return Err(DeviceError::Unsealed);
        }
        // Only now does the size tell anything: it can no longer fall.
        let found = fstat(&fd).map_err(DeviceError::system("fstat"))?.st_size;
        let found_bytes = u64::try_from(found).unwrap_or(0);
        if found_bytes != bytes {
            return Err(DeviceError::WrongFileSize { expected_bytes: bytes, found_bytes });
        }
        Self::map(fd, bytes)
    }

    fn map(fd: OwnedFd, bytes: u64) -> Result<Self, DeviceError> {
        let length = usize::try_from(bytes)
            .ok()
            .and_then(NonZeroUsize::new)
            .ok_or(DeviceError::System { call: "mmap", source: Errno::EINVAL })?;
        // SAFETY: no address is asked for, so the kernel picks a range that nothing else uses; the file is at least
        // `length` long and cannot shrink.
        let start = unsafe {
            mmap(None, length, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_SHARED, &fd, 0)
        }
        .map_err(DeviceError::system("mmap"))?;
        Ok(Self { start, length, bytes, fd })
    }

    /// The file behind the memory, to be sent to another process.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Its size.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Where it is mapped, aligned to a page; valid as long as `self` lives.
    pub fn as_ptr(&self) -> *mut u8 {
        self.start.as_ptr().cast()
    }

    /// Writes all of `data` at `offset`. If it is long, a device is to read it: it goes past the caches then.
    ///
    /// # Errors
    /// [`DeviceError::OutOfRange`]; nothing is written then.
    pub fn write(&self, offset: u64, data: &[u8]) -> Result<(), DeviceError> {
        let to = self.at(offset, data.len() as u64)?;
        // SAFETY: `at` has checked that the range lies in the mapping; `data` is ordinary memory of this process, which
        // a mapping of ours can only overlap if somebody made a reference into it, and nobody may (see the type).
        unsafe {
            if data.len() < streaming::LEAST_BYTES {
                ptr::copy_nonoverlapping(data.as_ptr(), to, data.len());
            } else {
                streaming::copy(data.as_ptr(), to, data.len());
            }
        }
        Ok(())
    }

    /// Fills all of `into` from `offset` on.
    ///
    /// # Errors
    /// [`DeviceError::OutOfRange`]; `into` is untouched then.
    pub fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), DeviceError> {
        let from = self.at(offset, into.len() as u64)?;
        // SAFETY: as in `write`, the other way round.
        unsafe { ptr::copy_nonoverlapping(from, into.as_mut_ptr(), into.len()) };
        Ok(())
    }

    /// Copies `bytes` from one shared memory to another; the two ranges may overlap.
    ///
    /// # Errors
    /// [`DeviceError::OutOfRange`]; nothing is copied then.
    pub fn copy(
        &self,
        offset: u64,
        to: &SharedMemory,
        to_offset: u64,
        bytes: u64,
    ) -> Result<(), DeviceError> {
        let from = self.at(offset, bytes)?;
        let to = to.at(to_offset, bytes)?;
        let length = usize::try_from(bytes).map_err(|_| DeviceError::OutOfRange {
            what: "shared memory",
            offset,
            bytes,
            capacity_bytes: self.bytes,
        })?;
        // SAFETY: `at` has checked both ranges; `copy` allows them to overlap.
        unsafe { ptr::copy(from, to, length) };
        Ok(())
    }

    /// The word at `offset`, for flags that processes share.
    ///
    /// # Errors
    /// [`DeviceError::NotAWord`] if `offset` is no multiple of four, [`DeviceError::OutOfRange`].
    pub fn word(&self, offset: u64) -> Result<&AtomicU32, DeviceError> {
        if !offset.is_multiple_of(WORD_BYTES) {
            return Err(DeviceError::NotAWord { offset, bytes: WORD_BYTES });
        }
        let word = self.at(offset, WORD_BYTES)?;
        // SAFETY: in bounds, aligned (the mapping begins at a page and `offset` is a multiple of four), always
        // initialised, and it lives as long as `self`. Words are reserved by the allocators and never written otherwise
        // while in use.
        Ok(unsafe { AtomicU32::from_ptr(word.cast()) })
    }

    /// The address of a range after checking that all of it is inside.
    fn at(&self, offset: u64, bytes: u64) -> Result<*mut u8, DeviceError> {
        let inside = offset.checked_add(bytes).is_some_and(|end| end <= self.bytes);
        match usize::try_from(offset) {
            // SAFETY: the offset is at most the mapping's length.
            Ok(offset) if inside => Ok(unsafe { self.as_ptr().add(offset) }),
            _ => Err(DeviceError::OutOfRange {
                what: "shared memory",
                offset,
                bytes,
                capacity_bytes: self.bytes,
            }),
        }
    }
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        // SAFETY: this is the mapping made in `map`, and no reference into it outlives `self`.
        let unmapped = unsafe { munmap(self.start, self.length.get()) };
        if let Err(error) = unmapped {
            tracing::warn!(%error, bytes = self.bytes, "shared memory could not be unmapped");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;
    use std::sync::atomic::Ordering;

    use super::*;

    fn received(memory: &SharedMemory) -> OwnedFd {
        memory.fd().try_clone_to_owned().unwrap()
    }

    #[test]
    fn both_mappings_show_the_same_bytes() {
        let memory = SharedMemory::create("test", 5000).unwrap();
        let other = SharedMemory::from_fd(received(&memory), 5000).unwrap();
        memory.write(4090, &[1, 2, 3]).unwrap();
        let mut found = [9; 5];
        other.read(4089, &mut found).unwrap();
        assert_eq!(found, [0, 1, 2, 3, 0]);
        other.word(8).unwrap().store(0x0102_0304, Ordering::Relaxed);
        assert_eq!(memory.word(8).unwrap().load(Ordering::Relaxed), 0x0102_0304);
    }

    #[test]
    fn ranges_outside_are_refused_and_change_nothing() {
        let memory = SharedMemory::create("test", 100).unwrap();
        for (offset, bytes) in [(100, 1), (99, 2), (0, 101), (u64::MAX, 1), (u64::MAX - 3, 10)] {
            let data = vec![7; usize::try_from(bytes).unwrap()];
            let expected =
                DeviceError::OutOfRange { what: "shared memory", offset, bytes, capacity_bytes: 100 };
            assert_eq!(memory.write(offset, &data), Err(expected.clone()));
            let mut into = data.clone();
            assert_eq!(memory.read(offset, &mut into), Err(expected.clone()));
            assert_eq!(into, data);
            assert_eq!(memory.copy(offset, &memory, 0, bytes), Err(expected.clone()));
            assert_eq!(memory.copy(0, &memory, offset, bytes), Err(expected));
        }
        assert!(matches!(memory.word(100), Err(DeviceError::OutOfRange { .. })));
        assert!(matches!(memory.word(u64::MAX - 3), Err(DeviceError::OutOfRange { .. })));
        assert_eq!(memory.word(2).unwrap_err(), DeviceError::NotAWord { offset: 2, bytes: 4 });
        memory.write(100, &[]).unwrap();
        let mut all = [1; 100];
        memory.read(0, &mut all).unwrap();
        assert_eq!(all, [0; 100]);
    }

    #[test]
    fn overlapping_copies_move_the_bytes() {
        let memory = SharedMemory::create("test", 8).unwrap();
        memory.write(0, &[1, 2, 3, 4, 5, 6, 7, 8]).unwrap();
        memory.copy(0, &memory, 2, 6).unwrap();
        let mut found = [0; 8];
        memory.read(0, &mut found).unwrap();
        assert_eq!(found, [1, 2, 1, 2, 3, 4, 5, 6]);
    }

    #[test]
    fn its_size_is_sealed() {
        let memory = SharedMemory::create("test", 8192).unwrap();
        assert_eq!(ftruncate(memory.fd(), 4096), Err(Errno::EPERM));
        assert_eq!(ftruncate(memory.fd(), 16384), Err(Errno::EPERM));
    }

    #[test]
    fn what_its_sender_could_shrink_is_refused() {
        let unsealed = memfd_create("test", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING).unwrap();
        ftruncate(&unsealed, 4096).unwrap();
        assert_eq!(SharedMemory::from_fd(unsealed, 4096).unwrap_err(), DeviceError::Unsealed);
        // A file of a kind that knows no seals.
        let null = File::open("/dev/null").unwrap();
        assert_eq!(SharedMemory::from_fd(null.into(), 4096).unwrap_err(), DeviceError::Unsealed);
    }

    #[test]
    fn another_size_than_announced_is_refused() {
        let memory = SharedMemory::create("test", 4096).unwrap();
        for expected_bytes in [1, 4095, 4097, 1 << 40, u64::MAX] {
            let error = SharedMemory::from_fd(received(&memory), expected_bytes).unwrap_err();
            assert_eq!(error, DeviceError::WrongFileSize { expected_bytes, found_bytes: 4096 });
        }
        assert_eq!(SharedMemory::from_fd(received(&memory), 0).unwrap_err(), DeviceError::EmptyAllocation);
    }

    #[test]
    fn a_file_that_cannot_be_written_cannot_be_mapped() {
        let memory = SharedMemory::create("test", 4096).unwrap();
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&memory.fd()));
        let read_only = File::open(path).unwrap();
        let error = SharedMemory::from_fd(read_only.into(), 4096).unwrap_err();
        assert_eq!(error, DeviceError::System { call: "mmap", source: Errno::EACCES });
    }

    #[test]
    fn the_file_and_the_mapping_are_one() {
        let memory = SharedMemory::create("test", 4096).unwrap();
        memory.write(10, b"hello").unwrap();
        let mut found = [0; 5];
        File::from(received(&memory)).read_exact_at(&mut found, 10).unwrap();
        assert_eq!(&found, b"hello");
    }

    #[test]
    fn impossible_sizes_and_names_are_refused() {
        assert_eq!(SharedMemory::create("test", 0).unwrap_err(), DeviceError::EmptyAllocation);
        assert!(matches!(SharedMemory::create("test", u64::MAX), Err(DeviceError::System { .. })));
        assert!(matches!(SharedMemory::create("test", 1 << 62), Err(DeviceError::System { .. })));
        assert!(matches!(SharedMemory::create("a\0b", 1), Err(DeviceError::System { .. })));
    }
}
