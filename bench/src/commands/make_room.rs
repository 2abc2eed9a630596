//! Switches for which the state of a training task has to make room, beside the same switches without.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context as _, ensure};
use pswitch_controller::{Bandwidth, ByteSize, TaskCommand, TaskState, TaskStatus};
use pswitch_device::DeviceId;
use pswitch_train::TaskConfig;
use serde::Serialize;
use serde_json::json;

use crate::caller::Caller;
use crate::progress::Progress;
use crate::report::{Goal, Report, Table};
use crate::serving::{Bench, Plan, Serving, Zygotes};
use crate::stats::{Samples, Summary, milliseconds};
use crate::subject::Subject;
use crate::task;
use crate::trained::Trained;

/// Of the host's link, unless a flag says otherwise: some times slower than memory, so that copying is what counts.
const HOST_LINK: &str = "1GB/s";

/// Rounds ahead of those that count.
const WARM_UP: usize = 3;

/// The small task by default: a configuration over what `cargo xtask fixtures` has made.
const DEFAULT_SMALL_TASK: &str = "
program: target/training/perceptron
optimizer: {kind: sgd, lr: 0.05, momentum: 0.9}
length: {steps: 1000000000}
data: {files: [target/training/perceptron/data.safetensors], batch_size: 5}
";

/// A model's switch when the state of a training task lies in its place, and its own switch.
///
/// The pool's homes are training's part and no more, so that the model lies where the state begins. In each round the task
/// trains, which drives the model out; then it is paused, so that no step has to be stopped, and the model is asked: its
/// weights come while the state goes. As many rounds follow in which the task computes when the request comes. All of it is
/// done for a task whose state is a few kilobytes first: that is the model's own switch.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  pswitch bench make-room --out
  pswitch bench make-room --task task.yaml --model models/resnet152 --training-size 12GiB --device cuda:0")]
pub(crate) struct MakeRoom {
    /// The task whose state makes room: a configuration whose length is ignored. By default a ResNet18 of target/training.
    #[arg(long, value_name = "FILE")]
    task: Option<PathBuf>,
    /// A task with a state of hardly any size. By default a perceptron of target/training.
    #[arg(long, value_name = "FILE")]
    small_task: Option<PathBuf>,
    /// The model that is asked: a folder with model.pt2, or an archive.
    #[arg(long, value_name = "PATH", default_value = "target/fixtures/resnet18")]
    model: PathBuf,
    /// Training's part of the pool, which must have room for the model too.
    #[arg(long, value_name = "SIZE", default_value = "512MiB")]
    training_size: ByteSize,
    /// Speed of a host device's link, as in 1GB/s, which is the default.
    #[arg(long, value_name = "RATE")]
    link_bandwidth: Option<Bandwidth>,
    /// Requests of each kind.
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    requests: u32,
    #[command(flatten)]
    pub(super) serving: Serving,
}

/// Latencies of cold requests, with the task paused and while it computes.
#[derive(Debug, Serialize)]
struct Latencies {
    paused_ms: Summary,
    beside_ms: Summary,
}

impl MakeRoom {
    pub(crate) fn run(&self, zygotes: &mut Zygotes) -> anyhow::Result<Report> {
        let subject = Subject::open(&self.model)?;
        let served = self.serving.like_references(std::slice::from_ref(&subject));
        let link_bandwidth = match served.device {
            DeviceId::Host(_) => Some(self.link_bandwidth.map_or_else(|| HOST_LINK.parse(), Ok)?),
            DeviceId::Cuda(_) => self.link_bandwidth,
        };
        let small = task::endless(self.small_task.as_deref(), DEFAULT_SMALL_TASK)?;
        let large = task::open(self.task.as_deref())?;
        let training_bytes = self.training_size.bytes();
        ensure!(
            training_bytes >= subject.span_bytes,
            "the model has {} bytes, and is to lie in the {training_bytes} of training: give it more --training-size",
            subject.span_bytes
        );
        let bench = Bench::start(
            Plan {
                serving: &self.serving,
                served,
                models: vec![(subject.name.clone(), &*subject.archive)],
                homes_bytes: Some(training_bytes),
                link_bandwidth,
                training_size: Some(self.training_size),
                training_gives_way: true,
            },
            zygotes,
            Arc::new(|_| ()),
        )?;
        let mut caller = Caller::new(&subject.name, subject.examples(served)?);
        let (own, _) = self.measure(&bench, &mut caller, "nothing to save", &small)?;
        let (making_room, last) = self.measure(&bench, &mut caller, "a state to save", &large)?;
        bench.stop()?;

        let ms = |value: f64| format!("{value:.2}");
        let mut table = Table::new(["cold request", "median ms", "p99 ms"]);
        for (what, latency) in [
            ("own switch", &own.paused_ms),
            ("a state makes room", &making_room.paused_ms),
            ("own switch, a task computes", &own.beside_ms),
            ("a state makes room, its task computes", &making_room.beside_ms),
        ] {
            table.push([what.to_owned(), ms(latency.median), ms(latency.p99)]);
        }
        let more = |making_room: &Summary, own: &Summary| (making_room.median / own.median - 1.0) * 100.0;
        let (paused, beside) =
            (more(&making_room.paused_ms, &own.paused_ms), more(&making_room.beside_ms, &own.beside_ms));
        let goals = vec![
            Goal::at_most("switch with a state in its place, above its own", 10.0, "%", paused),
            Goal::at_most("the same, the task computing", 10.0, "%", beside),
        ];
        let results = json!({
            "model": subject.name,
            "span_bytes": subject.span_bytes,
            "program": large.program,
            "device": served.device.to_string(),
            "threads": served.threads,
            "link_bandwidth": link_bandwidth.map(|bandwidth| bandwidth.to_string()),
            "own": own,
            "making_room": making_room,
            "made_room": last.made_room,
        });
        Ok(Report { command: "make-room", tables: vec![table], goals, results })
    }

    fn measure(
        &self,
        bench: &Bench,
        caller: &mut Caller,
        name: &'static str,
        config: &TaskConfig,
    ) -> anyhow::Result<(Latencies, TaskStatus)> {
        let task = Trained::submit(bench, &name.replace(' ', "-"), config)?;
        let mut latencies = [Samples::default(), Samples::default()];
        let requests = self.requests as usize;
        let progress = Progress::new(name, 2 * requests);
        for (samples, pauses) in latencies.iter_mut().zip([true, false]) {
            for round in 0..WARM_UP + requests {
                let latency_ms = round_trip(bench, caller, &task, pauses)?;
                if round >= WARM_UP {
                    samples.push(latency_ms);
                    progress.step();
                }
            }
        }
        drop(progress);
        let last = task.status()?;
        task.tell(TaskCommand::Stop)?;
        task.wait_for("its end", |status| status.state.is_over().then_some(()))?;
        let [paused_ms, beside_ms] = latencies.map(|samples| samples.summary());
        let what = "nothing was measured";
        Ok((Latencies { paused_ms: paused_ms.context(what)?, beside_ms: beside_ms.context(what)? }, last))
    }
}

/// A task trains, then the model is asked; how long that took.
fn round_trip(bench: &Bench, caller: &mut Caller, task: &Trained<'_>, pauses: bool) -> anyhow::Result<f64> {
    let steps = task.status()?.progress.steps_done;
    task.await_steps(steps + 1)?;
    task.await_state(TaskState::Training)?;
    let made_room = task.status()?.made_room;
    if pauses {
        task.tell(TaskCommand::Pause)?;
    }
    let call = bench.call(caller)?;
    ensure!(call.timings.switched, "the model was there: {call:?}");
    task.wait_for("make room", |status| (status.made_room > made_room).then_some(()))?;
    if pauses {
        task.tell(TaskCommand::Resume)?;
    }
    Ok(milliseconds(call.latency))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_mean_something() {
        TaskConfig::from_yaml(DEFAULT_SMALL_TASK).unwrap();
        assert!(HOST_LINK.parse::<Bandwidth>().is_ok());
    }
}
