//! libtorch on a GPU: `libtorch_cuda.so` and the CUDA half of the shim, opened by workers of CUDA devices alone.
//!
//! The binary links neither, so that it starts on machines without a GPU, and quickly there. The half of the shim travels
//! inside of the binary and is opened from memory.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::fs::File;
use std::io::Write as _;
use std::os::fd::AsRawFd as _;
use std::ptr;

use nix::sys::memfd::{MFdFlags, memfd_create};
use pswitch_device::{DeviceAddress, GpuStream};

use crate::arena;
use crate::error::WorkerError;
use crate::ffi::{RawError, RawValues};
use crate::libtorch::{Raised, checked};

/// The compiled `shim/cuda.cpp`; empty if this build's libtorch has no CUDA.
static SHIM: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/pswitch_cuda.so"));

/// `ps_cuda_memory`
#[repr(C)]
struct RawMemory {
    allocate: extern "C" fn(usize, *mut bool) -> *mut c_void,
    release: extern "C" fn(*mut c_void) -> bool,
    outside: extern "C" fn(i64),
}

/// The functions of `shim/cuda.h`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct CudaLibtorch {
    attach: unsafe extern "C" fn(c_int, *mut c_void, *const RawMemory, *mut RawError) -> bool,
    prepare_training: unsafe extern "C" fn(c_int, *mut RawError) -> bool,
    output: unsafe extern "C" fn(*mut RawValues, u32, *mut *mut c_void, *mut RawError) -> bool,
    clear_error: unsafe extern "C" fn(),
}

impl CudaLibtorch {
    /// Opens both libraries. They stay for the life of the process.
    pub(crate) fn open() -> Result<Self, WorkerError> {
        if SHIM.is_empty() {
            let reason = "this build's libtorch is one without CUDA; build with PyTorch's CUDA package";
            return Err(WorkerError::Libtorch { reason: reason.to_owned() });
        }
        open_library(c"libtorch_cuda.so")?;
        let file = memfd_create(c"pswitch_cuda.so", MFdFlags::MFD_CLOEXEC)
            .map_err(|errno| WorkerError::System { operation: "memfd_create", source: errno.into() })?;
        let mut file = File::from(file);
        file.write_all(SHIM)
            .map_err(|source| WorkerError::System { operation: "writing the shim", source })?;
        let path = CString::new(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap_or_default();
        let library = open_library(&path)?;
        // SAFETY: the functions have these types in `shim/cuda.h`, and the library stays open.
        unsafe {
            Ok(Self {
                attach: std::mem::transmute::<
                    *mut c_void,
                    unsafe extern "C" fn(c_int, *mut c_void, *const RawMemory, *mut RawError) -> bool,
                >(find(library, c"ps_cuda_attach")?),
                prepare_training: std::mem::transmute::<
                    *mut c_void,
                    unsafe extern "C" fn(c_int, *mut RawError) -> bool,
                >(find(library, c"ps_cuda_prepare_training")?),
                output: std::mem::transmute::<
                    *mut c_void,
                    unsafe extern "C" fn(*mut RawValues, u32, *mut *mut c_void, *mut RawError) -> bool,
                >(find(library, c"ps_cuda_output")?),
                clear_error: std::mem::transmute::<*mut c_void, unsafe extern "C" fn()>(find(
                    library,
                    c"ps_cuda_clear_error",
                )?),
            })
        }
    }

    /// Lets libtorch compute by `stream` on the calling thread, with memory from the arena during executions; `outside`
    /// is told about every other allocation (bytes) and release (negative).
    pub(crate) fn attach(
        &self,
        ordinal: u32,
        stream: &GpuStream,
        outside: extern "C" fn(i64),
    ) -> Result<(), WorkerError> {
        let memory = RawMemory { allocate: arena::allocate, release: arena::release, outside };
        // The driver's handle is a pointer of this process.
        let raw = ptr::with_exposed_provenance_mut(usize::try_from(stream.raw()).unwrap_or(0));
        let ordinal = c_int::try_from(ordinal).unwrap_or(c_int::MAX);
        // SAFETY: the stream outlives libtorch's use of it, which ends with the process; `memory` is copied, and its
        // functions may be called from any thread.
        checked(|error| unsafe { (self.attach)(ordinal, raw, &raw const memory, error) })
            .map_err(|raised| WorkerError::Libtorch { reason: raised.message })
    }

    /// Makes the handles and workspaces of the thread that computes backward passes.
    pub(crate) fn prepare_training(&self, ordinal: u32) -> Result<(), WorkerError> {
        let ordinal = c_int::try_from(ordinal).unwrap_or(c_int::MAX);
        // SAFETY: no preconditions but that libtorch is attached, which its owner sees to.
        checked(|error| unsafe { (self.prepare_training)(ordinal, error) })
            .map_err(|raised| WorkerError::Libtorch { reason: raised.message })
    }

    /// Makes entry `id` of a table dense and says where it lies on the GPU.
    ///
    /// # Safety
    /// The table is alive, and `id` inside of it.
    pub(crate) unsafe fn output(&self, values: *mut RawValues, id: u32) -> Result<DeviceAddress, Raised> {
        let mut data = ptr::null_mut();
        // SAFETY: the caller's promise; `data` is written during the call.
        checked(|error| unsafe { (self.output)(values, id, &raw mut data, error) })?;
        Ok(DeviceAddress(data.expose_provenance() as u64))
    }

    /// Forgets an error that a call left behind.
    pub(crate) fn clear_error(&self) {
        // SAFETY: no preconditions.
        unsafe { (self.clear_error)() }
    }
}

/// Opens a library for everybody in the process: libtorch's own libraries find each other that way.
fn open_library(name: &CStr) -> Result<*mut c_void, WorkerError> {
    // SAFETY: the name is a string; libtorch's initialisers are meant to be run by any program.
    let library = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
    if library.is_null() { Err(failure()) } else { Ok(library) }
}

/// # Safety
/// `library` is open.
unsafe fn find(library: *mut c_void, name: &CStr) -> Result<*mut c_void, WorkerError> {
    // SAFETY: the caller's promise; the name is a string.
    let function = unsafe { libc::dlsym(library, name.as_ptr()) };
    if function.is_null() { Err(failure()) } else { Ok(function) }
}

/// What the loader says about its last failure.
fn failure() -> WorkerError {
    // SAFETY: no preconditions; the text lives until the next call of the loader.
    let text: *mut c_char = unsafe { libc::dlerror() };
    let reason = if text.is_null() {
        "the loader gives no reason".to_owned()
    } else {
        // SAFETY: not null, so a string.
        unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
    };
    WorkerError::Libtorch { reason: format!("libtorch cannot be loaded: {reason}") }
}
