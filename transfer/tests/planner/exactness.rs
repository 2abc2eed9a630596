//! The planner against brute force, against a plain dynamic program, against the paper's search, and against the cost
//! model written down once more.

use std::time::Duration;

use proptest::prelude::*;
use pswitch_transfer::{
    Algorithm, Bound, Group, Plan, Profile, TransferError, compare, lower_bound_us, plan, plan_within,
    predict,
};

use crate::model::{
    brute_force, measured, plain_dynamic_program, profile, simulate, simulated_us, whole_numbers,
};

const PAPER: Algorithm = Algorithm::Paper { rule1: true, rule2: true };

fn relative(a: f64, b: f64) -> f64 {
    (a - b).abs() / a.abs().max(b.abs()).max(f64::MIN_POSITIVE)
}

/// What any plan must be: all layers once, in order; every group but that of a model without bytes has bytes; and it
/// costs what it says.
fn check(profile: &Profile, plan: &Plan) {
    let mut next = 0;
    for group in &plan.groups {
        assert_eq!(group.first_layer, next);
        assert!(group.last_layer >= group.first_layer);
        let layers = &profile.layers[group.first_layer..=group.last_layer];
        assert_eq!(group.bytes, layers.iter().map(|layer| layer.bytes).sum::<u64>());
        assert!(group.bytes > 0 || plan.groups.len() == 1);
        assert!(next == 0 || layers[0].bytes > 0, "layers without bytes belong to the group before them");
        next = group.last_layer + 1;
    }
    assert_eq!(next, profile.layers.len());
    assert!(relative(plan.predicted_us, simulated_us(profile, &plan.cuts())) < 1e-12);
    assert!(plan.lower_bound_us <= plan.predicted_us);
    assert!(plan.search_us >= 0.0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(192))]

    #[test]
    fn optimal_is_brute_force_in_whole_numbers(profile in whole_numbers(12)) {
        let optimal = plan(&profile, Algorithm::Optimal).unwrap();
        check(&profile, &optimal);
        let (cost, groups) = brute_force(&profile);
        prop_assert_eq!(optimal.predicted_us, cost);
        prop_assert_eq!(optimal.groups.len(), groups);
        // To the last bit, since whole numbers are exact.
        prop_assert_eq!(simulated_us(&profile, &optimal.cuts()), cost);
    }

    #[test]
    fn optimal_is_brute_force_in_measured_numbers(profile in measured(11)) {
        let optimal = plan(&profile, Algorithm::Optimal).unwrap();
        check(&profile, &optimal);
        prop_assert!(relative(optimal.predicted_us, brute_force(&profile).0) < 1e-12);
    }

    #[test]
    fn optimal_is_a_plain_dynamic_program(mut profile in whole_numbers(40)) {
        profile.layers[0].bytes += 1;
        let optimal = plan(&profile, Algorithm::Optimal).unwrap();
        prop_assert_eq!(optimal.predicted_us, plain_dynamic_program(&profile));
    }

    #[test]
    fn both_rules_leave_an_optimal_plan(profile in whole_numbers(12)) {
        let optimal = plan(&profile, Algorithm::Optimal).unwrap();
        for (rule1, rule2) in [(true, true), (true, false), (false, true), (false, false)] {
            let found = plan(&profile, Algorithm::Paper { rule1, rule2 }).unwrap();
            check(&profile, &found);
            prop_assert_eq!(found.predicted_us, optimal.predicted_us);
        }
    }

    #[test]
    fn optimal_is_the_papers_where_that_finishes(profile in prop_oneof![whole_numbers(60), measured(60)]) {
        let optimal = plan(&profile, Algorithm::Optimal).unwrap();
        check(&profile, &optimal);
        match plan_within(&profile, PAPER, Duration::from_millis(20)) {
            Ok(found) => prop_assert_eq!(found.predicted_us, optimal.predicted_us),
            Err(TransferError::CutOff { .. }) => {}
            Err(error) => panic!("{error}"),
        }
    }

    #[test]
    fn optimal_is_never_worse(
        profile in prop_oneof![whole_numbers(300), measured(300)],
        equal in prop::collection::vec(1..300_usize, 4),
        random in prop::collection::btree_set(1..300_usize, 0..40),
    ) {
        let optimal = plan(&profile, Algorithm::Optimal).unwrap();
        check(&profile, &optimal);
        let equal = equal.into_iter().map(|groups| Algorithm::Equal { groups });
        for algorithm in [Algorithm::Whole, Algorithm::PerLayer].into_iter().chain(equal) {
            let other = plan(&profile, algorithm).unwrap();
            check(&profile, &other);
            prop_assert!(optimal.predicted_us <= other.predicted_us, "{algorithm}");
        }
        let cuts: Vec<usize> = random.into_iter().filter(|&cut| cut < profile.layers.len()).collect();
        prop_assert!(optimal.predicted_us <= predict(&profile, &cuts).unwrap().predicted_us);
    }

    #[test]
    fn predictions_are_the_cost_model(
        profile in prop_oneof![whole_numbers(40), measured(40)],
        cuts in prop::collection::btree_set(1..40_usize, 0..20),
    ) {
        let cuts: Vec<usize> = cuts.into_iter().filter(|&cut| cut < profile.layers.len()).collect();
        let prediction = predict(&profile, &cuts).unwrap();
        let simulated = simulate(&profile, &cuts);
        prop_assert_eq!(prediction.groups.len(), simulated.len());
        let mut ready = prediction.lead_us;
        let mut stalls = 0.0;
        for (index, (times, [lands, starts, ends])) in prediction.groups.iter().zip(simulated).enumerate() {
            prop_assert!(relative(times.lands_us, lands) < 1e-12);
            prop_assert!(relative(times.starts_us, starts) < 1e-12);
            prop_assert!(relative(times.ends_us, ends) < 1e-12);
            if times.group.bytes > 0 {
                prop_assert!((times.stall_us - (starts - ready)).abs() <= 1e-12 * ends, "group {}", index);
            }
            stalls += times.stall_us;
            ready = ends;
        }
        prop_assert!(relative(prediction.predicted_us, ready) < 1e-12);
        prop_assert!((prediction.stall_us - stalls).abs() <= 1e-12 * ready);
        prop_assert!(relative(prediction.compute_us + prediction.stall_us, ready) < 1e-12);
        prop_assert!(lower_bound_us(&profile).unwrap() <= prediction.predicted_us);
    }
}

#[test]
fn equal_groups_are_as_many_as_asked_and_about_equal() {
    let even = profile(1.0, 1.0, 1.0, &[(10, 1.0); 12]);
    let groups = |profile: &Profile, groups| plan(profile, Algorithm::Equal { groups }).unwrap().groups;
    assert_eq!(groups(&even, 4).iter().map(|group| group.bytes).collect::<Vec<_>>(), [30; 4]);
    assert_eq!(groups(&even, 100).len(), 12);
    let uneven = profile(1.0, 1.0, 1.0, &[(1000, 1.0), (1, 1.0), (1, 1.0), (1, 1.0), (1, 1.0)]);
    assert_eq!(groups(&uneven, 3).iter().map(|group| group.bytes).collect::<Vec<_>>(), [1000, 1, 3]);
}

#[test]
fn layers_without_bytes_neither_copy_nor_wait() {
    let none = profile(1.0, 5.0, 3.0, &[(0, 2.0), (0, 4.0)]);
    for algorithm in [Algorithm::Optimal, PAPER, Algorithm::PerLayer, Algorithm::Whole] {
        let plan = plan(&none, algorithm).unwrap();
        assert_eq!(plan.predicted_us, 6.0);
        assert_eq!(plan.lower_bound_us, 6.0);
        assert_eq!(plan.groups, [Group { first_layer: 0, last_layer: 1, bytes: 0 }]);
    }
    // Layers ahead of the first bytes run while these are on their way: max(5 + 10, 12) + 3 + 1.
    let lead = profile(1.0, 5.0, 3.0, &[(0, 12.0), (10, 1.0)]);
    assert_eq!(plan(&lead, Algorithm::Optimal).unwrap().predicted_us, 19.0);
    assert_eq!(predict(&lead, &[1]).unwrap(), predict(&lead, &[]).unwrap());
}

#[test]
fn free_copies_and_waits_make_groups_of_single_layers() {
    let free = profile(1.0, 0.0, 0.0, &[(5, 5.0); 50]);
    let optimal = plan(&free, Algorithm::Optimal).unwrap();
    assert_eq!(optimal.predicted_us, 255.0);
    assert_eq!(optimal.predicted_us, optimal.lower_bound_us);
    assert_eq!(optimal.groups.len(), 50);
}

#[test]
fn of_equal_plans_the_one_with_the_fewest_groups_is_taken() {
    let waits = profile(1.0, 0.0, 0.0, &[(5, 0.0); 50]);
    assert_eq!(plan(&waits, Algorithm::Optimal).unwrap().groups.len(), 1);
}

#[test]
fn a_plan_is_written_as_documented() {
    let small = profile(2.0, 1.0, 0.5, &[(4, 2.0), (0, 1.0), (6, 3.0)]);
    let mut plan = plan(&small, Algorithm::Optimal).unwrap();
    plan.search_us = 1.5;
    assert_eq!(
        serde_json::to_string(&plan).unwrap(),
        r#"{"model":"test","algorithm":"optimal","groups":[{"first_layer":0,"last_layer":1,"bytes":4},{"first_layer":2,"last_layer":2,"bytes":6}],"predicted_us":10.5,"whole_us":12.5,"per_layer_us":10.5,"lower_bound_us":9.5,"search_us":1.5}"#
    );
    assert_eq!(serde_json::from_str::<Plan>(&serde_json::to_string(&plan).unwrap()).unwrap(), plan);
}

#[test]
fn tables_show_what_was_predicted() {
    let small = profile(2.0, 1.0, 0.5, &[(4, 2.0), (0, 1.0), (6, 3.0)]);
    let prediction = predict(&small, &[2]).unwrap();
    assert_eq!(prediction.bound(), Bound::Compute);
    assert_eq!(
        prediction.table().rows(),
        [["0", "0-1", "4", "3.0", "3.0", "6.5", "3.0"], ["1", "2", "6", "7.0", "7.0", "10.5", "0.5"]]
    );
    assert_eq!(
        prediction.to_string(),
        "compute-bound: 10.5 us, in which the link is busy 7.0 us, layers and waits take 7.0 us and stalls 3.5 us"
    );
    let comparison = compare(&small, Duration::from_secs(1)).unwrap();
    let table = comparison.table();
    let names: Vec<&str> = table.rows().iter().map(|row| row[0].as_str()).collect();
    assert_eq!(names, ["optimal", "paper", "equal-2", "per-layer", "whole"]);
    assert_eq!(table.rows()[4][1..4], ["1", "12.5", "31.58 %"]);
}

#[test]
fn searches_are_cut_off() {
    let large = profile(1.0, 0.5, 0.1, &[(50, 49.0); 200]);
    let exhaustive = Algorithm::Paper { rule1: false, rule2: false };
    let error = plan_within(&large, exhaustive, Duration::from_millis(20)).unwrap_err();
    assert!(matches!(error, TransferError::CutOff { visited, .. } if visited > 0), "{error}");
}
