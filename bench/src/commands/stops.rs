//! Training that is stopped a hundred times: what it comes to, beside the same without a stop.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use pswitch_controller::{ByteSize, TaskCommand, TaskState, TaskStatus};
use pswitch_train::{CheckpointConfig, Length, ProgressLine, TaskConfig};
use serde_json::json;

use crate::caller::Caller;
use crate::progress::Progress;
use crate::random::Random;
use crate::report::{Goal, Report, Table};
use crate::serving::{Bench, Plan, Serving, Zygotes};
use crate::subject::Subject;
use crate::task;
use crate::trained::{PyTorchLoop, Trained};

/// What is trained by default: a configuration over what `cargo xtask fixtures` has made.
const DEFAULT_TASK: &str = "
program: target/training/resnet18
optimizer: {kind: sgd, lr: 0.05, momentum: 0.9}
length: {steps: 300}
data: {files: [target/training/resnet18/data.safetensors], batch_size: 8, shuffle: false}
deterministic: true
";

/// Losses that are compared with those of PyTorch's own loop.
const COMPARED: u64 = 20;

/// A task with and without stops at random moments: every loss must be the same to the last bit.
///
/// The task runs from its start to its end, and once more while it is stopped again and again, at moments that do not depend
/// on where it is: in the forward pass, in the backward pass, in the optimizer, between steps. In turn it is paused and told to
/// go on, which throws its step away, and stands still for a request. With `--python`, the first losses are compared with
/// those of PyTorch's own loop as well; that needs data from files that are not shuffled.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  pswitch bench stops --out
  PYTHONPATH=python/src pswitch bench stops --device cuda:0 --python .torch/venv/bin/python")]
pub(crate) struct Stops {
    /// The task: a configuration whose length is ignored. By default a ResNet18 of target/training.
    #[arg(long, value_name = "FILE")]
    task: Option<PathBuf>,
    /// Steps of the task.
    #[arg(long, value_name = "N", default_value_t = 300, value_parser = clap::value_parser!(u64).range(10..))]
    steps: u64,
    /// How often it is stopped.
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..))]
    stops: u32,
    /// The model that is asked: a folder with model.pt2, or an archive.
    #[arg(long, value_name = "PATH", default_value = "target/fixtures/resnet18")]
    model: PathBuf,
    /// Part of the pool for training.
    #[arg(long, value_name = "SIZE", default_value = "1GiB")]
    training_size: ByteSize,
    /// A Python with torch.
    #[arg(long, value_name = "PROGRAM")]
    python: Option<PathBuf>,
    #[command(flatten)]
    pub(super) serving: Serving,
}

/// One run of the task.
struct Run {
    losses: Vec<f64>,
    last: TaskStatus,
}

impl Stops {
    pub(crate) fn run(&self, zygotes: &mut Zygotes) -> anyhow::Result<Report> {
        let subject = Subject::open(&self.model)?;
        let served = self.serving.like_references(std::slice::from_ref(&subject));
        let mut config = task::read(self.task.as_deref(), DEFAULT_TASK)?;
        config.length = Length::Steps(self.steps);
        config.log_every_steps = 1;
        let bench = Bench::start(
            Plan {
                serving: &self.serving,
                served,
                models: vec![(subject.name.clone(), &*subject.archive)],
                homes_bytes: Some(subject.span_bytes),
                link_bandwidth: None,
                training_size: Some(self.training_size),
                training_gives_way: false,
            },
            zygotes,
            Arc::new(|_| ()),
        )?;
        let mut caller = Caller::new(&subject.name, subject.examples(served)?);
        let undisturbed = self.train(&bench, &config, "undisturbed", None)?;
        let stopped = self.train(&bench, &config, "stopped", Some(&mut caller))?;
        bench.stop()?;
        let compared = COMPARED.min(self.steps);
        let pytorch = self.python.as_deref();
        let pytorch =
            pytorch.map(|python| PyTorchLoop::measure(python, served, &config, compared, 1)).transpose()?;

        let computed = stopped.last.progress.steps_computed;
        let mut goals = vec![
            Goal::at_most("losses that differ with stops", 0.0, "", differing(&undisturbed, &stopped.losses)),
            Goal::at_least("stops", f64::from(self.stops), "", count(stopped.last.progress.interruptions)),
        ];
        if let Some(pytorch) = &pytorch {
            ensure!(!pytorch.losses.is_empty(), "PyTorch's losses need files of data that are not shuffled");
            let differing = differing(&undisturbed, &pytorch.losses);
            goals.push(Goal::at_most("losses that differ from PyTorch's own", 0.0, "", differing));
        }
        let mut table = Table::new(["", "undisturbed", "stopped"]);
        let runs = [&undisturbed, &stopped];
        let mut row = |what: &str, cell: &dyn Fn(&Run) -> String| {
            let [one, other] = runs.map(cell);
            table.push([what.to_owned(), one, other]);
        };
        row("first loss", &|run| format!("{:?}", run.losses[0]));
        row("last loss", &|run| format!("{:?}", run.losses[run.losses.len() - 1]));
        row("steps that count", &|run| run.losses.len().to_string());
        row("steps computed", &|run| run.last.progress.steps_computed.to_string());
        row("interruptions", &|run| run.last.progress.interruptions.to_string());
        let results = json!({
            "program": config.program,
            "batch_size": config.data.batch_size(),
            "optimizer": config.optimizer,
            "deterministic": config.deterministic,
            "device": served.device.to_string(),
            "threads": served.threads,
            "losses": undisturbed.losses,
            "pytorch": pytorch,
            "steps_thrown_away": computed - self.steps,
            "stopped": stopped.last.progress,
        });
        Ok(Report { command: "stops", tables: vec![table], goals, results })
    }

    fn train(
        &self,
        bench: &Bench,
        config: &TaskConfig,
        name: &'static str,
        caller: Option<&mut Caller>,
    ) -> anyhow::Result<Run> {
        let place = tempfile::tempdir().context("no folder for a checkpoint")?;
        let checkpoint = CheckpointConfig { folder: place.path().to_owned(), every_steps: u64::MAX, keep: 1 };
        let task =
            Trained::submit(bench, name, &TaskConfig { checkpoint: Some(checkpoint), ..config.clone() })?;
        task.await_steps(1)?;
        if let Some(caller) = caller {
            self.stop_again_and_again(bench, &task, caller)?;
        }
        let last = task.wait_for("its end", |status| status.state.is_over().then(|| status.clone()))?;
        ensure!(last.state == TaskState::Finished, "the task is {} and not finished", last.state.name());
        let losses = losses(&place.path().join("progress.jsonl"))?;
        ensure!(
            losses.len() as u64 == self.steps,
            "{} losses of {} steps were logged",
            losses.len(),
            self.steps
        );
        Ok(Run { losses, last })
    }

    /// Stops at moments that are spread over the steps that are left.
    fn stop_again_and_again(
        &self,
        bench: &Bench,
        task: &Trained<'_>,
        caller: &mut Caller,
    ) -> anyhow::Result<()> {
        let mut random = Random::new(1);
        let progress = Progress::new("stops", self.stops as usize);
        let begun = task.status()?.progress.steps_done;
        for stop in 0..u64::from(self.stops) {
            let at = begun + (self.steps - begun) * stop / u64::from(self.stops);
            task.await_steps(at)?;
            task.await_state(TaskState::Training)?;
            let rate = task.status()?.progress.steps_per_s.max(0.1);
            thread::sleep(Duration::from_secs_f64(random.share() / rate));
            if stop.is_multiple_of(2) {
                task.tell(TaskCommand::Pause)?;
                task.tell(TaskCommand::Resume)?;
            } else {
                bench.call(caller)?;
            }
            progress.step();
        }
        Ok(())
    }
}

fn losses(log: &Path) -> anyhow::Result<Vec<f64>> {
    let text = std::fs::read_to_string(log).with_context(|| format!("cannot read {}", log.display()))?;
    let lines = text.lines().map(|line| {
        let line: ProgressLine = serde_json::from_str(line).context("a line of progress that is none")?;
        line.loss.context("a loss that is no number")
    });
    lines.collect()
}

/// How many of the losses are not the same number, missing ones among them.
fn differing(run: &Run, others: &[f64]) -> f64 {
    let pairs = run.losses.iter().zip(others);
    count(pairs.filter(|(one, other)| one.to_bits() != other.to_bits()).count() as u64)
}

/// Counts of some hundreds.
#[allow(clippy::cast_precision_loss)]
fn count(count: u64) -> f64 {
    count as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_task_means_something() {
        let config = TaskConfig::from_yaml(DEFAULT_TASK).unwrap();
        assert!(config.deterministic && config.program.ends_with("resnet18"));
    }

    #[test]
    fn losses_are_read_from_the_log() {
        let line = |loss: f64| {
            let line = ProgressLine {
                at_us: 1,
                step: 1,
                loss: Some(loss),
                lr: 0.1,
                steps_per_s: 1.0,
                samples_per_s: 8.0,
                goodput: None,
                interruptions: 0,
                interruption_cost_us: 0,
            };
            line.to_json()
        };
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), line(0.1) + &line(f64::from(0.3_f32))).unwrap();
        assert_eq!(losses(file.path()).unwrap(), [0.1, f64::from(0.3_f32)]);
        std::fs::write(file.path(), line(f64::NAN)).unwrap();
        assert_eq!(losses(file.path()).unwrap_err().to_string(), "a loss that is no number");
    }
}
