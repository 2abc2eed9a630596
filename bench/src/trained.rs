//! A training task in a server that is measured.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use pswitch_controller::{InferenceService as _, TaskCommand, TaskState, TaskStatus};
use pswitch_train::TaskConfig;
use serde::{Deserialize, Serialize};

use crate::progress;
use crate::pytorch;
use crate::serving::Bench;
use crate::subject::Served;

/// Time that anything may take.
const PATIENCE: Duration = Duration::from_secs(300);

/// PyTorch's own loop over a task.
const MODULE: &str = "pswitch.training_loop";

/// A task that was submitted.
pub(crate) struct Trained<'a> {
    bench: &'a Bench,
    name: String,
}

/// How often something happened in some time.
#[derive(Debug, Default)]
pub(crate) struct Counted {
    pub(crate) count: u64,
    pub(crate) time: Duration,
}

impl Counted {
    pub(crate) fn add(&mut self, more: &Self) {
        self.count += more.count;
        self.time += more.time;
    }

    pub(crate) fn per_s(&self) -> f64 {
        // Some thousands.
        #[allow(clippy::cast_precision_loss)]
        let count = self.count as f64;
        count / self.time.as_secs_f64()
    }
}

/// What PyTorch's own loop makes of a task, as the module prints it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct PyTorchLoop {
    torch: String,
    gpu: Option<String>,
    /// Of the first steps, if data and their order are known.
    pub(crate) losses: Vec<f64>,
    pub(crate) steps_per_s: f64,
}

/// What the server says of a task, unless it failed.
pub(crate) fn status(bench: &Bench, name: &str) -> anyhow::Result<TaskStatus> {
    let status = bench.server.training().into_iter().find(|status| status.name == name);
    let status = status.context("the task is gone")?;
    if status.state == TaskState::Failed {
        bail!("the task failed: {}", status.reason);
    }
    Ok(status)
}

impl<'a> Trained<'a> {
    pub(crate) fn submit(bench: &'a Bench, name: &str, config: &TaskConfig) -> anyhow::Result<Self> {
        let config = serde_json::to_string(config)?;
        bench.runtime.block_on(bench.server.submit_training(name, &config))?;
        Ok(Self { bench, name: name.to_owned() })
    }

    /// What the server says of it.
    pub(crate) fn status(&self) -> anyhow::Result<TaskStatus> {
        status(self.bench, &self.name)
    }

    pub(crate) fn tell(&self, command: TaskCommand) -> anyhow::Result<()> {
        self.bench.runtime.block_on(self.bench.server.command_training(&self.name, command))?;
        Ok(())
    }

    /// Looks until there is something to be seen.
    pub(crate) fn wait_for<T>(
        &self,
        what: &str,
        mut look: impl FnMut(&TaskStatus) -> Option<T>,
    ) -> anyhow::Result<T> {
        let begun = Instant::now();
        loop {
            let status = self.status()?;
            if let Some(found) = look(&status) {
                return Ok(found);
            }
            ensure!(begun.elapsed() < PATIENCE, "the task does not come to {what}: {status:?}");
            thread::sleep(Duration::from_micros(200));
        }
    }

    pub(crate) fn await_steps(&self, steps: u64) -> anyhow::Result<()> {
        self.wait_for("its steps", |status| (status.progress.steps_done >= steps).then_some(()))
    }

    pub(crate) fn await_state(&self, state: TaskState) -> anyhow::Result<()> {
        self.wait_for(state.name(), |status| (status.state == state).then_some(()))
    }

    /// Steps a second, over some time.
    pub(crate) fn steps_per_s(&self, time: Duration) -> anyhow::Result<f64> {
        Ok(self.steps_in(time)?.per_s())
    }

    /// Steps in some time, or a little more.
    pub(crate) fn steps_in(&self, time: Duration) -> anyhow::Result<Counted> {
        // From the end of one step to that of another.
        let from = self.status()?.progress.steps_done + 1;
        self.await_steps(from)?;
        let begun = Instant::now();
        thread::sleep(time);
        let to = self.status()?.progress.steps_done + 1;
        self.await_steps(to)?;
        ensure!(to > from, "the task was put back from step {from} to {to}: its worker was lost");
        Ok(Counted { count: to - from, time: begun.elapsed() })
    }
}

impl PyTorchLoop {
    /// Has PyTorch train a task for `steps` steps, and then for some seconds, in a process of its own.
    pub(crate) fn measure(
        python: &Path,
        served: Served,
        config: &TaskConfig,
        steps: u64,
        seconds: u64,
    ) -> anyhow::Result<Self> {
        progress::say("PyTorch's own loop ...");
        let task = tempfile::NamedTempFile::new().context("no file for the task")?;
        serde_json::to_writer(&task, config)?;
        let path = task.path().to_str().context("the file for the task has no name in UTF-8")?;
        let (steps, seconds) = (steps.to_string(), seconds.to_string());
        pytorch::run(python, MODULE, served, &["--task", path, "--steps", &steps, "--seconds", &seconds], &[])
    }
}
