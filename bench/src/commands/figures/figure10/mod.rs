//! Figure 10: many models on one device, beside training.

mod arrivals;
mod fleet;

use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};

use super::Experiment;
use crate::caller::WrongOutput;
use crate::figures::{Figure, LeftOut, Load, Took};
use crate::interrupt;
use crate::progress::{self, Progress};
use crate::report::{Goal, Report, Table};
use crate::serving::Zygotes;
use crate::stats::Summary;
use crate::task;

use arrivals::{Arrivals, popularity};
use fleet::{Fleet, Mechanism, Setting};

/// Numbers of models, the share of the device that requests would take if all models were resident, and how long.
const COPIES: [usize; 3] = [12, 24, 48];
const LOADS: [f64; 3] = [0.2, 0.4, 0.6];
const SECONDS: f64 = 10.0;

/// The same for a quick run.
const QUICK_COPIES: [usize; 1] = [6];
const QUICK_LOADS: [f64; 2] = [0.3, 0.6];
const QUICK_SECONDS: f64 = 3.0;

/// Times the slowest model's ready latency that a request may take.
const SLO: f64 = 5.0;

/// Figure 10, which is ours: many models whose weights together are a multiple of the pool's room, beside a training task.
///
/// Models are copies of a mix; a few get most of the requests (Zipf). Requests come independently of each other (`poisson`),
/// or in bursts of each model (`bursty`), and whether earlier ones are answered or not; latency is from the moment at which
/// one was due. `load-on-demand` is the same server, one after the other, without pipelining and without fixed homes: every
/// model is one group, so that computing begins when all weights are there, nothing is fetched ahead, and those make room that
/// were used longest ago, wherever they lie, while pswitch evicts what lies in the newcomer's home.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  pswitch bench figure10 --quick
  pswitch bench figure10 --device cuda:0 --copies 24 48 96 --task task.yaml --training-size 12GiB --out
  pswitch bench figure10 --copies 3 --load 0.2 --seconds 1 --slo-ms 100")]
pub(crate) struct Figure10 {
    /// How many models, copies of the mix, one number after the other; 12, 24 and 48 by default, 6 with --quick.
    #[arg(long, value_name = "N", num_args = 1.., value_parser = count)]
    copies: Vec<usize>,
    /// Loads: shares of the time for which requests would compute if all models were resident; 0.2, 0.4 and 0.6 by default.
    #[arg(long = "load", value_name = "SHARE", num_args = 1.., value_parser = share)]
    loads: Vec<f64>,
    /// Seconds of requests of each kind; 10 by default, 3 with --quick.
    #[arg(long, value_name = "N", value_parser = positive)]
    seconds: Option<f64>,
    /// What a request may take, in milliseconds; 5 times the slowest model's latency when it is resident by default.
    #[arg(long, value_name = "MS", value_parser = positive)]
    slo_ms: Option<f64>,
    /// All weights over the room for them in the pool.
    #[arg(long, value_name = "TIMES", default_value = "3", value_parser = positive)]
    oversubscription: f64,
    /// When requests come.
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    #[command(flatten)]
    pub(crate) experiment: Experiment,
}

/// Latencies of the mix when it is resident, in milliseconds: once for all that is measured.
type Ready = Option<Vec<f64>>;

/// All that was measured, and what was not.
#[derive(Debug, Default)]
struct Found {
    loads: Vec<Load>,
    left_out: Vec<LeftOut>,
    wrong_outputs: usize,
    took: Vec<Took>,
}

impl Found {
    fn leave_out(&mut self, mechanism: Mechanism, models: usize, error: &anyhow::Error) {
        let models = models_of(models);
        progress::say(format_args!("{models}: {} is left out: {error:#}", mechanism.name()));
        self.wrong_outputs += usize::from(error.is::<WrongOutput>());
        self.left_out.push(LeftOut {
            mechanism: mechanism.name().to_owned(),
            model: Some(models),
            reason: format!("{error:#}"),
        });
    }
}

/// A number of models, in place of a model's name.
fn models_of(models: usize) -> String {
    format!("{models} models")
}

impl Figure10 {
    /// With what holds for all figures, and nothing else.
    pub(crate) fn of(experiment: Experiment) -> Self {
        Self {
            copies: Vec::new(),
            loads: Vec::new(),
            seconds: None,
            slo_ms: None,
            oversubscription: 3.0,
            seed: 1,
            experiment,
        }
    }

    /// One for every number of models, and one to match the link.
    pub(crate) fn servers(&self) -> usize {
        self.copies().len() + 1
    }

    pub(crate) fn run(&self, zygotes: &mut Zygotes) -> anyhow::Result<Report> {
        let subjects = self.experiment.subjects(usize::MAX)?;
        let served = self.experiment.served(&subjects);
        let task = task::open(self.experiment.task.as_deref())?;
        interrupt::listen()?;
        let first = subjects.first().context("there is no model")?;
        let mut found = Found::default();
        let link = self.experiment.link(first, served, zygotes, &mut found.took)?;
        // A mix that all of them have.
        let fewest = self.copies().iter().copied().min().unwrap_or(1);
        let subjects = &subjects[..subjects.len().min(fewest)];
        let mut ready = None;
        for &models in self.copies() {
            let setting = Setting {
                experiment: &self.experiment,
                served,
                subjects,
                link,
                task: &task,
                models,
                oversubscription: self.oversubscription,
            };
            self.measure(setting, &mut ready, &mut found, zygotes);
        }
        let Found { mut loads, left_out, wrong_outputs, took } = found;
        loads.sort_by_key(|load| {
            Arrivals::ALL.map(Arrivals::name).iter().position(|name| *name == load.arrivals)
        });
        let goals = goals(&loads);
        let figure = Figure { number: 10, bars: Vec::new(), cycles: Vec::new(), loads, left_out, took };
        super::report("figure10", &figure, table(&figure.loads), goals, wrong_outputs)
    }

    /// Measures both mechanisms on one server. What fails is left out.
    fn measure(&self, setting: Setting<'_>, ready: &mut Ready, found: &mut Found, zygotes: &mut Zygotes) {
        let begun = Instant::now();
        let fleet = match Fleet::start(setting, zygotes) {
            Ok(fleet) => fleet,
            Err(error) => {
                let leave_out = |mechanism| found.leave_out(mechanism, setting.models, &error);
                return Mechanism::ALL.into_iter().for_each(leave_out);
            }
        };
        let started = begun.elapsed();
        let models = models_of(setting.models);
        let mut alone = None;
        for mechanism in Mechanism::ALL {
            let begun = Instant::now();
            let measured = self.measure_on(&fleet, setting, mechanism, ready, &mut alone, &mut found.loads);
            if let Err(error) = measured {
                found.leave_out(mechanism, setting.models, &error);
            }
            found.took.push(Took::new(mechanism.name(), Some(&models), begun.elapsed()));
        }
        let begun = Instant::now();
        if let Err(error) = fleet.stop() {
            progress::say(format_args!("{models}: the server: {error:#}"));
        }
        found.took.push(Took::new(Took::SERVER, Some(&models), started + begun.elapsed()));
    }

    /// Measures all loads. Those in which no request comes are told in the end.
    fn measure_on(
        &self,
        fleet: &Fleet,
        setting: Setting<'_>,
        mechanism: Mechanism,
        ready: &mut Ready,
        alone: &mut Option<f64>,
        loads: &mut Vec<Load>,
    ) -> anyhow::Result<()> {
        let ready_ms = match ready {
            Some(ready_ms) => ready_ms,
            None => ready.insert(fleet.ready_ms(setting.subjects.len())?),
        };
        let slo_ms = self.slo_ms.unwrap_or(SLO * ready_ms.iter().copied().fold(0.0, f64::max));
        let rates = self.rates(ready_ms, setting.models);
        let length = self.length();
        fleet.follow(mechanism, length)?;
        let before_steps_per_s = match alone {
            Some(steps_per_s) => *steps_per_s,
            None => fleet.train(setting.task, length)?,
        };
        let progress = Progress::new(mechanism.name(), Arrivals::ALL.len() * rates.len());
        let (mut found, mut empty) = (Vec::new(), Vec::new());
        for arrivals in Arrivals::ALL {
            for &rate in &rates {
                let schedule = arrivals.schedule(setting.models, rate, length, self.seed);
                if schedule.is_empty() {
                    empty.push(format!("{} at {rate:.2}/s", arrivals.name()));
                    continue;
                }
                let outcome = fleet.run(&schedule, length)?;
                // Some thousands.
                #[allow(clippy::cast_precision_loss)]
                let sent_per_s = schedule.len() as f64 / length.as_secs_f64();
                found.push((arrivals, sent_per_s, outcome));
                progress.step();
            }
        }
        // Machines change while they are measured: alone is before and after.
        let after_steps_per_s = *alone.insert(fleet.alone_steps_per_s(length)?);
        let alone_steps_per_s = f64::midpoint(before_steps_per_s, after_steps_per_s);
        ensure!(alone_steps_per_s > 0.0, "not a step in {} s: give it more --seconds", length.as_secs_f64());
        loads.extend(found.into_iter().map(|(arrivals, requests_per_s, outcome)| Load {
            mechanism: mechanism.name().to_owned(),
            arrivals: arrivals.name().to_owned(),
            models: setting.models,
            oversubscription: setting.found_oversubscription(),
            requests_per_s,
            latencies_ms: outcome.latencies_ms,
            slo_ms,
            refused: outcome.refused,
            switches: outcome.switches,
            training_kept: Some(outcome.steps_per_s / alone_steps_per_s),
        }));
        let seconds = length.as_secs_f64();
        ensure!(empty.is_empty(), "no request in {seconds} s, {}: give it more --seconds", empty.join(", "));
        Ok(())
    }

    /// How many requests a second make the loads.
    fn rates(&self, ready_ms: &[f64], models: usize) -> Vec<f64> {
        let mean_ms: f64 =
            popularity(models).iter().zip(ready_ms.iter().cycle()).map(|(share, ready)| share * ready).sum();
        let loads = match &self.loads[..] {
            [] if self.experiment.quick => &QUICK_LOADS[..],
            [] => &LOADS,
            given => given,
        };
        loads.iter().map(|load| load * 1e3 / mean_ms).collect()
    }

    fn length(&self) -> Duration {
        let default = if self.experiment.quick { QUICK_SECONDS } else { SECONDS };
        Duration::from_secs_f64(self.seconds.unwrap_or(default))
    }

    fn copies(&self) -> &[usize] {
        match &self.copies[..] {
            [] if self.experiment.quick => &QUICK_COPIES,
            [] => &COPIES,
            given => given,
        }
    }
}

fn count(text: &str) -> Result<usize, String> {
    let count: usize = text.parse().map_err(|error| format!("{error}"))?;
    if (1..=1000).contains(&count) { Ok(count) } else { Err("1 to 1000".to_owned()) }
}

fn positive(text: &str) -> Result<f64, String> {
    let number: f64 = text.parse().map_err(|error| format!("{error}"))?;
    if number.is_finite() && number > 0.0 { Ok(number) } else { Err("it must be above 0".to_owned()) }
}

fn share(text: &str) -> Result<f64, String> {
    positive(text).and_then(|share| if share <= 2.0 { Ok(share) } else { Err("2 is the most".to_owned()) })
}

pub(super) fn table(loads: &[Load]) -> Table {
    let mut table = Table::new([
        "arrivals, models, mechanism",
        "requests/s",
        "median ms",
        "p99",
        "SLO ms",
        "within %",
        "refused",
        "switches %",
        "training kept %",
    ]);
    for load in loads {
        let summary = Summary::of(&load.latencies_ms);
        let number = |value: Option<f64>| value.map_or("-".to_owned(), |value| format!("{value:.1}"));
        // Counts of some thousands.
        #[allow(clippy::cast_precision_loss)]
        let switched = load.switches as f64 / load.latencies_ms.len() as f64 * 100.0;
        table.push([
            format!("{}, {}, {}", load.arrivals, load.models, load.mechanism),
            number(Some(load.requests_per_s)),
            number(summary.map(|summary| summary.median)),
            number(summary.map(|summary| summary.p99)),
            number(Some(load.slo_ms)),
            number(load.within_slo().map(|share| share * 100.0)),
            load.refused.to_string(),
            number(Some(switched).filter(|percent| percent.is_finite())),
            number(load.training_kept.map(|share| share * 100.0)),
        ]);
    }
    table
}

/// pswitch against loading on demand into the place of what was used longest ago, under the same requests.
fn goals(loads: &[Load]) -> Vec<Goal> {
    let median = |load: &Load| Summary::of(&load.latencies_ms).map(|summary| summary.median);
    let mut goals = Vec::new();
    for load in loads.iter().filter(|load| load.mechanism == Mechanism::Pswitch.name()) {
        let same = |other: &&Load| {
            other.mechanism == Mechanism::LoadOnDemand.name()
                && (&other.arrivals, other.models, other.requests_per_s)
                    == (&load.arrivals, load.models, load.requests_per_s)
        };
        let other = loads.iter().find(same);
        let medians = other.and_then(|other| Some((median(other)?, median(load)?)));
        if let Some((other, own)) = medians {
            let what = format!(
                "{}, {} models, {:.1}/s: median of load-on-demand over pswitch's",
                load.arrivals, load.models, load.requests_per_s
            );
            goals.push(Goal::at_least(what, 1.0, "times", other / own));
        }
    }
    goals
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::figures::made_up;

    #[test]
    fn loads_are_compared_under_the_same_requests() {
        let figure = made_up::loads();
        let goals: Vec<_> = goals(&figure.loads).iter().map(ToString::to_string).collect();
        assert_eq!(goals.len(), figure.loads.len() / 2);
        assert_eq!(
            goals[0],
            "poisson, 12 models, 10.0/s: median of load-on-demand over pswitch's: 1.8 times (asked: at least 1 times): met"
        );
    }

    #[test]
    fn a_load_says_all_that_was_asked_for() {
        let text = table(&made_up::loads().loads[..1]).to_string();
        assert!(text.contains("poisson, 12, pswitch               10.0       25.2  49.5    60.0"), "{text}");
        assert!(text.ends_with("60.0      98.0        2        40.0             80.0\n"), "{text}");
    }

    #[test]
    fn shares_are_positive() {
        assert_eq!(share("0.5"), Ok(0.5));
        for text in ["0", "-1", "nan", "3", "much"] {
            assert!(share(text).is_err(), "{text}");
        }
    }
}
