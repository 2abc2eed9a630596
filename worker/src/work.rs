//! One execution as the controller ordered it, checked: what it is given, what it waits for, where its outputs go.

use std::sync::Arc;
use std::time::{Duration, Instant};

use pswitch_device::{
    Device, DeviceAddress, DeviceError, DeviceMemory, DeviceSlice, PinnedMemory, SharedMemory,
};
use pswitch_model::DType;
use pswitch_protocol::{Execute, FaultClass, InputValue, PROFILE_COSTS, PlacedTensor, Region, monotonic_ns};

use crate::alone::Weights;
use crate::error::{RunError, WorkerError};
use crate::executable::{Executable, Input, OutputShape};

/// Outputs begin at multiples of this in their slot, so that every element type is aligned.
const OUTPUT_ALIGNMENT_BYTES: u64 = 64;

/// What a worker shares with its controller and the other workers.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) device: Arc<dyn Device>,
    pub(crate) pool: Arc<dyn DeviceMemory>,
    pub(crate) slots: Arc<SharedMemory>,
    pub(crate) control: Arc<SharedMemory>,
    /// Offset of this worker's block in the control page.
    pub(crate) block: u64,
    pub(crate) arenas: Vec<Region>,
}

impl Shared {
    pub(crate) fn slice(&self, region: Region) -> Result<DeviceSlice, DeviceError> {
        DeviceSlice::new(Arc::clone(&self.pool), region.offset, region.bytes)
    }

    pub(crate) fn word(&self, offset: u64) -> Result<DeviceSlice, DeviceError> {
        self.slice(Region { offset, bytes: 4 })
    }
}

/// A model that this worker has built.
pub(crate) struct Model {
    pub(crate) name: String,
    pub(crate) executable: Executable,
    pub(crate) doorbells: Region,
    /// For every group the node that waits at its doorbell.
    pub(crate) wait_nodes: Vec<u32>,
    /// The same for every table; their doorbells follow.
    pub(crate) table_nodes: Vec<u32>,
    /// The span in the host store, where the executable may read tables from; kept for that.
    pub(crate) _host_span: Option<PinnedMemory>,
    /// Nodes that are the first to need some of the weights.
    pub(crate) weighted_nodes: Vec<u32>,
    /// Types and shapes of the inputs at export, integers with their value.
    pub(crate) examples: Vec<Example>,
    /// Where the weights lie, and where else.
    pub(crate) weights: Weights,
    /// Where in the pool the executable looks for them; unknown if a change failed midway.
    pub(crate) lies_at: Option<u64>,
}

/// An input as the program was exported with.
#[derive(Debug, Clone)]
pub(crate) enum Example {
    Tensor { dtype: DType, shape: Vec<u64> },
    Integer(i64),
}

impl Model {
    /// Has the executable look for the weights at that offset of the pool.
    pub(crate) fn lie_at(&mut self, home: u64, shared: &Shared) -> Result<(), RunError> {
        if self.lies_at == Some(home) {
            return Ok(());
        }
        let span = Region { offset: home, bytes: self.weights.home().bytes };
        let fault = |error: DeviceError| RunError { class: FaultClass::Model, message: error.to_string() };
        let base = shared.slice(span).map_err(fault)?.address();
        self.lies_at = None;
        let weights = self.weights.used().map(|(place, weight)| (weight, DeviceAddress(base.0 + place)));
        // SAFETY: the addresses lie inside of a place for the span in the pool, which is mapped for as long as the worker
        // lives; an execution waits for the weights at their doorbells.
        unsafe { self.executable.move_span(weights) }?;
        self.lies_at = Some(home);
        Ok(())
    }

    /// For everything that an execution waits for the node before which it does, ascending, and its doorbell. Tables that
    /// are read from the host are not among them.
    pub(crate) fn groups(
        &self,
        shared: &Shared,
        host_tables: bool,
    ) -> Result<Vec<(u32, DeviceSlice)>, DeviceError> {
        let tables: &[u32] = if host_tables { &[] } else { &self.table_nodes };
        let words = (self.doorbells.offset..).step_by(4);
        let nodes = self.wait_nodes.iter().chain(tables);
        let mut groups = nodes
            .zip(words)
            .map(|(&node, offset)| Ok((node, shared.word(offset)?)))
            .collect::<Result<Vec<_>, _>>()?;
        groups.sort_by_key(|(node, _)| *node);
        Ok(groups)
    }
}

/// One execution.
pub(crate) struct Work<'a> {
    pub(crate) order: &'a Execute,
    pub(crate) inputs: Vec<Input>,
    pub(crate) input_doorbell: DeviceSlice,
    /// Where all that it allocates lies.
    pub(crate) arena: DeviceAddress,
    pub(crate) deadline: Instant,
    /// When the order was read.
    pub(crate) read_ns: u64,
}

impl<'a> Work<'a> {
    /// Checks an order. An error is the controller's.
    pub(crate) fn new(order: &'a Execute, model: &Model, shared: &Shared) -> Result<Self, WorkerError> {
        let read_ns = monotonic_ns();
        let inputs =
            order.inputs.iter().map(|input| placed_input(shared, input)).collect::<Result<_, _>>()?;
        shared.slice(Region { offset: order.home, bytes: model.weights.home().bytes })?;
        if let Some(profile) = order.profile
            && profile.bytes < 4 * (model.executable.nodes() as u64 + PROFILE_COSTS)
        {
            return Err(WorkerError::Order(
                "a profile without room for every node and for the costs behind them".to_owned(),
            ));
        }
        Ok(Self {
            order,
            inputs,
            input_doorbell: shared.word(order.input_doorbell)?,
            arena: shared.slice(order.arena)?.address(),
            deadline: Instant::now() + Duration::from_millis(order.doorbell_timeout_ms),
            read_ns,
        })
    }
}

/// An input over its place in the pool.
pub(crate) fn placed_input(shared: &Shared, input: &InputValue) -> Result<Input, WorkerError> {
    let tensor = match input {
        InputValue::Integer(value) => return Ok(Input::Integer(*value)),
        InputValue::Tensor(tensor) => tensor,
    };
    let dtype = DType::from_schema_code(u64::from(tensor.dtype))
        .ok_or_else(|| WorkerError::Order(format!("an input of unknown type {}", tensor.dtype)))?;
    let bytes = tensor.shape.iter().try_fold(dtype.size_bytes(), |bytes, &size| bytes.checked_mul(size));
    if bytes != Some(tensor.at.bytes) {
        return Err(WorkerError::Order(format!(
            "an input of shape {:?} in {} bytes",
            tensor.shape, tensor.at.bytes
        )));
    }
    let at = shared.slice(tensor.at)?.address();
    Ok(Input::Tensor { at, dtype, shape: tensor.shape.clone() })
}

/// Schema codes of element types are below 256.
pub(crate) fn schema_code(dtype: DType) -> u8 {
    u8::try_from(dtype.schema_code()).unwrap_or(u8::MAX)
}

/// Lays outputs out in their place in the slot memory.
pub(crate) fn place_outputs(
    shapes: &[OutputShape],
    room: Region,
    slots: &SharedMemory,
) -> Result<Vec<PlacedTensor>, RunError> {
    let mut placed = Vec::with_capacity(shapes.len());
    let (mut offset, mut needed_bytes) = (0_u64, 0_u64);
    for OutputShape { dtype, shape } in shapes {
        let bytes = OutputShape { dtype: *dtype, shape: shape.clone() }.bytes();
        let at = Region { offset: room.offset.saturating_add(offset), bytes };
        placed.push(PlacedTensor { dtype: schema_code(*dtype), shape: shape.clone(), at });
        needed_bytes = offset + bytes;
        offset = needed_bytes.next_multiple_of(OUTPUT_ALIGNMENT_BYTES);
    }
    let inside = room.offset.checked_add(room.bytes).is_some_and(|end| end <= slots.bytes());
    if needed_bytes > room.bytes || !inside {
        return Err(RunError {
            class: FaultClass::OutputsTooLarge { needed_bytes },
            message: format!("the outputs need {needed_bytes} bytes, their place has {}", room.bytes),
        });
    }
    Ok(placed)
}
