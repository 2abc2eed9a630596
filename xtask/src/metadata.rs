//! What cargo says about the workspace and all that it is built from.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::commands;
use crate::root::Root;

/// A package of the dependency graph.
#[derive(Debug, Default, Clone)]
pub(crate) struct Package {
    pub(crate) name: String,
    /// Whether it belongs to the workspace.
    pub(crate) is_own: bool,
    pub(crate) folder: PathBuf,
    pub(crate) examples: Vec<String>,
    /// Names of the test programs.
    pub(crate) tests: Vec<String>,
    pub(crate) features: BTreeSet<String>,
    /// Identifiers of what it is built with and runs with; dependencies of tests apart.
    pub(crate) dependencies: BTreeSet<String>,
    pub(crate) test_dependencies: BTreeSet<String>,
}

/// All packages by cargo's identifier.
#[derive(Debug, Default)]
pub(crate) struct Metadata(pub(crate) BTreeMap<String, Package>);

impl Metadata {
    /// Asks cargo.
    pub(crate) fn of(root: &Root) -> Result<Self> {
        let answer =
            commands::output(commands::cargo(root).args(["metadata", "--format-version", "1", "--locked"]))?;
        Self::parse(&answer)
    }

    pub(crate) fn parse(answer: &str) -> Result<Self> {
        let answer: Value = serde_json::from_str(answer).context("cargo metadata prints no JSON")?;
        let own: BTreeSet<_> = items(&answer["workspace_members"]).filter_map(Value::as_str).collect();
        let mut packages = BTreeMap::new();
        for package in items(&answer["packages"]) {
            let id = text(&package["id"])?;
            let manifest = PathBuf::from(text(&package["manifest_path"])?);
            let targets = |wanted: &str| {
                items(&package["targets"])
                    .filter(|target| items(&target["kind"]).any(|kind| kind == wanted))
                    .map(|target| text(&target["name"]).map(str::to_owned))
                    .collect::<Result<Vec<_>>>()
            };
            packages.insert(
                id.to_owned(),
                Package {
                    name: text(&package["name"])?.to_owned(),
                    is_own: own.contains(id),
                    folder: manifest.parent().map(PathBuf::from).unwrap_or_default(),
                    examples: targets("example")?,
                    tests: targets("test")?,
                    features: package["features"]
                        .as_object()
                        .into_iter()
                        .flatten()
                        .map(|(name, _)| name.clone())
                        .collect(),
                    ..Package::default()
                },
            );
        }
        for node in items(&answer["resolve"]["nodes"]) {
            let package = packages.get_mut(text(&node["id"])?).context("a node without package")?;
            for dependency in items(&node["deps"]) {
                let id = text(&dependency["pkg"])?.to_owned();
                if items(&dependency["dep_kinds"]).any(|kind| kind["kind"] != "dev") {
                    package.dependencies.insert(id);
                } else {
                    package.test_dependencies.insert(id);
                }
            }
        }
        Ok(Self(packages))
    }

    /// The packages of the workspace.
    pub(crate) fn own(&self) -> impl Iterator<Item = &Package> {
        self.0.values().filter(|package| package.is_own)
    }

    /// Names of all that the package is built from, itself left out. Dependencies of its own tests count as well.
    pub(crate) fn reached_from(&self, package: &Package) -> BTreeSet<&str> {
        let mut reached = BTreeSet::new();
        let mut waiting: Vec<_> = package.dependencies.iter().chain(&package.test_dependencies).collect();
        let mut seen = BTreeSet::new();
        while let Some(id) = waiting.pop() {
            if let Some(found) = self.0.get(id)
                && seen.insert(id)
            {
                reached.insert(found.name.as_str());
                waiting.extend(&found.dependencies);
            }
        }
        reached
    }
}

fn items(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn text(value: &Value) -> Result<&str> {
    value.as_str().with_context(|| format!("cargo metadata has {value} where a text belongs"))
}
