//! What a plan is made from: the bytes of a model's layers, and their times, taken as it runs.

use pswitch_model::Table;
use pswitch_transfer::{Layer, LinkCosts, Profile};

use super::link::LinkFit;
use crate::driver::{HostTables, ModelSpec};
use crate::service::Datatype;

/// Timed runs of a model, after one that warms it up; each layer's time is their median.
pub(crate) const RUNS: usize = 3;

/// Numbers of a block of example values.
const EXAMPLE_VALUES: usize = 4096;

/// A block of input values to time layers with, the same every time. Floats are spread between -1 and 1: with zeros
/// processors draw less power and run faster, a ResNet18 on a CPU by an eighth. Row numbers are spread over the `rows` that
/// there are, for the same reason, and because one row that is read again and again is read faster. Whatever else counts
/// or names something is zero, which every model knows.
pub(crate) fn example_values(datatype: Datatype, rows: Option<u64>) -> Vec<u8> {
    let random = std::iter::successors(Some(0x9E37_79B9_7F4A_7C15), |&state| Some(xorshift64(state)));
    let random = random.take(EXAMPLE_VALUES);
    // The upper 23 bits and a half, so that the ends are never reached.
    #[allow(clippy::cast_precision_loss)]
    let floats = random.clone().map(|bits| ((bits >> 41) as f64 + 0.5) / f64::from(1 << 23) * 2.0 - 1.0);
    match (datatype, rows) {
        (Datatype::Fp64, _) => floats.flat_map(f64::to_le_bytes).collect(),
        // Between -1 and 1.
        #[allow(clippy::cast_possible_truncation)]
        (Datatype::Fp32, _) => floats.flat_map(|value| (value as f32).to_le_bytes()).collect(),
        (Datatype::Fp16, _) => floats.flat_map(|value| half::f16::from_f64(value).to_le_bytes()).collect(),
        (Datatype::Bf16, _) => floats.flat_map(|value| half::bf16::from_f64(value).to_le_bytes()).collect(),
        (Datatype::Int64 | Datatype::Int32, Some(rows @ 1..)) => {
            // Below the number of rows of some tensor; little-endian, so that a shorter number is the first bytes.
            let bytes = if datatype == Datatype::Int64 { 8 } else { 4 };
            random.flat_map(|bits| ((bits >> 16) % rows).to_le_bytes().into_iter().take(bytes)).collect()
        }
        _ => vec![0; EXAMPLE_VALUES * 8],
    }
}

fn xorshift64(mut state: u64) -> u64 {
    state ^= state << 13;
    state ^= state >> 7;
    state ^ state << 17
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

/// The profile of a model from the times of its runs, in microseconds: one for each node, what a wait costs, and what a copy
/// of the least length takes, with its doorbell, beside the model's computation, or 0. Tables that are read from the host are no
/// bytes of their layers: what these read of them is.
pub(crate) fn profile(
    spec: &ModelSpec,
    host_tables: &HostTables,
    link: &LinkFit,
    least_copy_bytes: u64,
    runs: &[Vec<f32>],
) -> Profile {
    let median = |index: usize| {
        let mut times: Vec<f32> = runs.iter().filter_map(|run| run.get(index).copied()).collect();
        times.sort_by(f32::total_cmp);
        times.get(times.len() / 2).copied().map_or(0.0, f64::from)
    };
    let layers = spec
        .layers
        .iter()
        .enumerate()
        .map(|(index, layer)| {
            let compute_us = median(index);
            let tables = || host_tables.tables.iter().filter(|table| table.node == layer.node);
            let left_out: u64 = tables().map(|table| table.bytes).sum();
            Layer {
                name: layer.name.clone(),
                bytes: layer.bytes.saturating_sub(left_out),
                compute_us,
                host_bytes: tables().map(|table| table.read_bytes).sum(),
            }
        })
        .collect();
    // Bytes and counts are far below what a float holds exactly.
    #[allow(clippy::cast_precision_loss)]
    let beside = {
        let copies = spec.layers.iter().filter(|layer| layer.bytes > 0).count().max(1) as f64;
        let moving_us = least_copy_bytes as f64 / link.bandwidth_bytes_per_s * 1e6;
        median(spec.layers.len() + 1) - moving_us - link.per_transfer_us / copies
    };
    let link = LinkCosts {
        bandwidth_bytes_per_s: link.bandwidth_bytes_per_s,
        per_copy_us: link.per_copy_us.max(beside),
        per_wait_us: median(spec.layers.len()),
    };
    Profile { model: spec.name.clone(), link, layers }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
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
    fn example_values_are_floats_that_are_spread_and_zeros_for_all_else() {
        let block = example_values(Datatype::Fp32, None);
        let (words, _) = block.as_chunks::<4>();
        let values: Vec<f32> = words.iter().map(|word| f32::from_le_bytes(*word)).collect();
        assert_eq!(values.len(), EXAMPLE_VALUES);
        assert!(values.iter().all(|value| -1.0 < *value && *value < 1.0));
        let mean = values.iter().sum::<f32>() / EXAMPLE_VALUES as f32;
        let square = values.iter().map(|value| value * value).sum::<f32>() / EXAMPLE_VALUES as f32;
        assert!(mean.abs() < 0.05 && (square - 1.0 / 3.0).abs() < 0.05, "{mean} {square}");
        for (datatype, bytes) in [(Datatype::Fp64, 8), (Datatype::Fp16, 2), (Datatype::Bf16, 2)] {
            let block = example_values(datatype, None);
            assert_eq!(block.len(), EXAMPLE_VALUES * bytes);
            assert!(block.iter().any(|byte| *byte != 0));
        }
        for datatype in [Datatype::Int64, Datatype::Bool, Datatype::Uint8] {
            assert!(example_values(datatype, None).iter().all(|byte| *byte == 0));
        }
    }

    #[test]
    fn example_row_numbers_are_spread_over_the_rows_that_there_are() {
        let block = example_values(Datatype::Int64, Some(30_522));
        let (words, _) = block.as_chunks::<8>();
        let numbers: BTreeSet<u64> = words.iter().map(|word| u64::from_le_bytes(*word)).collect();
        assert_eq!(words.len(), EXAMPLE_VALUES);
        assert!(numbers.len() > EXAMPLE_VALUES / 2 && numbers.last() < Some(&30_522), "{}", numbers.len());
        let block = example_values(Datatype::Int32, Some(2));
        assert_eq!(block.len(), EXAMPLE_VALUES * 4);
        let (words, _) = block.as_chunks::<4>();
        let ones = words.iter().filter(|word| u32::from_le_bytes(**word) == 1).count();
        assert!(words.iter().all(|word| u32::from_le_bytes(*word) < 2));
        assert!((EXAMPLE_VALUES / 3..EXAMPLE_VALUES * 2 / 3).contains(&ones), "{ones}");
        assert!(example_values(Datatype::Int64, Some(0)).iter().all(|byte| *byte == 0));
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
        let link = LinkFit {
            bandwidth_bytes_per_s: 1e9,
            per_copy_us: 1.0,
            per_transfer_us: 5.0,
            samples: 2,
            rms_percent: 0.0,
            largest_percent: 0.0,
        };
        let spec = spec(&[(100 << 20, 1 << 10), (60 << 20, 50 << 20)]);
        let profile = profile(
            &spec,
            &host_tables(&spec),
            &link,
            0,
            &[vec![1.0, 5.0, 3.0, 2.5], vec![2.0, 4.0, 3.0, 0.5]],
        );
        let bytes: Vec<u64> = profile.layers.iter().map(|layer| layer.bytes).collect();
        assert_eq!(bytes, [0, 100 << 20, 100 << 20]);
        let read: Vec<u64> = profile.layers.iter().map(|layer| layer.host_bytes).collect();
        assert_eq!(read, [1 << 10, 0, 0]);
        let times: Vec<f64> = profile.layers.iter().map(|layer| layer.compute_us).collect();
        assert_eq!((times, profile.link.per_wait_us), (vec![2.0, 5.0, 3.0], 2.5));
    }

    #[test]
    fn a_copy_costs_what_it_does_beside_computation_if_that_is_known() {
        let link = LinkFit {
            bandwidth_bytes_per_s: 1e9,
            per_copy_us: 4.0,
            per_transfer_us: 6.0,
            samples: 2,
            rms_percent: 0.0,
            largest_percent: 0.0,
        };
        let spec = spec(&[]);
        let per_copy_us = |copy_us| {
            let times = vec![1.0, 1.0, 1.0, 0.5, copy_us];
            profile(&spec, &HostTables::default(), &link, 10_000, &[times]).link.per_copy_us
        };
        // 10 us are its bytes, and 2 us its third of what a transfer begins with.
        assert_eq!([0.0, 15.0, 19.0].map(per_copy_us), [4.0, 4.0, 7.0]);
    }
}
