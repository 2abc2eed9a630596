//! Times of a model's nodes, taken on the GPU.

use pswitch_device::{GpuMoment, doorbell};
use pswitch_protocol::{Executed, Region};

use super::launch::{Group, Launch, Segment};
use super::{CudaExecutor, Failure};
use crate::work::{Model, Shared, Work};

/// Launches that are timed; the median of each node's times counts. One more comes before them, to warm up.
const LAUNCHES: usize = 5;

impl CudaExecutor {
    /// Executes once for the answer, and a few times more for the times of all nodes and of a wait between them, which it
    /// writes to `times` as little-endian `f32` of microseconds.
    ///
    /// A graph with a time stamp before every node runs longer than one without: stamps cost time, and kernels that
    /// follow each other without a gap no longer do. So what the whole graph takes is measured, too, and what the stamps
    /// add is taken off each node alike. A wait costs what it keeps the kernels behind it from being made ready for, some
    /// microseconds. So a graph that waits before every layer with weights, for a word that has rung, is timed as well.
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
                let waits: Vec<Group> =
                    model.weighted_nodes.iter().map(|&node| (node, work.input_doorbell.clone())).collect();
                let waiting = launch(&waits, &[]).capture(&mut model.executable)?.1;
                us.push(self.wait_us(shared, work, (&whole, &waiting), waits.len())?);
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
                us.push(0.0);
                us
            }
        };
        // Times of one node, far inside of the range.
        #[allow(clippy::cast_possible_truncation)]
        let bytes: Vec<u8> = us.iter().flat_map(|us| (*us as f32).to_le_bytes()).collect();
        shared.slots.write(times.offset, &bytes)?;
        Ok(executed)
    }

    /// What each of some waits adds to a graph without any.
    fn wait_us(
        &self,
        shared: &Shared,
        work: &Work<'_>,
        (whole, waiting): (&[Segment], &[Segment]),
        waits: usize,
    ) -> Result<f64, Failure> {
        let mut added = Vec::new();
        shared.device.set_word(&work.input_doorbell, doorbell::RUNG)?;
        for _ in 0..=LAUNCHES {
            // In turn: what slows the GPU down for a while slows both.
            let without = self.time(whole)?;
            added.push(self.time(waiting)? - without);
        }
        shared.device.set_word(&work.input_doorbell, doorbell::CLEAR)?;
        // Counts of nodes are far below what a float holds exactly.
        #[allow(clippy::cast_precision_loss)]
        let each = median(added[1..].to_vec()) / waits.max(1) as f64;
        Ok(each.max(0.0))
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
