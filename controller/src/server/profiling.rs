//! What a plan is made from: the times of a model's layers, taken as it runs, and the costs of the link.

use std::sync::Arc;
use std::time::{Duration, Instant};

use pswitch_device::{Device, DeviceError, DeviceSlice, HostSlice, LinkThrottle, PinnedMemory, doorbell};
use pswitch_mem_pool::TENSOR_ALIGNMENT_BYTES;
use pswitch_model::Table;
use pswitch_transfer::{Layer, LinkCosts, Profile};

use crate::driver::{HostTables, ModelSpec};

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

/// A table that is shorter is moved like any weight.
const SHORTEST_TABLE_BYTES: u64 = 1 << 20;

/// Reading from the host must be so many times as fast as moving a table: rows are read while the link moves weights, and
/// while computation waits for them.
const READING_ADVANTAGE: u64 = 4;

/// The tables of a model that are read from the host store while its weights are on their way, by cost: the rows that a
/// request of the shapes at export reads against the table as a whole. Both cross the same link, so that bytes tell.
pub(crate) fn host_tables(spec: &ModelSpec) -> HostTables {
    let is_worth_it = |table: &&Table| {
        table.bytes >= SHORTEST_TABLE_BYTES
            && table.read_bytes.saturating_mul(READING_ADVANTAGE) <= table.bytes
    };
    let tables: Vec<Table> = spec.tables.iter().filter(is_worth_it).cloned().collect();
    // Rows grow with the inputs: how much larger may these be?
    let factor = tables.iter().map(|table| table.bytes / (table.read_bytes * READING_ADVANTAGE).max(1)).min();
    let most_input_bytes = spec.example_bytes.saturating_mul(factor.unwrap_or(0));
    HostTables { tables, most_input_bytes }
}

/// The profile of a model from the times of its runs, in microseconds by node. Tables that are read from the host are no
/// bytes of their layers.
pub(crate) fn profile(
    spec: &ModelSpec,
    host_tables: &HostTables,
    link: &LinkCosts,
    runs: &[Vec<f32>],
) -> Profile {
    let layers = spec
        .layers
        .iter()
        .enumerate()
        .map(|(index, layer)| {
            let mut times: Vec<f32> = runs.iter().filter_map(|run| run.get(index).copied()).collect();
            times.sort_by(f32::total_cmp);
            let compute_us = times.get(times.len() / 2).copied().map_or(0.0, f64::from);
            let tables = host_tables.tables.iter().filter(|table| table.node == layer.node);
            let left_out: u64 = tables.map(|table| table.bytes).sum();
            Layer { name: layer.name.clone(), bytes: layer.bytes.saturating_sub(left_out), compute_us }
        })
        .collect();
    Profile { model: spec.name.clone(), link: *link, layers }
}

#[cfg(test)]
mod tests {
    use std::sync::OnceLock;

    use pswitch_mem_pool::ModelId;
    use pswitch_model::StorageId;

    use super::*;
    use crate::scheduler::ModelLimits;

    fn spec(tables: &[(u64, u64)]) -> ModelSpec {
        let table = |(node, &(bytes, read_bytes)): (usize, &(u64, u64))| Table {
            storage: StorageId(0),
            offset: 0,
            bytes,
            node,
            read_bytes,
        };
        ModelSpec {
            id: ModelId(0),
            name: "m".to_owned(),
            path: String::new(),
            digest: 0,
            span_bytes: 1 << 30,
            layers: (0..3)
                .map(|node| pswitch_model::Layer { name: node.to_string(), node, bytes: 100 << 20 })
                .collect(),
            tables: tables.iter().enumerate().map(table).collect(),
            example_bytes: 1000,
            limits: ModelLimits::default(),
            lost: OnceLock::new(),
        }
    }

    #[test]
    fn tables_are_read_from_the_host_where_few_rows_are_read() {
        let of = |tables: &[(u64, u64)]| {
            let found = host_tables(&spec(tables));
            (found.tables.iter().map(|table| table.node).collect::<Vec<_>>(), found.most_input_bytes)
        };
        // BERT-base with 8 x 251 tokens: words, positions, kinds of tokens.
        assert_eq!(of(&[(93_763_584, 6_168_576), (1_572_864, 771_072), (6144, 6_168_576)]), (vec![0], 3000));
        assert_eq!(of(&[(8 << 20, 1 << 20), (64 << 20, 1 << 10)]), (vec![0, 1], 2000));
        assert_eq!(of(&[]), (vec![], 0));
    }

    #[test]
    fn the_bytes_of_such_tables_are_not_planned() {
        let link = LinkCosts { bandwidth_bytes_per_s: 1e9, per_copy_us: 1.0, per_wait_us: 1.0 };
        let spec = spec(&[(100 << 20, 1 << 10), (60 << 20, 50 << 20)]);
        let profile = profile(&spec, &host_tables(&spec), &link, &[vec![1.0, 5.0, 3.0], vec![2.0, 4.0, 3.0]]);
        let bytes: Vec<u64> = profile.layers.iter().map(|layer| layer.bytes).collect();
        assert_eq!(bytes, [0, 100 << 20, 100 << 20]);
    }
}
