//! Where the time goes until a server with many models is ready.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use pswitch_controller::LoadEvent;
use pswitch_device::SharedMemory;
use pswitch_model::{Archive, StorageId};
use serde::Serialize;
use serde_json::json;

use crate::report::{Goal, Report, Table};
use crate::serving::{Bench, Moments, Plan, Serving, Zygotes};
use crate::stats::milliseconds;
use crate::subject::Subject;

/// Start-up of a server with many models.
///
/// Takes the time of everything that the server reports while it loads, and compares the copying of weights with a
/// single copy of as many bytes from a mapped archive to shared memory, made in the same run. Threads are left to
/// libtorch by default.
#[derive(Debug, clap::Args)]
pub(crate) struct StartUp {
    /// The models: folders with model.pt2, or archives. Fewer than --models are taken again under other names.
    #[arg(long = "model", value_name = "PATH", num_args = 1.., default_values = ["target/fixtures/resnet152"])]
    paths: Vec<PathBuf>,
    /// How many models the server has.
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    models: u32,
    #[command(flatten)]
    pub(super) serving: Serving,
}

/// When something was reported, counted from the start.
#[derive(Debug, Clone)]
struct Moment {
    at: Duration,
    event: LoadEvent,
}

/// When a model had got how far, in milliseconds from the start.
#[derive(Debug, Clone, PartialEq, Serialize)]
struct ModelTimes {
    model: String,
    opened_ms: f64,
    copied_ms: f64,
    built_ms: f64,
    ready_ms: f64,
}

/// A part of the start-up: when its first model began it, when its last ended it, and for how long any was in it.
#[derive(Debug, Clone, PartialEq, Serialize)]
struct Stage {
    stage: &'static str,
    from_ms: f64,
    to_ms: f64,
    busy_ms: f64,
}

/// A stretch of time.
type Interval = (Duration, Duration);

/// What one copy of all weights takes by itself.
#[derive(Debug, Clone, Copy, Serialize)]
struct SingleCopy {
    /// To memory that nobody has touched, as a server does it.
    fresh_bytes_per_s: f64,
    /// To memory that is there: what this machine's memory can do.
    warm_bytes_per_s: f64,
}

impl StartUp {
    pub(crate) fn run(&self, zygotes: &mut Zygotes) -> anyhow::Result<Report> {
        let subjects =
            self.paths.iter().map(|path| Subject::open(path)).collect::<anyhow::Result<Vec<_>>>()?;
        let chosen: Vec<&Subject> = subjects.iter().cycle().take(self.models as usize).collect();
        let span_bytes: u64 = chosen.iter().map(|subject| subject.span_bytes).sum();
        let models = (0..).zip(&chosen);
        let models = models.map(|(n, s): (u32, _)| (format!("{n:02}-{}", s.name), s.archive.as_path()));
        let plan = Plan {
            serving: &self.serving,
            served: self.serving.with_threads(0),
            models: models.collect(),
            homes_bytes: None,
            link_bandwidth: None,
            training_size: None,
            training_gives_way: false,
        };
        // The copy that is compared with is as fast with the archives in the page cache.
        let single = single_copy(subjects.first().context("there are no models")?)?;

        let events: Arc<Mutex<Vec<(Instant, LoadEvent)>>> = Arc::default();
        let noted = Arc::clone(&events);
        let observer = Arc::new(move |event| {
            noted.lock().unwrap_or_else(PoisonError::into_inner).push((Instant::now(), event));
        });
        let bench = Bench::start(plan, zygotes, observer)?;
        let processes = bench.processes()?;
        let times = bench.moments;
        bench.stop()?;

        let events = std::mem::take(&mut *events.lock().unwrap_or_else(PoisonError::into_inner));
        let moments: Vec<Moment> = events
            .into_iter()
            .map(|(at, event)| Moment { at: at.saturating_duration_since(times.begun), event })
            .collect();
        let started = times.started.saturating_duration_since(times.begun);
        let (rows, stages) = timeline(&moments, started);
        let copied: u64 = moments.iter().map(|moment| copied_bytes(&moment.event)).sum();
        let anonymous: u64 = processes.iter().map(|process| process.anonymous_bytes).sum();
        Ok(self.report(&rows, &stages, times, &Bytes { span_bytes, copied, anonymous }, single))
    }

    fn report(
        &self,
        rows: &[ModelTimes],
        stages: &[Stage],
        times: Moments,
        bytes: &Bytes,
        single: SingleCopy,
    ) -> Report {
        let total_ms = milliseconds(times.ready.saturating_duration_since(times.begun));
        let mut models = Table::new(["milliseconds", "opened", "copied", "built", "ready"]);
        let ms = |value: f64| format!("{value:.0}");
        for row in rows {
            let [opened, copied, built, ready] =
                [row.opened_ms, row.copied_ms, row.built_ms, row.ready_ms].map(ms);
            models.push([row.model.clone(), opened, copied, built, ready]);
        }
        let mut table = Table::new(["milliseconds", "from", "to", "busy", "% of all"]);
        for stage in stages {
            table.push([
                stage.stage.to_owned(),
                ms(stage.from_ms),
                ms(stage.to_ms),
                ms(stage.busy_ms),
                format!("{:.1}", stage.busy_ms / total_ms * 100.0),
            ]);
        }
        table.push(["all, ready".to_owned(), ms(0.0), ms(total_ms), ms(total_ms), "100.0".to_owned()]);

        // Sizes are far below what a float holds exactly.
        #[allow(clippy::cast_precision_loss)]
        let [spans, copied, anonymous] =
            [bytes.span_bytes, bytes.copied, bytes.anonymous].map(|bytes| bytes as f64);
        let copy_ms = stages.iter().find(|stage| stage.stage == COPY).map_or(f64::NAN, |stage| stage.busy_ms);
        let single_ms = copied / single.fresh_bytes_per_s * 1e3;
        let mut copies = Table::new(["weights", "MB", "ms", "GB/s"]);
        let line = |name: &str, ms: f64, bytes_per_s: f64| {
            [
                name.to_owned(),
                format!("{:.0}", copied / 1e6),
                format!("{ms:.0}"),
                format!("{:.2}", bytes_per_s / 1e9),
            ]
        };
        copies.push(line("copied at start-up", copy_ms, copied / copy_ms * 1e3));
        copies.push(line("one copy alone, fresh memory", single_ms, single.fresh_bytes_per_s));
        copies.push(line(
            "one copy alone, warm memory",
            copied / single.warm_bytes_per_s * 1e3,
            single.warm_bytes_per_s,
        ));
        // A second copy would lie there.
        let private = "private memory of all processes".to_owned();
        copies.push([private, format!("{:.0}", anonymous / 1e6), "-".to_owned(), "-".to_owned()]);
        let goals =
            vec![Goal::at_most("times that weights were copied to the host store", 1.0, "", copied / spans)];
        let results = json!({
            "models": rows,
            "stages": stages,
            "ready_ms": total_ms,
            "span_bytes": bytes.span_bytes,
            "copied_bytes": bytes.copied,
            "copy_ms": copy_ms,
            "single_copy": single,
            "single_copy_ms": single_ms,
            "private_bytes": bytes.anonymous,
        });
        Report { command: "start-up", tables: vec![models, table, copies], goals, results }
    }
}

/// Sizes of a start-up.
struct Bytes {
    /// Of all models' spans.
    span_bytes: u64,
    /// That were copied to the host store.
    copied: u64,
    /// Of memory that belongs to one process alone, of all processes together.
    anonymous: u64,
}

const COPY: &str = "copy weights to the host store";

/// When each model had got how far, and which stage took how long. `started` is when copying began.
fn timeline(moments: &[Moment], started: Duration) -> (Vec<ModelTimes>, Vec<Stage>) {
    let find = |model: &str, step: Step| {
        let mut found = moments.iter().filter(|moment| step_of(&moment.event) == Some((step, model)));
        found.next_back().map(|moment| moment.at)
    };
    let mut rows = Vec::new();
    let (mut builds, mut profiles) = (Vec::new(), Vec::new());
    let (mut open, mut copied_at) = ((Duration::ZERO, Duration::ZERO), started);
    for moment in moments {
        let LoadEvent::Opened { model, .. } = &moment.event else {
            if matches!(moment.event, LoadEvent::Found { .. }) {
                open = (moment.at, moment.at);
            }
            continue;
        };
        open.1 = moment.at;
        // A model without weights is not copied.
        let copied = find(model, Step::Copied).unwrap_or(started);
        copied_at = copied_at.max(copied);
        let steps = [Step::Building, Step::Profiling, Step::Ready].map(|step| find(model, step));
        let [Some(building), Some(profiling), Some(ready)] = steps else { continue };
        builds.push((building, profiling));
        profiles.push((profiling, ready));
        rows.push(ModelTimes {
            model: model.clone(),
            opened_ms: milliseconds(moment.at),
            copied_ms: milliseconds(copied),
            built_ms: milliseconds(profiling),
            ready_ms: milliseconds(ready),
        });
    }
    let stages = vec![
        stage("list the repository, open the device", &[(Duration::ZERO, open.0)]),
        stage("open archives, read graphs", &[open]),
        stage("pool, link, workers forked", &[(open.1, started)]),
        stage(COPY, &[(started, copied_at)]),
        stage("build in the workers", &builds),
        stage("time layers and plan", &profiles),
    ];
    (rows, stages)
}

/// What of a model an event reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Copied,
    Building,
    Profiling,
    Ready,
}

fn step_of(event: &LoadEvent) -> Option<(Step, &str)> {
    match event {
        LoadEvent::Copied { model, .. } => Some((Step::Copied, model)),
        LoadEvent::Building { model } => Some((Step::Building, model)),
        LoadEvent::Profiling { model } => Some((Step::Profiling, model)),
        LoadEvent::Ready { model, .. } => Some((Step::Ready, model)),
        LoadEvent::Found { .. } | LoadEvent::Opened { .. } | LoadEvent::Unavailable { .. } => None,
    }
}

fn stage(stage: &'static str, intervals: &[Interval]) -> Stage {
    let from = intervals.iter().map(|interval| interval.0).min().unwrap_or_default();
    let to = intervals.iter().map(|interval| interval.1).max().unwrap_or_default();
    let busy_ms = milliseconds(union(intervals));
    Stage { stage, from_ms: milliseconds(from), to_ms: milliseconds(to), busy_ms }
}

/// For how long at least one of the intervals lasts.
fn union(intervals: &[Interval]) -> Duration {
    let mut sorted = intervals.to_vec();
    sorted.sort();
    let mut covered_to = Duration::ZERO;
    let mut sum = Duration::ZERO;
    for (from, to) in sorted {
        sum += to.saturating_sub(from.max(covered_to));
        covered_to = covered_to.max(to);
    }
    sum
}

fn copied_bytes(event: &LoadEvent) -> u64 {
    if let LoadEvent::Copied { bytes, .. } = event { *bytes } else { 0 }
}

/// Copies a model's weights as a server does, twice to the same memory. The best of three.
fn single_copy(subject: &Subject) -> anyhow::Result<SingleCopy> {
    let archive = Archive::open(&subject.archive)?;
    let layout = archive.program().span();
    // Those that nothing uses come last.
    let used = || (0..).map(StorageId).zip(layout.offsets.iter().take_while(|at| **at < layout.used_bytes));
    let copy = |to: &SharedMemory| -> anyhow::Result<Duration> {
        let begun = Instant::now();
        for (storage, &offset) in used() {
            to.write(offset, archive.storage_bytes(storage))?;
        }
        Ok(begun.elapsed())
    };
    let (mut fresh, mut warm) = (Duration::MAX, Duration::MAX);
    for _ in 0..3 {
        let memory = SharedMemory::create("pswitch-bench", layout.used_bytes.max(1))?;
        fresh = fresh.min(copy(&memory)?);
        warm = warm.min(copy(&memory)?);
    }
    let bytes: usize = used().map(|(storage, _)| archive.storage_bytes(storage).len()).sum();
    // Sizes are far below what a float holds exactly.
    #[allow(clippy::cast_precision_loss)]
    let rate = |time: Duration| bytes as f64 / time.as_secs_f64().max(1e-9);
    Ok(SingleCopy { fresh_bytes_per_s: rate(fresh), warm_bytes_per_s: rate(warm) })
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn overlaps_count_once() {
        assert_eq!(union(&[]), ms(0));
        assert_eq!(union(&[(ms(5), ms(9)), (ms(0), ms(2)), (ms(1), ms(6)), (ms(7), ms(8))]), ms(9));
        assert_eq!(union(&[(ms(3), ms(3)), (ms(4), ms(5))]), ms(1));
    }

    #[test]
    fn stages_are_told_apart() {
        let (a, b) = (|| "a".to_owned(), || "b".to_owned());
        let moments: Vec<Moment> = [
            (10, LoadEvent::Found { models: 2 }),
            (20, LoadEvent::Opened { model: a(), span_bytes: 8 }),
            (40, LoadEvent::Opened { model: b(), span_bytes: 4 }),
            (110, LoadEvent::Copied { model: a(), bytes: 6 }),
            (150, LoadEvent::Copied { model: a(), bytes: 2 }),
            (151, LoadEvent::Building { model: a() }),
            (180, LoadEvent::Copied { model: b(), bytes: 4 }),
            (181, LoadEvent::Building { model: b() }),
            (201, LoadEvent::Profiling { model: a() }),
            (211, LoadEvent::Profiling { model: b() }),
            (300, LoadEvent::Ready { model: b(), groups: 1 }),
            (400, LoadEvent::Ready { model: a(), groups: 2 }),
        ]
        .map(|(at, event)| Moment { at: ms(at), event })
        .to_vec();
        let (rows, stages) = timeline(&moments, ms(100));
        let expected =
            ModelTimes { model: a(), opened_ms: 20.0, copied_ms: 150.0, built_ms: 201.0, ready_ms: 400.0 };
        assert_eq!((rows.len(), &rows[0]), (2, &expected));
        let found: Vec<(f64, f64, f64)> =
            stages.iter().map(|stage| (stage.from_ms, stage.to_ms, stage.busy_ms)).collect();
        let expected = [
            (0.0, 10.0, 10.0),
            (10.0, 40.0, 30.0),
            (40.0, 100.0, 60.0),
            (100.0, 180.0, 80.0),
            (151.0, 211.0, 60.0),
            (201.0, 400.0, 199.0),
        ];
        assert_eq!(found, expected);
        assert_eq!(moments.iter().map(|moment| copied_bytes(&moment.event)).sum::<u64>(), 12);
    }
}
