//! One module a command: its flags, its measurement, its report.

mod figures;
mod front_end;
mod kill;
mod make_room;
mod pipelining;
mod plan;
mod report;
mod start_up;
mod stops;
mod sweep;
mod switch;
mod switching;
mod train;

use clap::Subcommand;

use pswitch_device::DeviceId;

use crate::mechanisms::WorkerProcess;
use crate::report::Report;
use crate::serving::Zygotes;

/// What is measured by default on a GPU.
const GPU_MODELS: [&str; 4] =
    ["models/resnet152", "models/inception_v3", "models/bert-base", "models/vit_l_16"];

pub(crate) use figures::{All, Part};
pub(crate) use report::{PAGE, gather};

/// What can be measured.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Switch(switch::Switch),
    Pipelining(pipelining::Pipelining),
    Plan(plan::PlanBench),
    FrontEnd(front_end::FrontEnd),
    Switching(switching::Switching),
    Kill(kill::Kill),
    StartUp(start_up::StartUp),
    Sweep(sweep::Sweep),
    Report(report::GatherReport),
    Train(train::Train),
    Stops(stops::Stops),
    Figure5(figures::Figure5),
    Figure6(figures::Figure6),
    Figure7(figures::Figure7),
    Figure8(figures::Figure8),
    Figure9(figures::Figure9),
    Figure10(figures::Figure10),
    #[command(hide = true)]
    WorkerProcess(WorkerProcess),
    MakeRoom(make_room::MakeRoom),
}

impl Command {
    /// How many servers it starts, one after another.
    pub(crate) fn servers(&self) -> usize {
        match self {
            Self::Pipelining(_) => pipelining::SERVERS,
            Self::Plan(command) => command.servers(),
            Self::Figure5(command) => command.experiment.servers(),
            Self::Figure6(command) => command.experiment.servers(),
            Self::Figure7(command) => command.experiment.servers(),
            Self::Figure8(command) => command.experiment.servers(),
            Self::Figure9(command) => command.experiment.servers(),
            Self::Figure10(command) => command.servers(),
            Self::Switch(_)
            | Self::FrontEnd(_)
            | Self::Switching(_)
            | Self::Kill(_)
            | Self::StartUp(_)
            | Self::Train(_)
            | Self::Stops(_)
            | Self::MakeRoom(_) => 1,
            Self::Sweep(_) | Self::Report(_) | Self::WorkerProcess(_) => 0,
        }
    }

    /// The device that it measures, if it does.
    pub(crate) fn device(&self) -> Option<DeviceId> {
        let serving = match self {
            Self::Switch(command) => &command.serving,
            Self::Pipelining(command) => &command.serving,
            Self::Plan(command) => &command.serving,
            Self::FrontEnd(command) => &command.serving,
            Self::Switching(command) => &command.serving,
            Self::Kill(command) => &command.serving,
            Self::StartUp(command) => &command.serving,
            Self::Train(command) => &command.serving,
            Self::Stops(command) => &command.serving,
            Self::Figure5(command) => &command.experiment.serving,
            Self::Figure6(command) => &command.experiment.serving,
            Self::Figure7(command) => &command.experiment.serving,
            Self::Figure8(command) => &command.experiment.serving,
            Self::Figure9(command) => &command.experiment.serving,
            Self::MakeRoom(command) => &command.serving,
            Self::Figure10(command) => &command.experiment.serving,
            Self::Sweep(_) | Self::Report(_) | Self::WorkerProcess(_) => return None,
        };
        Some(serving.device())
    }

    /// Measures.
    pub(crate) fn run(&self, zygotes: &mut Zygotes) -> anyhow::Result<Report> {
        match self {
            Self::Switch(command) => command.run(zygotes),
            Self::Pipelining(command) => command.run(zygotes),
            Self::Plan(command) => command.run(zygotes),
            Self::FrontEnd(command) => command.run(zygotes),
            Self::Switching(command) => command.run(zygotes),
            Self::Kill(command) => command.run(zygotes),
            Self::StartUp(command) => command.run(zygotes),
            Self::Sweep(command) => command.run(),
            Self::Report(command) => command.run(),
            Self::Train(command) => command.run(zygotes),
            Self::Stops(command) => command.run(zygotes),
            Self::Figure5(command) => command.run(zygotes),
            Self::Figure6(command) => command.run(zygotes),
            Self::Figure7(command) => command.run(zygotes),
            Self::Figure8(command) => command.run(zygotes),
            Self::Figure9(command) => command.run(zygotes),
            Self::Figure10(command) => command.run(zygotes),
            Self::WorkerProcess(command) => command.run(),
            Self::MakeRoom(command) => command.run(zygotes),
        }
    }
}
