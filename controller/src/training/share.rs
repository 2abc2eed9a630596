//! A share of the device that training has although requests never end, as a state machine without IO.
//!
//! While requests have the device, training is owed time in proportion. When it is owed a turn, nothing new begins, and
//! when what runs is over training has the device for that long.

use std::time::{Duration, Instant};

use super::gate::LINGER;

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
    /// When it was looked at last, what there was from then on, and for how long there had been no request by then.
    last: Instant,
    demand: Demand,
    idle: Duration,
}

impl Share {
    pub(crate) fn new(share: f64, now: Instant) -> Self {
        let demand = Demand { requests: false, executing: false, training: false, step: Duration::ZERO };
        let (phase, owed, idle) = (Phase::Requests, Duration::ZERO, Duration::ZERO);
        Self { share, phase, owed, last: now, demand, idle }
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
        let turn = Self::turn(demand);
        self.account(now, turn);
        self.demand = demand;
        if self.share <= 0.0 {
            return None;
        }
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
            Phase::Turn { until } if now >= until || !demand.training => {
                // Turn, it is over -> Requests.
                self.phase = Phase::Requests;
                Some(TurnAction::Release)
            }
            Phase::Turn { .. } => None,
        }
    }

    /// Takes the time since the last look into account, by what there was since.
    fn account(&mut self, now: Instant, turn: Duration) {
        let time = now.saturating_duration_since(self.last);
        self.last = now;
        // A device that requests have just left is theirs for a while still.
        let lingers = if self.demand.requests {
            self.idle = Duration::ZERO;
            time
        } else {
            let lingers = time.min(LINGER.saturating_sub(self.idle));
            self.idle += time;
            lingers
        };
        self.owed = match self.phase {
            // Nobody wants what it is owed.
            _ if !self.demand.training => Duration::ZERO,
            Phase::Turn { .. } => self.owed.saturating_sub(time),
            Phase::Requests | Phase::Emptying => {
                (self.owed + self.due(lingers)).min(turn + MOST_OWED).saturating_sub(time - lingers)
            }
        };
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

    /// What a client does who sends a request some time after each answer.
    #[derive(Clone, Copy, PartialEq)]
    enum Client {
        Thinks { since: Instant },
        Waits,
        Runs { until: Instant },
    }

    /// The share of the time in which a task that always wants to can compute, beside that client.
    fn trained(share: f64, step: Duration, execution: Duration, thinks: Duration, time: Duration) -> f64 {
        let begun = Instant::now();
        let mut now = begun;
        let mut turns = Share::new(share, now);
        let (mut held, mut client, mut training) = (false, Client::Waits, Duration::ZERO);
        let mut turn_since = None;
        while now < begun + time {
            let demand = Demand {
                requests: !matches!(client, Client::Thinks { .. }),
                executing: matches!(client, Client::Runs { .. }),
                training: true,
                step,
            };
            while let Some(action) = turns.update(demand, now) {
                match action {
                    TurnAction::Hold => held = true,
                    TurnAction::Admit => assert!(held && !demand.executing, "training beside an execution"),
                    TurnAction::Release => held = false,
                }
            }
            if client == Client::Waits && !held {
                client = Client::Runs { until: now + execution };
                continue;
            }
            let client_next = match client {
                Client::Thinks { since } => Some(since + thinks),
                Client::Waits => None,
                Client::Runs { until } => Some(until),
            };
            let next =
                client_next.into_iter().chain(turns.next(demand)).min().expect("somebody goes on").max(now);
            // What it has of the device beside its turns.
            let free_from = match client {
                _ if turns.is_turn() => now,
                Client::Thinks { since } => since + LINGER,
                Client::Waits | Client::Runs { .. } => next,
            };
            training += next.saturating_duration_since(free_from.max(now));
            if turns.is_turn() {
                let lasts = next - *turn_since.get_or_insert(now);
                let turn = LEAST_TURN.max(step.mul_f64(STEPS_A_TURN));
                assert!(lasts <= turn + turns.due(execution) + thinks + LINGER, "a turn of {lasts:?}");
            } else {
                turn_since = None;
            }
            now = next;
            client = match client {
                Client::Thinks { since } if now >= since + thinks => Client::Waits,
                Client::Runs { until } if now >= until => Client::Thinks { since: now },
                other => other,
            };
        }
        training.as_secs_f64() / time.as_secs_f64()
    }

    proptest! {
        #[test]
        fn training_has_its_share(
            share in 0.02..0.5_f64, step_ms in 1..400_u64, execution_us in 500..900_000_u64, thinks_us in 0..20_000_u64,
        ) {
            let (step, thinks) = (Duration::from_millis(step_ms), Duration::from_micros(thinks_us));
            let execution = Duration::from_micros(execution_us);
            let found = trained(share, step, execution, thinks, Duration::from_secs(400));
            prop_assert!(found > 0.95 * share - 0.01, "{found} of {share}");
            if thinks <= LINGER {
                prop_assert!(found < 1.05 * share + 0.01, "{found} of {share}");
            }
        }
    }

    #[test]
    fn without_a_share_requests_are_never_held() {
        let [step, execution] = [10, 7].map(Duration::from_millis);
        assert_eq!(trained(0.0, step, execution, Duration::ZERO, Duration::from_secs(10)), 0.0);
    }

    #[test]
    fn nothing_is_owed_for_a_time_without_requests() {
        let now = Instant::now();
        let mut share = Share::new(0.5, now);
        let idle = Demand { requests: false, executing: false, training: true, step: Duration::ZERO };
        assert_eq!(share.update(idle, now), None);
        let busy = Demand { requests: true, executing: true, ..idle };
        assert_eq!(share.update(busy, now + Duration::from_secs(60)), None);
    }

    #[test]
    fn nothing_is_held_for_tasks_that_do_not_want_it() {
        let now = Instant::now();
        let mut share = Share::new(0.5, now);
        let demand = Demand { requests: true, executing: true, training: false, step: Duration::ZERO };
        for second in 0..100 {
            assert_eq!(share.update(demand, now + Duration::from_secs(second)), None);
        }
        // Nor is what it did not want owed afterwards.
        let demand = Demand { training: true, ..demand };
        assert_eq!(share.update(demand, now + Duration::from_millis(99_010)), None);
    }

    #[test]
    fn a_turn_ends_with_the_task_and_lasts_though_no_request_waits() {
        let now = Instant::now();
        let mut share = Share::new(0.5, now);
        let demand = Demand { requests: true, executing: false, training: true, step: Duration::ZERO };
        let at = |ms| now + Duration::from_millis(ms);
        assert_eq!(share.update(demand, at(0)), None);
        assert_eq!(share.update(demand, at(100)), Some(TurnAction::Hold));
        // The client has its answer, and has not asked again.
        let demand = Demand { requests: false, ..demand };
        assert_eq!(share.update(demand, at(101)), Some(TurnAction::Admit));
        assert_eq!(share.update(demand, at(120)), None);
        assert!(share.is_turn());
        assert_eq!(share.update(Demand { training: false, ..demand }, at(130)), Some(TurnAction::Release));
        assert!(!share.is_turn());
    }
}
