//! A request's tensors on their way into a slot.

use super::{ServiceError, TensorSpec};
use crate::slots::Slot;

/// One tensor and its place in a slot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlacedTensor {
    /// What it is.
    pub spec: TensorSpec,
    /// Offset of its first byte from the slot's begin.
    pub offset_bytes: u64,
    /// Bytes of its data.
    pub bytes: u64,
}

/// Slot memory for the inputs of one request, filled front to back while they arrive.
///
/// Dropping it gives the slot back.
#[derive(Debug)]
#[must_use]
pub struct Submission {
    model: String,
    inputs: Vec<PlacedTensor>,
    /// Bytes of each input that have been appended.
    filled: Vec<u64>,
    slot: Slot,
}

impl Submission {
    /// For services: the places of a request's inputs in a slot that [`reserve`](super::InferenceService::reserve) took.
    ///
    /// # Errors
    /// [`ServiceError::Internal`] if a tensor reaches past the slot.
    pub fn new(
        model: impl Into<String>,
        inputs: Vec<PlacedTensor>,
        slot: Slot,
    ) -> Result<Self, ServiceError> {
        for input in &inputs {
            let end = input.offset_bytes.checked_add(input.bytes);
            if end.is_none_or(|end| end > slot.bytes()) || input.spec.bytes() != Some(input.bytes) {
                let message = format!(
                    "input '{}' was placed at {}+{} bytes of a slot of {} bytes",
                    input.spec.name,
                    input.offset_bytes,
                    input.bytes,
                    slot.bytes()
                );
                return Err(ServiceError::Internal { message });
            }
        }
        Ok(Self { model: model.into(), filled: vec![0; inputs.len()], inputs, slot })
    }

    /// Name of the model.
    #[must_use]
    pub fn model(&self) -> &str {
        &self.model
    }

    /// The inputs in the order in which they were reserved.
    #[must_use]
    pub fn inputs(&self) -> &[PlacedTensor] {
        &self.inputs
    }

    /// Bytes that an input still lacks; 0 for an input that is not there.
    #[must_use]
    pub fn missing_bytes(&self, input: usize) -> u64 {
        match (self.inputs.get(input), self.filled.get(input)) {
            (Some(placed), Some(filled)) => placed.bytes - filled,
            _ => 0,
        }
    }

    /// Appends bytes (little-endian, row-major, dense) to an input's data in the slot: the one copy a request costs.
    ///
    /// # Errors
    /// [`ServiceError::InvalidInput`] if that is more than the tensor has.
    pub fn append(&mut self, input: usize, data: &[u8]) -> Result<(), ServiceError> {
        let (Some(placed), Some(filled)) = (self.inputs.get(input), self.filled.get_mut(input)) else {
            let message = format!("input number {input} of {} was written", self.inputs.len());
            return Err(ServiceError::Internal { message });
        };
        let found = filled.saturating_add(data.len() as u64);
        if found > placed.bytes {
            let message = format!("expected {} bytes of data, found at least {found}", placed.bytes);
            return Err(ServiceError::input(&placed.spec.name, message));
        }
        self.slot.write(placed.offset_bytes + *filled, data)?;
        *filled = found;
        Ok(())
    }

    /// Tells the first input that lacks bytes.
    ///
    /// # Errors
    /// [`ServiceError::InvalidInput`] with expected and found. Nothing of an incomplete submission may run: the rest
    /// of its memory still holds another request's data.
    pub fn check_complete(&self) -> Result<(), ServiceError> {
        for (placed, filled) in self.inputs.iter().zip(&self.filled) {
            if *filled != placed.bytes {
                let message = format!("expected {} bytes of data, found {filled}", placed.bytes);
                return Err(ServiceError::input(&placed.spec.name, message));
            }
        }
        Ok(())
    }

    /// For services: the model's name, the places of the inputs and the slot, once complete.
    ///
    /// # Errors
    /// As [`check_complete`](Self::check_complete).
    pub fn into_parts(self) -> Result<(String, Vec<PlacedTensor>, Slot), ServiceError> {
        self.check_complete()?;
        Ok((self.model, self.inputs, self.slot))
    }
}
