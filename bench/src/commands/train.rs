//! Training beside serving: what it costs the requests, and the training.

use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use pswitch_controller::{ByteSize, InferenceService as _, TaskCommand, TaskState, TaskStatus};
use pswitch_train::TaskConfig;
use serde_json::json;

use crate::caller::Caller;
use crate::progress::Progress;
use crate::random::Random;
use crate::report::{Goal, Report, Table};
use crate::serving::{Bench, Plan, Serving, Zygotes};
use crate::stats::{Samples, Summary};
use crate::subject::Subject;
use crate::task;

/// The task's name in the server.
const TASK: &str = "bench";

/// Steps ahead of those that count.
const WARM_UP_STEPS: u64 = 5;

/// Time that anything may take.
const PATIENCE: Duration = Duration::from_secs(120);

/// Requests beside a training task: what either costs the other.
///
/// In turn: the task alone; requests alone, the task being paused; requests at random moments of its steps, each after it
/// has gone on; and seconds of back-to-back requests between seconds without any. The model fits the pool, so that no
/// request switches. A step that a request stops is thrown away and done again.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  pswitch bench train --out
  pswitch bench train --task task.yaml --model models/resnet152 --training-size 12GiB --device cuda:0")]
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
    /// Seconds that the task is alone, and seconds of requests between as many without.
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u64).range(2..))]
    seconds: u64,
    #[command(flatten)]
    pub(super) serving: Serving,
}

/// What was found.
struct Found {
    alone_steps_per_s: f64,
    idle: Summary,
    beside: Summary,
    yields: Summary,
    alone_requests_per_s: f64,
    mixed_requests_per_s: f64,
    mixed_steps_per_s: f64,
    last: TaskStatus,
}

impl Train {
    pub(crate) fn run(&self, zygotes: &mut Zygotes) -> anyhow::Result<Report> {
        let subject = Subject::open(&self.model)?;
        let served = self.serving.like_references(std::slice::from_ref(&subject));
        let config = task::open(self.task.as_deref())?;
        let bench = Bench::start(
            Plan {
                serving: &self.serving,
                served,
                models: vec![(subject.name.clone(), &*subject.archive)],
                homes_bytes: Some(subject.span_bytes * 5 / 4),
                link_bandwidth: None,
                training_size: Some(self.training_size),
            },
            zygotes,
            Arc::new(|_| ()),
        )?;
        let mut caller = Caller::new(&subject.name, subject.examples(served)?);
        let found = self.measure(&bench, &mut caller, &config)?;
        bench.stop()?;

        let ms = |value: f64| format!("{value:.2}");
        let mut table = Table::new(["", "alone", "beside each other"]);
        let mut row = |what: &str, alone: String, beside: String| {
            table.push([what.to_owned(), alone, beside]);
        };
        row("request, median ms", ms(found.idle.median), ms(found.beside.median));
        row("request, p99 ms", ms(found.idle.p99), ms(found.beside.p99));
        row("task computes on after a request, median ms", "-".to_owned(), ms(found.yields.median));
        row("the same, p99 ms", "-".to_owned(), ms(found.yields.p99));
        row(
            "requests a second, in their seconds",
            ms(found.alone_requests_per_s),
            ms(found.mixed_requests_per_s),
        );
        row("steps a second, in its seconds", ms(found.alone_steps_per_s), ms(found.mixed_steps_per_s));
        let goals = vec![
            Goal::at_most("task computes on after a request, p99", 1.5, "ms", found.yields.p99),
            Goal::at_most(
                "request beside the task less request alone, median",
                1.0,
                "ms",
                found.beside.median - found.idle.median,
            ),
            Goal::at_least(
                "requests a second in their seconds, of those alone",
                97.0,
                "%",
                found.mixed_requests_per_s / found.alone_requests_per_s * 100.0,
            ),
            Goal::at_least(
                "steps a second in its seconds, of those alone",
                95.0,
                "%",
                found.mixed_steps_per_s / found.alone_steps_per_s * 100.0,
            ),
        ];
        let results = json!({
            "model": subject.name,
            "program": config.program,
            "batch_size": config.data.batch_size(),
            "device": served.device.to_string(),
            "threads": served.threads,
            "alone_steps_per_s": found.alone_steps_per_s,
            "mixed_steps_per_s": found.mixed_steps_per_s,
            "alone_requests_per_s": found.alone_requests_per_s,
            "mixed_requests_per_s": found.mixed_requests_per_s,
            "idle_ms": found.idle,
            "beside_ms": found.beside,
            "yield_ms": found.yields,
            "progress": found.last.progress,
        });
        Ok(Report { command: "train", tables: vec![table], goals, results })
    }

    fn measure(&self, bench: &Bench, caller: &mut Caller, config: &TaskConfig) -> anyhow::Result<Found> {
        let seconds = Duration::from_secs(self.seconds);
        for _ in 0..caller.turns().max(3) {
            bench.call(caller)?;
        }
        let config = serde_json::to_string(config)?;
        bench.runtime.block_on(bench.server.submit_training(TASK, &config))?;
        await_steps(bench, WARM_UP_STEPS)?;
        eprintln!("the task alone, {} s ...", self.seconds);
        let alone_steps_per_s = steps_per_s(bench, seconds)?;

        tell(bench, TaskCommand::Pause)?;
        let mut idle = Samples::with_capacity(self.requests as usize);
        let progress = Progress::new("requests alone", self.requests as usize);
        for _ in 0..self.requests {
            idle.push_ms(bench.call(caller)?.latency);
            progress.step();
        }
        drop(progress);
        let alone_requests_per_s = requests_per_s(bench, caller, Duration::from_secs(2))?;

        tell(bench, TaskCommand::Resume)?;
        let (mut beside, mut yields) = (Samples::default(), Samples::default());
        let mut random = Random::new(1);
        let step = Duration::from_secs_f64(1.0 / alone_steps_per_s);
        let progress = Progress::new("requests beside the task", self.requests as usize);
        for _ in 0..self.requests {
            await_state(bench, TaskState::Training)?;
            thread::sleep(step.mul_f64(random.share() * 2.0));
            let before = status(bench)?.progress.interruptions;
            beside.push_ms(bench.call(caller)?.latency);
            // None if it was between two steps and nobody had to stop.
            if let Some(us) = await_interruption(bench, before)? {
                // Microseconds of one interruption.
                #[allow(clippy::cast_precision_loss)]
                yields.push(us as f64 / 1e3);
            }
            progress.step();
        }
        drop(progress);

        eprintln!("in turn, {} s each ...", self.seconds);
        let (mut requests, mut steps, mut training) = (0, 0, Duration::ZERO);
        let mut asking = Duration::ZERO;
        for _ in 0..self.seconds {
            let begun = Instant::now();
            while begun.elapsed() < Duration::from_secs(1) {
                bench.call(caller)?;
                requests += 1;
            }
            asking += begun.elapsed();
            let (from, begun) = (status(bench)?.progress.steps_done, Instant::now());
            thread::sleep(Duration::from_secs(1));
            steps += status(bench)?.progress.steps_done - from;
            training += begun.elapsed();
        }
        let last = status(bench)?;
        tell(bench, TaskCommand::Stop)?;
        // Counts of some thousands.
        #[allow(clippy::cast_precision_loss)]
        let rate = |count: u64, time: Duration| count as f64 / time.as_secs_f64();
        Ok(Found {
            alone_steps_per_s,
            idle: idle.summary().context("nothing was measured")?,
            beside: beside.summary().context("nothing was measured")?,
            yields: yields.summary().context("no request came while the task computed")?,
            alone_requests_per_s,
            mixed_requests_per_s: rate(requests, asking),
            mixed_steps_per_s: rate(steps, training),
            last,
        })
    }
}

fn status(bench: &Bench) -> anyhow::Result<TaskStatus> {
    let status = bench.server.training().into_iter().find(|status| status.name == TASK);
    let status = status.context("the task is gone")?;
    if status.state == TaskState::Failed {
        bail!("the task failed: {}", status.reason);
    }
    Ok(status)
}

fn tell(bench: &Bench, command: TaskCommand) -> anyhow::Result<()> {
    bench.runtime.block_on(bench.server.command_training(TASK, command))?;
    Ok(())
}

fn wait_for<T>(
    bench: &Bench,
    what: &str,
    mut look: impl FnMut(&TaskStatus) -> Option<T>,
) -> anyhow::Result<T> {
    let begun = Instant::now();
    loop {
        let status = status(bench)?;
        if let Some(found) = look(&status) {
            return Ok(found);
        }
        ensure!(begun.elapsed() < PATIENCE, "the task does not come to {what}: {status:?}");
        thread::sleep(Duration::from_micros(200));
    }
}

fn await_steps(bench: &Bench, steps: u64) -> anyhow::Result<()> {
    wait_for(bench, "its first steps", |status| (status.progress.steps_done >= steps).then_some(()))
}

fn await_state(bench: &Bench, state: TaskState) -> anyhow::Result<()> {
    wait_for(bench, "training", |status| (status.state == state).then_some(()))
}

/// How long the task went on computing, once another interruption is counted or it trains as if there had been none.
fn await_interruption(bench: &Bench, before: u64) -> anyhow::Result<Option<u64>> {
    let begun = Instant::now();
    wait_for(bench, "an interruption", |status| {
        if status.progress.interruptions > before {
            Some(status.last_yield_us)
        } else if begun.elapsed() > Duration::from_millis(200) {
            Some(None)
        } else {
            None
        }
    })
}

fn steps_per_s(bench: &Bench, time: Duration) -> anyhow::Result<f64> {
    let (from, begun) = (status(bench)?.progress.steps_done, Instant::now());
    thread::sleep(time);
    let steps = status(bench)?.progress.steps_done - from;
    ensure!(steps > 0, "not a step in {} s: give it more --seconds", time.as_secs());
    // Counts of some thousands.
    #[allow(clippy::cast_precision_loss)]
    let rate = steps as f64 / begun.elapsed().as_secs_f64();
    Ok(rate)
}

fn requests_per_s(bench: &Bench, caller: &mut Caller, time: Duration) -> anyhow::Result<f64> {
    let begun = Instant::now();
    let mut requests = 0_u32;
    while begun.elapsed() < time {
        bench.call(caller)?;
        requests += 1;
    }
    Ok(f64::from(requests) / begun.elapsed().as_secs_f64())
}
