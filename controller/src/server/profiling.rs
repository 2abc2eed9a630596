//! What a plan is made from: the times of a model's layers, taken as it runs, and the costs of the link.

use std::sync::Arc;
use std::time::{Duration, Instant};

use pswitch_device::{
    Device, DeviceError, DeviceSlice, ExecutionStream, HostSlice, LinkThrottle, PinnedMemory, doorbell,
};
use pswitch_transfer::{Layer, LinkCosts, Profile};

use crate::driver::ModelSpec;

/// Timed runs of a model, after one that warms it up; each layer's time is their median.
pub(crate) const RUNS: usize = 3;

/// Copies and waits whose cost is measured.
const REPEATS: u32 = 64;

/// What a copy and a wait cost on this device: a copy of much and copies of little, each the best of three.
///
/// `from` and `to` are scratch of equal length; of `to`, the first word is a doorbell afterwards.
pub(crate) fn measure_link(
    device: &Arc<dyn Device>,
    throttle: &LinkThrottle,
    from: &PinnedMemory,
    to: &DeviceSlice,
) -> Result<LinkCosts, DeviceError> {
    let bytes = from.bytes().min(to.bytes());
    let (large_from, large_to) = (HostSlice::new(from.clone(), 0, bytes)?, to.sub(0, bytes)?);
    let (small_from, small_to) = (large_from.sub(0, 4)?, large_to.sub(0, 4)?);
    let mut stream = device.copy_stream("measure")?;
    let mut timed = |repeats: u32, from: &HostSlice, to: &DeviceSlice| -> Result<Duration, DeviceError> {
        let mut best = Duration::MAX;
        for _ in 0..3 {
            let begin = Instant::now();
            for _ in 0..repeats {
                stream.copy_in(from, to)?;
            }
            stream.record()?.wait(begin + Duration::from_secs(60))?;
            best = best.min(begin.elapsed());
        }
        Ok(best)
    };
    // The first touch of fresh memory costs more than the link does.
    timed(1, &large_from, &large_to)?;
    let small = timed(REPEATS, &small_from, &small_to)? / REPEATS;
    let large = timed(1, &large_from, &large_to)?;
    device.set_word(&small_to, doorbell::RUNG)?;
    let begin = Instant::now();
    for _ in 0..REPEATS {
        device.wait_doorbell(ExecutionStream::Host, &small_to, begin + Duration::from_secs(60))?;
    }
    let wait = begin.elapsed() / REPEATS;
    // Bytes of a scratch are far below what a float holds exactly.
    #[allow(clippy::cast_precision_loss)]
    let measured = bytes as f64 / large.saturating_sub(small).as_secs_f64().max(1e-9);
    Ok(LinkCosts {
        // A throttle is exact where a measurement is not.
        bandwidth_bytes_per_s: throttle.bandwidth_bytes_per_s.map_or(measured, |limit| limit.min(measured)),
        per_copy_us: small.as_secs_f64() * 1e6,
        per_wait_us: wait.as_secs_f64() * 1e6,
    })
}

/// The profile of a model from the times of its runs, in microseconds by node.
pub(crate) fn profile(spec: &ModelSpec, link: &LinkCosts, runs: &[Vec<f32>]) -> Profile {
    let layers = spec
        .layers
        .iter()
        .enumerate()
        .map(|(index, layer)| {
            let mut times: Vec<f32> = runs.iter().filter_map(|run| run.get(index).copied()).collect();
            times.sort_by(f32::total_cmp);
            let compute_us = times.get(times.len() / 2).copied().map_or(0.0, f64::from);
            Layer { name: layer.name.clone(), bytes: layer.bytes, compute_us }
        })
        .collect();
    Profile { model: spec.name.clone(), link: *link, layers }
}
