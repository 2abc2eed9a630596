//! What a plan is made from: the bytes of a model's layers, and their times, taken as it runs.

use pswitch_model::Table;
use pswitch_transfer::{Layer, LinkCosts, Profile};

use crate::driver::{HostTables, ModelSpec};
use crate::service::Datatype;

/// Timed runs of a model, after one that warms it up; each layer's time is their median.
pub(crate) const RUNS: usize = 3;

/// Numbers of a block of example values.
const EXAMPLE_VALUES: usize = 4096;

/// A block of input values to time layers with. Floats are spread between -1 and 1, the same every time: with zeros
/// processors draw less power and run faster, a ResNet18 on a CPU by an eighth. Whatever else counts or names something
/// is zero, which every model knows.
pub(crate) fn example_values(datatype: Datatype) -> Vec<u8> {
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    let values = (0..EXAMPLE_VALUES).map(|_| {
        // xorshift64.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        // The upper 23 bits and a half, so that the ends are never reached.
        #[allow(clippy::cast_precision_loss)]
        let share = ((state >> 41) as f64 + 0.5) / f64::from(1 << 23);
        share * 2.0 - 1.0
    });
    match datatype {
        Datatype::Fp64 => values.flat_map(f64::to_le_bytes).collect(),
        // Between -1 and 1.
        #[allow(clippy::cast_possible_truncation)]
        Datatype::Fp32 => values.flat_map(|value| (value as f32).to_le_bytes()).collect(),
        Datatype::Fp16 => values.flat_map(|value| half::f16::from_f64(value).to_le_bytes()).collect(),
        Datatype::Bf16 => values.flat_map(|value| half::bf16::from_f64(value).to_le_bytes()).collect(),
        _ => vec![0; EXAMPLE_VALUES * 8],
    }
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
    fn example_values_are_floats_that_are_spread_and_zeros_for_all_else() {
        let block = example_values(Datatype::Fp32);
        let (words, _) = block.as_chunks::<4>();
        let values: Vec<f32> = words.iter().map(|word| f32::from_le_bytes(*word)).collect();
        assert_eq!(values.len(), EXAMPLE_VALUES);
        assert!(values.iter().all(|value| -1.0 < *value && *value < 1.0));
        let mean = values.iter().sum::<f32>() / EXAMPLE_VALUES as f32;
        let square = values.iter().map(|value| value * value).sum::<f32>() / EXAMPLE_VALUES as f32;
        assert!(mean.abs() < 0.05 && (square - 1.0 / 3.0).abs() < 0.05, "{mean} {square}");
        for (datatype, bytes) in [(Datatype::Fp64, 8), (Datatype::Fp16, 2), (Datatype::Bf16, 2)] {
            let block = example_values(datatype);
            assert_eq!(block.len(), EXAMPLE_VALUES * bytes);
            assert!(block.iter().any(|byte| *byte != 0));
        }
        for datatype in [Datatype::Int64, Datatype::Bool, Datatype::Uint8] {
            assert!(example_values(datatype).iter().all(|byte| *byte == 0));
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
