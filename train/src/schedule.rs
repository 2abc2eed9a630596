use std::f64::consts::PI;

use serde::{Deserialize, Serialize};

/// How the learning rate changes with the steps of a task.
///
/// `{kind: cosine, warm_up: 100}` in a configuration.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
#[non_exhaustive]
pub enum Schedule {
    /// The optimizer's rate all along: the default.
    // With braces, because serde lets any key stand beside a variant without.
    Constant {},
    /// The rate is multiplied by `factor` after every `every` steps: `torch.optim.lr_scheduler.StepLR`.
    Step {
        /// Steps between two changes.
        every: u64,
        /// What the rate is multiplied by.
        factor: f64,
    },
    /// From 0 up to the optimizer's rate in equal strides, and then down to `floor` along half a cosine that ends where
    /// the task does: a linear warm-up and `torch.optim.lr_scheduler.CosineAnnealingLR` behind it.
    Cosine {
        /// Steps of the warm-up.
        #[serde(default)]
        warm_up: u64,
        /// The rate, not a share of it, that the cosine ends at.
        #[serde(default)]
        floor: f64,
    },
}

impl Default for Schedule {
    fn default() -> Schedule {
        Schedule::Constant {}
    }
}

impl Schedule {
    /// The learning rate of step `step`, counted from 0, of a task of `total_steps` whose optimizer has the rate
    /// `base_rate`. Behind the end of the task it is that of the end.
    ///
    /// ```
    /// use pswitch_train::Schedule;
    ///
    /// let schedule = Schedule::Cosine { warm_up: 10, floor: 0.0 };
    /// let rate = |step| schedule.rate(0.1, step, 110);
    /// assert_eq!((rate(0), rate(5), rate(10)), (0.0, 0.05, 0.1));
    /// assert!((rate(60) - 0.05).abs() < 1e-15);
    /// ```
    pub fn rate(&self, base_rate: f64, step: u64, total_steps: u64) -> f64 {
        match *self {
            Schedule::Constant {} => base_rate,
            Schedule::Step { every, factor } => base_rate * factor.powf(as_f64(step / every.max(1))),
            Schedule::Cosine { warm_up, .. } if step < warm_up => {
                base_rate * (as_f64(step) / as_f64(warm_up))
            }
            Schedule::Cosine { warm_up, floor } => {
                let whole = total_steps.saturating_sub(warm_up).max(1);
                let share = as_f64((step - warm_up).min(whole)) / as_f64(whole);
                floor + (base_rate - floor) * 0.5 * (1.0 + (PI * share).cos())
            }
        }
    }
}

#[allow(clippy::cast_precision_loss)] // a rate needs no more than 53 bits of a step
fn as_f64(value: u64) -> f64 {
    value as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(found: f64, expected: f64) {
        assert!((found - expected).abs() <= 1e-12 * expected.abs().max(1e-3), "{found} is not {expected}");
    }

    #[test]
    fn a_constant_rate_does_not_change() {
        for step in [0, 1, 99, u64::MAX] {
            assert_eq!(Schedule::default().rate(0.3, step, 100), 0.3);
        }
    }

    #[test]
    fn steps_multiply_the_rate() {
        let schedule = Schedule::Step { every: 30, factor: 0.1 };
        for (step, expected) in [(0, 0.5), (29, 0.5), (30, 0.05), (59, 0.05), (60, 0.005), (90, 0.0005)] {
            close(schedule.rate(0.5, step, 100), expected);
        }
        // So many changes that nothing is left, without an overflow.
        assert_eq!(Schedule::Step { every: 1, factor: 0.5 }.rate(1.0, u64::MAX, u64::MAX), 0.0);
    }

    #[test]
    fn a_cosine_follows_its_closed_form() {
        // CosineAnnealingLR(SGD(lr=1), T_max=4, eta_min=0.2) of PyTorch.
        let schedule = Schedule::Cosine { warm_up: 0, floor: 0.2 };
        let expected = [1.0, 0.882_842_712_474_619, 0.6, 0.317_157_287_525_381, 0.2];
        for (step, expected) in (0..).zip(expected) {
            close(schedule.rate(1.0, step, 4), expected);
        }
        close(schedule.rate(1.0, 1000, 4), 0.2);
    }

    #[test]
    fn a_warm_up_rises_in_equal_strides_and_meets_the_cosine() {
        let schedule = Schedule::Cosine { warm_up: 4, floor: 0.0 };
        for (step, expected) in [(0, 0.0), (1, 0.25), (3, 0.75), (4, 1.0), (6, 0.5), (8, 0.0)] {
            let found = schedule.rate(1.0, step, 8);
            assert!((found - expected).abs() < 1e-15, "{found} at {step}");
        }
        // Nothing but warm-up.
        assert_eq!(schedule.rate(1.0, 3, 4), 0.75);
        assert!(schedule.rate(1.0, 4, 4).is_finite());
    }
}
