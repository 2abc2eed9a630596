//! How many models that nobody chose load and answer as eager PyTorch does.

use std::path::PathBuf;

use anyhow::Context as _;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::report::{Goal, Report, Table};

/// Coverage of models that nobody chose.
///
/// Shows what `python -m pswitch.sweep` has written: it exports every classification model of torchvision and many
/// configurations of transformers, and has each checked against eager PyTorch, bit for bit.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
The sweep itself, some minutes on a few cores:
  cargo build --release -p pswitch-worker --example check && PYTHONPATH=python/src \
.torch/venv/bin/python -m pswitch.sweep --out target/sweep --check target/release/examples/check")]
pub(crate) struct Sweep {
    /// What the sweep has written.
    #[arg(value_name = "FILE", default_value = "target/sweep/coverage.json")]
    file: PathBuf,
}

#[derive(Debug, Deserialize)]
struct Coverage {
    check: Option<String>,
    coverage: Vec<Family>,
    results: Vec<Model>,
}

/// One family of models, or all.
#[derive(Debug, Serialize, Deserialize)]
struct Family {
    family: String,
    models: usize,
    exported: usize,
    matched: usize,
    percent_of_exported: f64,
    percent: f64,
}

#[derive(Debug, Serialize, Deserialize)]
struct Model {
    name: String,
    family: String,
    exported: bool,
    matched: bool,
    reason: String,
}

impl Sweep {
    pub(crate) fn run(&self) -> anyhow::Result<Report> {
        let path = self.file.display();
        let text = std::fs::read_to_string(&self.file)
            .with_context(|| format!("cannot read {path}; --help says what writes it"))?;
        let coverage: Coverage =
            serde_json::from_str(&text).with_context(|| format!("{path} is not what a sweep writes"))?;
        coverage.report().with_context(|| format!("{path} has no coverage of all families"))
    }
}

impl Coverage {
    /// None without a row for all families.
    fn report(self) -> Option<Report> {
        let all = self.coverage.iter().find(|family| family.family == "all")?;
        let goals = vec![Goal::at_least("models that load and match", 95.0, "%", all.percent)];
        let mut table = Table::new(["family", "models", "exported", "matched", "% of exported", "% of all"]);
        for family in &self.coverage {
            table.push([
                family.family.clone(),
                family.models.to_string(),
                family.exported.to_string(),
                family.matched.to_string(),
                format!("{:.1}", family.percent_of_exported),
                format!("{:.1}", family.percent),
            ]);
        }
        let failed: Vec<Model> = self.results.into_iter().filter(|model| !model.matched).collect();
        let mut tables = Vec::new();
        if !failed.is_empty() {
            let mut list = Table::new(["not matched", "reason"]);
            for model in &failed {
                let stage = if model.exported { "" } else { "not exported: " };
                list.push([model.name.clone(), format!("{stage}{}", model.reason)]);
            }
            tables.push(list);
        }
        tables.push(table);
        let results = json!({"check": self.check, "coverage": self.coverage, "not_matched": failed});
        Some(Report { command: "sweep", tables, goals, results })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As `python/src/pswitch/sweep.py` writes it.
    fn written() -> serde_json::Value {
        let model = |name: &str, exported: bool, matched: bool, reason: &str| {
            json!({
                "name": name, "family": "torchvision", "exported": exported, "matched": matched,
                "export_s": 1.5, "check_s": 0.5, "megabytes": 44.7, "reason": reason,
            })
        };
        let family = |name: &str| {
            json!({
                "family": name, "models": 3, "exported": 2, "matched": 1,
                "percent_of_exported": 50.0, "percent": 33.3,
            })
        };
        json!({
            "check": "target/release/examples/check",
            "coverage": [family("torchvision"), family("all")],
            "results": [
                model("resnet18", true, true, ""),
                model("vit", true, false, "exit status 1: case 0: output 0: 4 of 4000 bytes differ"),
                model("odd", false, false, "RuntimeError: cannot trace"),
            ],
        })
    }

    #[test]
    fn what_failed_is_listed_before_the_coverage() {
        let report = serde_json::from_value::<Coverage>(written()).unwrap().report().unwrap();
        let [failed, coverage] = report.tables.try_into().unwrap();
        let failed = failed.to_string();
        assert!(failed.contains("4 of 4000 bytes differ") && failed.contains("not exported: RuntimeError"));
        assert!(!failed.contains("resnet18"), "{failed}");
        assert_eq!(coverage.to_string().lines().count(), 3);
        let goal = report.goals[0].to_string();
        assert_eq!(goal, "models that load and match: 33.3 % (asked: at least 95 %): MISSED");
    }

    #[test]
    fn a_coverage_of_nothing_is_refused() {
        let mut written = written();
        written["coverage"].as_array_mut().unwrap().pop();
        assert!(serde_json::from_value::<Coverage>(written).unwrap().report().is_none());
    }
}
