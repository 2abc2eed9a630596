//! Training tasks that are submitted, and those that are over for so long that they are forgotten.

use std::sync::Arc;

use pswitch_device::{DeviceError, PinnedMemory, SharedMemory};
use pswitch_mem_pool::{PoolError, Range};

use super::super::book::TaskId;
use super::super::{MOST_TASKS, NewTask};
use super::{Host, Record};
use crate::service::ServiceError;

/// Tasks that are over and can still be asked for.
const MOST_OVER: usize = 100;

impl Host {
    pub(super) fn submit(&mut self, task: NewTask) -> Result<(), ServiceError> {
        if self.find(&task.name).is_some_and(|id| !self.book.is_over(id)) {
            let message = format!("a training task '{}' is there already, and not over", task.name);
            return Err(ServiceError::InvalidRequest { message });
        }
        if self.tasks.values().filter(|record| record.state.is_some()).count() as u64 >= MOST_TASKS {
            let message = format!("there are {MOST_TASKS} training tasks already");
            return Err(ServiceError::InvalidRequest { message });
        }
        let state = self.states.allocate(task.state_bytes).map_err(|error| {
            let help = match error {
                PoolError::NoRoomNow { .. } => "stop another task, or make training_size larger",
                _ => "make training_size larger",
            };
            let message = format!(
                "the state of '{}' needs {} bytes: of {} bytes for training {} are in use by others, and the longest free \
                 range has {}; {help}",
                task.name,
                task.state_bytes,
                self.states.capacity_bytes(),
                self.states.in_use_bytes(),
                self.states.largest_free_bytes()
            );
            ServiceError::InvalidRequest { message }
        })?;
        if let Err(refusal) = self.check_place(&task, state) {
            self.put_back(state);
            return Err(refusal);
        }
        let saved = match self.places.states().map(|_| self.memory_for(state)).transpose() {
            Ok(saved) => saved,
            Err(error) => {
                self.put_back(state);
                let message = format!("no host memory for the state of '{}': {error}", task.name);
                return Err(ServiceError::InvalidRequest { message });
            }
        };
        let id = TaskId(self.tasks.last_key_value().map_or(0, |(last, _)| last.0 + 1));
        let NewTask { name, config, digest, claim, .. } = task;
        self.book.submit(id, config.weight, config.checkpoint.is_some(), self.now());
        let log = config.checkpoint.as_ref().map(|checkpoints| checkpoints.folder.join("progress.jsonl"));
        let record = Record {
            name,
            config,
            digest,
            state: Some(state),
            saved,
            made_room: 0,
            is_spoilt: false,
            claim,
            worker: None,
            checkpoint: None,
            checkpoint_error: String::new(),
            last_yield_us: None,
            deadline: None,
            peak_bytes: 0,
            log: log.unwrap_or_default(),
        };
        tracing::info!(
            task = record.name,
            device = self.name,
            state_bytes = state.bytes,
            "training task taken"
        );
        self.tasks.insert(id, record);
        self.forget_oldest();
        self.choose();
        Ok(())
    }

    /// Forgets tasks that have been over for longest, so that a server that trains for years has no list without an end.
    fn forget_oldest(&mut self) {
        let is_gone = |record: &Record| record.worker.is_none() && record.state.is_none();
        let over = self.tasks.iter().filter(|(id, record)| is_gone(record) && self.book.is_over(**id));
        let over: Vec<TaskId> = over.map(|(&id, _)| id).collect();
        for id in &over[..over.len().saturating_sub(MOST_OVER)] {
            self.tasks.remove(id);
            self.book.forget(*id);
        }
    }

    /// Refuses a task that would take away what the steps of others need.
    fn check_place(&self, task: &NewTask, state: Range) -> Result<(), ServiceError> {
        let alive = || self.tasks.values().filter(|record| record.state.is_some());
        let needed = alive().map(|record| record.peak_bytes).max().unwrap_or(0);
        let end = alive().filter_map(|record| record.state).map(|state| state.end()).max().unwrap_or(0);
        let left = self.region.end() - end.max(state.end());
        if left < needed {
            let message = format!(
                "beside the state of '{}' {left} bytes would be left, and steps of other tasks need {needed}; make \
                 training_size larger",
                task.name
            );
            return Err(ServiceError::InvalidRequest { message });
        }
        Ok(())
    }

    /// Memory that a state can go to when it makes room.
    fn memory_for(&self, state: Range) -> Result<PinnedMemory, DeviceError> {
        self.device.pin(Arc::new(SharedMemory::create("pswitch-state", state.bytes)?))
    }
}
