mod check;
mod data;
mod length;
mod optimizer;
mod section;

use std::fs;
use std::path::{Path, PathBuf};

use serde::de::Error as _;
use serde::{Deserialize, Serialize};

use self::check::{Check, MOST_F32};
use self::section::{Section, section};
use crate::{Schedule, TrainError};

pub use data::DataConfig;
pub use length::Length;
pub use optimizer::{Optimizer, OptimizerKind};

/// All that a training task is given: what to train, with what, on what, for how long, and what to keep of it.
///
/// ```yaml
/// program: resnet.pt2
/// optimizer: {kind: sgd, lr: 0.1, momentum: 0.9, weight_decay: 1e-4}
/// schedule: {kind: cosine, warm_up: 500}
/// clip_norm: 1.0
/// accumulate: 2
/// data: {files: [images.npy, labels.npy], batch_size: 64, drop_last: true}
/// length: {epochs: 90}
/// seed: 7
/// checkpoint: {folder: checkpoints, every_steps: 1000}
/// weight: 2.0
/// run_ahead_us: 500
/// deterministic: true
/// log_every_steps: 50
/// ```
///
/// `program`, `optimizer`, `data` and `length` must be there. Keys that are not known are refused.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, expecting = "a mapping with `program`, `optimizer`, `data` and `length`")]
pub struct TaskConfig {
    /// The exported training step: a .pt2 archive, or a folder with `model.pt2`.
    pub program: PathBuf,
    /// What turns gradients into new parameters.
    #[serde(deserialize_with = "section")]
    pub optimizer: Optimizer,
    /// How the learning rate changes with the steps.
    #[serde(default, deserialize_with = "section")]
    pub schedule: Schedule,
    /// Gradients whose 2-norm, over all parameters together, is larger are scaled down to it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clip_norm: Option<f64>,
    /// Batches whose gradients make one step: step `s` takes batches `s * accumulate` to `(s + 1) * accumulate - 1`, even
    /// where an epoch ends among them.
    #[serde(default = "one")]
    pub accumulate: u32,
    /// What the task is trained on.
    #[serde(deserialize_with = "section")]
    pub data: DataConfig,
    /// How long the task is trained.
    #[serde(deserialize_with = "section")]
    pub length: Length,
    /// Where everything random in the task comes from: the order of rows, dropout, made up data.
    #[serde(default)]
    pub seed: u64,
    /// Where and how often the state is written down; never, if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checkpoint: Option<CheckpointConfig>,
    /// The task's share of the device among tasks: one with 2 gets twice the time of one with 1.
    #[serde(default = "even_weight")]
    pub weight: f64,
    /// Work that may be queued on a GPU, in microseconds: so long the task computes on when it is told to end. By default 500
    /// where its state makes room for models, and 10000 where it only stands still for them, which is not for longer if more
    /// is queued. With 0 every operator is waited for, which costs a third of the speed and more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run_ahead_us: Option<u64>,
    /// Kernels that give the same bits every time, where a GPU has others that are faster: `torch.use_deterministic_algorithms`.
    #[serde(default)]
    pub deterministic: bool,
    /// Steps between two lines of the log.
    #[serde(default = "ten")]
    pub log_every_steps: u64,
}

/// What is said of a configuration without anything.
const EMPTY: &str = "it is empty, expected a mapping with `program`, `optimizer`, `data` and `length`";

/// Where a task's state is written down.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, expecting = "a mapping with `folder` and `every_steps`")]
pub struct CheckpointConfig {
    /// The folder, which belongs to this task alone. It is made if it does not exist.
    pub folder: PathBuf,
    /// Steps between two checkpoints.
    pub every_steps: u64,
    /// How many checkpoints are kept.
    #[serde(default = "two")]
    pub keep: u32,
}

impl Section for Schedule {
    const EXPECTED: &'static str = "a mapping with `kind`";
}

fn one() -> u32 {
    1
}

fn two() -> u32 {
    2
}

fn ten() -> u64 {
    10
}

fn even_weight() -> f64 {
    1.0
}

impl TaskConfig {
    /// Reads and validates a configuration. Paths stay as they are written.
    ///
    /// # Errors
    ///
    /// [`TrainError::ConfigText`] with line and column, or what [`validate`](Self::validate) finds.
    pub fn from_yaml(text: &str) -> Result<TaskConfig, TrainError> {
        let config: TaskConfig = serde_yaml::from_str(text).map_err(|error| {
            let is_empty = matches!(serde_yaml::from_str(text), Ok(serde_yaml::Value::Null));
            TrainError::ConfigText(if is_empty { serde_yaml::Error::custom(EMPTY) } else { error })
        })?;
        config.validate()?;
        Ok(config)
    }

    /// Reads and validates the configuration in a file. Relative paths in it are taken from the file's folder.
    ///
    /// # Errors
    ///
    /// As [`from_yaml`](Self::from_yaml), and [`TrainError::Io`] if the file cannot be read.
    pub fn open(path: &Path) -> Result<TaskConfig, TrainError> {
        let text = fs::read_to_string(path).map_err(|source| TrainError::Io {
            path: path.to_owned(),
            action: "read",
            source,
        })?;
        let mut config = TaskConfig::from_yaml(&text)?;
        if let Some(folder) = path.parent() {
            for path in config.paths_mut() {
                *path = folder.join(&path);
            }
        }
        Ok(config)
    }

    /// The archive of the program: the file that it names, or `model.pt2` in the folder.
    pub fn archive(&self) -> PathBuf {
        if self.program.is_dir() { self.program.join("model.pt2") } else { self.program.clone() }
    }

    fn paths_mut(&mut self) -> impl Iterator<Item = &mut PathBuf> {
        let files: &mut [PathBuf] = match &mut self.data {
            DataConfig::Files { files, .. } => files,
            DataConfig::Synthetic { .. } => &mut [],
        };
        let checkpoint = self.checkpoint.as_mut().map(|checkpoint| &mut checkpoint.folder);
        [&mut self.program].into_iter().chain(files).chain(checkpoint)
    }

    /// Checks everything that can be checked without opening a file. The optimizer's settings are held to the rules of
    /// `torch.optim`.
    ///
    /// # Errors
    ///
    /// [`TrainError::Setting`] with the first value that means nothing, or [`TrainError::WarmUpTooLong`].
    pub fn validate(&self) -> Result<(), TrainError> {
        if self.program.as_os_str().is_empty() {
            return Err(check::refused("program", "empty", "a .pt2 archive, or a folder with model.pt2"));
        }
        self.optimizer.validate()?;
        self.validate_schedule()?;
        if let Some(clip_norm) = self.clip_norm {
            Check::new("clip_norm", clip_norm).positive()?;
            Check::new("clip_norm", clip_norm).fits_f32()?;
        }
        check::at_least_one("accumulate", self.accumulate.into())?;
        self.data.validate()?;
        self.length.validate()?;
        if let Length::Steps(steps) = self.length {
            self.check_rates(steps)?;
        }
        if let Some(checkpoint) = &self.checkpoint {
            if checkpoint.folder.as_os_str().is_empty() {
                return Err(check::refused("checkpoint.folder", "empty", "a folder"));
            }
            check::at_least_one("checkpoint.every_steps", checkpoint.every_steps)?;
            check::at_least_one("checkpoint.keep", checkpoint.keep.into())?;
        }
        Check::new("weight", self.weight).positive()?;
        check::at_least_one("log_every_steps", self.log_every_steps)
    }

    fn validate_schedule(&self) -> Result<(), TrainError> {
        match self.schedule {
            Schedule::Constant {} => Ok(()),
            Schedule::Step { every, factor } => {
                check::at_least_one("schedule.every", every)?;
                Check::new("schedule.factor", factor).positive()
            }
            Schedule::Cosine { floor, .. } => {
                Check::new("schedule.floor", floor).not_negative()?;
                let needed = "at most `optimizer.lr`";
                Check::new("schedule.floor", floor).holds(floor <= self.optimizer.learning_rate(), needed)
            }
        }
    }

    /// Checks what the schedule makes of that many steps.
    fn check_rates(&self, total_steps: u64) -> Result<(), TrainError> {
        match self.schedule {
            Schedule::Cosine { warm_up, .. } if warm_up > total_steps => {
                Err(TrainError::WarmUpTooLong { warm_up, total_steps })
            }
            // The last rate is the largest.
            Schedule::Step { factor, .. } if factor > 1.0 => {
                let base = self.optimizer.learning_rate();
                let last = self.schedule.rate(base, total_steps.saturating_sub(1), total_steps);
                let needed = "so small that no rate of the task is more than 3.4028234e38";
                Check::new("schedule.factor", factor).holds(last <= MOST_F32, needed)
            }
            _ => Ok(()),
        }
    }

    /// The task's whole number of steps over data with that many batches an epoch (see [`Batches::per_epoch`]).
    ///
    /// Every step takes [`accumulate`](Self::accumulate) batches. Where those of all epochs do not divide evenly, the last
    /// step takes its other batches from the epoch behind: no row is left out.
    ///
    /// # Errors
    ///
    /// [`TrainError::TooManySteps`], [`TrainError::WarmUpTooLong`], or [`TrainError::Setting`] if a schedule in steps raises
    /// the rate beyond what a 32-bit float holds.
    ///
    /// [`Batches::per_epoch`]: crate::Batches::per_epoch
    pub fn total_steps(&self, batches_per_epoch: u64) -> Result<u64, TrainError> {
        let steps = match self.length {
            Length::Steps(steps) => steps,
            Length::Epochs(epochs) => epochs
                .checked_mul(batches_per_epoch)
                .ok_or(TrainError::TooManySteps { epochs, batches_per_epoch })?
                .div_ceil(self.accumulate.max(1).into()),
        };
        self.check_rates(steps)?;
        Ok(steps)
    }
}
