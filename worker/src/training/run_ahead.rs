//! How much of a step a GPU has before it.
//!
//! Operators are launched faster than a GPU computes them. What is queued when a step is told to end is computed all the
//! same, so no more is queued than some time's worth: behind every so much work the stream takes a mark, and nothing more
//! is launched while the marks that it has not passed, and what follows them, stand for more. How long operators take is
//! known from marks that are timed; steps of whole batches, or of whole epochs, are alike. Where operators take the host
//! longer than the GPU, nothing is queued, and there are few marks.
//!
//! A step that may be held has a gate behind every mark, which the stop word closes. The GPU stands still at the next one
//! then, with all that is queued behind it, and goes on from there: nothing is computed twice, and much more may be queued.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use pswitch_device::{DeviceError, GpuMoment, GpuStream, GpuWay};
use pswitch_protocol::{control, monotonic_ns};

use super::Pace;
use super::account::Account;
use super::pace::{Listener, Stood, stand_still};

/// The steps that are timed: the first ones, and one of so many after them. A time stamp costs the host as much as a mark.
const TIMED_AT_FIRST: u32 = 4;
const TIMED_EVERY: u32 = 32;

/// What was seen of a GPU that stands still counts if it is so again after this long: it may have been on its way through.
const SEEN_TWICE_AFTER: Duration = Duration::from_micros(10);

/// How often it is made sure, while a word is waited for, that the GPU has not failed: it writes nothing then.
const CHECK_EVERY: Duration = Duration::from_millis(2);

/// Estimates that outlive a step, and the marks.
#[derive(Debug, Default)]
pub(crate) struct RunAhead {
    account: Account,
    timing: Timing,
    /// For marks that were not passed, in their order, when that will be, if they are timed.
    marks: VecDeque<Option<GpuMoment>>,
    spare: Vec<GpuMoment>,
    /// The mark that was passed last, if it was timed.
    passed: Option<GpuMoment>,
    /// The number of the last mark.
    taken: u32,
}

/// Which steps are timed.
#[derive(Debug, Default)]
struct Timing {
    /// Steps that were, and those begun since the last one.
    timed: u32,
    since: u32,
    is_on: bool,
}

impl Timing {
    /// Another step begins. One of fewer rows takes less time than the next will.
    fn begin(&mut self, is_whole: bool) {
        self.since = self.since.saturating_add(1);
        self.is_on = is_whole && (self.timed < TIMED_AT_FIRST || self.since >= TIMED_EVERY);
        if self.is_on {
            (self.timed, self.since) = (self.timed.saturating_add(1), 0);
        }
    }
}

/// How a task keeps what is queued short.
#[derive(Clone, Copy)]
pub(crate) struct Bounds<'a> {
    /// The most that is queued. An hour or more is no bound, and there are no marks.
    pub(crate) budget: Duration,
    /// Where marks are seen to be passed, with gates where a step may be held.
    pub(crate) way: &'a GpuWay,
}

impl RunAhead {
    /// Watches over steps on a stream until it is dropped or [ended](GpuPace::end). The listener is told when the GPU stands
    /// still, and when it has done all that was launched of a step that ends.
    pub(crate) fn watch<'a>(
        &'a mut self,
        stream: &'a GpuStream,
        stop: &'a AtomicU32,
        Bounds { budget, way }: Bounds<'a>,
        listener: &'a Listener<'a>,
        stood: &'a Stood,
    ) -> GpuPace<'a> {
        // All that was enqueued before is over, and nobody knows what came since.
        self.account.clear();
        self.spare.extend(self.marks.drain(..).flatten());
        self.spare.extend(self.passed.take());
        self.taken = way.reached();
        let budget_us = (budget < Duration::from_secs(3600)).then_some(budget.as_secs_f64() * 1e6);
        let state = Mutex::new(State { ahead: self, stopped_ns: None, failure: None });
        GpuPace { stream, stop, budget_us, way, listener, stood, state }
    }

    /// Another step begins. Between the steps is the optimizer, which is no operator of either.
    fn begin(&mut self, is_whole: bool, way: &GpuWay) {
        self.catch_up(way);
        self.spare.extend(self.passed.take());
        self.account.begin();
        self.timing.begin(is_whole);
    }

    fn mark(&mut self, stream: &GpuStream, way: &GpuWay) -> Result<(), DeviceError> {
        let moment = self.moment(stream)?;
        self.marks.push_back(moment);
        self.taken = self.taken.wrapping_add(1);
        stream.pass(way, self.taken)?;
        self.account.mark();
        Ok(())
    }

    /// As [`mark`](Self::mark), with something in front of the gate that computes nothing.
    fn arrive(&mut self, stream: &GpuStream, way: &GpuWay) -> Result<(), DeviceError> {
        self.marks.push_back(None);
        self.taken = self.taken.wrapping_add(1);
        stream.arrive(way, self.taken)?;
        self.account.mark();
        Ok(())
    }

    fn depart(&mut self, stream: &GpuStream, way: &GpuWay) -> Result<(), DeviceError> {
        stream.depart(way, self.taken)?;
        let moment = self.moment(stream)?;
        match self.marks.back_mut() {
            Some(mark) => *mark = moment,
            None => self.spare.extend(moment.and_then(|moment| self.passed.replace(moment))),
        }
        Ok(())
    }

    /// The time when the stream gets here, in a step that is timed.
    fn moment(&mut self, stream: &GpuStream) -> Result<Option<GpuMoment>, DeviceError> {
        if !self.timing.is_on {
            return Ok(None);
        }
        let moment = self.spare.pop().map_or_else(|| GpuMoment::new(stream), Ok)?;
        stream.mark(&moment)?;
        Ok(Some(moment))
    }

    /// Notes the marks that the GPU has passed.
    fn catch_up(&mut self, way: &GpuWay) {
        if self.marks.is_empty() {
            return;
        }
        // Far fewer than half of all numbers are under way.
        let ahead = self.taken.wrapping_sub(way.reached());
        let ahead = usize::try_from(ahead).unwrap_or(usize::MAX);
        while self.marks.len() > ahead
            && let Some(moment) = self.marks.pop_front()
        {
            let took_us = match (&moment, &self.passed) {
                // Both are passed, and a time that cannot be told is no reason to end.
                (Some(moment), Some(before)) => moment.us_since(before).ok(),
                _ => None,
            };
            self.account.pass(took_us, Instant::now());
            self.spare.extend(std::mem::replace(&mut self.passed, moment));
        }
    }

    /// Whether nothing computes: the GPU has done all that is in front of a gate, and is not through.
    fn stands_still(&mut self, way: &GpuWay) -> bool {
        self.catch_up(way);
        self.marks.is_empty() || way.is_at_gate()
    }
}

/// Keeps what is queued on a GPU short, and stops or stands still when told to.
pub(crate) struct GpuPace<'a> {
    stream: &'a GpuStream,
    stop: &'a AtomicU32,
    budget_us: Option<f64>,
    way: &'a GpuWay,
    listener: &'a Listener<'a>,
    stood: &'a Stood,
    state: Mutex<State<'a>>,
}

/// Somebody who waits for a word that the GPU writes.
struct Check<'a> {
    stream: &'a GpuStream,
    at: Instant,
}

impl<'a> Check<'a> {
    fn new(stream: &'a GpuStream) -> Self {
        Self { stream, at: Instant::now() }
    }

    /// An error if anything that was launched has failed, which is looked after now and then.
    fn due(&mut self) -> Result<(), DeviceError> {
        if self.at.elapsed() >= CHECK_EVERY {
            self.stream.is_idle()?;
            self.at = Instant::now();
        }
        Ok(())
    }
}

struct State<'a> {
    ahead: &'a mut RunAhead,
    /// When the GPU had done all that was queued, once it was told to end.
    stopped_ns: Option<u64>,
    /// What the driver refused.
    failure: Option<DeviceError>,
}

impl<'a> GpuPace<'a> {
    /// When the GPU was done after a stop, on `CLOCK_MONOTONIC`; nothing if there was none.
    ///
    /// # Errors
    /// What the driver refused on the way: the step has ended for that, then.
    pub(crate) fn end(self) -> Result<Option<u64>, DeviceError> {
        let state = self.state.into_inner().unwrap_or_else(PoisonError::into_inner);
        state.failure.map_or(Ok(state.stopped_ns), Err)
    }

    fn state(&self) -> MutexGuard<'_, State<'a>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether it is to end, once it need not stand still any more.
    fn is_told_to_end(&self, ahead: &mut RunAhead) -> Result<bool, DeviceError> {
        match self.stop.load(Ordering::Relaxed) {
            control::GO_ON => Ok(false),
            told if control::is_hold(told) => {
                self.stand_still(ahead)?;
                Ok(self.stop.load(Ordering::Relaxed) == control::END)
            }
            _ => Ok(true),
        }
    }

    /// Launches nothing for as long as it is told to stand still, and says when the GPU does.
    fn stand_still(&self, ahead: &mut RunAhead) -> Result<(), DeviceError> {
        // Without a bound nothing is counted, and a mark alone says when all is computed. A GPU that has passed its last gate
        // stands in front of another then.
        ahead.catch_up(self.way);
        if ahead.account.open.count > 0 || ahead.marks.is_empty() || self.budget_us.is_none() {
            ahead.mark(self.stream, self.way)?;
        }
        let (mut failure, mut last) = (Ok(()), None);
        self.stood.add(stand_still(self.stop, |told| {
            if failure.is_ok() {
                failure = self.tell_when_still(ahead, told, &mut last);
            }
        }));
        failure?;
        // What comes next has waited: it tells nothing of how long it takes.
        ahead.spare.extend(ahead.passed.take());
        Ok(())
    }

    /// Tells when nothing computes any more, or returns when the stop word has changed. `last` is where the GPU stood still
    /// last, and since when: if it is there still, it has not gone on in between.
    fn tell_when_still(
        &self,
        ahead: &mut RunAhead,
        told: u32,
        last: &mut Option<(u32, u64)>,
    ) -> Result<(), DeviceError> {
        let is_told = || self.stop.load(Ordering::Relaxed) == told;
        let noticed_ns = monotonic_ns();
        let mut check = Check::new(self.stream);
        while is_told() {
            check.due()?;
            if ahead.stands_still(self.way) {
                let now_ns = monotonic_ns();
                std::thread::sleep(SEEN_TWICE_AFTER);
                if ahead.stands_still(self.way) && is_told() {
                    let there = self.way.reached();
                    let since_ns = last.filter(|(at, _)| *at == there).map_or(now_ns, |(_, since)| since);
                    *last = Some((there, since_ns));
                    (self.listener.held)(since_ns);
                    tracing::debug!(
                        operator = ahead.account.next,
                        marks = ahead.marks.len(),
                        noticed_ns,
                        since_ns,
                        "stands still"
                    );
                    return Ok(());
                }
            }
            std::hint::spin_loop();
        }
        Ok(())
    }

    /// Lets the next operator be launched, when there is room for it. False if the step is to end instead.
    fn admit(&self, state: &mut State<'_>) -> Result<bool, DeviceError> {
        let ahead = &mut *state.ahead;
        let mut check = None;
        loop {
            if self.is_told_to_end(ahead)? {
                return Ok(false);
            }
            let Some(budget_us) = self.budget_us else { return Ok(true) };
            ahead.catch_up(self.way);
            // Steps that are timed need their marks whatever the GPU had time for.
            if !ahead.timing.is_on && ahead.account.wants_look(budget_us) {
                ahead.account.look(Instant::now());
            }
            if ahead.account.wants_mark(budget_us) {
                ahead.mark(self.stream, self.way)?;
            }
            if !ahead.account.is_full(budget_us) {
                ahead.account.launch();
                return Ok(true);
            }
            check.get_or_insert_with(|| Check::new(self.stream)).due()?;
            std::hint::spin_loop();
        }
    }

    /// Waits for all that was launched. False if the step is to end instead.
    fn drain(&self, state: &mut State<'_>) -> Result<bool, DeviceError> {
        let ahead = &mut *state.ahead;
        ahead.mark(self.stream, self.way)?;
        let mut check = Check::new(self.stream);
        loop {
            if self.is_told_to_end(ahead)? {
                return Ok(false);
            }
            ahead.catch_up(self.way);
            if ahead.marks.is_empty() {
                return Ok(true);
            }
            check.due()?;
            std::hint::spin_loop();
        }
    }

    /// Does something ahead of which the step may end; true if it is to. Whatever was launched is over then.
    fn ends(&self, ask: impl FnOnce(&mut State<'_>) -> Result<bool, DeviceError>) -> bool {
        let mut state = self.state();
        if state.stopped_ns.is_some() || state.failure.is_some() {
            return true;
        }
        match ask(&mut state) {
            Ok(true) => return false,
            Ok(false) => match self.stream.synchronize() {
                Ok(()) => {
                    let now_ns = monotonic_ns();
                    state.stopped_ns = Some(now_ns);
                    (self.listener.left)(now_ns);
                }
                Err(error) => state.failure = Some(error),
            },
            Err(error) => state.failure = Some(error),
        }
        true
    }
}

impl Pace for GpuPace<'_> {
    fn begin(&self, is_whole: bool) {
        self.state().ahead.begin(is_whole, self.way);
    }

    fn stops(&self) -> bool {
        self.ends(|state| self.admit(state))
    }

    fn rests(&self) {
        let mut state = self.state();
        if state.failure.is_some() {
            return;
        }
        let bound = self.budget_us;
        let marked = bound.map_or(Ok(()), |_| state.ahead.mark(self.stream, self.way));
        // What cannot end goes on, though it is told to.
        state.failure = marked.and_then(|()| self.is_told_to_end(state.ahead)).err();
    }

    fn arrives(&self) {
        let mut state = self.state();
        if state.failure.is_none() && self.budget_us.is_some() {
            state.failure = state.ahead.arrive(self.stream, self.way).err();
        }
    }

    fn departs(&self) {
        let mut state = self.state();
        if state.failure.is_none() && self.budget_us.is_some() {
            state.failure = state.ahead.depart(self.stream, self.way).err();
        }
    }

    fn finishes(&self) -> bool {
        self.ends(|state| self.drain(state))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many rows a step has must not tell how long the others take, however often the two fall together.
    #[test]
    fn steps_of_whole_batches_are_timed_and_no_others() {
        for per_epoch in [1, 2, 5, 32, 100] {
            let mut timing = Timing::default();
            let mut timed = Vec::new();
            for step in 1..=400 {
                let is_whole = per_epoch == 1 || step % per_epoch != 0;
                timing.begin(is_whole);
                assert!(is_whole || !timing.is_on, "step {step} of {per_epoch}");
                timed.extend(timing.is_on.then_some(step));
            }
            assert!(timed[3] <= 8, "{timed:?}");
            assert!(timed[3..].windows(2).all(|pair| (32..=33).contains(&(pair[1] - pair[0]))), "{timed:?}");
        }
    }
}
