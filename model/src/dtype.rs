use std::fmt;

/// Element type of a tensor.
///
/// Three numberings meet here: the schema's (what an archive stores), c10's (what libtorch's dispatcher takes) and
/// the Open Inference Protocol's names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum DType {
    /// `torch.uint8`
    U8,
    /// `torch.int8`
    I8,
    /// `torch.int16`
    I16,
    /// `torch.int32`
    I32,
    /// `torch.int64`
    I64,
    /// `torch.float16`
    F16,
    /// `torch.float32`
    F32,
    /// `torch.float64`
    F64,
    /// `torch.complex32`
    C32,
    /// `torch.complex64`
    C64,
    /// `torch.complex128`
    C128,
    /// `torch.bool`
    Bool,
    /// `torch.bfloat16`
    BF16,
    /// `torch.uint16`
    U16,
    /// `torch.float8_e4m3fn`
    F8E4M3FN,
    /// `torch.float8_e5m2`
    F8E5M2,
    /// `torch.float8_e4m3fnuz`
    F8E4M3FNUZ,
    /// `torch.float8_e5m2fnuz`
    F8E5M2FNUZ,
}

/// One row per type: type, schema code, c10 code, size in bytes, PyTorch name, protocol name.
type Row = (DType, u64, i8, u64, &'static str, Option<&'static str>);

const TABLE: [Row; 18] = [
    (DType::U8, 1, 0, 1, "uint8", Some("UINT8")),
    (DType::I8, 2, 1, 1, "int8", Some("INT8")),
    (DType::I16, 3, 2, 2, "int16", Some("INT16")),
    (DType::I32, 4, 3, 4, "int32", Some("INT32")),
    (DType::I64, 5, 4, 8, "int64", Some("INT64")),
    (DType::F16, 6, 5, 2, "float16", Some("FP16")),
    (DType::F32, 7, 6, 4, "float32", Some("FP32")),
    (DType::F64, 8, 7, 8, "float64", Some("FP64")),
    (DType::C32, 9, 8, 4, "complex32", None),
    (DType::C64, 10, 9, 8, "complex64", None),
    (DType::C128, 11, 10, 16, "complex128", None),
    (DType::Bool, 12, 11, 1, "bool", Some("BOOL")),
    (DType::BF16, 13, 15, 2, "bfloat16", Some("BF16")),
    (DType::U16, 28, 27, 2, "uint16", Some("UINT16")),
    (DType::F8E4M3FN, 29, 24, 1, "float8_e4m3fn", None),
    (DType::F8E5M2, 30, 23, 1, "float8_e5m2", None),
    (DType::F8E4M3FNUZ, 31, 26, 1, "float8_e4m3fnuz", None),
    (DType::F8E5M2FNUZ, 32, 25, 1, "float8_e5m2fnuz", None),
];

impl DType {
    /// Every type, in the order of the schema's codes.
    pub fn all() -> impl Iterator<Item = DType> {
        TABLE.iter().map(|row| row.0)
    }

    fn row(self) -> &'static Row {
        // The table is in the order of the variants (a test holds it to that).
        &TABLE[self as usize]
    }

    /// The type that an archive stores as `code` (`torch._export.serde.schema.ScalarType`).
    pub fn from_schema_code(code: u64) -> Option<DType> {
        TABLE.iter().find(|row| row.1 == code).map(|row| row.0)
    }

    /// The code under which an archive stores this type.
    pub fn schema_code(self) -> u64 {
        self.row().1
    }

    /// The value of `c10::ScalarType`, which libtorch's operators take.
    pub fn c10_code(self) -> i8 {
        self.row().2
    }

    /// The type of a `c10::ScalarType` value.
    pub fn from_c10_code(code: i8) -> Option<DType> {
        TABLE.iter().find(|row| row.2 == code).map(|row| row.0)
    }

    /// Bytes of one element.
    pub fn size_bytes(self) -> u64 {
        self.row().3
    }

    /// Bytes of a dense tensor of this type; nothing if there are more than a number holds.
    pub fn dense_bytes(self, sizes: &[u64]) -> Option<u64> {
        sizes.iter().try_fold(self.size_bytes(), |bytes, size| bytes.checked_mul(*size))
    }

    /// Whether its values are real numbers with a fraction: those that a loss can have.
    pub fn is_floating_point(self) -> bool {
        use DType::{BF16, F8E4M3FN, F8E4M3FNUZ, F8E5M2, F8E5M2FNUZ, F16, F32, F64};
        matches!(self, F16 | F32 | F64 | BF16 | F8E4M3FN | F8E5M2 | F8E4M3FNUZ | F8E5M2FNUZ)
    }

    /// PyTorch's name without `torch.`: `float32`.
    pub fn torch_name(self) -> &'static str {
        self.row().4
    }

    /// The name of this type in the Open Inference Protocol (`FP32`), which has none for complex and 8-bit floats.
    pub fn protocol_name(self) -> Option<&'static str> {
        self.row().5
    }

    /// The type that the Open Inference Protocol calls `name`, as far as PyTorch has it.
    pub fn from_protocol_name(name: &str) -> Option<DType> {
        TABLE.iter().find(|row| row.5 == Some(name)).map(|row| row.0)
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.torch_name())
    }
}

/// `torch.memory_format`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum MemoryFormat {
    /// `torch.contiguous_format`
    Contiguous,
    /// `torch.channels_last`
    ChannelsLast,
    /// `torch.channels_last_3d`
    ChannelsLast3d,
    /// `torch.preserve_format`
    Preserve,
}

impl MemoryFormat {
    /// The format that an archive stores as `code`.
    pub fn from_schema_code(code: u64) -> Option<MemoryFormat> {
        match code {
            1 => Some(MemoryFormat::Contiguous),
            2 => Some(MemoryFormat::ChannelsLast),
            3 => Some(MemoryFormat::ChannelsLast3d),
            4 => Some(MemoryFormat::Preserve),
            _ => None,
        }
    }

    /// The value of `c10::MemoryFormat`, which libtorch's operators take.
    pub fn c10_code(self) -> i8 {
        match self {
            MemoryFormat::Contiguous => 0,
            MemoryFormat::Preserve => 1,
            MemoryFormat::ChannelsLast => 2,
            MemoryFormat::ChannelsLast3d => 3,
        }
    }
}

/// `torch.layout`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Layout {
    /// `torch.strided`
    Strided,
    /// `torch.sparse_coo`
    SparseCoo,
    /// `torch.sparse_csr`
    SparseCsr,
    /// `torch.sparse_csc`
    SparseCsc,
    /// `torch.sparse_bsr`
    SparseBsr,
    /// `torch.sparse_bsc`
    SparseBsc,
    /// `torch._mkldnn`
    Mkldnn,
}

impl Layout {
    /// The layout that an archive stores as `code`.
    pub fn from_schema_code(code: u64) -> Option<Layout> {
        match code {
            1 => Some(Layout::SparseCoo),
            2 => Some(Layout::SparseCsr),
            3 => Some(Layout::SparseCsc),
            4 => Some(Layout::SparseBsr),
            5 => Some(Layout::SparseBsc),
            6 => Some(Layout::Mkldnn),
            7 => Some(Layout::Strided),
            _ => None,
        }
    }

    /// The value of `c10::Layout`, which libtorch's operators take.
    pub fn c10_code(self) -> i8 {
        match self {
            Layout::Strided => 0,
            Layout::SparseCoo => 1,
            Layout::SparseCsr => 2,
            Layout::Mkldnn => 3,
            Layout::SparseCsc => 4,
            Layout::SparseBsr => 5,
            Layout::SparseBsc => 6,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_in_the_order_of_the_types() {
        for (index, dtype) in DType::all().enumerate() {
            assert_eq!(dtype as usize, index);
            assert_eq!(DType::from_schema_code(dtype.schema_code()), Some(dtype));
            assert_eq!(DType::from_c10_code(dtype.c10_code()), Some(dtype));
            if let Some(name) = dtype.protocol_name() {
                assert_eq!(DType::from_protocol_name(name), Some(dtype));
            }
        }
        assert_eq!(DType::F32.to_string(), "float32");
        assert_eq!(DType::from_schema_code(0), None);
    }
}
