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
    // Graphs write to the word and record the moment, and go first.
    graph: GpuGraph,
    word: PinnedWord,
    moment: GpuMoment,
}

impl GpuRehearsal {
    /// Captures its graph on the stream, on which no capture may be under way.
    ///
    /// # Errors
    /// [`DeviceError::Cuda`].
    pub fn new(stream: &GpuStream) -> Result<Self, DeviceError> {
        let (word, moment) = (stream.word()?, GpuMoment::new(stream)?);
        stream.begin_capture()?;
        let captured = stream.touch(&word).and_then(|()| stream.mark(&moment));
        let graph = stream.end_capture();
        captured?;
        Ok(Self { graph: graph?, word, moment })
    }

    /// Enqueues it on the stream that it was made for, and returns at once.
    ///
    /// # Errors
    /// [`DeviceError::Cuda`].
    pub fn run(&self, stream: &GpuStream) -> Result<(), DeviceError> {
        stream.touch(&self.word)?;
        stream.mark(&self.moment)?;
        // SAFETY: what the graph writes to belongs to `self`. Launches of one stream follow each other.
        unsafe { self.graph.launch(stream) }
    }
}
