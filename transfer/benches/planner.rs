//! How long the planner takes: ResNet152 as measured, and made-up models from the paper's 464 layers to 100,000.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use pswitch_transfer::{Algorithm, Layer, LinkCosts, Profile, plan};

/// A model whose copying takes about as long as its computing, the hardest case: half of its layers have bytes, sizes and
/// times are spread evenly.
fn made_up(layers: u64) -> Profile {
    let spread = |layer: u64, factor: u64| (layer * factor % 65_521) as f64 / 65_521.0;
    let layers = (0..layers)
        .map(|layer| Layer {
            name: layer.to_string(),
            #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
            bytes: if layer % 2 == 0 { 512 + (2e6 * spread(layer, 7_919)) as u64 } else { 0 },
            compute_us: 18.0 * spread(layer, 104_729),
        })
        .collect();
    let link = LinkCosts { bandwidth_bytes_per_s: 55.5e9, per_copy_us: 2.5, per_wait_us: 2.7 };
    Profile { model: "made up".to_owned(), link, layers }
}

fn planner(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("optimal");
    let resnet152 = serde_yaml::from_str(include_str!("../examples/profiles/resnet152.yaml"))
        .expect("the profile was written by measure.py");
    group.bench_with_input("resnet152", &resnet152, |bencher, profile: &Profile| {
        bencher.iter(|| plan(black_box(profile), Algorithm::Optimal));
    });
    for layers in [464, 5_000, 100_000] {
        let profile = made_up(layers);
        group.bench_with_input(BenchmarkId::new("made up", layers), &profile, |bencher, profile| {
            bencher.iter(|| plan(black_box(profile), Algorithm::Optimal));
        });
    }
    // Copies and waits that cost next to nothing leave the bounds little to cut off.
    let mut cheap = made_up(5_000);
    cheap.link.per_copy_us = 1e-3;
    cheap.link.per_wait_us = 1e-3;
    group.bench_with_input("made up/5000, cheap groups", &cheap, |bencher, profile| {
        bencher.iter(|| plan(black_box(profile), Algorithm::Optimal));
    });
    group.finish();
}

criterion_group!(benches, planner);
criterion_main!(benches);
