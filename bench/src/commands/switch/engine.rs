//! How well the engine uses the link: weights in groups, each with its doorbell, against the same bytes in one.

use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use pswitch_device::{
    Device, DeviceError, DeviceId, DeviceMemory, DeviceSlice, HostSlice, LinkThrottle, PinnedMemory,
    open_device,
};
use pswitch_transfer::{CopyIn, Engine, GroupCopy, Transfer, TransferError, TransferId, TransferReport};

use super::floor::populated;
use crate::progress::Progress;
use crate::stats::{Samples, Summary};

const WARM_UP: usize = 3;
const TRANSFERS: usize = 20;

/// A transfer that takes longer will not end.
const PATIENCE: Duration = Duration::from_secs(60);

/// Groups begin where tensors may.
const ALIGNMENT_BYTES: u64 = 512;

const WORD_BYTES: u64 = 4;

/// So many bytes through the engine, in turns.
#[derive(Debug, Clone, Copy)]
pub(super) struct Moved {
    pub(super) whole_ms: Summary,
    pub(super) groups_ms: Summary,
}

/// Each of these numbers of bytes in as many equal groups as stand beside it, and in one.
///
/// Call it when nothing else moves on the device.
pub(super) fn moved(device: DeviceId, transfers: &[(u64, usize)]) -> anyhow::Result<Vec<Moved>> {
    let device = open_device(device, LinkThrottle::default())?;
    let most_bytes = transfers.iter().map(|&(bytes, _)| bytes).max().unwrap_or(0).max(ALIGNMENT_BYTES);
    let most_groups = transfers.iter().map(|&(_, groups)| groups).max().unwrap_or(0).max(1);
    let scratch = Scratch::new(&device, most_bytes, most_groups as u64)?;
    let (reports, landed) = mpsc::channel();
    let on_landed = move |_: TransferId, report| {
        // Without a receiver the measurement is over.
        let _ = reports.send(report);
    };
    let mut lane = Lane { engine: Engine::new(device, Box::new(on_landed))?, landed, next: 0 };
    let progress = Progress::new("transfers alone", transfers.len());
    let mut found = Vec::with_capacity(transfers.len());
    for &(bytes, groups) in transfers {
        let (whole, divided) = (scratch.groups(bytes, 1)?, scratch.groups(bytes, groups as u64)?);
        let (mut whole_ms, mut groups_ms) =
            (Samples::with_capacity(TRANSFERS), Samples::with_capacity(TRANSFERS));
        for round in 0..WARM_UP + TRANSFERS {
            for (groups, samples) in [(&whole, &mut whole_ms), (&divided, &mut groups_ms)] {
                let took = lane.transfer(groups.clone())?;
                if round >= WARM_UP {
                    samples.push_ms(took);
                }
            }
        }
        let summary = |samples: &Samples| samples.summary().context("nothing was moved");
        found.push(Moved { whole_ms: summary(&whole_ms)?, groups_ms: summary(&groups_ms)? });
        progress.step();
    }
    Ok(found)
}

/// Where bytes come from and go to, with doorbells behind them.
struct Scratch {
    from: PinnedMemory,
    to: Arc<dyn DeviceMemory>,
    doorbells: u64,
}

impl Scratch {
    fn new(device: &Arc<dyn Device>, bytes: u64, groups: u64) -> anyhow::Result<Self> {
        let doorbells = bytes.next_multiple_of(ALIGNMENT_BYTES);
        Ok(Self {
            from: device.pin(Arc::new(populated(bytes)?))?,
            to: device.allocate(doorbells + groups * WORD_BYTES)?,
            doorbells,
        })
    }

    /// The first bytes in equal groups; the last one is as much longer as the others begin at boundaries.
    fn groups(&self, bytes: u64, groups: u64) -> Result<Vec<GroupCopy>, DeviceError> {
        let groups = groups.min(bytes / ALIGNMENT_BYTES).max(1);
        let each = bytes / groups / ALIGNMENT_BYTES * ALIGNMENT_BYTES;
        (0..groups)
            .map(|group| {
                let offset = group * each;
                let length = if group + 1 == groups { bytes - offset } else { each };
                Ok(GroupCopy {
                    copy: CopyIn {
                        from: HostSlice::new(self.from.clone(), offset, length)?,
                        to: DeviceSlice::new(self.to.clone(), offset, length)?,
                    },
                    doorbell: DeviceSlice::new(
                        self.to.clone(),
                        self.doorbells + group * WORD_BYTES,
                        WORD_BYTES,
                    )?,
                })
            })
            .collect()
    }
}

struct Lane {
    engine: Engine,
    landed: mpsc::Receiver<Result<TransferReport, TransferError>>,
    next: u64,
}

impl Lane {
    /// From the call to the moment at which all has landed.
    fn transfer(&mut self, groups: Vec<GroupCopy>) -> anyhow::Result<Duration> {
        let bytes = groups.iter().map(|group| group.copy.to.bytes()).sum::<u64>();
        let id = TransferId(self.next);
        self.next += 1;
        let begun = Instant::now();
        self.engine.start(Transfer { groups, ..Transfer::new(id) })?;
        let report = self.landed.recv_timeout(PATIENCE);
        let report = report.with_context(|| format!("a transfer of {bytes} bytes does not end"))??;
        ensure!(report.bytes == bytes, "bytes were left behind");
        Ok(report.landed_at.saturating_duration_since(begun))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_model_is_moved_both_ways() {
        let [one, many] = moved(DeviceId::Host(0), &[(512, 9), (8 << 20, 16)]).unwrap().try_into().unwrap();
        assert_eq!((one.whole_ms.count, many.groups_ms.count), (TRANSFERS, TRANSFERS));
        assert!(0.0 < one.groups_ms.median && one.whole_ms.median < many.whole_ms.median, "{one:?} {many:?}");
    }

    #[test]
    fn groups_are_all_bytes_in_order() {
        let device = open_device(DeviceId::Host(0), LinkThrottle::default()).unwrap();
        let scratch = Scratch::new(&device, 5000, 4).unwrap();
        let lengths = |bytes, groups| {
            let groups = scratch.groups(bytes, groups).unwrap();
            groups.iter().map(|group| (group.copy.to.offset(), group.copy.to.bytes())).collect::<Vec<_>>()
        };
        assert_eq!(lengths(5000, 4), [(0, 1024), (1024, 1024), (2048, 1024), (3072, 1928)]);
        assert_eq!(lengths(5000, 1), [(0, 5000)]);
        assert_eq!(lengths(1024, 4), [(0, 512), (512, 512)]);
    }
}
