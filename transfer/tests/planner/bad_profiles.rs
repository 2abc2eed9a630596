//! Profiles that describe nothing real are refused with what is wrong; none panics.

use proptest::prelude::*;
use pswitch_transfer::{
    Algorithm, Layer, LinkCosts, Profile, TransferError, plan, predict, ready_us, resident_prefix,
    resident_prefix_curve, smallest_resident_prefix,
};

use crate::model::profile;

fn refused(profile: &Profile) -> TransferError {
    let error = profile.validate().unwrap_err();
    for again in [
        plan(profile, Algorithm::Optimal).unwrap_err(),
        predict(profile, &[]).unwrap_err(),
        ready_us(profile).unwrap_err(),
        resident_prefix(profile, 0).unwrap_err(),
        resident_prefix_curve(profile, 1).unwrap_err(),
        smallest_resident_prefix(profile, 0.01).unwrap_err(),
    ] {
        assert_eq!(error.to_string(), again.to_string());
    }
    error
}

#[test]
fn an_empty_profile() {
    assert!(matches!(refused(&profile(1.0, 1.0, 1.0, &[])), TransferError::NoLayers));
}

#[test]
fn bandwidths_that_move_nothing() {
    for bandwidth in [0.0, -0.0, -1.0, f64::NAN, f64::INFINITY] {
        let error = refused(&profile(bandwidth, 1.0, 1.0, &[(1, 1.0)]));
        assert!(matches!(error, TransferError::InvalidBandwidth { .. }), "{error}");
    }
}

#[test]
fn times_that_are_none() {
    for us in [-1.0, -f64::MIN_POSITIVE, f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        let error = refused(&profile(1.0, us, 1.0, &[(1, 1.0)]));
        assert!(matches!(error, TransferError::InvalidLinkCost { field: "per_copy_us", .. }), "{error}");
        let error = refused(&profile(1.0, 1.0, us, &[(1, 1.0)]));
        assert!(matches!(error, TransferError::InvalidLinkCost { field: "per_wait_us", .. }), "{error}");
        let error = refused(&profile(1.0, 1.0, 1.0, &[(1, 1.0), (1, us)]));
        assert!(matches!(error, TransferError::InvalidLayerTime { layer: 1, .. }), "{error}");
        assert!(error.to_string().contains("layer1"), "{error}");
    }
}

#[test]
fn bytes_that_overflow() {
    let error = refused(&profile(1.0, 1.0, 1.0, &[(u64::MAX, 1.0), (0, 1.0), (1, 1.0)]));
    assert!(matches!(error, TransferError::TooManyBytes { layer: 2, .. }), "{error}");
    // As many as can be counted are planned.
    let largest = profile(1.0, 1.0, 1.0, &[(u64::MAX / 2, 1.0), (u64::MAX / 2 + 1, 1.0)]);
    plan(&largest, Algorithm::Optimal).unwrap();
}

#[test]
fn times_that_overflow() {
    let error = refused(&profile(1.0, 1.0, 1.0, &[(1, f64::MAX), (1, f64::MAX)]));
    assert!(matches!(error, TransferError::TimesOverflow), "{error}");
    let error = refused(&profile(f64::MIN_POSITIVE / 1e6, 1.0, 1.0, &[(u64::MAX, 1.0)]));
    assert!(matches!(error, TransferError::TimesOverflow), "{error}");
    // A link that is never used may be as slow as it likes.
    plan(&profile(f64::MIN_POSITIVE / 1e6, 1.0, 1.0, &[(0, 1.0)]), Algorithm::Optimal).unwrap();
}

#[test]
fn no_groups() {
    let error = plan(&profile(1.0, 1.0, 1.0, &[(1, 1.0)]), Algorithm::Equal { groups: 0 }).unwrap_err();
    assert!(matches!(error, TransferError::NoGroups), "{error}");
}

#[test]
fn cuts_that_cut_nothing() {
    let three = profile(1.0, 1.0, 1.0, &[(1, 1.0); 3]);
    for cuts in [&[0][..], &[3], &[usize::MAX], &[1, 1], &[2, 1]] {
        let error = predict(&three, cuts).unwrap_err();
        assert!(matches!(error, TransferError::InvalidCut { .. }), "{cuts:?}: {error}");
    }
    predict(&three, &[1, 2]).unwrap();
}

#[test]
fn a_hundred_thousand_layers() {
    let layers: Vec<(u64, f64)> = (0..100_000_u64)
        .map(|layer| (layer * 7919 % 40_000, (layer * 104_729 % 1000) as f64 / 1000.0))
        .collect();
    let long = profile(55_500.0, 2.5, 1.0, &layers);
    for algorithm in
        [Algorithm::Optimal, Algorithm::PerLayer, Algorithm::Whole, Algorithm::Equal { groups: 1000 }]
    {
        let plan = plan(&long, algorithm).unwrap();
        assert_eq!(plan.groups.last().unwrap().last_layer, 99_999);
    }
    let prefix = smallest_resident_prefix(&long, 0.0001).unwrap();
    assert!(prefix.bytes > 0 && prefix.predicted_us <= ready_us(&long).unwrap() * 1.0001);
    assert_eq!(prefix.groups.last().unwrap().last_layer, 99_999);
}

#[test]
fn files_that_are_no_profiles() {
    let good = "{model: m, link: {bandwidth_bytes_per_s: 1e9, per_copy_us: 1, per_wait_us: 1}, layers: [{name: a, \
                bytes: 1, compute_us: 1}]}";
    serde_yaml::from_str::<Profile>(good).unwrap();
    for (from, to) in [
        ("model: m", "modl: m"),
        ("model: m, ", ""),
        ("per_wait_us: 1", "per_wait_us: 1, per_bell_us: 2"),
        ("bytes: 1", "bytes: -1"),
        ("bytes: 1", "bytes: 1.5"),
        ("bytes: 1", "bytes: 18446744073709551616"),
        ("name: a", "name: a, colour: red"),
        ("compute_us: 1", "compute_us: fast"),
        ("layers: [{", "layers: [{}, {"),
    ] {
        let bad = good.replacen(from, to, 1);
        assert_ne!(bad, good);
        assert!(serde_yaml::from_str::<Profile>(&bad).is_err(), "{bad}");
    }
    // YAML can write what is no number; it is refused where it is checked.
    let nan = good.replacen("compute_us: 1", "compute_us: .nan", 1);
    assert!(matches!(refused(&serde_yaml::from_str(&nan).unwrap()), TransferError::InvalidLayerTime { .. }));
}

proptest! {
    #[test]
    fn whatever_the_numbers_there_is_an_answer(
        link in [any::<f64>(), any::<f64>(), any::<f64>()],
        layers in prop::collection::vec((any::<u64>(), any::<f64>()), 0..8),
        positive in any::<bool>(),
    ) {
        let number = |value: f64| if positive && !value.is_nan() { value.abs().min(1e200) } else { value };
        let profile = Profile {
            model: String::new(),
            link: LinkCosts {
                bandwidth_bytes_per_s: number(link[0]),
                per_copy_us: number(link[1]),
                per_wait_us: number(link[2]),
            },
            layers: layers
                .into_iter()
                .map(|(bytes, us)| Layer { name: String::new(), bytes: bytes >> 4, compute_us: number(us), host_bytes: bytes >> 5 })
                .collect(),
        };
        if let Ok(optimal) = plan(&profile, Algorithm::Optimal) {
            prop_assert!(optimal.predicted_us.is_finite());
            prop_assert!(optimal.predicted_us >= optimal.lower_bound_us);
            prop_assert!(optimal.predicted_us <= optimal.whole_us.min(optimal.per_layer_us));
            let ready_us = ready_us(&profile).unwrap();
            prop_assert!(ready_us <= optimal.predicted_us);
            let prefix = smallest_resident_prefix(&profile, 0.01).unwrap();
            prop_assert!(prefix.predicted_us.is_finite() && prefix.predicted_us >= ready_us);
            prop_assert!(prefix.predicted_us <= ready_us * (1.01 + 1e-12));
            let curve = resident_prefix_curve(&profile, 4).unwrap();
            prop_assert_eq!(curve[0].predicted_us, optimal.predicted_us);
            prop_assert_eq!(curve[curve.len() - 1].predicted_us, ready_us);
        }
    }
}
