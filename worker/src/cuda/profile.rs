//! Times of a model's nodes, taken on the GPU.

use std::sync::Arc;
use std::time::{Duration, Instant};

use pswitch_device::{CopyStream, DeviceError, DeviceSlice, GpuMoment, HostSlice, SharedMemory, doorbell};
use pswitch_protocol::{Executed, Region};

use super::launch::{Group, Launch, Segment};
use super::{CudaExecutor, Failure};
use crate::work::{Model, Shared, Work};

/// Launches that are timed; the median of each node's times counts. One more comes before them, to warm up.
const LAUNCHES: usize = 5;

/// Doorbells that take a longer part of a graph's time to ring hold it up by that.
const LONGEST_RINGING: f64 = 0.8;

/// Copies that take longer will not end.
const PATIENCE: Duration = Duration::from_secs(30);

impl CudaExecutor {
    /// Executes once for the answer, and a few times more for the times of all nodes, of a wait between them and of a copy
    /// beside them, which it writes to `times` as little-endian `f32` of microseconds.
    ///
    /// A graph with a time stamp before every node runs longer than one without: stamps cost time, and kernels that
    /// follow each other without a gap no longer do. So what the whole graph takes is measured, too, and what the stamps
    /// add is taken off each node alike. What a wait costs is timed by a graph that waits before every layer with weights,
    /// and what a copy takes by the copies that ring for it.
    pub(super) fn profile(
        &mut self,
        shared: &Shared,
        model: &mut Model,
        work: &Work<'_>,
        times: Region,
    ) -> Result<Executed, Failure> {
        let executed = self.run_eagerly(shared, model, work)?;
        model.executable.clear();
        let stamps: Vec<GpuMoment> =
            (0..=model.executable.nodes()).map(|_| GpuMoment::new(&self.stream)).collect::<Result<_, _>>()?;
        // Inputs and weights are there by now; tables are read from where an execution reads them that waits for weights.
        let host_tables = work.order.host_tables && model.executable.has_tables();
        let launch = |groups, stamps| Launch {
            libtorch: &self.libtorch,
            stream: &self.stream,
            inputs: &work.inputs,
            groups,
            host_tables,
            stamps,
            in_one: false,
            stop: None,
        };
        let whole = launch(&[], &[]).capture(&mut model.executable);
        let captured =
            whole.and_then(|whole| Ok((whole.1, launch(&[], &stamps).capture(&mut model.executable)?.1)));
        let us = match captured {
            Ok((whole, stamped)) => {
                let (mut totals, mut nodes) = (Vec::new(), Vec::new());
                for _ in 0..=LAUNCHES {
                    totals.push(self.time(&whole)?);
                    self.launch_again(&stamped)?;
                    self.stream.synchronize()?;
                    nodes.push(intervals(&stamps)?);
                }
                let mut us = without_stamps(&medians(&nodes[1..]), median(totals[1..].to_vec()));
                let ringer = Ringer::new(shared, model.weighted_nodes.len())?;
                let waits = ringer.groups(&model.weighted_nodes);
                let waiting = launch(&waits, &[]).capture(&mut model.executable)?.1;
                us.extend(self.costs_us(&whole, &waiting, ringer)?);
                us
            }
            // It runs operator by operator, and so do its times. The GPU waits for launches then, and not for words.
            Err(_) => {
                let mut nodes = Vec::new();
                for _ in 0..=LAUNCHES {
                    launch(&[], &stamps).run(&mut model.executable)?;
                    self.stream.synchronize()?;
                    model.executable.clear();
                    nodes.push(intervals(&stamps)?);
                }
                let mut us = medians(&nodes[1..]);
                us.extend([0.0, 0.0]);
                us
            }
        };
        // Times of one node, far inside of the range.
        #[allow(clippy::cast_possible_truncation)]
        let bytes: Vec<u8> = us.iter().flat_map(|us| (*us as f32).to_le_bytes()).collect();
        shared.slots.write(times.offset, &bytes)?;
        Ok(executed)
    }

    /// What each of some waits adds to a graph without any, while they ring one after the other or, where that takes longer than
    /// the graph, when they have rung; and what each of the copies takes that ring, with its doorbell, or 0 in that case. Copies
    /// and doorbells end when all that they wrote has arrived, which takes longer where kernels use the memory, too: 4.4 us
    /// beside nothing, 12 us beside kernels that only copy (H200).
    fn costs_us(
        &self,
        whole: &[Segment],
        waiting: &[Segment],
        mut ringer: Ringer,
    ) -> Result<[f64; 2], Failure> {
        let (mut while_ringing, mut rung, mut copying) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..=LAUNCHES {
            // In turn: what slows the GPU down for a while slows all.
            let without = self.time(whole)?;
            ringer.clear()?;
            let (took, ringing) = self.time_beside(waiting, &mut ringer)?;
            if ringing.as_secs_f64() * 1e6 < took * LONGEST_RINGING {
                while_ringing.push(took - without);
                copying.push(ringing.as_secs_f64() * 1e6);
            }
            rung.push(self.time(waiting)? - without);
        }
        let (added, copying) =
            if while_ringing.len() > LAUNCHES { (while_ringing, copying) } else { (rung, vec![0.0; 2]) };
        // Counts of nodes are far below what a float holds exactly.
        #[allow(clippy::cast_precision_loss)]
        let words = ringer.words.len().max(1) as f64;
        Ok([added, copying].map(|times| (median(times[1..].to_vec()) / words).max(0.0)))
    }

    /// Microseconds of one launch from its first doorbell on, and how long these take to ring.
    fn time_beside(&self, segments: &[Segment], ringer: &mut Ringer) -> Result<(f64, Duration), Failure> {
        for (number, Segment { waits, graph }) in segments.iter().enumerate() {
            self.stream.wait(waits)?;
            if number == 0 {
                self.stream.mark(&self.first)?;
            }
            // SAFETY: as for any launch.
            unsafe { graph.launch(&self.stream) }?;
        }
        self.stream.mark(&self.last)?;
        let ringing = ringer.ring()?;
        self.stream.synchronize()?;
        Ok((self.last.us_since(&self.first)?, ringing))
    }

    /// Microseconds of one launch.
    fn time(&self, segments: &[Segment]) -> Result<f64, Failure> {
        self.stream.mark(&self.first)?;
        self.launch_again(segments)?;
        self.stream.mark(&self.last)?;
        self.stream.synchronize()?;
        Ok(self.last.us_since(&self.first)?)
    }

    /// Launches what has nothing to wait for any more.
    fn launch_again(&self, segments: &[Segment]) -> Result<(), Failure> {
        for Segment { graph, .. } in segments {
            // SAFETY: as for any launch: all memory is leased to this execution, and the launch before is over.
            unsafe { graph.launch(&self.stream) }?;
        }
        Ok(())
    }
}

/// Doorbells of a graph that is timed, and what rings them as a transfer does: a copy ahead of each.
struct Ringer {
    words: Vec<DeviceSlice>,
    all: DeviceSlice,
    from: HostSlice,
    to: DeviceSlice,
    stream: Box<dyn CopyStream>,
}

impl Ringer {
    /// Memory of its own: the model's doorbells may be in use.
    fn new(shared: &Shared, words: usize) -> Result<Self, DeviceError> {
        let bytes = shared.device.properties().least_copy_bytes.max(4);
        let word_bytes = 4 * words.max(1) as u64;
        let memory = shared.device.allocate(bytes + word_bytes)?;
        let part = |offset, bytes| DeviceSlice::new(Arc::clone(&memory), offset, bytes);
        let words = (0..words as u64).map(|word| part(bytes + 4 * word, 4)).collect::<Result<_, _>>()?;
        let source = shared.device.pin(Arc::new(SharedMemory::create("pswitch-profile", bytes)?))?;
        Ok(Self {
            words,
            all: part(bytes, word_bytes)?,
            from: HostSlice::new(source, 0, bytes)?,
            to: part(0, bytes)?,
            stream: shared.device.copy_stream("profile")?,
        })
    }

    /// A wait before each of some nodes.
    fn groups(&self, nodes: &[u32]) -> Vec<Group> {
        nodes.iter().copied().zip(self.words.iter().cloned()).collect()
    }

    fn clear(&mut self) -> Result<(), DeviceError> {
        self.stream.clear_words(&self.all)?;
        self.stream.record()?.wait(Instant::now() + PATIENCE)
    }

    /// Rings all; returns how long that took.
    fn ring(&mut self) -> Result<Duration, DeviceError> {
        let begun = Instant::now();
        for word in &self.words {
            self.stream.copy_in(&self.from, &self.to)?;
            self.stream.write_word(word, doorbell::RUNG)?;
        }
        let end = self.stream.record()?;
        // By looking: a wait notices some microseconds late.
        while !end.is_complete()? {
            if begun.elapsed() > PATIENCE {
                return Err(DeviceError::TimedOut { what: "copies", waited: begun.elapsed() });
            }
            std::hint::spin_loop();
        }
        Ok(begun.elapsed())
    }
}

/// Microseconds between neighbours.
fn intervals(moments: &[GpuMoment]) -> Result<Vec<f64>, Failure> {
    moments.windows(2).map(|pair| Ok(pair[1].us_since(&pair[0])?)).collect()
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

/// The median of every column.
fn medians(rows: &[Vec<f64>]) -> Vec<f64> {
    let columns = rows.first().map_or(0, Vec::len);
    (0..columns).map(|column| median(rows.iter().map(|row| row[column]).collect())).collect()
}

/// Takes off what time stamps have added to each node, so that all together take `total`.
///
/// Nodes that launch nothing take no time. So the stamps' cost is not less than it is for such a node, and no more is taken
/// off a node than it has; what is left over after that is taken off all in proportion.
fn without_stamps(stamped: &[f64], total: f64) -> Vec<f64> {
    let sum: f64 = stamped.iter().sum();
    if stamped.is_empty() || sum <= total || total <= 0.0 {
        return stamped.to_vec();
    }
    // Counts of nodes are far below what a float holds exactly.
    #[allow(clippy::cast_precision_loss)]
    let each = (sum - total) / stamped.len() as f64;
    let less: Vec<f64> = stamped.iter().map(|us| (us - each).max(0.0)).collect();
    let left: f64 = less.iter().sum();
    if left <= 0.0 {
        return stamped.iter().map(|us| us * total / sum).collect();
    }
    less.iter().map(|us| us * total / left).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stamps_are_taken_off_and_the_sum_is_what_the_whole_takes() {
        let corrected = without_stamps(&[11.0, 1.0, 6.0, 2.0], 16.0);
        assert!((corrected.iter().sum::<f64>() - 16.0).abs() < 1e-9, "{corrected:?}");
        assert_eq!(corrected[1], 0.0);
        assert!((corrected[0] / corrected[2] - 2.0).abs() < 1e-9, "{corrected:?}");
    }

    #[test]
    fn times_that_need_no_correction_stay() {
        assert_eq!(without_stamps(&[3.0, 4.0], 8.0), [3.0, 4.0]);
        assert_eq!(without_stamps(&[], 8.0), Vec::<f64>::new());
        assert_eq!(without_stamps(&[2.0, 2.0], 0.0), [2.0, 2.0]);
    }

    #[test]
    fn medians_are_taken_by_column() {
        let rows = [vec![1.0, 9.0], vec![2.0, 7.0], vec![90.0, 8.0]];
        assert_eq!(medians(&rows), [2.0, 8.0]);
    }
}
