//! Models that nobody has, of any number of layers; for the benchmark and the example `search_times`.

use pswitch_transfer::{Layer, LinkCosts, Profile};

/// A model whose copying takes about as long as its computing, the hardest case: half of its layers have bytes, sizes and
/// times are spread evenly.
pub(crate) fn made_up(layers: u64) -> Profile {
    let spread = |layer: u64, factor: u64| (layer * factor % 65_521) as f64 / 65_521.0;
    let layers = (0..layers)
        .map(|layer| Layer {
            name: layer.to_string(),
            #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
            bytes: if layer % 2 == 0 { 512 + (2e6 * spread(layer, 7_919)) as u64 } else { 0 },
            compute_us: 18.0 * spread(layer, 104_729),
            host_bytes: 0,
        })
        .collect();
    let link = LinkCosts { bandwidth_bytes_per_s: 55.5e9, per_copy_us: 2.5, per_wait_us: 2.7 };
    Profile { model: "made up".to_owned(), link, layers }
}
