//! Devices that a machine may or may not have are opened, or refused with a reason; nothing panics without a driver.

use pswitch_device::{DeviceError, DeviceId, LinkThrottle, MemoryHandle, cuda_devices, open_device};

#[test]
fn a_gpu_that_is_not_there_is_unavailable() {
    for ordinal in [1_000, u32::MAX] {
        let id = DeviceId::Cuda(ordinal);
        match open_device(id, LinkThrottle::default()).unwrap_err() {
            DeviceError::Unavailable { device, reason } => {
                assert_eq!(device, id);
                assert!(reason.contains("CUDA"), "{reason}");
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn what_is_listed_can_be_opened_and_what_is_not_says_why() {
    match cuda_devices() {
        Ok(devices) => {
            assert!(!devices.is_empty());
            for (ordinal, properties) in (0..).zip(devices) {
                assert_eq!(properties.id, DeviceId::Cuda(ordinal));
                let device = open_device(properties.id, LinkThrottle::default()).unwrap();
                assert_eq!(*device.properties(), properties);
            }
        }
        Err(error) => {
            assert!(matches!(error, DeviceError::Unavailable { .. }), "{error:?}");
            assert_eq!(open_device(DeviceId::Cuda(0), LinkThrottle::default()).unwrap_err(), error);
        }
    }
}

#[test]
fn a_handle_of_a_gpu_survives_a_message_and_is_refused_by_the_host() {
    let handle = MemoryHandle::CudaIpc { handle: std::array::from_fn(byte), bytes: 1 << 40, gpu: [7; 16] };
    let (description, descriptors) = handle.into_parts();
    assert!(descriptors.is_empty());
    for length in 0..description.len() {
        let error = MemoryHandle::from_parts(&description[..length], Vec::new()).unwrap_err();
        assert!(matches!(error, DeviceError::MalformedHandle { .. }), "{error:?}");
    }
    let null = std::fs::File::open("/dev/null").unwrap().into();
    let error = MemoryHandle::from_parts(&description, vec![null]).unwrap_err();
    assert!(matches!(error, DeviceError::MalformedHandle { .. }), "{error:?}");

    let handle = MemoryHandle::from_parts(&description, Vec::new()).unwrap();
    let MemoryHandle::CudaIpc { handle: raw, bytes, gpu } = &handle else { panic!("{handle:?}") };
    assert_eq!((*raw, *bytes, *gpu), (std::array::from_fn(byte), 1 << 40, [7; 16]));
    let host = open_device(DeviceId::Host(0), LinkThrottle::default()).unwrap();
    let error = host.open(handle).unwrap_err();
    assert_eq!(error.to_string(), "device host cannot open memory by a CUDA IPC handle");
}

fn byte(at: usize) -> u8 {
    u8::try_from(at * 3 + 1).unwrap()
}
