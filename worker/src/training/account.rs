//! The account of what a GPU has before it: pure, by estimates of what operators take.

use std::collections::VecDeque;

/// Marks cost some microseconds each: there is one behind as much work as is a fifth of what may be queued ...
const MARKS: f64 = 5.0;

/// ... and no more than this: a GPU that is to stand still computes so long.
const MOST_BETWEEN_MARKS_US: f64 = 500.0;

/// What an operator is taken for that was never timed.
const UNKNOWN_US: f64 = 250.0;

/// Operators that were timed before and take so many times as long are not believed.
const MOST_SURPRISING: f64 = 20.0;

/// Less than what the GPU's clock can tell.
const SHORTEST_US: f64 = 0.1;

/// The account of what is queued, by estimates.
#[derive(Debug, Default)]
pub(super) struct Account {
    /// The next operator of the step.
    pub(super) next: usize,
    /// What every operator of a step took last, as far as it is known.
    times_us: Vec<f64>,
    /// Work up to marks that were not seen to be passed, oldest first, and how long it takes in all.
    marked: VecDeque<Work>,
    marked_us: f64,
    /// Work behind the last mark, of which some may be computed.
    pub(super) open: Work,
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
        self.times_us.get(self.next).copied().unwrap_or(UNKNOWN_US)
    }

    /// Whether a mark is due before the next operator.
    pub(super) fn wants_mark(&self, budget_us: f64) -> bool {
        // A step's last operators and the next one's first are no range.
        let follows = self.open.first + self.open.count == self.next;
        self.open.count > 0
            && (!follows
                || self.open.estimate_us + self.next_us() > (budget_us / MARKS).min(MOST_BETWEEN_MARKS_US)
                || (self.marked.is_empty() && self.is_full(budget_us)))
    }

    /// Whether something has to be passed before the next operator.
    pub(super) fn is_full(&self, budget_us: f64) -> bool {
        let queued_us = self.marked_us + self.open.estimate_us;
        (!self.marked.is_empty() || self.open.count > 0) && queued_us + self.next_us() > budget_us
    }

    /// So much time has gone by for a GPU that had passed the last mark: as much of what follows it is computed, if there is.
    pub(super) fn elapse(&mut self, us: f64) {
        self.open.estimate_us = (self.open.estimate_us - us).max(0.0);
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

    /// The oldest mark was passed; it took `took_us` since the one before, if that is known.
    pub(super) fn pass(&mut self, took_us: Option<f64>) {
        let Some(work) = self.marked.pop_front() else { return };
        // Summed up anew: errors of floats would add up.
        self.marked_us = self.marked.iter().map(|work| work.estimate_us).sum();
        let Some(took_us) = took_us else { return };
        let end = work.first + work.count;
        if self.times_us.len() < end {
            self.times_us.resize(end, UNKNOWN_US);
        }
        // What is known of single operators keeps its proportions.
        let times = &mut self.times_us[work.first..end];
        let known_us: f64 = times.iter().sum();
        // The GPU may have stood still without anybody having noticed.
        let is_known = !times.contains(&UNKNOWN_US);
        if is_known && took_us > MOST_SURPRISING * known_us {
            return;
        }
        for time in times {
            *time *= took_us.max(SHORTEST_US) / known_us;
        }
    }

    /// Nothing is queued any more.
    pub(super) fn clear(&mut self) {
        self.marked.clear();
        self.marked_us = 0.0;
        self.open = Work::default();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const BUDGET_US: f64 = 1000.0;

    /// A GPU that computes what it is given in order, each operator in its time; time passes only while it is waited for.
    struct Gpu {
        account: Account,
        times_us: Vec<f64>,
        /// Operators behind each mark that was not passed.
        marks: VecDeque<Vec<usize>>,
        open: Vec<usize>,
        most_queued_us: f64,
        marks_taken: usize,
    }

    impl Gpu {
        fn new(times_us: Vec<f64>) -> Self {
            let (marks, open) = (VecDeque::new(), Vec::new());
            Self { account: Account::default(), times_us, marks, open, most_queued_us: 0.0, marks_taken: 0 }
        }

        fn us(&self, operators: &[usize]) -> f64 {
            operators.iter().map(|&operator| self.times_us[operator]).sum()
        }

        fn step(&mut self) {
            self.account.begin();
            for operator in 0..self.times_us.len() {
                loop {
                    if self.account.wants_mark(BUDGET_US) {
                        self.account.mark();
                        self.marks.push_back(std::mem::take(&mut self.open));
                        self.marks_taken += 1;
                    }
                    if !self.account.is_full(BUDGET_US) {
                        break;
                    }
                    let passed = self.marks.pop_front().expect("what is full has a mark to wait for");
                    self.account.pass(Some(self.us(&passed)));
                }
                self.account.launch();
                self.open.push(operator);
                let queued: f64 = self.marks.iter().map(|work| self.us(work)).sum();
                self.most_queued_us = self.most_queued_us.max(queued + self.us(&self.open));
            }
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
        let mut gpu = Gpu::new(vec![100.0; 50]);
        gpu.step();
        gpu.account.clear();
        gpu.account.begin();
        for _ in 0..20 {
            // The host takes longer for each than the GPU.
            gpu.account.elapse(120.0);
            assert!(!gpu.account.wants_mark(BUDGET_US) && !gpu.account.is_full(BUDGET_US));
            gpu.account.launch();
        }
        // And then no longer.
        for _ in 0..10 {
            gpu.account.launch();
        }
        assert!(gpu.account.wants_mark(BUDGET_US) && gpu.account.is_full(BUDGET_US));
    }

    #[test]
    fn times_of_operators_that_were_held_up_are_not_believed() {
        let mut gpu = Gpu::new(vec![10.0; 40]);
        gpu.step();
        gpu.step();
        let known = gpu.account.times_us.clone();
        gpu.times_us = vec![1e6; 40];
        gpu.step();
        assert_eq!(gpu.account.times_us[..30], known[..30]);
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
        let known = &gpu.account.times_us[..90];
        assert!(known.iter().all(|time| (time - 30.0).abs() < 1.0), "{known:?}");
    }

    #[test]
    fn without_a_budget_every_operator_is_waited_for() {
        let mut account = Account::default();
        for _ in 0..10 {
            assert!(!account.is_full(0.0));
            account.launch();
            assert!(account.wants_mark(0.0));
            account.mark();
            assert!(account.is_full(0.0));
            account.pass(Some(5.0));
        }
        assert_eq!(account.times_us, [5.0; 10]);
    }
}
