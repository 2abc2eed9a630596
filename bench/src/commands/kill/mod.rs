//! Workers that are killed in the middle of switches: whether every answer is right all the same, and how soon.

mod outcome;

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pswitch_controller::{InferenceService as _, ServiceError};
use serde_json::json;

use super::GPU_MODELS;
use crate::caller::{Call, Caller, WrongOutput};
use crate::processes::{activities, busiest};
use crate::progress::{self, Progress};
use crate::random::Random;
use crate::report::Report;
use crate::serving::{Bench, Plan, Serving, Zygotes};
use crate::stats::milliseconds;
use crate::subject::Subject;

use outcome::{Answered, Strike};

/// Requests of each model ahead of a kill; the last one says how long a cold one takes.
const ROUNDS: usize = 2;

/// A worker is killed up to so many cold latencies after the request: some kills come too late to hit it.
const LATEST: f64 = 1.2;

/// Time for the next right answer, and for as many workers as before.
const PATIENCE: Duration = Duration::from_secs(60);

/// Workers that are killed in the middle of switches.
///
/// The pool has room for the largest model alone and the models are asked in turn, so that every request has to bring
/// its weights. At a random moment after each request, within 1.2 cold latencies, the worker that executes is killed
/// (SIGKILL). The request has to be answered rightly all the same, or refused for the lost worker; the next one to the
/// same model has to be answered rightly; and another worker has to take the lost one's place, for which the next kill
/// waits.
///
/// Every output is compared to the last bit with eager PyTorch's where reference cases lie beside the archive and were
/// made on such a device, on the CPU with as many threads, which is the default; else with the first.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  pswitch bench kill --device cuda:0 --out
  pswitch bench kill --model target/fixtures/resnet18 target/fixtures/mobilenet_v3_small --kills 10")]
pub(crate) struct Kill {
    /// The models: folders with model.pt2, or archives; two or more, in the order of the requests.
    #[arg(long = "model", value_name = "PATH", num_args = 2.., default_values = GPU_MODELS)]
    models: Vec<PathBuf>,
    /// Workers to kill, one after the other.
    #[arg(long, value_name = "N", default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..))]
    kills: u32,
    /// Of the moments at which they are killed.
    #[arg(long, value_name = "NUMBER", default_value_t = 1)]
    seed: u64,
    #[command(flatten)]
    pub(super) serving: Serving,
}

impl Kill {
    pub(crate) fn run(&self, zygotes: &mut Zygotes) -> anyhow::Result<Report> {
        let subjects =
            self.models.iter().map(|path| Subject::open(path)).collect::<anyhow::Result<Vec<_>>>()?;
        let served = self.serving.like_references(&subjects);
        let plan = Plan {
            serving: &self.serving,
            served,
            models: subjects.iter().map(|s| (s.name.clone(), s.archive.as_path())).collect(),
            homes_bytes: subjects.iter().map(|subject| subject.span_bytes).max(),
            link_bandwidth: None,
            training_size: None,
            training_gives_way: false,
        };
        progress::say("starting the server ...");
        let bench = Bench::start(plan, zygotes, Arc::new(|_| ()))?;
        let mut callers = subjects
            .iter()
            .map(|subject| Ok(Caller::new(&subject.name, subject.examples(served)?)))
            .collect::<anyhow::Result<Vec<_>>>()?;
        // Every answer is known afterwards that later ones are compared with.
        let turns = callers.iter().map(Caller::turns).max().unwrap_or(0);
        for _ in 0..turns {
            callers.iter_mut().try_for_each(|caller| bench.call(caller).map(drop))?;
        }
        let mut killer = Killer { bench: &bench, workers: live(&bench), last: None, dead: BTreeSet::new() };
        let mut random = Random::new(self.seed);
        let mut strikes = Vec::with_capacity(self.kills as usize);
        let progress = Progress::new("kills", self.kills as usize);
        for turn in 0..self.kills as usize {
            let model = turn % callers.len();
            let cold = cold(&bench, &mut callers, model)?;
            strikes.push(killer.strike(&mut callers[model], cold, random.share())?);
            progress.step();
        }
        drop(progress);
        let slot_in_use_bytes = slots_left(&bench);
        let restarts = bench.server.snapshot().worker_restarts;
        bench.stop()?;

        let rows = outcome::rows(callers.iter().map(Caller::model), &strikes);
        let results = json!({
            "kills": self.kills,
            "seed": self.seed,
            "device": served.device.to_string(),
            "threads": served.threads,
            "models": rows,
            "strikes": strikes,
            "worker_restarts": restarts,
            "slot_in_use_bytes": slot_in_use_bytes,
        });
        let goals = outcome::goals(&strikes, restarts, slot_in_use_bytes);
        Ok(Report { command: "kill", tables: outcome::tables(&rows, &strikes), goals, results })
    }
}

/// How long a cold request of a model takes, now and by the worker whose turn it is, when it has executed all models. The
/// model is not resident afterwards.
fn cold(bench: &Bench, callers: &mut [Caller], model: usize) -> anyhow::Result<Duration> {
    let mut latency = Duration::ZERO;
    for _ in 0..ROUNDS {
        let (before, from) = callers.split_at_mut(model);
        let mut others = from.iter_mut().chain(before);
        let caller = others.next().context("there are no models")?;
        let call = bench.call(caller)?;
        let name = caller.model();
        ensure!(call.timings.switched, "'{name}' was resident: do some of the models fit together?");
        latency = call.latency;
        others.try_for_each(|caller| bench.call(caller).map(drop))?;
    }
    Ok(latency)
}

/// Workers that can execute.
fn live(bench: &Bench) -> u64 {
    let workers = bench.server.snapshot().workers;
    workers.iter().filter(|(state, _)| ["standby", "active"].contains(state)).map(|(_, count)| count).sum()
}

/// Bytes of slots that somebody holds although every request has been answered.
fn slots_left(bench: &Bench) -> u64 {
    let latest = Instant::now() + Duration::from_secs(5);
    loop {
        let bytes = bench.server.snapshot().slot_in_use_bytes;
        // A worker that was killed holds its slot until it has been reaped.
        if bytes == 0 || Instant::now() > latest {
            return bytes;
        }
        thread::sleep(Duration::from_millis(5));
    }
}

struct Killer<'a> {
    bench: &'a Bench,
    /// How many can execute when none is lost.
    workers: u64,
    /// The one that executed last: it gets the next request.
    last: Option<u32>,
    /// Those that were killed. What a process has on a GPU takes a while to be torn down.
    dead: BTreeSet<u32>,
}

impl Killer<'_> {
    /// Sends a request, kills the worker that executes it within [`LATEST`] cold latencies, and waits until all is as
    /// before.
    fn strike(&mut self, caller: &mut Caller, cold: Duration, share: f64) -> anyhow::Result<Strike> {
        let wait = cold.mul_f64(LATEST * share);
        let restarts = self.bench.server.snapshot().worker_restarts;
        let (pid, killed, answer, answered) = self.interrupted(caller, wait)?;
        self.dead.insert(pid);
        self.last = None;
        let mid_switch = answered > killed;
        let mut failures = Vec::new();
        let answered_as = match &answer {
            // The decision that it was answered by came after the kill.
            Ok(call) if call.begun + call.timings.queue > killed => Answered::Retried,
            Ok(_) => Answered::Right,
            Err(error) => match error.downcast_ref() {
                Some(ServiceError::WorkerLost { .. }) => Answered::Refused,
                _ => {
                    failures.push(format!("{error:#}"));
                    if error.is::<WrongOutput>() { Answered::Wrong } else { Answered::Failed }
                }
            },
        };
        let mut wrong = u32::from(answered_as == Answered::Wrong);

        let before = activities(&self.alive()?);
        let next = loop {
            match self.bench.call(caller) {
                Ok(call) => break call.begun + call.latency,
                Err(error) => {
                    wrong += u32::from(error.is::<WrongOutput>());
                    failures.push(format!("the next request: {error:#}"));
                    let model = caller.model();
                    ensure!(killed.elapsed() < PATIENCE, "'{model}' does not recover from a kill: {error:#}");
                    thread::sleep(Duration::from_millis(10));
                }
            }
        };
        self.last = busiest(&before, &activities(&self.alive()?));
        let right = if mid_switch && answer.is_ok() { answered } else { next };
        Ok(Strike {
            model: caller.model().to_owned(),
            pid,
            cold_ms: milliseconds(cold),
            wait_ms: milliseconds(wait),
            mid_switch,
            answered: answered_as,
            wrong,
            failures,
            recovery_ms: milliseconds(right.saturating_duration_since(killed)),
            workers_back_ms: milliseconds(self.workers_back(killed, restarts)?),
        })
    }

    /// Workers that have not been killed.
    fn alive(&self) -> anyhow::Result<Vec<u32>> {
        let mut workers = self.bench.workers()?;
        workers.retain(|pid| !self.dead.contains(pid));
        Ok(workers)
    }

    /// The worker that was killed and when, and what became of the request and when.
    fn interrupted(
        &self,
        caller: &mut Caller,
        wait: Duration,
    ) -> anyhow::Result<(u32, Instant, anyhow::Result<Call>, Instant)> {
        let bench = self.bench;
        // Ahead of the request: to look through all processes takes as long as some switches.
        let workers = self.alive()?;
        let before = activities(&workers);
        thread::scope(|scope| {
            let request = scope.spawn(|| {
                let answer = bench.call(caller);
                let answered =
                    answer.as_ref().map_or_else(|_| Instant::now(), |call| call.begun + call.latency);
                (answer, answered)
            });
            thread::sleep(wait);
            let busy = busiest(&before, &activities(&workers));
            let worker = busy.or(self.last).or_else(|| workers.first().copied());
            let pid = worker.context("there is no worker to kill")?;
            let killed = Instant::now();
            kill(Pid::from_raw(i32::try_from(pid)?), Signal::SIGKILL)
                .with_context(|| format!("worker {pid} cannot be killed"))?;
            let (answer, answered) = request.join().map_err(|_| anyhow!("a request panicked"))?;
            Ok((pid, killed, answer, answered))
        })
    }

    /// Waits until the loss of a worker has been noticed and as many as before can execute: how long after the kill.
    fn workers_back(&self, killed: Instant, restarts: u64) -> anyhow::Result<Duration> {
        loop {
            let lost = self.bench.server.snapshot().worker_restarts > restarts;
            let live = live(self.bench);
            if lost && live >= self.workers {
                return Ok(killed.elapsed());
            }
            let (workers, waited) = (self.workers, PATIENCE.as_secs());
            ensure!(killed.elapsed() < PATIENCE, "{live} of {workers} workers live {waited} s after a kill");
            thread::sleep(Duration::from_millis(2));
        }
    }
}
