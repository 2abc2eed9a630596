//! One execution enqueued on the stream, or captured from it.

use std::iter::Peekable;
use std::slice::Iter;

use pswitch_device::{
    CaptureError, DeviceAddress, DeviceError, DeviceSlice, GpuGraph, GpuMoment, GpuStream, HostSlice,
    PinnedMemory, SharedMemory,
};
use pswitch_protocol::{FaultClass, PlacedTensor, Region};

use super::graphs::GraphOutput;
use super::libtorch::CudaLibtorch;
use crate::error::RunError;
use crate::executable::{Executable, Input, OutputShape, Watch};
use crate::libtorch::Number;
use crate::work::place_outputs;

/// Which moments are taken on the way.
#[derive(Clone, Copy)]
pub(crate) enum Marks<'a> {
    None,
    /// When the first layer begins, its group having landed, and when all outputs are there.
    Ends(&'a GpuMoment, &'a GpuMoment),
    /// Before every node and behind the last.
    Nodes(&'a [GpuMoment]),
}

/// How an execution is enqueued.
pub(crate) struct Launch<'a> {
    pub(crate) libtorch: &'a CudaLibtorch,
    pub(crate) stream: &'a GpuStream,
    pub(crate) slots: &'a PinnedMemory,
    pub(crate) inputs: &'a [Input],
    /// Waited for and cleared ahead of everything.
    pub(crate) input_doorbell: Option<&'a DeviceSlice>,
    /// Groups that are waited for, each before its node.
    pub(crate) groups: &'a [(u32, DeviceSlice)],
    pub(crate) marks: Marks<'a>,
}

/// An output as the program left it.
struct Produced {
    output: GraphOutput,
    /// Where a tensor lies, dense.
    at: DeviceAddress,
}

impl Launch<'_> {
    /// Enqueues it all; returns where the outputs will lie. The announcement comes behind them.
    pub(crate) fn run(
        &self,
        executable: &mut Executable,
        room: Region,
        slots: &SharedMemory,
    ) -> Result<Vec<PlacedTensor>, RunError> {
        let produced = self.compute(executable)?;
        let shapes: Vec<OutputShape> = produced.iter().map(|one| one.output.shape.clone()).collect();
        let placed = place_outputs(&shapes, room, slots)?;
        for (one, place) in produced.iter().zip(&placed) {
            match one.output.number {
                Some(number) => write_number(slots, place, number)?,
                None => self.copy_out(one, place.at)?,
            }
        }
        self.finish()?;
        Ok(placed)
    }

    /// Makes a graph of it. Its copies of outputs are redirected before every launch.
    pub(crate) fn capture(
        &self,
        executable: &mut Executable,
    ) -> Result<(Vec<GraphOutput>, GpuGraph), RunError> {
        let mut outputs = Vec::new();
        let captured = self.stream.capture(|| {
            for one in self.compute(executable)? {
                if one.output.number.is_none() {
                    // Some place of the right length, for now.
                    self.copy_out(&one, Region { offset: 0, bytes: one.output.shape.bytes() })?;
                }
                outputs.push(one.output);
            }
            self.finish()
        });
        // Handles of tensors end here; their places in the arena are the graph's from now on.
        executable.clear();
        match captured {
            Ok(graph) => Ok((outputs, graph)),
            Err(error) => {
                self.libtorch.clear_error();
                Err(match error {
                    CaptureError::Captured(error) => error,
                    CaptureError::Device(error) => gpu_fault(&error),
                })
            }
        }
    }

    fn compute(&self, executable: &mut Executable) -> Result<Vec<Produced>, RunError> {
        let mut groups = self.groups.iter().peekable();
        let mut heads: Vec<DeviceSlice> = self.input_doorbell.into_iter().cloned().collect();
        // One wait is as dear as another: those ahead of the first node are one.
        heads.extend(groups.next_if(|(node, _)| *node == 0).map(|(_, word)| word.clone()));
        let cleared: Vec<DeviceSlice> = self.input_doorbell.into_iter().cloned().collect();
        self.stream.wait_and_clear(&heads, &cleared).map_err(|error| gpu_fault(&error))?;
        let first = match self.marks {
            Marks::Ends(first, _) if groups.len() < self.groups.len() || self.groups.is_empty() => {
                self.stream.mark(first).map_err(|error| gpu_fault(&error))?;
                None
            }
            Marks::Ends(first, _) => Some(first),
            _ => None,
        };
        let nodes = match self.marks {
            Marks::Nodes(moments) => moments,
            _ => &[],
        };
        let mut watch = LaunchWatch { stream: self.stream, groups, first, nodes };
        // SAFETY: the inputs lie in the pool, inside of what is leased to this execution; the stream waits for each
        // group before the node that uses it.
        unsafe { executable.run(self.inputs, &mut watch) }?;
        if let Some(end) = nodes.get(executable.nodes()) {
            self.stream.mark(end).map_err(|error| gpu_fault(&error))?;
        }
        (0..executable.output_count())
            .map(|index| {
                let (shape, number, at) = executable.output_on_gpu(index, self.libtorch)?;
                Ok(Produced { output: GraphOutput { shape, number }, at })
            })
            .collect()
    }

    fn copy_out(&self, one: &Produced, to: Region) -> Result<(), RunError> {
        let copied = HostSlice::new(self.slots.clone(), to.offset, to.bytes).and_then(|to| {
            // SAFETY: the output lies in the arena or in the home, dense, until the execution is over.
            unsafe { self.stream.copy_out(one.at, one.output.shape.bytes(), &to) }
        });
        copied.map_err(|error| gpu_fault(&error))
    }

    fn finish(&self) -> Result<(), RunError> {
        let last = match self.marks {
            Marks::Ends(_, last) => self.stream.mark(last),
            _ => Ok(()),
        };
        last.and_then(|()| self.stream.announce()).map_err(|error| gpu_fault(&error))
    }
}

/// A number among the outputs, which no GPU is needed for.
pub(crate) fn write_number(
    slots: &SharedMemory,
    place: &PlacedTensor,
    number: Number,
) -> Result<(), RunError> {
    let written = match number {
        Number::Int(value) => slots.write(place.at.offset, &value.to_le_bytes()),
        Number::Float(value) => slots.write(place.at.offset, &value.to_le_bytes()),
        Number::Bool(value) => slots.write(place.at.offset, &[u8::from(value)]),
    };
    written.map_err(|error| gpu_fault(&error))
}

/// What a call of the device refused on the way of an execution.
pub(crate) fn gpu_fault(error: &DeviceError) -> RunError {
    RunError { class: FaultClass::Model, message: error.to_string() }
}

/// Enqueues waits and marks between operators.
struct LaunchWatch<'a> {
    stream: &'a GpuStream,
    groups: Peekable<Iter<'a, (u32, DeviceSlice)>>,
    /// Taken behind the first wait.
    first: Option<&'a GpuMoment>,
    nodes: &'a [GpuMoment],
}

impl Watch for LaunchWatch<'_> {
    fn before(&mut self, node: usize) -> Result<(), RunError> {
        let waited = match self.groups.next_if(|(first, _)| *first as usize == node) {
            Some((_, word)) => self
                .stream
                .wait_and_clear(std::slice::from_ref(word), &[])
                .and_then(|()| self.first.take().map_or(Ok(()), |first| self.stream.mark(first))),
            None => Ok(()),
        };
        let marked = self.nodes.get(node).map_or(Ok(()), |moment| self.stream.mark(moment));
        waited.and(marked).map_err(|error| gpu_fault(&error))
    }
}
