//! The CUDA backend on a real GPU: the conformance suite, and what only CUDA has.
//!
//! Behind the feature `cuda-tests`, since it fails where there is no GPU.

mod device;
mod execution;
mod peers;

use pswitch_device::conformance::Fixture;
use pswitch_device::{DeviceId, LinkThrottle, open_device};

use execution::Execution;

fn cuda() -> Fixture {
    let execution = Execution::start();
    let device = open_device(DeviceId::Cuda(0), LinkThrottle::default()).unwrap();
    let stream = execution.stream();
    Fixture { device, execution: stream, synchronize: Box::new(move || execution.synchronize()) }
}

pswitch_device::conformance_suite!(cuda);
