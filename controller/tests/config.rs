//! What a configuration file may say, and how a mistake in it is told.

use std::error::Error as _;
use std::path::Path;
use std::time::Duration;

use pswitch_controller::{Config, ConfigOverrides, ControllerError, DeviceChoice, DeviceConfig, SizeSetting};
use pswitch_device::DeviceId;
use pswitch_transfer::Algorithm;

const EXAMPLE: &str = include_str!("../examples/server.yaml");

fn parse(text: &str) -> Result<Config, ControllerError> {
    Config::parse("server.yaml", text)
}

/// The error with its source, as the binary prints it.
fn message(text: &str) -> String {
    let error = parse(text).expect_err(text);
    error.source().map_or_else(|| error.to_string(), |source| format!("{error}: {source}"))
}

#[test]
fn the_example_shows_the_defaults() {
    let example = parse(EXAMPLE).unwrap();
    let device = &example.devices[0];
    assert_eq!(device.id, DeviceChoice::Id(DeviceId::Host(0)));
    assert_eq!(device.pool_bytes(DeviceId::Host(0), 1 << 40, 1 << 40, 1 << 40), 2 << 30);
    assert_eq!(device.arena_bytes(1 << 40), 512 << 20);
    assert_eq!(device.training_size, DeviceConfig::default().training_size);
    assert_eq!(device.link.throttle().bandwidth_bytes_per_s, Some(4e9));
    assert_eq!(device.link.throttle().per_copy, Duration::from_nanos(2500));
    let defaults = Config::default();
    assert_eq!(Config { devices: defaults.devices.clone(), ..example }, defaults);
}

#[test]
fn the_example_names_every_key() {
    // A key that the example lacks would show here: each struct lists what it expects when it meets another.
    let keys = |text: &str| {
        let message = message(text);
        let expected = message.split_once("expected one of ").map(|(_, keys)| keys.to_owned());
        let keys = expected.unwrap_or_else(|| message.split_once("expected ").unwrap().1.to_owned());
        keys.split('`').skip(1).step_by(2).map(str::to_owned).collect::<Vec<_>>()
    };
    for (text, least) in [
        ("x: 1", 2),
        ("devices:\n  - x: 1", 2),
        ("devices:\n  - link:\n      x: 1", 2),
        ("http:\n  x: 1", 2),
        ("limits:\n  x: 1", 2),
        ("training:\n  x: 1", 1),
    ] {
        let keys = keys(text);
        assert!(keys.len() >= least, "{text}: {keys:?}");
        for key in keys {
            let shown = EXAMPLE
                .lines()
                .any(|line| line.trim_start_matches([' ', '-']).starts_with(&format!("{key}:")));
            assert!(shown, "{key} is not in the example");
        }
    }
}

#[test]
fn nothing_is_the_default() {
    assert_eq!(parse("").unwrap(), Config::default());
    assert_eq!(parse("# nothing yet\n").unwrap(), Config::default());
    assert_eq!(Config::load(None, ConfigOverrides::default()).unwrap(), Config::default());
}

#[test]
fn mistakes_are_told_with_their_place_and_what_is_allowed() {
    for (text, expected) in [
        (
            "devices:\n  - id: gpu",
            "devices[0].id: invalid value: string \"gpu\", expected auto, host, host:N or cuda:N at line 2 column 9",
        ),
        (
            "devices:\n  - id: host\n    workers: 1",
            "devices[0].workers: invalid value: integer `1`, expected a number from 2 to 64 at line 3 column 14",
        ),
        (
            "devices:\n  - pool_size: 8 apples",
            "expected auto or a size such as 8GiB, 512MiB, 1.5GB or a plain number of bytes at line 2 column 16",
        ),
        ("devices:\n  - pool_size: -5", "at line 2 column 16"),
        (
            "devices:\n  - training_size: auto",
            "devices[0].training_size: invalid value: string \"auto\", expected a size such as 8GiB",
        ),
        (
            "devices:\n  - link: {bandwidth: 0GB/s}",
            "expected a bandwidth such as 1GB/s, 55.5GB/s or 800MiB/s at line 2 column 23",
        ),
        (
            "devices:\n  - link:\n      per_copy_us: .nan",
            "expected a number of microseconds from 0 to 86400000000 at line 3 column 20",
        ),
        (
            "http:\n  address: localhost",
            "expected an address and a port such as 127.0.0.1:8000 or [::1]:8000 at line 2 column 12",
        ),
        (
            "limits:\n  max_wait_ms: 1.5",
            "expected a number of milliseconds from 0 to 86400000 at line 2 column 16",
        ),
        (
            "limits:\n  execution_timeout_ms: 0",
            "expected a number of milliseconds from 1 to 86400000 at line 2 column 25",
        ),
        ("limits:\n  attempts: -1", "expected a number from 1 to 100 at line 2 column 13"),
        (
            "plan: best",
            "expected one of optimal, paper, per-layer, whole, sequential, equal-N at line 1 column 7",
        ),
        (
            "homes: rented",
            "unknown variant `rented`, expected `fixed` or `least-recently-used` at line 1 column 8",
        ),
        (
            "profile_cache: often",
            "profile_cache: invalid type: string \"often\", expected a boolean at line 1 column 16",
        ),
        (
            "training:\n  tasks:\n    ../etc: a.yaml",
            "training.tasks: invalid value: string \"../etc\", expected a name of a task: letters, digits, '.', '_' and \
             '-' at line 3 column 5",
        ),
        (
            "training:\n  tasks: {bert: ''}",
            "training.tasks.bert: invalid value: string \"\", expected the file of a task's configuration at line 2 \
             column 17",
        ),
        ("training:\n  tasks:\n    - a.yaml", "expected a map of names of tasks to files"),
        ("training: {tasks: {bert: a.yaml, bert: b.yaml}}", "duplicate task `bert`"),
        ("training:\n  task: 1", "unknown field `task`, expected `tasks` at line 2 column 3"),
        ("log: ''", "expected a text at line 1 column 6"),
        ("\n\nport: 80", "unknown field `port`, expected one of `repository`, `devices`, `http`"),
        ("\n\nport: 80", "at line 3 column 1"),
        ("limits: {queue: 1, queue: 2}", "duplicate field `queue`"),
        ("devices: [", "at line 2 column 1"),
    ] {
        let message = message(text);
        assert!(message.contains("server.yaml"), "{text}: {message}");
        assert!(message.contains(expected), "{text}: {message}");
    }
}

#[test]
fn contradictions_are_told_with_their_keys() {
    for (text, expected) in [
        ("devices: []", "devices: there must be at least one"),
        ("devices: [{id: host}, {id: \"host:0\"}]", "devices[1].id: host is there already"),
        (
            "devices: [{arenas: 2, workers: 2}]",
            "devices[0].workers: 2 given; 2 at work and at least one on standby",
        ),
        (
            "devices: [{pool_size: 1GiB, arena_size: 512MiB, arenas: 2, workers: 3}]",
            "devices[0].arena_size: 2 of 512MiB leave nothing of a pool of 1GiB",
        ),
        (
            "devices: [{pool_size: 1GiB, arena_size: 256MiB, training_size: 768MiB}]",
            "devices[0].training_size: 768MiB beside the arenas leaves nothing of a pool of 1GiB",
        ),
        (
            "devices: [{training_size: 1GiB, training_share: 0.95}]",
            "devices[0].training_share: 0.95 is not between 0 and 0.9",
        ),
        (
            "devices: [{training_size: 1GiB, training_share: .nan}]",
            "devices[0].training_share: NaN is not between 0 and 0.9",
        ),
        ("devices: [{training_gives_way: true}]", "devices[0].training_gives_way: there is no training_size"),
        ("devices: [{training_share: 0.2}]", "devices[0].training_share: there is no training_size"),
        (
            "devices: [{pool_size: 1GiB, training_size: 2GiB}]",
            "devices[0].training_size: 2GiB beside the arenas leaves nothing of a pool of 1GiB",
        ),
        ("devices: [{pool_size: 0}]", "devices[0].pool_size: it must be more than 0"),
        ("devices: [{arena_size: 0}]", "devices[0].arena_size: it must be more than 0"),
        (
            "devices: [{id: \"cuda:0\", link: {bandwidth: 1GB/s}}]",
            "devices[0].link: the link of cuda:0 is real",
        ),
        (
            "slot_memory_size: 1MiB",
            "slot_memory_size: 1MiB cannot hold a request of http.max_body_size, 256MiB",
        ),
        ("http: {max_body_size: 0}", "http.max_body_size: it must be more than 0"),
    ] {
        let message = message(text);
        assert!(message.contains(expected), "{text}: {message}");
    }
}

#[test]
fn a_file_that_is_not_there_is_named() {
    let error =
        Config::load(Some(Path::new("/nowhere/server.yaml")), ConfigOverrides::default()).unwrap_err();
    assert_eq!(error.to_string(), "cannot read the configuration /nowhere/server.yaml");
}

#[test]
fn flags_go_before_the_file() {
    let overrides = ConfigOverrides {
        repository: Some("elsewhere".into()),
        pool_size: Some("3GiB".parse().unwrap()),
        workers: Some(4),
        link_bandwidth: Some("1GB/s".parse().unwrap()),
        http_address: Some("0.0.0.0:9000".parse().unwrap()),
        plan: Some(Algorithm::Whole),
        profile_cache: Some(false),
        ..ConfigOverrides::default()
    };
    let config = parse(EXAMPLE).unwrap().with(overrides).unwrap();
    assert_eq!(config.repository, Path::new("elsewhere"));
    assert_eq!(config.http.address.port(), 9000);
    assert_eq!(config.plan, Algorithm::Whole);
    assert!(!config.profile_cache);
    let device = &config.devices[0];
    assert_eq!((device.workers, device.pool_size.to_string().as_str()), (4, "3GiB"));
    assert_eq!(device.link.throttle().bandwidth_bytes_per_s, Some(1e9));
    assert_eq!(device.link.per_copy, Duration::from_nanos(2500), "what no flag names stays");
}

#[test]
fn tasks_come_from_the_file_and_from_flags() {
    let text = "training:\n  tasks:\n    bert: tasks/bert.yaml\n    resnet: tasks/resnet.yaml\n";
    let config = parse(text).unwrap();
    let flags = |training_size: &str, tasks: &[(&str, &str)]| ConfigOverrides {
        training_size: Some(training_size.parse().unwrap()),
        training_tasks: tasks.iter().map(|(name, file)| ((*name).to_owned(), file.into())).collect(),
        ..ConfigOverrides::default()
    };
    let with = config.clone().with(flags("1GiB", &[("resnet", "other.yaml"), ("vit", "vit.yaml")])).unwrap();
    assert_eq!(with.devices[0].training_size.bytes(), 1 << 30);
    let tasks: Vec<_> =
        with.training.tasks.iter().map(|(name, file)| (name.as_str(), file.to_str().unwrap())).collect();
    assert_eq!(tasks, [("bert", "tasks/bert.yaml"), ("resnet", "other.yaml"), ("vit", "vit.yaml")]);

    for (overrides, expected) in [
        (ConfigOverrides::default(), "training.tasks: no device has a training_size"),
        (flags("0", &[]), "training.tasks: no device has a training_size"),
        (flags("1GiB", &[("vit", "a"), ("vit", "b")]), "training.tasks: \"vit\" is given twice"),
        (flags("1GiB", &[("-vit", "a")]), "training.tasks.-vit: it must begin with a letter or a digit"),
        (flags("1GiB", &[("vit", "")]), "training.tasks.vit: there is no file"),
    ] {
        let error = config.clone().with(overrides).unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
    }
}

#[test]
fn a_device_flag_leaves_that_device_alone() {
    let config = parse("devices: [{id: host, workers: 3}, {id: \"host:1\"}]").unwrap();
    let only = |text: &str| {
        let device = Some(text.parse().unwrap());
        config.clone().with(ConfigOverrides { device, ..ConfigOverrides::default() }).unwrap().devices
    };
    assert_eq!(only("host"), [config.devices[0].clone()]);
    let id = DeviceChoice::Id(DeviceId::Cuda(1));
    assert_eq!(only("cuda:1"), [DeviceConfig { id, ..DeviceConfig::default() }]);
}

#[test]
fn flags_are_checked_as_the_file_is() {
    let too_few = ConfigOverrides { workers: Some(1), ..ConfigOverrides::default() };
    let error = Config::default().with(too_few).unwrap_err();
    assert!(error.to_string().contains("devices[0].workers: 1 given"), "{error}");
}

#[test]
fn auto_sizes_follow_device_and_models() {
    let device = DeviceConfig::default();
    assert_eq!(device.pool_size, SizeSetting::Auto);
    let gib = 1_u64 << 30;
    assert_eq!(device.arena_bytes(80 * gib), 2 * gib);
    assert_eq!(device.arena_bytes(10 * gib), gib);
    let config = parse("devices: [{pool_size: 4GiB, training_size: 3GiB}]").unwrap();
    assert_eq!(config.devices[0].arena_bytes(80 * gib), gib / 4, "a quarter of what training leaves");
    assert_eq!(device.pool_bytes(DeviceId::Host(0), 64 * gib, 60 * gib, 5 * gib), 5 * gib);
    assert_eq!(device.pool_bytes(DeviceId::Host(0), 64 * gib, 60 * gib, 50 * gib), 32 * gib);
    // Two workers, and one that starts while another still ends.
    assert_eq!(device.pool_bytes(DeviceId::Cuda(0), 80 * gib, 79 * gib, 500 * gib), 76 * gib);
    assert_eq!(device.pool_bytes(DeviceId::Cuda(0), 80 * gib, 30 * gib, 500 * gib), 27 * gib);
    assert_eq!(device.pool_bytes(DeviceId::Cuda(0), 80 * gib, 4 * gib, 500 * gib), 2 * gib);
}
