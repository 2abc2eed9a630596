//! Training tasks that train nothing.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::Duration;

use pswitch_controller::{Residence, ServiceError, TaskCommand, TaskState, TaskStatus};
use pswitch_train::{Progress, ProgressEvent};

use super::failure;

/// The tasks. A configuration that begins with `wrong` is refused, and so is a task named like a model that ends in an
/// error, with that error. A task has one step done, and as many in all as its configuration has bytes.
#[derive(Default)]
pub(super) struct Tasks(Mutex<BTreeMap<String, TaskStatus>>);

impl Tasks {
    pub(super) fn submit(&self, name: &str, config: &str) -> Result<TaskStatus, ServiceError> {
        if let Some(failure) = failure(name) {
            return Err(failure);
        }
        if config.starts_with("wrong") {
            return Err(ServiceError::InvalidRequest { message: "unknown field `wrong`".to_owned() });
        }
        let mut tasks = self.0.lock().unwrap();
        if tasks.get(name).is_some_and(|task| !task.state.is_over()) {
            let message = format!("training task '{name}' is not over");
            return Err(ServiceError::InvalidRequest { message });
        }
        let task = task(name, config.len() as u64);
        tasks.insert(name.to_owned(), task.clone());
        Ok(task)
    }

    pub(super) fn all(&self) -> Vec<TaskStatus> {
        self.0.lock().unwrap().values().cloned().collect()
    }

    pub(super) fn command(&self, name: &str, command: TaskCommand) -> Result<TaskStatus, ServiceError> {
        let mut tasks = self.0.lock().unwrap();
        let task = tasks.get_mut(name).ok_or_else(|| ServiceError::UnknownTask { name: name.to_owned() })?;
        if task.state.is_over() {
            let message = format!("training task '{name}' is over");
            return Err(ServiceError::InvalidRequest { message });
        }
        task.state = match command {
            TaskCommand::Pause => TaskState::Paused,
            TaskCommand::Resume => TaskState::Training,
            TaskCommand::Stop | TaskCommand::Discard => TaskState::Stopped,
        };
        Ok(task.clone())
    }
}

fn task(name: &str, total_steps: u64) -> TaskStatus {
    let second = Duration::from_secs(1);
    let mut progress = Progress::new(0, Duration::ZERO, second);
    let step = ProgressEvent::StepFinished { loss: 0.5, samples: 8, duration: second };
    progress.handle(second, step).expect("nothing interrupts the step");
    TaskStatus {
        name: name.to_owned(),
        state: TaskState::Preparing,
        reason: String::new(),
        device: "host".to_owned(),
        steps_done: 1,
        total_steps,
        learning_rate: Some(0.25),
        progress: progress.report(second),
        checkpoint: None,
        checkpoint_error: String::new(),
        last_yield_us: Some(850),
        residence: Residence::Host,
        made_room: 3,
        log: format!("/logs/{name}.jsonl").into(),
    }
}
