//! Devices of pswitch: memory, streams, copies and doorbells.

mod device;
pub mod doorbell;
mod error;
mod futex;
mod host;
mod id;
mod memory;
mod shared_memory;

pub use device::{CopyStream, Device, DeviceProperties, Event, ExecutionStream, LinkThrottle, open_device};
pub use error::DeviceError;
pub use id::DeviceId;
pub use memory::{DeviceAddress, DeviceMemory, DeviceSlice, HostSlice, MemoryHandle, PinnedMemory};
pub use shared_memory::SharedMemory;
