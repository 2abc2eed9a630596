//! Devices of pswitch: memory that processes share, streams of copies, and doorbells that announce them.
//!
//! A [`Device`] is a trait with two real backends. `cuda` is a GPU: its memory is shared by CUDA's IPC handles, copies
//! run on its copy engines, and a doorbell is written and waited for by its streams. `host` is the CPU: its memory is
//! shared memory, copies run on a thread for each [`CopyStream`] over a link that can be [throttled](LinkThrottle), and
//! doorbells are atomics with futex waits. Everything above this crate runs on both; the suite in `conformance` (feature
//! of that name) says what a backend must do.
//!
//! CUDA's driver is looked for when a GPU is asked for, so that one binary runs on machines with and without.
//!
//! A *doorbell* is a word of device memory that a copy stream writes behind the bytes that it announces, and on which
//! whoever executes waits, with no host in between:
//!
//! ```
//! use std::sync::Arc;
//! use std::time::{Duration, Instant};
//!
//! use pswitch_device::{
//!     DeviceId, DeviceSlice, ExecutionStream, HostSlice, LinkThrottle, SharedMemory, doorbell, open_device,
//! };
//!
//! # fn main() -> Result<(), pswitch_device::DeviceError> {
//! let device = open_device(DeviceId::Host(0), LinkThrottle::default())?;
//! // Weights wait in pinned host memory; the pool has room for them and for a doorbell.
//! let weights = device.pin(Arc::new(SharedMemory::create("weights", 4096)?))?;
//! weights.memory().write(0, &[42; 4096])?;
//! let pool = device.allocate(4096 + 4)?;
//! let group = DeviceSlice::new(pool.clone(), 0, 4096)?;
//! let word = DeviceSlice::new(pool.clone(), 4096, 4)?;
//!
//! // Both are enqueued at once ...
//! let mut stream = device.copy_stream("example")?;
//! stream.copy_in(&HostSlice::new(weights.clone(), 0, 4096)?, &group)?;
//! stream.write_word(&word, doorbell::RUNG)?;
//!
//! // ... and whoever executes, here or in another process, waits for the doorbell alone.
//! device.wait_doorbell(ExecutionStream::Host, &word, Instant::now() + Duration::from_secs(5))?;
//! # let back = device.pin(Arc::new(SharedMemory::create("back", 4096)?))?;
//! # stream.copy_out(&group, &HostSlice::new(back.clone(), 0, 4096)?)?;
//! # drop(stream);
//! # let mut bytes = [0; 4096];
//! # back.memory().read(0, &mut bytes)?;
//! # assert_eq!(bytes, [42; 4096]);
//! # Ok(())
//! # }
//! ```

mod clock;
#[cfg(feature = "conformance")]
pub mod conformance;
mod cuda;
mod device;
pub mod doorbell;
mod error;
mod futex;
mod host;
mod id;
mod memory;
mod shared_memory;
mod streaming;

pub use cuda::{GpuGraph, GpuMoment, GpuRehearsal, GpuStream, GpuWay, WayWords};
pub use device::{
    CopyStream, Device, DeviceProperties, Event, ExecutionStream, GpuProperties, LinkThrottle, cuda_devices,
    open_device,
};
pub use error::DeviceError;
pub use id::DeviceId;
pub use memory::{DeviceAddress, DeviceMemory, DeviceSlice, HostSlice, MemoryHandle, PinnedMemory};
pub use shared_memory::SharedMemory;

/// The README's example runs as a test.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
