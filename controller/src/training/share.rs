//! A share of the device that training has although requests never end, as a state machine without IO.
//!
//! While requests have the device, training is owed time in proportion. When it is owed a turn, nothing new begins, and
//! when what runs is over training has the device for that long.

use std::time::{Duration, Instant};

/// The least length of a turn. Shorter ones would hardly finish a step.
const LEAST_TURN: Duration = Duration::from_millis(100);

/// What training is owed at most beyond a turn: requests wait for no longer than both.
const MOST_OWED: Duration = Duration::from_secs(1);

/// Steps that a turn has room for, the last of them thrown away at its end where tasks do not stand still.
const STEPS_A_TURN: f64 = 2.2;

/// What there is on the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Demand {
    /// Requests wait or run.
    pub(crate) requests: bool,
    /// Executions run.
    pub(crate) executing: bool,
    /// A task could compute.
    pub(crate) training: bool,
    /// How long one of its steps takes, as far as that is known.
    pub(crate) step: Duration,
}

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TurnAction {
    /// Begin nothing new.
    Hold,
    /// Let training have the device.
    Admit,
    /// Requests go on.
    Release,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Requests go before training.
    Requests,
    /// Nothing new begins; what runs is not over.
    Emptying,
    /// Training has its turn.
    Turn { until: Instant },
}

/// Who is owed what.
#[derive(Debug)]
pub(crate) struct Share {
    /// From 0 to below 1.
    share: f64,
    phase: Phase,
    owed: Duration,
    last: Instant,
}

impl Share {
    pub(crate) fn new(share: f64, now: Instant) -> Self {
        Self { share, phase: Phase::Requests, owed: Duration::ZERO, last: now }
    }

    /// Whether training has a turn among requests.
    pub(crate) fn is_turn(&self) -> bool {
        matches!(self.phase, Phase::Turn { .. })
    }

    /// How long a turn is.
    fn turn(demand: Demand) -> Duration {
        LEAST_TURN.max(demand.step.mul_f64(STEPS_A_TURN))
    }

    /// Time that training is owed for so much of the requests'.
    fn due(&self, time: Duration) -> Duration {
        time.mul_f64(self.share / (1.0 - self.share))
    }

    /// Takes what there is now and says what is to be done. `now` never goes back.
    pub(crate) fn update(&mut self, demand: Demand, now: Instant) -> Option<TurnAction> {
        let time = now.saturating_duration_since(self.last);
        self.last = now;
        if self.share <= 0.0 {
            return None;
        }
        let turn = Self::turn(demand);
        self.owed = match self.phase {
            // Nobody wants what it is owed.
            _ if !demand.training => Duration::ZERO,
            Phase::Requests | Phase::Emptying if demand.requests => {
                (self.owed + self.due(time)).min(turn + MOST_OWED)
            }
            _ => self.owed.saturating_sub(time),
        };
        match self.phase {
            Phase::Requests if demand.requests && demand.training && self.owed >= turn => {
                // Requests, it is owed a turn -> Emptying.
                self.phase = Phase::Emptying;
                Some(TurnAction::Hold)
            }
            Phase::Requests => None,
            Phase::Emptying if !demand.training => {
                // Emptying, no task wants it any more -> Requests.
                self.phase = Phase::Requests;
                Some(TurnAction::Release)
            }
            Phase::Emptying if demand.executing => None,
            Phase::Emptying => {
                // Emptying, nothing runs -> Turn.
                self.phase = Phase::Turn { until: now + self.owed.max(turn) };
                Some(TurnAction::Admit)
            }
            Phase::Turn { until } if now >= until || !demand.training || !demand.requests => {
                // Turn, it is over, or nobody is kept waiting -> Requests.
                self.phase = Phase::Requests;
                Some(TurnAction::Release)
            }
            Phase::Turn { .. } => None,
        }
    }

    /// When to look again, if nothing happens before.
    pub(crate) fn next(&self, demand: Demand) -> Option<Instant> {
        match self.phase {
            Phase::Turn { until } => Some(until),
            Phase::Requests if self.share > 0.0 && demand.requests && demand.training => {
                let missing = Self::turn(demand).saturating_sub(self.owed);
                let rest = missing.mul_f64((1.0 - self.share) / self.share);
                // A little later, so that it is there then.
                Some(self.last + rest + Duration::from_micros(100))
            }
            Phase::Requests | Phase::Emptying => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Requests that never end, one execution after the other, beside a task that always wants to compute.
    fn trained(share: f64, step: Duration, execution: Duration, time: Duration) -> f64 {
        let begun = Instant::now();
        let mut now = begun;
        let mut turns = Share::new(share, now);
        let (mut held, mut execution_ends, mut training) = (false, None::<Instant>, Duration::ZERO);
        while now < begun + time {
            let demand = Demand { requests: true, executing: execution_ends.is_some(), training: true, step };
            match turns.update(demand, now) {
                Some(TurnAction::Hold) => held = true,
                Some(TurnAction::Admit) => assert!(held && execution_ends.is_none()),
                Some(TurnAction::Release) => held = false,
                None => {}
            }
            if execution_ends.is_none() && !held {
                execution_ends = Some(now + execution);
            }
            assert!(!(turns.is_turn() && execution_ends.is_some()), "training beside an execution");
            let demand = Demand { executing: execution_ends.is_some(), ..demand };
            let ends = execution_ends.into_iter();
            let next = ends.chain(turns.next(demand)).min();
            let next =
                if held && execution_ends.is_none() && !turns.is_turn() { now } else { next.unwrap_or(now) };
            if turns.is_turn() {
                training += next.saturating_duration_since(now);
            }
            now = now.max(next);
            execution_ends = execution_ends.filter(|end| *end > now);
        }
        training.as_secs_f64() / time.as_secs_f64()
    }

    proptest! {
        #[test]
        fn training_has_its_share(
            share in 0.02..0.5_f64, step_ms in 1..400_u64, execution_ms in 1..900_u64,
        ) {
            let [step, execution] = [step_ms, execution_ms].map(Duration::from_millis);
            let found = trained(share, step, execution, Duration::from_secs(400));
            prop_assert!((found - share).abs() < 0.05 * share + 0.01, "{found} of {share}");
        }
    }

    #[test]
    fn without_a_share_requests_are_never_held() {
        let [step, execution] = [10, 7].map(Duration::from_millis);
        assert_eq!(trained(0.0, step, execution, Duration::from_secs(10)), 0.0);
    }

    #[test]
    fn nothing_is_held_for_tasks_that_do_not_want_it() {
        let now = Instant::now();
        let mut share = Share::new(0.5, now);
        let demand = Demand { requests: true, executing: true, training: false, step: Duration::ZERO };
        for second in 1..100 {
            assert_eq!(share.update(demand, now + Duration::from_secs(second)), None);
        }
        // Nor is what it did not want owed afterwards.
        let demand = Demand { training: true, ..demand };
        assert_eq!(share.update(demand, now + Duration::from_millis(99_010)), None);
    }

    #[test]
    fn a_turn_ends_with_the_task_or_the_requests() {
        for (training, requests) in [(false, true), (true, false)] {
            let now = Instant::now();
            let mut share = Share::new(0.5, now);
            let demand = Demand { requests: true, executing: false, training: true, step: Duration::ZERO };
            let at = |ms| now + Duration::from_millis(ms);
            assert_eq!(share.update(demand, at(100)), Some(TurnAction::Hold));
            assert_eq!(share.update(demand, at(101)), Some(TurnAction::Admit));
            assert!(share.is_turn());
            let demand = Demand { training, requests, ..demand };
            assert_eq!(share.update(demand, at(120)), Some(TurnAction::Release));
            assert!(!share.is_turn());
        }
    }
}
