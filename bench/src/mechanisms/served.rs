//! pswitch itself: the whole server, with a second model that drives the first one out, and a training task.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use pswitch_controller::{Bandwidth, ByteSize, InferenceService as _, TaskState, TaskStatus};
use pswitch_device::DeviceId;
use pswitch_train::TaskConfig;
use pswitch_transfer::{Algorithm, Plan as TransferPlan};

use super::{Arm, Kind};
use crate::caller::Caller;
use crate::keep_alive::Parameters;
use crate::serving::{Bench, FrontEnd, Plan, Serving, Zygotes};
use crate::subject::{Served, Subject};

/// The task's name in the server.
const TASK: &str = "bench";

/// An interruption is counted by then, if there was one.
const INTERRUPTION: Duration = Duration::from_millis(200);

/// A server of one model.
pub(crate) struct ServedModel {
    bench: Bench,
    front_end: FrontEnd,
    name: String,
    rival: Caller,
    /// Asks once after each change of plans, where workers capture graphs for a new one: a request that may find them at it
    /// does not count.
    settles: Option<Caller>,
    /// The plan that was asked for last.
    algorithm: Option<Algorithm>,
    task: TaskConfig,
    is_submitted: bool,
}

/// What its arms measure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Measures {
    Ready,
    Switches,
}

/// A server with one of its plans.
pub(crate) struct ServedArm<'a> {
    server: &'a mut ServedModel,
    measures: Measures,
    /// Interruptions of training before the request.
    interruptions: u64,
}

impl ServedModel {
    pub(crate) fn start(
        subject: &Subject,
        serving: &Serving,
        served: Served,
        link: Option<Bandwidth>,
        task: &TaskConfig,
        training_size: ByteSize,
        zygotes: &mut Zygotes,
    ) -> anyhow::Result<Self> {
        let rival = format!("{}-rival", subject.name);
        let plan = Plan {
            training_size: Some(training_size),
            training_gives_way: false,
            ..Plan::of_rivals(serving, served, subject, &rival, link)
        };
        let bench = Bench::start(plan, zygotes, Arc::new(|_| ()))?;
        let front_end = bench.front_end()?;
        let caller = |name: &str| anyhow::Ok(Caller::new(name, subject.examples(served)?));
        let captures = matches!(served.device, DeviceId::Cuda(_));
        Ok(Self {
            bench,
            front_end,
            rival: caller(&rival)?,
            settles: captures.then(|| caller(&subject.name)).transpose()?,
            algorithm: None,
            name: subject.name.clone(),
            task: task.clone(),
            is_submitted: false,
        })
    }

    /// The plan by which pswitch moves the model; none if it has nothing to move.
    pub(crate) fn plan(&mut self) -> anyhow::Result<Option<TransferPlan>> {
        self.algorithm = Some(Algorithm::Optimal);
        Ok(self.bench.server.replan(&self.name, Algorithm::Optimal)?.into_iter().next())
    }

    /// One of the mechanisms that are this server.
    pub(crate) fn arm(&mut self, kind: Kind) -> anyhow::Result<ServedArm<'_>> {
        match (kind, kind.plan()) {
            (Kind::Ready, _) => self.ready(),
            (_, Some(algorithm)) => self.switches(algorithm),
            (_, None) => bail!("{} is no plan of a server", kind.name()),
        }
    }

    /// With the model there and nothing else. Only before anything has trained.
    fn ready(&mut self) -> anyhow::Result<ServedArm<'_>> {
        ensure!(!self.is_submitted, "something trains already");
        Ok(ServedArm { server: self, measures: Measures::Ready, interruptions: 0 })
    }

    /// With a task that trains, and the model moved by such a plan.
    pub(crate) fn switches(&mut self, algorithm: Algorithm) -> anyhow::Result<ServedArm<'_>> {
        if self.algorithm != Some(algorithm) {
            self.bench.server.replan(&self.name, algorithm)?;
            self.algorithm = Some(algorithm);
            if let Some(settles) = &mut self.settles {
                self.rival.ask(self.front_end.address)?;
                settles.ask(self.front_end.address)?;
            }
        }
        Ok(ServedArm { server: self, measures: Measures::Switches, interruptions: 0 })
    }

    pub(crate) fn stop(self) -> anyhow::Result<()> {
        self.front_end.stop(&self.bench.runtime)?;
        self.bench.stop()
    }

    fn status(&self) -> anyhow::Result<TaskStatus> {
        let status = self.bench.server.training().into_iter().find(|status| status.name == TASK);
        let status = status.context("the task is gone")?;
        if status.state == TaskState::Failed {
            bail!("the task failed: {}", status.reason);
        }
        Ok(status)
    }
}

impl Arm for ServedArm<'_> {
    fn address(&self) -> SocketAddr {
        self.server.front_end.address
    }

    fn trains(&self) -> bool {
        self.measures == Measures::Switches
    }

    /// It does so by itself whenever there is no request; what is needed is another model in the place of the first.
    fn train(&mut self) -> anyhow::Result<()> {
        if !self.trains() {
            return Ok(());
        }
        let ServedModel { bench, front_end, rival, task, is_submitted, .. } = &mut *self.server;
        if !std::mem::replace(is_submitted, true) {
            let config = serde_json::to_string(task)?;
            bench.runtime.block_on(bench.server.submit_training(TASK, &config))?;
        }
        rival.ask(front_end.address)?;
        Ok(())
    }

    fn is_training(&mut self) -> anyhow::Result<bool> {
        if !self.trains() {
            return Ok(false);
        }
        let status = self.server.status()?;
        self.interruptions = status.progress.interruptions;
        Ok(status.state == TaskState::Training && status.progress.steps_done > 0)
    }

    fn steps(&mut self) -> anyhow::Result<u64> {
        Ok(if self.server.is_submitted { self.server.status()?.progress.steps_done } else { 0 })
    }

    fn stopped(&mut self) -> anyhow::Result<Option<Duration>> {
        let latest = Instant::now() + INTERRUPTION;
        while self.trains() && Instant::now() < latest {
            let status = self.server.status()?;
            if status.progress.interruptions > self.interruptions {
                return Ok(status.last_yield_us.map(Duration::from_micros));
            }
            std::thread::sleep(Duration::from_micros(500));
        }
        Ok(None)
    }

    fn check(&self, parameters: &Parameters) -> anyhow::Result<()> {
        let found = if parameters.switched { "had to be brought" } else { "was resident" };
        let expected = self.measures == Measures::Switches;
        ensure!(parameters.switched == expected, "'{}' {found}", self.server.name);
        Ok(())
    }
}
