//! Profiles: what `pswitch profile` measures and writes, and the layer times that `pswitch serve` keeps.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::commands::{assert_ended, command};
use crate::support::{Fixture, Models, Serve, assert_says, pswitch, run};

/// What the server says when it finds times that were kept.
const KEPT: &str = "layer times were kept";

fn profile(model: &Path, arguments: &[&str]) -> crate::support::Ended {
    run(pswitch().arg("profile").arg(model).args(["--device", "host", "--threads", "1"]).args(arguments))
}

fn layers(profile: &Value) -> Vec<(String, u64)> {
    let layer = |layer: &Value| {
        assert!(layer["compute_us"].as_f64().unwrap() >= 0.0, "{layer}");
        (layer["name"].as_str().unwrap().to_owned(), layer["bytes"].as_u64().unwrap())
    };
    profile["layers"].as_array().unwrap().iter().map(layer).collect()
}

#[test]
fn a_profile_is_measured_and_planned() {
    let fixture = Fixture::load("dynamic-batch");
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    // A folder that is only looked at: neither a profile nor anything else is left in it.
    let models = Models::of([&fixture]);
    let model = models.path().join("dynamic-batch");

    let printed = profile(&model, &["--link-bandwidth", "50MB/s", "--link-per-copy-us", "20"]);
    assert_ended(&printed, 0, &["model: \"dynamic-batch\"\nlink: {", "\nlayers:\n  - {\"name\":"]);
    assert_says(
        &printed.stderr,
        &[
            "dynamic-batch on host (",
            "8 layers, ",
            "computing ",
            "link: 0.0",
            " us a copy, ",
            " us a wait, ",
            "off by ",
            "best plan: ",
            "one group for all ",
        ],
    );
    let yaml: Value = serde_yaml::from_str(&printed.stdout).unwrap();
    assert_eq!(layers(&yaml).iter().map(|(_, bytes)| bytes).sum::<u64>(), 8192);
    assert!(yaml["link"]["per_copy_us"].as_f64().unwrap() >= 20.0, "{}", yaml["link"]);

    // The archive itself, as JSON because the file is called so.
    let json = path("profile.json");
    let written = profile(&fixture.archive, &["--out", &json]);
    assert_ended(&written, 0, &[]);
    assert_eq!(written.stdout, "");
    let json_profile: Value = serde_json::from_str(&fs::read_to_string(&json).unwrap()).unwrap();
    assert_eq!(layers(&json_profile), layers(&yaml));
    let json_printed = profile(&model, &["--format", "json"]);
    let json_printed: Value = serde_json::from_str(&json_printed.stdout).unwrap();
    assert_eq!(layers(&json_printed), layers(&yaml));

    let yaml_file = path("profile.yaml");
    fs::write(&yaml_file, &printed.stdout).unwrap();
    for file in [&json, &yaml_file] {
        assert_ended(&command(&["plan-groups", "--profile", file]), 0, &["dynamic-batch: 8 layers in "]);
    }
    let planned = run(pswitch().arg("plan-groups").arg(&model).args([
        "--device",
        "host",
        "--threads",
        "1",
        "--format",
        "json",
    ]));
    assert_ended(&planned, 0, &["\"model\": \"dynamic-batch\"", "\"algorithm\": \"optimal\""]);
    assert_says(&planned.stderr, &["link: ", "off by "]);
    assert_eq!(fs::read_dir(&model).unwrap().count(), 1);
}

#[test]
fn what_cannot_be_profiled_says_why() {
    let folder = tempfile::tempdir().unwrap();
    assert_ended(&profile(folder.path(), &[]), 3, &["there is no", "model.pt2"]);
    let broken = folder.path().join("broken.pt2");
    fs::write(&broken, "PK").unwrap();
    assert_ended(&profile(&broken, &[]), 3, &["cannot read", "broken.pt2"]);
    let good = Fixture::load("dynamic-batch").archive;
    assert_ended(&profile(&good, &["--arena-size", "0"]), 3, &["arena_size: it must be more than 0"]);
    assert_ended(&profile(&good, &["--format", "toml"]), 2, &["--format", "yaml, json"]);
    assert_ended(&profile(&good, &["--out", "/nowhere/p.yaml"]), 1, &["cannot write /nowhere/p.yaml"]);
    // Flags for a measurement beside a file for which nothing is measured.
    let both = command(&["plan-groups", "--profile", "p.yaml", "--threads", "2"]);
    assert_ended(&both, 2, &["--profile", "--threads"]);
    assert_ended(&command(&["plan-groups", "model", "--profile", "p.yaml"]), 2, &["--profile"]);
}

/// The files in which a model's times are kept.
fn kept(models: &Models, name: &str) -> Vec<PathBuf> {
    let Ok(folder) = fs::read_dir(models.path().join(name).join("profiles")) else { return Vec::new() };
    folder.map(|entry| entry.unwrap().path()).collect()
}

/// Serves models once, and returns what the server said and its models.
fn serve_once(models: Models, flags: &[&str]) -> (String, Models) {
    let mut server = Serve::new(models).host(1).flags(flags).start();
    let log = server.log();
    assert_says(&log, &["1 models ready"]);
    let models = std::mem::replace(&mut server.models, Models::new());
    (log, models)
}

#[test]
fn layer_times_are_kept_until_they_fit_no_more() {
    let [first, second] = ["dynamic-batch", "integer-outputs"].map(Fixture::load);
    let beside = |fixture: &Fixture| fixture.archive.parent().unwrap().join("profiles");
    let models = Models::new();
    models.link("m", &first.archive);

    let (log, models) = serve_once(models, &["--no-profile-cache"]);
    assert!(!log.contains(KEPT) && kept(&models, "m").is_empty(), "{log}");

    let (log, models) = serve_once(models, &[]);
    assert!(!log.contains(KEPT), "{log}");
    let [file] = kept(&models, "m").try_into().unwrap();
    let name = file.file_name().unwrap().to_str().unwrap();
    assert!(name.ends_with("-1-threads.yaml") && name.as_bytes()[16] == b'-', "{name}");
    assert_ended(&command(&["plan-groups", "--profile", file.to_str().unwrap()]), 0, &["m: 8 layers"]);
    assert!(!beside(&first).exists(), "beside the link, not where it leads");

    let (log, models) = serve_once(models, &[]);
    assert_says(&log, &[KEPT, name]);
    let (log, models) = serve_once(models, &["--no-profile-cache"]);
    assert!(!log.contains(KEPT), "{log}");

    let good = fs::read_to_string(&file).unwrap();
    fs::write(&file, &good[..good.len() / 2]).unwrap();
    let (log, models) = serve_once(models, &[]);
    assert!(!log.contains(KEPT), "{log}");
    assert_says(&log, &["layer times that are kept there cannot be used"]);
    assert_eq!(fs::read_to_string(&file).unwrap().lines().count(), good.lines().count());

    // Another archive of the name has times of its own; those of the first stay for when it comes back.
    let archive = models.archive("m");
    fs::remove_file(&archive).unwrap();
    symlink(&second.archive, &archive).unwrap();
    let (log, models) = serve_once(models, &[]);
    assert!(!log.contains(KEPT), "{log}");
    assert_eq!(kept(&models, "m").len(), 2);
}

#[test]
fn a_folder_that_cannot_be_written_to_is_served_all_the_same() {
    let models = Models::new();
    models.link("m", &Fixture::load("dynamic-batch").archive);
    let folder = models.path().join("m");
    // The superuser writes where it may not: for it, a file takes the folder's place.
    if nix::unistd::geteuid().is_root() {
        fs::write(folder.join("profiles"), "").unwrap();
    } else {
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o555)).unwrap();
    }
    let (log, models) = serve_once(models, &[]);
    assert!(!log.contains(KEPT) && !log.contains("WARN"), "{log}");
    fs::set_permissions(models.path().join("m"), fs::Permissions::from_mode(0o755)).unwrap();
}
