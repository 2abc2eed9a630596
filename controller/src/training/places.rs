//! Whether states may be used: always, or, where they give way to models, while the driver keeps those away.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::states::States;
use crate::driver;

/// After so long the driver is asked again that could not bring states back.
const ASK_AGAIN: Duration = Duration::from_millis(200);

/// Who may use the part of the pool for training.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Models.
    Left { ask_at: Option<Instant> },
    /// Models; the driver was asked.
    Asked,
    /// Training.
    Admitted,
}

/// The places of states, as the thread that trains has them.
pub(super) struct Places {
    /// None where no model ever lies there.
    states: Option<Arc<States>>,
    driver: Option<driver::Mailbox>,
    phase: Phase,
}

impl Places {
    pub(super) fn new(states: Option<Arc<States>>) -> Self {
        let phase = if states.is_some() { Phase::Left { ask_at: None } } else { Phase::Admitted };
        Self { states, driver: None, phase }
    }

    pub(super) fn states(&self) -> Option<&States> {
        self.states.as_deref()
    }

    pub(super) fn connect(&mut self, driver: driver::Mailbox) {
        self.driver = Some(driver);
    }

    /// No task could compute any more: a turn among requests may end.
    pub(super) fn end_turn(&self) {
        if let Some(driver) = &self.driver {
            driver.put(driver::Mail::TrainingRests);
        }
    }

    /// Whether models may be there, or are about to.
    pub(super) fn are_away(&self, is_closed: bool) -> bool {
        self.states.is_some() && (is_closed || self.phase != Phase::Admitted)
    }

    /// Asked, they are there -> Admitted.
    pub(super) fn admitted(&mut self) {
        self.phase = Phase::Admitted;
    }

    /// Asked, they could not be brought back -> Left.
    pub(super) fn refused(&mut self) {
        self.phase = Phase::Left { ask_at: Some(Instant::now() + ASK_AGAIN) };
    }

    /// When to look again, if nothing happens before.
    pub(super) fn due(&self) -> Option<Instant> {
        match self.phase {
            Phase::Left { ask_at } => ask_at,
            Phase::Asked | Phase::Admitted => None,
        }
    }

    /// Asks for the places, or leaves them.
    pub(super) fn update(&mut self, is_closed: bool, is_wanted: bool, is_used: bool) {
        let Some(driver) = self.driver.as_ref().filter(|_| self.states.is_some()) else { return };
        match self.phase {
            // Left, wanted and no request there -> Asked.
            Phase::Left { ask_at }
                if is_wanted && !is_closed && ask_at.is_none_or(|at| at <= Instant::now()) =>
            {
                self.phase = Phase::Asked;
                driver.put(driver::Mail::TrainingAsks);
            }
            // Admitted, requests are there or nobody wants it, and nobody uses it -> Left.
            Phase::Admitted if (is_closed || !is_wanted) && !is_used => {
                self.phase = Phase::Left { ask_at: None };
                driver.put(driver::Mail::TrainingLeaves);
            }
            Phase::Left { .. } | Phase::Asked | Phase::Admitted => {}
        }
    }
}
