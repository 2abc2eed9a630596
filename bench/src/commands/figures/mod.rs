//! The figures of the paper: each measures some mechanisms on some models.

mod all;
mod bars;
mod figure10;
mod figure5;
mod figure6;
mod figure7;
mod figure8;
mod figure9;
mod pytorch;
mod session;

use std::path::PathBuf;
use std::time::Instant;

use pswitch_controller::{Bandwidth, ByteSize};
use pswitch_device::DeviceId;

use super::GPU_MODELS;
use crate::figures::{Figure, LeftOut, Took};
use crate::matched_link::{MatchedLink, threads_beside_the_link};
use crate::report::{Goal, Report, Table};
use crate::serving::{Serving, Zygotes};
use crate::subject::{Served, Subject};
pub(crate) use all::{All, Part};
pub(crate) use figure5::Figure5;
pub(crate) use figure6::Figure6;
pub(crate) use figure7::Figure7;
pub(crate) use figure8::Figure8;
pub(crate) use figure9::Figure9;
pub(crate) use figure10::Figure10;

/// What is measured by default on a GPU: the models of the paper.
const ON_GPU: [&str; 3] = [GPU_MODELS[0], GPU_MODELS[1], GPU_MODELS[2]];

/// What is measured by default on the host.
const ON_HOST: [&str; 3] =
    ["target/fixtures/resnet18", "target/fixtures/mobilenet_v3_small", "target/fixtures/bert-2-layers"];

/// Servers that a model may need: to match the link, pswitch, and pswitch with its host store not pinned.
const SERVERS: usize = 3;

/// Requests by which the link is matched to a model.
const MATCHING: usize = 5;

/// What all figures take.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Experiment {
    /// The models: folders with model.pt2, or archives. By default those of the paper in models/ on a GPU, and small ones of
    /// target/fixtures on the host.
    #[arg(long = "model", value_name = "PATH", num_args = 1..)]
    models: Vec<PathBuf>,
    /// About a minute a figure: fewer rounds, and 0.15 s of training in each.
    #[arg(long)]
    quick: bool,
    /// Rounds that count, instead of 10; with --quick 15, or 8, 2 or 1 where each takes longer. Figures 6 and 10 have none.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    rounds: Option<u32>,
    /// The task: a configuration whose length is ignored. By default a ResNet18 of target/training.
    #[arg(long, value_name = "FILE")]
    task: Option<PathBuf>,
    /// Part of the pool for training, and the memory of a process that trains alone.
    #[arg(long, value_name = "SIZE", default_value = "1GiB")]
    training_size: ByteSize,
    /// Slows the link of a host device down, as in 1GB/s. By default copying a model takes as long as computing, and operators
    /// leave a core to the link.
    #[arg(long, value_name = "RATE")]
    link_bandwidth: Option<Bandwidth>,
    #[command(flatten)]
    pub(crate) serving: Serving,
}

/// What a figure comes to: its results are the figure itself, from which it is drawn.
fn report(
    command: &'static str,
    figure: &Figure,
    table: Table,
    mut goals: Vec<Goal>,
    wrong_outputs: usize,
) -> anyhow::Result<Report> {
    let mut tables = vec![table];
    tables.extend(left_out(&figure.left_out));
    // A handful.
    #[allow(clippy::cast_precision_loss)]
    goals.push(Goal::at_most("wrong outputs", 0.0, "", wrong_outputs as f64));
    Ok(Report { command, tables, goals, results: serde_json::to_value(figure)? })
}

/// What was left out, if anything was.
fn left_out(left_out: &[LeftOut]) -> Option<Table> {
    let mut table = Table::new(["left out", "model", "reason"]);
    for LeftOut { mechanism, model, reason } in left_out {
        table.push([mechanism.clone(), model.clone().unwrap_or_default(), reason.clone()]);
    }
    (!left_out.is_empty()).then_some(table)
}

impl Experiment {
    /// As many servers as it may start, one after another. Which device `auto` is cannot be asked yet: workers are forked
    /// from a process that has not touched a GPU.
    pub(crate) fn servers(&self) -> usize {
        let models = if self.models.is_empty() { ON_GPU.len().max(ON_HOST.len()) } else { self.models.len() };
        models * SERVERS
    }

    /// The models that are named, or so many of the others.
    fn subjects(&self, default: usize) -> anyhow::Result<Vec<Subject>> {
        let paths: &[&str] = match self.serving.device() {
            _ if !self.models.is_empty() => {
                return self.models.iter().map(|path| Subject::open(path)).collect();
            }
            DeviceId::Cuda(_) => &ON_GPU,
            DeviceId::Host(_) => &ON_HOST,
        };
        paths.iter().take(default).map(|path| Subject::open(path.as_ref())).collect()
    }

    /// How slow the link is to be: on the host as slow as a model computes, unless a flag says otherwise. What it takes to
    /// find that out is noted.
    fn link(
        &self,
        subject: &Subject,
        served: Served,
        zygotes: &mut Zygotes,
        took: &mut Vec<Took>,
    ) -> anyhow::Result<Option<Bandwidth>> {
        match (served.device, self.link_bandwidth) {
            (DeviceId::Cuda(_), given) | (_, given @ Some(_)) => Ok(given),
            (DeviceId::Host(_), None) => {
                let begun = Instant::now();
                let link = MatchedLink::find(subject, &self.serving, served, MATCHING, zygotes)?;
                took.push(Took::new(Took::LINK, Some(&subject.name), begun.elapsed()));
                Ok(Some(link.bandwidth))
            }
        }
    }

    /// On the host a core is left to the link: there it is a thread that copies.
    fn served(&self, subjects: &[Subject]) -> Served {
        match self.serving.device() {
            DeviceId::Host(_) => self.serving.with_threads(threads_beside_the_link()),
            DeviceId::Cuda(_) => self.serving.like_references(subjects),
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        experiment: Experiment,
    }

    /// What these flags ask for.
    pub(super) fn experiment(flags: &[&str]) -> Experiment {
        let line = [&["figure"], flags].concat();
        Line::try_parse_from(line).unwrap().experiment
    }

    #[test]
    fn what_is_left_out_is_told_with_its_reason() {
        assert_eq!(left_out(&[]), None);
        let mps = LeftOut { mechanism: "mps".to_owned(), model: None, reason: "no GPU".to_owned() };
        let text = left_out(&[mps]).unwrap().to_string();
        let cells: Vec<_> = text.lines().nth(1).unwrap().split_whitespace().collect();
        assert_eq!(cells, ["mps", "no", "GPU"]);
    }
}
