//! An axis from zero up that is broken where nothing lies.

use pswitch_plot::{between, label, round_step};

/// Two neighbours so many times apart may be drawn on two parts of the axis.
const BREAKS_AT: f64 = 3.0;

/// Numbers on the lower part may be so many times further apart than those on the upper one, which is smaller and does not
/// begin at zero.
const LOWER_MAY_DIFFER: f64 = 5.0;

/// Pixels between the two parts, and the share of the lower one.
const BETWEEN: i32 = 16;
const LOWER_SHARE: f64 = 0.62;

/// Where numbers are on a vertical axis.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Scale {
    /// Where the lower part ends; the axis, if it is whole.
    lower: f64,
    /// Where the upper part begins and ends.
    upper: Option<(f64, f64)>,
    /// From the lower end to the upper one, in pixels.
    ends: (i32, i32),
}

impl Scale {
    /// One that all numbers fit on. Of times it breaks at most once, where numbers on either part differ least; shares go up
    /// to 100 %.
    pub(super) fn of(numbers: impl Iterator<Item = f64>, unit: &str, ends: (i32, i32)) -> Self {
        let mut sorted: Vec<f64> = numbers.filter(|number| number.is_finite() && *number > 0.0).collect();
        sorted.sort_by(f64::total_cmp);
        let most = sorted.last().copied().unwrap_or(1.0);
        if unit != "ms" {
            return Self {
                lower: if unit == "%" { most.max(100.0) } else { above(most, 6.0) },
                upper: None,
                ends,
            };
        }
        let least = sorted.first().copied().unwrap_or(most);
        let gaps = sorted.array_windows().filter(|[below, above]| above / below >= BREAKS_AT);
        let differ = |[below, above]: &[f64; 2]| (below / least / LOWER_MAY_DIFFER).max(most / above);
        let gap = gaps.min_by(|one, other| differ(one).total_cmp(&differ(other)));
        match gap {
            None => Self { lower: above(most, 6.0), upper: None, ends },
            Some(&[lower, upper]) => {
                // Finer than its ticks: the upper part is not to begin below the lower one.
                let step = round_step(upper / 10.0);
                let from = (upper * 0.9 / step).floor() * step;
                let step = round_step((most - from) / 10.0);
                let to = (most * 1.02 / step).ceil() * step;
                Self { lower: above(lower, 4.0), upper: Some((from, to)), ends }
            }
        }
    }

    /// Where a number is; at an end if it is beyond.
    pub(super) fn y(&self, number: f64) -> i32 {
        let (bottom, top) = self.ends;
        match self.upper {
            None => between((bottom, top), number / self.lower),
            Some((from, to)) => {
                let (lower_top, upper_bottom) = self.edges();
                if number <= self.lower {
                    between((bottom, lower_top), number / self.lower)
                } else {
                    between((upper_bottom, top), (number - from) / (to - from))
                }
            }
        }
    }

    /// Where the axis is broken: the middle of the gap, if a bar of this number crosses it.
    pub(super) fn crossed(&self, number: f64) -> Option<i32> {
        let (lower, upper) = self.edges();
        (self.upper.is_some() && number > self.lower).then_some((lower + upper) / 2)
    }

    /// The ends of the pieces of the axis, each from below.
    pub(super) fn pieces(&self) -> Vec<(i32, i32)> {
        let (lower, upper) = self.edges();
        match self.upper {
            None => vec![self.ends],
            Some(_) => vec![(self.ends.0, lower), (upper, self.ends.1)],
        }
    }

    /// Round numbers with their labels; milliseconds above a break may be told in seconds.
    pub(super) fn ticks(&self, unit: &str) -> Vec<(f64, String)> {
        let step = round_step(self.lower / if self.upper.is_some() { 4.0 } else { 6.0 });
        let mut ticks = steps((0.0, self.lower), step, |number| label(number, step));
        if let Some((from, to)) = self.upper {
            let step = round_step((to - from) / 3.0);
            ticks.extend(steps((from, to), step, |number| {
                if unit == "ms" && to >= 1000.0 && step >= 100.0 {
                    format!("{} s", label(number / 1e3, step / 1e3))
                } else {
                    label(number, step)
                }
            }));
        }
        ticks
    }

    /// The upper end of the lower part, and the lower end of the upper one.
    fn edges(&self) -> (i32, i32) {
        let (bottom, top) = self.ends;
        let lower = between((bottom, top + BETWEEN), LOWER_SHARE);
        (lower, lower - BETWEEN)
    }
}

/// The next round number with some room above another.
fn above(number: f64, ticks: f64) -> f64 {
    let step = round_step(number / ticks);
    (number * 1.02 / step).ceil() * step
}

fn steps((from, to): (f64, f64), step: f64, text: impl Fn(f64) -> String) -> Vec<(f64, String)> {
    let first = (from / step - 1e-6).ceil();
    (0_u8..20)
        .map(|tick| (first + f64::from(tick)) * step)
        .take_while(|number| *number <= to + step * 1e-6)
        .map(|number| (number, text(number)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scale(numbers: &[f64]) -> Scale {
        Scale::of(numbers.iter().copied(), "ms", (500, 100))
    }

    #[test]
    fn numbers_that_are_close_have_one_axis() {
        let scale = scale(&[37.1, 40.5, 39.3, 86.5, 0.0]);
        assert_eq!((scale.upper, scale.pieces()), (None, vec![(500, 100)]));
        assert_eq!((scale.y(0.0), scale.y(scale.lower), scale.crossed(86.5)), (500, 100, None));
        assert!(scale.y(86.5) > 100 && scale.y(86.5) < 170);
    }

    #[test]
    fn seconds_stand_above_a_break() {
        let scale = scale(&[37.1, 43.5, 659.0, 5678.0, 7243.0]);
        let (from, to) = scale.upper.unwrap();
        assert!(scale.lower > 659.0 && from > scale.lower && from <= 5678.0 && to >= 7243.0, "{scale:?}");
        assert!(scale.crossed(659.0).is_none() && scale.crossed(5678.0).is_some());
        let [(_, lower_top), (upper_bottom, _)] = scale.pieces()[..] else { panic!("{scale:?}") };
        assert_eq!(lower_top - upper_bottom, BETWEEN);
        assert!(scale.y(659.0) >= lower_top && scale.y(5678.0) <= upper_bottom);
        let labels: Vec<_> = scale.ticks("ms").into_iter().map(|(_, text)| text).collect();
        assert!(labels.contains(&"0".to_owned()) && labels.contains(&"6 s".to_owned()), "{labels:?}");
    }

    #[test]
    fn the_gap_that_tells_most_apart_is_left_out() {
        // Processes of PyTorch take longer than others, and both far longer than requests do.
        let gpu = scale(&[4.5, 12.0, 38.0, 3000.0, 9300.0]);
        assert!(gpu.lower < 60.0 && gpu.upper.unwrap().0 <= 3000.0, "{gpu:?}");
        let host = scale(&[10.0, 22.0, 65.0, 107.0, 250.0, 625.0, 2670.0, 3240.0]);
        assert!(host.lower >= 625.0 && host.upper.unwrap().0 <= 2670.0, "{host:?}");
    }

    #[test]
    fn only_times_are_broken_and_shares_are_of_a_hundred() {
        let scale = |unit| Scale::of([2.0, 90.0].into_iter(), unit, (500, 100));
        assert!(scale("ms").upper.is_some());
        assert_eq!((scale("batches/s").upper, scale("%").upper, scale("%").lower), (None, None, 100.0));
    }

    #[test]
    fn axes_of_odd_numbers_are_finite() {
        for numbers in [&[][..], &[0.0], &[f64::NAN, 1.0], &[1e-9, 1e9], &[5.0, 5.0]] {
            let scale = scale(numbers);
            let ticks = scale.ticks("ms");
            assert!(!ticks.is_empty() && ticks.iter().all(|(at, _)| at.is_finite()), "{numbers:?}");
            assert!((100..=500).contains(&scale.y(numbers.last().copied().unwrap_or(0.0))));
        }
    }
}
