//! One model after the other, one mechanism after the other: what fails is left out with its reason, and the rest goes on.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{anyhow, ensure};
use pswitch_controller::Bandwidth;
use pswitch_device::DeviceId;
use pswitch_train::TaskConfig;
use pswitch_transfer::{Algorithm, Plan};

use super::Experiment;
use crate::caller::{Caller, WrongOutput};
use crate::figures::{LeftOut, Took};
use crate::interrupt;
use crate::mechanisms::{AloneArm, Arm, Desk, Kind, ServedModel};
use crate::progress;
use crate::serving::{Serving, Zygotes};
use crate::subject::{Served, Subject};
use crate::task;

/// Everything that measurements of one figure share.
pub(super) struct Session<'a> {
    experiment: &'a Experiment,
    pub(super) served: Served,
    task: TaskConfig,
    zygotes: &'a mut Zygotes,
    models: usize,
    left_out: Vec<LeftOut>,
    took: Vec<Took>,
    /// Mechanisms whose answers were not the right ones.
    wrong: Vec<Kind>,
}

/// A model whose mechanisms are measured.
struct Model<'a> {
    subject: &'a Subject,
    link: Option<Bandwidth>,
    caller: Caller,
    plan: Option<Plan>,
}

/// Measures a mechanism that runs.
pub(super) trait Measure {
    type Found;

    fn measure(&mut self, kind: Kind, arm: &mut dyn Arm, caller: &mut Caller) -> anyhow::Result<Self::Found>;

    /// Measures mechanisms that are one server with several plans, and says how long each took; one after the other, unless
    /// they are easier to compare otherwise.
    fn measure_plans(
        &mut self,
        kinds: &[Kind],
        server: &mut ServedModel,
        caller: &mut Caller,
    ) -> Vec<(anyhow::Result<Self::Found>, Duration)> {
        let one = |&kind: &Kind| {
            let begun = Instant::now();
            let found = server.arm(kind).and_then(|mut arm| self.measure(kind, &mut arm, caller));
            (found, begun.elapsed())
        };
        kinds.iter().map(one).collect()
    }
}

impl<'a> Session<'a> {
    pub(super) fn new(
        experiment: &'a Experiment,
        served: Served,
        zygotes: &'a mut Zygotes,
    ) -> anyhow::Result<Self> {
        let task = task::open(experiment.task.as_deref())?;
        interrupt::listen()?;
        let (left_out, took, wrong) = (Vec::new(), Vec::new(), Vec::new());
        Ok(Self { experiment, served, task, zygotes, models: 0, left_out, took, wrong })
    }

    /// Measures mechanisms on a model. What was found comes in the order of `kinds`.
    pub(super) fn run<M: Measure>(
        &mut self,
        subject: &Subject,
        kinds: &[Kind],
        measure: &mut M,
    ) -> Vec<(Kind, M::Found)> {
        self.models += 1;
        let mut found = Vec::with_capacity(kinds.len());
        let checked = interrupt::check().map_err(Into::into);
        let link =
            checked.and_then(|()| self.experiment.link(subject, self.served, self.zygotes, &mut self.took));
        let model = link.and_then(|link| {
            let caller = Caller::new(&subject.name, subject.examples(self.served)?);
            Ok(Model { subject, link, caller, plan: None })
        });
        let mut model = match model {
            Ok(model) => model,
            Err(error) => {
                kinds.iter().for_each(|&kind| self.leave_out(kind, subject, &error));
                return found;
            }
        };
        // The server comes first: others need its plan.
        let (served, others): (Vec<Kind>, Vec<Kind>) = kinds.iter().partition(|kind| kind.plan().is_some());
        self.run_served(&mut model, &served, measure, &mut found);
        for kind in others {
            progress::say(format_args!("{}: {} ...", subject.name, kind.name()));
            let begun = Instant::now();
            let result = match (self.given_up(kind), kind) {
                (Some(reason), _) => Err(anyhow!(reason)),
                (None, Kind::NoPinned) => self.run_unpinned(&mut model, measure),
                (None, kind) => self.run_alone(&mut model, kind, measure),
            };
            self.took.push(Took::new(kind.name(), Some(&subject.name), begun.elapsed()));
            self.note(subject, kind, result, &mut found);
        }
        found.sort_by_key(|(kind, _)| kinds.iter().position(|listed| listed == kind));
        found
    }

    /// What was left out of these mechanisms; once where the reason was the same for all of several models.
    pub(super) fn left_out(&self, kinds: &[Kind]) -> Vec<LeftOut> {
        let of_them = |left_out: &&LeftOut| kinds.iter().any(|kind| kind.name() == left_out.mechanism);
        together(self.left_out.iter().filter(of_them).cloned().collect(), self.models)
    }

    /// How long each of these mechanisms took, and what they need.
    pub(super) fn took(&self, kinds: &[Kind]) -> Vec<Took> {
        let is_of_them = |took: &&Took| {
            [Took::LINK, Took::SERVER].contains(&&*took.what)
                || kinds.iter().any(|kind| kind.name() == took.what)
        };
        self.took.iter().filter(is_of_them).cloned().collect()
    }

    /// How many of these mechanisms, model by model, have given answers that were not the right ones.
    pub(super) fn wrong_outputs(&self, kinds: &[Kind]) -> usize {
        self.wrong.iter().filter(|kind| kinds.contains(kind)).count()
    }

    /// Why a quick run does not try it again: what hung with one model would take as long to hang with the next.
    fn given_up(&self, kind: Kind) -> Option<String> {
        let before = self.left_out.iter().find(|left_out| left_out.mechanism == kind.name());
        before.filter(|_| self.experiment.quick).map(|left_out| left_out.reason.clone())
    }

    fn run_served<M: Measure>(
        &mut self,
        model: &mut Model<'_>,
        kinds: &[Kind],
        measure: &mut M,
        found: &mut Vec<(Kind, M::Found)>,
    ) {
        let begun = Instant::now();
        let server = self.server(model, &self.experiment.serving);
        let started = begun.elapsed();
        let Model { subject, caller, plan, .. } = model;
        let mut server = match server {
            Ok(server) => server,
            Err(error) => return kinds.iter().for_each(|&kind| self.leave_out(kind, subject, &error)),
        };
        let names: Vec<_> = kinds.iter().map(|kind| kind.name()).collect();
        progress::say(format_args!("{}: {} ...", subject.name, names.join(", ")));
        for (&kind, (result, time)) in kinds.iter().zip(measure.measure_plans(kinds, &mut server, caller)) {
            self.took.push(Took::new(kind.name(), Some(&subject.name), time));
            self.note(subject, kind, result, found);
        }
        let begun = Instant::now();
        match server.plan() {
            Ok(found) => *plan = found,
            Err(error) => progress::say(format_args!("{}: no plan: {error:#}", subject.name)),
        }
        if let Err(error) = server.stop() {
            progress::say(format_args!("{}: the server: {error:#}", subject.name));
        }
        self.took.push(Took::new(Took::SERVER, Some(&subject.name), started + begun.elapsed()));
    }

    fn server(&mut self, model: &Model<'_>, serving: &Serving) -> anyhow::Result<ServedModel> {
        interrupt::check()?;
        progress::say(format_args!("{}: starting a server ...", model.subject.name));
        let training_size = self.experiment.training_size;
        let Model { subject, link, .. } = *model;
        ServedModel::start(subject, serving, self.served, link, &self.task, training_size, self.zygotes)
    }

    /// pswitch with a host store that is not pinned.
    fn run_unpinned<M: Measure>(
        &mut self,
        model: &mut Model<'_>,
        measure: &mut M,
    ) -> anyhow::Result<M::Found> {
        ensure!(matches!(self.served.device, DeviceId::Cuda(_)), "the host copies any memory alike");
        let mut server = self.server(model, &self.experiment.serving.without_pinning())?;
        let found = server
            .switches(Algorithm::Optimal)
            .and_then(|mut arm| measure.measure(Kind::NoPinned, &mut arm, &mut model.caller));
        let stopped = server.stop();
        let found = found?;
        stopped.map(|()| found)
    }

    fn run_alone<M: Measure>(
        &mut self,
        model: &mut Model<'_>,
        kind: Kind,
        measure: &mut M,
    ) -> anyhow::Result<M::Found> {
        interrupt::check()?;
        let (arena, training) =
            (self.experiment.serving.arena_bytes(), self.experiment.training_size.bytes());
        let desk = Desk::new(model.subject, self.served, model.link, arena, &self.task, training)?;
        let mut arm = AloneArm::start(kind, model.subject, Arc::new(desk), model.plan.as_ref())?;
        let found = measure.measure(kind, &mut arm, &mut model.caller);
        let stopped = arm.stop();
        let found = found?;
        stopped.map(|()| found)
    }

    fn note<T>(
        &mut self,
        subject: &Subject,
        kind: Kind,
        result: anyhow::Result<T>,
        found: &mut Vec<(Kind, T)>,
    ) {
        match result {
            Ok(value) => found.push((kind, value)),
            Err(error) => self.leave_out(kind, subject, &error),
        }
    }

    fn leave_out(&mut self, kind: Kind, subject: &Subject, error: &anyhow::Error) {
        progress::say(format_args!("{}: {} is left out: {error:#}", subject.name, kind.name()));
        if error.is::<WrongOutput>() {
            self.wrong.push(kind);
        }
        self.left_out.push(LeftOut {
            mechanism: kind.name().to_owned(),
            model: Some(subject.name.clone()),
            reason: format!("{error:#}"),
        });
    }
}

/// Tells what was left out of all models for one reason once.
fn together(left_out: Vec<LeftOut>, models: usize) -> Vec<LeftOut> {
    let mut found: Vec<LeftOut> = Vec::new();
    for one in &left_out {
        let same = |other: &&LeftOut| (&other.mechanism, &other.reason) == (&one.mechanism, &one.reason);
        let is_general = models > 1 && left_out.iter().filter(same).count() == models;
        let told = LeftOut { model: one.model.clone().filter(|_| !is_general), ..one.clone() };
        if !found.contains(&told) {
            found.push(told);
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn left_out(mechanism: &str, model: Option<&str>, reason: &str) -> LeftOut {
        let (mechanism, reason) = (mechanism.to_owned(), reason.to_owned());
        LeftOut { mechanism, model: model.map(str::to_owned), reason }
    }

    #[test]
    fn one_reason_for_all_models_is_told_once() {
        let mps = |model| left_out("mps", Some(model), "no GPU");
        let one = left_out("one-process", Some("a"), "it fell over");
        let found = together(vec![mps("a"), one.clone(), mps("b")], 2);
        assert_eq!(found, [left_out("mps", None, "no GPU"), one.clone()]);
        // Of the only model, or of some.
        assert_eq!(together(vec![mps("a")], 1), [mps("a")]);
        assert_eq!(together(vec![mps("a"), mps("b")], 3), [mps("a"), mps("b")]);
    }
}
