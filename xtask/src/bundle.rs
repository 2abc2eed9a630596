//! `cargo xtask bundle`: a folder that runs on a GPU machine with torch, but without Rust and without a network.
//!
//! libtorch is not in it: `run.sh` points the binaries at that of the machine's own torch.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::metadata::Metadata;
use crate::root::Root;
use crate::{commands, setup};

/// What can be carried to a machine without much ado.
const MAX_BYTES: u64 = 60 << 20;
/// The feature that a package declares for tests that need a GPU.
const GPU_FEATURE: &str = "cuda-tests";
/// Packages and their tests that need a GPU, for those that declare the feature.
const GPU_TESTS: &[(&str, &str)] =
    &[("pswitch-device", "cuda"), ("pswitch-worker", "cuda"), ("pswitch", "cuda")];
/// Names the commit, and tells a bundle from any other folder.
const VERSION: &str = "VERSION";

/// Builds everything, then writes the folder anew and says what is in it.
pub(crate) fn run(root: &Root, out: Option<PathBuf>) -> Result<()> {
    setup::run(root)?;
    let out = out.unwrap_or_else(|| root.target().join("bundle"));
    check_replaceable(&out)?;
    println!("\n==> building pswitch (release)");
    commands::run(commands::cargo(root).args(["build", "--release", "--locked", "--package", "pswitch"]))?;
    let mut tests = Vec::new();
    for (package, test) in chosen(&Metadata::of(root)?)? {
        println!("\n==> building {package}'s test '{test}' (release)");
        tests.push((format!("{package}-{test}"), build_test(root, package, test)?));
    }

    // Builds that wait for each other in cargo go on at the same moment.
    let lock = File::create(root.target().join("bundle.lock")).context("cannot write the lock")?;
    lock.lock().context("cannot lock the bundle")?;
    if out.exists() {
        fs::remove_dir_all(&out).with_context(|| format!("cannot remove {}", out.display()))?;
    }
    make_folder(&out.join("tests"))?;
    fs::write(out.join(VERSION), version(root)?).context("cannot write the version")?;
    strip(&root.target().join("release/pswitch"), &out.join("pswitch"))?;
    for (name, program) in &tests {
        strip(program, &out.join("tests").join(name))?;
    }
    copy_sources(&root.join("python/src/pswitch"), &out.join("python/pswitch"))?;
    copy(&root.join("gpu/run.sh"), &out.join("run.sh"))?;

    println!("\n==> {}", out.display());
    let files = files(&out)?;
    for (path, bytes) in &files {
        println!("{bytes:>12}  {}", path.strip_prefix(&out).unwrap_or(path).display());
    }
    let total_bytes = check_size(&files)?;
    println!("{total_bytes:>12}  bytes in {} files, of {MAX_BYTES} allowed", files.len());
    Ok(())
}

/// A folder that somebody filled with something else is not removed.
fn check_replaceable(out: &Path) -> Result<()> {
    if !out.exists() || out.join(VERSION).exists() {
        return Ok(());
    }
    let mut content = fs::read_dir(out).with_context(|| format!("cannot read {}", out.display()))?;
    if content.next().is_some() {
        bail!("{} is there and is no bundle", out.display());
    }
    Ok(())
}

/// The tests of the table whose packages have the feature.
fn chosen(metadata: &Metadata) -> Result<Vec<(&'static str, &'static str)>> {
    let mut chosen = Vec::new();
    for &(name, test) in GPU_TESTS {
        let Some(package) = metadata.own().find(|package| package.name == name) else {
            bail!("the workspace has no package {name}");
        };
        if !package.features.contains(GPU_FEATURE) {
            continue;
        }
        if !package.tests.iter().any(|known| known == test) {
            bail!("{name} has the feature '{GPU_FEATURE}', but no test '{test}'");
        }
        chosen.push((name, test));
    }
    Ok(chosen)
}

fn build_test(root: &Root, package: &str, test: &str) -> Result<PathBuf> {
    let mut cargo = commands::cargo(root);
    cargo.args(["test", "--release", "--locked", "--no-run", "--package", package]);
    cargo.args(["--features", GPU_FEATURE, "--test", test, "--message-format", "json-render-diagnostics"]);
    executable(&commands::output(&mut cargo)?, test)
        .with_context(|| format!("cargo names no program for the test '{test}' of {package}"))
}

/// The test program that cargo's messages name.
fn executable(messages: &str, test: &str) -> Option<PathBuf> {
    let artifacts = messages.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    artifacts
        .filter(|message| {
            message["reason"] == "compiler-artifact"
                && message["target"]["name"] == test
                && message["target"]["kind"]
                    .as_array()
                    .is_some_and(|kinds| kinds.iter().any(|kind| kind == "test"))
        })
        .find_map(|message| message["executable"].as_str().map(PathBuf::from))
}

fn version(root: &Root) -> Result<String> {
    let mut git = Command::new("git");
    git.current_dir(root.path()).args(["describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]);
    let commit = commands::output(&mut git).context("cannot tell the commit")?;
    let date = commands::output(Command::new("date").args(["-u", "+%Y-%m-%dT%H:%M:%SZ"]))?;
    Ok(format!("commit {}\ndate {}\n", commit.trim(), date.trim()))
}

fn strip(program: &Path, to: &Path) -> Result<()> {
    commands::run(Command::new("strip").arg("-o").arg(to).arg(program))
}

/// Copies the Python files of a folder and of those within it; what Python has compiled stays.
fn copy_sources(from: &Path, to: &Path) -> Result<()> {
    make_folder(to)?;
    for path in entries(from)? {
        let target = to.join(path.file_name().unwrap_or_default());
        if path.is_dir() && !path.ends_with("__pycache__") {
            copy_sources(&path, &target)?;
        } else if path.extension().is_some_and(|extension| extension == "py") {
            copy(&path, &target)?;
        }
    }
    Ok(())
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::copy(from, to).with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))?;
    Ok(())
}

fn make_folder(path: &Path) -> Result<()> {
    fs::create_dir_all(path).with_context(|| format!("cannot make {}", path.display()))
}

/// All files with their sizes in bytes, by name.
fn files(folder: &Path) -> Result<Vec<(PathBuf, u64)>> {
    let mut found = Vec::new();
    for path in entries(folder)? {
        if path.is_dir() {
            found.extend(files(&path)?);
        } else {
            let file = fs::metadata(&path).with_context(|| format!("cannot read {}", path.display()))?;
            found.push((path, file.len()));
        }
    }
    Ok(found)
}

fn entries(folder: &Path) -> Result<Vec<PathBuf>> {
    let listed = fs::read_dir(folder).and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect());
    let mut paths: Vec<PathBuf> = listed.with_context(|| format!("cannot read {}", folder.display()))?;
    paths.sort();
    Ok(paths)
}

/// The size of all files, if that is not too much.
fn check_size(files: &[(PathBuf, u64)]) -> Result<u64> {
    let total_bytes = files.iter().map(|(_, bytes)| bytes).sum();
    if total_bytes > MAX_BYTES {
        bail!("the bundle has {total_bytes} bytes, and {MAX_BYTES} are allowed");
    }
    Ok(total_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metadata::Package;

    fn package(name: &str, features: &[&str], tests: &[&str]) -> Package {
        Package {
            name: name.to_owned(),
            is_own: true,
            features: features.iter().map(|&feature| feature.to_owned()).collect(),
            tests: tests.iter().map(|&test| test.to_owned()).collect(),
            ..Package::default()
        }
    }

    fn workspace(packages: [Package; 3]) -> Metadata {
        Metadata(packages.into_iter().map(|package| (package.name.clone(), package)).collect())
    }

    #[test]
    fn tests_of_packages_with_the_feature_are_chosen() {
        let metadata = workspace([
            package("pswitch-device", &[GPU_FEATURE, "conformance"], &["cuda", "zygote"]),
            package("pswitch-worker", &[], &["executable"]),
            package("pswitch", &[GPU_FEATURE], &["cuda", "end_to_end"]),
        ]);
        assert_eq!(chosen(&metadata).unwrap(), [("pswitch-device", "cuda"), ("pswitch", "cuda")]);
    }

    #[test]
    fn a_feature_without_its_test_is_found() {
        let metadata = workspace([
            package("pswitch-device", &[], &[]),
            package("pswitch-worker", &[GPU_FEATURE], &["executable"]),
            package("pswitch", &[], &[]),
        ]);
        let error = chosen(&metadata).unwrap_err().to_string();
        assert_eq!(error, "pswitch-worker has the feature 'cuda-tests', but no test 'cuda'");
        let error = chosen(&Metadata::default()).unwrap_err().to_string();
        assert_eq!(error, "the workspace has no package pswitch-device");
    }

    #[test]
    fn this_workspace_has_the_packages_of_the_table() {
        let metadata = Metadata::of(&Root::of_this_repository()).unwrap();
        assert!(chosen(&metadata).unwrap().contains(&("pswitch-device", "cuda")));
    }

    #[test]
    fn the_test_program_is_taken_from_what_cargo_prints() {
        let artifact = |kind: &str, name: &str, executable: &str| {
            format!(
                r#"{{"reason":"compiler-artifact","target":{{"kind":["{kind}"],"name":"{name}"}},"executable":{executable}}}"#
            )
        };
        let messages = [
            artifact("lib", "cuda", "null"),
            artifact("bin", "cuda", r#""/bin/cuda""#),
            artifact("test", "zygote", r#""/deps/zygote-1""#),
            "a line that is no JSON".to_owned(),
            artifact("test", "cuda", r#""/deps/cuda-2""#),
            r#"{"reason":"build-finished","success":true}"#.to_owned(),
        ]
        .join("\n");
        assert_eq!(executable(&messages, "cuda"), Some("/deps/cuda-2".into()));
        assert_eq!(executable(&messages, "other"), None);
    }

    #[test]
    fn a_bundle_up_to_the_limit_passes() {
        let half = MAX_BYTES / 2;
        let sized = |last: u64| [("a".into(), half), ("b".into(), last)];
        assert_eq!(check_size(&sized(half)).unwrap(), MAX_BYTES);
        let error = check_size(&sized(half + 1)).unwrap_err().to_string();
        assert_eq!(error, "the bundle has 62914561 bytes, and 62914560 are allowed");
    }

    /// A folder of its own for a test, gone with it.
    struct Scratch(PathBuf);

    impl Scratch {
        fn new(name: &str) -> Self {
            let folder = std::env::temp_dir().join(format!("xtask-{name}-{}", std::process::id()));
            fs::create_dir_all(&folder).unwrap();
            Self(folder)
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            fs::remove_dir_all(&self.0).unwrap();
        }
    }

    #[test]
    fn only_bundles_are_replaced() {
        let scratch = Scratch::new("replaced");
        check_replaceable(&scratch.0.join("nothing")).unwrap();
        check_replaceable(&scratch.0).unwrap();
        fs::write(scratch.0.join("thesis.tex"), "").unwrap();
        let error = check_replaceable(&scratch.0).unwrap_err().to_string();
        assert!(error.ends_with("is there and is no bundle"), "{error}");
        fs::write(scratch.0.join(VERSION), "").unwrap();
        check_replaceable(&scratch.0).unwrap();
    }

    #[test]
    fn sources_are_copied_and_compiled_files_left() {
        let scratch = Scratch::new("sources");
        let (from, to) = (scratch.0.join("from"), scratch.0.join("to"));
        make_folder(&from.join("__pycache__")).unwrap();
        make_folder(&from.join("inner")).unwrap();
        for (name, content) in
            [("a.py", "1"), ("a.pyc", "2"), ("__pycache__/b.py", "3"), ("inner/c.py", "four")]
        {
            fs::write(from.join(name), content).unwrap();
        }
        copy_sources(&from, &to).unwrap();
        assert_eq!(files(&to).unwrap(), [(to.join("a.py"), 1), (to.join("inner/c.py"), 4)]);
    }
}
