//! PyTorch itself, measured by a Python process that has ended when its numbers are here.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, ensure};
use pswitch_device::DeviceId;
use serde::de::DeserializeOwned;

use crate::subject::Served;

/// Runs a module over archives on a device, and reads what it prints.
pub(crate) fn run<T: DeserializeOwned>(
    python: &Path,
    module: &str,
    served: Served,
    arguments: &[&str],
    archives: &[&Path],
) -> anyhow::Result<T> {
    let mut command = Command::new(python);
    command.args(["-m", module]).args(arguments).arg("--device");
    match served.device {
        DeviceId::Host(_) => command.args(["cpu", "--threads", &served.threads.to_string()]),
        DeviceId::Cuda(_) => command.arg(served.device.to_string()),
    };
    let output = command.args(archives).stderr(Stdio::inherit()).output();
    let output = output.with_context(|| format!("cannot start {}", python.display()))?;
    ensure!(
        output.status.success(),
        "{} -m {module} failed ({}); is PYTHONPATH python/src?",
        python.display(),
        output.status
    );
    parse(module, &output.stdout)
}

/// What a module has printed.
pub(crate) fn parse<T: DeserializeOwned>(module: &str, printed: &[u8]) -> anyhow::Result<T> {
    serde_json::from_slice(printed).with_context(|| format!("{module} prints what was not expected"))
}

/// A module's name for an archive: of its folder, if it is called as in a repository, else its own.
pub(crate) fn name(archive: &Path) -> Option<String> {
    let named =
        if archive.file_name()? == "model.pt2" { archive.parent()?.file_name() } else { archive.file_stem() };
    Some(named?.to_string_lossy().into_owned())
}
