//! The directions of dependencies: which crates of the workspace may know which, and who may reach libtorch and CUDA.

use std::collections::BTreeSet;

use anyhow::{Result, bail};

use crate::metadata::{Metadata, Package};

/// A crate and the crates of the workspace that it may depend on.
const MAY_DEPEND_ON: &[(&str, &[&str])] = &[
    ("pswitch-device", &[]),
    ("pswitch-mem-pool", &["pswitch-device"]),
    ("pswitch-model", &[]),
    ("pswitch-transfer", &["pswitch-device", "pswitch-mem-pool"]),
    ("pswitch-plot", &[]),
    ("pswitch-protocol", &[]),
    ("pswitch-train", &["pswitch-model"]),
    (
        "pswitch-worker",
        &["pswitch-device", "pswitch-mem-pool", "pswitch-model", "pswitch-protocol", "pswitch-train"],
    ),
    (
        "pswitch-controller",
        &[
            "pswitch-device",
            "pswitch-mem-pool",
            "pswitch-model",
            "pswitch-protocol",
            "pswitch-train",
            "pswitch-transfer",
        ],
    ),
    (
        "pswitch",
        &[
            "pswitch-bench",
            "pswitch-controller",
            "pswitch-device",
            "pswitch-mem-pool",
            "pswitch-model",
            "pswitch-plot",
            "pswitch-protocol",
            "pswitch-train",
            "pswitch-transfer",
            "pswitch-worker",
        ],
    ),
    (
        "pswitch-bench",
        &[
            "pswitch-controller",
            "pswitch-device",
            "pswitch-mem-pool",
            "pswitch-model",
            "pswitch-plot",
            "pswitch-protocol",
            "pswitch-train",
            "pswitch-transfer",
            "pswitch-worker",
        ],
    ),
    // It sets up what others are built with.
    ("xtask", &[]),
];

/// Crates that may reach libtorch, through `pswitch-worker`.
const REACH_TCH: &[&str] = &["pswitch-worker", "pswitch", "pswitch-bench"];
/// Crates that may name libtorch's binding as their own dependency.
const NAME_TCH: &[&str] = &["pswitch-worker"];
/// The one crate that may name the binding to CUDA's driver.
const NAME_CUDARC: &[&str] = &["pswitch-device"];

/// Checks the whole workspace, and says everything that is wrong.
pub(crate) fn check(metadata: &Metadata) -> Result<()> {
    let wrong: Vec<_> = metadata.own().flat_map(|package| wrong_in(metadata, package)).collect();
    if !wrong.is_empty() {
        bail!("dependencies in the wrong direction:\n  {}", wrong.join("\n  "));
    }
    println!("{} crates depend on each other in the right directions", metadata.own().count());
    Ok(())
}

fn wrong_in(metadata: &Metadata, package: &Package) -> Vec<String> {
    let name = package.name.as_str();
    let Some((_, allowed)) = MAY_DEPEND_ON.iter().find(|(known, _)| *known == name) else {
        return vec![format!("{name} has no line in xtask/src/directions.rs")];
    };
    let direct: BTreeSet<_> = package
        .dependencies
        .iter()
        .chain(&package.test_dependencies)
        .filter_map(|id| metadata.0.get(id))
        .filter(|dependency| dependency.name != name)
        .collect::<Vec<_>>()
        .iter()
        .map(|dependency| (dependency.name.as_str(), dependency.is_own))
        .collect();
    let mut wrong = Vec::new();
    for (dependency, is_own) in &direct {
        if *is_own && !allowed.contains(dependency) {
            wrong.push(format!("{name} may not depend on {dependency}"));
        }
    }
    let names = |binding: &str| direct.iter().any(|(dependency, _)| *dependency == binding);
    if (names("tch") || names("torch-sys")) && !NAME_TCH.contains(&name) {
        wrong.push(format!("{name} may not name tch"));
    }
    if names("cudarc") && !NAME_CUDARC.contains(&name) {
        wrong.push(format!("{name} may not name cudarc"));
    }
    let reached = metadata.reached_from(package);
    if (reached.contains("tch") || reached.contains("torch-sys")) && !REACH_TCH.contains(&name) {
        wrong.push(format!("{name} may not reach tch"));
    }
    wrong
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A workspace of the given crates; each names its dependencies, `dev:` before those of its tests.
    fn workspace(crates: &[(&str, &[&str])]) -> Metadata {
        let mut metadata = Metadata::default();
        for outsider in ["tch", "torch-sys", "cudarc", "serde"] {
            let package = Package { name: outsider.to_owned(), ..Package::default() };
            metadata.0.insert(outsider.to_owned(), package);
        }
        for (name, dependencies) in crates {
            let mut package = Package { name: (*name).to_owned(), is_own: true, ..Package::default() };
            for dependency in *dependencies {
                match dependency.strip_prefix("dev:") {
                    Some(dependency) => package.test_dependencies.insert(dependency.to_owned()),
                    None => package.dependencies.insert((*dependency).to_owned()),
                };
            }
            metadata.0.insert((*name).to_owned(), package);
        }
        metadata
    }

    fn wrong(crates: &[(&str, &[&str])]) -> Vec<String> {
        let metadata = workspace(crates);
        metadata.own().flat_map(|package| wrong_in(&metadata, package)).collect()
    }

    #[test]
    fn the_design_passes() {
        let all: Vec<_> = MAY_DEPEND_ON.iter().map(|(name, allowed)| (*name, *allowed)).collect();
        assert_eq!(wrong(&all), Vec::<String>::new());
        assert_eq!(
            wrong(&[("pswitch-worker", &["tch", "serde"]), ("pswitch", &["pswitch-worker"])]),
            Vec::<String>::new()
        );
        assert_eq!(wrong(&[("pswitch-device", &["cudarc", "dev:serde"])]), Vec::<String>::new());
    }

    #[test]
    fn a_dependency_upwards_is_found() {
        assert_eq!(
            wrong(&[("pswitch-device", &[]), ("pswitch-model", &["pswitch-device"])]),
            ["pswitch-model may not depend on pswitch-device"]
        );
        assert_eq!(
            wrong(&[("pswitch-device", &["dev:pswitch-mem-pool"]), ("pswitch-mem-pool", &[])]),
            ["pswitch-device may not depend on pswitch-mem-pool"]
        );
    }

    #[test]
    fn libtorch_is_reached_through_the_worker_alone() {
        assert_eq!(wrong(&[("pswitch", &["tch"])]), ["pswitch may not name tch"]);
        assert_eq!(
            wrong(&[("pswitch-worker", &["tch"]), ("pswitch-controller", &["dev:pswitch-worker"])]),
            ["pswitch-controller may not depend on pswitch-worker", "pswitch-controller may not reach tch"]
        );
    }

    #[test]
    fn cuda_is_named_by_the_device_alone() {
        assert_eq!(wrong(&[("pswitch-transfer", &["cudarc"])]), ["pswitch-transfer may not name cudarc"]);
    }

    #[test]
    fn a_crate_that_nobody_knows_is_found() {
        assert_eq!(wrong(&[("pswitch-new", &[])]), ["pswitch-new has no line in xtask/src/directions.rs"]);
    }
}
