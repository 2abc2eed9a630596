//! What a link costs: copies of many sizes are timed with their doorbells, as a transfer moves them, and the costs that
//! explain these times best are found.

use std::sync::Arc;
use std::time::{Duration, Instant};

use pswitch_device::{Device, DeviceError, DeviceSlice, HostSlice, LinkThrottle, PinnedMemory, doorbell};

/// What a device's link costs, and how well that explains the times that were measured.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LinkFit {
    /// Bytes that a copy moves in a second.
    pub bandwidth_bytes_per_s: f64,
    /// What a copy with its doorbell costs beside its bytes.
    pub per_copy_us: f64,
    /// What a transfer takes before its first copy begins, in microseconds. It is no part of a plan: to start an
    /// execution takes time as well, and meanwhile it passes.
    pub per_transfer_us: f64,
    /// Transfers that were timed, each of other sizes.
    pub samples: usize,
    /// How far the fitted times are from those measured, in percent of these: the root of the mean square.
    pub rms_percent: f64,
    /// The same: the largest.
    pub largest_percent: f64,
}

/// A transfer that was timed.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Sample {
    copies: u64,
    /// Of all copies.
    bytes: u64,
    us: f64,
}

/// Copies of a transfer, and their sizes in turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Copies {
    count: u64,
    bytes: [u64; 2],
}

/// Bytes of a copy, from the smallest layers to the largest groups; none is shorter than the device's copies are.
const SIZES_BYTES: [u64; 5] = [4 << 10, 64 << 10, 1 << 20, 16 << 20, 64 << 20];

/// Copies of a transfer.
const COUNTS: [u64; 4] = [1, 4, 16, 64];

/// What layers are like: convolutions, and the few numbers of what normalises them.
const MIXED: [Copies; 2] =
    [Copies { count: 16, bytes: [4 << 10, 1 << 20] }, Copies { count: 64, bytes: [4 << 10, 1 << 20] }];

/// Times that each transfer is made; the second best counts: what slows a link down now and then does not, nor does one
/// that was luckier than those to come.
const TRIES: usize = 5;

/// When so much has passed, no further transfers are timed.
const BUDGET: Duration = Duration::from_millis(60);

/// A throttled link that is found to have more than this of its bandwidth has all of it.
const BARELY_SLOWER: f64 = 0.9;

/// A transfer that takes longer will not end.
const PATIENCE: Duration = Duration::from_secs(60);

/// Measures what copies and waits cost on this device.
///
/// `from` and `to` are scratch of equal length; of `to`, the first word is a doorbell afterwards.
pub(super) fn measure(
    device: &Arc<dyn Device>,
    throttle: &LinkThrottle,
    from: &PinnedMemory,
    to: &DeviceSlice,
) -> Result<LinkFit, DeviceError> {
    let scratch_bytes = from.bytes().min(to.bytes());
    let word = to.sub(0, 4)?;
    let mut stream = device.copy_stream("measure")?;
    let mut next = 0;
    let mut timed = |copies: Copies| -> Result<Duration, DeviceError> {
        // Each from where the one before has ended: weights come from memory, not from a cache.
        let mut offset = if next + copies.all_bytes() > scratch_bytes { 0 } else { next };
        next = offset + copies.all_bytes();
        let begin = Instant::now();
        for bytes in copies.sizes() {
            stream.copy_in(&HostSlice::new(from.clone(), offset, bytes)?, &to.sub(offset, bytes)?)?;
            stream.write_word(&word, doorbell::RUNG)?;
            offset += bytes;
        }
        let end = stream.record()?;
        if device.properties().gpu.is_some() {
            spin_until(|| end.is_complete(), begin)?;
        } else {
            end.wait(begin + PATIENCE)?;
        }
        Ok(end.completed_at().unwrap_or_else(Instant::now).saturating_duration_since(begin))
    };
    // The first touch of fresh memory costs more than the link does, and a GPU's link has to wake up.
    timed(Copies { count: 1, bytes: [scratch_bytes; 2] })?;
    let begin = Instant::now();
    let mut samples = Vec::new();
    for copies in transfers(scratch_bytes, device.properties().least_copy_bytes) {
        if samples.len() > 1 && begin.elapsed() > BUDGET {
            break;
        }
        let mut times = vec![timed(copies)?];
        while times.len() < TRIES && begin.elapsed() < BUDGET {
            times.push(timed(copies)?);
        }
        times.sort();
        let us = times[1.min(times.len() - 1)].as_secs_f64() * 1e6;
        samples.push(Sample { copies: copies.count, bytes: copies.all_bytes(), us });
    }
    let mut found = fit(&samples);
    if let Some(limit) = throttle.bandwidth_bytes_per_s
        && found.bandwidth_bytes_per_s > limit * BARELY_SLOWER
    {
        // A throttle is exact where a measurement is not.
        found.bandwidth_bytes_per_s = limit;
    }
    found.per_copy_us = found.per_copy_us.max(throttle.per_copy.as_secs_f64() * 1e6);
    tracing::debug!(?samples, ?found, "link measured");
    Ok(found)
}

/// Looks all the time: a wait for a GPU sleeps, and would notice as late as several copies take.
fn spin_until(
    is_complete: impl Fn() -> Result<bool, DeviceError>,
    begin: Instant,
) -> Result<(), DeviceError> {
    while !is_complete()? {
        let waited = begin.elapsed();
        if waited > PATIENCE {
            return Err(DeviceError::TimedOut { what: "a copy", waited });
        }
        std::hint::spin_loop();
    }
    Ok(())
}

/// What the scratch has room for; the shortest transfers first.
fn transfers(scratch_bytes: u64, least_copy_bytes: u64) -> Vec<Copies> {
    let alike =
        SIZES_BYTES.into_iter().flat_map(|each| COUNTS.map(|count| Copies { count, bytes: [each; 2] }));
    let no_shorter =
        |Copies { count, bytes }| Copies { count, bytes: bytes.map(|each| each.max(least_copy_bytes)) };
    let mut fitting: Vec<_> =
        alike.chain(MIXED).map(no_shorter).filter(|copies| copies.all_bytes() <= scratch_bytes).collect();
    fitting.sort_by_key(|copies| copies.all_bytes());
    fitting.dedup();
    if fitting.is_empty() { vec![Copies { count: 1, bytes: [scratch_bytes; 2] }] } else { fitting }
}

impl Copies {
    fn sizes(self) -> impl Iterator<Item = u64> {
        (0..self.count).zip(self.bytes.into_iter().cycle()).map(|(_, bytes)| bytes)
    }

    fn all_bytes(self) -> u64 {
        self.sizes().sum()
    }
}

/// The costs, none of them negative, that explain the times best: `per_transfer + copies * per_copy + bytes / bandwidth`,
/// with the least sum of squared relative errors.
fn fit(samples: &[Sample]) -> LinkFit {
    // Counts and sizes are far below what a float holds exactly.
    #[allow(clippy::cast_precision_loss)]
    let rows: Vec<[f64; 3]> = samples
        .iter()
        .filter(|sample| sample.us > 0.0 && sample.bytes > 0)
        .map(|sample| [sample.bytes as f64, sample.copies as f64, 1.0].map(|value| value / sample.us))
        .collect();
    // The least squares under costs that are not negative are those of some costs alone, the others being zero. There are
    // few enough to try them all; those with fewer costs first, which win where more explain nothing more.
    let mut best = None::<([f64; 3], f64)>;
    for chosen in [&[0][..], &[0, 1], &[0, 2], &[0, 1, 2]] {
        let Some(solution) = least_squares(&rows, chosen) else { continue };
        let squares: f64 = rows.iter().map(|row| error(row, &solution).powi(2)).sum();
        let valid = solution[0] > 0.0 && solution.iter().all(|cost| cost.is_finite() && *cost >= 0.0);
        if valid && best.is_none_or(|(_, least)| squares < least * (1.0 - 1e-9)) {
            best = Some((solution, squares));
        }
    }
    // Nothing that could be timed takes no time: as fast as the clock tells.
    let (solution, squares) = best.unwrap_or(([1e-6, 0.0, 0.0], 0.0));
    let [us_per_byte, per_copy_us, per_transfer_us] = solution;
    // A handful.
    #[allow(clippy::cast_precision_loss)]
    let mean = squares / rows.len().max(1) as f64;
    LinkFit {
        bandwidth_bytes_per_s: 1e6 / us_per_byte,
        per_copy_us,
        per_transfer_us,
        samples: rows.len(),
        rms_percent: mean.sqrt() * 100.0,
        largest_percent: rows.iter().map(|row| error(row, &solution).abs()).fold(0.0, f64::max) * 100.0,
    }
}

/// How far a fitted time is from the one measured, as a share of this.
fn error(row: &[f64; 3], solution: &[f64; 3]) -> f64 {
    row.iter().zip(solution).map(|(value, cost)| value * cost).sum::<f64>() - 1.0
}

/// The costs of the chosen columns by the normal equations, the others being zero; none if they cannot be told apart.
fn least_squares(rows: &[[f64; 3]], chosen: &[usize]) -> Option<[f64; 3]> {
    let norm = |column: usize| rows.iter().map(|row| row[column].powi(2)).sum::<f64>().sqrt();
    let norms: Vec<f64> = chosen.iter().map(|&column| norm(column)).collect();
    if norms.iter().any(|norm| !(norm.is_finite() && *norm > 0.0)) {
        return None;
    }
    // Columns of length one, whatever their units; the right side is the last column of the matrix.
    let size = chosen.len();
    let mut matrix = vec![vec![0.0; size + 1]; size];
    for row in rows {
        let scaled: Vec<f64> = chosen.iter().zip(&norms).map(|(&column, norm)| row[column] / norm).collect();
        for (line, left) in matrix.iter_mut().zip(&scaled) {
            for (cell, right) in line.iter_mut().zip(scaled.iter().chain([&1.0])) {
                *cell += left * right;
            }
        }
    }
    // Symmetric and positive definite, unless columns are multiples of each other: no pivoting.
    for step in 0..size {
        let pivot = matrix[step].clone();
        if pivot[step] < 1e-9 {
            return None;
        }
        for (index, line) in matrix.iter_mut().enumerate() {
            let factor = line[step] / pivot[step];
            if index != step {
                line.iter_mut().zip(&pivot).for_each(|(cell, above)| *cell -= factor * above);
            }
        }
    }
    let mut solution = [0.0; 3];
    for (index, (&column, norm)) in chosen.iter().zip(&norms).enumerate() {
        solution[column] = matrix[index][size] / matrix[index][index] / norm;
    }
    Some(solution)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use pswitch_device::{DeviceId, SharedMemory, open_device};

    use super::*;

    /// Times of all transfers at these costs, each off by a share.
    fn samples(us_per_byte: f64, per_copy_us: f64, per_transfer_us: f64, off: &[f64]) -> Vec<Sample> {
        transfers(64 << 20, 0)
            .into_iter()
            .zip(off.iter().cycle())
            .map(|(copies, off)| {
                let (count, bytes) = (copies.count as f64, copies.all_bytes() as f64);
                let us = bytes * us_per_byte + count * per_copy_us + per_transfer_us;
                Sample { copies: copies.count, bytes: copies.all_bytes(), us: us * (1.0 + off) }
            })
            .collect()
    }

    #[test]
    fn transfers_fill_the_scratch_and_no_more() {
        let alike = |count, each| Copies { count, bytes: [each; 2] };
        assert_eq!(transfers(100, 0), [alike(1, 100)]);
        assert_eq!(transfers(4096, 0), [alike(1, 4096)]);
        assert_eq!(transfers(20_000, 0), [alike(1, 4096), alike(4, 4096)]);
        assert!(
            transfers(64 << 20, 96 << 10).iter().all(|copies| copies.sizes().all(|each| each >= 96 << 10))
        );
        let all = transfers(64 << 20, 0);
        assert_eq!((all.len(), all[0]), (17, alike(1, 4096)));
        assert!(all.contains(&alike(64, 1 << 20)) && all.contains(&MIXED[1]));
        assert_eq!(Copies { count: 5, bytes: [1, 10] }.sizes().collect::<Vec<_>>(), [1, 10, 1, 10, 1]);
    }

    #[test]
    fn costs_are_never_negative() {
        // Many copies that take less time than few: a negative cost would explain it best.
        let odd = [(1, 1 << 20, 120.0), (16, 1 << 20, 90.0), (1, 4 << 20, 400.0), (16, 4 << 20, 380.0)];
        let found = fit(&odd.map(|(copies, bytes, us)| Sample { copies, bytes, us }));
        assert_eq!(found.per_copy_us, 0.0);
        assert!(found.bandwidth_bytes_per_s > 0.0 && found.rms_percent > 1.0, "{found:?}");
        assert!(found.largest_percent >= found.rms_percent, "{found:?}");
    }

    #[test]
    fn one_sample_has_a_bandwidth_alone_and_none_is_no_failure() {
        let one = fit(&[Sample { copies: 1, bytes: 4096, us: 4.096 }]);
        assert!((one.bandwidth_bytes_per_s / 1e9 - 1.0).abs() < 1e-9, "{one:?}");
        assert_eq!((one.per_copy_us, one.per_transfer_us, one.samples), (0.0, 0.0, 1));
        for nothing in [&[][..], &[Sample { copies: 1, bytes: 4096, us: 0.0 }]] {
            let none = fit(nothing);
            assert!(none.bandwidth_bytes_per_s.is_finite() && none.rms_percent == 0.0, "{none:?}");
        }
    }

    #[test]
    fn a_throttled_link_is_what_it_is_told_to_be() {
        let throttle =
            LinkThrottle { bandwidth_bytes_per_s: Some(200e6), per_copy: Duration::from_micros(300) };
        let device = open_device(DeviceId::Host(0), throttle).unwrap();
        let bytes = 1 << 20;
        let from = device.pin(Arc::new(SharedMemory::create("from", bytes).unwrap())).unwrap();
        let to = DeviceSlice::new(device.allocate(bytes).unwrap(), 0, bytes).unwrap();
        let found = measure(&device, &throttle, &from, &to).unwrap();
        // Never better than the throttle; how much worse depends on what else the machine does.
        assert!(found.bandwidth_bytes_per_s <= 200e6 && found.per_copy_us >= 300.0, "{found:?}");
        assert!(found.samples > 1, "{found:?}");
    }

    proptest! {
        #[test]
        fn exact_costs_are_found(
            gigabytes_per_s in 0.01..100.0_f64,
            per_copy_us in 0.1..50.0_f64,
            per_transfer_us in prop_oneof![Just(0.0), 1.0..100.0_f64],
        ) {
            let found = fit(&samples(1e-3 / gigabytes_per_s, per_copy_us, per_transfer_us, &[0.0]));
            prop_assert!((found.bandwidth_bytes_per_s / gigabytes_per_s / 1e9 - 1.0).abs() < 1e-3, "{:?}", found);
            prop_assert!((found.per_copy_us / per_copy_us - 1.0).abs() < 1e-2, "{:?}", found);
            prop_assert!((found.per_transfer_us - per_transfer_us).abs() < 0.1 + per_transfer_us * 0.01, "{:?}", found);
            prop_assert!(found.largest_percent < 0.1, "{:?}", found);
        }

        #[test]
        fn noise_is_told_and_does_little(
            off in prop::collection::vec(-0.04..0.04_f64, 17),
            per_copy_us in 1.0..5.0_f64,
        ) {
            let found = fit(&samples(1e-3 / 55.0, per_copy_us, 8.0, &off));
            prop_assert!((found.bandwidth_bytes_per_s / 55e9 - 1.0).abs() < 0.08, "{:?}", found);
            prop_assert!((found.per_copy_us / per_copy_us - 1.0).abs() < 0.35, "{:?}", found);
            // No worse than the true costs, which are off by what the noise is.
            let noise: f64 = off.iter().map(|off| (1.0 / (1.0 + off) - 1.0).powi(2)).sum::<f64>() / 17.0;
            prop_assert!(found.rms_percent <= noise.sqrt() * 100.0 + 1e-6, "{:?}", found);
        }

        #[test]
        fn whatever_was_measured_the_costs_are_sane(
            times in prop::collection::vec((1..100_u64, 0..1_u64 << 30, 0.0..1e9_f64), 0..20),
        ) {
            let found = fit(&times.iter().map(|&(copies, bytes, us)| Sample { copies, bytes, us }).collect::<Vec<_>>());
            let LinkFit { bandwidth_bytes_per_s, per_copy_us, .. } = found;
            prop_assert!(bandwidth_bytes_per_s.is_finite() && bandwidth_bytes_per_s > 0.0, "{:?}", found);
            prop_assert!(per_copy_us.is_finite() && per_copy_us >= 0.0, "{:?}", found);
            prop_assert!(found.per_transfer_us.is_finite() && found.per_transfer_us >= 0.0, "{:?}", found);
        }
    }
}
