use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{Progress, whole_us};

/// One line of a file that plots are drawn from: the account in brief, after a step.
///
/// A loss that is no number (a training run that blew up) is written as `null`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct ProgressLine {
    /// When, on the clock of the events.
    pub at_us: u64,
    /// Steps done.
    pub step: u64,
    /// The loss of the last step.
    pub loss: Option<f64>,
    /// The learning rate of the last step.
    pub lr: f64,
    /// Steps kept, for each second of the window.
    pub steps_per_s: f64,
    /// Rows of these, for each second.
    pub samples_per_s: f64,
    /// The share of the computed steps that was kept.
    pub goodput: Option<f64>,
    /// Interruptions so far.
    pub interruptions: u64,
    /// All that these cost: the time in them, and that of steps that were thrown away.
    pub interruption_cost_us: u64,
}

impl Progress {
    /// The account at the time `at`, in brief. `lr` is the learning rate of the last step.
    pub fn line(&self, at: Duration, lr: f64) -> ProgressLine {
        let report = self.report(at);
        ProgressLine {
            at_us: whole_us(at),
            step: report.steps_done,
            loss: report.last_loss,
            lr,
            steps_per_s: report.steps_per_s,
            samples_per_s: report.samples_per_s,
            goodput: report.goodput,
            interruptions: report.interruptions,
            interruption_cost_us: report.interruption_cost_us(),
        }
    }
}

impl ProgressLine {
    /// The line as JSON, with its end.
    pub fn to_json(&self) -> String {
        let mut text = serde_json::to_string(self).expect("numbers can be written as JSON");
        text.push('\n');
        text
    }
}
