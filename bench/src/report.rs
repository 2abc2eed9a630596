//! What a command has to say: tables for people, JSON for programs.

use std::borrow::Cow;
use std::fmt::{self, Write as _};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::machine::Machine;

/// Text in rows and columns: the first column to the left, the others to the right.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Table(Vec<Vec<String>>);

/// Something that was asked for, and whether it was met.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Goal {
    /// Of what.
    what: String,
    asked: Asked,
    unit: Cow<'static, str>,
    /// JSON has no number for what was not found.
    #[serde(deserialize_with = "number_or_none")]
    found: f64,
    met: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Asked {
    AtLeast(f64),
    AtMost(f64),
    Below(f64),
}

/// The outcome of a command.
#[derive(Debug)]
pub struct Report {
    /// Its name, and that of the file it is written to.
    pub command: &'static str,
    /// What people read, in order.
    pub tables: Vec<Table>,
    /// What was asked for.
    pub goals: Vec<Goal>,
    /// All numbers, with their units in their names.
    pub results: Value,
}

impl Table {
    /// One that has a header alone.
    pub fn new<const COLUMNS: usize>(header: [&str; COLUMNS]) -> Self {
        Self(vec![header.map(str::to_owned).to_vec()])
    }

    /// Adds a row; one with fewer cells than the header ends early.
    pub fn push<const COLUMNS: usize>(&mut self, row: [String; COLUMNS]) {
        self.0.push(row.to_vec());
    }

    /// All rows, the header first.
    pub(crate) fn rows(&self) -> &[Vec<String>] {
        &self.0
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let columns = self.0.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| {
            self.0
                .iter()
                .filter_map(|row| row.get(column))
                .map(|cell| cell.chars().count())
                .max()
                .unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        for row in &self.0 {
            let mut line = String::new();
            for (column, (cell, &width)) in row.iter().zip(&widths).enumerate() {
                if column == 0 { write!(line, "{cell:<width$}")? } else { write!(line, "  {cell:>width$}")? }
            }
            writeln!(f, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

impl Goal {
    /// Met by `found` of `limit` and more.
    pub fn at_least(what: impl Into<String>, limit: f64, unit: &'static str, found: f64) -> Self {
        Self {
            what: what.into(),
            asked: Asked::AtLeast(limit),
            unit: unit.into(),
            found,
            met: found >= limit,
        }
    }

    /// Met by `found` of `limit` and less.
    pub fn at_most(what: impl Into<String>, limit: f64, unit: &'static str, found: f64) -> Self {
        Self { what: what.into(), asked: Asked::AtMost(limit), unit: unit.into(), found, met: found <= limit }
    }

    /// Met by `found` of less than `limit`.
    pub fn below(what: impl Into<String>, limit: f64, unit: &'static str, found: f64) -> Self {
        Self { what: what.into(), asked: Asked::Below(limit), unit: unit.into(), found, met: found < limit }
    }

    /// Whether it was met.
    pub(crate) fn is_met(&self) -> bool {
        self.met
    }
}

impl fmt::Display for Goal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { what, asked, unit, found, met } = self;
        let space = if unit.is_empty() { "" } else { " " };
        let (word, limit) = match asked {
            Asked::AtLeast(limit) => ("at least", limit),
            Asked::AtMost(limit) => ("at most", limit),
            Asked::Below(limit) => ("below", limit),
        };
        let found = number(*found);
        let verdict = if *met { "met" } else { "MISSED" };
        write!(f, "{what}: {found}{space}{unit} (asked: {word} {limit}{space}{unit}): {verdict}")
    }
}

/// A number, or none in its place.
fn number_or_none<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or(f64::NAN))
}

/// At most three places, none that are not there.
fn number(value: f64) -> String {
    let text = format!("{value:.3}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

impl Report {
    /// For people: the machine, the tables, and then what was asked.
    pub fn text(&self, machine: &Machine) -> String {
        let mut text = format!("{}\n", machine.line());
        if machine.build == "debug" {
            text.push_str("a debug build: its times say nothing\n");
        }
        for table in &self.tables {
            text.push('\n');
            text.push_str(&table.to_string());
        }
        if !self.goals.is_empty() {
            text.push('\n');
        }
        for goal in &self.goals {
            text.push_str(&format!("{goal}\n"));
        }
        text
    }

    /// Everything, with how it was come by.
    pub fn json(&self, machine: &Machine, arguments: &[String]) -> Value {
        json!({
            "command": self.command,
            "arguments": arguments,
            "machine": machine,
            "asked": self.goals,
            "tables": self.tables,
            "results": self.results,
        })
    }

    /// Writes the JSON to `FOLDER/COMMAND.json`, and returns where that is.
    ///
    /// # Errors
    /// When the folder cannot be made or the file cannot be written.
    pub fn save(&self, folder: &Path, machine: &Machine, arguments: &[String]) -> anyhow::Result<PathBuf> {
        fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
        let path = folder.join(format!("{}.json", self.command));
        let mut text = serde_json::to_string_pretty(&self.json(machine, arguments))?;
        // Paths count from where it was run: the same everywhere.
        if let Some(here) = std::env::current_dir().ok().as_deref().and_then(Path::to_str) {
            text = text.replace(&format!("{here}/"), "");
        }
        text.push('\n');
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        Ok(path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine() -> Machine {
        Machine {
            cpu: "a CPU".to_owned(),
            cores: 2,
            memory_bytes: 1,
            kernel: "6".to_owned(),
            torch: "2.11.0",
            commit: "abc",
            build: "release",
            date: "2026-01-01T00:00:00Z".to_owned(),
            load_average: 0.5,
            gpu: None,
        }
    }

    fn report() -> Report {
        let mut table = Table::new(["model", "ms"]);
        table.push(["resnet152".to_owned(), "8.6".to_owned()]);
        table.push(["bert".to_owned(), "10.25".to_owned()]);
        Report {
            command: "switching",
            tables: vec![table],
            goals: vec![Goal::at_most("wrong outputs", 0.0, "", 0.0), Goal::below("cost", 0.5, "ms", 0.5)],
            results: json!({"ready_ms": 8.6}),
        }
    }

    #[test]
    fn goals_say_what_was_asked_and_found() {
        let texts = [
            Goal::at_least("below copy-then-run", 35.0, "%", 41.23456),
            Goal::at_least("below copy-then-run", 35.0, "%", 34.9996),
            Goal::at_most("descriptors left behind", 0.0, "", 2.0),
            Goal::below("growth", 1.0, "%", 0.05),
        ]
        .map(|goal| goal.to_string());
        assert_eq!(
            texts,
            [
                "below copy-then-run: 41.235 % (asked: at least 35 %): met",
                "below copy-then-run: 35 % (asked: at least 35 %): MISSED",
                "descriptors left behind: 2 (asked: at most 0): MISSED",
                "growth: 0.05 % (asked: below 1 %): met",
            ]
        );
    }

    #[test]
    fn nothing_measured_meets_no_goal() {
        assert!(!Goal::below("cost", 0.5, "ms", f64::NAN).met);
        assert!(!Goal::at_least("coverage", 95.0, "%", f64::NAN).met);
    }

    #[test]
    fn tables_come_before_what_was_asked() {
        assert_eq!(
            report().text(&machine()),
            "a CPU, 2 cores, load 0.5; libtorch 2.11.0, commit abc, release build; 2026-01-01T00:00:00Z\n\
             \n\
             model         ms\n\
             resnet152    8.6\n\
             bert       10.25\n\
             \n\
             wrong outputs: 0 (asked: at most 0): met\n\
             cost: 0.5 ms (asked: below 0.5 ms): MISSED\n"
        );
    }

    #[test]
    fn a_debug_build_is_told() {
        let debug = Machine { build: "debug", ..machine() };
        assert!(report().text(&debug).contains("a debug build: its times say nothing"));
    }

    #[test]
    fn files_are_named_by_their_command_and_hold_everything() {
        let folder = tempfile::tempdir().unwrap();
        let model = std::env::current_dir().unwrap().join("models/m").to_str().unwrap().to_owned();
        let arguments = ["switching".to_owned(), "--requests".to_owned(), "8".to_owned(), model];
        let path = report().save(&folder.path().join("results"), &machine(), &arguments).unwrap();
        assert_eq!(path, folder.path().join("results/switching.json"));
        let read: Value = serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap();
        assert_eq!(read["machine"]["commit"], "abc");
        assert_eq!((&read["arguments"][2], &read["arguments"][3]), (&json!("8"), &json!("models/m")));
        assert_eq!(read["results"]["ready_ms"], 8.6);
        let goal = json!({"what": "cost", "asked": {"below": 0.5}, "unit": "ms", "found": 0.5, "met": false});
        assert_eq!(read["asked"][1], goal);
    }
}
