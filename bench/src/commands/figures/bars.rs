//! Figures whose bars are latencies: rounds of training, and then a request.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::ensure;

use super::pytorch::PyTorch;
use super::session::{Measure, Session};
use super::{Experiment, report};
use crate::caller::Caller;
use crate::figures::{Bar, Figure, Parts};
use crate::interrupt::{self, Interrupted};
use crate::keep_alive::Parameters;
use crate::mechanisms::{Arm, Kind, ServedModel};
use crate::progress::Progress;
use crate::report::{Goal, Report, Table};
use crate::serving::Zygotes;
use crate::stats::{Samples, Summary, mean, milliseconds};

/// Time in which training has to begin.
const PATIENCE: Duration = Duration::from_secs(60);

/// A figure of this kind.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bars {
    pub(super) number: u8,
    pub(super) command: &'static str,
    /// In the order of the paper.
    pub(super) kinds: &'static [Kind],
    pub(super) order: Order,
}

/// How bars are asked to compare.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Order {
    /// None is lower than the one before it.
    Rising,
    /// None is lower than that of pswitch.
    AbovePswitch,
}

/// How often, and how long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Rounds {
    /// Where nothing trains.
    idle: Count,
    /// Of a server with a task that trains: a round takes little more than the training in it.
    served: Count,
    /// Of processes that stay, and whose training has to do a step in each round.
    standing_by: Count,
    /// Where the task is prepared again in each round.
    prepared: Count,
    /// Where a process is made for each request.
    restarted: Count,
    training: Duration,
}

/// Rounds ahead that do not count, and those that do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Count {
    ahead: usize,
    counted: usize,
}

impl Rounds {
    fn of(experiment: &Experiment) -> Self {
        let count = |ahead, counted| Count { ahead, counted };
        let mut rounds = if experiment.quick {
            Self {
                // A GPU's clocks rise only when it has much to do, and training is much already.
                idle: count(20, 50),
                served: count(2, 15),
                standing_by: count(2, 8),
                prepared: count(1, 2),
                restarted: count(0, 1),
                // Some steps of a GPU.
                training: Duration::from_millis(150),
            }
        } else {
            let paper = count(10, 10);
            Self {
                idle: count(10, 90),
                served: paper,
                standing_by: paper,
                prepared: paper,
                restarted: paper,
                training: Duration::from_secs(10),
            }
        };
        if let Some(counted) = experiment.rounds {
            let counted = counted as usize;
            let Self { served, standing_by, prepared, restarted, .. } = &mut rounds;
            for of_training in [served, standing_by, prepared, restarted] {
                *of_training = count(of_training.ahead.min(counted), counted);
            }
        }
        rounds
    }

    /// Of a mechanism.
    fn count(&self, kind: Kind) -> Count {
        match kind {
            Kind::Ready => self.idle,
            _ if kind.plan().is_some() => self.served,
            _ if kind.restarts() => self.restarted,
            _ if kind.prepares_again() => self.prepared,
            _ => self.standing_by,
        }
    }

    /// One round, which counts or not.
    fn round(
        &self,
        arm: &mut dyn Arm,
        caller: &mut Caller,
        counts: bool,
        found: &mut Latencies,
    ) -> anyhow::Result<()> {
        interrupt::check()?;
        if arm.trains() {
            arm.train()?;
            await_training(arm)?;
            interrupt::sleep(self.training)?;
        }
        let (latency, parameters) = caller.ask(arm.address())?;
        let stopped = arm.stopped()?;
        if counts {
            arm.check(&parameters)?;
            found.add(latency, stopped, &parameters);
        }
        Ok(())
    }
}

impl Count {
    fn all(self) -> usize {
        self.ahead + self.counted
    }
}

impl Bars {
    /// Measures each mechanism that figures have once, and tells one figure after the other. The rows of PyTorch are of the
    /// first.
    pub(super) fn run_all(
        figures: &[Self],
        experiment: &Experiment,
        python: Option<&Path>,
        zygotes: &mut Zygotes,
    ) -> anyhow::Result<Vec<Report>> {
        let subjects = experiment.subjects(usize::MAX)?;
        let served = experiment.served(&subjects);
        let mut session = Session::new(experiment, served, zygotes)?;
        let mut rounds = Rounds::of(experiment);
        // It has the device to itself: servers come later.
        let counts = (rounds.idle.counted, rounds.restarted.counted);
        let pytorch = python.map(|python| PyTorch::measure(python, served, &subjects, counts));
        let mut pytorch = pytorch.unwrap_or_default();
        let kinds = kinds(figures);
        let mut bars = Vec::new();
        for subject in &subjects {
            let found = session.run(subject, &kinds, &mut rounds);
            bars.extend(found.into_iter().map(|(kind, latencies)| Bar {
                model: subject.name.clone(),
                mechanism: kind.name().to_owned(),
                parts: latencies.parts(),
                latencies_ms: latencies.client_ms,
            }));
        }
        let told = |figure: &Self| {
            let mut bars = figure.own(&bars);
            let mut left_out = session.left_out(figure.kinds);
            let mut took = session.took(figure.kinds);
            let goals = goals(&bars, figure.order);
            bars.append(&mut pytorch.bars);
            left_out.append(&mut pytorch.left_out);
            took.append(&mut pytorch.took);
            let (command, wrong_outputs) = (figure.command, session.wrong_outputs(figure.kinds));
            let figure =
                Figure { number: figure.number, bars, cycles: Vec::new(), loads: Vec::new(), left_out, took };
            report(command, &figure, table(&figure.bars), goals, wrong_outputs)
        };
        figures.iter().map(told).collect()
    }

    /// Measures this figure.
    pub(super) fn run(
        self,
        experiment: &Experiment,
        python: Option<&Path>,
        zygotes: &mut Zygotes,
    ) -> anyhow::Result<Report> {
        Ok(Self::run_all(&[self], experiment, python, zygotes)?.remove(0))
    }

    /// Its own of all bars, model by model in its order.
    fn own(&self, bars: &[Bar]) -> Vec<Bar> {
        let of_a_model = |bars: &[Bar]| -> Vec<Bar> {
            let find = |kind: &Kind| bars.iter().find(|bar| bar.mechanism == kind.name()).cloned();
            self.kinds.iter().filter_map(find).collect()
        };
        bars.chunk_by(|one, next| one.model == next.model).flat_map(of_a_model).collect()
    }
}

/// What any of the figures has, once.
fn kinds(figures: &[Bars]) -> Vec<Kind> {
    let mut kinds = Vec::new();
    for kind in figures.iter().flat_map(|figure| figure.kinds) {
        if !kinds.contains(kind) {
            kinds.push(*kind);
        }
    }
    kinds
}

/// Latencies of one mechanism, and what the server says of them.
#[derive(Debug, Default)]
pub(super) struct Latencies {
    client_ms: Vec<f64>,
    queue: Samples,
    stop: Samples,
    switch: Samples,
    compute: Samples,
    reply: Samples,
}

impl Latencies {
    fn add(&mut self, latency: Duration, stopped: Option<Duration>, parameters: &Parameters) {
        let client = milliseconds(latency);
        let [queue, switch, compute] =
            [parameters.queue_us, parameters.switch_us, parameters.compute_us].map(|us| us / 1e3);
        self.client_ms.push(client);
        self.queue.push(queue);
        self.switch.push(switch);
        self.compute.push(compute);
        self.reply.push(client - queue - switch - compute);
        if let Some(stopped) = stopped {
            self.stop.push_ms(stopped);
        }
    }

    fn parts(&self) -> Option<Parts> {
        let median = |samples: &Samples| samples.summary().map(|summary| summary.median);
        Some(Parts {
            queue_ms: median(&self.queue)?,
            // Without training nothing has to stop.
            stop_ms: median(&self.stop).unwrap_or(0.0),
            switch_ms: median(&self.switch)?,
            compute_ms: median(&self.compute)?,
            reply_ms: median(&self.reply)?,
        })
    }
}

impl Measure for Rounds {
    type Found = Latencies;

    fn measure(&mut self, kind: Kind, arm: &mut dyn Arm, caller: &mut Caller) -> anyhow::Result<Latencies> {
        let Count { ahead, .. } = self.count(kind);
        let rounds = self.count(kind).all();
        let mut found = Latencies::default();
        let progress = Progress::new(kind.name(), rounds);
        for round in 0..rounds {
            self.round(arm, caller, round >= ahead, &mut found)?;
            progress.step();
        }
        Ok(found)
    }

    /// Those beside which a task trains take turns in every round: what drifts, drifts for all of them.
    fn measure_plans(
        &mut self,
        kinds: &[Kind],
        server: &mut ServedModel,
        caller: &mut Caller,
    ) -> Vec<(anyhow::Result<Latencies>, Duration)> {
        let mut found: Vec<(anyhow::Result<Latencies>, Duration)> =
            kinds.iter().map(|_| (Ok(Latencies::default()), Duration::ZERO)).collect();
        let (alone, in_turn): (Vec<usize>, Vec<usize>) =
            (0..kinds.len()).partition(|&place| kinds[place] == Kind::Ready);
        for place in alone {
            let begun = Instant::now();
            let arm = server.arm(kinds[place]);
            let result = arm.and_then(|mut arm| self.measure(kinds[place], &mut arm, caller));
            found[place] = (result, begun.elapsed());
        }
        let Count { ahead, .. } = self.served;
        let rounds = self.served.all();
        let progress = Progress::new("rounds of all plans", rounds);
        for round in 0..rounds {
            // Each has some that count, which are kept.
            let is_enough = round > ahead;
            if is_enough && interrupt::check().is_err() {
                break;
            }
            // Another one is first every time.
            for turn in 0..in_turn.len() {
                let place = in_turn[(round + turn) % in_turn.len()];
                let (result, took) = &mut found[place];
                let Ok(latencies) = result else { continue };
                let begun = Instant::now();
                let arm = server.arm(kinds[place]);
                let done = arm.and_then(|mut arm| self.round(&mut arm, caller, round >= ahead, latencies));
                *took += begun.elapsed();
                if let Err(error) = done
                    && !(is_enough && error.is::<Interrupted>())
                {
                    *result = Err(error);
                }
            }
            progress.step();
        }
        found
    }
}

/// Waits until training computes.
pub(super) fn await_training(arm: &mut dyn Arm) -> anyhow::Result<()> {
    let latest = Instant::now() + PATIENCE;
    while !arm.is_training()? {
        ensure!(Instant::now() < latest, "training does not begin within {} s", PATIENCE.as_secs());
        interrupt::sleep(Duration::from_millis(1))?;
    }
    Ok(())
}

fn table(bars: &[Bar]) -> Table {
    let mut table = Table::new([
        "model, mechanism",
        "median ms",
        "mean",
        "p99",
        "min",
        "max",
        "queue",
        "stop",
        "switch",
        "compute",
        "reply",
    ]);
    for bar in bars {
        let all = Summary::of(&bar.latencies_ms).zip(mean(&bar.latencies_ms));
        let Some((summary, mean)) = all else { continue };
        let ms = |value: f64| format!("{value:.2}");
        let part = |of: fn(&Parts) -> f64| bar.parts.as_ref().map_or("-".to_owned(), |parts| ms(of(parts)));
        table.push([
            format!("{}, {}", bar.model, bar.mechanism),
            ms(summary.median),
            ms(mean),
            ms(summary.p99),
            ms(summary.least),
            ms(summary.most),
            part(|parts| parts.queue_ms),
            part(|parts| parts.stop_ms),
            part(|parts| parts.switch_ms),
            part(|parts| parts.compute_ms),
            part(|parts| parts.reply_ms),
        ]);
    }
    table
}

/// Medians compared, model by model.
fn goals(bars: &[Bar], order: Order) -> Vec<Goal> {
    let pswitch = Kind::Pswitch.name();
    let median = |bar: &Bar| Summary::of(&bar.latencies_ms).map(|summary| summary.median);
    let mut goals = Vec::new();
    for (index, bar) in bars.iter().enumerate() {
        let mut before = bars[..index].iter().filter(|other| other.model == bar.model);
        let other = match order {
            Order::Rising => before.next_back(),
            Order::AbovePswitch => before.find(|other| other.mechanism == pswitch),
        };
        let compared = other.and_then(|other| Some((other, median(other)?, median(bar)?)));
        if let Some((other, below, above)) = compared {
            let what = format!("{}: {} over {}", bar.model, bar.mechanism, other.mechanism);
            goals.push(Goal::at_least(what, 1.0, "times", above / below));
        }
    }
    goals
}

#[cfg(test)]
mod tests {
    use super::super::tests::experiment;
    use super::*;

    fn bar(model: &str, kind: Kind, latencies_ms: &[f64]) -> Bar {
        let (model, mechanism) = (model.to_owned(), kind.name().to_owned());
        Bar { model, mechanism, latencies_ms: latencies_ms.to_vec(), parts: None }
    }

    /// Rounds ahead of those that count, and those.
    fn rounds<const KINDS: usize>(flags: &[&str], kinds: [Kind; KINDS]) -> [(usize, usize); KINDS] {
        let rounds = Rounds::of(&experiment(flags));
        kinds.map(|kind| rounds.count(kind)).map(|Count { ahead, counted }| (ahead, counted))
    }

    #[test]
    fn rounds_are_the_papers_unless_they_are_to_be_quick() {
        let kinds =
            [Kind::Ready, Kind::Grouped, Kind::NoPinned, Kind::Mps, Kind::OneProcess, Kind::TwoProcesses];
        let ten = (10, 10);
        assert_eq!(rounds(&[], kinds), [(10, 90), ten, ten, ten, ten, ten]);
        assert_eq!(rounds(&["--rounds", "3"], kinds), [(10, 90), (3, 3), (3, 3), (3, 3), (3, 3), (3, 3)]);
        let quick = rounds(&["--quick"], kinds);
        assert!(quick[1..].is_sorted_by(|one, next| one >= next), "fewer where they take longer: {quick:?}");
        assert!(quick.iter().all(|(_, counted)| *counted > 0));
        let one = rounds(&["--quick", "--rounds", "1"], kinds);
        assert_eq!(one[1..], [(1, 1), (1, 1), (1, 1), (1, 1), (0, 1)]);
    }

    #[test]
    fn bars_are_compared_within_their_model() {
        let bars = [
            bar("a", Kind::Ready, &[1.0]),
            bar("a", Kind::Pswitch, &[2.0]),
            bar("a", Kind::StopAndStart, &[1.0]),
            bar("b", Kind::Pswitch, &[9.0]),
            bar("b", Kind::StopAndStart, &[90.0]),
        ];
        let texts = |order| goals(&bars, order).iter().map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!(
            texts(Order::Rising),
            [
                "a: pswitch over ready: 2 times (asked: at least 1 times): met",
                "a: stop-and-start over pswitch: 0.5 times (asked: at least 1 times): MISSED",
                "b: stop-and-start over pswitch: 10 times (asked: at least 1 times): met",
            ]
        );
        // What comes ahead of pswitch is none of its ablations.
        assert_eq!(texts(Order::AbovePswitch).len(), 2);
    }

    #[test]
    fn figures_share_what_both_have() {
        let figure = |kinds| Bars { number: 5, command: "figure5", kinds, order: Order::Rising };
        let figures = [
            figure(&[Kind::Ready, Kind::Pswitch]),
            figure(&[Kind::Pswitch, Kind::Grouped, Kind::NoOptimization]),
        ];
        assert_eq!(kinds(&figures), [Kind::Ready, Kind::Pswitch, Kind::Grouped, Kind::NoOptimization]);
        // Grouped is left out of the first model.
        let bars = [
            bar("a", Kind::NoOptimization, &[3.0]),
            bar("a", Kind::Ready, &[1.0]),
            bar("a", Kind::Pswitch, &[2.0]),
            bar("b", Kind::Pswitch, &[4.0]),
            bar("b", Kind::Grouped, &[5.0]),
        ];
        let [a_none, a_ready, a_pswitch, b_pswitch, b_grouped] = bars.clone();
        assert_eq!(figures[0].own(&bars), [a_ready, a_pswitch.clone(), b_pswitch.clone()]);
        assert_eq!(figures[1].own(&bars), [a_pswitch, a_none, b_pswitch, b_grouped]);
    }

    #[test]
    fn a_bar_says_all_that_was_asked_for() {
        let latencies: Vec<f64> = (1..=101).map(f64::from).collect();
        let text = table(&[bar("m", Kind::Pswitch, &latencies)]).to_string();
        let cells: Vec<_> = text.lines().nth(1).unwrap().split_whitespace().collect();
        assert_eq!(cells[..7], ["m,", "pswitch", "51.00", "51.00", "100.00", "1.00", "101.00"]);
        assert_eq!(cells[7..], ["-"; 5]);
    }
}
