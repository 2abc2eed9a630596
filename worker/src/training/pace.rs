//! What is asked between the operators of a step: whether to go on.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use pswitch_protocol::{control, monotonic_ns};

/// Somebody who stands still looks at the stop word after this long, and then ever less often ...
const FIRST_LOOK: Duration = Duration::from_micros(20);
/// ... down to this. A GPU goes on by itself meanwhile.
const LAST_LOOK: Duration = Duration::from_millis(1);

/// Watches over the operators of a step, those of the backward pass too, which autograd may launch from threads of its own.
///
/// All of them may hold the caller up for as long as the step is to stand still.
pub trait Pace: Sync {
    /// A step begins. `is_whole`: its batches have as many rows as those of most steps.
    fn begin(&self, _is_whole: bool) {}

    /// Ahead of every operator, one at a time: whether the step is to end here.
    fn stops(&self) -> bool;

    /// Where it cannot end.
    fn rests(&self);

    /// Ahead of something that moves data and computes nothing, and behind it.
    fn arrives(&self) {}
    /// See [`arrives`](Self::arrives).
    fn departs(&self) {}

    /// Returns when all that was launched is computed, or with true if the step is to end instead.
    fn finishes(&self) -> bool {
        self.stops()
    }
}

/// Does something that moves data and computes nothing in front of a gate, if there is one.
pub(super) fn at_a_gate<T>(pace: &dyn Pace, something: impl FnOnce() -> T) -> T {
    pace.arrives();
    let done = something();
    pace.departs();
    done
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

/// Returns when the word says no more to stand still, and how long it did. `held` is called with each that does.
pub(super) fn stand_still(stop: &AtomicU32, mut held: impl FnMut(u32)) -> Duration {
    let begun = Instant::now();
    let mut stood = Duration::ZERO;
    loop {
        let told = stop.load(Ordering::Relaxed);
        if !control::is_hold(told) {
            return stood;
        }
        held(told);
        let mut pause = FIRST_LOOK;
        while stop.load(Ordering::Relaxed) == told {
            std::thread::sleep(pause);
            pause = (pause * 2).min(LAST_LOOK);
        }
        stood = begun.elapsed();
    }
}

/// The same, which says when it stands still or ends, and for how long it stood.
pub(super) struct HostPace<'a> {
    stop: &'a AtomicU32,
    listener: &'a Listener<'a>,
    stood: &'a Stood,
    /// Whether a step has ended before it was whole.
    has_left: AtomicBool,
}

/// Who is told what becomes of a step, with the moment in nanoseconds of `CLOCK_MONOTONIC`, by whatever thread computes.
pub(super) struct Listener<'a> {
    /// It stands still: nothing computes any more.
    pub(super) held: &'a (dyn Fn(u64) + Sync),
    /// It ends before it is whole: nothing computes any more, nor does before the next.
    pub(super) left: &'a (dyn Fn(u64) + Sync),
}

/// For how long steps stood still.
#[derive(Debug, Default)]
pub(super) struct Stood(AtomicU64);

impl Stood {
    pub(super) fn add(&self, time: Duration) {
        self.0.fetch_add(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// Since the last time that it was asked.
    pub(super) fn take(&self) -> Duration {
        Duration::from_nanos(self.0.swap(0, Ordering::Relaxed))
    }
}

impl<'a> HostPace<'a> {
    pub(super) fn new(stop: &'a AtomicU32, listener: &'a Listener<'a>, stood: &'a Stood) -> Self {
        Self { stop, listener, stood, has_left: AtomicBool::new(false) }
    }
}

impl Pace for HostPace<'_> {
    fn stops(&self) -> bool {
        if self.has_left.load(Ordering::Relaxed) {
            return true;
        }
        self.rests();
        let ends = self.stop.load(Ordering::Relaxed) == control::END;
        if ends {
            self.has_left.store(true, Ordering::Relaxed);
            (self.listener.left)(monotonic_ns());
        }
        ends
    }

    fn rests(&self) {
        self.stood.add(stand_still(self.stop, |_| (self.listener.held)(monotonic_ns())));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_time_that_a_step_stands_still_is_told_and_counted() {
        let (stop, told, stood) = (AtomicU32::new(control::HOLD | 1), AtomicU32::new(0), Stood::default());
        let held = |_| {
            // Other requests have come before the first look.
            let next =
                if told.fetch_add(1, Ordering::Relaxed) == 0 { control::HOLD | 2 } else { control::GO_ON };
            stop.store(next, Ordering::Relaxed);
        };
        let left = AtomicU32::new(0);
        let count = |_| {
            left.fetch_add(1, Ordering::Relaxed);
        };
        let listener = Listener { held: &held, left: &count };
        let pace = HostPace::new(&stop, &listener, &stood);
        assert!(!pace.stops());
        assert_eq!(told.load(Ordering::Relaxed), 2);
        assert!(stood.take() > Duration::ZERO);
        stop.store(control::END, Ordering::Relaxed);
        assert!(pace.stops());
        // What a backward pass goes through when it runs empty.
        assert!(pace.stops());
        assert_eq!(left.load(Ordering::Relaxed), 1);
        assert_eq!((told.load(Ordering::Relaxed), stood.take()), (2, Duration::ZERO));
    }
}
