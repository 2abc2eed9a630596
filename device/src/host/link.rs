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
