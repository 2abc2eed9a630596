//! Runs archives on their reference cases and compares with eager PyTorch, bit for bit.
//!
//! `cargo run -p pswitch-worker --example check -- FOLDER...` takes folders that hold `model.pt2` and
//! `cases.safetensors`, as `python -m pswitch.fixtures` and `python -m pswitch.sweep` make them; without arguments all of
//! `target/fixtures` that is meant to run. Exits with 1 if one differs.

#[path = "../tests/support/mod.rs"]
mod support;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

fn main() -> ExitCode {
    let mut folders: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    if folders.is_empty() {
        let fixtures = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../target/fixtures"));
        folders = ["resnet18", "bert-2-layers", "dynamic-batch"].map(|name| fixtures.join(name)).to_vec();
    }
    let arena = support::arena(4 << 30);
    let mut failed = false;
    for folder in folders {
        let begin = Instant::now();
        match support::check(&folder, &arena) {
            Ok(cases) => {
                println!("{}: {cases} cases equal, {:.1} s", folder.display(), begin.elapsed().as_secs_f64())
            }
            Err(difference) => {
                println!("{}: {difference}", folder.display());
                failed = true;
            }
        }
    }
    ExitCode::from(u8::from(failed))
}
