//! What the link takes for a model's weights in one copy: no switch can be faster.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use pswitch_device::{DeviceId, DeviceSlice, HostSlice, LinkThrottle, SharedMemory, open_device};

use crate::progress::Progress;
use crate::stats::{Samples, Summary};

const WARM_UP: usize = 5;
const COPIES: usize = 50;

/// A copy that takes longer will not end.
const PATIENCE: Duration = Duration::from_secs(60);

/// Milliseconds that one copy of so many bytes takes, from pinned memory to the device, for each size.
///
/// On CUDA it makes the context of this process: call it when what is to be forked has been forked.
pub(super) fn copies(device: DeviceId, sizes_bytes: &[u64]) -> anyhow::Result<Vec<Summary>> {
    let device = open_device(device, LinkThrottle::default())?;
    let most_bytes = sizes_bytes.iter().copied().max().unwrap_or(0).max(1);
    let from = device.pin(Arc::new(populated(most_bytes)?))?;
    let to = device.allocate(most_bytes)?;
    let mut stream = device.copy_stream("floor")?;
    let rounds = WARM_UP + COPIES;
    let progress = Progress::new("copies alone", rounds);
    let mut series = vec![Samples::with_capacity(COPIES); sizes_bytes.len()];
    for round in 0..rounds {
        for (&bytes, samples) in sizes_bytes.iter().zip(&mut series) {
            let from = HostSlice::new(from.clone(), 0, bytes)?;
            let to = DeviceSlice::new(to.clone(), 0, bytes)?;
            let begun = Instant::now();
            stream.copy_in(&from, &to)?;
            let event = stream.record()?;
            // Looks all the time: a wait notices up to some twenty microseconds late, which would flatter the switches.
            while !event.is_complete()? {
                ensure!(begun.elapsed() < PATIENCE, "a copy of {bytes} bytes does not end");
                std::hint::spin_loop();
            }
            let done = event.completed_at().unwrap_or_else(Instant::now);
            if round >= WARM_UP {
                samples.push_ms(done.saturating_duration_since(begun));
            }
        }
        progress.step();
    }
    series.iter().map(|samples| samples.summary().context("nothing was copied")).collect()
}

/// Memory with every page in place, which pinning would else have to see to.
pub(super) fn populated(bytes: u64) -> anyhow::Result<SharedMemory> {
    let memory = SharedMemory::create("pswitch-bench", bytes)?;
    let piece = vec![0x5A; 1 << 20];
    let mut offset = 0;
    while offset < bytes {
        let length = (bytes - offset).min(piece.len() as u64);
        // No more than the piece is long.
        #[allow(clippy::cast_possible_truncation)]
        memory.write(offset, &piece[..length as usize])?;
        offset += length;
    }
    Ok(memory)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_size_has_its_time() {
        let [small, large] = copies(DeviceId::Host(0), &[512, 8 << 20]).unwrap().try_into().unwrap();
        assert_eq!((small.count, large.count), (COPIES, COPIES));
        // Which takes longer a busy machine does not always say.
        assert!(small.least > 0.0 && large.least > 0.0, "{small:?} {large:?}");
    }
}
