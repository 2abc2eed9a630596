//! Conventions that no linter knows.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::commands;
use crate::metadata::Metadata;
use crate::root::Root;

/// A file that long is no longer read in one sitting.
const MAX_LINES: usize = 999;
const SOURCES: &[&str] = &["rs", "py", "cpp", "h", "cu"];
/// What nobody finds anything by.
const MODULES_WITHOUT_PURPOSE: &[&str] = &["util", "utils", "helper", "helpers", "misc", "common"];
/// Signs of what is half alive; written apart, so that this file passes.
const HALF_ALIVE: &[&str] = &[
    concat!("allow(dead", "_code)"),
    concat!("TO", "DO"),
    concat!("FIX", "ME"),
    concat!("to", "do!("),
    concat!("X", "XX"),
];

/// Checks all files that git knows or would add.
pub(crate) fn check(root: &Root, metadata: &Metadata) -> Result<()> {
    let files = files(root)?;
    let mut wrong = Vec::new();
    let mut lines = 0;
    for file in files.iter().filter(|file| is_source(file)) {
        let Ok(text) = fs::read_to_string(root.join(file)) else {
            continue; // removed, and not yet committed so
        };
        lines += text.lines().count();
        wrong.extend(wrong_in(file, &text));
    }
    wrong.extend(wrong_in_crates(metadata));
    if !wrong.is_empty() {
        bail!("against the conventions of CONTRIBUTING.md:\n  {}", wrong.join("\n  "));
    }
    println!("{} files, {lines} lines of source", files.len());
    Ok(())
}

fn files(root: &Root) -> Result<Vec<PathBuf>> {
    let mut git = Command::new("git");
    git.current_dir(root.path()).args(["ls-files", "--cached", "--others", "--exclude-standard", "-z"]);
    let listed = commands::output(&mut git).context("cannot list the files of the repository")?;
    Ok(listed.split('\0').filter(|name| !name.is_empty()).map(PathBuf::from).collect())
}

fn is_source(file: &Path) -> bool {
    file.extension().is_some_and(|extension| SOURCES.iter().any(|known| extension == *known))
}

fn wrong_in(file: &Path, text: &str) -> Vec<String> {
    let mut wrong = Vec::new();
    let shown = file.display();
    let lines = text.lines().count();
    if lines > MAX_LINES {
        wrong.push(format!("{shown} has {lines} lines, and {MAX_LINES} are allowed"));
    }
    let names = file.with_extension("");
    for name in names.components().filter_map(|component| component.as_os_str().to_str()) {
        if MODULES_WITHOUT_PURPOSE.contains(&name) {
            wrong.push(format!("{shown}: '{name}' says nothing about what is in it"));
        }
    }
    for (number, line) in text.lines().enumerate() {
        for sign in HALF_ALIVE.iter().filter(|sign| line.contains(**sign)) {
            wrong.push(format!("{shown}:{}: {sign}", number + 1));
        }
    }
    wrong
}

/// Every library has a README and an example, and no two examples share a name: cargo builds them into one folder.
fn wrong_in_crates(metadata: &Metadata) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut examples: BTreeMap<&str, &str> = BTreeMap::new();
    for package in metadata.own() {
        if package.folder.join("src/lib.rs").exists() {
            if !package.folder.join("README.md").exists() {
                wrong.push(format!("{} has no README.md", package.name));
            }
            if package.examples.is_empty() {
                wrong.push(format!("{} has no example", package.name));
            }
        }
        for example in &package.examples {
            if let Some(other) = examples.insert(example, &package.name) {
                wrong.push(format!("{} and {other} both have an example '{example}'", package.name));
            }
        }
    }
    wrong
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metadata::Package;

    #[test]
    fn long_files_are_found() {
        assert_eq!(wrong_in(Path::new("a/src/b.rs"), &"x\n".repeat(999)), Vec::<String>::new());
        assert_eq!(
            wrong_in(Path::new("a/src/b.rs"), &"x\n".repeat(1000)),
            ["a/src/b.rs has 1000 lines, and 999 are allowed"]
        );
    }

    #[test]
    fn names_that_say_nothing_are_found() {
        assert_eq!(wrong_in(Path::new("a/utils.rs"), "").len(), 1);
        assert_eq!(wrong_in(Path::new("a/utils/mod.rs"), "").len(), 1);
        assert_eq!(wrong_in(Path::new("a/utility_model.rs"), "").len(), 0);
    }

    #[test]
    fn what_is_half_alive_is_found_with_its_line() {
        let text = format!("fn a() {{}}\n// {} later", HALF_ALIVE[1]);
        assert_eq!(wrong_in(Path::new("a.rs"), &text), [format!("a.rs:2: {}", HALF_ALIVE[1])]);
    }

    #[test]
    fn examples_of_one_name_are_found() {
        let mut metadata = Metadata::default();
        for name in ["a", "b"] {
            let package = Package {
                name: name.to_owned(),
                is_own: true,
                examples: vec!["start".to_owned()],
                ..Package::default()
            };
            metadata.0.insert(name.to_owned(), package);
        }
        assert_eq!(wrong_in_crates(&metadata), ["b and a both have an example 'start'"]);
    }
}
