//! The seam to CUDA's driver: found and initialised once in a process, its errors made ours.

use std::ffi::CStr;
use std::ptr;
use std::sync::OnceLock;

pub(super) use cudarc::driver::sys;

use crate::DeviceError;

/// Every function of the driver that this backend calls. cudarc looks them up at their first call and panics if one is
/// missing, so they are looked for beforehand.
const CALLED: &[&str] = &[
    "cuCtxGetCurrent",
    "cuCtxGetStreamPriorityRange",
    "cuCtxPopCurrent_v2",
    "cuCtxPushCurrent_v2",
    "cuDeviceGet",
    "cuDeviceGetAttribute",
    "cuDeviceGetCount",
    "cuDeviceGetName",
    "cuDeviceGetPCIBusId",
    "cuDeviceGetUuid_v2",
    "cuDevicePrimaryCtxRelease_v2",
    "cuDevicePrimaryCtxRetain",
    "cuDeviceTotalMem_v2",
    "cuDriverGetVersion",
    "cuEventCreate",
    "cuEventDestroy_v2",
    "cuEventElapsedTime_v2",
    "cuEventQuery",
    "cuEventRecord",
    "cuEventRecordWithFlags",
    "cuGetErrorName",
    "cuGetErrorString",
    "cuGraphDestroy",
    "cuGraphExecDestroy",
    "cuGraphInstantiateWithFlags",
    "cuGraphLaunch",
    "cuGraphUpload",
    "cuInit",
    "cuIpcCloseMemHandle",
    "cuIpcGetMemHandle",
    "cuIpcOpenMemHandle_v2",
    "cuLaunchKernel",
    "cuMemAllocManaged",
    "cuMemAlloc_v2",
    "cuMemFreeHost",
    "cuMemFree_v2",
    "cuMemGetAddressRange_v2",
    "cuMemGetInfo_v2",
    "cuMemHostAlloc",
    "cuMemHostGetDevicePointer_v2",
    "cuMemHostRegister_v2",
    "cuMemHostUnregister",
    "cuMemPrefetchAsync_v2",
    "cuMemcpyDtoDAsync_v2",
    "cuMemcpyDtoHAsync_v2",
    "cuMemcpyHtoDAsync_v2",
    "cuMemsetD8Async",
    "cuModuleGetFunction",
    "cuModuleLoadData",
    "cuModuleUnload",
    "cuStreamBatchMemOp_v2",
    "cuStreamBeginCapture_v2",
    "cuStreamCreateWithPriority",
    "cuStreamDestroy_v2",
    "cuStreamEndCapture",
    "cuStreamQuery",
    "cuStreamSynchronize",
    "cuStreamWaitEvent",
    "cuStreamWaitValue32_v2",
    "cuStreamWriteValue32_v2",
];

/// Makes the driver ready for calls, or says why there is none. Nothing else here may be called before.
pub(super) fn initialise() -> Result<(), String> {
    static INITIALISED: OnceLock<Result<(), String>> = OnceLock::new();
    INITIALISED.get_or_init(load).clone()
}

fn load() -> Result<(), String> {
    // SAFETY: loads and unloads the driver's library, whose constructors NVIDIA means to be run by any program.
    if !unsafe { sys::is_culib_present() } {
        return Err("CUDA's driver library libcuda.so.1 was not found".to_owned());
    }
    // SAFETY: as above; it is present, so this does not panic.
    let library = unsafe { sys::culib() };
    for name in CALLED {
        // SAFETY: the symbol is looked up and not called; all symbols of CALLED are functions.
        if let Err(error) = unsafe { library.get::<unsafe extern "C" fn()>(name.as_bytes()) } {
            return Err(format!("CUDA's driver is too old, update it: it lacks {name} ({error})"));
        }
    }
    // SAFETY: the first call, as the driver demands, with the only flags that there are.
    match check("cuInit", unsafe { sys::cuInit(0) }) {
        Ok(()) => Ok(()),
        Err(error) => Err(error.to_string()),
    }
}

/// What came of a call, given by the name that CUDA's documentation uses.
pub(super) fn check(call: &'static str, result: sys::CUresult) -> Result<(), DeviceError> {
    match result {
        sys::CUresult::CUDA_SUCCESS => Ok(()),
        error => {
            let (mut name, mut text) = (ptr::null(), ptr::null());
            // SAFETY: both give out pointers to static strings, or null for numbers that the driver does not know.
            let (name, text) = unsafe {
                let _ = sys::cuGetErrorName(error, &raw mut name);
                let _ = sys::cuGetErrorString(error, &raw mut text);
                (owned(name), owned(text))
            };
            Err(DeviceError::Cuda {
                call,
                code: error as u32,
                name: name.unwrap_or_else(|| format!("{error:?}")),
                text: text.unwrap_or_else(|| "an error that the driver has no text for".to_owned()),
            })
        }
    }
}

/// # Safety
/// `text` is null or a string that lives during the call.
unsafe fn owned(text: *const std::ffi::c_char) -> Option<String> {
    if text.is_null() {
        return None;
    }
    // SAFETY: not null, so a string, by the caller's promise.
    Some(unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned())
}

/// A number that CUDA gives as signed and that is never negative.
pub(super) fn unsigned(number: i32) -> u32 {
    u32::try_from(number).unwrap_or(0)
}

/// Bytes of this address space, as CUDA takes them.
pub(super) fn size(bytes: u64) -> usize {
    usize::try_from(bytes).expect("CUDA runs on 64-bit machines only")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::CALLED;

    #[test]
    fn all_that_is_called_was_looked_for() {
        let sources = [
            include_str!("context.rs"),
            include_str!("driver.rs"),
            include_str!("event.rs"),
            include_str!("execution.rs"),
            include_str!("looker.rs"),
            include_str!("memory.rs"),
            include_str!("mod.rs"),
            include_str!("pin.rs"),
            include_str!("properties.rs"),
            include_str!("rehearsal.rs"),
            include_str!("stream.rs"),
        ];
        let mut called = BTreeSet::new();
        for source in sources {
            for (at, prefix) in source.match_indices("sys::cu") {
                let rest = &source[at + prefix.len() - 2..];
                let length = rest.find(|c: char| c != '_' && !c.is_alphanumeric()).unwrap_or(rest.len());
                let (name, rest) = rest.split_at(length);
                if rest.starts_with('(') && name != "culib" {
                    called.insert(name);
                }
            }
        }
        assert_eq!(called, CALLED.iter().copied().collect());
    }
}
