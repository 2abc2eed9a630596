//! `cargo xtask fixtures`: models with reference outputs, made by `pswitch.fixtures`.

use anyhow::Result;

use crate::root::Root;
use crate::{commands, setup};

/// Sets up and makes those that are missing or out of date.
pub(crate) fn run(root: &Root, names: &[String], force: bool) -> Result<()> {
    setup::run(root)?;
    make(root, names, force)
}

/// Makes those that are missing or out of date.
pub(crate) fn make(root: &Root, names: &[String], force: bool) -> Result<()> {
    let mut command = commands::python(root);
    command.args(["-m", "pswitch.fixtures", "--out"]).arg(root.fixtures());
    command.arg("--training").arg(root.training_fixtures());
    if !names.is_empty() {
        command.arg("--only").args(names);
    }
    if force {
        command.arg("--force");
    }
    commands::run(&mut command)
}
