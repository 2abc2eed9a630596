//! Times in buckets.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::nanoseconds;

/// Upper ends of the buckets in microseconds: a warm small model and a cold large one both fall inside.
const BOUNDS_US: [u64; 18] = [
    50, 100, 250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000, 1_000_000,
    2_500_000, 5_000_000, 10_000_000, 60_000_000,
];

/// Counts of times by bucket and their sum.
#[derive(Debug, Default)]
pub(super) struct Histogram {
    /// One count a bucket, the last one for what is longer than every bound.
    counts: [AtomicU64; BOUNDS_US.len() + 1],
    sum_ns: AtomicU64,
}

impl Histogram {
    pub(super) fn observe(&self, time: Duration) {
        let time_ns = nanoseconds(time);
        let bucket = BOUNDS_US.partition_point(|bound_us| bound_us * 1000 < time_ns);
        self.counts[bucket].fetch_add(1, Ordering::Relaxed);
        self.sum_ns.fetch_add(time_ns, Ordering::Relaxed);
    }

    pub(super) fn sum_ns(&self) -> u64 {
        self.sum_ns.load(Ordering::Relaxed)
    }

    /// Bounds in seconds and how many times were not longer; the last bound is infinite.
    pub(super) fn cumulative(&self) -> Vec<(f64, u64)> {
        let bounds = BOUNDS_US.iter().map(|bound_us| Duration::from_micros(*bound_us).as_secs_f64());
        let mut below = 0;
        bounds
            .chain([f64::INFINITY])
            .zip(&self.counts)
            .map(|(bound, count)| {
                below += count.load(Ordering::Relaxed);
                (bound, below)
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bound_belongs_to_its_bucket() {
        let histogram = Histogram::default();
        histogram.observe(Duration::from_micros(50));
        histogram.observe(Duration::from_nanos(50_001));
        histogram.observe(Duration::from_secs(100));
        let cumulative = histogram.cumulative();
        assert_eq!(cumulative[0], (0.000_05, 1));
        assert_eq!(cumulative[1], (0.0001, 2));
        assert_eq!(cumulative.last(), Some(&(f64::INFINITY, 3)));
        assert_eq!(histogram.sum_ns(), 50_000 + 50_001 + 100_000_000_000);
    }
}
