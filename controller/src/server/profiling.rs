//! What a plan is made from: the times of a model's layers, taken as it runs, and the costs of the link.

use std::sync::Arc;
use std::time::{Duration, Instant};

use pswitch_device::{Device, DeviceError, DeviceSlice, HostSlice, LinkThrottle, PinnedMemory, doorbell};
use pswitch_mem_pool::TENSOR_ALIGNMENT_BYTES;
use pswitch_transfer::{Layer, LinkCosts, Profile};

use crate::driver::ModelSpec;

/// Timed runs of a model, after one that warms it up; each layer's time is their median.
pub(crate) const RUNS: usize = 3;

/// Copies whose cost is measured.
const COPIES: u64 = 64;

/// Times that each measurement is taken; the best counts.
const TRIES: usize = 5;

/// What a copy and a wait cost on this device: as many bytes in one group and in many, each with its doorbell behind it,
/// as a transfer moves them.
///
/// `from` and `to` are scratch of equal length; of `to`, the first word is a doorbell afterwards.
pub(crate) fn measure_link(
    device: &Arc<dyn Device>,
    throttle: &LinkThrottle,
    from: &PinnedMemory,
    to: &DeviceSlice,
) -> Result<LinkCosts, DeviceError> {
    let bytes = from.bytes().min(to.bytes());
    // Every copy at a tensor's boundary, however small the scratch.
    let copies = COPIES.min(bytes / TENSOR_ALIGNMENT_BYTES).max(1);
    let bytes = bytes / copies / TENSOR_ALIGNMENT_BYTES * copies * TENSOR_ALIGNMENT_BYTES;
    let word = to.sub(0, 4)?;
    let mut stream = device.copy_stream("measure")?;
    let mut timed = |copies: u64| -> Result<Duration, DeviceError> {
        let mut best = Duration::MAX;
        let each = bytes / copies;
        for _ in 0..TRIES {
            let begin = Instant::now();
            for copy in 0..copies {
                stream.copy_in(
                    &HostSlice::new(from.clone(), copy * each, each)?,
                    &to.sub(copy * each, each)?,
                )?;
                stream.write_word(&word, doorbell::RUNG)?;
            }
            stream.record()?.wait(begin + Duration::from_secs(60))?;
            best = best.min(begin.elapsed());
        }
        Ok(best)
    };
    // The first touch of fresh memory costs more than the link does.
    timed(1)?;
    let (whole, divided) = (timed(1)?, timed(copies)?);
    let wait = device.measure_wait(&word)?;
    // A small count.
    #[allow(clippy::cast_precision_loss)]
    let per_copy_s = divided.saturating_sub(whole).as_secs_f64() / (copies.max(2) - 1) as f64;
    // Bytes of a scratch are far below what a float holds exactly.
    #[allow(clippy::cast_precision_loss)]
    let measured = bytes as f64 / (whole.as_secs_f64() - per_copy_s).max(1e-9);
    Ok(LinkCosts {
        // A throttle is exact where a measurement is not.
        bandwidth_bytes_per_s: throttle.bandwidth_bytes_per_s.map_or(measured, |limit| limit.min(measured)),
        per_copy_us: per_copy_s * 1e6,
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
