//! What came of the kills: counts and times for each model, goals.

use serde::Serialize;

use crate::report::{Goal, Table};
use crate::stats::{Samples, Summary};

/// How a request ended in whose course a worker was killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Answered {
    /// Rightly, without having been tried again.
    Right,
    /// Rightly, by another worker.
    Retried,
    /// By the error that its worker was lost.
    Refused,
    /// By outputs that are not the right ones.
    Wrong,
    /// By an error that should not be.
    Failed,
}

/// A kill and what came of it.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Strike {
    pub(super) model: String,
    /// Process that was killed.
    pub(super) pid: u32,
    /// What such a request took just before.
    pub(super) cold_ms: f64,
    /// From the request to the kill.
    pub(super) wait_ms: f64,
    /// Whether the request had not been answered when the worker was killed.
    pub(super) mid_switch: bool,
    pub(super) answered: Answered,
    /// Answers that were not right, of this request and of the next ones.
    pub(super) wrong: u32,
    /// What should not have happened, in words.
    pub(super) failures: Vec<String>,
    /// From the kill to the next right answer.
    pub(super) recovery_ms: f64,
    /// From the kill to the moment at which as many workers as before could execute.
    pub(super) workers_back_ms: f64,
}

/// The kills of one model, or of all.
#[derive(Debug, Serialize)]
pub(super) struct Row {
    model: String,
    kills: usize,
    mid_switch: usize,
    right: usize,
    retried: usize,
    refused: usize,
    wrong: u32,
    failures: usize,
    recovery_ms: Summary,
    workers_back_ms: Summary,
}

/// None of nothing.
fn row(model: &str, strikes: &[&Strike]) -> Option<Row> {
    let count = |answered| strikes.iter().filter(|strike| strike.answered == answered).count();
    let summary = |part: fn(&Strike) -> f64| {
        let mut samples = Samples::default();
        samples.extend(strikes.iter().map(|strike| part(strike)));
        samples.summary()
    };
    Some(Row {
        model: model.to_owned(),
        kills: strikes.len(),
        mid_switch: strikes.iter().filter(|strike| strike.mid_switch).count(),
        right: count(Answered::Right),
        retried: count(Answered::Retried),
        refused: count(Answered::Refused),
        wrong: strikes.iter().map(|strike| strike.wrong).sum(),
        failures: strikes.iter().map(|strike| strike.failures.len()).sum(),
        recovery_ms: summary(|strike| strike.recovery_ms)?,
        workers_back_ms: summary(|strike| strike.workers_back_ms)?,
    })
}

/// One for each model that was asked, and one for all.
pub(super) fn rows<'a>(models: impl Iterator<Item = &'a str>, strikes: &[Strike]) -> Vec<Row> {
    let of = |model: &str| strikes.iter().filter(|strike| strike.model == model).collect::<Vec<_>>();
    let mut rows: Vec<Row> = models.filter_map(|model| row(model, &of(model))).collect();
    rows.extend(row("all", &strikes.iter().collect::<Vec<_>>()));
    rows
}

pub(super) fn goals(strikes: &[Strike], restarts: u64, slot_in_use_bytes: u64) -> Vec<Goal> {
    let wrong: u32 = strikes.iter().map(|strike| strike.wrong).sum();
    let failures: usize = strikes.iter().map(|strike| strike.failures.len()).sum();
    // Counts of a few, and sizes far below what a float holds exactly.
    #[allow(clippy::cast_precision_loss)]
    let (failures, restarts, kills, slot_bytes) =
        (failures as f64, restarts as f64, strikes.len() as f64, slot_in_use_bytes as f64);
    vec![
        Goal::at_most("wrong outputs", 0.0, "", f64::from(wrong)),
        Goal::at_most("answers neither right nor refused for the lost worker", 0.0, "", failures),
        Goal::at_most("workers lost beside those killed", 0.0, "", restarts - kills),
        Goal::at_most("slots in use at the end", 0.0, "bytes", slot_bytes),
    ]
}

/// What went wrong, if anything did, and below it the numbers.
pub(super) fn tables(rows: &[Row], strikes: &[Strike]) -> Vec<Table> {
    let mut tables = Vec::new();
    let mut list = Table::new(["should not be", "killed after ms", "what"]);
    for strike in strikes {
        for failure in &strike.failures {
            list.push([strike.model.clone(), format!("{:.2}", strike.wait_ms), failure.clone()]);
        }
    }
    if strikes.iter().any(|strike| !strike.failures.is_empty()) {
        tables.push(list);
    }
    let mut table = Table::new([
        "model",
        "kills",
        "mid-switch",
        "right at once",
        "after retry",
        "refused",
        "wrong",
        "recovery ms",
        "most",
        "workers back ms",
        "most",
    ]);
    let ms = |value: f64| format!("{value:.1}");
    for row in rows {
        table.push([
            row.model.clone(),
            row.kills.to_string(),
            row.mid_switch.to_string(),
            row.right.to_string(),
            row.retried.to_string(),
            row.refused.to_string(),
            row.wrong.to_string(),
            ms(row.recovery_ms.median),
            ms(row.recovery_ms.most),
            ms(row.workers_back_ms.median),
            ms(row.workers_back_ms.most),
        ]);
    }
    tables.push(table);
    tables
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strike(model: &str, answered: Answered, failures: &[&str]) -> Strike {
        Strike {
            model: model.to_owned(),
            pid: 1,
            cold_ms: 5.0,
            wait_ms: 2.5,
            mid_switch: answered != Answered::Right,
            answered,
            wrong: u32::from(answered == Answered::Wrong),
            failures: failures.iter().map(|&text| text.to_owned()).collect(),
            recovery_ms: 4.0,
            workers_back_ms: 200.0,
        }
    }

    #[test]
    fn models_stand_above_all_of_them() {
        let strikes = [
            strike("a", Answered::Right, &[]),
            strike("b", Answered::Retried, &[]),
            strike("a", Answered::Refused, &[]),
        ];
        let rows = rows(["a", "b", "never"].into_iter(), &strikes);
        let counts: Vec<_> =
            rows.iter().map(|r| (r.model.as_str(), r.kills, r.mid_switch, r.retried, r.refused)).collect();
        assert_eq!(counts, [("a", 2, 1, 0, 1), ("b", 1, 1, 1, 0), ("all", 3, 2, 1, 1)]);
        let [table] = tables(&rows, &strikes).try_into().unwrap();
        assert_eq!(table.to_string().lines().count(), 4);
        assert!(goals(&strikes, 3, 0).iter().all(|goal| goal.to_string().ends_with(": met")));
    }

    #[test]
    fn what_should_not_be_comes_first() {
        let strikes =
            [strike("a", Answered::Wrong, &["wrong output"]), strike("a", Answered::Failed, &["odd"])];
        let [list, _] = tables(&rows(["a"].into_iter(), &strikes), &strikes).try_into().unwrap();
        assert!(list.to_string().contains("wrong output"), "{list}");
        let texts: Vec<String> = goals(&strikes, 3, 512).iter().map(ToString::to_string).collect();
        assert_eq!(
            texts,
            [
                "wrong outputs: 1 (asked: at most 0): MISSED",
                "answers neither right nor refused for the lost worker: 2 (asked: at most 0): MISSED",
                "workers lost beside those killed: 1 (asked: at most 0): MISSED",
                "slots in use at the end: 512 bytes (asked: at most 0 bytes): MISSED",
            ]
        );
    }
}
