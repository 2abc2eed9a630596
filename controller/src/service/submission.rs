//! A request's tensors on their way into a slot.

use pswitch_mem_pool::TENSOR_ALIGNMENT_BYTES;

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

impl PlacedTensor {
    /// For services: tensors one behind the other, each at a 512-byte boundary, and the bytes of all.
    ///
    /// # Errors
    /// [`ServiceError::InvalidInput`] for the first one with which the bytes no longer fit 64 bits.
    pub fn place(specs: &[TensorSpec]) -> Result<(Vec<Self>, u64), ServiceError> {
        let mut end_bytes = 0u64;
        let mut placed = Vec::with_capacity(specs.len());
        for spec in specs {
            let offset_bytes = end_bytes.checked_next_multiple_of(TENSOR_ALIGNMENT_BYTES);
            let range = offset_bytes.zip(spec.bytes());
            let range = range.and_then(|(offset, bytes)| Some((offset, bytes, offset.checked_add(bytes)?)));
            let Some((offset_bytes, bytes, end)) = range else {
                let message = format!("with shape {:?} the tensors' bytes exceed 64 bits", spec.shape);
                return Err(ServiceError::input(&spec.name, message));
            };
            placed.push(Self { spec: spec.clone(), offset_bytes, bytes });
            end_bytes = end;
        }
        Ok((placed, end_bytes))
    }
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use pswitch_device::SharedMemory;

    use super::*;
    use crate::service::Datatype;
    use crate::slots::SlotMemory;

    fn specs() -> [TensorSpec; 2] {
        [TensorSpec::new("a", Datatype::Uint8, [3]), TensorSpec::new("b", Datatype::Int16, [2])]
    }

    fn submission() -> (Arc<SlotMemory>, Submission) {
        let memory = SlotMemory::new(Arc::new(SharedMemory::create("slots", 8192).unwrap()));
        let (placed, bytes) = PlacedTensor::place(&specs()).unwrap();
        assert_eq!(bytes, 516);
        let slot = memory.reserve(bytes).unwrap();
        (Arc::clone(&memory), Submission::new("m", placed, slot).unwrap())
    }

    #[test]
    fn pieces_add_up_in_the_slot() {
        let (memory, mut submission) = submission();
        submission.append(1, &[1]).unwrap();
        submission.append(0, &[7, 8, 9]).unwrap();
        assert_eq!((submission.missing_bytes(0), submission.missing_bytes(1)), (0, 3));
        let error = submission.check_complete().unwrap_err().to_string();
        assert_eq!(error, "input 'b': expected 4 bytes of data, found 1");
        submission.append(1, &[2, 3, 4]).unwrap();
        let (model, placed, slot) = submission.into_parts().unwrap();
        assert_eq!(model, "m");
        let slot = slot.freeze();
        assert_eq!(&slot.view(placed[0].offset_bytes, 3).unwrap()[..], [7, 8, 9]);
        assert_eq!(&slot.view(placed[1].offset_bytes, 4).unwrap()[..], [1, 2, 3, 4]);
        drop(slot);
        assert_eq!(memory.in_use_bytes(), 0);
    }

    #[test]
    fn more_than_a_tensor_has_is_refused() {
        let (memory, mut submission) = submission();
        submission.append(0, &[0, 0]).unwrap();
        let error = submission.append(0, &[0, 0]).unwrap_err().to_string();
        assert_eq!(error, "input 'a': expected 3 bytes of data, found at least 4");
        assert!(submission.append(2, &[0]).is_err());
        assert!(submission.into_parts().is_err());
        assert_eq!(memory.in_use_bytes(), 0);
    }

    #[test]
    fn tensors_whose_bytes_overflow_have_no_place() {
        let large = TensorSpec::new("x", Datatype::Uint8, [u64::MAX - 100]);
        assert!(PlacedTensor::place(std::slice::from_ref(&large)).is_ok());
        assert!(PlacedTensor::place(&[large.clone(), large]).is_err());
    }
}
