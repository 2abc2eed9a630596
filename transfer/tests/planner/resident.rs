//! Resident prefixes against brute force: a prefix at every boundary, and the best of all groupings behind it.

use proptest::prelude::*;
use pswitch_transfer::{
    Algorithm, Group, Profile, ResidentPrefix, TransferError, plan, ready_us, resident_prefix,
    resident_prefix_curve, smallest_resident_prefix,
};

use crate::model::{brute_force, measured, profile, simulated_us, whole_numbers};

/// The first layers need nothing from the host any more, if they have any bytes that can stay.
fn without_bytes(profile: &Profile, layers: usize) -> Profile {
    let mut rest = profile.clone();
    if bytes_of(profile, layers) == 0 {
        return rest;
    }
    rest.layers[..layers].iter_mut().for_each(|layer| (layer.bytes, layer.host_bytes) = (0, 0));
    rest
}

/// The numbers of leading layers behind which a prefix can end: at layers with bytes, and behind the last layer.
fn boundaries(profile: &Profile) -> Vec<usize> {
    let layers = profile.layers.iter().enumerate();
    let with_bytes = layers.filter(|(_, layer)| layer.bytes > 0).map(|(index, _)| index);
    with_bytes.chain([profile.layers.len()]).collect()
}

fn bytes_of(profile: &Profile, layers: usize) -> u64 {
    profile.layers[..layers].iter().map(|layer| layer.bytes).sum()
}

/// What any prefix must be: its bytes are those of its layers, its groups are the other layers in order, and it costs what
/// these groups cost when the prefix has no bytes.
fn check(profile: &Profile, prefix: &ResidentPrefix) {
    assert!(boundaries(profile).contains(&prefix.layers));
    assert_eq!(prefix.bytes, bytes_of(profile, prefix.layers));
    let mut next = if prefix.bytes == 0 { 0 } else { prefix.layers };
    for group in &prefix.groups {
        assert_eq!(group.first_layer, next);
        let layers = &profile.layers[group.first_layer..=group.last_layer];
        assert_eq!(group.bytes, layers.iter().map(|layer| layer.bytes).sum::<u64>());
        assert!(group.bytes > 0);
        next = group.last_layer + 1;
    }
    assert!(next == profile.layers.len() || prefix.groups.is_empty());
    let cuts: Vec<usize> = prefix.groups.iter().skip(1).map(|group| group.first_layer).collect();
    let simulated = simulated_us(&without_bytes(profile, prefix.layers), &cuts);
    assert!((prefix.predicted_us - simulated).abs() <= 1e-12 * simulated);
}

/// The fewest bytes by brute force, and what the switch then takes.
fn smallest_by_brute_force(profile: &Profile, limit_us: f64) -> (u64, f64) {
    boundaries(profile)
        .into_iter()
        .map(|layers| (bytes_of(profile, layers), brute_force(&without_bytes(profile, layers)).0))
        .find(|(_, us)| *us <= limit_us)
        .expect("with everything resident the switch is the ready model")
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn every_prefix_is_brute_force_in_whole_numbers(profile in whole_numbers(10)) {
        let mut last_us = f64::INFINITY;
        for layers in boundaries(&profile) {
            let prefix = resident_prefix(&profile, layers).unwrap();
            check(&profile, &prefix);
            prop_assert_eq!(prefix.layers, layers);
            prop_assert_eq!(prefix.predicted_us, brute_force(&without_bytes(&profile, layers)).0);
            prop_assert!(prefix.predicted_us <= last_us, "keeping more never costs");
            last_us = prefix.predicted_us;
        }
        prop_assert_eq!(last_us, ready_us(&profile).unwrap());
    }

    #[test]
    fn the_smallest_is_brute_force(
        profile in prop_oneof![whole_numbers(10), measured(9)],
        // Whole eighths leave no doubt about what is within the tolerance.
        eighths in prop_oneof![Just(0_u32), 0..32_u32],
    ) {
        let tolerance = f64::from(eighths) / 8.0;
        let limit_us = ready_us(&profile).unwrap() * (1.0 + tolerance);
        let prefix = smallest_resident_prefix(&profile, tolerance).unwrap();
        check(&profile, &prefix);
        let (bytes, us) = smallest_by_brute_force(&profile, limit_us * (1.0 + 1e-12));
        prop_assert_eq!(prefix.bytes, bytes);
        prop_assert!((prefix.predicted_us - us).abs() <= 1e-12 * us);
    }

    /// Larger ones, for which the exact planner is the judge.
    #[test]
    fn the_smallest_is_the_first_that_will_do(
        profile in prop_oneof![whole_numbers(120), measured(120)],
        tolerance in prop_oneof![Just(0.01), 0.0..1.0_f64],
    ) {
        let prefix = smallest_resident_prefix(&profile, tolerance).unwrap();
        check(&profile, &prefix);
        let limit_us = ready_us(&profile).unwrap() * (1.0 + tolerance);
        prop_assert!(prefix.predicted_us <= limit_us * (1.0 + 1e-12));
        for layers in boundaries(&profile) {
            let rest = without_bytes(&profile, layers);
            let us = plan(&rest, Algorithm::Optimal).unwrap().predicted_us;
            if layers < prefix.layers {
                prop_assert!(us > limit_us * (1.0 - 1e-12), "{} layers would do", layers);
            }
        }
    }

    #[test]
    fn a_curve_runs_from_nothing_to_everything(
        profile in prop_oneof![whole_numbers(60), measured(60)],
        steps in 0..40_usize,
    ) {
        let curve = resident_prefix_curve(&profile, steps).unwrap();
        for prefix in &curve {
            check(&profile, prefix);
        }
        prop_assert!(curve.len() <= steps.max(1) + 1);
        prop_assert!(curve.windows(2).all(|two| two[0].bytes < two[1].bytes));
        prop_assert!(curve.windows(2).all(|two| two[0].predicted_us >= two[1].predicted_us));
        let optimal = plan(&profile, Algorithm::Optimal).unwrap();
        let (first, last) = (&curve[0], &curve[curve.len() - 1]);
        prop_assert_eq!(first.bytes, 0);
        prop_assert_eq!(first.predicted_us, optimal.predicted_us);
        prop_assert_eq!(last.layers, profile.layers.len());
        prop_assert_eq!(last.predicted_us, ready_us(&profile).unwrap());
        if first.layers < profile.layers.len() {
            prop_assert_eq!(&first.groups, &optimal.groups);
        }
    }
}

/// A byte a microsecond; a copy costs 2 us, a wait 1 us.
fn three_layers() -> Profile {
    profile(1.0, 2.0, 1.0, &[(0, 4.0), (10, 10.0), (20, 10.0), (30, 26.0)])
}

#[test]
fn prefixes_are_cut_behind_whole_layers() {
    let profile = three_layers();
    let all = |layers| resident_prefix(&profile, layers).unwrap();
    // Layer 0 has no bytes: nothing stays.
    assert_eq!(all(0), all(1));
    assert_eq!((all(0).layers, all(0).bytes), (1, 0));
    assert_eq!((all(2).layers, all(2).bytes), (2, 10));
    // max(22, 14) + 1 + 10 = 33, max(22 + 32, 33) + 1 + 26.
    assert_eq!(all(2).predicted_us, 81.0);
    assert_eq!(
        all(3).groups,
        [Group { first_layer: 3, last_layer: 3, bytes: 30 }],
        "behind three layers one is left"
    );
    assert_eq!(all(4), all(usize::MAX));
    assert_eq!((all(4).bytes, all(4).predicted_us), (60, 50.0));
    assert!(all(4).groups.is_empty());
}

#[test]
fn a_tolerance_is_a_share_of_the_ready_model() {
    let profile = three_layers();
    let bytes = |tolerance| smallest_resident_prefix(&profile, tolerance).unwrap().bytes;
    // 59 us behind 30 bytes, 81 us behind 10.
    assert_eq!((bytes(0.17), bytes(0.18), bytes(0.61), bytes(0.62)), (60, 30, 30, 10));
    assert_eq!((bytes(0.0), bytes(1e300)), (60, 0));
    for found in [-0.01, f64::NAN, f64::INFINITY] {
        let error = smallest_resident_prefix(&profile, found).unwrap_err();
        assert!(matches!(error, TransferError::InvalidTolerance { .. }), "{error}");
    }
}

#[test]
fn a_model_without_bytes_is_ready() {
    let none = profile(1.0, 5.0, 3.0, &[(0, 2.0), (0, 4.0)]);
    let ready = ResidentPrefix { bytes: 0, layers: 2, groups: vec![], predicted_us: 6.0 };
    assert_eq!(resident_prefix(&none, 1).unwrap(), ready);
    assert_eq!(smallest_resident_prefix(&none, 0.0).unwrap(), ready);
    assert_eq!(resident_prefix_curve(&none, 10).unwrap(), [ready]);
}

#[test]
fn layers_that_take_no_time_leave_nothing_to_hide_a_copy_behind() {
    let none = profile(1.0, 0.0, 0.0, &[(10, 0.0), (20, 0.0)]);
    assert_eq!(smallest_resident_prefix(&none, 100.0).unwrap().bytes, 30);
}
