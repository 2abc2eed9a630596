use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::{DeviceError, LinkThrottle};

/// Slower than any link; keeps times far from where they overflow.
const LEAST_BANDWIDTH_BYTES_PER_S: u64 = 1;
/// Longer than any copy.
const MOST_PER_COPY: Duration = Duration::from_secs(3600);
/// No copy is made to last longer than this.
const LONGEST_COPY: Duration = Duration::from_secs(365 * 24 * 3600);
/// How far back a copy may be said to have begun. A real link begins the next queued copy by itself; the thread that
/// plays its part wakes up a little late, which must not add up over the copies of a transfer.
const LATE_START: Duration = Duration::from_millis(1);
/// A throttled copy arrives in pieces of about this length in time ...
const PIECE: Duration = Duration::from_micros(250);
/// ... but not in smaller ones than this.
const LEAST_PIECE_BYTES: u64 = 4096;

/// One direction of a device's link: does one copy at a time, for all streams.
#[derive(Debug)]
pub(super) struct Link {
    throttle: LinkThrottle,
    free_at: Mutex<Option<Instant>>,
}

/// The link for the time of one copy.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Reservation {
    /// When the first byte moves: the cost of the copy itself has passed.
    pub(super) moves_at: Instant,
    /// When the last byte has arrived and the link is free.
    pub(super) ends_at: Instant,
    /// Bytes to move at once.
    pub(super) piece_bytes: u64,
}

impl Link {
    pub(super) fn new(throttle: LinkThrottle) -> Result<Self, DeviceError> {
        let slowest = LEAST_BANDWIDTH_BYTES_PER_S as f64;
        let bandwidth = throttle.bandwidth_bytes_per_s.unwrap_or(slowest);
        if !(bandwidth.is_finite() && bandwidth >= slowest && throttle.per_copy <= MOST_PER_COPY) {
            return Err(DeviceError::InvalidThrottle {
                least: LEAST_BANDWIDTH_BYTES_PER_S,
                most: MOST_PER_COPY,
            });
        }
        Ok(Self { throttle, free_at: Mutex::new(None) })
    }

    /// Takes the link for the next copy, which could have begun at `ready`; `None` if copies cost nothing here.
    ///
    /// The copy begins when it is ready and the link is free.
    pub(super) fn reserve(&self, ready: Instant, now: Instant, bytes: u64) -> Option<Reservation> {
        if self.throttle == LinkThrottle::default() {
            return None;
        }
        let rate = self.throttle.bandwidth_bytes_per_s;
        let moving = rate.map_or(Duration::ZERO, |rate| time_for(bytes, rate));
        let mut free_at = self.free_at.lock().unwrap_or_else(PoisonError::into_inner);
        let ready = now.checked_sub(LATE_START).map_or(ready, |earliest| ready.max(earliest));
        let begins_at = free_at.map_or(ready, |free_at| free_at.max(ready));
        let moves_at = begins_at + self.throttle.per_copy;
        let ends_at = moves_at + moving;
        *free_at = Some(ends_at);
        Some(Reservation { moves_at, ends_at, piece_bytes: rate.map_or(u64::MAX, piece_bytes) })
    }
}

impl Reservation {
    /// When the first `done` of `bytes` have arrived.
    pub(super) fn arrival(&self, done: u64, bytes: u64) -> Instant {
        if done >= bytes {
            return self.ends_at;
        }
        let share = done as f64 / bytes as f64;
        self.moves_at + self.ends_at.saturating_duration_since(self.moves_at).mul_f64(share)
    }
}

fn time_for(bytes: u64, bytes_per_s: f64) -> Duration {
    Duration::try_from_secs_f64(bytes as f64 / bytes_per_s).unwrap_or(LONGEST_COPY).min(LONGEST_COPY)
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a float cast saturates, and the rate is positive"
)]
fn piece_bytes(bytes_per_s: f64) -> u64 {
    ((bytes_per_s * PIECE.as_secs_f64()) as u64).max(LEAST_PIECE_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn link(bytes_per_ms: f64, per_copy: Duration) -> Link {
        Link::new(LinkThrottle { bandwidth_bytes_per_s: Some(bytes_per_ms * 1000.0), per_copy }).unwrap()
    }

    #[test]
    fn a_copy_ends_after_its_own_cost_and_its_bytes() {
        let (link, now) = (link(1000.0, MS), Instant::now());
        let copy = link.reserve(now, now, 4000).unwrap();
        assert_eq!(copy.moves_at, now + MS);
        assert_eq!(copy.ends_at, now + 5 * MS);
        assert_eq!(copy.arrival(1000, 4000), now + 2 * MS);
        assert_eq!(copy.arrival(4000, 4000), now + 5 * MS);
    }

    #[test]
    fn copies_of_all_streams_follow_one_another() {
        let (link, now) = (link(1000.0, Duration::ZERO), Instant::now());
        let first = link.reserve(now, now, 3000).unwrap();
        let of_another_stream = link.reserve(now, now, 2000).unwrap();
        assert_eq!(of_another_stream.moves_at, first.ends_at);
        assert_eq!(of_another_stream.ends_at, now + 5 * MS);
    }

    #[test]
    fn a_late_wake_up_does_not_add_up() {
        let (link, now) = (link(1000.0, Duration::ZERO), Instant::now());
        let mut ready = now;
        for copy in 1..=100 {
            let late = ready + Duration::from_micros(70);
            ready = link.reserve(ready, late, 1000).unwrap().ends_at;
            assert_eq!(ready, now + copy * MS);
        }
    }

    #[test]
    fn time_that_nobody_used_is_lost() {
        let (link, now) = (link(1000.0, Duration::ZERO), Instant::now());
        // Ready long ago, but the thread was busy with something else than this link.
        let copy = link.reserve(now, now + 100 * MS, 1000).unwrap();
        assert_eq!(copy.ends_at, now + 100 * MS - LATE_START + MS);
    }

    #[test]
    fn an_idle_link_waits_for_the_copy() {
        let (link, now) = (link(1000.0, Duration::ZERO), Instant::now());
        link.reserve(now, now, 1000).unwrap();
        let copy = link.reserve(now + 10 * MS, now + 10 * MS, 1000).unwrap();
        assert_eq!(copy.moves_at, now + 10 * MS);
    }

    #[test]
    fn without_a_throttle_copies_cost_nothing() {
        let link = Link::new(LinkThrottle::default()).unwrap();
        assert_eq!(link.reserve(Instant::now(), Instant::now(), u64::MAX), None);
    }

    #[test]
    fn the_cost_of_a_copy_alone_is_a_throttle_too() {
        let link = Link::new(LinkThrottle { bandwidth_bytes_per_s: None, per_copy: MS }).unwrap();
        let now = Instant::now();
        let copy = link.reserve(now, now, 1 << 40).unwrap();
        assert_eq!((copy.ends_at, copy.piece_bytes), (now + MS, u64::MAX));
    }

    #[test]
    fn the_slowest_link_does_not_overflow() {
        let link = link(0.001, MOST_PER_COPY);
        let now = Instant::now();
        for _ in 0..3 {
            link.reserve(now, now, u64::MAX).unwrap();
        }
    }

    #[test]
    fn a_throttle_that_describes_no_link_is_refused() {
        for bandwidth in [0.0, 0.5, -1.0, f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            let throttle = LinkThrottle { bandwidth_bytes_per_s: Some(bandwidth), per_copy: MS };
            assert!(matches!(Link::new(throttle), Err(DeviceError::InvalidThrottle { .. })), "{bandwidth}");
        }
        let throttle = LinkThrottle { bandwidth_bytes_per_s: None, per_copy: Duration::MAX };
        assert!(matches!(Link::new(throttle), Err(DeviceError::InvalidThrottle { .. })));
    }
}
