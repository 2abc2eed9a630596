//! Pythons that may be at hand, and what each of them has.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use serde_json::Value;

/// The release of libtorch that tch 0.24 binds.
pub(crate) const TORCH_VERSION: &str = "2.11.0";
/// The release of torchvision that goes with it.
const TORCHVISION_VERSION: &str = "0.26.0";

/// Tells without importing anything: importing torch takes seconds.
const PROBE: &str = r#"
import importlib.metadata, importlib.util, json, os, runpy, sys, sysconfig

def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None

found = importlib.util.find_spec("torch")
folder = found.submodule_search_locations[0] if found and found.submodule_search_locations else None
torch = None
if folder and os.path.exists(os.path.join(folder, "version.py")):
    torch = runpy.run_path(os.path.join(folder, "version.py"))["__version__"]
header = "include/torch/csrc/api/include/torch/torch.h"
print(json.dumps({
    "executable": sys.executable,
    "version": sys.version_info[:2],
    "can_make_environments": bool(importlib.util.find_spec("venv") and importlib.util.find_spec("ensurepip")),
    "torch": torch,
    "torch_folder": folder,
    "headers": bool(folder and os.path.exists(os.path.join(folder, header))),
    "torchvision": version("torchvision"),
    "packages": sysconfig.get_path("purelib"),
    "sites": [path for path in sys.path if path.endswith(("site-packages", "dist-packages")) and os.path.isdir(path)],
}))
"#;

/// One Python and what it has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Python {
    pub(crate) executable: PathBuf,
    pub(crate) version: (u64, u64),
    pub(crate) can_make_environments: bool,
    /// Version with its build, such as `2.11.0+cu130`.
    pub(crate) torch: Option<String>,
    pub(crate) torch_folder: Option<PathBuf>,
    pub(crate) headers: bool,
    pub(crate) torchvision: Option<String>,
    /// Where it installs packages.
    pub(crate) packages: PathBuf,
    /// Folders of packages that it imports from.
    pub(crate) sites: Vec<PathBuf>,
}

impl Python {
    /// Asks the program what it has.
    pub(crate) fn probe(program: &Path) -> Result<Self> {
        let output = Command::new(program)
            .args(["-c", PROBE])
            .stdin(Stdio::null())
            .output()
            .with_context(|| format!("cannot start {}", program.display()))?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            bail!(
                "{} does not work: {}",
                program.display(),
                said.trim().lines().last().unwrap_or("no message")
            );
        }
        Self::parse(&output.stdout).with_context(|| format!("{} answers strangely", program.display()))
    }

    fn parse(answer: &[u8]) -> Result<Self> {
        let answer: Value = serde_json::from_slice(answer)?;
        let text = |name: &str| answer[name].as_str().map(str::to_owned);
        let flag = |name: &str| answer[name].as_bool().unwrap_or(false);
        Ok(Self {
            executable: text("executable").context("no executable")?.into(),
            version: (
                answer["version"][0].as_u64().context("no version")?,
                answer["version"][1].as_u64().context("no version")?,
            ),
            can_make_environments: flag("can_make_environments"),
            torch: text("torch"),
            torch_folder: text("torch_folder").map(PathBuf::from),
            headers: flag("headers"),
            torchvision: text("torchvision"),
            packages: text("packages").context("no folder of packages")?.into(),
            sites: answer["sites"]
                .as_array()
                .into_iter()
                .flatten()
                .filter_map(Value::as_str)
                .map(PathBuf::from)
                .collect(),
        })
    }

    /// Why its torch cannot be used; None if it can.
    pub(crate) fn why_not_torch(&self) -> Option<String> {
        let Some(torch) = &self.torch else { return Some("no torch".to_owned()) };
        if without_build(torch) != TORCH_VERSION {
            return Some(format!("torch {torch}, not {TORCH_VERSION}"));
        }
        if !self.headers {
            return Some(format!("torch {torch} without its C++ headers"));
        }
        match &self.torchvision {
            Some(version) if without_build(version) == TORCHVISION_VERSION => None,
            Some(version) => Some(format!("torchvision {version}, not {TORCHVISION_VERSION}")),
            // A torchvision from PyPI works with PyPI's torch only, whose build is for CUDA 13.
            None if torch.contains("+cu130") => None,
            None => Some(format!("torch {torch} without the torchvision of the same build")),
        }
    }

    /// Why no virtual environment with torch can be made from it; None if one can.
    pub(crate) fn why_no_environment(&self) -> Option<String> {
        let (major, minor) = self.version;
        if major != 3 || !(10..=14).contains(&minor) {
            return Some(format!("Python {major}.{minor}, and torch {TORCH_VERSION} needs 3.10 to 3.14"));
        }
        if !self.can_make_environments {
            return Some("no venv or ensurepip (Debian and Ubuntu: apt install python3-venv)".to_owned());
        }
        None
    }
}

fn without_build(version: &str) -> &str {
    version.split('+').next().unwrap_or(version)
}

/// The Pythons at hand in the order in which they are asked. One named by the user is the only one.
pub(crate) fn at_hand() -> Vec<PathBuf> {
    let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    if let Some(named) = variable("PSWITCH_PYTHON") {
        return vec![named];
    }
    let active = variable("VIRTUAL_ENV").map(|folder| folder.join("bin/python"));
    active.into_iter().chain(["python3".into(), "python".into()]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn python(torch: Option<&str>, torchvision: Option<&str>) -> Python {
        Python {
            executable: "/usr/bin/python3".into(),
            version: (3, 11),
            can_make_environments: true,
            torch: torch.map(str::to_owned),
            torch_folder: torch.map(|_| "/usr/lib/torch".into()),
            headers: true,
            torchvision: torchvision.map(str::to_owned),
            packages: "/usr/lib".into(),
            sites: vec![],
        }
    }

    #[test]
    fn any_build_of_the_right_torch_will_do() {
        assert_eq!(python(Some("2.11.0+cu130"), None).why_not_torch(), None);
        assert_eq!(python(Some("2.11.0+cpu"), Some("0.26.0+cpu")).why_not_torch(), None);
        assert_eq!(python(Some("2.11.0"), Some("0.26.0")).why_not_torch(), None);
    }

    #[test]
    fn what_is_wrong_with_a_torch_is_said() {
        let why = |torch, torchvision| python(torch, torchvision).why_not_torch().unwrap();
        assert_eq!(why(None, None), "no torch");
        assert_eq!(why(Some("2.10.0+cpu"), None), "torch 2.10.0+cpu, not 2.11.0");
        assert_eq!(
            why(Some("2.11.0+cpu"), None),
            "torch 2.11.0+cpu without the torchvision of the same build"
        );
        assert_eq!(why(Some("2.11.0"), Some("0.25.0")), "torchvision 0.25.0, not 0.26.0");
        let bare = Python { headers: false, ..python(Some("2.11.0"), None) };
        assert_eq!(bare.why_not_torch().unwrap(), "torch 2.11.0 without its C++ headers");
    }

    #[test]
    fn what_keeps_an_environment_from_being_made_is_said() {
        assert_eq!(python(None, None).why_no_environment(), None);
        let old = Python { version: (3, 9), ..python(None, None) };
        assert_eq!(old.why_no_environment().unwrap(), "Python 3.9, and torch 2.11.0 needs 3.10 to 3.14");
        let bare = Python { can_make_environments: false, ..python(None, None) };
        assert!(bare.why_no_environment().unwrap().contains("python3-venv"));
    }

    #[test]
    fn the_probe_answers() {
        let python = Python::probe(Path::new("python3")).unwrap();
        assert_eq!(python.version.0, 3);
        assert!(python.executable.is_absolute());
        let error = Python::probe(Path::new("/nowhere/python")).unwrap_err().to_string();
        assert_eq!(error, "cannot start /nowhere/python");
        assert!(Python::probe(Path::new("false")).is_err());
        let error = Python::probe(Path::new("true")).unwrap_err().to_string();
        assert_eq!(error, "true answers strangely");
    }
}
