//! Weights that move while layers compute, against weights that move first.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context as _;
use pswitch_controller::Bandwidth;
use pswitch_transfer::{Algorithm, Plan as TransferPlan};
use serde::Serialize;
use serde_json::json;

use crate::caller::Caller;
use crate::matched_link::{MatchedLink, threads_beside_the_link};
use crate::progress::Progress;
use crate::report::{Goal, Report, Table};
use crate::serving::{Bench, Plan, Serving, Zygotes};
use crate::stats::{Samples, Summary, deviation_percent};
use crate::subject::{Served, Subject};

/// One without a throttle, to see how long the model computes, and one with it.
pub(crate) const SERVERS: usize = 2;

/// Requests ahead of those that count: each worker has touched each page by then.
const WARM_UP: usize = 4;

/// Cold latency of a model whose weights arrive while it computes.
///
/// The link is throttled so that copying the weights takes as long as computing. Measured in turns: the planned
/// pipeline, copy-then-run (all weights in one group), and the model resident. Another model of the same archive takes
/// the place of the first before every cold request. By default operators use one core less than there are: on the host
/// the link is a thread that copies.
#[derive(Debug, clap::Args)]
pub(crate) struct Pipelining {
    /// The model: a folder with model.pt2, or an archive.
    #[arg(long, value_name = "PATH", default_value = "target/fixtures/resnet152")]
    model: PathBuf,
    /// Cold requests by each way of moving.
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    requests: u32,
    #[command(flatten)]
    pub(super) serving: Serving,
}

/// What cold requests by one way of moving came to.
#[derive(Debug, Serialize)]
struct Cold {
    algorithm: String,
    groups: usize,
    predicted_ms: f64,
    latency_ms: Summary,
    /// From the decision to the first layer.
    startup_ms: Summary,
    /// How far the median is from the prediction.
    deviation_percent: f64,
}

struct Measured {
    cold: Vec<Cold>,
    ready_ms: Summary,
    lower_bound_ms: f64,
}

impl Pipelining {
    pub(crate) fn run(&self, zygotes: &mut Zygotes) -> anyhow::Result<Report> {
        let subject = Subject::open(&self.model)?;
        let served = self.serving.with_threads(threads_beside_the_link());
        let requests = self.requests as usize;
        let MatchedLink { compute_ms, bandwidth: link_bandwidth } =
            MatchedLink::find(&subject, &self.serving, served, requests, zygotes)?;
        let Measured { cold, ready_ms, lower_bound_ms } =
            self.measure(&subject, served, link_bandwidth, zygotes)?;

        let mut table =
            Table::new(["", "groups", "median ms", "p99 ms", "spread %", "predicted ms", "off %"]);
        for row in &cold {
            table.push([
                if row.groups == 1 { "copy, then run" } else { "planned pipeline" }.to_owned(),
                row.groups.to_string(),
                format!("{:.1}", row.latency_ms.median),
                format!("{:.1}", row.latency_ms.p99),
                format!("{:.1}", row.latency_ms.spread_percent),
                format!("{:.1}", row.predicted_ms),
                format!("{:+.1}", row.deviation_percent),
            ]);
        }
        table.push([
            "ready".to_owned(),
            "-".to_owned(),
            format!("{:.1}", ready_ms.median),
            format!("{:.1}", ready_ms.p99),
            format!("{:.1}", ready_ms.spread_percent),
            "-".to_owned(),
            "-".to_owned(),
        ]);
        let (planned, whole) = (&cold[0], &cold[1]);
        let below_percent = -deviation_percent(planned.latency_ms.median, whole.latency_ms.median);
        let goals = vec![
            Goal::at_least("planned pipeline below copy-then-run", 35.0, "%", below_percent),
            Goal::at_most("distance from the plan's prediction", 10.0, "%", planned.deviation_percent.abs()),
        ];
        let results = json!({
            "model": subject.name,
            "span_bytes": subject.span_bytes,
            "device": served.device.to_string(),
            "threads": served.threads,
            "unthrottled_compute_ms": compute_ms,
            "link_bandwidth_bytes_per_s": link_bandwidth.bytes_per_s(),
            "ready_ms": ready_ms,
            "cold": cold,
            "lower_bound_ms": lower_bound_ms,
            "below_copy_then_run_percent": below_percent,
        });
        Ok(Report { command: "pipelining", tables: vec![table], goals, results })
    }

    fn measure(
        &self,
        subject: &Subject,
        served: Served,
        link_bandwidth: Bandwidth,
        zygotes: &mut Zygotes,
    ) -> anyhow::Result<Measured> {
        let rival = format!("{}-rival", subject.name);
        let plan = Plan::of_rivals(&self.serving, served, subject, &rival, Some(link_bandwidth));
        let bench = Bench::start(plan, zygotes, Arc::new(|_| ()))?;
        let mut caller = Caller::new(&subject.name, subject.examples(served)?);
        let mut rival = Caller::new(&rival, subject.examples(served)?);
        let mut ready = Samples::default();
        let algorithms = [Algorithm::Optimal, Algorithm::Whole];
        let mut series = [(); 2].map(|()| (Samples::default(), Samples::default(), None::<TransferPlan>));
        let progress = Progress::new("rounds", WARM_UP + self.requests as usize);
        for round in 0..WARM_UP + self.requests as usize {
            progress.step();
            let counts = round >= WARM_UP;
            for (algorithm, (latency, startup, plan)) in algorithms.into_iter().zip(&mut series) {
                *plan = bench.server.replan(&subject.name, algorithm)?.into_iter().next();
                bench.call(&mut rival)?;
                let cold = bench.call(&mut caller)?;
                anyhow::ensure!(cold.timings.switched, "'{}' was still resident", subject.name);
                if counts {
                    latency.push_ms(cold.latency);
                    startup.push_ms(cold.timings.switch);
                }
            }
            let call = bench.call(&mut caller)?;
            if counts {
                ready.push_ms(call.latency);
            }
        }
        drop(progress);
        bench.stop()?;
        let mut lower_bound_ms = 0.0;
        let cold = series
            .into_iter()
            .map(|(latency, startup, plan)| {
                let plan = plan.context("the model has no plan")?;
                let latency_ms = latency.summary().context("nothing was measured")?;
                let predicted_ms = plan.predicted_us / 1e3;
                lower_bound_ms = plan.lower_bound_us / 1e3;
                Ok(Cold {
                    algorithm: plan.algorithm.to_string(),
                    groups: plan.groups.len(),
                    predicted_ms,
                    latency_ms,
                    startup_ms: startup.summary().context("nothing was measured")?,
                    deviation_percent: deviation_percent(latency_ms.median, predicted_ms),
                })
            })
            .collect::<anyhow::Result<Vec<Cold>>>()?;
        Ok(Measured { cold, ready_ms: ready.summary().context("nothing was measured")?, lower_bound_ms })
    }
}
