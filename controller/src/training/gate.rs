//! Who has the device: requests, or training.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use mio::Waker;
use pswitch_device::SharedMemory;
use pswitch_protocol::{control, monotonic_ns};

/// Closed while there are requests. To close it sets the stop word of the task that trains at once, on the thread that
/// closes: nobody has to wake up first.
#[derive(Debug)]
pub(crate) struct Gate {
    /// Whether a task that trains is to stand still for requests, or to end its step.
    holds: bool,
    /// How often one was told to stand still.
    held: AtomicU32,
    closed: AtomicBool,
    /// `CLOCK_MONOTONIC` when it was closed last, in nanoseconds.
    closed_ns: AtomicU64,
    /// `CLOCK_MONOTONIC` when it was opened last, in nanoseconds.
    opened_ns: AtomicU64,
    /// The block of the worker that trains, or [`NOBODY`].
    current: AtomicU64,
    /// Whether a task could compute, and how long one of its steps takes, in microseconds.
    wanted: AtomicBool,
    step_us: AtomicU64,
    control: SharedMemory,
    waker: Arc<Waker>,
}

const NOBODY: u64 = u64::MAX;

/// Requests that follow each other sooner find the device free: what is computed between them is in their way.
pub(super) const LINGER: Duration = Duration::from_millis(5);

impl Gate {
    /// An open one over the control page of training workers. The waker is told of changes. If it `holds`, tasks stand still
    /// for requests; else their steps end.
    pub(super) fn new(control: SharedMemory, waker: Arc<Waker>, holds: bool) -> Self {
        Self {
            holds,
            held: AtomicU32::new(0),
            closed: AtomicBool::new(false),
            closed_ns: AtomicU64::new(0),
            opened_ns: AtomicU64::new(0),
            current: AtomicU64::new(NOBODY),
            wanted: AtomicBool::new(false),
            step_us: AtomicU64::new(0),
            control,
            waker,
        }
    }

    /// Requests have the device from now on.
    pub(crate) fn close(&self) {
        if !self.closed.swap(true, Ordering::SeqCst) {
            // First: a task that stands still says so to somebody who looks here.
            self.closed_ns.store(monotonic_ns(), Ordering::SeqCst);
            let stops = self.stop(true);
            if stops {
                self.wake();
            }
        }
    }

    /// When requests took the device last, on `CLOCK_MONOTONIC`.
    pub(super) fn closed_ns(&self) -> u64 {
        self.closed_ns.load(Ordering::SeqCst)
    }

    /// Training may have it, in a little while.
    pub(crate) fn open(&self) {
        // The driver alone opens and closes. One that is open stays as it is: training may be under way.
        if self.closed.load(Ordering::SeqCst) {
            self.opened_ns.store(monotonic_ns(), Ordering::SeqCst);
            self.closed.store(false, Ordering::SeqCst);
            self.wake();
        }
    }

    /// Training may have it at once, though there are requests or were a moment ago.
    pub(crate) fn open_for_a_turn(&self) {
        self.opened_ns.store(0, Ordering::SeqCst);
        self.closed.store(false, Ordering::SeqCst);
        self.wake();
    }

    /// Says whether a task could compute, and how long one of its steps takes. True if one could until now, and none can.
    pub(super) fn want(&self, wanted: bool, step: Duration) -> bool {
        self.step_us.store(u64::try_from(step.as_micros()).unwrap_or(u64::MAX), Ordering::Relaxed);
        self.wanted.swap(wanted, Ordering::Relaxed) && !wanted
    }

    /// Whether a task could compute, and how long one of its steps takes, as far as that is known.
    pub(crate) fn wanted(&self) -> (bool, Duration) {
        let step = Duration::from_micros(self.step_us.load(Ordering::Relaxed));
        (self.wanted.load(Ordering::Relaxed), step)
    }

    /// In what time training may have the device, if no request comes meanwhile; nothing while there are some.
    pub(super) fn opens_in(&self) -> Option<Duration> {
        if self.is_closed() {
            return None;
        }
        let open = monotonic_ns().saturating_sub(self.opened_ns.load(Ordering::SeqCst));
        Some(LINGER.saturating_sub(Duration::from_nanos(open)))
    }

    pub(super) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst)
    }

    /// Lets the worker of a block train, before it is told to. Should requests have come meanwhile, it stops at once.
    pub(super) fn admit(&self, block: u64) {
        self.current.store(block, Ordering::SeqCst);
        if let Some(word) = self.word(block)
            && !self.is_closed()
        {
            word.store(control::GO_ON, Ordering::SeqCst);
        }
        if self.is_closed() {
            self.stop(false);
        }
    }

    /// Lets the worker of a block go on that was told to stand still by requests that are over already: nobody may have noticed.
    pub(super) fn let_on(&self, block: u64) {
        if self.word(block).is_some_and(|word| control::is_hold(word.load(Ordering::SeqCst))) {
            self.admit(block);
        }
    }

    /// Has whoever trains stand still, if he does not yet.
    pub(super) fn hold(&self) {
        self.stop(false);
    }

    /// Has whoever trains stand still for requests, or end his step, as the gate does, unless he is to end it anyway; false if
    /// nobody trains. One who stands still since other requests is told so anew if it is `another` time.
    fn stop(&self, another: bool) -> bool {
        let Some(word) = self.word(self.current.load(Ordering::SeqCst)) else { return false };
        let told = if self.holds {
            control::HOLD | (self.held.fetch_add(1, Ordering::SeqCst) & !control::HOLD)
        } else {
            control::END
        };
        let tell = |now| (now == control::GO_ON || (another && control::is_hold(now))).then_some(told);
        // What it was before does not matter.
        let _ = word.fetch_update(Ordering::SeqCst, Ordering::SeqCst, tell);
        true
    }

    /// Whether there is somebody who is to stand still for requests.
    pub(crate) fn somebody_trains(&self) -> bool {
        self.holds && self.current.load(Ordering::SeqCst) != NOBODY
    }

    /// Whether requests need not wait for whoever trains: nobody does, or it is told to end, or its GPU has come to a gate
    /// and stands still, unless it is on its way through.
    pub(crate) fn stands_still(&self) -> bool {
        let block = self.current.load(Ordering::SeqCst);
        if !self.holds || block == NOBODY {
            return true;
        }
        let word = |offset| self.control.word(block + offset).map(|word| word.load(Ordering::SeqCst)).ok();
        word(control::STOP) == Some(control::END) || word(control::REACHED) != word(control::PASSED)
    }

    /// Has whoever trains end.
    pub(super) fn interrupt(&self) {
        if let Some(word) = self.word(self.current.load(Ordering::SeqCst)) {
            word.store(control::END, Ordering::SeqCst);
        }
    }

    /// Nobody trains.
    pub(super) fn vacate(&self) {
        self.current.store(NOBODY, Ordering::SeqCst);
    }

    /// The stop word of a block, unless that is nobody's.
    fn word(&self, block: u64) -> Option<&AtomicU32> {
        (block != NOBODY).then(|| self.control.word(block + control::STOP).ok()).flatten()
    }

    fn wake(&self) {
        if let Err(error) = self.waker.wake() {
            tracing::error!(%error, "training cannot be woken");
        }
    }
}

#[cfg(test)]
mod tests {
    use mio::{Poll, Token};

    use super::*;

    fn gate(holds: bool) -> (Gate, Poll) {
        let poll = Poll::new().unwrap();
        let waker = Arc::new(Waker::new(poll.registry(), Token(0)).unwrap());
        let page = SharedMemory::create("pswitch-test", 2 * control::BLOCK_BYTES).unwrap();
        (Gate::new(page, waker, holds), poll)
    }

    #[test]
    fn whoever_trains_stands_still_between_coming_to_a_gate_and_going_through() {
        for holds in [true, false] {
            let (gate, _poll) = gate(holds);
            let write = |offset, number| {
                gate.control.word(control::BLOCK_BYTES + offset).unwrap().store(number, Ordering::SeqCst);
            };
            assert!(gate.stands_still() && !gate.somebody_trains(), "nobody trains");
            gate.admit(control::BLOCK_BYTES);
            assert_eq!((gate.stands_still(), gate.somebody_trains()), (!holds, holds));
            write(control::REACHED, 7);
            assert!(gate.stands_still());
            write(control::PASSED, 7);
            assert_eq!(gate.stands_still(), !holds);
            gate.interrupt();
            assert!(gate.stands_still(), "gates are open for one who is to end");
            gate.vacate();
            assert!(gate.stands_still());
        }
    }

    fn told(gate: &Gate) -> u32 {
        gate.word(control::BLOCK_BYTES).unwrap().load(Ordering::SeqCst)
    }

    #[test]
    fn whoever_trains_is_told_as_the_gate_is() {
        for holds in [true, false] {
            let (gate, _poll) = gate(holds);
            let is_told = || if holds { control::is_hold(told(&gate)) } else { told(&gate) == control::END };
            gate.admit(control::BLOCK_BYTES);
            assert_eq!(told(&gate), control::GO_ON);
            gate.close();
            assert!(is_told());
            // Requests came before it was let in.
            gate.admit(control::BLOCK_BYTES);
            assert!(is_told());
            gate.open();
            gate.admit(control::BLOCK_BYTES);
            assert_eq!(told(&gate), control::GO_ON);
            gate.vacate();
            gate.close();
            assert_eq!(told(&gate), control::GO_ON, "nobody trains");
        }
    }

    #[test]
    fn a_turn_begins_at_once_whether_requests_are_there_or_have_just_gone() {
        for has_gone in [false, true] {
            let (gate, _poll) = gate(true);
            gate.close();
            if has_gone {
                gate.open();
                assert!(gate.opens_in().is_some_and(|rest| !rest.is_zero()));
            }
            gate.open_for_a_turn();
            assert_eq!(gate.opens_in(), Some(Duration::ZERO));
        }
    }

    #[test]
    fn whoever_stands_still_is_told_anew_for_other_requests_only() {
        let (gate, _poll) = gate(true);
        gate.admit(control::BLOCK_BYTES);
        gate.close();
        let first = told(&gate);
        gate.hold();
        assert_eq!(told(&gate), first);
        // It was not let in before the next came.
        gate.open();
        gate.close();
        assert!(control::is_hold(told(&gate)) && told(&gate) != first);
        // Nobody has noticed any of that.
        gate.let_on(control::BLOCK_BYTES);
        assert!(control::is_hold(told(&gate)), "there are requests");
        gate.open();
        gate.let_on(control::BLOCK_BYTES);
        assert_eq!(told(&gate), control::GO_ON);
    }

    #[test]
    fn whoever_is_to_end_does_though_requests_come() {
        let (gate, _poll) = gate(true);
        gate.admit(control::BLOCK_BYTES);
        gate.interrupt();
        gate.close();
        assert_eq!(told(&gate), control::END);
        gate.open();
        gate.let_on(control::BLOCK_BYTES);
        gate.close();
        gate.interrupt();
        assert_eq!(told(&gate), control::END);
    }
}
