//! Configurations of tasks: what is read, what is refused, and in which words.

use std::error::Error;
use std::fs;
use std::path::PathBuf;

use pswitch_train::{
    CheckpointConfig, DataConfig, Length, Optimizer, OptimizerKind, Schedule, TaskConfig, TrainError,
};

/// The keys that must be there.
const LEAST: &str = "
program: net.pt2
optimizer: {kind: sgd, lr: 1}
data: {files: [x.npy], batch_size: 4}
length: {steps: 100}
";

/// `LEAST` with one line in the place of that of the same key, or behind it.
fn with(line: &str) -> String {
    let key = line.split(':').next().unwrap();
    let mut lines: Vec<_> = LEAST.lines().filter(|other| !other.starts_with(&format!("{key}:"))).collect();
    lines.push(line);
    lines.join("\n")
}

fn read(line: &str) -> TaskConfig {
    TaskConfig::from_yaml(&with(line)).unwrap_or_else(|error| panic!("{line}: {error}: {:?}", error.source()))
}

#[track_caller]
fn refused_setting(line: &str, expected: &str) {
    match TaskConfig::from_yaml(&with(line)) {
        Err(TrainError::Setting { setting, .. }) => assert_eq!(setting, expected, "{line}"),
        other => panic!("{line}: {other:?}"),
    }
}

#[track_caller]
fn refused_text(line: &str, expected: &str) {
    match TaskConfig::from_yaml(&with(line)) {
        Err(error @ TrainError::ConfigText(_)) => {
            let source = error.source().unwrap().to_string();
            assert!(source.contains(expected), "{line}: {source}");
            assert!(!error.to_string().contains(&source));
        }
        other => panic!("{line}: {other:?}"),
    }
}

#[test]
fn what_is_left_out_has_pytorchs_defaults() {
    let config = TaskConfig::from_yaml(LEAST).unwrap();
    let (momentum, dampening, nesterov, weight_decay) = (0.0, 0.0, false, 0.0);
    let expected = TaskConfig {
        program: PathBuf::from("net.pt2"),
        optimizer: Optimizer::Sgd { lr: 1.0, momentum, dampening, nesterov, weight_decay },
        schedule: Schedule::Constant {},
        clip_norm: None,
        accumulate: 1,
        data: DataConfig::Files {
            files: vec![PathBuf::from("x.npy")],
            batch_size: 4,
            shuffle: true,
            drop_last: false,
        },
        length: Length::Steps(100),
        seed: 0,
        checkpoint: None,
        weight: 1.0,
        run_ahead_us: None,
        deterministic: false,
        log_every_steps: 10,
    };
    assert_eq!(config, expected);

    let (lr, betas, eps) = (1e-3, [0.9, 0.999], 1e-8);
    let adam = read("optimizer: {kind: adam, lr: 1e-3}").optimizer;
    assert_eq!(adam, Optimizer::Adam { lr, betas, eps, weight_decay: 0.0 });
    let adamw = read("optimizer: {kind: adamw, lr: 1e-3}").optimizer;
    assert_eq!(adamw, Optimizer::AdamW { lr, betas, eps, weight_decay: 0.01 });
    assert_eq!((adamw.kind(), adamw.learning_rate()), (OptimizerKind::AdamW, 1e-3));
}

#[test]
fn every_key_is_read_and_written_alike() {
    let text = "
program: net
optimizer: {kind: adamw, lr: 3e-4, betas: [0.8, 0.95], eps: 1e-6, weight_decay: 0.1}
schedule: {kind: cosine, warm_up: 20, floor: 1e-5}
clip_norm: 1.0
accumulate: 4
data: {synthetic: {rows: 1000, batch_size: 16}}
length: {epochs: 3}
seed: 18446744073709551615
checkpoint: {folder: kept, every_steps: 50}
weight: 2.5
run_ahead_us: 0
deterministic: true
log_every_steps: 1
";
    let config = TaskConfig::from_yaml(text).unwrap();
    assert_eq!(config.schedule, Schedule::Cosine { warm_up: 20, floor: 1e-5 });
    assert_eq!(config.data, DataConfig::Synthetic { rows: 1000, batch_size: 16 });
    assert_eq!((config.length, config.seed, config.accumulate), (Length::Epochs(3), u64::MAX, 4));
    let checkpoint = CheckpointConfig { folder: PathBuf::from("kept"), every_steps: 50, keep: 2 };
    assert_eq!(config.checkpoint, Some(checkpoint));
    assert_eq!((config.clip_norm, config.weight, config.log_every_steps), (Some(1.0), 2.5, 1));
    assert_eq!((config.run_ahead_us, config.deterministic), (Some(0), true));

    for config in
        [config, TaskConfig::from_yaml(LEAST).unwrap(), read("schedule: {kind: step, every: 9, factor: 0.5}")]
    {
        let written = serde_yaml::to_string(&config).unwrap();
        assert_eq!(TaskConfig::from_yaml(&written).unwrap(), config, "{written}");
    }
}

#[test]
fn unknown_and_missing_keys_are_refused() {
    for (line, expected) in [
        ("sead: 3", "unknown field `sead`"),
        ("optimizer: {kind: sgd, lr: 1, betas: [0.9, 0.9]}", "unknown field `betas`"),
        ("optimizer: {kind: adam, lr: 1, momentum: 0.9}", "unknown field `momentum`"),
        ("optimizer: {kind: lion, lr: 1}", "unknown variant `lion`"),
        ("optimizer: {kind: sgd}", "missing field `lr`"),
        ("optimizer: {lr: 1}", "missing field `kind`"),
        ("schedule: {kind: constant, every: 3}", "unknown field `every`"),
        ("schedule: {kind: step, every: 3}", "missing field `factor`"),
        ("length: {steps: 3, epochs: 3}", "exactly one"),
        ("length: {}", "exactly one"),
        ("length: {days: 3}", "unknown field `days`"),
        ("length: {steps: -3}", "integer `-3`"),
        ("data: {}", "exactly one"),
        ("data: {files: [a.npy], synthetic: {rows: 1, batch_size: 1}}", "exactly one"),
        ("data: {files: [a.npy]}", "needs a `batch_size`"),
        ("data: {synthetic: {rows: 8, batch_size: 2}, shuffle: true}", "no other key"),
        ("data: {synthetic: {rows: 8}}", "missing field `batch_size`"),
        ("checkpoint: {folder: f, every_steps: 1, kept: 1}", "unknown field `kept`"),
        ("accumulate: 4294967296", "integer `4294967296`"),
    ] {
        refused_text(line, expected);
    }
    for key in ["program", "optimizer", "data", "length"] {
        let text: Vec<_> = LEAST.lines().filter(|line| !line.starts_with(key)).collect();
        let error = TaskConfig::from_yaml(&text.join("\n")).unwrap_err();
        assert!(error.source().unwrap().to_string().contains(&format!("missing field `{key}`")));
    }
}

#[test]
fn errors_in_sections_say_where() {
    // The line comes last, in the place of another of its key or behind the four of them.
    for (line, expected) in [
        ("schedule: {kind: constant, warm_up: 5}", "schedule: unknown field `warm_up`"),
        ("schedule: {kind: step, every: 3}", "schedule: missing field `factor`"),
        (
            "optimizer: {kind: adam, lr: 1, beta: [0, 0]}",
            "optimizer: unknown field `beta`, expected one of `lr`",
        ),
        ("optimizer: {kind: sgd, lr: abc}", "optimizer: invalid type: string \"abc\""),
        ("optimizer: {kind: sgd, lr: 1, lr: 2}", "optimizer: duplicate field `lr`"),
        ("optimizer: {kind: lion, lr: 1}", "optimizer.kind: unknown variant `lion`"),
        ("optimizer:", "optimizer: missing field `kind`"),
        ("length: {steps: 3, epochs: 3}", "length: it is either `steps` or `epochs`"),
        ("length:", "length: it is either `steps` or `epochs`"),
        ("length: {days: 3}", "length: unknown field `days`"),
        ("length: {steps: -3}", "length.steps: invalid type: integer `-3`"),
        ("data: {files: [a.npy]}", "data: `files` needs a `batch_size`"),
        ("data: {}", "data: it is either `files` or `synthetic`"),
        ("data: {synthetic: {rows: 8}}", "data.synthetic: missing field `batch_size`"),
        ("checkpoint: {folder: f}", "checkpoint: missing field `every_steps`"),
    ] {
        let last = with(line).lines().count();
        let error = TaskConfig::from_yaml(&with(line)).unwrap_err().source().unwrap().to_string();
        assert!(error.starts_with(expected), "{line}: {error}");
        assert!(error.contains(&format!(" at line {last} column ")), "{line}: {error}");
    }
}

#[test]
fn an_empty_configuration_is_told_to_be_empty() {
    for text in ["", "\n", "# Only a comment.\n", "---\n", "null"] {
        let error = TaskConfig::from_yaml(text).unwrap_err().source().unwrap().to_string();
        let expected = "it is empty, expected a mapping with `program`, `optimizer`, `data` and `length`";
        assert_eq!(error, expected, "{text:?}");
    }
}

#[test]
fn what_is_no_mapping_is_told_the_keys_that_are_expected() {
    for (line, expected) in [
        ("optimizer: sgd", "optimizer: invalid type: string \"sgd\", expected a mapping with `kind`"),
        ("schedule: constant", "expected a mapping with `kind` at line "),
        ("length: 5", "expected a mapping with `steps` or `epochs` at line "),
        ("data: x.npy", "expected a mapping with `files` and `batch_size`, or with `synthetic` at"),
        ("data: {synthetic: 8}", "expected a mapping with `rows` and `batch_size` at line "),
        ("checkpoint: f", "expected a mapping with `folder` and `every_steps` at line "),
    ] {
        refused_text(line, expected);
    }
    let error = TaskConfig::from_yaml("[program]").unwrap_err().source().unwrap().to_string();
    let expected = "expected a mapping with `program`, `optimizer`, `data` and `length`";
    assert!(error.ends_with(expected), "{error}");
}

#[test]
fn values_are_held_to_the_rules_of_pytorch() {
    for (line, setting) in [
        ("program:", "program"),
        ("program: ''", "program"),
        ("optimizer: {kind: sgd, lr: -1}", "optimizer.lr"),
        ("optimizer: {kind: sgd, lr: .nan}", "optimizer.lr"),
        ("optimizer: {kind: sgd, lr: .inf}", "optimizer.lr"),
        ("optimizer: {kind: sgd, lr: 1, momentum: -0.1}", "optimizer.momentum"),
        ("optimizer: {kind: sgd, lr: 1, dampening: .nan}", "optimizer.dampening"),
        ("optimizer: {kind: sgd, lr: 1, weight_decay: -1}", "optimizer.weight_decay"),
        ("optimizer: {kind: sgd, lr: 1, nesterov: true}", "optimizer.nesterov"),
        (
            "optimizer: {kind: sgd, lr: 1, nesterov: true, momentum: 0.9, dampening: 0.1}",
            "optimizer.nesterov",
        ),
        ("optimizer: {kind: adam, lr: 1, betas: [1.0, 0.9]}", "optimizer.betas"),
        ("optimizer: {kind: adam, lr: 1, betas: [0.9, -0.1]}", "optimizer.betas"),
        ("optimizer: {kind: adamw, lr: 1, betas: [0.9, .nan]}", "optimizer.betas"),
        ("optimizer: {kind: adamw, lr: 1, eps: -1e-8}", "optimizer.eps"),
        ("optimizer: {kind: adamw, lr: 1, weight_decay: -1}", "optimizer.weight_decay"),
        ("schedule: {kind: step, every: 0, factor: 0.1}", "schedule.every"),
        ("schedule: {kind: step, every: 1, factor: 0}", "schedule.factor"),
        ("schedule: {kind: cosine, floor: -1}", "schedule.floor"),
        ("schedule: {kind: cosine, floor: 1.5}", "schedule.floor"),
        ("clip_norm: 0", "clip_norm"),
        ("accumulate: 0", "accumulate"),
        ("data: {files: [], batch_size: 1}", "data.files"),
        ("data: {files: [x.npy], batch_size: 0}", "data.batch_size"),
        ("data: {synthetic: {rows: 0, batch_size: 1}}", "data.synthetic.rows"),
        ("data: {synthetic: {rows: 1, batch_size: 0}}", "data.synthetic.batch_size"),
        ("length: {steps: 0}", "length.steps"),
        ("length: {epochs: 0}", "length.epochs"),
        ("checkpoint: {folder: '', every_steps: 1}", "checkpoint.folder"),
        ("checkpoint: {folder: f, every_steps: 0}", "checkpoint.every_steps"),
        ("checkpoint: {folder: f, every_steps: 1, keep: 0}", "checkpoint.keep"),
        ("weight: 0", "weight"),
        ("weight: .inf", "weight"),
        ("log_every_steps: 0", "log_every_steps"),
    ] {
        refused_setting(line, setting);
    }
    // What PyTorch takes, as strange as it is.
    for line in [
        "optimizer: {kind: sgd, lr: 0}",
        "optimizer: {kind: sgd, lr: 1, momentum: 1.5, dampening: -1}",
        "optimizer: {kind: sgd, lr: 1, momentum: 0.9, nesterov: true}",
        "optimizer: {kind: adam, lr: 1, betas: [0, 0], eps: 0}",
    ] {
        read(line);
    }
}

#[test]
fn what_libtorch_takes_as_a_float_must_fit_one() {
    for (line, setting) in [
        ("optimizer: {kind: sgd, lr: 1e308}", "optimizer.lr"),
        ("optimizer: {kind: sgd, lr: 3.41e38}", "optimizer.lr"),
        ("optimizer: {kind: sgd, lr: 1, momentum: 1e39}", "optimizer.momentum"),
        ("optimizer: {kind: sgd, lr: 1, dampening: -1e39}", "optimizer.dampening"),
        ("optimizer: {kind: sgd, lr: 1, weight_decay: 1e39}", "optimizer.weight_decay"),
        ("optimizer: {kind: adam, lr: 1, weight_decay: 1e39}", "optimizer.weight_decay"),
        ("optimizer: {kind: adamw, lr: 1, eps: 1e39}", "optimizer.eps"),
        // What is computed of them: the size of the first step, and the share of a parameter that is left.
        ("optimizer: {kind: adam, lr: 1e38}", "optimizer.lr"),
        ("optimizer: {kind: adamw, lr: 1e20, weight_decay: 1e20}", "optimizer.weight_decay"),
        ("clip_norm: 1e39", "clip_norm"),
        ("schedule: {kind: step, every: 1, factor: 10}", "schedule.factor"),
    ] {
        refused_setting(line, setting);
    }
    for line in [
        "optimizer: {kind: sgd, lr: 3.4e38, momentum: 3.4e38, dampening: -3.4e38, weight_decay: 3.4e38}",
        "optimizer: {kind: adam, lr: 1e37, eps: 1e-300, weight_decay: 3.4e38}",
        "clip_norm: 3.4e38",
        "schedule: {kind: step, every: 3, factor: 10}",
    ] {
        read(line);
    }
    let config = read("length: {epochs: 1}");
    let config = TaskConfig { schedule: Schedule::Step { every: 1, factor: 10.0 }, ..config };
    assert_eq!(config.total_steps(39).unwrap(), 39);
    assert!(matches!(config.total_steps(40), Err(TrainError::Setting { setting: "schedule.factor", .. })));

    let error = TaskConfig::from_yaml(&with("optimizer: {kind: sgd, lr: 1e308}")).unwrap_err();
    let expected =
        "the task's `optimizer.lr` is 1e308: it must be within 3.4028234e38 of 0, as 32-bit floats are";
    assert_eq!(error.to_string(), expected);
}

#[test]
fn an_error_says_what_was_found_and_what_is_needed() {
    let error = TaskConfig::from_yaml(&with("optimizer: {kind: sgd, lr: -0.5}")).unwrap_err();
    assert_eq!(error.to_string(), "the task's `optimizer.lr` is -0.5: it must be finite and not negative");
}

#[test]
fn steps_are_counted_over_epochs_and_batches() {
    let config = |length: &str, accumulate: u32| TaskConfig { accumulate, ..read(length) };
    assert_eq!(config("length: {steps: 7}", 3).total_steps(1000).unwrap(), 7);
    assert_eq!(config("length: {epochs: 3}", 1).total_steps(10).unwrap(), 30);
    assert_eq!(config("length: {epochs: 3}", 4).total_steps(10).unwrap(), 8);
    let epochs = u64::MAX / 2;
    let config = config(&format!("length: {{epochs: {epochs}}}"), 1);
    assert!(matches!(config.total_steps(3), Err(TrainError::TooManySteps { .. })));
}

#[test]
fn a_warm_up_fits_into_the_task() {
    let text = with("schedule: {kind: cosine, warm_up: 101}");
    let error = TaskConfig::from_yaml(&text).unwrap_err();
    assert!(matches!(error, TrainError::WarmUpTooLong { warm_up: 101, total_steps: 100 }));
    read("schedule: {kind: cosine, warm_up: 100}");

    // Of a task that is as long as its data, this is known only with them.
    let config = TaskConfig { length: Length::Epochs(1), ..TaskConfig::from_yaml(LEAST).unwrap() };
    let config = TaskConfig { schedule: Schedule::Cosine { warm_up: 101, floor: 0.0 }, ..config };
    config.validate().unwrap();
    assert!(matches!(config.total_steps(100), Err(TrainError::WarmUpTooLong { .. })));
    assert_eq!(config.total_steps(101).unwrap(), 101);
}

#[test]
fn paths_of_a_file_are_taken_from_its_folder() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("task.yaml");
    let text = format!("{LEAST}\ncheckpoint: {{folder: /elsewhere, every_steps: 5}}\n");
    fs::write(&path, text).unwrap();
    let config = TaskConfig::open(&path).unwrap();
    assert_eq!(config.program, folder.path().join("net.pt2"));
    assert_eq!(config.checkpoint.unwrap().folder, PathBuf::from("/elsewhere"));
    let DataConfig::Files { files, .. } = config.data else { panic!() };
    assert_eq!(files, [folder.path().join("x.npy")]);

    let absent = TaskConfig::open(&folder.path().join("absent.yaml")).unwrap_err();
    assert!(matches!(absent, TrainError::Io { action: "read", .. }));
}
