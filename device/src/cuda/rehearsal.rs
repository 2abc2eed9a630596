//! What an execution begins with, done for nothing: so that it is fast when it counts.

use super::execution::{GpuGraph, GpuMoment, GpuStream};
use super::pin::PinnedWord;
use crate::DeviceError;

/// An operation on a word, a mark and the launch of a graph, all of them without effect.
///
/// What an execution is launched with is seldom the last thing that its thread did: by then the driver's code and data have left
/// the processor's caches. With 16 cores of a virtual machine beside an H200 the launch of an execution took 110 us after some
/// milliseconds, and 55 when this had come a moment before.
#[derive(Debug)]
pub struct GpuRehearsal {
    // It writes to the word, and goes first.
    graph: GpuGraph,
    word: PinnedWord,
    /// When the stream had done it last.
    done: GpuMoment,
}

impl GpuRehearsal {
    /// Captures its graph on the stream, on which no capture may be under way.
    ///
    /// # Errors
    /// [`DeviceError::Cuda`].
    pub fn new(stream: &GpuStream) -> Result<Self, DeviceError> {
        let (word, done) = (stream.word()?, GpuMoment::new(stream)?);
        stream.begin_capture()?;
        let captured = stream.touch(&word);
        let graph = stream.end_capture();
        captured?;
        Ok(Self { graph: graph?, word, done })
    }

    /// Enqueues it on the stream that it was made for, and returns at once. Does nothing while it is still under way from the last
    /// time: a graph is launched again when its launch is over, and the driver would wait for that.
    ///
    /// # Errors
    /// [`DeviceError::Cuda`].
    pub fn run(&self, stream: &GpuStream) -> Result<(), DeviceError> {
        if !self.done.has_passed()? {
            return Ok(());
        }
        stream.touch(&self.word)?;
        // SAFETY: what the graph writes to belongs to `self`, and its last launch is over.
        unsafe { self.graph.launch(stream) }?;
        stream.mark(&self.done)
    }
}
