//! Notes what results are to be signed with, and links tests and examples so that they find libtorch.

use std::path::{Path, PathBuf};
use std::process::Command;

fn main() {
    let libraries =
        std::env::var("DEP_PSWITCH_SHIM_LIBTORCH_LIB").expect("pswitch-worker names libtorch's folder");
    // For this crate's own executables; a library hands no link arguments on, so that `cli` says it for the binary.
    println!("cargo::rustc-link-arg=-Wl,-rpath,{libraries}");
    println!("cargo::rustc-env=PSWITCH_BENCH_TORCH={}", torch_version(Path::new(&libraries)));
    println!("cargo::rustc-env=PSWITCH_BENCH_COMMIT={}", commit());
}

/// The version that libtorch's headers name.
fn torch_version(libraries: &Path) -> String {
    let header = libraries.parent().unwrap_or(libraries).join("include/torch/headeronly/version.h");
    println!("cargo::rerun-if-changed={}", header.display());
    let text = std::fs::read_to_string(&header).unwrap_or_default();
    let version = text.split("#define TORCH_VERSION ").nth(1).and_then(|rest| rest.split('"').nth(1));
    version.unwrap_or("unknown").to_owned()
}

/// The commit that is built, with `-dirty` if tracked files differ from it.
fn commit() -> String {
    let git = |arguments: &[&str]| {
        let output = Command::new("git").args(arguments).output().ok()?;
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    // Every source that goes into the binary, and every commit.
    let crates =
        ["device", "mem-pool", "model", "transfer", "protocol", "worker", "controller", "bench", "cli"];
    for folder in crates {
        println!("cargo::rerun-if-changed=../{folder}");
    }
    let log = git(&["rev-parse", "--git-path", "logs/HEAD"]).map(PathBuf::from);
    if let Some(log) = log.filter(|log| log.exists()) {
        println!("cargo::rerun-if-changed={}", log.display());
    }
    git(&["describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"])
        .unwrap_or_else(|| "unknown".to_owned())
}
