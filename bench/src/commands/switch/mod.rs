//! Cold switches: what a request costs whose model is not on the device, beside the least that it can cost.

mod engine;
mod floor;
mod outcome;
mod pytorch;

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context as _, ensure};
use pswitch_controller::InferenceService as _;
use pswitch_transfer::{Algorithm, Plan as TransferPlan};
use serde_json::json;

use super::GPU_MODELS;
use crate::caller::Caller;
use crate::keep_alive::Connection;
use crate::progress::{self, Progress};
use crate::report::Report;
use crate::serving::{Bench, Plan, Serving, Zygotes};
use crate::stats::{Samples, Summary};
use crate::subject::{Served, Subject};

use engine::Moved;
use outcome::{Measured, Row};
use pytorch::PyTorch;

/// Requests of each kind and model ahead of those that count.
const WARM_UP: usize = 20;

/// Cold requests of a model with all its weights in one group, and as many that an HTTP client sends.
const FEW: usize = 50;

/// Cold switches of models that take turns, against the floor.
///
/// The pool has room for the largest model alone and the models are asked in turn, so that every request has to bring
/// its weights. Latencies are those inside the server, from the inputs in their slot to the outputs in theirs; what the
/// caller waits is given beside. The floor of a cold request is the larger of two: its model resident, and its weights in
/// one copy from pinned memory, measured before the server starts. When it has ended, the engine alone moves each model's
/// bytes in as many groups as its plan has, and in one.
///
/// Every output is compared to the last bit with eager PyTorch's where reference cases lie beside the archive and were
/// made on such a device, on the CPU with as many threads, which is the default; else with the first.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  pswitch bench switch --device cuda:0 --out
  PYTHONPATH=python/src pswitch bench switch --device cuda:0 --python .torch/venv/bin/python
  pswitch bench switch --model target/fixtures/resnet18 target/fixtures/mobilenet_v3_small --switches 20")]
pub(crate) struct Switch {
    /// The models: folders with model.pt2, or archives; two or more, in the order of the requests.
    #[arg(long = "model", value_name = "PATH", num_args = 2.., default_values = GPU_MODELS)]
    models: Vec<PathBuf>,
    /// Cold requests of each model; as many find it resident. 20 that do not count come on top.
    #[arg(long, value_name = "N", default_value_t = 200, value_parser = clap::value_parser!(u32).range(20..))]
    switches: u32,
    /// A Python with torch and the module pswitch.ready_latency, to measure PyTorch's own latencies before.
    #[arg(long, value_name = "PATH")]
    python: Option<PathBuf>,
    #[command(flatten)]
    pub(super) serving: Serving,
}

/// One model's part.
struct Series {
    caller: Caller,
    ready: Samples,
    ready_answered: Samples,
    cold: Samples,
    cold_answered: Samples,
    startup: Samples,
    copy_then_run: Samples,
    client: Samples,
    plan: Option<TransferPlan>,
}

impl Switch {
    pub(crate) fn run(&self, zygotes: &mut Zygotes) -> anyhow::Result<Report> {
        let subjects =
            self.models.iter().map(|path| Subject::open(path)).collect::<anyhow::Result<Vec<_>>>()?;
        let served = self.serving.like_references(&subjects);
        let archives: Vec<_> = subjects.iter().map(|subject| subject.archive.as_path()).collect();
        let spans: Vec<u64> = subjects.iter().map(|subject| subject.span_bytes).collect();
        // It has the device to itself, and so have the copies: the server comes last.
        let pytorch =
            self.python.as_ref().map(|python| PyTorch::measure(python, served, &archives)).transpose()?;
        let floors = floor::copies(served.device, &spans)?;
        let plan = Plan {
            serving: &self.serving,
            served,
            models: subjects.iter().map(|s| (s.name.clone(), s.archive.as_path())).collect(),
            homes_bytes: spans.iter().copied().max(),
            link_bandwidth: None,
            training_size: None,
            training_gives_way: false,
        };
        progress::say("starting the server ...");
        let bench = Bench::start(plan, zygotes, Arc::new(|_| ()))?;
        let mut series = subjects
            .iter()
            .map(|subject| Series::new(subject, served, self.switches as usize))
            .collect::<anyhow::Result<Vec<_>>>()?;
        self.cold(&bench, &mut series)?;
        self.copy_then_run(&bench, &mut series)?;
        self.client(&bench, &mut series)?;
        let restarts = bench.server.snapshot().worker_restarts;
        bench.stop()?;

        let transfers = series
            .iter()
            .zip(&spans)
            .map(|(one, &span)| Ok((span, one.plan()?.groups.len())))
            .collect::<anyhow::Result<Vec<_>>>()?;
        let moved = engine::moved(served.device, &transfers)?;

        let latencies = |archive| pytorch.as_ref().and_then(|pytorch| pytorch.of(archive)).cloned();
        let rows = series
            .into_iter()
            .zip(subjects.iter().zip(floors.into_iter().zip(moved)))
            .map(|(series, (subject, (floor, moved)))| {
                let reference = series.caller.reference().to_owned();
                let measured = series.measured(floor, moved)?;
                Ok(Row::new(
                    &subject.name,
                    subject.span_bytes,
                    reference,
                    measured,
                    latencies(&subject.archive),
                ))
            })
            .collect::<anyhow::Result<Vec<Row>>>()?;
        let results = json!({
            "device": served.device.to_string(),
            "threads": served.threads,
            "models": rows,
            "pytorch": pytorch::facts(pytorch.as_ref()),
            "worker_restarts": restarts,
        });
        let goals = rows.iter().flat_map(outcome::goals).collect();
        Ok(Report { command: "switch", tables: outcome::tables(&rows), goals, results })
    }

    /// Each model in turn: cold, and then resident, in one round, so that both see the same machine.
    fn cold(&self, bench: &Bench, series: &mut [Series]) -> anyhow::Result<()> {
        let rounds = WARM_UP + self.switches as usize;
        let progress = Progress::new("cold and ready", rounds);
        for round in 0..rounds {
            for one in &mut *series {
                let cold = bench.call(&mut one.caller)?;
                let ready = bench.call(&mut one.caller)?;
                if round >= WARM_UP {
                    one.must_be(true, cold.timings.switched)?;
                    one.must_be(false, ready.timings.switched)?;
                    one.cold.push_ms(cold.inside());
                    one.cold_answered.push_ms(cold.latency);
                    one.startup.push_ms(cold.timings.switch);
                    one.ready.push_ms(ready.inside());
                    one.ready_answered.push_ms(ready.latency);
                }
            }
            progress.step();
        }
        Ok(())
    }

    /// The same with all weights in one group. Plans are changed once: a worker may have to build anew for each.
    fn copy_then_run(&self, bench: &Bench, series: &mut [Series]) -> anyhow::Result<()> {
        for one in &*series {
            bench.server.replan(one.caller.model(), Algorithm::Whole)?;
        }
        let rounds = WARM_UP + self.few();
        let progress = Progress::new("cold, copy then run", rounds);
        for round in 0..rounds {
            for one in &mut *series {
                let cold = bench.call(&mut one.caller)?;
                if round >= WARM_UP {
                    one.must_be(true, cold.timings.switched)?;
                    one.copy_then_run.push_ms(cold.inside());
                }
            }
            progress.step();
        }
        for one in series {
            one.plan = bench.server.replan(one.caller.model(), Algorithm::Optimal)?.into_iter().next();
        }
        Ok(())
    }

    /// Cold requests as a client of the front end on this machine waits for them.
    fn client(&self, bench: &Bench, series: &mut [Series]) -> anyhow::Result<()> {
        let front_end = bench.front_end()?;
        let mut connection = Connection::open(front_end.address)?;
        let rounds = WARM_UP + self.few();
        let progress = Progress::new("cold, over HTTP", rounds);
        for round in 0..rounds {
            for one in &mut *series {
                let (latency, parameters) = one.caller.call_http(&mut connection)?;
                if round >= WARM_UP {
                    one.must_be(true, parameters.switched)?;
                    one.client.push_ms(latency);
                }
            }
            progress.step();
        }
        drop(connection);
        front_end.stop(&bench.runtime)
    }

    /// Fewer where fewer are asked for in all.
    fn few(&self) -> usize {
        FEW.min(self.switches as usize)
    }
}

impl Series {
    fn new(subject: &Subject, served: Served, switches: usize) -> anyhow::Result<Self> {
        let samples = || Samples::with_capacity(switches);
        Ok(Self {
            caller: Caller::new(&subject.name, subject.examples(served)?),
            ready: samples(),
            ready_answered: samples(),
            cold: samples(),
            cold_answered: samples(),
            startup: samples(),
            copy_then_run: samples(),
            client: samples(),
            plan: None,
        })
    }

    fn must_be(&self, cold: bool, switched: bool) -> anyhow::Result<()> {
        let found = if switched { "had to be brought" } else { "was resident" };
        ensure!(switched == cold, "'{}' {found}: such requests were not to be measured", self.caller.model());
        Ok(())
    }

    fn plan(&self) -> anyhow::Result<&TransferPlan> {
        self.plan.as_ref().context("the model has no plan")
    }

    fn measured(self, copy_floor_ms: Summary, moved: Moved) -> anyhow::Result<Measured> {
        let summary = |samples: &Samples| samples.summary().context("nothing was measured");
        let plan = self.plan()?;
        Ok(Measured {
            ready_ms: summary(&self.ready)?,
            ready_answered_ms: summary(&self.ready_answered)?,
            copy_floor_ms,
            cold_ms: summary(&self.cold)?,
            cold_answered_ms: summary(&self.cold_answered)?,
            startup_ms: summary(&self.startup)?,
            copy_then_run_ms: summary(&self.copy_then_run)?,
            client_ms: summary(&self.client)?,
            engine_whole_ms: moved.whole_ms,
            engine_groups_ms: moved.groups_ms,
            groups: plan.groups.len(),
            predicted_ms: plan.predicted_us / 1e3,
        })
    }
}
