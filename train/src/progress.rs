mod line;
mod window;

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use self::window::Window;
use crate::TrainError;

pub use line::ProgressLine;

/// Something that happened to a task. The times at which events happen are given beside them, counted from any moment, and
/// do not fall.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum ProgressEvent {
    /// A step was computed and its result kept.
    StepFinished {
        /// The step's loss.
        loss: f64,
        /// Rows that it was computed from.
        samples: u64,
        /// How long it was computed.
        duration: Duration,
    },
    /// A step was computed, as a whole or in part, and thrown away: it will be computed again.
    StepDiscarded {
        /// How long it was computed.
        duration: Duration,
    },
    /// The task goes on from a checkpoint: the steps after it are lost, however many were counted, and those that it
    /// holds are done, though nobody told of them.
    Resumed {
        /// Steps done at the checkpoint.
        steps_done: u64,
    },
    /// The task stops computing.
    InterruptionBegan {
        /// What for.
        reason: InterruptionReason,
    },
    /// The task computes again.
    InterruptionEnded,
}

/// What a task is interrupted for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum InterruptionReason {
    /// A request is answered on the device.
    Request,
    /// It is another task's turn.
    Turn,
    /// The worker died and another takes over.
    Failure,
    /// Somebody asked for it.
    Command,
}

/// The account of a training task: what was done, what was lost, how fast it goes. It reads no clock.
///
/// ```
/// use std::time::Duration;
/// use pswitch_train::{InterruptionReason, Progress, ProgressEvent};
///
/// let at = Duration::from_millis;
/// let mut progress = Progress::new(0, at(0), Duration::from_secs(10));
/// progress.handle(at(100), ProgressEvent::StepFinished { loss: 2.5, samples: 32, duration: at(100) })?;
/// progress.handle(at(130), ProgressEvent::StepDiscarded { duration: at(30) })?;
/// progress.handle(at(130), ProgressEvent::InterruptionBegan { reason: InterruptionReason::Request })?;
/// progress.handle(at(150), ProgressEvent::InterruptionEnded)?;
/// progress.handle(at(250), ProgressEvent::StepFinished { loss: 2.0, samples: 32, duration: at(100) })?;
///
/// let report = progress.report(at(250));
/// assert_eq!((report.steps_done, report.steps_computed), (2, 3));
/// assert_eq!((report.steps_per_s, report.samples_per_s), (8.0, 256.0));
/// assert_eq!((report.interruptions, report.interruption_cost_us()), (1, 50_000));
/// # Ok::<(), pswitch_train::TrainError>(())
/// ```
#[derive(Debug, Clone)]
pub struct Progress {
    steps_done: u64,
    steps_computed: u64,
    /// Computed steps that were thrown away before they ended.
    steps_discarded: u64,
    /// Computed steps that count in `steps_done`.
    steps_kept: u64,
    samples: u64,
    last_loss: Option<f64>,
    computing: Duration,
    discarded: Duration,
    ended: BTreeMap<InterruptionReason, Interruptions>,
    /// The interruption that lasts, and since when.
    lasting: Option<(InterruptionReason, Duration)>,
    window: Window,
}

#[derive(Debug, Clone, Copy, Default)]
struct Interruptions {
    count: u64,
    paused: Duration,
}

/// What [`Progress`] says at one moment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ProgressReport {
    /// Steps of the task that are done, those of earlier runs among them.
    pub steps_done: u64,
    /// Steps that were computed in this run, once or again.
    pub steps_computed: u64,
    /// The share of the computed steps that was kept; none before the first.
    pub goodput: Option<f64>,
    /// Steps kept, for each second of the last ones, interrupted or not.
    pub steps_per_s: f64,
    /// Rows of these steps, for each second.
    pub samples_per_s: f64,
    /// Rows of all steps that ended in this run. Those of steps that a checkpoint was too old for stay in.
    pub samples: u64,
    /// The loss of the last step that was kept.
    pub last_loss: Option<f64>,
    /// Time spent on steps that were kept.
    pub computing_us: u64,
    /// Time spent on steps that were thrown away.
    pub discarded_us: u64,
    /// Interruptions, the one that lasts among them.
    pub interruptions: u64,
    /// Time in interruptions.
    pub paused_us: u64,
    /// The interruptions by their reasons.
    pub by_reason: BTreeMap<InterruptionReason, ReasonReport>,
}

/// The interruptions of one reason.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReasonReport {
    /// How many.
    pub interruptions: u64,
    /// Time in them.
    pub paused_us: u64,
}

impl Progress {
    /// The account of a task that goes on, at the time `at`, with `steps_done` behind it. Rates are those of the last
    /// `window`, and of the last 1,024 steps at most.
    pub fn new(steps_done: u64, at: Duration, window: Duration) -> Progress {
        Progress {
            steps_done,
            steps_computed: 0,
            steps_discarded: 0,
            steps_kept: 0,
            samples: 0,
            last_loss: None,
            computing: Duration::ZERO,
            discarded: Duration::ZERO,
            ended: BTreeMap::new(),
            lasting: None,
            window: Window::new(at, window),
        }
    }

    /// Takes note of what happened at the time `at`.
    ///
    /// # Errors
    ///
    /// [`TrainError::StepWhileInterrupted`], [`TrainError::AlreadyInterrupted`] or [`TrainError::NotInterrupted`]. The
    /// account is then as it was.
    pub fn handle(&mut self, at: Duration, event: ProgressEvent) -> Result<(), TrainError> {
        match event {
            ProgressEvent::StepFinished { .. } | ProgressEvent::StepDiscarded { .. }
                if self.lasting.is_some() =>
            {
                return Err(TrainError::StepWhileInterrupted);
            }
            ProgressEvent::StepFinished { loss, samples, duration } => {
                self.steps_done += 1;
                self.steps_computed += 1;
                self.steps_kept += 1;
                self.samples = self.samples.saturating_add(samples);
                self.last_loss = Some(loss);
                self.computing += duration;
                self.window.push(at, samples);
            }
            ProgressEvent::StepDiscarded { duration } => {
                self.steps_computed += 1;
                self.steps_discarded += 1;
                self.discarded += duration;
            }
            ProgressEvent::Resumed { steps_done } => {
                let lost = self.steps_done.saturating_sub(steps_done);
                let found = steps_done.saturating_sub(self.steps_done);
                // Others were computed in an earlier run, and do not count in this one.
                let most = self.steps_computed - self.steps_discarded;
                self.steps_kept = self.steps_kept.saturating_sub(lost).saturating_add(found).min(most);
                self.steps_done = steps_done;
            }
            ProgressEvent::InterruptionBegan { reason } => {
                if self.lasting.is_some() {
                    return Err(TrainError::AlreadyInterrupted);
                }
                self.lasting = Some((reason, at));
            }
            ProgressEvent::InterruptionEnded => {
                let (reason, since) = self.lasting.take().ok_or(TrainError::NotInterrupted)?;
                add(&mut self.ended, reason, at.saturating_sub(since));
            }
        }
        Ok(())
    }

    /// The account at the time `at`.
    pub fn report(&self, at: Duration) -> ProgressReport {
        let mut all = self.ended.clone();
        if let Some((reason, since)) = self.lasting {
            add(&mut all, reason, at.saturating_sub(since));
        }
        let (steps_per_s, samples_per_s) = self.window.rates(at);
        ProgressReport {
            steps_done: self.steps_done,
            steps_computed: self.steps_computed,
            goodput: share(self.steps_kept, self.steps_computed),
            steps_per_s,
            samples_per_s,
            samples: self.samples,
            last_loss: self.last_loss,
            computing_us: whole_us(self.computing),
            discarded_us: whole_us(self.discarded),
            interruptions: all.values().map(|some| some.count).sum(),
            paused_us: whole_us(all.values().map(|some| some.paused).sum()),
            by_reason: all
                .into_iter()
                .map(|(reason, some)| {
                    let (interruptions, paused_us) = (some.count, whole_us(some.paused));
                    (reason, ReasonReport { interruptions, paused_us })
                })
                .collect(),
        }
    }
}

impl ProgressReport {
    /// All that interruptions cost: the time in them, and that of steps that were thrown away.
    pub fn interruption_cost_us(&self) -> u64 {
        self.paused_us.saturating_add(self.discarded_us)
    }
}

fn add(to: &mut BTreeMap<InterruptionReason, Interruptions>, reason: InterruptionReason, paused: Duration) {
    let some = to.entry(reason).or_default();
    some.count += 1;
    some.paused += paused;
}

#[allow(clippy::cast_precision_loss)] // a share needs no more than 53 bits
fn share(part: u64, whole: u64) -> Option<f64> {
    (whole > 0).then(|| part as f64 / whole as f64)
}

fn whole_us(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
