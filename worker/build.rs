//! Compiles the shim against the libtorch that torch-sys found, and links tests and examples so that they find it.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

fn main() {
    let libraries = PathBuf::from(
        env::var_os("DEP_TCH_LIBTORCH_LIB").expect("torch-sys names the folder of libtorch's libraries"),
    );
    // Resolved, so that a binary still starts when the link in the workspace is pointed elsewhere.
    let libraries = libraries.canonicalize().unwrap_or(libraries);
    let torch = libraries.parent().expect("libtorch has a lib folder");
    let mut build = build(torch);
    for source in ["calls.cpp", "cpu_allocator.cpp", "train.cpp"] {
        build.file(format!("shim/{source}"));
    }
    build.compile("pswitch_shim");
    println!("cargo::rerun-if-changed=shim");
    build_cuda_half(torch);

    println!("cargo::rustc-link-arg=-Wl,-rpath,{}", libraries.display());
    println!("cargo::metadata=libtorch_lib={}", libraries.display());
}

fn build(torch: &Path) -> cc::Build {
    let include = torch.join("include");
    let mut build = cc::Build::new();
    build.cpp(true).std("c++17").opt_level(2);
    for folder in [include.clone(), include.join("torch/csrc/api/include")] {
        build.flag("-isystem").flag(folder.display().to_string());
    }
    build
}

/// The CUDA half of the shim becomes a library of its own that travels inside of the binary. It is linked against nothing:
/// workers of CUDA devices open it after libtorch's own libraries, in which it finds everything. Without CUDA in libtorch
/// or without CUDA's headers it is empty, and CUDA devices are refused.
fn build_cuda_half(torch: &Path) {
    let library =
        PathBuf::from(env::var_os("OUT_DIR").expect("cargo names a folder")).join("pswitch_cuda.so");
    println!("cargo::rerun-if-env-changed=CUDA_HOME");
    let headers = cuda_headers(torch);
    let (Some(headers), true) = (headers, torch.join("lib/libtorch_cuda.so").exists()) else {
        println!(
            "cargo::warning=no CUDA in this libtorch, or no CUDA headers: workers will run on the CPU alone"
        );
        fs::write(&library, []).expect("cargo's folder can be written to");
        return;
    };
    let mut build = build(torch);
    build.flag("-isystem").flag(headers.display().to_string());
    let mut compiler = build.get_compiler().to_command();
    compiler.args(["-shared", "-fPIC", "-s", "shim/cuda.cpp", "-o"]).arg(&library);
    let status = compiler.status().expect("the C++ compiler that compiled the rest runs");
    assert!(status.success(), "the CUDA half of the shim does not compile");
}

/// CUDA's headers: beside PyTorch's package, as pip puts them, or where `CUDA_HOME` says.
fn cuda_headers(torch: &Path) -> Option<PathBuf> {
    let packages = torch.parent().map(|packages| packages.join("nvidia/cu13/include"));
    let home = env::var_os("CUDA_HOME").map(|home| PathBuf::from(home).join("include"));
    packages.into_iter().chain(home).find(|folder| folder.join("crt/host_defines.h").exists())
}
