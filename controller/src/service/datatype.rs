//! The protocol's datatypes.

use std::fmt;

use super::ServiceError;

/// Datatype of a tensor's elements, as the Open Inference Protocol names them.
///
/// The protocol's BYTES (strings) is missing on purpose: no PyTorch tensor holds it. Complex, quantised and 8-bit
/// floating-point types of PyTorch have no name in the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Datatype {
    /// `torch.bool`: one byte, 0 or 1.
    Bool,
    /// `torch.uint8`.
    Uint8,
    /// `torch.uint16`.
    Uint16,
    /// `torch.uint32`.
    Uint32,
    /// `torch.uint64`.
    Uint64,
    /// `torch.int8`.
    Int8,
    /// `torch.int16`.
    Int16,
    /// `torch.int32`.
    Int32,
    /// `torch.int64`.
    Int64,
    /// `torch.float16`; has no form in JSON.
    Fp16,
    /// `torch.bfloat16`; has no form in JSON.
    Bf16,
    /// `torch.float32`.
    Fp32,
    /// `torch.float64`.
    Fp64,
}

impl Datatype {
    /// Every datatype.
    pub const ALL: [Self; 13] = [
        Self::Bool,
        Self::Uint8,
        Self::Uint16,
        Self::Uint32,
        Self::Uint64,
        Self::Int8,
        Self::Int16,
        Self::Int32,
        Self::Int64,
        Self::Fp16,
        Self::Bf16,
        Self::Fp32,
        Self::Fp64,
    ];

    /// The protocol's name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Bool => "BOOL",
            Self::Uint8 => "UINT8",
            Self::Uint16 => "UINT16",
            Self::Uint32 => "UINT32",
            Self::Uint64 => "UINT64",
            Self::Int8 => "INT8",
            Self::Int16 => "INT16",
            Self::Int32 => "INT32",
            Self::Int64 => "INT64",
            Self::Fp16 => "FP16",
            Self::Bf16 => "BF16",
            Self::Fp32 => "FP32",
            Self::Fp64 => "FP64",
        }
    }

    /// The datatype of a protocol name; `None` for BYTES and for what the protocol does not know.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|datatype| datatype.name() == name)
    }

    /// Bytes of one element.
    #[must_use]
    pub const fn size_bytes(self) -> u64 {
        match self {
            Self::Bool | Self::Uint8 | Self::Int8 => 1,
            Self::Uint16 | Self::Int16 | Self::Fp16 | Self::Bf16 => 2,
            Self::Uint32 | Self::Int32 | Self::Fp32 => 4,
            Self::Uint64 | Self::Int64 | Self::Fp64 => 8,
        }
    }

    /// Whether tensors of it can be written as JSON numbers; the others need the binary tensor data extension.
    #[must_use]
    pub const fn has_json_form(self) -> bool {
        !matches!(self, Self::Fp16 | Self::Bf16)
    }

    /// The datatype that a client named for a tensor.
    ///
    /// # Errors
    /// [`ServiceError::InvalidInput`] with what the server knows.
    pub fn of_tensor(tensor: &str, name: &str) -> Result<Self, ServiceError> {
        Self::from_name(name).ok_or_else(|| {
            let known = Self::ALL.map(Self::name).join(", ");
            let message = if name == "BYTES" {
                format!("datatype BYTES is not supported: PyTorch tensors hold numbers ({known})")
            } else {
                format!("unknown datatype '{name}', expected one of {known}")
            };
            ServiceError::InvalidInput { tensor: tensor.to_owned(), message }
        })
    }
}

impl fmt::Display for Datatype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lead_back_to_their_datatype() {
        for datatype in Datatype::ALL {
            assert_eq!(Datatype::from_name(datatype.name()), Some(datatype));
        }
        assert_eq!(Datatype::from_name("fp32"), None, "the protocol's strings are case-sensitive");
    }

    #[test]
    fn bytes_is_refused_by_name() {
        let error = Datatype::of_tensor("text", "BYTES").unwrap_err().to_string();
        assert!(error.contains("'text'") && error.contains("BYTES is not supported"), "{error}");
        let error = Datatype::of_tensor("x", "FP8").unwrap_err().to_string();
        assert!(error.contains("unknown datatype 'FP8'") && error.contains("BF16"), "{error}");
    }
}
