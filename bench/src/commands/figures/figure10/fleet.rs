//! A server of many models beside a training task, and requests that come whether earlier ones are answered or not.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use pswitch_controller::scheduler::Homes;
use pswitch_controller::{Bandwidth, ServiceError};
use pswitch_train::TaskConfig;
use pswitch_transfer::Algorithm;

use super::super::Experiment;
use super::arrivals::{Arrivals, Due};
use crate::caller::Caller;
use crate::interrupt;
use crate::progress;
use crate::serving::{Bench, Plan, Zygotes};
use crate::stats::{Samples, milliseconds};
use crate::subject::{Served, Subject};
use crate::trained::{self, Trained};

/// The task's name in the server.
const TASK: &str = "bench";

/// Steps ahead of those that count, and the time in which they are done.
const WARM_UP_STEPS: u64 = 3;
const PATIENCE: Duration = Duration::from_secs(180);

/// Models in random order, by their popularity, before requests count.
const WARM_UP_SEED: u64 = 7;
/// More than any device answers.
const WARM_UP_PER_S: f64 = 1000.0;

/// Requests by which the latency of a resident model is found.
const READY_REQUESTS: usize = 5;

/// A thread sleeps until so long before a request is due, and then looks at the clock.
const SLEEPS_LATE: Duration = Duration::from_micros(200);

/// Whom models are served by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mechanism {
    Pswitch,
    /// All weights as one copy when a request's turn has come, and computation after it; where there is no room, in the place
    /// of what was used longest ago.
    LoadOnDemand,
}

/// What is served, and where.
#[derive(Debug, Clone, Copy)]
pub(super) struct Setting<'a> {
    pub(super) experiment: &'a Experiment,
    pub(super) served: Served,
    pub(super) subjects: &'a [Subject],
    pub(super) link: Option<Bandwidth>,
    pub(super) task: &'a TaskConfig,
    /// How many models, and their weights over the room for them.
    pub(super) models: usize,
    pub(super) oversubscription: f64,
}

/// A server that runs.
pub(super) struct Fleet {
    bench: Bench,
    callers: Arc<Vec<Caller>>,
}

/// What became of the requests of one schedule.
#[derive(Debug, Default)]
pub(super) struct Outcome {
    pub(super) latencies_ms: Vec<f64>,
    pub(super) refused: usize,
    pub(super) switches: usize,
    pub(super) steps_per_s: f64,
}

impl Mechanism {
    pub(super) const ALL: [Self; 2] = [Self::Pswitch, Self::LoadOnDemand];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Pswitch => "pswitch",
            Self::LoadOnDemand => "load-on-demand",
        }
    }
}

impl<'a> Setting<'a> {
    /// The archive of a model: the mix again and again, so that popular models are of all kinds.
    fn subject(&self, model: usize) -> &'a Subject {
        &self.subjects[model % self.subjects.len()]
    }

    /// Room for weights in the pool: a part of all, but for the largest model at least.
    fn homes_bytes(&self) -> u64 {
        let spans = || (0..self.models).map(|model| self.subject(model).span_bytes);
        // Sizes whose last bits do not matter.
        #[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        let part = (spans().sum::<u64>() as f64 / self.oversubscription) as u64;
        part.max(spans().max().unwrap_or(0))
    }

    /// All weights over the room for them, as it came out.
    pub(super) fn found_oversubscription(&self) -> f64 {
        let spans: u64 = (0..self.models).map(|model| self.subject(model).span_bytes).sum();
        // Sizes whose last bits do not matter.
        #[allow(clippy::cast_precision_loss)]
        let found = spans as f64 / self.homes_bytes() as f64;
        found
    }
}

impl Fleet {
    /// Starts a server, and asks every model once for each of its inputs: from then on answers are known.
    pub(super) fn start(setting: Setting<'_>, zygotes: &mut Zygotes) -> anyhow::Result<Self> {
        interrupt::check()?;
        let Setting { experiment, served, link, models, .. } = setting;
        progress::say(format_args!("{models} models: starting a server ..."));
        let name = |model: usize| format!("{:02}-{}", model, setting.subject(model).name);
        let plan = Plan {
            serving: &experiment.serving,
            served,
            models: (0..models).map(|model| (name(model), &*setting.subject(model).archive)).collect(),
            homes_bytes: Some(setting.homes_bytes()),
            link_bandwidth: link,
            training_size: Some(experiment.training_size),
            training_gives_way: false,
        };
        let bench = Bench::start(plan, zygotes, Arc::new(|_| ()))?;
        let mut callers = Vec::with_capacity(models);
        for model in 0..models {
            let mut caller = Caller::new(&name(model), setting.subject(model).examples(served)?);
            for _ in 0..caller.turns() {
                interrupt::check()?;
                bench.call(&mut caller)?;
            }
            callers.push(caller);
        }
        Ok(Self { bench, callers: Arc::new(callers) })
    }

    /// Serves by a mechanism from now on, for some time with requests that do not count: on a GPU workers capture graphs for each
    /// new plan, and for every place where a model comes to lie for the second time.
    pub(super) fn follow(&self, mechanism: Mechanism, time: Duration) -> anyhow::Result<()> {
        let Bench { server, runtime, .. } = &self.bench;
        let (algorithm, fetches_ahead, homes) = match mechanism {
            Mechanism::Pswitch => (Algorithm::Optimal, true, Homes::Fixed),
            Mechanism::LoadOnDemand => (Algorithm::Whole, false, Homes::LeastRecentlyUsed),
        };
        server.set_prefetch(fetches_ahead);
        server.set_homes(homes);
        for caller in self.callers.iter() {
            interrupt::check()?;
            server.replan(caller.model(), algorithm)?;
            runtime.block_on(caller.call_turn(0, server))?;
        }
        // As many as may be answered in that time, one after the other.
        let due = Arrivals::Poisson.schedule(self.callers.len(), WARM_UP_PER_S, time, WARM_UP_SEED);
        let begun = Instant::now();
        for Due { model, .. } in due.into_iter().take_while(|_| begun.elapsed() < time) {
            interrupt::check()?;
            runtime.block_on(self.callers[model].call_turn(0, server))?;
        }
        Ok(())
    }

    /// The latency of each kind of model when it is resident and nothing else goes on; milliseconds.
    pub(super) fn ready_ms(&self, kinds: usize) -> anyhow::Result<Vec<f64>> {
        let of = |caller: &Caller| {
            let mut latencies = Samples::default();
            for request in 0..=READY_REQUESTS {
                let call = caller.call_turn(request % caller.turns(), &self.bench.server);
                let call = self.bench.runtime.block_on(call)?;
                // The first one brings it.
                if request > 0 {
                    latencies.push_ms(call.latency);
                }
            }
            Ok(latencies.summary().context("nothing was measured")?.median)
        };
        self.callers.iter().take(kinds).map(of).collect()
    }

    /// Has a task train, and finds how many steps a second it does alone.
    pub(super) fn train(&self, task: &TaskConfig, time: Duration) -> anyhow::Result<f64> {
        Trained::submit(&self.bench, TASK, task)?;
        let latest = Instant::now() + PATIENCE;
        while self.steps()? < WARM_UP_STEPS {
            ensure!(Instant::now() < latest, "training does not begin within {} s", PATIENCE.as_secs());
            interrupt::sleep(Duration::from_millis(5))?;
        }
        self.alone_steps_per_s(time)
    }

    /// Steps a second while no request comes.
    pub(super) fn alone_steps_per_s(&self, time: Duration) -> anyhow::Result<f64> {
        let (before, begun) = (self.steps()?, Instant::now());
        interrupt::sleep(time)?;
        self.rate(before, begun)
    }

    /// Sends requests when they are due, and waits for all answers.
    pub(super) fn run(&self, schedule: &[Due], length: Duration) -> anyhow::Result<Outcome> {
        let (before, begun) = (self.steps()?, Instant::now());
        let mut asked = Vec::with_capacity(schedule.len());
        let mut turns = vec![0; self.callers.len()];
        for &Due { at, model } in schedule {
            let due = begun + at;
            interrupt::sleep(due.saturating_duration_since(Instant::now()).saturating_sub(SLEEPS_LATE))?;
            while Instant::now() < due {
                std::hint::spin_loop();
            }
            let turn = turns[model] % self.callers[model].turns();
            turns[model] += 1;
            let (callers, server) = (Arc::clone(&self.callers), Arc::clone(&self.bench.server));
            asked.push(self.bench.runtime.spawn(async move {
                let answered = callers[model].call_turn(turn, &server).await;
                (milliseconds(due.elapsed()), answered)
            }));
        }
        interrupt::sleep((begun + length).saturating_duration_since(Instant::now()))?;
        let mut outcome = Outcome { steps_per_s: self.rate(before, begun)?, ..Outcome::default() };
        for request in asked {
            let (latency_ms, answered) =
                self.bench.runtime.block_on(request).context("a request panicked")?;
            match answered {
                Ok(call) => {
                    outcome.latencies_ms.push(latency_ms);
                    outcome.switches += usize::from(call.timings.switched);
                }
                Err(error) if error.is::<ServiceError>() => outcome.refused += 1,
                Err(error) => return Err(error),
            }
        }
        Ok(outcome)
    }

    pub(super) fn stop(self) -> anyhow::Result<()> {
        self.bench.stop()
    }

    fn steps(&self) -> anyhow::Result<u64> {
        Ok(trained::status(&self.bench, TASK)?.progress.steps_done)
    }

    /// Steps a second since a moment.
    fn rate(&self, before: u64, begun: Instant) -> anyhow::Result<f64> {
        let steps = self.steps()?.saturating_sub(before);
        // Counts of some thousands.
        #[allow(clippy::cast_precision_loss)]
        let rate = steps as f64 / begun.elapsed().as_secs_f64();
        Ok(rate)
    }
}
