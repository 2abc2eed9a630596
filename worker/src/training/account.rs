//! The account of what a GPU has before it: pure, by estimates of what operators take.

use std::collections::VecDeque;
use std::time::Instant;

/// Marks cost some microseconds each: there is one behind as much work as is a fifth of what may be queued ...
const MARKS: f64 = 5.0;

/// ... and no more than this: a GPU that is to stand still computes so long.
const MOST_BETWEEN_MARKS_US: f64 = 500.0;

/// To look at the clock costs as much as all the rest that is done ahead of an operator. It is looked at when this part of what
/// comes between two marks is queued: by no more than that are gates farther apart.
const LOOK_AT: f64 = 0.25;

/// What an operator is taken for that was never timed.
const UNKNOWN_US: f64 = 250.0;

/// Operators that were timed before and take so many times as long are believed when they do so the next time, too: the GPU may
/// have stood still without anybody having noticed.
const MOST_SURPRISING: f64 = 20.0;

/// Less than what the GPU's clock can tell.
const SHORTEST_US: f64 = 0.1;

/// The account of what is queued, by estimates.
#[derive(Debug, Default)]
pub(super) struct Account {
    /// The next operator of the step.
    pub(super) next: usize,
    /// What every operator of a step took last, as far as it is known.
    times: Vec<Timed>,
    /// Work up to marks that were not seen to be passed, oldest first, and how long it takes in all.
    marked: VecDeque<Work>,
    marked_us: f64,
    /// Work behind the last mark, of which some may be computed.
    pub(super) open: Work,
    /// Where all marks are passed, until when the time that went by was taken off what is open.
    looked_at: Option<Instant>,
}

/// What an operator takes.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Timed {
    us: f64,
    /// It was known, and took far longer the last time.
    is_doubtful: bool,
}

impl Timed {
    const UNKNOWN: Self = Self { us: UNKNOWN_US, is_doubtful: false };
}

/// Some operators, one behind the other.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Work {
    first: usize,
    pub(super) count: usize,
    pub(super) estimate_us: f64,
}

impl Account {
    /// Another step begins; what is queued stays queued.
    pub(super) fn begin(&mut self) {
        self.next = 0;
    }

    fn next_us(&self) -> f64 {
        self.times.get(self.next).unwrap_or(&Timed::UNKNOWN).us
    }

    /// The most work between two marks.
    fn range_us(budget_us: f64) -> f64 {
        (budget_us / MARKS).min(MOST_BETWEEN_MARKS_US)
    }

    /// Whether the clock is to be looked at before the next operator.
    pub(super) fn wants_look(&self, budget_us: f64) -> bool {
        self.marked.is_empty() && self.open.estimate_us + self.next_us() > Self::range_us(budget_us) * LOOK_AT
    }

    /// A GPU that has passed all marks has computed what there was time for.
    pub(super) fn look(&mut self, now: Instant) {
        if self.marked.is_empty()
            && let Some(before) = self.looked_at.replace(now)
        {
            let gone = now.saturating_duration_since(before);
            self.open.estimate_us = (self.open.estimate_us - gone.as_secs_f64() * 1e6).max(0.0);
        }
    }

    /// Whether a mark is due before the next operator.
    pub(super) fn wants_mark(&self, budget_us: f64) -> bool {
        // A step's last operators and the next one's first are no range.
        let follows = self.open.first + self.open.count == self.next;
        self.open.count > 0
            && (!follows
                || self.open.estimate_us + self.next_us() > Self::range_us(budget_us)
                || (self.marked.is_empty() && self.is_full(budget_us)))
    }

    /// Whether something has to be passed before the next operator.
    pub(super) fn is_full(&self, budget_us: f64) -> bool {
        let queued_us = self.marked_us + self.open.estimate_us;
        (!self.marked.is_empty() || self.open.count > 0) && queued_us + self.next_us() > budget_us
    }

    pub(super) fn mark(&mut self) {
        self.marked_us += self.open.estimate_us;
        self.marked.push_back(std::mem::take(&mut self.open));
    }

    pub(super) fn launch(&mut self) {
        if self.open.count == 0 {
            self.open.first = self.next;
        }
        self.open.estimate_us += self.next_us();
        self.open.count += 1;
        self.next += 1;
    }

    /// The oldest mark was passed by `now`; it took `took_us` since the one before, if that is known.
    pub(super) fn pass(&mut self, took_us: Option<f64>, now: Instant) {
        let Some(work) = self.marked.pop_front() else { return };
        self.looked_at = Some(now);
        // Summed up anew: errors of floats would add up.
        self.marked_us = self.marked.iter().map(|work| work.estimate_us).sum();
        let Some(took_us) = took_us else { return };
        let end = work.first + work.count;
        if self.times.len() < end {
            self.times.resize(end, Timed::UNKNOWN);
        }
        let times = &mut self.times[work.first..end];
        let known_us: f64 = times.iter().map(|time| time.us).sum();
        let is_known = !times.contains(&Timed::UNKNOWN);
        let is_doubtful =
            is_known && took_us > MOST_SURPRISING * known_us && times.iter().any(|time| !time.is_doubtful);
        // What is known of single operators keeps its proportions.
        let factor = if is_doubtful { 1.0 } else { took_us.max(SHORTEST_US) / known_us };
        for time in times {
            *time = Timed { us: time.us * factor, is_doubtful };
        }
    }

    /// Nothing is queued any more.
    pub(super) fn clear(&mut self) {
        self.marked.clear();
        self.marked_us = 0.0;
        self.open = Work::default();
        self.looked_at = None;
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    const BUDGET_US: f64 = 1000.0;

    /// A GPU that computes what it is given in order, each operator in its time, beside a host that takes some time as well.
    struct Gpu {
        account: Account,
        times_us: Vec<f64>,
        begun: Instant,
        now_us: f64,
        /// Operators behind each mark that was not passed, and when each of them is computed.
        marks: VecDeque<Vec<(f64, f64)>>,
        open: Vec<(f64, f64)>,
        /// When all that was launched is computed.
        idle_at_us: f64,
        most_queued_us: f64,
        /// The most that was left behind the last mark.
        most_open_us: f64,
        marks_taken: usize,
    }

    impl Gpu {
        fn new(times_us: Vec<f64>) -> Self {
            Self {
                account: Account::default(),
                times_us,
                begun: Instant::now(),
                now_us: 0.0,
                marks: VecDeque::new(),
                open: Vec::new(),
                idle_at_us: 0.0,
                most_queued_us: 0.0,
                most_open_us: 0.0,
                marks_taken: 0,
            }
        }

        /// One of which it is known what the operators take.
        fn known(times_us: Vec<f64>) -> Self {
            let mut gpu = Self::new(times_us);
            gpu.account.times = gpu.times_us.iter().map(|&us| Timed { us, is_doubtful: false }).collect();
            gpu
        }

        fn now(&self) -> Instant {
            self.begun + Duration::from_secs_f64(self.now_us * 1e-6)
        }

        /// What is left to be computed at this moment.
        fn left_us(&self, work: &[(f64, f64)]) -> f64 {
            work.iter().map(|(us, done_us)| us.min((done_us - self.now_us).max(0.0))).sum()
        }

        /// Notes that the oldest mark was passed.
        fn pass(&mut self, is_timed: bool) {
            let work = self.marks.pop_front().expect("what is full has a mark to wait for");
            let took_us = is_timed.then(|| work.iter().map(|(us, _)| us).sum());
            self.account.pass(took_us, self.now());
        }

        /// A step in which the host does something else for so long before each operator.
        fn step_with(&mut self, is_timed: bool, mut pause_us: impl FnMut(usize) -> f64) {
            self.account.begin();
            for operator in 0..self.times_us.len() {
                self.now_us += pause_us(operator);
                loop {
                    while self.marks.front().is_some_and(|work| self.left_us(work) == 0.0) {
                        self.pass(is_timed);
                    }
                    if !is_timed && self.account.wants_look(BUDGET_US) {
                        self.account.look(self.now());
                    }
                    if self.account.wants_mark(BUDGET_US) {
                        self.account.mark();
                        self.marks.push_back(std::mem::take(&mut self.open));
                        self.marks_taken += 1;
                    }
                    if !self.account.is_full(BUDGET_US) {
                        break;
                    }
                    let oldest = self.marks.front().and_then(|work| work.last());
                    self.now_us = self.now_us.max(oldest.expect("there is a mark to wait for").1);
                }
                self.account.launch();
                let us = self.times_us[operator];
                self.idle_at_us = self.idle_at_us.max(self.now_us) + us;
                self.open.push((us, self.idle_at_us));
                self.most_queued_us = self.most_queued_us.max(self.idle_at_us - self.now_us);
                self.most_open_us = self.most_open_us.max(self.left_us(&self.open));
            }
        }

        /// One that is timed, the host being as fast as can be.
        fn step(&mut self) {
            self.step_with(true, |_| 0.0);
        }

        fn times_us(&self) -> Vec<f64> {
            self.account.times.iter().map(|time| time.us).collect()
        }
    }

    proptest! {
        /// Once times are known, which takes a mark or two: no more than the budget, or one operator that takes longer.
        #[test]
        fn no_more_is_queued_than_the_budget(times_us in prop::collection::vec(1.0..900.0_f64, 1..400)) {
            let longest = times_us.iter().copied().fold(0.0, f64::max);
            let mut gpu = Gpu::new(times_us);
            for _ in 0..8 {
                gpu.step();
            }
            gpu.most_queued_us = 0.0;
            gpu.step();
            prop_assert!(gpu.most_queued_us <= BUDGET_US.max(longest) * 1.001, "{}", gpu.most_queued_us);
        }

        /// Whatever the host does in between: so much is behind the last mark, or one operator that takes longer.
        #[test]
        fn gates_are_no_farther_apart_than_they_may(
            work in prop::collection::vec((1.0..150.0_f64, prop_oneof![Just(0.0), 1.0..100.0_f64, 100.0..5000.0_f64]), 1..400),
        ) {
            let range_us = Account::range_us(BUDGET_US);
            let (times_us, pauses_us): (Vec<f64>, Vec<f64>) = work.into_iter().unzip();
            let mut gpu = Gpu::known(times_us);
            for _ in 0..2 {
                gpu.step_with(false, |operator| pauses_us[operator]);
            }
            prop_assert!(gpu.most_open_us <= range_us * (1.0 + LOOK_AT) * 1.001, "{}", gpu.most_open_us);
            prop_assert!(gpu.most_queued_us <= (BUDGET_US + range_us * LOOK_AT) * 1.001, "{}", gpu.most_queued_us);
        }
    }

    #[test]
    fn short_operators_share_a_mark_once_they_are_known() {
        let mut gpu = Gpu::new(vec![10.0; 400]);
        gpu.step();
        assert!(gpu.marks_taken > 300, "each is timed at first: {}", gpu.marks_taken);
        gpu.step();
        gpu.marks_taken = 0;
        gpu.step();
        assert!((20..=22).contains(&gpu.marks_taken), "{}", gpu.marks_taken);
        // The GPU always has something to do.
        assert!(gpu.most_queued_us > 500.0, "{}", gpu.most_queued_us);
    }

    #[test]
    fn what_the_gpu_had_time_for_needs_no_mark() {
        let mut gpu = Gpu::known(vec![10.0; 100]);
        // The host takes longer for each than the GPU.
        gpu.step_with(false, |_| 12.0);
        assert!(gpu.marks_taken <= 1, "{}", gpu.marks_taken);
        // And then no longer.
        gpu.step_with(false, |_| 1.0);
        assert!(gpu.marks_taken >= 4, "{}", gpu.marks_taken);
    }

    #[test]
    fn a_gpu_that_was_idle_has_not_computed_ahead() {
        let mut gpu = Gpu::known(vec![10.0; 100]);
        gpu.step_with(false, |operator| if operator % 50 == 0 { 1e5 } else { 0.0 });
        assert!(gpu.most_open_us <= Account::range_us(BUDGET_US) * (1.0 + LOOK_AT), "{}", gpu.most_open_us);
    }

    #[test]
    fn operators_that_take_far_longer_are_believed_the_second_time() {
        let (mut account, now) = (Account::default(), Instant::now());
        let mut timed = |took_us| {
            account.begin();
            (0..10).for_each(|_| account.launch());
            account.mark();
            account.pass(Some(took_us), now);
            account.times[3].us.round()
        };
        assert_eq!(timed(100.0), 10.0);
        // The GPU was held up.
        assert_eq!(timed(1e6), 10.0);
        assert_eq!(timed(110.0), 11.0);
        // They take longer.
        assert_eq!(timed(1e6), 11.0);
        assert_eq!(timed(1e6), 1e5);
        assert_eq!(timed(100.0), 10.0);
    }

    #[test]
    fn times_follow_the_gpu() {
        let mut gpu = Gpu::new(vec![10.0; 100]);
        gpu.step();
        gpu.step();
        gpu.times_us = vec![30.0; 100];
        for _ in 0..3 {
            gpu.step();
        }
        let known = &gpu.times_us()[..90];
        assert!(known.iter().all(|time| (time - 30.0).abs() < 1.0), "{known:?}");
    }

    #[test]
    fn without_a_budget_every_operator_is_waited_for() {
        let (mut account, now) = (Account::default(), Instant::now());
        for _ in 0..10 {
            assert!(!account.is_full(0.0));
            account.launch();
            assert!(account.wants_mark(0.0));
            account.mark();
            assert!(account.is_full(0.0));
            account.pass(Some(5.0), now);
        }
        assert!(account.times.iter().all(|time| time.us == 5.0));
    }
}
