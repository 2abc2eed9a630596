//! The stream on which a worker executes on a GPU, and graphs of what was launched on it.

use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::context::{Context, RawStream, log_failure};
use super::driver::{check, size, sys};
use super::looker::Looker;
use super::memory::CudaMemory;
use super::pin::{PinnedWord, check_pinned};
use super::properties::Gpu;
use super::stream::{enqueue_batch, host_start, wait_op, write_op};
use crate::memory::check_word;
use crate::{DeviceAddress, DeviceError, DeviceId, DeviceSlice, ExecutionStream, HostSlice, doorbell};

/// A GPU's stream of computation, of the greatest priority that there is.
///
/// One thread at a time enqueues. libtorch is told its [number](Self::raw) and launches on it; everything here is enqueued in
/// between, in the order of the calls, and returns at once. While a [capture](Self::begin_capture) is under way nothing runs:
/// what is enqueued becomes nodes of the graph instead.
#[derive(Debug)]
pub struct GpuStream {
    id: DeviceId,
    stream: RawStream,
    done: PinnedWord,
    /// The kernel by which it waits for words of the GPU's memory; without one, it does by its operations.
    looker: Option<Arc<Looker>>,
    is_capturing: AtomicBool,
}

impl GpuStream {
    /// A new stream of a GPU, in its primary context.
    ///
    /// # Errors
    /// [`DeviceError::Unavailable`] if there is no such GPU; [`DeviceError::Cuda`].
    pub fn open(id: DeviceId) -> Result<Self, DeviceError> {
        Self::open_with(id, |_| Ok(None))
    }

    /// The same for a process that has the GPU to itself while it executes: it waits by kernels, which costs less and keeps
    /// the GPU from others.
    ///
    /// # Errors
    /// As [`open`](Self::open); [`DeviceError::Cuda`] if the driver cannot compile for the GPU, or not for one of compute
    /// capability below 7.0.
    pub fn open_waiting_by_kernels(id: DeviceId) -> Result<Self, DeviceError> {
        Self::open_with(id, |context| Looker::new(context).map(Arc::new).map(Some))
    }

    fn open_with(
        id: DeviceId,
        looker: impl FnOnce(&Arc<Context>) -> Result<Option<Arc<Looker>>, DeviceError>,
    ) -> Result<Self, DeviceError> {
        let DeviceId::Cuda(ordinal) = id else {
            return Err(DeviceError::WrongExecutionStream { device: id });
        };
        let context = Context::retain(Gpu::find(ordinal)?.device)?;
        Ok(Self {
            id,
            stream: RawStream::of_greatest_priority(&context)?,
            done: PinnedWord::new(&context)?,
            looker: looker(&context)?,
            is_capturing: AtomicBool::new(false),
        })
    }

    /// The driver's handle, as libtorch and [`ExecutionStream`] take it.
    pub fn raw(&self) -> u64 {
        self.stream.raw().expose_provenance() as u64
    }

    /// The same for [`Device::wait_doorbell`](crate::Device::wait_doorbell).
    pub fn execution(&self) -> ExecutionStream {
        ExecutionStream::Cuda(self.raw())
    }

    /// Computes nothing more before `words` have rung, one after the other. Poisoned words let it go on, too.
    ///
    /// # Errors
    /// [`DeviceError::NotAWord`], [`DeviceError::ForeignMemory`], [`DeviceError::Cuda`].
    pub fn wait(&self, words: &[DeviceSlice]) -> Result<(), DeviceError> {
        self.wait_for(words, None)
    }

    /// The same, and then for `last`, which is cleared: as few operations as the driver allows for all of it, since each costs
    /// the GPU some microseconds.
    ///
    /// # Errors
    /// As [`wait`](Self::wait).
    pub fn wait_and_clear(&self, words: &[DeviceSlice], last: &DeviceSlice) -> Result<(), DeviceError> {
        self.wait_for(words, Some(last))
    }

    fn wait_for(&self, words: &[DeviceSlice], cleared: Option<&DeviceSlice>) -> Result<(), DeviceError> {
        words.iter().chain(cleared).try_for_each(|word| self.check_word(word))?;
        let _entered = self.stream.context().enter()?;
        if let Some(looker) = &self.looker {
            words.iter().try_for_each(|word| looker.launch(&self.stream, word.address(), false))?;
            return cleared.map_or(Ok(()), |word| looker.launch(&self.stream, word.address(), true));
        }
        let words = words.iter().chain(cleared);
        let mut operations: Vec<_> = words.map(|word| wait_op(word.address(), doorbell::RUNG)).collect();
        operations.extend(cleared.map(|word| write_op(word.address(), doorbell::CLEAR)));
        enqueue_batch(&self.stream, &mut operations)
    }

    /// Computes nothing more before a word of pinned memory is 1.
    ///
    /// # Errors
    /// [`DeviceError::NotPinned`] if it is not pinned for this GPU, [`DeviceError::NotAWord`], [`DeviceError::Cuda`].
    pub fn hold_back(&self, word: &HostSlice) -> Result<(), DeviceError> {
        check_pinned_word(self.id, word)?;
        self.enqueue(&mut [wait_op(word.address(), doorbell::RUNG)])
    }

    fn check_word(&self, word: &DeviceSlice) -> Result<(), DeviceError> {
        CudaMemory::behind(self.id, word)?;
        check_word(word)
    }

    fn enqueue(&self, operations: &mut [sys::CUstreamBatchMemOpParams]) -> Result<(), DeviceError> {
        let _entered = self.stream.context().enter()?;
        // Every address was checked to be a word of this context's memory, or is that of a pinned word.
        enqueue_batch(&self.stream, operations)
    }

    /// Copies results to the host.
    ///
    /// # Safety
    /// The bytes at `from` must be memory of this GPU, in this process, until the copy has been done.
    ///
    /// # Errors
    /// [`DeviceError::NotPinned`], [`DeviceError::Cuda`].
    pub unsafe fn copy_out(&self, from: DeviceAddress, to: &HostSlice) -> Result<(), DeviceError> {
        check_pinned(self.id, to)?;
        if to.bytes() == 0 {
            return Ok(());
        }
        let _entered = self.stream.context().enter()?;
        // SAFETY: the caller promises the source; the destination is pinned, and `to` lies inside of it.
        let enqueued = unsafe {
            sys::cuMemcpyDtoHAsync_v2(host_start(to).cast(), from.0, size(to.bytes()), self.stream.raw())
        };
        check("cuMemcpyDtoHAsync", enqueued)
    }

    /// Copies pinned host memory to this GPU.
    ///
    /// # Safety
    /// The bytes from `to` on must be memory of this GPU, in this process, and nobody else's until the copy has been done;
    /// until then those of `from` must not change either.
    ///
    /// # Errors
    /// [`DeviceError::NotPinned`], [`DeviceError::Cuda`].
    pub unsafe fn copy_in(&self, from: &HostSlice, to: DeviceAddress) -> Result<(), DeviceError> {
        check_pinned(self.id, from)?;
        if from.bytes() == 0 {
            return Ok(());
        }
        let _entered = self.stream.context().enter()?;
        // SAFETY: the source is pinned, and `from` lies inside of it; the caller promises the destination.
        let enqueued = unsafe {
            sys::cuMemcpyHtoDAsync_v2(
                to.0,
                host_start(from).cast_const().cast(),
                size(from.bytes()),
                self.stream.raw(),
            )
        };
        check("cuMemcpyHtoDAsync", enqueued)
    }

    /// Takes the time when the stream gets here; in a graph, at each of its launches.
    ///
    /// # Errors
    /// [`DeviceError::Cuda`].
    pub fn mark(&self, moment: &GpuMoment) -> Result<(), DeviceError> {
        let external = sys::CUevent_record_flags::CU_EVENT_RECORD_EXTERNAL as u32;
        let flags = if self.is_capturing.load(Ordering::Relaxed) { external } else { 0 };
        let _entered = self.stream.context().enter()?;
        // SAFETY: event and stream live and belong to one context.
        let recorded = unsafe { sys::cuEventRecordWithFlags(moment.raw, self.stream.raw(), flags) };
        check("cuEventRecordWithFlags", recorded)
    }

    /// Counts the stream as having come here, and lets it stand still here while the gate is closed, if there is one. Some 3 us
    /// on the GPU while it is open (H200). What is held costs other processes that compute on the GPU nothing.
    ///
    /// # Errors
    /// [`DeviceError::Cuda`].
    pub fn pass(&self, way: &GpuWay, number: u32) -> Result<(), DeviceError> {
        let mut all = vec![way.arrival(number)];
        all.extend(way.departure(number));
        self.enqueue(&mut all)
    }

    /// The first half of [`pass`](Self::pass): what is enqueued between the halves is done in front of the gate, where the stream
    /// is said to stand still. For what computes nothing.
    ///
    /// # Errors
    /// [`DeviceError::Cuda`].
    pub fn arrive(&self, way: &GpuWay, number: u32) -> Result<(), DeviceError> {
        self.enqueue(&mut [way.arrival(number)])
    }

    /// The other half.
    ///
    /// # Errors
    /// [`DeviceError::Cuda`].
    pub fn depart(&self, way: &GpuWay, number: u32) -> Result<(), DeviceError> {
        self.enqueue(&mut way.departure(number))
    }

    /// A word of pinned memory for [`touch`](Self::touch).
    pub(super) fn word(&self) -> Result<PinnedWord, DeviceError> {
        PinnedWord::new(self.stream.context())
    }

    /// Writes to a word that nobody looks at.
    pub(super) fn touch(&self, word: &PinnedWord) -> Result<(), DeviceError> {
        self.enqueue(&mut [write_op(word.address(), doorbell::CLEAR)])
    }

    /// Announces to this process that the stream got here: [`is_done`](Self::is_done) is true then.
    ///
    /// # Errors
    /// [`DeviceError::Cuda`].
    pub fn announce(&self) -> Result<(), DeviceError> {
        self.enqueue(&mut [write_op(self.done.address(), doorbell::RUNG)])
    }

    /// Takes an announcement back, before what leads to the next one is launched.
    pub fn expect(&self) {
        self.done.store(doorbell::CLEAR);
    }

    /// Whether the stream has passed the last [announcement](Self::announce). A look at memory, no call of the driver.
    pub fn is_done(&self) -> bool {
        self.done.load() == doorbell::RUNG
    }

    /// Whether all that was launched is over.
    ///
    /// # Errors
    /// [`DeviceError::Cuda`] if any of it has failed: then nothing of this process runs on the GPU any more.
    pub fn is_idle(&self) -> Result<bool, DeviceError> {
        let _entered = self.stream.context().enter()?;
        // SAFETY: the stream lives as long as `self`.
        match unsafe { sys::cuStreamQuery(self.stream.raw()) } {
            sys::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            result => check("cuStreamQuery", result).map(|()| true),
        }
    }

    /// Blocks until all that was launched is over.
    ///
    /// # Errors
    /// As [`is_idle`](Self::is_idle).
    pub fn synchronize(&self) -> Result<(), DeviceError> {
        self.stream.synchronize()
    }

    /// From here on, what any library enqueues on this stream is captured and does not run.
    ///
    /// # Errors
    /// [`DeviceError::Cuda`].
    pub fn begin_capture(&self) -> Result<(), DeviceError> {
        let _entered = self.stream.context().enter()?;
        // Libraries that are loaded while it lasts allocate and copy: in another mode that would end the capture.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: the stream lives as long as `self`.
        let begun = unsafe { sys::cuStreamBeginCapture_v2(self.stream.raw(), mode) };
        check("cuStreamBeginCapture", begun)?;
        self.is_capturing.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Ends a capture and makes a graph of it. Memory that was used in it must stay where it is for as long as the graph is
    /// launched.
    ///
    /// # Errors
    /// [`DeviceError::Cuda`] if no capture is under way, or CUDA cannot capture what was done (waiting for the GPU, say). The
    /// stream is as before the capture either way.
    pub fn end_capture(&self) -> Result<GpuGraph, DeviceError> {
        let context = self.stream.context();
        let _entered = context.enter()?;
        self.is_capturing.store(false, Ordering::Relaxed);
        let mut graph = ptr::null_mut();
        // SAFETY: `graph` is written during the call; without a capture the driver refuses it.
        let ended = unsafe { sys::cuStreamEndCapture(self.stream.raw(), &raw mut graph) };
        let template = Template { raw: graph, context: Arc::clone(context) };
        check("cuStreamEndCapture", ended)?;
        GpuGraph::new(template, &self.stream, self.looker.clone())
    }

    /// Ends a capture, if one is under way, and forgets it.
    pub fn abandon_capture(&self) {
        if self.is_capturing.load(Ordering::Relaxed) {
            // What it cannot capture it says, and nobody wants to know.
            let _ = self.end_capture();
        }
    }
}

/// How far a stream has come, by the numbers of the points that it was told to [pass](GpuStream::pass), and a gate at each of
/// them: closed for as long as the top bit of a word of shared memory is set. Whoever writes the word has the GPU stand still,
/// without a call or a thread that has to wake up; and whoever looks at the others sees whether it does.
#[derive(Debug)]
pub struct GpuWay {
    words: WayWords,
}

/// The words of a [way](GpuWay), of pinned memory.
#[derive(Debug, Clone)]
pub struct WayWords {
    /// The number of the point that the stream came to last. The GPU writes it, ahead of the gate there.
    pub reached: HostSlice,
    /// The number of the point that it went on from last. The GPU writes it.
    pub passed: HostSlice,
    /// What closes the gates, if there are any.
    pub gate: Option<HostSlice>,
}

impl GpuWay {
    /// A way from where the words are.
    ///
    /// # Errors
    /// [`DeviceError::NotPinned`] if one is not pinned for this GPU, [`DeviceError::NotAWord`].
    pub fn new(stream: &GpuStream, words: WayWords) -> Result<Self, DeviceError> {
        let WayWords { reached, passed, gate } = &words;
        [reached, passed].into_iter().chain(gate).try_for_each(|word| check_pinned_word(stream.id, word))?;
        Ok(Self { words })
    }

    fn arrival(&self, number: u32) -> sys::CUstreamBatchMemOpParams {
        write_op(self.words.reached.address(), number)
    }

    fn departure(&self, number: u32) -> Vec<sys::CUstreamBatchMemOpParams> {
        // At least zero: the top bit is not set.
        let wait = self.words.gate.as_ref().map(|gate| wait_op(gate.address(), 0));
        wait.into_iter().chain([write_op(self.words.passed.address(), number)]).collect()
    }

    /// The number of the point that the stream came to last. A look at memory.
    pub fn reached(&self) -> u32 {
        load(&self.words.reached)
    }

    /// Whether the stream stood at a gate, or was on its way through.
    pub fn is_at_gate(&self) -> bool {
        self.words.gate.is_some() && load(&self.words.reached) != load(&self.words.passed)
    }
}

/// What the GPU has written.
fn load(word: &HostSlice) -> u32 {
    let memory = word.memory().memory();
    memory.word(word.offset()).map_or(0, |word| word.load(Ordering::Acquire))
}

fn check_pinned_word(id: DeviceId, word: &HostSlice) -> Result<(), DeviceError> {
    check_pinned(id, word)?;
    if word.bytes() == 4 && word.offset().is_multiple_of(4) {
        return Ok(());
    }
    Err(DeviceError::NotAWord { offset: word.offset(), bytes: word.bytes() })
}

/// A point in time on the GPU, taken by [`GpuStream::mark`].
#[derive(Debug)]
pub struct GpuMoment {
    raw: sys::CUevent,
    context: Arc<Context>,
}

// SAFETY: an event is a handle of the driver, whose functions may be called from any thread.
unsafe impl Send for GpuMoment {}
// SAFETY: as above, also at the same time.
unsafe impl Sync for GpuMoment {}

impl GpuMoment {
    /// One that has not been taken.
    ///
    /// # Errors
    /// [`DeviceError::Cuda`].
    pub fn new(stream: &GpuStream) -> Result<Self, DeviceError> {
        let context = stream.stream.context();
        let mut raw = ptr::null_mut();
        let _entered = context.enter()?;
        // SAFETY: `raw` is written during the call; the event is destroyed in `drop`.
        check("cuEventCreate", unsafe { sys::cuEventCreate(&raw mut raw, 0) })?;
        Ok(Self { raw, context: Arc::clone(context) })
    }

    /// Whether the stream has passed it since it was last taken; true for one that never was.
    ///
    /// # Errors
    /// [`DeviceError::Cuda`] if anything ahead of it has failed.
    pub fn has_passed(&self) -> Result<bool, DeviceError> {
        let _entered = self.context.enter()?;
        // SAFETY: the event lives.
        match unsafe { sys::cuEventQuery(self.raw) } {
            sys::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            result => check("cuEventQuery", result).map(|()| true),
        }
    }

    /// Microseconds since another moment; both must have been passed.
    ///
    /// # Errors
    /// [`DeviceError::Cuda`] if one was not.
    pub fn us_since(&self, earlier: &Self) -> Result<f64, DeviceError> {
        let mut ms = 0.0;
        let _entered = self.context.enter()?;
        // SAFETY: `ms` is written during the call; both events live.
        let measured = unsafe { sys::cuEventElapsedTime_v2(&raw mut ms, earlier.raw, self.raw) };
        check("cuEventElapsedTime", measured)?;
        Ok(f64::from(ms) * 1e3)
    }
}

impl Drop for GpuMoment {
    fn drop(&mut self) {
        log_failure(self.context.enter().and_then(|_entered| {
            // SAFETY: made in `new`; graphs that record it are launched no more when their owner drops it.
            check("cuEventDestroy", unsafe { sys::cuEventDestroy_v2(self.raw) })
        }));
    }
}

/// A graph as it was captured. Nodes belong to it.
#[derive(Debug)]
struct Template {
    raw: sys::CUgraph,
    context: Arc<Context>,
}

impl Drop for Template {
    fn drop(&mut self) {
        if self.raw.is_null() {
            return;
        }
        log_failure(self.context.enter().and_then(|_entered| {
            // SAFETY: made by the capture, used by nobody else.
            check("cuGraphDestroy", unsafe { sys::cuGraphDestroy(self.raw) })
        }));
    }
}

/// Work that is launched as a whole, any number of times, one at a time.
#[derive(Debug)]
pub struct GpuGraph {
    executable: sys::CUgraphExec,
    template: Template,
    /// The kernel by which it waits, if it does; goes last.
    _looker: Option<Arc<Looker>>,
}

impl GpuGraph {
    fn new(template: Template, stream: &RawStream, looker: Option<Arc<Looker>>) -> Result<Self, DeviceError> {
        let mut graph = Self { executable: ptr::null_mut(), template, _looker: looker };
        // SAFETY: `executable` is written during the call and destroyed in `drop`; the template lives.
        check("cuGraphInstantiate", unsafe {
            sys::cuGraphInstantiateWithFlags(&raw mut graph.executable, graph.template.raw, 0)
        })?;
        // What the first launch would do otherwise.
        // SAFETY: graph and stream live and belong to one context.
        check("cuGraphUpload", unsafe { sys::cuGraphUpload(graph.executable, stream.raw()) })?;
        stream.synchronize()?;
        Ok(graph)
    }

    /// Enqueues all of it on a stream. It must not be under way already.
    ///
    /// # Safety
    /// All memory that was used while it was captured must still be there, and nobody else may use what it writes.
    ///
    /// # Errors
    /// [`DeviceError::Cuda`].
    pub unsafe fn launch(&self, stream: &GpuStream) -> Result<(), DeviceError> {
        let _entered = self.template.context.enter()?;
        // SAFETY: graph and stream live; the rest is the caller's promise.
        let launched = unsafe { sys::cuGraphLaunch(self.executable, stream.stream.raw()) };
        check("cuGraphLaunch", launched)
    }
}

impl Drop for GpuGraph {
    fn drop(&mut self) {
        if self.executable.is_null() {
            return;
        }
        log_failure(self.template.context.enter().and_then(|_entered| {
            // SAFETY: made in `new`, used by nobody else. The driver lets a launch under way finish.
            check("cuGraphExecDestroy", unsafe { sys::cuGraphExecDestroy(self.executable) })
        }));
    }
}
