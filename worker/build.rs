//! Compiles the shim against the libtorch that torch-sys found, and links tests and examples so that they find it.

use std::env;
use std::path::PathBuf;

fn main() {
    let libraries = PathBuf::from(
        env::var_os("DEP_TCH_LIBTORCH_LIB").expect("torch-sys names the folder of libtorch's libraries"),
    );
    let include = libraries.parent().expect("libtorch has a lib folder").join("include");
    let mut build = cc::Build::new();
    build
        .cpp(true)
        .std("c++17")
        .opt_level(2)
        .flag("-isystem")
        .flag(include.display().to_string())
        .flag("-isystem")
        .flag(include.join("torch/csrc/api/include").display().to_string());
    for source in ["calls.cpp", "cpu_allocator.cpp"] {
        let path = format!("shim/{source}");
        println!("cargo::rerun-if-changed={path}");
        build.file(path);
    }
    println!("cargo::rerun-if-changed=shim/shim.h");
    build.compile("pswitch_shim");

    // Resolved, so that a binary still starts when the link in the workspace is pointed elsewhere.
    let resolved = libraries.canonicalize().unwrap_or(libraries);
    println!("cargo::rustc-link-arg=-Wl,-rpath,{}", resolved.display());
    println!("cargo::metadata=libtorch_lib={}", resolved.display());
}
