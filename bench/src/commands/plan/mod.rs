//! Plans of all algorithms: what each predicts, and what it then takes.

mod outcome;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use pswitch_controller::{Bandwidth, DeviceProfile};
use pswitch_device::DeviceId;
use pswitch_transfer::{Algorithm, Plan as TransferPlan, Profile, TransferError, plan, plan_within};
use serde_json::json;

use super::GPU_MODELS;
use crate::caller::Caller;
use crate::matched_link::{MatchedLink, threads_beside_the_link};
use crate::progress::{self, Progress};
use crate::report::Report;
use crate::serving::{Bench, Plan, Serving, Zygotes};
use crate::stats::{Samples, deviation_percent, milliseconds};
use crate::subject::{Served, Subject};

use outcome::{Measured, Row};

/// Rounds ahead of those that count.
const WARM_UP: usize = 4;

/// What is measured by default on the host.
const ON_HOST: [&str; 3] =
    ["target/fixtures/resnet18", "target/fixtures/mobilenet_v3_small", "target/fixtures/bert-2-layers"];

/// Groups of the plan of equal groups.
const EQUAL: Algorithm = Algorithm::Equal { groups: 16 };

/// Every algorithm's plan: the predicted latency of a cold request beside the measured one.
///
/// Each model is served beside a second one of the same archive from a pool with room for one of the two, so that every
/// request has to bring its weights. In each round the model moves by every algorithm's plan in turn; a plan changes while
/// the model rests. Latencies are those inside the server, from the inputs in their slot to the outputs in theirs. Plans
/// are compared with the served one within each round.
///
/// What a plan predicts is the time of copies, waits and layers. A request takes more: its inputs move, a worker is told
/// and answers, outputs are copied. All of that a request for the resident model has as well, so that its latency in the
/// same run, less the times of the layers, is added to every prediction.
///
/// On the host the link is throttled so that copying the weights takes as long as computing, unless --link-bandwidth is
/// given, and by default operators use one core less than there are: there the link is a thread that copies. Every output
/// is checked, as by `switch`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  pswitch bench plan --device cuda:0 --out
  pswitch bench plan --model target/fixtures/resnet152 --rounds 50
  pswitch bench plan --device host --model target/fixtures/resnet18 --link-bandwidth 1GB/s")]
pub(crate) struct PlanBench {
    /// The models: folders with model.pt2, or archives. By default ResNet152, Inception_v3, BERT-base and ViT-L/16 in
    /// models/ on a GPU, and small ones of target/fixtures on the host.
    #[arg(long = "model", value_name = "PATH", num_args = 1..)]
    models: Vec<PathBuf>,
    /// Cold requests of each model by each plan; 4 that do not count come on top.
    #[arg(long, value_name = "N", default_value_t = 30, value_parser = clap::value_parser!(u32).range(5..))]
    rounds: u32,
    /// Slows the link of a host device down, as in 1GB/s.
    #[arg(long, value_name = "RATE")]
    link_bandwidth: Option<Bandwidth>,
    /// Time after which the paper's search is cut off; its plan is then left out.
    #[arg(long, value_name = "S", default_value_t = 10)]
    search_limit_s: u64,
    #[command(flatten)]
    pub(super) serving: Serving,
}

/// A plan, and by which algorithms it was found.
struct Planned {
    algorithms: Vec<String>,
    plan: TransferPlan,
}

/// All different plans of a model, the one that is served first.
#[derive(Default)]
struct Plans {
    found: Vec<Planned>,
    /// Algorithms whose search was cut off.
    cut_off: Vec<String>,
}

/// What was measured of one model.
struct Found {
    /// Milliseconds by each plan.
    cold: Vec<Samples>,
    /// How far that is from the served plan's of the same round, in percent.
    from_served: Vec<Samples>,
    /// Milliseconds of requests that found the model resident.
    ready: Samples,
}

impl PlanBench {
    /// As many servers as it may start, one after another. Which device `auto` is cannot be asked yet: workers are forked
    /// from a process that has not touched a GPU.
    pub(crate) fn servers(&self) -> usize {
        let models =
            if self.models.is_empty() { GPU_MODELS.len().max(ON_HOST.len()) } else { self.models.len() };
        models * 2
    }

    pub(crate) fn run(&self, zygotes: &mut Zygotes) -> anyhow::Result<Report> {
        let subjects =
            self.models().iter().map(|path| Subject::open(path)).collect::<anyhow::Result<Vec<_>>>()?;
        let served = match self.serving.device() {
            DeviceId::Host(_) => self.serving.with_threads(threads_beside_the_link()),
            DeviceId::Cuda(_) => self.serving.like_references(&subjects),
        };
        let mut rows = Vec::with_capacity(subjects.len());
        for subject in &subjects {
            let link_bandwidth = if self.is_matched() {
                let rounds = self.rounds as usize;
                Some(MatchedLink::find(subject, &self.serving, served, rounds, zygotes)?.bandwidth)
            } else {
                self.link_bandwidth
            };
            rows.push(self.measure(subject, served, link_bandwidth, zygotes)?);
        }
        let limit_percent = outcome::limit_percent(served.device);
        Ok(Report {
            command: "plan",
            tables: rows.iter().map(outcome::table).collect(),
            goals: rows.iter().flat_map(|row| outcome::goals(row, limit_percent)).collect(),
            results: json!({
                "device": served.device.to_string(),
                "threads": served.threads,
                "rounds": self.rounds,
                "models": rows,
            }),
        })
    }

    fn models(&self) -> Vec<PathBuf> {
        let paths: &[&str] = match self.serving.device() {
            _ if !self.models.is_empty() => return self.models.clone(),
            DeviceId::Cuda(_) => &GPU_MODELS,
            DeviceId::Host(_) => &ON_HOST,
        };
        paths.iter().map(PathBuf::from).collect()
    }

    /// Whether the link is to be as slow as each model computes.
    fn is_matched(&self) -> bool {
        matches!(self.serving.device(), DeviceId::Host(_)) && self.link_bandwidth.is_none()
    }

    fn measure(
        &self,
        subject: &Subject,
        served: Served,
        link_bandwidth: Option<Bandwidth>,
        zygotes: &mut Zygotes,
    ) -> anyhow::Result<Row> {
        let rival = format!("{}-rival", subject.name);
        let plan = Plan::of_rivals(&self.serving, served, subject, &rival, link_bandwidth);
        progress::say(format_args!("starting a server for '{}' ...", subject.name));
        let bench = Bench::start(plan, zygotes, Arc::new(|_| ()))?;
        let profile = bench.server.profiles(&subject.name)?.into_iter().next();
        let profile = profile.with_context(|| format!("'{}' is on no device", subject.name))?;
        let served_plan = bench.server.replan(&subject.name, Algorithm::Optimal)?.into_iter().next();
        let served_plan = served_plan.context("the model has no plan")?;
        let limit = Duration::from_secs(self.search_limit_s);
        let mut plans = Plans::of(&profile.profile, served_plan, limit)?;
        let mut caller = Caller::new(&subject.name, subject.examples(served)?);
        let mut rival = Caller::new(&rival, subject.examples(served)?);
        let Found { cold, from_served, ready } =
            self.rounds(&bench, served.device, &mut caller, &mut rival, &mut plans)?;
        bench.stop()?;

        let DeviceProfile { profile, link, .. } = profile;
        let measured = plans
            .found
            .into_iter()
            .zip(cold.iter().zip(&from_served))
            .map(|(Planned { algorithms, plan }, (cold, from_served))| {
                Ok(Measured {
                    algorithms,
                    groups: plan.groups.len(),
                    plan_ms: plan.predicted_us / 1e3,
                    cold_ms: cold.summary().context("nothing was measured")?,
                    from_served_percent: from_served.summary().context("nothing was measured")?,
                })
            })
            .collect::<anyhow::Result<Vec<_>>>()?;
        let ready_ms = ready.summary().context("nothing was measured")?;
        let reference = caller.reference().to_owned();
        Ok(Row::new(subject, reference, &profile, &link, ready_ms, measured, plans.cut_off))
    }

    /// Cold requests by each plan, and those in between that found the model resident. Plans predict afterwards what they do on
    /// the device, whose copies may be longer than groups.
    fn rounds(
        &self,
        bench: &Bench,
        device: DeviceId,
        caller: &mut Caller,
        rival: &mut Caller,
        plans: &mut Plans,
    ) -> anyhow::Result<Found> {
        let rounds = WARM_UP + self.rounds as usize;
        // On a GPU workers capture graphs for each new plan: the request that may find them at it does not count.
        let settling = usize::from(matches!(device, DeviceId::Cuda(_)));
        let count = plans.found.len();
        let mut series = Found {
            cold: vec![Samples::with_capacity(rounds); count],
            from_served: vec![Samples::with_capacity(rounds); count],
            ready: Samples::with_capacity(rounds * count),
        };
        let mut took_ms = vec![0.0; count];
        let progress = Progress::new("rounds of all plans", rounds);
        for round in 0..rounds {
            // Another one is first every time: none is always measured behind the same.
            for index in (0..count).map(|place| (round + place) % count) {
                let plan = &mut plans.found[index].plan;
                let followed = bench.server.follow(caller.model(), plan)?.into_iter().next();
                *plan = followed.context("the model has no plan")?;
                for _ in 0..settling {
                    bench.call(rival)?;
                    bench.call(caller)?;
                }
                bench.call(rival)?;
                let brought = bench.call(caller)?;
                let mut found = bench.call(caller)?;
                if found.timings.switched {
                    // The answer before was faster than the news that the last group had landed.
                    found = bench.call(caller)?;
                }
                let name = caller.model();
                ensure!(brought.timings.switched, "'{name}' was still resident");
                ensure!(!found.timings.switched, "'{name}' was not resident");
                took_ms[index] = milliseconds(brought.inside());
                if round >= WARM_UP {
                    series.ready.push_ms(found.inside());
                }
            }
            if round >= WARM_UP {
                for (index, &ms) in took_ms.iter().enumerate() {
                    series.cold[index].push(ms);
                    series.from_served[index].push(deviation_percent(ms, took_ms[0]));
                }
            }
            progress.step();
        }
        Ok(series)
    }
}

impl Plans {
    /// Plans that are the same are measured once.
    fn of(profile: &Profile, served: TransferPlan, limit: Duration) -> anyhow::Result<Self> {
        let mut plans = Self::default();
        plans.add("served".to_owned(), served);
        plans.add("optimal".to_owned(), plan(profile, Algorithm::Optimal)?);
        for algorithm in
            [Algorithm::Paper { rule1: true, rule2: true }, Algorithm::PerLayer, Algorithm::Whole, EQUAL]
        {
            match plan_within(profile, algorithm, limit) {
                Ok(plan) => plans.add(algorithm.to_string(), plan),
                Err(TransferError::CutOff { .. }) => plans.cut_off.push(algorithm.to_string()),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(plans)
    }

    fn add(&mut self, algorithm: String, plan: TransferPlan) {
        match self.found.iter_mut().find(|found| found.plan.groups == plan.groups) {
            Some(same) => same.algorithms.push(algorithm),
            None => self.found.push(Planned { algorithms: vec![algorithm], plan }),
        }
    }
}

#[cfg(test)]
mod tests {
    use pswitch_transfer::{Layer, LinkCosts, plan_with_margin};

    use super::*;

    #[test]
    fn plans_that_are_the_same_stand_together_and_the_served_one_first() {
        let layer = |bytes| Layer { name: String::new(), bytes, compute_us: 10.0, host_bytes: 0 };
        let profile = Profile {
            model: "m".to_owned(),
            link: LinkCosts { bandwidth_bytes_per_s: 1e6, per_copy_us: 0.0, per_wait_us: 0.0 },
            layers: [10, 10].map(layer).to_vec(),
        };
        let served = plan_with_margin(&profile).unwrap();
        let plans = Plans::of(&profile, served, Duration::from_secs(1)).unwrap();
        let names: Vec<_> = plans.found.iter().map(|planned| planned.algorithms.join(", ")).collect();
        assert_eq!(names, ["served, optimal, paper, per-layer, equal-16", "whole"]);
        assert!(plans.cut_off.is_empty());
    }
}
