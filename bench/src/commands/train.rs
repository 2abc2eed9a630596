//! Training beside serving: what it costs the requests, and the training.

use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use pswitch_controller::{ByteSize, TaskCommand, TaskState, TaskStatus};
use pswitch_device::DeviceId;
use pswitch_train::TaskConfig;
use serde_json::json;

use crate::caller::Caller;
use crate::progress::{self, Progress};
use crate::random::Random;
use crate::report::{Goal, Report, Table};
use crate::serving::{Bench, Plan, Serving, Zygotes};
use crate::stats::{Samples, Summary, milliseconds, standard_error};
use crate::subject::Subject;
use crate::task;
use crate::trained::{Counted, PyTorchLoop, Trained};

/// The task's name in the server.
const TASK: &str = "bench";

/// The other model of the same archive.
const RIVAL: &str = "rival";

/// Steps ahead of those that count.
const WARM_UP_STEPS: u64 = 5;

/// A bound on what is queued on a GPU that bounds nothing: as if nobody ever asked for it to be short.
const UNBOUNDED_US: u64 = 1 << 40;

/// For how long tasks with and without a bound take turns, and behind how many steps that do not count: a step is as fast as the
/// host, which changes by a tenth within a second. Many short turns tell more than as much time of long ones.
const TURN_WARM_UP_STEPS: u64 = 2;
const TURN: Duration = Duration::from_millis(180);

/// Requests that are waited for in this time did not have to stop the task.
const UNNOTICED: Duration = Duration::from_millis(200);

/// Requests beside a training task: what either costs the other.
///
/// In turn: the task alone; requests alone, the task being paused; requests at random moments of its steps, each after it
/// has gone on; and seconds of back-to-back requests between seconds without any, against seconds of either alone in the midst
/// of them. The pool has room for the model or for another of the same archive, so that requests are cold where the other was
/// asked before. The task stands still for a request, within a step, and goes on from there. On a GPU also what it costs to
/// keep the work that is queued short: steps a second without a bound, in turn with it, and with every operator waited for.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  pswitch bench train --out
  pswitch bench train --task task.yaml --model models/resnet152 --training-size 12GiB --device cuda:0
  PYTHONPATH=python/src pswitch bench train --python .torch/venv/bin/python")]
pub(crate) struct Train {
    /// The task: a configuration whose length is ignored. By default a ResNet18 of target/training.
    #[arg(long, value_name = "FILE")]
    task: Option<PathBuf>,
    /// The model that is asked: a folder with model.pt2, or an archive.
    #[arg(long, value_name = "PATH", default_value = "target/fixtures/resnet18")]
    model: PathBuf,
    /// Part of the pool for training.
    #[arg(long, value_name = "SIZE", default_value = "1GiB")]
    training_size: ByteSize,
    /// Requests alone, and as many beside the task.
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(10..))]
    requests: u32,
    /// Seconds that the task is alone.
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u64).range(2..))]
    seconds: u64,
    /// Seconds of requests, each before one without.
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    turns: u32,
    /// On a GPU, turns of the task with a bound on what is queued, and as many of one without.
    #[arg(long, value_name = "N", default_value_t = 250, value_parser = clap::value_parser!(u32).range(2..))]
    pairs: u32,
    /// A Python with torch: PyTorch's own loop over the same task is measured as well.
    #[arg(long, value_name = "PROGRAM")]
    python: Option<PathBuf>,
    #[command(flatten)]
    pub(super) serving: Serving,
}

/// What was found.
struct Found {
    alone_steps_per_s: f64,
    /// On GPUs: in turn with and without a bound on what is queued, and with every operator waited for.
    bounded: Option<Bounded>,
    synchronous_steps_per_s: Option<f64>,
    idle: Latencies,
    beside: Latencies,
    yields: Summary,
    each_yield_ms: Vec<f64>,
    turns: Turns,
    last: TaskStatus,
}

/// Seconds of requests between seconds without, and others of either alone among them.
#[derive(Debug, Default)]
struct Turns {
    alone_requests: Counted,
    mixed_requests: Counted,
    alone_steps: Counted,
    mixed_steps: Counted,
}

/// Steps with a bound on what is queued, and without one, in all turns.
struct Bounded {
    with: Counted,
    without: Counted,
    /// The rate of the one as a share of that of the other, turn by turn, and by how much their mean may be off (one standard
    /// error).
    percent: Summary,
    error_percent: f64,
}

/// Of requests that find the model resident, and of those that do not.
struct Latencies {
    ready: Summary,
    cold: Summary,
}

/// The model that is asked, and the one that drives it out.
struct Callers {
    model: Caller,
    rival: Caller,
}

impl Callers {
    /// A cold request and one for the model that is resident then. What `before` returns for each, `after` is given.
    fn pair<T>(
        &mut self,
        bench: &Bench,
        mut before: impl FnMut() -> anyhow::Result<T>,
        mut after: impl FnMut(T) -> anyhow::Result<()>,
    ) -> anyhow::Result<[f64; 2]> {
        bench.call(&mut self.rival)?;
        let mut latencies = [0.0; 2];
        for (latency, switches) in latencies.iter_mut().zip([true, false]) {
            let given = before()?;
            let call = bench.call(&mut self.model)?;
            after(given)?;
            ensure!(call.timings.switched == switches, "the request was not one to be measured: {call:?}");
            *latency = milliseconds(call.latency);
        }
        Ok(latencies)
    }
}

impl Train {
    pub(crate) fn run(&self, zygotes: &mut Zygotes) -> anyhow::Result<Report> {
        let subject = Subject::open(&self.model)?;
        let served = self.serving.like_references(std::slice::from_ref(&subject));
        let config = task::open(self.task.as_deref())?;
        let bench = Bench::start(
            Plan {
                training_size: Some(self.training_size),
                training_gives_way: false,
                ..Plan::of_rivals(&self.serving, served, &subject, RIVAL, None)
            },
            zygotes,
            Arc::new(|_| ()),
        )?;
        let mut callers = Callers {
            model: Caller::new(&subject.name, subject.examples(served)?),
            rival: Caller::new(RIVAL, subject.examples(served)?),
        };
        let found = self.measure(&bench, &mut callers, &config)?;
        bench.stop()?;
        let pytorch = self.python.as_deref();
        let pytorch = pytorch
            .map(|python| PyTorchLoop::measure(python, served, &config, 0, self.seconds))
            .transpose()?;

        let ms = |value: f64| format!("{value:.2}");
        let mut table = Table::new(["", "alone", "beside each other"]);
        let mut row = |what: &str, alone: String, beside: String| {
            table.push([what.to_owned(), alone, beside]);
        };
        for (what, idle, beside) in [
            ("request", &found.idle.ready, &found.beside.ready),
            ("cold request", &found.idle.cold, &found.beside.cold),
        ] {
            row(&format!("{what}, median ms"), ms(idle.median), ms(beside.median));
            row(&format!("{what}, p99 ms"), ms(idle.p99), ms(beside.p99));
        }
        row("task computes on after a request, median ms", "-".to_owned(), ms(found.yields.median));
        row("the same, p99 ms", "-".to_owned(), ms(found.yields.p99));
        row(
            "requests a second, in their seconds",
            ms(found.turns.alone_requests.per_s()),
            ms(found.turns.mixed_requests.per_s()),
        );
        row(
            "steps a second, in its seconds",
            ms(found.turns.alone_steps.per_s()),
            ms(found.turns.mixed_steps.per_s()),
        );
        let mut rates = Table::new(["steps a second", ""]);
        let mut goals = Vec::new();
        rates.push(["as served".to_owned(), ms(found.alone_steps_per_s)]);
        if let Some(Bounded { with, without, error_percent, .. }) = &found.bounded {
            let (with, without) = (with.per_s(), without.per_s());
            rates.push(["the same, in turn with the next".to_owned(), ms(with)]);
            rates.push(["without a bound on what is queued".to_owned(), ms(without)]);
            rates.push(["standard error of the one in percent of the other".to_owned(), ms(*error_percent)]);
            let what = "steps a second, of those without a bound";
            goals.push(Goal::at_least(what, 98.0, "%", with / without * 100.0));
        }
        if let Some(rate) = found.synchronous_steps_per_s {
            rates.push(["every operator waited for".to_owned(), ms(rate)]);
        }
        if let Some(PyTorchLoop { steps_per_s, .. }) = &pytorch {
            rates.push(["PyTorch's own loop".to_owned(), ms(*steps_per_s)]);
            let what = "steps a second, of PyTorch's own loop";
            goals.push(Goal::at_least(what, 100.0, "%", found.alone_steps_per_s / steps_per_s * 100.0));
        }
        goals.extend([
            Goal::at_most("task computes on after a request, p99", 1.5, "ms", found.yields.p99),
            Goal::at_most(
                "request beside the task less request alone, median",
                1.0,
                "ms",
                found.beside.ready.median - found.idle.ready.median,
            ),
            Goal::at_most(
                "the same of cold requests",
                1.0,
                "ms",
                found.beside.cold.median - found.idle.cold.median,
            ),
            Goal::at_least(
                "requests a second in their seconds, of those alone",
                97.0,
                "%",
                found.turns.mixed_requests.per_s() / found.turns.alone_requests.per_s() * 100.0,
            ),
            Goal::at_least(
                "steps a second in its seconds, of those alone",
                95.0,
                "%",
                found.turns.mixed_steps.per_s() / found.turns.alone_steps.per_s() * 100.0,
            ),
        ]);
        let results = json!({
            "model": subject.name,
            "program": config.program,
            "batch_size": config.data.batch_size(),
            "device": served.device.to_string(),
            "threads": served.threads,
            "alone_steps_per_s": found.alone_steps_per_s,
            "bounded_steps_per_s": found.bounded.as_ref().map(|it| it.with.per_s()),
            "unbounded_steps_per_s": found.bounded.as_ref().map(|it| it.without.per_s()),
            "bounded_percent": found.bounded.as_ref().map(|it| it.percent),
            "bounded_error_percent": found.bounded.as_ref().map(|it| it.error_percent),
            "synchronous_steps_per_s": found.synchronous_steps_per_s,
            "pytorch": pytorch,
            "turns": self.turns,
            "turns_alone_steps_per_s": found.turns.alone_steps.per_s(),
            "mixed_steps_per_s": found.turns.mixed_steps.per_s(),
            "alone_requests_per_s": found.turns.alone_requests.per_s(),
            "mixed_requests_per_s": found.turns.mixed_requests.per_s(),
            "idle_ms": found.idle.ready,
            "idle_cold_ms": found.idle.cold,
            "beside_ms": found.beside.ready,
            "beside_cold_ms": found.beside.cold,
            "yield_ms": found.yields,
            "each_yield_ms": found.each_yield_ms,
            "progress": found.last.progress,
        });
        Ok(Report { command: "train", tables: vec![rates, table], goals, results })
    }

    /// The same task with another bound on what is queued, paused.
    fn with_bound<'a>(
        bench: &'a Bench,
        config: &TaskConfig,
        run_ahead_us: u64,
    ) -> anyhow::Result<Trained<'a>> {
        let name = format!("{TASK}-{run_ahead_us}");
        let config = TaskConfig { run_ahead_us: Some(run_ahead_us), ..config.clone() };
        let task = Trained::submit(bench, &name, &config)?;
        task.await_steps(WARM_UP_STEPS)?;
        task.tell(TaskCommand::Pause)?;
        Ok(task)
    }

    /// Steps of a task that is paused before and after.
    fn turn(task: &Trained<'_>, time: Duration) -> anyhow::Result<Counted> {
        task.tell(TaskCommand::Resume)?;
        let begun = task.status()?.progress.steps_done;
        task.await_steps(begun + TURN_WARM_UP_STEPS)?;
        let counted = task.steps_in(time)?;
        task.tell(TaskCommand::Pause)?;
        Ok(counted)
    }

    /// The steps of two tasks that train in turn.
    fn in_turn(with: &Trained<'_>, without: &Trained<'_>, pairs: u32) -> anyhow::Result<Bounded> {
        let mut all = [Counted::default(), Counted::default()];
        let mut percent = Vec::new();
        let pairs = pairs as usize;
        let progress = Progress::new("turns with and without a bound", pairs);
        for turn in 0..pairs {
            // Who comes first in one turn comes second in the next: a host that becomes faster or slower favours nobody.
            let mut order = [0, 1];
            order.rotate_left(turn % 2);
            let mut rates = [0.0; 2];
            for which in order {
                let counted = Self::turn([with, without][which], TURN)?;
                rates[which] = counted.per_s();
                all[which].add(&counted);
            }
            percent.push(rates[0] / rates[1] * 100.0);
            progress.step();
        }
        let [with, without] = all;
        let error_percent = standard_error(&percent);
        let percent = Summary::of(&percent).context("there are no turns")?;
        Ok(Bounded { with, without, percent, error_percent })
    }

    fn measure(&self, bench: &Bench, callers: &mut Callers, config: &TaskConfig) -> anyhow::Result<Found> {
        let seconds = Duration::from_secs(self.seconds);
        for _ in 0..callers.model.turns().max(3) {
            callers.pair(bench, || Ok(()), Ok)?;
        }
        let on_gpu = matches!(self.serving.device(), DeviceId::Cuda(_));
        let task = Trained::submit(bench, TASK, config)?;
        task.await_steps(WARM_UP_STEPS)?;
        let (mut synchronous_steps_per_s, mut bounded) = (None, None);
        if on_gpu {
            task.tell(TaskCommand::Pause)?;
            let synchronous = Self::with_bound(bench, config, 0)?;
            let free = Self::with_bound(bench, config, UNBOUNDED_US)?;
            bounded = Some(Self::in_turn(&task, &free, self.pairs)?);
            synchronous_steps_per_s = Some(Self::turn(&synchronous, seconds / 4)?.per_s());
            synchronous.tell(TaskCommand::Stop)?;
            free.tell(TaskCommand::Stop)?;
            task.tell(TaskCommand::Resume)?;
        }
        progress::say(format_args!("the task alone, {} s ...", self.seconds));
        let alone_steps_per_s = task.steps_per_s(seconds)?;

        task.tell(TaskCommand::Pause)?;
        let mut idle = [Samples::default(), Samples::default()];
        let progress = Progress::new("requests alone", self.requests as usize);
        for _ in 0..self.requests {
            push(&mut idle, callers.pair(bench, || Ok(()), Ok)?);
            progress.step();
        }
        drop(progress);
        task.tell(TaskCommand::Resume)?;
        let (mut beside, mut yields) = ([Samples::default(), Samples::default()], Samples::default());
        let mut random = Random::new(1);
        let step = Duration::from_secs_f64(1.0 / alone_steps_per_s);
        let progress = Progress::new("requests beside the task", self.requests as usize);
        for _ in 0..self.requests {
            let begins = || {
                task.await_state(TaskState::Training)?;
                thread::sleep(step.mul_f64(random.share() * 2.0));
                Ok(task.status()?.progress.interruptions)
            };
            let ends = |before| {
                // None if it was between two steps and nobody had to stop.
                if let Some(us) = await_interruption(&task, before)? {
                    // Microseconds of one interruption.
                    #[allow(clippy::cast_precision_loss)]
                    yields.push(us as f64 / 1e3);
                }
                Ok(())
            };
            let latencies = callers.pair(bench, begins, ends)?;
            push(&mut beside, latencies);
            progress.step();
        }
        drop(progress);

        let turns = self.take_turns(bench, &mut callers.model, &task, || step.mul_f64(random.share()))?;
        let last = task.status()?;
        task.tell(TaskCommand::Stop)?;
        Ok(Found {
            alone_steps_per_s,
            bounded,
            synchronous_steps_per_s,
            idle: latencies(&idle)?,
            beside: latencies(&beside)?,
            yields: yields.summary().context("no request came while the task computed")?,
            each_yield_ms: yields.values().to_vec(),
            turns,
            last,
        })
    }

    /// Seconds of requests between seconds without, as often as there are turns. Machines change while they are measured: in each
    /// turn either is alone for a second as well. `part` is of a step, at random: whole steps are counted, and their seconds must
    /// not all begin as a step does.
    fn take_turns(
        &self,
        bench: &Bench,
        caller: &mut Caller,
        task: &Trained<'_>,
        mut part: impl FnMut() -> Duration,
    ) -> anyhow::Result<Turns> {
        const SECOND: Duration = Duration::from_secs(1);
        let steps = || -> anyhow::Result<Counted> {
            let (from, begun) = (task.status()?.progress.steps_done, Instant::now());
            thread::sleep(SECOND);
            Ok(Counted { count: task.status()?.progress.steps_done - from, time: begun.elapsed() })
        };
        let mut turns = Turns::default();
        let progress = Progress::new("seconds of either in turn", self.turns as usize);
        for _ in 0..self.turns {
            turns.mixed_requests.add(&ask_for(bench, caller, SECOND)?);
            turns.mixed_steps.add(&steps()?);
            turns.alone_steps.add(&steps()?);
            task.tell(TaskCommand::Pause)?;
            turns.alone_requests.add(&ask_for(bench, caller, SECOND)?);
            let begun = task.status()?.progress.steps_done;
            task.tell(TaskCommand::Resume)?;
            task.await_steps(begun + 1)?;
            thread::sleep(part());
            progress.step();
        }
        Ok(turns)
    }
}

fn push([cold, ready]: &mut [Samples; 2], [cold_ms, ready_ms]: [f64; 2]) {
    cold.push(cold_ms);
    ready.push(ready_ms);
}

fn latencies([cold, ready]: &[Samples; 2]) -> anyhow::Result<Latencies> {
    let summary = |samples: &Samples| samples.summary().context("nothing was measured");
    Ok(Latencies { ready: summary(ready)?, cold: summary(cold)? })
}

/// How long the task went on computing, once another interruption is counted or it trains as if there had been none.
fn await_interruption(task: &Trained<'_>, before: u64) -> anyhow::Result<Option<u64>> {
    let begun = Instant::now();
    task.wait_for("an interruption", |status| {
        if status.progress.interruptions > before {
            Some(status.last_yield_us)
        } else if begun.elapsed() > UNNOTICED {
            Some(None)
        } else {
            None
        }
    })
}

/// One request after the other for some time: how many were answered, and how long that took.
fn ask_for(bench: &Bench, caller: &mut Caller, time: Duration) -> anyhow::Result<Counted> {
    let begun = Instant::now();
    let mut count = 0;
    while begun.elapsed() < time {
        bench.call(caller)?;
        count += 1;
    }
    Ok(Counted { count, time: begun.elapsed() })
}
