//! When requests come, and for which model: an open loop, the same for every mechanism.

use std::time::Duration;

use crate::random::Random;

/// Models in the order of their popularity are asked as one over their place to this power: the first few get most.
const SKEW: f64 = 1.1;

/// Mean lengths of the times in which a bursty model is asked and in which it is not.
const ON_S: f64 = 0.3;
const OFF_S: f64 = 0.9;

/// How requests come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Arrivals {
    /// Independently of each other.
    Poisson,
    /// In bursts: each model is asked for some time, and then not for a longer one.
    Bursty,
}

/// A request that is due.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Due {
    /// After the beginning.
    pub(super) at: Duration,
    /// The place of its model.
    pub(super) model: usize,
}

impl Arrivals {
    pub(super) const ALL: [Self; 2] = [Self::Poisson, Self::Bursty];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Poisson => "poisson",
            Self::Bursty => "bursty",
        }
    }

    /// All requests of some time at a mean rate, in their order.
    pub(super) fn schedule(
        self,
        models: usize,
        requests_per_s: f64,
        length: Duration,
        seed: u64,
    ) -> Vec<Due> {
        let length_s = length.as_secs_f64();
        let mut schedule = Vec::new();
        for (model, share) in popularity(models).into_iter().enumerate() {
            let mut random = Random::new(seed.wrapping_mul(1 << 20).wrapping_add(model as u64));
            let rate = requests_per_s * share;
            let mut add = |at_s: f64| schedule.push(Due { at: Duration::from_secs_f64(at_s), model });
            match self {
                Self::Poisson => poisson((0.0, length_s), rate, &mut random, &mut add),
                Self::Bursty => {
                    // In the midst of what went on before, as it is at any other moment.
                    let mut is_on = random.share() < ON_S / (ON_S + OFF_S);
                    let mut begin_s = 0.0;
                    while begin_s < length_s {
                        let end_s = begin_s + exponential(if is_on { ON_S } else { OFF_S }, &mut random);
                        if is_on {
                            let within = (begin_s, end_s.min(length_s));
                            poisson(within, rate * (ON_S + OFF_S) / ON_S, &mut random, &mut add);
                        }
                        (begin_s, is_on) = (end_s, !is_on);
                    }
                }
            }
        }
        schedule.sort_by_key(|due| due.at);
        schedule
    }
}

/// Which share of all requests each model gets.
pub(super) fn popularity(models: usize) -> Vec<f64> {
    // Some dozens.
    #[allow(clippy::cast_precision_loss)]
    let weights: Vec<f64> = (1..=models).map(|place| (place as f64).powf(-SKEW)).collect();
    let all: f64 = weights.iter().sum();
    weights.into_iter().map(|weight| weight / all).collect()
}

/// Moments between two others that come independently at a rate.
fn poisson((begin_s, end_s): (f64, f64), rate: f64, random: &mut Random, add: &mut impl FnMut(f64)) {
    let mut at_s = begin_s;
    loop {
        at_s += exponential(1.0 / rate, random);
        if at_s >= end_s {
            return;
        }
        add(at_s);
    }
}

fn exponential(mean: f64, random: &mut Random) -> f64 {
    // A share is never 1.
    -mean * (1.0 - random.share()).ln()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LENGTH: Duration = Duration::from_secs(2000);

    fn count_per_s(schedule: &[Due]) -> Vec<f64> {
        let mut counts = vec![0.0; 2000];
        for due in schedule {
            counts[usize::try_from(due.at.as_secs()).unwrap()] += 1.0;
        }
        counts
    }

    /// The variance of a count over its mean: 1 for independent arrivals.
    fn dispersion(counts: &[f64]) -> f64 {
        let mean = counts.iter().sum::<f64>() / counts.len() as f64;
        counts.iter().map(|count| (count - mean).powi(2)).sum::<f64>() / counts.len() as f64 / mean
    }

    #[test]
    fn both_kinds_come_at_the_rate_and_in_order() {
        for arrivals in Arrivals::ALL {
            let schedule = arrivals.schedule(12, 20.0, LENGTH, 1);
            let rate = schedule.len() as f64 / LENGTH.as_secs_f64();
            assert!((rate / 20.0 - 1.0).abs() < 0.1, "{arrivals:?}: {rate}");
            assert!(schedule.is_sorted_by_key(|due| due.at) && schedule.iter().all(|due| due.at < LENGTH));
        }
    }

    #[test]
    fn bursts_are_bursts() {
        let [poisson, bursty] =
            Arrivals::ALL.map(|kind| dispersion(&count_per_s(&kind.schedule(12, 20.0, LENGTH, 1))));
        assert!((0.8..1.2).contains(&poisson) && bursty > 2.0, "{poisson}, {bursty}");
    }

    #[test]
    fn a_few_models_get_most_and_a_seed_says_everything() {
        let shares = popularity(24);
        assert!((shares.iter().sum::<f64>() - 1.0).abs() < 1e-9 && shares.is_sorted_by(|a, b| a > b));
        assert!(shares[..6].iter().sum::<f64>() > 0.6, "{shares:?}");
        let schedule = |seed| Arrivals::Bursty.schedule(6, 10.0, Duration::from_secs(20), seed);
        assert_eq!(schedule(3), schedule(3));
        assert_ne!(schedule(3), schedule(4));
    }
}
