//! Figure 6: throughput and latency when training and inference take turns.

use std::time::{Duration, Instant};

use anyhow::Context as _;

use super::bars::await_training;
use super::session::{Measure, Session};
use super::{Experiment, report};
use crate::caller::Caller;
use crate::figures::{Cycle, Figure};
use crate::interrupt;
use crate::mechanisms::{Arm, Kind};
use crate::progress::Progress;
use crate::report::{Goal, Report, Table};
use crate::serving::Zygotes;
use crate::stats::{Summary, mean, milliseconds};

/// Lengths of a turn, as in the paper.
const CYCLES_S: [u64; 5] = [1, 2, 5, 10, 30];

/// Those of a quick run.
const QUICK_CYCLES_S: [u64; 2] = [1, 2];

/// Figure 6 of the paper: throughput and latency of one model when training and inference take turns.
///
/// Turns are 1, 2, 5, 10 and 30 s long, and of 12 every second is training's. In the others one request follows the other;
/// one counts if it was answered within its turn. The first turn of each kind does not count, and with --quick, which has
/// turns of 1 and 2 s, the very first alone. `ready` has no training in
/// between. By default the model is ResNet152 on a GPU, and a ResNet18 on the host.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  pswitch bench figure6 --quick
  pswitch bench figure6 --device cuda:0 --task task.yaml --training-size 12GiB --out")]
pub(crate) struct Figure6 {
    #[command(flatten)]
    pub(crate) experiment: Experiment,
}

/// How long turns are, and how many of either kind count.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Turns {
    cycles_s: Vec<u64>,
    counted: usize,
    /// Whether one that does not count is ahead of those of each length, and not of the first alone.
    each_warms_up: bool,
}

impl Figure6 {
    pub(crate) fn run(&self, zygotes: &mut Zygotes) -> anyhow::Result<Report> {
        // ResNets come first.
        let subjects = self.experiment.subjects(1)?;
        let served = self.experiment.served(&subjects);
        let mut session = Session::new(&self.experiment, served, zygotes)?;
        let mut turns = Turns::of(&self.experiment);
        let kinds = [Kind::Ready, Kind::Pswitch, Kind::Mps, Kind::StopAndStart];
        let mut cycles = Vec::new();
        for subject in &subjects {
            let found = session.run(subject, &kinds, &mut turns);
            cycles.extend(found.into_iter().flat_map(|(_, found)| found));
        }
        let (left_out, wrong_outputs) = (session.left_out(&kinds), session.wrong_outputs(&kinds));
        let took = session.took(&kinds);
        let (table, goals) = (table(&cycles), goals(&cycles));
        let figure = Figure { number: 6, bars: Vec::new(), cycles, loads: Vec::new(), left_out, took };
        report("figure6", &figure, table, goals, wrong_outputs)
    }
}

impl Turns {
    fn of(experiment: &Experiment) -> Self {
        if experiment.quick {
            Self { cycles_s: QUICK_CYCLES_S.to_vec(), counted: 1, each_warms_up: false }
        } else {
            Self { cycles_s: CYCLES_S.to_vec(), counted: 5, each_warms_up: true }
        }
    }

    fn cycle(
        &self,
        kind: Kind,
        (place, cycle_s): (usize, u64),
        arm: &mut dyn Arm,
        caller: &mut Caller,
    ) -> anyhow::Result<Cycle> {
        let length = Duration::from_secs(cycle_s);
        // Small numbers.
        #[allow(clippy::cast_precision_loss)]
        let seconds = cycle_s as f64;
        let mut cycle = Cycle {
            mechanism: kind.name().to_owned(),
            model: caller.model().to_owned(),
            cycle_s: seconds,
            batches_per_s: Vec::new(),
            latencies_ms: Vec::new(),
            steps_per_s: Vec::new(),
        };
        let ahead = usize::from(place == 0 || self.each_warms_up);
        for turn in 0..ahead + self.counted {
            if arm.trains() {
                let (ends, before) = (Instant::now() + length, arm.steps()?);
                arm.train()?;
                interrupt::sleep(ends.saturating_duration_since(Instant::now()))?;
                let steps = arm.steps()?.saturating_sub(before);
                if turn >= ahead {
                    // Counts of some thousands.
                    #[allow(clippy::cast_precision_loss)]
                    cycle.steps_per_s.push(steps as f64 / seconds);
                }
            }
            let (ends, mut answered) = (Instant::now() + length, 0_u32);
            while Instant::now() < ends {
                interrupt::check()?;
                let (latency, _) = caller.ask(arm.address())?;
                if Instant::now() <= ends {
                    answered += 1;
                    if turn >= ahead {
                        cycle.latencies_ms.push(milliseconds(latency));
                    }
                }
            }
            if turn >= ahead {
                cycle.batches_per_s.push(f64::from(answered) / seconds);
            }
        }
        Ok(cycle)
    }
}

impl Measure for Turns {
    type Found = Vec<Cycle>;

    fn measure(&mut self, kind: Kind, arm: &mut dyn Arm, caller: &mut Caller) -> anyhow::Result<Vec<Cycle>> {
        let progress = Progress::new(kind.name(), self.cycles_s.len());
        // A task takes seconds to come up, which turns are not to be of. Where a process is made for it each time, they are.
        if arm.trains() && !kind.restarts() {
            arm.train()?;
            await_training(arm)?;
        }
        self.cycles_s
            .iter()
            .enumerate()
            .map(|(place, &cycle_s)| {
                let cycle = self
                    .cycle(kind, (place, cycle_s), arm, caller)
                    .context(format!("turns of {cycle_s} s"))?;
                progress.step();
                Ok(cycle)
            })
            .collect()
    }
}

fn table(cycles: &[Cycle]) -> Table {
    let mut table = Table::new([
        "model, mechanism",
        "turn s",
        "batches/s",
        "steps/s",
        "median ms",
        "mean",
        "p99",
        "min",
        "max",
    ]);
    for cycle in cycles {
        let number = |value: Option<f64>| value.map_or("-".to_owned(), |value| format!("{value:.2}"));
        let summary = Summary::of(&cycle.latencies_ms);
        table.push([
            format!("{}, {}", cycle.model, cycle.mechanism),
            cycle.cycle_s.to_string(),
            number(mean(&cycle.batches_per_s)),
            number(mean(&cycle.steps_per_s)),
            number(summary.map(|summary| summary.median)),
            number(mean(&cycle.latencies_ms)),
            number(summary.map(|summary| summary.p99)),
            number(summary.map(|summary| summary.least)),
            number(summary.map(|summary| summary.most)),
        ]);
    }
    table
}

/// The throughput of pswitch against that of the others in turns of the same length.
fn goals(cycles: &[Cycle]) -> Vec<Goal> {
    let throughput = |of: &Cycle, kind: Kind| {
        let same = |cycle: &&Cycle| {
            (cycle.mechanism.as_str(), &cycle.model, cycle.cycle_s) == (kind.name(), &of.model, of.cycle_s)
        };
        cycles.iter().find(same).and_then(|cycle| mean(&cycle.batches_per_s))
    };
    let mut goals = Vec::new();
    for cycle in cycles.iter().filter(|cycle| cycle.mechanism == Kind::Pswitch.name()) {
        let Some(found) = mean(&cycle.batches_per_s) else { continue };
        let what = format!("{}, turns of {} s: batches of pswitch", cycle.model, cycle.cycle_s);
        if let Some(ready) = throughput(cycle, Kind::Ready) {
            goals.push(Goal::at_least(format!("{what}, of ready's"), 95.0, "%", found / ready * 100.0));
        }
        for other in [Kind::Mps, Kind::StopAndStart] {
            if let Some(other_found) = throughput(cycle, other) {
                let what = format!("{what} beyond those of {}", other.name());
                goals.push(Goal::at_least(what, 0.0, "a second", found - other_found));
            }
        }
    }
    goals
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cycle(kind: Kind, cycle_s: f64, batches_per_s: f64) -> Cycle {
        Cycle {
            mechanism: kind.name().to_owned(),
            model: "m".to_owned(),
            cycle_s,
            batches_per_s: vec![batches_per_s],
            latencies_ms: Vec::new(),
            steps_per_s: Vec::new(),
        }
    }

    #[test]
    fn throughput_is_compared_in_turns_of_one_length() {
        let cycles = [
            cycle(Kind::Ready, 1.0, 10.0),
            cycle(Kind::Ready, 2.0, 20.0),
            cycle(Kind::Pswitch, 1.0, 9.0),
            cycle(Kind::Pswitch, 2.0, 20.0),
            cycle(Kind::StopAndStart, 2.0, 1.0),
        ];
        let texts: Vec<_> = goals(&cycles).iter().map(ToString::to_string).collect();
        assert_eq!(
            texts,
            [
                "m, turns of 1 s: batches of pswitch, of ready's: 90 % (asked: at least 95 %): MISSED",
                "m, turns of 2 s: batches of pswitch, of ready's: 100 % (asked: at least 95 %): met",
                "m, turns of 2 s: batches of pswitch beyond those of stop-and-start: 19 a second (asked: at least 0 a \
                 second): met",
            ]
        );
    }

    #[test]
    fn turns_in_which_nothing_was_answered_have_no_latency() {
        let text = table(&[cycle(Kind::StopAndStart, 1.0, 0.0)]).to_string();
        assert!(
            text.ends_with("m, stop-and-start       1       0.00        -          -     -    -    -    -\n"),
            "{text}"
        );
    }
}
