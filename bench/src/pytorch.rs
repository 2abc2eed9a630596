//! PyTorch itself, measured by a Python process that has ended when its numbers are here.

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, ensure};
use pswitch_device::DeviceId;
use serde::de::DeserializeOwned;

use crate::progress;
use crate::subject::Served;

/// Runs a module over archives on a device, says what it says of how far it is, and reads what it prints in the end.
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
    let child = command.args(archives).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let mut child = child.with_context(|| format!("cannot start {}", python.display()))?;
    let said = child.stderr.take();
    let says = std::thread::spawn(move || {
        let lines = said.into_iter().flat_map(|said| BufReader::new(said).split(b'\n'));
        lines.map_while(Result::ok).for_each(|line| progress::say(String::from_utf8_lossy(&line)));
    });
    let output = child.wait_with_output().context("cannot wait for a process")?;
    // What it said comes before what is said of it.
    let _ = says.join();
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
