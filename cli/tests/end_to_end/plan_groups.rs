//! `pswitch plan-groups`: what it prints and draws, and what it makes of profiles that describe nothing real.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::commands::{assert_ended, command};
use crate::support::{Ended, assert_says, pswitch, run};

/// A profile of the examples.
fn measured(model: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../transfer/examples/profiles/{model}.yaml"))
}

fn plan_groups(profile: &Path, arguments: &[&str]) -> Ended {
    run(pswitch().arg("plan-groups").arg("--profile").arg(profile).args(arguments))
}

#[test]
fn a_plan_for_programs() {
    let profile = measured("resnet152");
    let profile_of: Value = serde_yaml::from_str(&std::fs::read_to_string(&profile).unwrap()).unwrap();
    let layers = profile_of["layers"].as_array().unwrap();
    let plan = |algorithm: &str| -> Value {
        let planned = run(pswitch()
            .args(["plan-groups", "--format", "json", "--algorithm", algorithm, "--profile"])
            .arg(&profile));
        assert_ended(&planned, 0, &[]);
        serde_json::from_str(&planned.stdout).unwrap()
    };
    let us = |plan: &Value, key: &str| plan[key].as_f64().unwrap_or_else(|| panic!("{key}: {plan}"));
    let optimal = plan("optimal");
    for (algorithm, groups) in
        [("optimal", None), ("per-layer", None), ("whole", Some(1)), ("equal-7", Some(7))]
    {
        let plan = plan(algorithm);
        let mut keys: Vec<&str> = plan.as_object().unwrap().keys().map(String::as_str).collect();
        keys.sort_unstable();
        let expected = [
            "algorithm",
            "groups",
            "lower_bound_us",
            "model",
            "per_layer_us",
            "predicted_us",
            "ready_us",
            "resident_prefix_bytes",
            "resident_prefix_us",
            "search_us",
            "whole_us",
        ];
        assert_eq!(keys, expected);
        assert_eq!(plan["model"], profile_of["model"]);
        assert_eq!(plan["algorithm"], algorithm);
        let found = plan["groups"].as_array().unwrap();
        assert!(groups.is_none_or(|groups| found.len() == groups), "{algorithm}: {} groups", found.len());
        // Every layer is in one group, in order, with its bytes.
        let mut next = 0;
        for group in found {
            let mut keys: Vec<&str> = group.as_object().unwrap().keys().map(String::as_str).collect();
            keys.sort_unstable();
            assert_eq!(keys, ["bytes", "first_layer", "last_layer"]);
            let index = |key: &str| usize::try_from(group[key].as_u64().unwrap()).unwrap();
            let (first, last) = (index("first_layer"), index("last_layer"));
            assert_eq!(first, next);
            let bytes: u64 = layers[first..=last].iter().map(|layer| layer["bytes"].as_u64().unwrap()).sum();
            assert_eq!(group["bytes"], bytes);
            next = last + 1;
        }
        assert_eq!(next, layers.len());
        assert!(
            us(&plan, "predicted_us") >= us(&optimal, "predicted_us") - 1e-6,
            "{algorithm} beats the optimum"
        );
        assert!(us(&plan, "predicted_us") >= us(&plan, "lower_bound_us") - 1e-6);
    }
    assert!(us(&optimal, "predicted_us") < us(&optimal, "whole_us"));
    assert!(us(&optimal, "predicted_us") < us(&optimal, "per_layer_us"));
    // A prefix is planned optimally whatever the plan, and ends at a layer.
    let bytes = optimal["resident_prefix_bytes"].as_u64().unwrap();
    let ends: Vec<u64> = layers
        .iter()
        .scan(0, |sum, layer| {
            *sum += layer["bytes"].as_u64().unwrap();
            Some(*sum)
        })
        .collect();
    assert!(bytes > 0 && bytes < ends[ends.len() - 1] && ends.contains(&bytes), "{bytes}");
    assert!(us(&optimal, "resident_prefix_us") <= us(&optimal, "ready_us") * 1.01);
    assert!(us(&optimal, "ready_us") <= us(&optimal, "lower_bound_us"));
}

#[test]
fn a_plan_for_people() {
    let limit = ["--search-limit-s", "1"];
    let resnet152 = plan_groups(&measured("resnet152"), &limit);
    assert_ended(
        &resnet152,
        0,
        &[
            "resnet152: 515 layers in 7 groups by `optimal`",
            "group   layers     bytes  lands us  starts us  ends us  stall us",
            "1        4-156  29790208     542.5      542.5   1808.9     401.2",
            "algorithm  groups  predicted us  above bound",
            "predicted 4381.6 us: 0.34 % above the lower bound of 4366.6 us, 11.12 % above the ready model's 3943.2 us",
            "transfer-bound: ",
            "keep 24.30 MB (10.1 %, 144 layers) resident and the switch is as fast as the ready model",
            "within 1 % of 3943.2 us",
        ],
    );
    for algorithm in ["optimal ", "paper ", "equal-7 ", "per-layer ", "whole "] {
        assert_says(&resnet152.stdout, &[&format!("\n{algorithm}")]);
    }
    assert_ended(
        &plan_groups(&measured("bert_base"), &limit),
        0,
        &["compute-bound: ", "keep 93.77 MB (21.4 %, 5 layers) resident"],
    );
    assert_ended(&plan_groups(&measured("inception_v3"), &limit), 0, &["keep nothing resident: "]);
    // Nothing but everything is as fast to the last microsecond.
    assert_ended(
        &plan_groups(&measured("inception_v3"), &["--tolerance", "0%", "--search-limit-s", "1"]),
        0,
        &["keep 95.56 MB (100.0 %, 314 layers) resident", "within 0 % of 3098.3 us"],
    );
}

#[test]
fn a_plan_as_a_picture() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (svg, png) = (path("plan.svg"), path("plan.PNG"));
    let drawn = plan_groups(&measured("resnet152"), &["--format", "json", "--plot", &svg, "--plot", &png]);
    assert_ended(&drawn, 0, &["\"model\": \"resnet152\""]);

    let text = fs::read_to_string(&svg).unwrap();
    assert_says(
        &text,
        &["<svg", "resnet152, 7 groups by", "4.38 ms", "copy of a group", "stall: ", "lower bound", "</svg>"],
    );
    for missing in ["NaN", "inf"] {
        assert!(!text.contains(missing), "{missing}");
    }

    let colours = colours_of(&png);
    for (what, colour) in [
        ("copies", [45, 98, 160]),
        ("layers", [40, 120, 76]),
        ("stalls", [206, 44, 34]),
        ("lower bound", [126, 64, 168]),
    ] {
        assert!(colours.contains(&colour), "{what}: no pixel of {colour:?}");
    }
}

/// The colours of a PNG.
fn colours_of(path: &str) -> HashSet<[u8; 3]> {
    let file = std::io::BufReader::new(fs::File::open(path).unwrap());
    let mut reader = png::Decoder::new(file).read_info().unwrap();
    let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
    let frame = reader.next_frame(&mut pixels).unwrap();
    assert_eq!((frame.width, frame.height, frame.color_type), (1600, 720, png::ColorType::Rgb));
    pixels.as_chunks::<3>().0.iter().copied().collect()
}

#[test]
fn what_cannot_be_done_says_so() {
    let profile = measured("resnet152");
    assert_ended(
        &plan_groups(&profile, &["--plot", "plan.pdf"]),
        2,
        &["--plot", "plan.pdf", "FILE.svg or FILE.png"],
    );
    for tolerance in ["-1", "NaN", "inf", "little"] {
        let argument = format!("--tolerance={tolerance}");
        assert_ended(&plan_groups(&profile, &[&argument]), 2, &["--tolerance", tolerance, "percentage"]);
    }
    assert_ended(
        &plan_groups(&profile, &["--plot", "/nowhere/plan.svg"]),
        1,
        &["cannot write /nowhere/plan.svg"],
    );
    assert_ended(
        &plan_groups(&profile, &["--algorithm", "paper-exhaustive", "--search-limit-s", "0"]),
        1,
        &["cannot plan", "the search was cut off after"],
    );
}

const GOOD: &str = "{model: m, link: {bandwidth_bytes_per_s: 1e9, per_copy_us: 1, per_wait_us: 1}, layers: [{name: first, \
                    bytes: 1, compute_us: 1}]}";

#[test]
fn profiles_that_describe_nothing_real_are_3() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("profile.yaml");
    let refused = |bytes: &[u8], says: &[&str]| {
        fs::write(&path, bytes).unwrap();
        for format in ["table", "json"] {
            let ended = plan_groups(&path, &["--format", format]);
            assert_ended(&ended, 3, &[&["profile.yaml"], says].concat());
        }
    };
    fs::write(&path, GOOD).unwrap();
    assert_ended(&plan_groups(&path, &[]), 0, &["m: 1 layer in 1 group"]);
    let layer = "{name: second, bytes: 18446744073709551615, compute_us: 1}";
    for (from, to, says) in [
        ("[{name: first, bytes: 1, compute_us: 1}]", "[]", vec!["the profile has no layers"]),
        ("bandwidth_bytes_per_s: 1e9", "bandwidth_bytes_per_s: 0", vec!["bandwidth is 0 bytes/s"]),
        ("bandwidth_bytes_per_s: 1e9", "bandwidth_bytes_per_s: -5", vec!["bandwidth is -5 bytes/s"]),
        ("bandwidth_bytes_per_s: 1e9", "bandwidth_bytes_per_s: .nan", vec!["bandwidth is NaN bytes/s"]),
        ("bandwidth_bytes_per_s: 1e9", "bandwidth_bytes_per_s: .inf", vec!["bandwidth is inf bytes/s"]),
        ("per_copy_us: 1", "per_copy_us: -1", vec!["per_copy_us is -1"]),
        ("per_copy_us: 1", "per_copy_us: .inf", vec!["per_copy_us is inf"]),
        ("per_wait_us: 1", "per_wait_us: .nan", vec!["per_wait_us is NaN"]),
        ("compute_us: 1", "compute_us: -1", vec!["layer 0 (\"first\") takes -1 us"]),
        ("compute_us: 1", "compute_us: .nan", vec!["layer 0 (\"first\") takes NaN us"]),
        ("compute_us: 1", "compute_us: -.inf", vec!["layer 0 (\"first\") takes -inf us"]),
        ("compute_us: 1", "compute_us: 1.7e308", vec!["add up to more than a number can hold"]),
        ("bytes: 1", "bytes: -1", vec!["layers[0].bytes", "line 1 column"]),
        ("bytes: 1", "bytes: 18446744073709551616", vec!["layers[0].bytes", "line 1 column"]),
        (
            "compute_us: 1}]",
            &format!("compute_us: 1}}, {layer}]"),
            vec!["layer 1 (\"second\")", "overflow 64 bits"],
        ),
        ("compute_us: 1", "compute_us: 1, colour: red", vec!["unknown field `colour`"]),
        ("model: m, ", "", vec!["missing field `model`"]),
    ] {
        let mut bad = GOOD.replacen(from, to, 1);
        assert_ne!(bad, GOOD, "{from}");
        if to == "compute_us: 1.7e308" {
            bad = bad.replacen("]}", ", {name: second, bytes: 1, compute_us: 1.7e308}]}", 1);
        }
        refused(bad.as_bytes(), &says);
    }
    refused(b"", &["is no profile"]);
    refused(b"model: \xff", &["is no profile"]);
    refused("[".repeat(10_000).as_bytes(), &["is no profile"]);
    let nowhere = folder.path().join("nowhere");
    assert_ended(&plan_groups(&nowhere, &[]), 3, &["cannot read", "nowhere"]);
    assert_ended(&plan_groups(folder.path(), &[]), 3, &["cannot read"]);
    // A file without an end.
    assert_ended(&plan_groups(Path::new("/dev/zero"), &[]), 3, &["/dev/zero is no profile", "128 MiB"]);
}

/// Names steer neither a terminal nor a picture.
#[test]
fn odd_profiles_are_planned_and_drawn() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (profile, svg, png) = (path("profile.yaml"), path("plan.svg"), path("plan.png"));
    let name = r#""</text><b>& \e[31m\0\n\ud7ff\uffff 模型""#;
    for (from, to) in [
        ("model: m", format!("model: {name}")),
        ("model: m", format!("model: {}", "m".repeat(10_000))),
        ("bytes: 1, compute_us: 1", "bytes: 0, compute_us: 0".to_owned()),
        ("compute_us: 1", "compute_us: 1e300".to_owned()),
        ("compute_us: 1", "compute_us: 1e-320".to_owned()),
        ("bytes: 1,", "bytes: 18446744073709551615,".to_owned()),
        ("per_copy_us: 1", "per_copy_us: 1e300".to_owned()),
    ] {
        fs::write(&profile, GOOD.replacen(from, &to, 1)).unwrap();
        let ended = command(&["plan-groups", "--profile", &profile, "--plot", &svg, "--plot", &png]);
        assert_ended(&ended, 0, &["1 layer in 1 group"]);
        assert!(!ended.stdout.contains(['\x1b', '\0']), "{ended:?}");
        for line in ended.stdout.lines().skip(1) {
            assert!(line.len() < 250, "{line}");
        }
        let text = fs::read_to_string(&svg).unwrap();
        assert!(!text.contains(['\x1b', '\0', '\u{ffff}']) && !text.contains("<b>"), "{text}");
        assert!(!text.contains("NaN") && text.len() < 100_000, "{to}");
        assert!(colours_of(&png).len() > 2, "{to}");
    }
}

#[test]
fn a_hundred_thousand_layers() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (profile, svg) = (path("profile.yaml"), path("plan.svg"));
    let layers: Vec<String> = (0..100_000_u64)
        .map(|layer| {
            let (bytes, us) = (layer * 7919 % 40_000, layer * 104_729 % 1000);
            format!("{{\"name\": \"l{layer}\", \"bytes\": {bytes}, \"compute_us\": 0.{us:03}}}")
        })
        .collect();
    let link = "{\"bandwidth_bytes_per_s\": 55.5e9, \"per_copy_us\": 2.5, \"per_wait_us\": 1}";
    let text = format!("{{\"model\": \"long\", \"link\": {link}, \"layers\": [{}]}}", layers.join(","));
    fs::write(&profile, text).unwrap();
    let optimal = command(&["plan-groups", "--profile", &profile, "--search-limit-s", "1", "--plot", &svg]);
    assert_ended(&optimal, 0, &["long: 100000 layers in ", "keep "]);
    let per_layer = [
        "plan-groups",
        "--profile",
        &profile,
        "--algorithm",
        "per-layer",
        "--format",
        "json",
        "--plot",
        &svg,
    ];
    assert_ended(&command(&per_layer), 0, &["\"last_layer\": 99999"]);
    // What is too short to be seen is not drawn.
    assert!(fs::metadata(&svg).unwrap().len() < 1_000_000);
}
