//! The training task that runs beside what is measured.

use std::path::Path;

use anyhow::{Context as _, ensure};
use pswitch_train::{Length, TaskConfig};

/// What is trained by default: a configuration over what `cargo xtask fixtures` has made.
const DEFAULT: &str = "
program: target/training/resnet18
optimizer: {kind: sgd, lr: 0.05, momentum: 0.9}
length: {steps: 1000000000}
data: {files: [target/training/resnet18/data.safetensors], batch_size: 8}
";

/// The task of a file, or the default one: [endless].
pub(crate) fn open(file: Option<&Path>) -> anyhow::Result<TaskConfig> {
    endless(file, DEFAULT)
}

/// The task of a file, or of a text: it goes on for as long as it is measured, and leaves nothing behind.
pub(crate) fn endless(file: Option<&Path>, text: &str) -> anyhow::Result<TaskConfig> {
    let mut config = read(file, text)?;
    config.length = Length::Steps(u64::MAX >> 1);
    config.checkpoint = None;
    Ok(config)
}

/// The task of a file, or of a text; paths in it are those of the working directory then.
pub(crate) fn read(file: Option<&Path>, text: &str) -> anyhow::Result<TaskConfig> {
    let config = match file {
        Some(file) => TaskConfig::open(file),
        None => TaskConfig::from_yaml(text),
    };
    let config = config.context("the task means nothing")?;
    let program = config.archive();
    ensure!(program.exists(), "{} is missing: run `cargo xtask fixtures`", program.display());
    Ok(config)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_task_means_something() {
        let config = TaskConfig::from_yaml(DEFAULT).unwrap();
        assert_eq!(config.program, Path::new("target/training/resnet18"));
    }
}
