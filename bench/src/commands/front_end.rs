//! What a request costs outside queue, switch and computation.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use anyhow::{Context as _, ensure};
use serde_json::json;

use crate::keep_alive::{Connection, request};
use crate::progress::{self, Progress};
use crate::report::{Goal, Report, Table};
use crate::serving::{Bench, Plan, Serving, Zygotes};
use crate::stats::{Samples, milliseconds};
use crate::subject::Subject;

/// Where the model is that does next to nothing, once it has been made.
const TINY_MODEL: &str = "target/bench-models/mean-color";

const WARM_UP: u32 = 200;

/// Latency over HTTP less queue, switch and computation.
///
/// One client on loopback sends one request after another over a connection that stays open: 602,112 bytes of binary
/// input to a model that does next to nothing. What the server reports of queue, switch and computation is taken off
/// what the client sees; the rest is the front end, both ways through the sockets included. Operators use one thread
/// by default.
#[derive(Debug, clap::Args)]
pub(crate) struct FrontEnd {
    /// The model: a folder with model.pt2, or an archive. By default a picture's mean color, exported on first use.
    #[arg(long, value_name = "PATH")]
    model: Option<PathBuf>,
    /// Requests that count.
    #[arg(long, value_name = "N", default_value_t = 3000, value_parser = clap::value_parser!(u32).range(1..))]
    requests: u32,
    #[command(flatten)]
    pub(super) serving: Serving,
}

impl FrontEnd {
    pub(crate) fn run(&self, zygotes: &mut Zygotes) -> anyhow::Result<Report> {
        let subject = match &self.model {
            Some(path) => Subject::open(path)?,
            None => Subject::open(tiny_model()?)?,
        };
        let served = self.serving.with_threads(1);
        let plan = Plan {
            serving: &self.serving,
            served,
            models: vec![(subject.name.clone(), &subject.archive)],
            homes_bytes: None,
            link_bandwidth: None,
            training_size: None,
            training_gives_way: false,
        };
        let bench = Bench::start(plan, zygotes, Arc::new(|_| ()))?;
        let front_end = bench.front_end()?;
        let example = subject.example(served)?;
        let input_bytes: u64 = example.inputs.iter().filter_map(|(spec, _)| spec.bytes()).sum();
        let request = request(&subject.name, &example);
        let mut connection = Connection::open(front_end.address)?;
        let parts = ["front end", "client latency", "queue", "switch", "compute"];
        let mut samples = parts.map(|_| Samples::with_capacity(self.requests as usize));
        let progress = Progress::new("requests", (WARM_UP + self.requests) as usize);
        for round in 0..WARM_UP + self.requests {
            progress.step();
            let (latency, server) = connection.round(&request)?;
            if round < WARM_UP {
                continue;
            }
            let latency = milliseconds(latency);
            let [queue, switch, compute] =
                [server.queue_us, server.switch_us, server.compute_us].map(|us| us / 1e3);
            let front_end = latency - queue - switch - compute;
            for (samples, value) in samples.iter_mut().zip([front_end, latency, queue, switch, compute]) {
                samples.push(value);
            }
        }
        drop(progress);
        drop(connection);
        front_end.stop(&bench.runtime)?;
        bench.stop()?;

        let mut table = Table::new(["milliseconds", "median", "p99", "least", "most"]);
        let mut results = serde_json::Map::new();
        let mut median = f64::NAN;
        for (name, samples) in parts.iter().zip(&samples) {
            let summary = samples.summary().context("nothing was measured")?;
            let row = [summary.median, summary.p99, summary.least, summary.most];
            let [a, b, c, d] = row.map(|ms| format!("{ms:.3}"));
            table.push([(*name).to_owned(), a, b, c, d]);
            results.insert(format!("{}_ms", name.replace(' ', "_")), json!(summary));
            if *name == parts[0] {
                median = summary.median;
            }
        }
        results.insert("model".to_owned(), json!(subject.name));
        results.insert("input_bytes".to_owned(), json!(input_bytes));
        results.insert("device".to_owned(), json!(served.device.to_string()));
        results.insert("threads".to_owned(), json!(served.threads));
        let what = format!("{input_bytes} bytes of input, median outside queue, switch and compute");
        let goals = vec![Goal::below(what, 0.5, "ms", median)];
        Ok(Report { command: "front-end", tables: vec![table], goals, results: results.into() })
    }
}

/// The folder of the model that does next to nothing; exports it if it is not there.
fn tiny_model() -> anyhow::Result<&'static Path> {
    let path = Path::new(TINY_MODEL);
    if !path.join("model.pt2").exists() {
        progress::say(format_args!("exporting {TINY_MODEL} ..."));
        let exported = Command::new(".torch/venv/bin/python")
            .args(["-m", "pswitch.cli", "mean_color:mean_color", "--name", "mean-color"])
            .args(["--out", "target/bench-models"])
            .env("PYTHONPATH", "python/src:bench/models")
            .status()
            .context("`cargo xtask setup` makes .torch/venv; or name another model with --model")?;
        ensure!(exported.success(), "{TINY_MODEL} cannot be exported");
    }
    Ok(path)
}
