//! Sleeping until a moment, to some tens of microseconds.

use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, ClockNanosleepFlags, clock_gettime, clock_nanosleep};

/// Lets timers of the calling thread fire when they are due, not up to 50 us later to save wake-ups.
pub(crate) fn make_timers_exact() {
    if let Err(error) = nix::sys::prctl::set_timerslack(1) {
        tracing::debug!(%error, "the timer slack could not be lowered: throttled copies end a little late");
    }
}

/// Sleeps until `moment`; returns at once if it has passed.
pub(crate) fn sleep_until(moment: Instant) {
    loop {
        let left = moment.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return;
        }
        // An absolute time on the clock of `Instant`, so that a signal in between does not lengthen the sleep.
        let slept = clock_gettime(ClockId::CLOCK_MONOTONIC).and_then(|now| {
            let until = TimeSpec::from_duration(Duration::from(now) + left);
            clock_nanosleep(ClockId::CLOCK_MONOTONIC, ClockNanosleepFlags::TIMER_ABSTIME, &until)
        });
        match slept {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(_) => std::thread::sleep(left),
        }
    }
}
