//! How long the planner takes: ResNet152 as measured, and made-up models from the paper's 464 layers to 100,000.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use pswitch_transfer::{Algorithm, Profile, plan, resident_prefix_curve, smallest_resident_prefix};

use self::made_up::made_up;

#[path = "../examples/profiles/made_up.rs"]
mod made_up;

/// The models that are planned, by name.
fn models() -> Vec<(String, Profile)> {
    let resnet152 = serde_yaml::from_str(include_str!("../examples/profiles/resnet152.yaml"))
        .expect("the profile was written by measure.py");
    let made_up = [464, 5_000, 100_000].map(|layers| (format!("made up/{layers}"), made_up(layers)));
    std::iter::once(("resnet152".to_owned(), resnet152)).chain(made_up).collect()
}

fn planner(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("optimal");
    for (name, profile) in models() {
        group.bench_with_input(BenchmarkId::from_parameter(name), &profile, |bencher, profile| {
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

fn resident_prefixes(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("smallest resident prefix");
    for (name, profile) in models() {
        group.bench_with_input(BenchmarkId::from_parameter(name), &profile, |bencher, profile| {
            bencher.iter(|| smallest_resident_prefix(black_box(profile), 0.01));
        });
    }
    group.finish();
    let mut group = criterion.benchmark_group("resident prefix curve of 20 steps");
    for (name, profile) in models() {
        group.sample_size(10).bench_with_input(
            BenchmarkId::from_parameter(name),
            &profile,
            |bencher, profile| {
                bencher.iter(|| resident_prefix_curve(black_box(profile), 20));
            },
        );
    }
    group.finish();
}

criterion_group!(benches, planner, resident_prefixes);
criterion_main!(benches);
