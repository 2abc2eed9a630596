//! Models that do not fit together, one after another, for a long time.

mod ledger;

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context as _, ensure};
use pswitch_controller::{InferenceService as _, ServiceSnapshot};
use serde::Serialize;
use serde_json::json;

use crate::caller::Caller;
use crate::processes::Usage;
use crate::progress::{self, Progress};
use crate::report::{Goal, Report, Table};
use crate::serving::{Bench, Plan, Serving, Zygotes};
use crate::stats::{Samples, Summary};
use crate::subject::Subject;

use ledger::{Baseline, Ledger};

/// Requests after which nothing grows any more; they do not count.
const SETTLED: usize = 100;

/// Every so many turns each model is asked a second time, which finds it resident.
const READY_EVERY: usize = 5;

/// Alternating requests over models that do not fit together.
///
/// The pool has room for the largest model alone: in every turn each model is asked once, and every request switches.
/// Every output is compared to the last bit with eager PyTorch's where reference cases lie beside the archive and were
/// made on such a device, on the CPU with as many threads, which is the default; else with the first. On a GPU the
/// ledger's account of its memory stands beside the driver's.
#[derive(Debug, clap::Args)]
pub(crate) struct Switching {
    /// The models: folders with model.pt2, or archives; two or more, in the order of the requests.
    #[arg(long = "model", value_name = "PATH", num_args = 2.., default_values = [
        "target/fixtures/resnet18",
        "target/fixtures/efficientnet-lite0",
        "target/fixtures/mobilenet_v3_small",
        "target/fixtures/all-minilm-l6-v2",
    ])]
    models: Vec<PathBuf>,
    /// Alternating requests; those that find a model resident come on top. The first 100 do not count.
    #[arg(long, value_name = "N", default_value_t = 2000, value_parser = clap::value_parser!(u32).range(200..))]
    requests: u32,
    #[command(flatten)]
    pub(super) serving: Serving,
}

/// One model's part.
struct Series {
    caller: Caller,
    span_bytes: u64,
    ready: Samples,
    cold: Samples,
    startup: Samples,
}

/// A model's numbers.
#[derive(Debug, Serialize)]
struct Row {
    model: String,
    span_bytes: u64,
    compared_with: String,
    ready_ms: Summary,
    cold_ms: Summary,
    /// From the decision to the first layer.
    startup_ms: Summary,
    /// Median of cold less median of ready.
    overhead_ms: f64,
}

impl Switching {
    pub(crate) fn run(&self, zygotes: &mut Zygotes) -> anyhow::Result<Report> {
        let subjects =
            self.models.iter().map(|path| Subject::open(path)).collect::<anyhow::Result<Vec<_>>>()?;
        let served = self.serving.like_references(&subjects);
        let largest =
            subjects.iter().map(|subject| subject.span_bytes).max().context("there are no models")?;
        let plan = Plan {
            serving: &self.serving,
            served,
            models: subjects.iter().map(|s| (s.name.clone(), s.archive.as_path())).collect(),
            homes_bytes: Some(largest),
            link_bandwidth: None,
            training_size: None,
            training_gives_way: false,
        };
        let baseline = Baseline::of(served.device)?;
        let bench = Bench::start(plan, zygotes, Arc::new(|_| ()))?;
        let requests = self.requests as usize;
        let mut series = subjects
            .iter()
            .map(|subject| {
                let samples = || Samples::with_capacity(requests / subjects.len() + 1);
                Ok(Series {
                    caller: Caller::new(&subject.name, subject.examples(served)?),
                    span_bytes: subject.span_bytes,
                    ready: samples(),
                    cold: samples(),
                    startup: samples(),
                })
            })
            .collect::<anyhow::Result<Vec<_>>>()?;

        let (mut settled, mut settled_snapshot) = (Vec::new(), ServiceSnapshot::default());
        let progress = Progress::new("requests", requests);
        for request in 0..requests {
            if request == SETTLED {
                (settled, settled_snapshot) = (bench.processes()?, bench.server.snapshot());
            }
            let (turn, model) = (request / series.len(), request % series.len());
            let one = &mut series[model];
            let cold = bench.call(&mut one.caller)?;
            let ready = if turn % READY_EVERY == 0 { Some(bench.call(&mut one.caller)?) } else { None };
            if request >= SETTLED {
                // In the first turn a model may be resident from when it was timed.
                let name = one.caller.model();
                ensure!(cold.timings.switched, "'{name}' was resident: do some of the models fit together?");
                one.cold.push_ms(cold.latency);
                one.startup.push_ms(cold.timings.switch);
                if let Some(ready) = ready {
                    one.ready.push_ms(ready.latency);
                }
            }
            progress.step();
        }
        drop(progress);
        let (end, snapshot) = (bench.processes()?, bench.server.snapshot());
        let workers = bench.workers()?.len() as u64;
        bench.stop()?;
        let ledger = baseline.map(|baseline| Ledger::new(baseline, &settled_snapshot, &snapshot, workers));

        let rows = series.into_iter().map(Series::row).collect::<anyhow::Result<Vec<_>>>()?;
        let checked: usize = rows.iter().map(|row| row.cold_ms.count + row.ready_ms.count).sum();
        let mut goals = goals(&settled, &end, snapshot.worker_restarts);
        goals.extend(ledger.iter().flat_map(Ledger::goals));
        let results = json!({
            "requests": requests,
            "device": served.device.to_string(),
            "threads": served.threads,
            "models": rows,
            "processes": {"after_100": settled, "at_the_end": end},
            "worker_restarts": snapshot.worker_restarts,
            "transferred_bytes": snapshot.transferred_bytes,
            "device_memory": ledger,
        });
        progress::say(format_args!("{checked} answers counted, and every output of every request was right"));
        let mut tables = vec![models_table(&rows), processes_table(&settled, &end)];
        tables.extend(ledger.iter().flat_map(Ledger::tables));
        Ok(Report { command: "switching", tables, goals, results })
    }
}

impl Series {
    fn row(self) -> anyhow::Result<Row> {
        let summary = |samples: &Samples| {
            samples.summary().context("too few requests: some model was never measured; raise --requests")
        };
        let (ready_ms, cold_ms) = (summary(&self.ready)?, summary(&self.cold)?);
        Ok(Row {
            model: self.caller.model().to_owned(),
            span_bytes: self.span_bytes,
            compared_with: self.caller.reference().to_owned(),
            ready_ms,
            cold_ms,
            startup_ms: summary(&self.startup)?,
            overhead_ms: cold_ms.median - ready_ms.median,
        })
    }
}

fn goals(settled: &[Usage], end: &[Usage], restarts: u64) -> Vec<Goal> {
    let pairs = || end.iter().filter_map(|end| Some((before(settled, end)?, end)));
    let growth = pairs().map(|(before, end)| growth_percent(before, end)).fold(0.0, f64::max);
    let descriptors: usize =
        pairs().map(|(before, end)| end.descriptors.saturating_sub(before.descriptors)).sum();
    // Counts of a few.
    #[allow(clippy::cast_precision_loss)]
    let (descriptors, restarts) = (descriptors as f64, restarts as f64);
    vec![
        Goal::below("largest growth of a process after the first 100 requests", 1.0, "%", growth),
        Goal::at_most("file descriptors left behind", 0.0, "", descriptors),
        Goal::at_most("workers lost", 0.0, "", restarts),
    ]
}

/// What the same process held before.
fn before<'a>(settled: &'a [Usage], end: &Usage) -> Option<&'a Usage> {
    settled.iter().find(|before| before.pid == end.pid)
}

fn growth_percent(before: &Usage, end: &Usage) -> f64 {
    // Sizes are far below what a float holds exactly.
    #[allow(clippy::cast_precision_loss)]
    let growth = (end.resident_bytes as f64 / before.resident_bytes as f64 - 1.0) * 100.0;
    growth
}

fn models_table(rows: &[Row]) -> Table {
    let mut table = Table::new([
        "milliseconds",
        "weights MB",
        "ready",
        "p99",
        "cold",
        "p99",
        "overhead",
        "start-up",
        "p99",
        "compared with",
    ]);
    let ms = |value: f64| format!("{value:.2}");
    for row in rows {
        table.push([
            row.model.clone(),
            megabytes(row.span_bytes),
            ms(row.ready_ms.median),
            ms(row.ready_ms.p99),
            ms(row.cold_ms.median),
            ms(row.cold_ms.p99),
            ms(row.overhead_ms),
            ms(row.startup_ms.median),
            ms(row.startup_ms.p99),
            row.compared_with.clone(),
        ]);
    }
    table
}

fn processes_table(settled: &[Usage], end: &[Usage]) -> Table {
    let mut table = Table::new([
        "process",
        "MB after 100",
        "at the end",
        "growth %",
        "descriptors after 100",
        "at the end",
    ]);
    for end in end {
        let before = before(settled, end);
        let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
        table.push([
            format!("{} {}", end.name, end.pid),
            or_dash(before.map(|before| megabytes(before.resident_bytes))),
            megabytes(end.resident_bytes),
            or_dash(before.map(|before| format!("{:+.2}", growth_percent(before, end)))),
            or_dash(before.map(|before| before.descriptors.to_string())),
            end.descriptors.to_string(),
        ]);
    }
    table
}

/// Bytes in MB, with one place.
fn megabytes(bytes: u64) -> String {
    format!("{}.{}", bytes / 1_000_000, bytes / 100_000 % 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn usage(pid: u32, resident_bytes: u64, descriptors: usize) -> Usage {
        Usage { pid, name: "p".to_owned(), resident_bytes, anonymous_bytes: 0, descriptors }
    }

    #[test]
    fn the_process_that_grows_most_counts() {
        let settled = [usage(1, 1_000_000, 10), usage(2, 2_000_000, 20)];
        let end = [usage(1, 990_000, 9), usage(2, 2_040_000, 23)];
        let texts: Vec<String> = goals(&settled, &end, 1).iter().map(ToString::to_string).collect();
        assert_eq!(
            texts,
            [
                "largest growth of a process after the first 100 requests: 2 % (asked: below 1 %): MISSED",
                "file descriptors left behind: 3 (asked: at most 0): MISSED",
                "workers lost: 1 (asked: at most 0): MISSED",
            ]
        );
    }

    #[test]
    fn a_process_that_was_not_there_has_no_growth() {
        let table =
            processes_table(&[usage(1, 1_000_000, 10)], &[usage(1, 1_001_000, 10), usage(3, 5_250_000, 7)]);
        assert_eq!(
            table.to_string(),
            "process  MB after 100  at the end  growth %  descriptors after 100  at the end\n\
             p 1               1.0         1.0     +0.10                     10          10\n\
             p 3                 -         5.2         -                      -           7\n"
        );
    }
}
