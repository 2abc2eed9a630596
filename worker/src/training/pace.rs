//! What is asked between the operators of a step: whether to go on.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use pswitch_protocol::{control, monotonic_ns};

/// Somebody who stands still looks at the stop word after this long, and then ever less often ...
const FIRST_LOOK: Duration = Duration::from_micros(20);
/// ... down to this. A GPU goes on by itself meanwhile.
const LAST_LOOK: Duration = Duration::from_millis(1);

/// Watches over the operators of a step, those of the backward pass too, which autograd may launch from threads of its own.
///
/// All of them may hold the caller up for as long as the step is to stand still.
pub trait Pace: Sync {
    /// A step begins.
    fn begin(&self) {}

    /// Ahead of every operator, one at a time: whether the step is to end here.
    fn stops(&self) -> bool;

    /// Where it cannot end.
    fn rests(&self);

    /// Returns when all that was launched is computed, or with true if the step is to end instead.
    fn finishes(&self) -> bool {
        self.stops()
    }
}

/// A stop word of the [control page](control) and nothing else: for the host, where an operator is over when its call returns.
impl Pace for AtomicU32 {
    fn stops(&self) -> bool {
        self.rests();
        self.load(Ordering::Relaxed) == control::END
    }

    fn rests(&self) {
        stand_still(self, |_| ());
    }
}

/// Returns when the word says no more to stand still. `held` is called with each that does.
pub(super) fn stand_still(stop: &AtomicU32, mut held: impl FnMut(u32)) {
    loop {
        let told = stop.load(Ordering::Relaxed);
        if !control::is_hold(told) {
            return;
        }
        held(told);
        let mut pause = FIRST_LOOK;
        while stop.load(Ordering::Relaxed) == told {
            std::thread::sleep(pause);
            pause = (pause * 2).min(LAST_LOOK);
        }
    }
}

/// The same, which says when it stands still.
pub(super) struct HostPace<'a> {
    pub(super) stop: &'a AtomicU32,
    pub(super) held: &'a Held<'a>,
}

/// Told when nothing computes any more, in nanoseconds of `CLOCK_MONOTONIC`.
pub(super) type Held<'a> = dyn Fn(u64) + Sync + 'a;

impl Pace for HostPace<'_> {
    fn stops(&self) -> bool {
        self.rests();
        self.stop.stops()
    }

    fn rests(&self) {
        stand_still(self.stop, |_| (self.held)(monotonic_ns()));
    }
}
