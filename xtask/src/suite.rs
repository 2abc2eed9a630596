//! `cargo xtask test`: everything that must pass, step by step.

use std::fs;
use std::io::ErrorKind;
use std::process::{Command, ExitStatus};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;

use crate::metadata::Metadata;
use crate::root::Root;
use crate::{checks, commands, directions, fixtures, readme, setup};

/// Examples are small; one that takes longer hangs.
const EXAMPLE_TIMEOUT: Duration = Duration::from_secs(300);

/// One figure takes some seconds in short.
const FIGURE_TIMEOUT: Duration = Duration::from_secs(180);

/// Figures of few requests for one small model, and of few copies.
const FIGURES: &[(&str, &[&str])] = &[
    ("figure5", SHORT),
    ("figure6", SHORT),
    ("figure7", SHORT),
    ("figure8", SHORT),
    ("figure9", SHORT),
    ("figure10", &["--copies", "3", "--load", "0.5", "--seconds", "3"]),
];
const SHORT: &[&str] = &["--quick", "--rounds", "1", "--model", "target/fixtures/mobilenet_v3_small"];

/// In the order in which they run: what fails soonest comes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Step {
    /// rustfmt and ruff format
    Format,
    /// Conventions: sizes of files, names of modules, READMEs and examples of crates
    Checks,
    /// Directions of dependencies
    Directions,
    /// Models with reference outputs
    Fixtures,
    /// clippy and ruff, warnings being errors
    Lint,
    /// All Rust tests, documentation tests among them
    Rust,
    /// Every example, without arguments
    Examples,
    /// The figures, in short, on the host: their results are as bench/figure.schema.json says
    Figures,
    /// Documentation without warnings
    Doc,
    /// Commands in documents exist
    Readme,
    /// All Python tests
    Python,
}

/// Runs the steps, all of them if `only` names none. One that fails does not keep the others from running.
pub(crate) fn run(root: &Root, only: &[Step]) -> Result<()> {
    let begun = Instant::now();
    println!("==> setup");
    setup::run(root)?;
    let mut report = vec![("setup".to_owned(), true, begun.elapsed())];
    for step in Step::value_variants().iter().filter(|step| only.is_empty() || only.contains(step)) {
        let name = step.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default();
        println!("\n==> {name}");
        let started = Instant::now();
        let result = run_step(root, *step);
        if let Err(error) = &result {
            eprintln!("{name}: {error:#}");
        }
        report.push((name, result.is_ok(), started.elapsed()));
    }
    println!("\n==> summary");
    for (name, passed, took) in &report {
        println!("{name:12}{:8}{:8.1} s", if *passed { "ok" } else { "FAILED" }, took.as_secs_f64());
    }
    println!("{:20}{:8.1} s", "all", begun.elapsed().as_secs_f64());
    let failed: Vec<_> =
        report.iter().filter(|(_, passed, _)| !passed).map(|(name, ..)| name.as_str()).collect();
    if !failed.is_empty() {
        bail!("failed: {}", failed.join(", "));
    }
    Ok(())
}

fn run_step(root: &Root, step: Step) -> Result<()> {
    let cargo = |arguments: &[&str]| commands::run(commands::cargo(root).args(arguments));
    let python = |arguments: &[&str]| commands::run(commands::python(root).args(arguments));
    match step {
        Step::Format => {
            cargo(&["fmt", "--all", "--check"])?;
            python(&["-m", "ruff", "format", "--check", "python"])
        }
        Step::Checks => checks::check(root, &Metadata::of(root)?),
        Step::Directions => directions::check(&Metadata::of(root)?),
        Step::Fixtures => fixtures::make(root, &[], false),
        Step::Lint => {
            python(&["-m", "ruff", "check", "python"])?;
            cargo(&["clippy", "--workspace", "--all-targets", "--locked", "--", "-D", "warnings"])
        }
        Step::Rust => cargo(&["test", "--workspace", "--locked", "--no-fail-fast"]),
        Step::Examples => run_examples(root),
        Step::Figures => measure_figures(root),
        Step::Doc => commands::run(
            commands::cargo(root)
                .args(["doc", "--workspace", "--no-deps", "--locked"])
                .env("RUSTDOCFLAGS", "-D warnings"),
        ),
        Step::Readme => {
            cargo(&["build", "--workspace", "--locked", "--quiet"])?;
            readme::check(root, &Metadata::of(root)?)
        }
        Step::Python => {
            commands::run(commands::python(root).args(["-m", "pytest"]).current_dir(root.join("python")))
        }
    }
}

/// Measures each figure and checks what it has written.
fn measure_figures(root: &Root) -> Result<()> {
    commands::run(commands::cargo(root).args(["build", "--workspace", "--examples", "--locked", "--quiet"]))?;
    let folder = root.target().join("figures");
    match fs::remove_dir_all(&folder) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("cannot empty {}", folder.display()));
        }
        _ => {}
    }
    for (name, arguments) in FIGURES {
        let mut command = Command::new(root.target().join("debug/pswitch"));
        command.current_dir(root.path()).args(["bench", name]).args(*arguments).arg("--out").arg(&folder);
        let status = run_until(&mut command, FIGURE_TIMEOUT)?;
        ensure!(status.success(), "{name}: {status}");
        let written = folder.join(format!("{name}.json"));
        ensure!(written.exists(), "{name} has not written {}", written.display());
    }
    let mut check = Command::new(root.target().join("debug/examples/check_figures"));
    commands::run(check.arg(&folder))
}

fn run_examples(root: &Root) -> Result<()> {
    // All at once and not one by one: cargo would build dependencies anew for each selection of packages.
    commands::run(commands::cargo(root).args(["build", "--workspace", "--examples", "--locked", "--quiet"]))?;
    let metadata = Metadata::of(root)?;
    let mut failed = Vec::new();
    let mut count = 0;
    for package in metadata.own() {
        for example in &package.examples {
            println!("--- {} {example}", package.name);
            let mut command = Command::new(root.target().join("debug/examples").join(example));
            command.current_dir(root.path());
            match run_until(&mut command, EXAMPLE_TIMEOUT) {
                Ok(status) if status.success() => count += 1,
                Ok(status) => failed.push(format!("{} {example}: {status}", package.name)),
                Err(error) => failed.push(format!("{} {example}: {error:#}", package.name)),
            }
        }
    }
    if !failed.is_empty() {
        bail!("examples that do not run:\n  {}", failed.join("\n  "));
    }
    println!("{count} examples ran");
    Ok(())
}

/// Runs to the end, or kills at the deadline.
fn run_until(command: &mut Command, timeout: Duration) -> Result<ExitStatus> {
    let mut child = command.spawn().with_context(|| format!("cannot start {}", commands::shown(command)))?;
    let deadline = Instant::now() + timeout;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        if Instant::now() >= deadline {
            child.kill()?;
            child.wait()?;
            bail!("killed after {} s", timeout.as_secs());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_hangs_is_killed() {
        let started = Instant::now();
        let error = run_until(Command::new("sleep").arg("60"), Duration::from_millis(60)).unwrap_err();
        assert!(error.to_string().starts_with("killed after"));
        assert!(started.elapsed() < Duration::from_secs(10));
        assert!(run_until(Command::new("sh").args(["-c", "exit 0"]), EXAMPLE_TIMEOUT).unwrap().success());
    }
}
