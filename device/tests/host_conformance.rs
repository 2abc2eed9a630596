//! The host backend passes the conformance suite, with a free link and with a throttled one.

use std::time::Duration;

use pswitch_device::conformance::Fixture;
use pswitch_device::{DeviceId, ExecutionStream, LinkThrottle, open_device};

fn fixture_with(throttle: LinkThrottle) -> Fixture {
    Fixture {
        device: open_device(DeviceId::Host(0), throttle).unwrap(),
        execution: ExecutionStream::Host,
        synchronize: Box::new(|| ()),
    }
}

fn host() -> Fixture {
    fixture_with(LinkThrottle::default())
}

pswitch_device::conformance_suite!(host);

mod throttled {
    use super::*;

    fn throttled_host() -> Fixture {
        let per_copy = Duration::from_micros(5);
        fixture_with(LinkThrottle { bandwidth_bytes_per_s: Some(2e9), per_copy })
    }

    pswitch_device::conformance_suite!(throttled_host);
}
