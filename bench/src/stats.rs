//! What a series of measurements comes to.

use std::time::Duration;

use serde::Serialize;

/// Measurements of one quantity, all in one unit.
#[derive(Debug, Clone, Default)]
pub struct Samples(Vec<f64>);

/// Median, tail and spread of a series; the unit stands in the name of the field that holds it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Summary {
    /// How many were measured.
    pub count: usize,
    /// Half are no greater.
    pub median: f64,
    /// Of a hundred, one is greater.
    pub p99: f64,
    /// The smallest.
    pub least: f64,
    /// The greatest.
    pub most: f64,
    /// The middle eight tenths as a share of the median.
    pub spread_percent: f64,
}

impl Samples {
    /// None yet, and room for so many.
    pub fn with_capacity(count: usize) -> Self {
        Self(Vec::with_capacity(count))
    }

    /// Adds one.
    pub fn push(&mut self, value: f64) {
        self.0.push(value);
    }

    /// Adds a time in milliseconds.
    pub fn push_ms(&mut self, time: Duration) {
        self.push(milliseconds(time));
    }

    /// All of them, in the order in which they came.
    pub(crate) fn values(&self) -> &[f64] {
        &self.0
    }

    /// What they come to; `None` of nothing.
    pub fn summary(&self) -> Option<Summary> {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let (&least, &most) = (sorted.first()?, sorted.last()?);
        let median = quantile(&sorted, 0.5);
        let spread_percent = match (quantile(&sorted, 0.9) - quantile(&sorted, 0.1)) / median * 100.0 {
            spread if spread.is_finite() => spread,
            _ => 0.0,
        };
        Some(Summary {
            count: sorted.len(),
            median,
            p99: quantile(&sorted, 0.99),
            least,
            most,
            spread_percent,
        })
    }
}

impl Summary {
    /// What some values come to; `None` of nothing.
    pub(crate) fn of(values: &[f64]) -> Option<Self> {
        Samples(values.to_vec()).summary()
    }
}

impl Extend<f64> for Samples {
    fn extend<T: IntoIterator<Item = f64>>(&mut self, values: T) {
        self.0.extend(values);
    }
}

/// The mean; none of nothing.
pub(crate) fn mean(values: &[f64]) -> Option<f64> {
    // Series are far shorter than what a float counts exactly.
    #[allow(clippy::cast_precision_loss)]
    let count = values.len() as f64;
    (!values.is_empty()).then(|| values.iter().sum::<f64>() / count)
}

/// By how much the mean of independent values may be off, one standard deviation; zero for less than two.
pub(crate) fn standard_error(values: &[f64]) -> f64 {
    let Some(mean) = mean(values).filter(|_| values.len() > 1) else { return 0.0 };
    // Few values.
    #[allow(clippy::cast_precision_loss)]
    let count = values.len() as f64;
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    (squares / (count - 1.0) / count).sqrt()
}

/// A time in milliseconds.
pub(crate) fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// How far `found` is from `expected`, in percent of it; negative if it is less.
pub(crate) fn deviation_percent(found: f64, expected: f64) -> f64 {
    (found / expected - 1.0) * 100.0
}

/// The value below which that share of a sorted series lies, interpolated between neighbours.
fn quantile(sorted: &[f64], share: f64) -> f64 {
    // Series are far shorter than what a float counts exactly.
    #[allow(clippy::cast_precision_loss)]
    let place = share * (sorted.len() - 1) as f64;
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    let (below, above) = (place.floor() as usize, place.ceil() as usize);
    sorted[below] + (sorted[above] - sorted[below]) * place.fract()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn summary(values: impl IntoIterator<Item = f64>) -> Summary {
        let mut samples = Samples::default();
        samples.extend(values);
        samples.summary().unwrap()
    }

    #[test]
    fn the_order_of_measurements_does_not_matter() {
        let of_hundred = summary((0..=100).rev().map(f64::from));
        let expected =
            Summary { count: 101, median: 50.0, p99: 99.0, least: 0.0, most: 100.0, spread_percent: 160.0 };
        assert_eq!(of_hundred, expected);
    }

    #[test]
    fn quantiles_lie_between_neighbours() {
        assert_eq!(summary([1.0, 2.0]).median, 1.5);
        assert!((summary([10.0, 20.0, 30.0, 40.0]).p99 - 39.7).abs() < 1e-9);
    }

    #[test]
    fn a_mean_of_few_may_be_far_off() {
        // A variance of 4 / 3.
        assert!((standard_error(&[1.0, 3.0, 1.0, 3.0]) - (1.0_f64 / 3.0).sqrt()).abs() < 1e-12);
        assert_eq!((standard_error(&[5.0]), standard_error(&[])), (0.0, 0.0));
    }

    #[test]
    fn one_measurement_has_no_spread_and_none_no_summary() {
        let expected =
            Summary { count: 1, median: 3.0, p99: 3.0, least: 3.0, most: 3.0, spread_percent: 0.0 };
        assert_eq!(summary([3.0]), expected);
        assert_eq!(summary([0.0, 0.0]).spread_percent, 0.0);
        assert_eq!(Samples::default().summary(), None);
    }

    #[test]
    fn times_are_milliseconds() {
        let mut samples = Samples::with_capacity(1);
        samples.push_ms(Duration::from_micros(1500));
        let summary = samples.summary().unwrap();
        assert_eq!((summary.count, summary.median), (1, 1.5));
        assert_eq!(deviation_percent(90.0, 100.0).round(), -10.0);
    }
}
