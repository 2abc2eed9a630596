//! Training tasks of a server: checked, given to a device, told what to do.

use std::path::PathBuf;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::time::Duration;

use pswitch_model::Archive;
use pswitch_train::{FolderClaim, Progress, StateLayout, TaskConfig};

use super::{Server, chain};
use crate::repository::ModelName;
use crate::service::{Residence, ServiceError, TaskCommand, TaskState, TaskStatus};
use crate::training::{self, NewTask, Training};

/// How long it is waited for a folder of checkpoints: who has it may be over, and its process about to end.
const FOLDER_PATIENCE: Duration = Duration::from_secs(2);

impl Server {
    /// Takes the tasks that the configuration names. One that cannot be taken does not stop the others, and is shown as failed.
    pub(super) async fn take_configured_tasks(&self) {
        for (name, file) in &self.config.training.tasks {
            let taken = match TaskConfig::open(file) {
                Ok(config) => self.take_task(name, config).await.map_err(|error| error.to_string()),
                Err(error) => Err(chain(&error)),
            };
            if let Err(reason) = taken {
                let file = file.display();
                tracing::error!(task = name, %file, reason, "training task refused");
                let mut all = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
                all.push(refused(name, format!("{file}: {reason}")));
            }
        }
    }

    /// Checks a task as far as that needs no worker, and gives it to the device with the fewest.
    pub(super) async fn take_task(&self, name: &str, config: TaskConfig) -> Result<TaskStatus, ServiceError> {
        let invalid = |message: String| ServiceError::InvalidRequest { message };
        if self.draining.load(Ordering::Acquire) {
            return Err(ServiceError::Draining);
        }
        name.parse::<ModelName>().map_err(|error| invalid(error.to_string()))?;
        if self.training_of(name).is_some_and(|(_, status)| !status.state.is_over()) {
            return Err(invalid(format!("a training task '{name}' is there already, and not over")));
        }
        let unfinished =
            |training: &Training| training.statuses().iter().filter(|status| !status.state.is_over()).count();
        let trainings = self.devices.iter().filter_map(|device| device.training.as_ref());
        let training = trainings.min_by_key(|training| unfinished(training)).ok_or_else(|| {
            ServiceError::Unsupported {
                what: "training where no device has a training_size (start the server with --training-size)"
                    .to_owned(),
            }
        })?;
        let opened = tokio::task::spawn_blocking(move || {
            let archive = Archive::open(&config.archive()).map_err(|error| chain(&error))?;
            let layout =
                StateLayout::new(archive.program(), &config.optimizer).map_err(|error| chain(&error))?;
            let folder = config.checkpoint.as_ref().map(|checkpoints| &checkpoints.folder);
            let claim = folder.map(|folder| FolderClaim::new(folder, FOLDER_PATIENCE)).transpose();
            let claim = claim.map_err(|error| chain(&error))?;
            Ok((archive.digest(), layout.bytes, config, claim))
        });
        let (digest, state_bytes, config, claim) =
            opened.await.map_err(|error| error.to_string()).flatten().map_err(invalid)?;
        training.submit(NewTask { name: name.to_owned(), config, digest, state_bytes, claim }).await?;
        self.task_status(name)
    }

    /// Has every task write a last checkpoint and end.
    pub(super) async fn stop_training(&self) {
        let mut stopping = Vec::new();
        for training in self.devices.iter().filter_map(|device| device.training.as_ref()) {
            let alive = training.statuses().into_iter().filter(|status| !status.state.is_over());
            stopping.extend(alive.map(|status| training.command(&status.name, TaskCommand::Stop)));
        }
        for stopped in stopping {
            // One that is over by itself meanwhile is as good.
            let _ = stopped.await;
        }
    }

    /// Every task of every device, sorted by name; one that is not over goes before one of another device that is.
    pub(super) fn tasks(&self) -> Vec<TaskStatus> {
        let trainings = self.devices.iter().filter_map(|device| device.training.as_ref());
        let mut tasks: Vec<TaskStatus> = trainings.flat_map(Training::statuses).collect();
        let refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        // One of that name may have been submitted since.
        let is_new = |status: &&TaskStatus| tasks.iter().all(|task| task.name != status.name);
        tasks.extend(refused.iter().filter(is_new).cloned().collect::<Vec<_>>());
        tasks.sort_by_cached_key(|task| (task.name.clone(), task.state.is_over()));
        tasks
    }

    pub(super) async fn command_task(
        &self,
        name: &str,
        command: TaskCommand,
    ) -> Result<TaskStatus, ServiceError> {
        let Some((training, _)) = self.training_of(name) else {
            return Err(training::refused_as_over(name, self.task_status(name)?.state));
        };
        training.command(name, command).await?;
        self.task_status(name)
    }

    fn task_status(&self, name: &str) -> Result<TaskStatus, ServiceError> {
        let named = self.tasks().into_iter().find(|status| status.name == name);
        named.ok_or_else(|| ServiceError::UnknownTask { name: name.to_owned() })
    }

    /// Where a task of a name is; one that is not over goes before one that is.
    fn training_of(&self, name: &str) -> Option<(&Training, TaskStatus)> {
        let trainings = self.devices.iter().filter_map(|device| device.training.as_ref());
        let named = trainings.flat_map(|training| {
            let named = training.statuses().into_iter().filter(|status| status.name == name);
            named.map(move |status| (training, status)).collect::<Vec<_>>()
        });
        named.min_by_key(|(_, status)| status.state.is_over())
    }
}

/// What there is to say of a task that was not taken.
fn refused(name: &str, reason: String) -> TaskStatus {
    TaskStatus {
        name: name.to_owned(),
        state: TaskState::Failed,
        reason,
        device: String::new(),
        steps_done: 0,
        total_steps: 0,
        learning_rate: None,
        progress: Progress::new(0, Duration::ZERO, Duration::ZERO).report(Duration::ZERO),
        checkpoint: None,
        checkpoint_error: String::new(),
        last_yield_us: None,
        residence: Residence::Resident,
        made_room: 0,
        log: PathBuf::new(),
    }
}

/// A configuration that came as text; relative paths are those of the working directory.
pub(super) fn parse(text: &str) -> Result<TaskConfig, ServiceError> {
    TaskConfig::from_yaml(text).map_err(|error| ServiceError::InvalidRequest { message: chain(&error) })
}
