use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use pswitch_model::DType;
use safetensors::tensor::Metadata;

use super::mapped;
use crate::TrainError;

/// The longest header that readers of safetensors accept.
pub(crate) const MOST_HEADER_BYTES: u64 = 100_000_000;
/// The length of the header, in front of it.
const LENGTH_BYTES: usize = 8;

/// A mapped .safetensors file whose header was checked against its length.
#[derive(Debug)]
pub(crate) struct TensorFile {
    pub(crate) map: Mmap,
    /// By name.
    pub(crate) tensors: Vec<TensorEntry>,
    /// Texts that stand in the header beside the tensors.
    pub(crate) metadata: BTreeMap<String, String>,
}

/// A tensor of a file.
#[derive(Debug)]
pub(crate) struct TensorEntry {
    pub(crate) name: String,
    pub(crate) dtype: DType,
    pub(crate) shape: Vec<u64>,
    /// Where its bytes lie in the map.
    pub(crate) bytes: Range<usize>,
}

impl TensorFile {
    pub(crate) fn open(path: &Path) -> Result<TensorFile, TrainError> {
        let map = mapped::map(path)?;
        let (header, data_start) = header(path, &map)?;
        // Reading checks that the tensors follow one another without a hole, and that each is as long as its shape says.
        let header: Metadata = serde_json::from_slice(header)
            .map_err(|source| TrainError::TensorHeader { path: path.to_owned(), source })?;
        let (needed, found) = (header.data_len(), map.len() - data_start);
        if needed != found {
            let (needed_bytes, found_bytes) = (needed as u64, found as u64);
            return Err(TrainError::TensorFileLength { path: path.to_owned(), needed_bytes, found_bytes });
        }

        let mut tensors = Vec::new();
        for (name, info) in header.tensors() {
            let Some(dtype) = element_type(info.dtype) else {
                let (path, found) = (PathBuf::from(path), format!("{:?}", info.dtype));
                return Err(TrainError::ElementType { tensor: name, path, found });
            };
            let shape = info.shape.iter().map(|dim| *dim as u64).collect();
            // Both ends are at most `needed`, and so inside of the map.
            let bytes = data_start + info.data_offsets.0..data_start + info.data_offsets.1;
            tensors.push(TensorEntry { name, dtype, shape, bytes });
        }
        tensors.sort_by(|one, other| one.name.cmp(&other.name));
        let metadata = header.metadata().iter().flatten().map(|(key, text)| (key.clone(), text.clone()));
        let metadata = metadata.collect();
        Ok(TensorFile { map, tensors, metadata })
    }
}

/// The bytes of the header, and where those of the tensors begin.
fn header<'a>(path: &Path, bytes: &'a [u8]) -> Result<(&'a [u8], usize), TrainError> {
    let refused = |header_bytes, most_bytes| TrainError::TensorHeaderLength {
        path: path.to_owned(),
        header_bytes,
        most_bytes,
    };
    let Some((length, behind)) = bytes.split_first_chunk::<LENGTH_BYTES>() else {
        return Err(refused(0, 0));
    };
    let header_bytes = u64::from_le_bytes(*length);
    let most_bytes = MOST_HEADER_BYTES.min(behind.len() as u64);
    usize::try_from(header_bytes)
        .ok()
        .filter(|_| header_bytes <= most_bytes)
        .map(|length| (&behind[..length], LENGTH_BYTES + length))
        .ok_or_else(|| refused(header_bytes, most_bytes))
}

/// The two names of every element type that PyTorch and safetensors share.
const TYPES: [(DType, safetensors::Dtype); 14] = [
    (DType::Bool, safetensors::Dtype::BOOL),
    (DType::U8, safetensors::Dtype::U8),
    (DType::I8, safetensors::Dtype::I8),
    (DType::F8E5M2, safetensors::Dtype::F8_E5M2),
    (DType::F8E4M3FN, safetensors::Dtype::F8_E4M3),
    (DType::I16, safetensors::Dtype::I16),
    (DType::U16, safetensors::Dtype::U16),
    (DType::F16, safetensors::Dtype::F16),
    (DType::BF16, safetensors::Dtype::BF16),
    (DType::I32, safetensors::Dtype::I32),
    (DType::F32, safetensors::Dtype::F32),
    (DType::C64, safetensors::Dtype::C64),
    (DType::F64, safetensors::Dtype::F64),
    (DType::I64, safetensors::Dtype::I64),
];

fn element_type(found: safetensors::Dtype) -> Option<DType> {
    TYPES.iter().find(|(_, known)| *known == found).map(|(dtype, _)| *dtype)
}

/// What a safetensors header calls an element type.
pub(crate) fn file_type(dtype: DType) -> Option<safetensors::Dtype> {
    TYPES.iter().find(|(known, _)| *known == dtype).map(|(_, name)| *name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_have_the_same_size_under_both_names() {
        for (dtype, name) in TYPES {
            assert_eq!(dtype.size_bytes() * 8, name.bitsize() as u64, "{dtype}");
            assert_eq!(element_type(name), Some(dtype));
            assert_eq!(file_type(dtype), Some(name));
        }
    }
}
