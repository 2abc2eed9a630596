//! Points in a copy stream: who notices that they have passed, and what must live until then.

use std::cell::Cell;
use std::collections::VecDeque;
use std::ptr;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::context::{Context, RawStream, log_failure};
use super::driver::{check, sys};
use crate::clock::make_timers_exact;
use crate::{DeviceError, DeviceMemory, Event, PinnedMemory};

/// A wait looks again after this long, then after twice as long ...
const FIRST_PAUSE: Duration = Duration::from_micros(5);
/// ... up to this. It bounds how late a wait notices; looking takes about a microsecond.
const LONGEST_PAUSE: Duration = Duration::from_micros(20);
/// With so many points that nobody looks at, recording another one looks itself.
const UNNOTICED: usize = 256;

/// What enqueued work still uses.
#[derive(Debug, Default)]
pub(super) struct InUse {
    device: Vec<Arc<dyn DeviceMemory>>,
    host: Vec<PinnedMemory>,
}

impl InUse {
    /// Most work uses the memory that the work before it did.
    pub(super) fn keep_device(&mut self, memory: &Arc<dyn DeviceMemory>) {
        let is = |last: &Arc<dyn DeviceMemory>| ptr::addr_eq(Arc::as_ptr(last), Arc::as_ptr(memory));
        if !self.device.last().is_some_and(is) {
            self.device.push(Arc::clone(memory));
        }
    }

    pub(super) fn keep_host(&mut self, memory: &PinnedMemory) {
        if !self.host.last().is_some_and(|last| Arc::ptr_eq(last.memory(), memory.memory())) {
            self.host.push(memory.clone());
        }
    }

    pub(super) fn len(&self) -> usize {
        self.device.len() + self.host.len()
    }
}

/// The points of a stream that it has not been seen to pass, in order.
///
/// A stream passes them in order, so they are looked at in order, under one lock: no point is seen to have passed before
/// an earlier one.
#[derive(Debug)]
pub(super) struct Timeline {
    context: Arc<Context>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    ahead: VecDeque<Ahead>,
    /// Events whose points have passed, to be recorded anew.
    spare: Vec<RawEvent>,
}

#[derive(Debug)]
struct Ahead {
    event: RawEvent,
    point: Arc<Point>,
    /// What the work before this point, and after the one before, uses.
    in_use: InUse,
}

/// When the stream was seen to have passed, or why it never will. Set once.
#[derive(Debug, Default)]
struct Point {
    passed: OnceLock<Result<Instant, DeviceError>>,
}

impl Timeline {
    pub(super) fn new(context: &Arc<Context>) -> Arc<Self> {
        Arc::new(Self { context: Arc::clone(context), state: Mutex::default() })
    }

    /// Records a point behind all that was enqueued on `stream`, which is always the same.
    ///
    /// `in_use` is emptied if that succeeds.
    pub(super) fn record(
        self: &Arc<Self>,
        stream: sys::CUstream,
        in_use: &mut InUse,
    ) -> Result<CudaEvent, DeviceError> {
        let _entered = self.context.enter()?;
        let (spare, unnoticed) = {
            let mut state = self.state();
            (state.spare.pop(), state.ahead.len())
        };
        if unnoticed >= UNNOTICED {
            self.look()?;
        }
        let event = match spare {
            Some(event) => event,
            None => RawEvent::new(&self.context)?,
        };
        event.record(stream)?;
        let point = Arc::new(Point::default());
        let in_use = std::mem::take(in_use);
        self.state().ahead.push_back(Ahead { event, point: Arc::clone(&point), in_use });
        Ok(CudaEvent { point, timeline: Arc::clone(self) })
    }

    /// Notices all points that have passed.
    fn look(&self) -> Result<(), DeviceError> {
        let mut done = Vec::new();
        let result = self.look_and_collect(&mut done);
        // Outside the lock: what was in use may be freed now.
        drop(done);
        result
    }

    fn look_and_collect(&self, done: &mut Vec<InUse>) -> Result<(), DeviceError> {
        let _entered = self.context.enter()?;
        let mut state = self.state();
        while let Some(next) = state.ahead.front() {
            // SAFETY: the event lives and was recorded.
            match unsafe { sys::cuEventQuery(next.event.raw) } {
                sys::CUresult::CUDA_ERROR_NOT_READY => break,
                result => check("cuEventQuery", result)?,
            }
            if let Some(Ahead { event, point, in_use }) = state.ahead.pop_front() {
                let _ = point.passed.set(Ok(Instant::now()));
                state.spare.push(event);
                done.push(in_use);
            }
        }
        Ok(())
    }

    /// All that was ever enqueued is done, or has failed: every point has passed.
    pub(super) fn end(&self, result: &Result<(), DeviceError>) {
        let ahead = {
            let mut state = self.state();
            let now = Instant::now();
            for next in &state.ahead {
                let _ = next.point.passed.set(result.clone().map(|()| now));
            }
            std::mem::take(&mut state.ahead)
        };
        // Outside the lock, as above.
        drop(ahead);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Changed in steps that cannot panic half-way.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A point in a copy stream.
#[derive(Debug)]
pub(super) struct CudaEvent {
    point: Arc<Point>,
    timeline: Arc<Timeline>,
}

impl CudaEvent {
    /// Lets what is enqueued on a stream from now on wait until the point is passed.
    pub(super) fn hold_up(&self, stream: &RawStream) -> Result<(), DeviceError> {
        {
            // Under the lock the event cannot be recorded anew: it stays that of this point.
            let state = self.timeline.state();
            let ahead = state.ahead.iter().rev().find(|ahead| Arc::ptr_eq(&ahead.point, &self.point));
            if let Some(ahead) = ahead {
                let _entered = stream.context().enter()?;
                return ahead.event.hold_up(stream.raw());
            }
        }
        // It was seen to have passed, unless its stream failed.
        self.is_complete().map(|_| ())
    }
}

impl Event for CudaEvent {
    fn is_complete(&self) -> Result<bool, DeviceError> {
        if self.point.passed.get().is_none() {
            self.timeline.look()?;
        }
        match self.point.passed.get() {
            Some(passed) => passed.clone().map(|_| true),
            None => Ok(false),
        }
    }

    /// Looks again and again, since CUDA's own wait knows no deadline.
    fn wait(&self, deadline: Instant) -> Result<(), DeviceError> {
        let began = Instant::now();
        let mut pause = FIRST_PAUSE;
        while !self.is_complete()? {
            let now = Instant::now();
            if now >= deadline {
                return Err(DeviceError::TimedOut { what: "an event", waited: now - began });
            }
            sleep_exactly(pause.min(deadline - now));
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
        Ok(())
    }

    fn completed_at(&self) -> Option<Instant> {
        self.point.passed.get().and_then(|passed| passed.as_ref().ok().copied())
    }
}

/// Without the 50 us by which the system may delay the end of a sleep.
fn sleep_exactly(pause: Duration) {
    thread_local! {
        static IS_EXACT: Cell<bool> = const { Cell::new(false) };
    }
    if !IS_EXACT.replace(true) {
        make_timers_exact();
    }
    thread::sleep(pause);
}

/// An event of the driver, without the time stamps that would make it dearer.
#[derive(Debug)]
struct RawEvent {
    raw: sys::CUevent,
    context: Arc<Context>,
}

// SAFETY: an event is a handle of the driver, whose functions may be called from any thread.
unsafe impl Send for RawEvent {}
// SAFETY: as above, also at the same time.
unsafe impl Sync for RawEvent {}

impl RawEvent {
    fn new(context: &Arc<Context>) -> Result<Self, DeviceError> {
        let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
        let mut raw = ptr::null_mut();
        let _entered = context.enter()?;
        // SAFETY: `raw` is written during the call; the event is destroyed in `drop`.
        check("cuEventCreate", unsafe { sys::cuEventCreate(&raw mut raw, flags) })?;
        Ok(Self { raw, context: Arc::clone(context) })
    }

    /// Has it stand for the point where a stream of its context is now, which was entered.
    fn record(&self, stream: sys::CUstream) -> Result<(), DeviceError> {
        // SAFETY: event and stream live and belong to one context; nobody looks for the point that it stood for before.
        check("cuEventRecord", unsafe { sys::cuEventRecord(self.raw, stream) })
    }

    /// Lets a stream wait for that point, in the context that was entered.
    fn hold_up(&self, stream: sys::CUstream) -> Result<(), DeviceError> {
        // SAFETY: the event was recorded and lives, and so does the stream; the driver remembers the point, not the event,
        // which may be recorded again afterwards.
        check("cuStreamWaitEvent", unsafe { sys::cuStreamWaitEvent(stream, self.raw, 0) })
    }
}

impl Drop for RawEvent {
    fn drop(&mut self) {
        log_failure(self.context.enter().and_then(|_entered| {
            // SAFETY: made in `new`, used by nobody else; recorded or not, the driver lets the stream pass it.
            check("cuEventDestroy", unsafe { sys::cuEventDestroy_v2(self.raw) })
        }));
    }
}
