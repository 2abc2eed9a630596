//! Profiles to test with, and the cost model of the documentation once more, written down without regard for speed.

use proptest::prelude::*;
use pswitch_transfer::{Layer, LinkCosts, Profile};

/// Builds a profile; bandwidth in bytes a microsecond.
pub(crate) fn profile(
    bytes_per_us: f64,
    per_copy_us: f64,
    per_wait_us: f64,
    layers: &[(u64, f64)],
) -> Profile {
    Profile {
        model: "test".to_owned(),
        link: LinkCosts { bandwidth_bytes_per_s: bytes_per_us * 1e6, per_copy_us, per_wait_us },
        layers: layers
            .iter()
            .enumerate()
            .map(|(index, &(bytes, compute_us))| Layer {
                name: format!("layer{index}"),
                bytes,
                compute_us,
                host_bytes: 0,
            })
            .collect(),
    }
}

/// Lets some layers read from the host: layer `index` what stands at that place, starting over at the end.
fn reading(mut profile: Profile, host_bytes: &[u64]) -> Profile {
    for (layer, &bytes) in profile.layers.iter_mut().zip(host_bytes.iter().cycle()) {
        layer.host_bytes = bytes;
    }
    profile
}

/// Bytes that have crossed the link when the last byte of the first `end` layers has: theirs, and what layers ahead of
/// the last one with bytes read.
fn sent_bytes(profile: &Profile, end: usize) -> u64 {
    let layers = &profile.layers[..end];
    let last = layers.iter().rposition(|layer| layer.bytes > 0).unwrap_or(0);
    let copied: u64 = layers.iter().map(|layer| layer.bytes).sum();
    copied + layers[..last].iter().map(|layer| layer.host_bytes).sum::<u64>()
}

/// Profiles of up to `layers` layers whose costs are small whole numbers (or halves, for the link), so that sums are
/// exact in doubles and ties are common. Some layers have no bytes, some take no time.
pub(crate) fn whole_numbers(layers: usize) -> impl Strategy<Value = Profile> {
    let layer =
        (prop_oneof![1 => Just(0_u64), 3 => 1..60_u64], prop_oneof![1 => Just(0_u32), 4 => 0..60_u32]);
    (
        prop_oneof![Just(0.5), Just(1.0), Just(2.0)],
        0..20_u32,
        0..8_u32,
        prop::collection::vec(layer, 1..=layers),
        host_bytes(60),
    )
        .prop_map(|(bytes_per_us, copy, wait, layers, host_bytes)| {
            let layers: Vec<_> = layers.into_iter().map(|(bytes, us)| (bytes, f64::from(us))).collect();
            reading(profile(bytes_per_us, f64::from(copy), f64::from(wait), &layers), &host_bytes)
        })
}

/// Profiles of up to `layers` layers with costs as they are measured.
pub(crate) fn measured(layers: usize) -> impl Strategy<Value = Profile> {
    let layer = (prop_oneof![1 => Just(0_u64), 2 => 1..4_000_000_u64], 0.0..80.0_f64);
    let layers = prop::collection::vec(layer, 1..=layers);
    (1e3..60e3_f64, 0.0..20.0_f64, 0.0..5.0_f64, layers, host_bytes(4_000_000)).prop_map(
        |(bytes_per_us, copy, wait, layers, host_bytes)| {
            reading(profile(bytes_per_us, copy, wait, &layers), &host_bytes)
        },
    )
}

/// What layers read from the host: mostly nothing.
fn host_bytes(most: u64) -> impl Strategy<Value = Vec<u64>> {
    prop::collection::vec(prop_oneof![4 => Just(0), 1 => 0..most], 1..5)
}

/// When each group of a plan lands, starts and ends, layer by layer as the cost model says. `cuts` begin groups; layers
/// without bytes wait for nothing, wherever the cut is.
pub(crate) fn simulate(profile: &Profile, cuts: &[usize]) -> Vec<[f64; 3]> {
    let bandwidth_per_us = profile.link.bandwidth_bytes_per_s / 1e6;
    // The group of each layer with bytes, by the cuts at or ahead of it.
    let group_of = |layer: usize| cuts.iter().filter(|&&cut| cut <= layer).count();
    let mut clock = 0.0;
    let mut times: Vec<[f64; 3]> = Vec::new();
    let mut open = None;
    for (index, layer) in profile.layers.iter().enumerate() {
        if layer.bytes > 0 && open != Some(group_of(index)) {
            open = Some(group_of(index));
            let end = (index..profile.layers.len())
                .find(|&other| group_of(other) != group_of(index))
                .unwrap_or(profile.layers.len());
            let copies = (times.len() + 1) as f64;
            let landed =
                copies * profile.link.per_copy_us + sent_bytes(profile, end) as f64 / bandwidth_per_us;
            clock = f64::max(clock, landed);
            times.push([landed, clock, clock]);
            clock += profile.link.per_wait_us;
        }
        clock += layer.compute_us;
        if let Some(last) = times.last_mut() {
            last[2] = clock;
        }
    }
    if times.is_empty() {
        times.push([0.0, 0.0, clock]);
    }
    times
}

/// When a plan ends.
pub(crate) fn simulated_us(profile: &Profile, cuts: &[usize]) -> f64 {
    simulate(profile, cuts).last().expect("a plan has groups")[2]
}

/// The least cost of all groupings by the plainest dynamic program there is, over exactly `k` groups for every `k`: no
/// inheritance between rows, no order among states, no bounds. For profiles that begin with bytes.
pub(crate) fn plain_dynamic_program(profile: &Profile) -> f64 {
    let LinkCosts { bandwidth_bytes_per_s, per_copy_us, per_wait_us } = profile.link;
    let layers = &profile.layers;
    assert!(layers[0].bytes > 0);
    let sum = |range: std::ops::Range<usize>| layers[range].iter().map(|layer| layer.compute_us).sum::<f64>();
    let sent = |end: usize| sent_bytes(profile, end) as f64 / (bandwidth_bytes_per_s / 1e6);
    let mut row = vec![f64::INFINITY; layers.len() + 1];
    row[0] = 0.0;
    let mut best = f64::INFINITY;
    for groups in 1..=layers.len() {
        let ending = |end: usize| {
            let lands = groups as f64 * per_copy_us + sent(end);
            (groups - 1..end)
                .filter(|&start| layers[start].bytes > 0)
                .map(|start| f64::max(lands, row[start]) + per_wait_us + sum(start..end))
                .fold(f64::INFINITY, f64::min)
        };
        let next = (0..=layers.len()).map(ending).collect();
        row = next;
        best = best.min(row[layers.len()]);
    }
    best
}

/// The least cost of all groupings, and the fewest groups that have it.
pub(crate) fn brute_force(profile: &Profile) -> (f64, usize) {
    let layers = profile.layers.len();
    (0..1_u32 << (layers - 1))
        .map(|mask| {
            let cuts: Vec<usize> = (1..layers).filter(|cut| mask >> (cut - 1) & 1 == 1).collect();
            let times = simulate(profile, &cuts);
            (times.last().expect("a plan has groups")[2], times.len())
        })
        .min_by(|a, b| a.partial_cmp(b).expect("costs are finite"))
        .expect("there is a grouping")
}
