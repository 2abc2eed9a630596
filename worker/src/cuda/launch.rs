//! Operators enqueued on the stream, or captured from it in segments.
//!
//! What waits for weights is captured as two graphs: the operators up to the second group that is waited for, and all
//! others with the waits for their groups inside. The first graph is small and begins while the other is still being
//! launched. A graph a group would do as well, but where one graph ends and the next begins the GPU stands still for some
//! 6 us, and for less at a wait inside of a graph. Where inputs take longer to come than a whole graph to be launched, there is
//! one for all.

use std::iter::Peekable;
use std::slice::Iter;
use std::sync::atomic::{AtomicU32, Ordering};

use pswitch_device::{DeviceAddress, DeviceError, DeviceSlice, GpuGraph, GpuMoment, GpuStream};
use pswitch_protocol::FaultClass;

use super::libtorch::CudaLibtorch;
use crate::error::RunError;
use crate::executable::{Executable, Input, OutputShape, Watch};
use crate::libtorch::Number;

/// Something that is waited for: the node before which it is, and its word.
pub(crate) type Group = (u32, DeviceSlice);

/// What is launched after some waits.
#[derive(Debug)]
pub(crate) struct Segment {
    pub(crate) waits: Vec<DeviceSlice>,
    pub(crate) graph: GpuGraph,
}

/// One output of an execution as the program leaves it. Of a captured program it is always this.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Produced {
    pub(crate) shape: OutputShape,
    /// Its value, if it is no tensor.
    pub(crate) number: Option<Number>,
    /// Where a tensor lies, dense.
    pub(crate) at: DeviceAddress,
}

/// How operators are enqueued.
pub(crate) struct Launch<'a> {
    pub(crate) libtorch: &'a CudaLibtorch,
    pub(crate) stream: &'a GpuStream,
    pub(crate) inputs: &'a [Input],
    /// What is waited for on the way, ascending.
    pub(crate) groups: &'a [Group],
    /// Whether tables are read from the host store.
    pub(crate) host_tables: bool,
    /// Moments to be taken before every node and behind the last; none, or one more than there are nodes.
    pub(crate) stamps: &'a [GpuMoment],
    /// Whether what is captured is one segment.
    pub(crate) in_one: bool,
    /// What ends it between operators, if it runs at once.
    pub(crate) stop: Option<&'a AtomicU32>,
}

impl Launch<'_> {
    /// Enqueues all operators with the waits between them. The outputs stay until the executable is cleared.
    pub(crate) fn run(&self, executable: &mut Executable) -> Result<Vec<Produced>, RunError> {
        self.compute(executable, None)
    }

    /// Captures all operators: those up to the second group that is waited for as one segment, all others as another, or all in
    /// one. The outputs' places are the segments' from now on.
    pub(crate) fn capture(
        &self,
        executable: &mut Executable,
    ) -> Result<(Vec<Produced>, Vec<Segment>), RunError> {
        let mut segments = Vec::new();
        self.stream.begin_capture().map_err(|error| gpu_fault(&error))?;
        let computed = self.compute(executable, Some(&mut segments));
        // Handles of tensors end here.
        executable.clear();
        let produced = computed.inspect_err(|_| {
            self.stream.abandon_capture();
            self.libtorch.clear_error();
        })?;
        Ok((produced, segments))
    }

    fn compute(
        &self,
        executable: &mut Executable,
        segments: Option<&mut Vec<Segment>>,
    ) -> Result<Vec<Produced>, RunError> {
        executable.read_tables(self.host_tables)?;
        let mut watch = LaunchWatch {
            stream: self.stream,
            groups: self.groups.iter().peekable(),
            stamps: self.stamps,
            in_one: self.in_one,
            stop: self.stop,
            segments,
            waits: Vec::new(),
        };
        // SAFETY: the inputs lie in the pool, inside of what is leased to this execution; the stream waits for each
        // group before the node that uses it.
        unsafe { executable.run(self.inputs, &mut watch) }?;
        let end = self.stamps.get(executable.nodes());
        end.map_or(Ok(()), |end| self.stream.mark(end)).map_err(|error| gpu_fault(&error))?;
        // Making an output dense may take an operator more.
        let produced = (0..executable.output_count())
            .map(|index| {
                let (shape, number, at) = executable.output_on_gpu(index, self.libtorch)?;
                Ok(Produced { shape, number, at })
            })
            .collect::<Result<_, RunError>>()?;
        watch.end_segment().map_err(|error| gpu_fault(&error))?;
        Ok(produced)
    }
}

/// What a call of the device refused on the way of an execution.
pub(crate) fn gpu_fault(error: &DeviceError) -> RunError {
    RunError { class: FaultClass::Model, message: error.to_string() }
}

/// Waits and stamps between operators, or ends a segment and begins the next.
struct LaunchWatch<'a> {
    stream: &'a GpuStream,
    groups: Peekable<Iter<'a, Group>>,
    stamps: &'a [GpuMoment],
    in_one: bool,
    stop: Option<&'a AtomicU32>,
    /// While capturing.
    segments: Option<&'a mut Vec<Segment>>,
    /// What the segment under way waits for.
    waits: Vec<DeviceSlice>,
}

impl LaunchWatch<'_> {
    fn end_segment(&mut self) -> Result<(), DeviceError> {
        let Some(segments) = &mut self.segments else { return Ok(()) };
        let graph = self.stream.end_capture()?;
        segments.push(Segment { waits: std::mem::take(&mut self.waits), graph });
        Ok(())
    }

    fn before_node(&mut self, node: usize) -> Result<(), DeviceError> {
        let mut words = Vec::new();
        while let Some((_, word)) = self.groups.next_if(|(first, _)| *first as usize == node) {
            words.push(word.clone());
        }
        let Some(segments) = &self.segments else {
            self.stream.wait(&words)?;
            return self.stamp(node);
        };
        if !words.is_empty() {
            match segments.len() {
                // Nothing has been captured yet before the first node.
                0 if node == 0 => self.waits.append(&mut words),
                0 if !self.in_one => {
                    self.end_segment()?;
                    self.stream.begin_capture()?;
                    self.waits.append(&mut words);
                }
                _ => self.stream.wait(&words)?,
            }
        }
        self.stamp(node)
    }

    fn stamp(&self, node: usize) -> Result<(), DeviceError> {
        self.stamps.get(node).map_or(Ok(()), |stamp| self.stream.mark(stamp))
    }
}

impl Watch for LaunchWatch<'_> {
    fn before(&mut self, node: usize) -> Result<(), RunError> {
        if self.stop.is_some_and(|stop| stop.load(Ordering::Relaxed) != 0) {
            return Err(RunError {
                class: FaultClass::Stopped,
                message: "the execution was stopped".to_owned(),
            });
        }
        self.before_node(node).map_err(|error| gpu_fault(&error))
    }
}
