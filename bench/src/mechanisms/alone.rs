//! Mechanisms that have no server: their front end and the thread behind it.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use pswitch_controller::InferenceService;
use pswitch_transfer::Plan;
use tokio::runtime::Runtime;

use super::desk::Desk;
use super::mps::Mps;
use super::restarting::{Ending, OneProcess, Restarting};
use super::service::{Mechanism, Procedure};
use super::standby::{Managed, NoIpc, NoUnified};
use super::{Arm, Kind};
use crate::keep_alive::Parameters;
use crate::serving::FrontEnd;
use crate::subject::Subject;

/// One of them.
pub(crate) struct AloneArm {
    mechanism: Arc<Mechanism>,
    front_end: FrontEnd,
    runtime: Runtime,
    /// Whether the model stays while training goes on.
    stays: bool,
}

impl AloneArm {
    /// Starts a mechanism; those that stream groups do so by `plan`.
    pub(crate) fn start(
        kind: Kind,
        subject: &Subject,
        desk: Arc<Desk>,
        plan: Option<&Plan>,
    ) -> anyhow::Result<Self> {
        let groups = || desk.groups(plan.context("there is no plan by which to move the model")?);
        let mechanism = match kind {
            Kind::StopAndStart => start(subject, &desk, |desk| Ok(Restarting::new(desk, Ending::Killed))),
            Kind::TwoProcesses => start(subject, &desk, |desk| Ok(Restarting::new(desk, Ending::Ended))),
            Kind::OneProcess => start(subject, &desk, OneProcess::new),
            Kind::Mps => start(subject, &desk, Mps::new),
            Kind::Managed => start(subject, &desk, Managed::start),
            Kind::NoUnified => {
                let groups = groups()?;
                start(subject, &desk, move |desk| NoUnified::start(desk, &groups))
            }
            Kind::NoIpc => {
                let groups = groups()?;
                start(subject, &desk, move |desk| NoIpc::start(desk, &groups))
            }
            other => bail!("{} is a server's", other.name()),
        }?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .context("cannot start threads")?;
        let service: Arc<dyn InferenceService> = Arc::clone(&mechanism) as _;
        let front_end = FrontEnd::open(&runtime, service)?;
        Ok(Self { mechanism, front_end, runtime, stays: kind == Kind::Mps })
    }

    /// Ends it, with all its processes.
    pub(crate) fn stop(self) -> anyhow::Result<()> {
        let Self { mechanism, front_end, runtime, .. } = self;
        front_end.stop(&runtime)?;
        mechanism.stop()
    }
}

fn start<P: Procedure + 'static>(
    subject: &Subject,
    desk: &Arc<Desk>,
    make: impl FnOnce(Arc<Desk>) -> anyhow::Result<P> + Send + 'static,
) -> anyhow::Result<Arc<Mechanism>> {
    Mechanism::start(subject, Arc::clone(desk), make)
}

impl Arm for AloneArm {
    fn address(&self) -> SocketAddr {
        self.front_end.address
    }

    fn trains(&self) -> bool {
        true
    }

    fn train(&mut self) -> anyhow::Result<()> {
        self.mechanism.ask(Procedure::train)
    }

    fn is_training(&mut self) -> anyhow::Result<bool> {
        self.mechanism.ask(Procedure::is_training)
    }

    fn steps(&mut self) -> anyhow::Result<u64> {
        self.mechanism.ask(Procedure::steps)
    }

    fn stopped(&mut self) -> anyhow::Result<Option<Duration>> {
        Ok(self.mechanism.stopped())
    }

    fn check(&self, parameters: &Parameters) -> anyhow::Result<()> {
        let found = if parameters.switched { "was made ready" } else { "was there" };
        ensure!(
            parameters.switched != self.stays,
            "the model {found}: such requests were not to be measured"
        );
        Ok(())
    }
}
