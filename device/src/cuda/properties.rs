//! What a GPU is.

use std::ffi::CStr;
use std::fs;

use super::driver::{check, initialise, sys, unsigned};
use crate::{DeviceError, DeviceId, DeviceProperties, GpuProperties};

/// Copies of fewer bytes may wait for another process. Of one of up to 16 KiB the driver makes work for the compute engine, which
/// has one process at a time: beside another it took 190 us when that paused between two graphs and 1.1 ms when it did not,
/// where a copy of 96 KiB takes 13 us (H200, driver 580). Between 16 and 64 KiB it depends.
const LEAST_COPY_BYTES: u64 = 96 << 10;

/// A copy within the memory is work for the compute engine as well, which takes 0.2 ms to come from another process (H200, driver
/// 580). By then the link has moved 11 MB; with the waits of both its directions for each other, some 50 MB are as fast by either.
const LEAST_COPY_WITHIN_BYTES: u64 = 64 << 20;

/// What this backend goes by.
#[derive(Debug, Clone, Copy)]
pub(super) struct Gpu {
    pub(super) id: DeviceId,
    pub(super) device: sys::CUdevice,
    pub(super) uuid: [u8; 16],
    pub(super) total_memory_bytes: u64,
}

/// How many GPUs there are, once the driver is ready.
pub(super) fn count(asked: DeviceId) -> Result<u32, DeviceError> {
    let unavailable = |reason| DeviceError::Unavailable { device: asked, reason };
    initialise().map_err(unavailable)?;
    let mut count = 0;
    // SAFETY: `count` is written during the call; the driver is initialised.
    check("cuDeviceGetCount", unsafe { sys::cuDeviceGetCount(&raw mut count) })?;
    match unsigned(count) {
        0 => Err(unavailable("CUDA's driver finds no GPU".to_owned())),
        count => Ok(count),
    }
}

impl Gpu {
    /// Makes no context.
    pub(super) fn find(ordinal: u32) -> Result<Self, DeviceError> {
        let id = DeviceId::Cuda(ordinal);
        let count = count(id)?;
        if ordinal >= count {
            let reason = format!("CUDA's driver finds {count} in all, counted from 0");
            return Err(DeviceError::Unavailable { device: id, reason });
        }
        let mut device = 0;
        // SAFETY: `device` is written during the call.
        check("cuDeviceGet", unsafe { sys::cuDeviceGet(&raw mut device, ordinal.cast_signed()) })?;
        let mut uuid = sys::CUuuid { bytes: [0; 16] };
        // SAFETY: `uuid` is written during the call; the device comes from the driver.
        check("cuDeviceGetUuid", unsafe { sys::cuDeviceGetUuid_v2(&raw mut uuid, device) })?;
        let mut bytes = 0;
        // SAFETY: as above.
        check("cuDeviceTotalMem", unsafe { sys::cuDeviceTotalMem_v2(&raw mut bytes, device) })?;
        let uuid = uuid.bytes.map(|byte| byte.to_ne_bytes()[0]);
        Ok(Self { id, device, uuid, total_memory_bytes: bytes as u64 })
    }

    /// All that is worth telling.
    pub(super) fn properties(&self) -> Result<DeviceProperties, DeviceError> {
        use sys::CUdevice_attribute as A;
        let name = text(|buffer, length| {
            // SAFETY: the buffer has that length; the device comes from the driver.
            check("cuDeviceGetName", unsafe { sys::cuDeviceGetName(buffer, length, self.device) })
        })?;
        let pci_address = text(|buffer, length| {
            // SAFETY: as above.
            check("cuDeviceGetPCIBusId", unsafe { sys::cuDeviceGetPCIBusId(buffer, length, self.device) })
        })?
        .to_lowercase();
        let mut version = 0;
        // SAFETY: `version` is written during the call.
        check("cuDriverGetVersion", unsafe { sys::cuDriverGetVersion(&raw mut version) })?;
        let version = unsigned(version);
        let gpu = GpuProperties {
            uuid: uuid_text(&self.uuid),
            compute_capability: (
                self.attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
                self.attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
            ),
            multiprocessors: self.attribute(A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
            pci_link: pci_link(&pci_address),
            pci_address,
            driver_version: line("/sys/module/nvidia/version"),
            cuda_version: (version / 1000, version % 1000 / 10),
        };
        let total_memory_bytes = self.total_memory_bytes;
        Ok(DeviceProperties {
            id: self.id,
            name,
            total_memory_bytes,
            least_copy_bytes: LEAST_COPY_BYTES,
            least_copy_within_bytes: LEAST_COPY_WITHIN_BYTES,
            gpu: Some(gpu),
        })
    }

    fn attribute(&self, attribute: sys::CUdevice_attribute) -> Result<u32, DeviceError> {
        let mut value = 0;
        // SAFETY: `value` is written during the call; the device comes from the driver.
        let found = unsafe { sys::cuDeviceGetAttribute(&raw mut value, attribute, self.device) };
        check("cuDeviceGetAttribute", found)?;
        Ok(unsigned(value))
    }
}

/// Lets the driver write a text that ends with a zero.
fn text(
    write: impl FnOnce(*mut std::ffi::c_char, std::ffi::c_int) -> Result<(), DeviceError>,
) -> Result<String, DeviceError> {
    let mut buffer = [0_u8; 256];
    // One less: it ends with a zero whatever is written.
    write(buffer.as_mut_ptr().cast(), 255)?;
    Ok(CStr::from_bytes_until_nul(&buffer).unwrap_or_default().to_string_lossy().into_owned())
}

fn uuid_text(uuid: &[u8; 16]) -> String {
    let mut text = "GPU".to_owned();
    for (at, byte) in uuid.iter().enumerate() {
        if matches!(at, 0 | 4 | 6 | 8 | 10) {
            text.push('-');
        }
        text.push_str(&format!("{byte:02x}"));
    }
    text
}

fn pci_link(address: &str) -> Option<String> {
    let of_device = |file| line(&format!("/sys/bus/pci/devices/{address}/{file}"));
    Some(format!("{} x{}", of_device("current_link_speed")?, of_device("current_link_width")?))
}

fn line(path: &str) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    Some(text.trim().to_owned()).filter(|line| !line.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uuid_reads_as_nvidia_smi_writes_it() {
        let uuid: [u8; 16] = std::array::from_fn(|at| u8::try_from(at * 17).unwrap());
        assert_eq!(uuid_text(&uuid), "GPU-00112233-4455-6677-8899-aabbccddeeff");
    }
}
