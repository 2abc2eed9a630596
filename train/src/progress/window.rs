use std::collections::VecDeque;
use std::time::Duration;

/// The last steps, for rates that follow what happens.
#[derive(Debug, Clone)]
pub(super) struct Window {
    length: Duration,
    /// From here on every step is in `steps`.
    complete_since: Duration,
    /// When each ended, and the rows of it.
    steps: VecDeque<(Duration, u64)>,
}

/// However long the window: fast steps are enough in a shorter one.
const MOST_STEPS: usize = 1024;

impl Window {
    pub(super) fn new(at: Duration, length: Duration) -> Window {
        Window { length, complete_since: at, steps: VecDeque::new() }
    }

    pub(super) fn push(&mut self, at: Duration, samples: u64) {
        let begin = at.saturating_sub(self.length);
        while self.steps.front().is_some_and(|(ended, _)| *ended <= begin) || self.steps.len() == MOST_STEPS {
            if let Some((ended, _)) = self.steps.pop_front() {
                self.complete_since = self.complete_since.max(ended);
            }
        }
        self.steps.push_back((at, samples));
    }

    /// Steps and rows for each second of the window that ends at `at`.
    #[allow(clippy::cast_precision_loss)] // a rate needs no more than 53 bits
    pub(super) fn rates(&self, at: Duration) -> (f64, f64) {
        let begin = at.saturating_sub(self.length).max(self.complete_since);
        let seconds = at.saturating_sub(begin).as_secs_f64();
        if seconds == 0.0 {
            return (0.0, 0.0);
        }
        let (mut steps, mut samples) = (0.0, 0.0);
        for (_, step_samples) in self.steps.iter().filter(|(ended, _)| begin < *ended && *ended <= at) {
            steps += 1.0;
            samples += *step_samples as f64;
        }
        (steps / seconds, samples / seconds)
    }
}
