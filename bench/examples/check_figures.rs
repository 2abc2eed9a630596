//! Checks the figures of a folder against `bench/figure.schema.json`: `check_figures [FOLDER]`, bench/results by default.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use serde_json::Value;

fn main() -> anyhow::Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folder = std::env::args_os().nth(1).map_or_else(|| root.join("results"), PathBuf::from);
    let schema = read(&root.join("figure.schema.json"))?;
    let schema = jsonschema::validator_for(&schema).context("the schema is none")?;
    let mut files: Vec<PathBuf> = std::fs::read_dir(&folder)
        .with_context(|| format!("cannot read {}", folder.display()))?
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<Result<_, _>>()?;
    files.retain(|file| is_figure(file));
    files.sort();
    let mut wrong = Vec::new();
    for file in &files {
        let figure = read(file)?;
        let errors = schema.iter_errors(&figure);
        wrong.extend(errors.map(|error| format!("{}: {}: {error}", file.display(), error.instance_path())));
    }
    if !wrong.is_empty() {
        bail!("against the schema:\n  {}", wrong.join("\n  "));
    }
    println!("{} figures of {} are as the schema says", files.len(), folder.display());
    Ok(())
}

fn is_figure(file: &Path) -> bool {
    let name = file.file_stem().unwrap_or_default().to_string_lossy();
    name.starts_with("figure") && file.extension().is_some_and(|extension| extension == "json")
}

fn read(file: &Path) -> anyhow::Result<Value> {
    let text = std::fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
    serde_json::from_str(&text).with_context(|| format!("{} is no JSON", file.display()))
}
