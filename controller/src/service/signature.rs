//! What a model takes and gives, and the check of a request against it.

use std::fmt;

use super::{Datatype, ServiceError};

/// Name, datatype and shape of one tensor of a request or an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    /// Name, as in the exported program.
    pub name: String,
    /// Datatype of the elements.
    pub datatype: Datatype,
    /// Extent of every dimension; empty for a scalar.
    pub shape: Vec<u64>,
}

impl TensorSpec {
    /// A tensor's description.
    #[must_use]
    pub fn new(name: impl Into<String>, datatype: Datatype, shape: impl Into<Vec<u64>>) -> Self {
        Self { name: name.into(), datatype, shape: shape.into() }
    }

    /// Number of elements; `None` if it does not fit 64 bits. A dimension of extent 0 makes it 0 whatever the others.
    #[must_use]
    pub fn elements(&self) -> Option<u64> {
        if self.shape.contains(&0) {
            return Some(0);
        }
        self.shape.iter().try_fold(1u64, |product, extent| product.checked_mul(*extent))
    }

    /// Bytes of its data; `None` if that does not fit 64 bits.
    #[must_use]
    pub fn bytes(&self) -> Option<u64> {
        self.elements()?.checked_mul(self.datatype.size_bytes())
    }
}

/// One dimension of a signature.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DimensionSignature {
    /// Always the same.
    Fixed(u64),
    /// Chosen by the request within a range, both ends included; -1 in the protocol's metadata.
    Dynamic {
        /// Least extent.
        min: u64,
        /// Largest extent; `None` without a bound.
        max: Option<u64>,
    },
}

impl DimensionSignature {
    /// Whether a tensor may have this extent here.
    #[must_use]
    pub fn admits(&self, extent: u64) -> bool {
        match self {
            Self::Fixed(fixed) => extent == *fixed,
            Self::Dynamic { min, max } => extent >= *min && max.is_none_or(|max| extent <= max),
        }
    }
}

impl fmt::Display for DimensionSignature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fixed(extent) => write!(f, "{extent}"),
            Self::Dynamic { min, max: Some(max) } => write!(f, "{min}..{max}"),
            Self::Dynamic { min, max: None } => write!(f, "{min}.."),
        }
    }
}

/// One input or output of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSignature {
    /// Name, as in the exported program.
    pub name: String,
    /// Datatype of the elements.
    pub datatype: Datatype,
    /// Every dimension.
    pub shape: Vec<DimensionSignature>,
}

impl TensorSignature {
    /// The shape as messages show it: `[1..32, 3, 224, 224]`.
    #[must_use]
    pub fn shape_text(&self) -> String {
        let dimensions: Vec<String> = self.shape.iter().map(ToString::to_string).collect();
        format!("[{}]", dimensions.join(", "))
    }

    fn check(&self, found: &TensorSpec) -> Result<(), ServiceError> {
        if found.datatype != self.datatype {
            let message = format!("expected datatype {}, found {}", self.datatype, found.datatype);
            return Err(ServiceError::input(&self.name, message));
        }
        if found.shape.len() != self.shape.len() {
            let message = format!(
                "expected {} dimension(s), shape {}, found {} with shape {:?}",
                self.shape.len(),
                self.shape_text(),
                found.shape.len(),
                found.shape
            );
            return Err(ServiceError::input(&self.name, message));
        }
        for (index, (expected, extent)) in self.shape.iter().zip(&found.shape).enumerate() {
            if !expected.admits(*extent) {
                let message = format!(
                    "dimension {index} must be {expected}, found {extent} (shape {:?}, expected {})",
                    found.shape,
                    self.shape_text()
                );
                return Err(ServiceError::input(&self.name, message));
            }
        }
        Ok(())
    }
}

/// Inputs and outputs of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelSignature {
    /// What kind of model it is, such as `pytorch_export`: the protocol's "platform".
    pub platform: String,
    /// What a request must bring, all of it.
    pub inputs: Vec<TensorSignature>,
    /// What an answer brings.
    pub outputs: Vec<TensorSignature>,
}

impl ModelSignature {
    /// Checks a request's tensors, in any order: names, datatypes, ranks and every dimension.
    ///
    /// Returns for every input of the signature its place in `found`. Relations between dynamic dimensions (one
    /// must be twice another) are the service's to check.
    ///
    /// # Errors
    /// [`ServiceError::InvalidInput`] and [`ServiceError::InvalidRequest`] with expected and found.
    pub fn check_inputs(&self, found: &[TensorSpec]) -> Result<Vec<usize>, ServiceError> {
        let expected_names = || {
            let names: Vec<String> = self.inputs.iter().map(|input| format!("'{}'", input.name)).collect();
            names.join(", ")
        };
        let mut places: Vec<Option<usize>> = vec![None; self.inputs.len()];
        for (place, spec) in found.iter().enumerate() {
            let Some(index) = self.inputs.iter().position(|input| input.name == spec.name) else {
                let message = format!("the model has no such input; its inputs are {}", expected_names());
                return Err(ServiceError::input(&spec.name, message));
            };
            if places[index].is_some() {
                return Err(ServiceError::input(&spec.name, "given more than once"));
            }
            self.inputs[index].check(spec)?;
            places[index] = Some(place);
        }
        let mut order = Vec::with_capacity(places.len());
        for (input, place) in self.inputs.iter().zip(places) {
            let Some(place) = place else {
                let message = format!(
                    "missing; the request has {} input(s), the model takes {}: {}",
                    found.len(),
                    self.inputs.len(),
                    expected_names()
                );
                return Err(ServiceError::input(&input.name, message));
            };
            order.push(place);
        }
        Ok(order)
    }

    /// The place of an output by name.
    #[must_use]
    pub fn output(&self, name: &str) -> Option<usize> {
        self.outputs.iter().position(|output| output.name == name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn signature() -> ModelSignature {
        let batch = DimensionSignature::Dynamic { min: 1, max: Some(8) };
        ModelSignature {
            platform: "test".into(),
            inputs: vec![
                TensorSignature {
                    name: "a".into(),
                    datatype: Datatype::Fp32,
                    shape: vec![batch.clone(), DimensionSignature::Fixed(4)],
                },
                TensorSignature { name: "b".into(), datatype: Datatype::Int64, shape: vec![] },
            ],
            outputs: vec![],
        }
    }

    fn failure(found: &[TensorSpec]) -> String {
        signature().check_inputs(found).unwrap_err().to_string()
    }

    #[test]
    fn any_order_is_taken_and_reported() {
        let found = [TensorSpec::new("b", Datatype::Int64, []), TensorSpec::new("a", Datatype::Fp32, [2, 4])];
        assert_eq!(signature().check_inputs(&found).unwrap(), [1, 0]);
    }

    #[test]
    fn messages_name_tensor_expected_and_found() {
        let a = TensorSpec::new("a", Datatype::Fp32, [2, 4]);
        let b = TensorSpec::new("b", Datatype::Int64, []);
        assert_eq!(
            failure(std::slice::from_ref(&a)),
            "input 'b': missing; the request has 1 input(s), the model takes 2: 'a', 'b'"
        );
        assert_eq!(failure(&[a.clone(), a.clone()]), "input 'a': given more than once");
        assert_eq!(
            failure(&[TensorSpec::new("x", Datatype::Fp32, [])]),
            "input 'x': the model has no such input; its inputs are 'a', 'b'"
        );
        assert_eq!(
            failure(&[TensorSpec::new("a", Datatype::Int32, [2, 4]), b.clone()]),
            "input 'a': expected datatype FP32, found INT32"
        );
        assert_eq!(
            failure(&[TensorSpec::new("a", Datatype::Fp32, [8]), b.clone()]),
            "input 'a': expected 2 dimension(s), shape [1..8, 4], found 1 with shape [8]"
        );
        assert_eq!(
            failure(&[TensorSpec::new("a", Datatype::Fp32, [9, 4]), b]),
            "input 'a': dimension 0 must be 1..8, found 9 (shape [9, 4], expected [1..8, 4])"
        );
    }

    #[test]
    fn sizes_that_overflow_are_none() {
        assert_eq!(TensorSpec::new("x", Datatype::Fp32, [u64::MAX, 2]).bytes(), None);
        assert_eq!(TensorSpec::new("x", Datatype::Fp32, [u64::MAX]).bytes(), None);
        assert_eq!(TensorSpec::new("x", Datatype::Fp32, [u64::MAX, u64::MAX, 0]).bytes(), Some(0));
        assert_eq!(TensorSpec::new("x", Datatype::Fp64, []).bytes(), Some(8));
    }
}
