use std::collections::BTreeSet;

use pswitch_model::DType;

use crate::TrainError;

/// Where a task's rows come from.
pub trait RowSource: Send + Sync {
    /// Rows of every array; at least 1.
    fn rows(&self) -> u64;

    /// The arrays, at least one, in an order that does not change.
    fn arrays(&self) -> &[ArrayInfo];

    /// Copies rows of array number `array` one behind the other to `out`, dense and in C order. A row may come more than
    /// once.
    ///
    /// # Errors
    ///
    /// [`TrainError::UnknownArray`], [`TrainError::UnknownRow`], or [`TrainError::BufferLength`] if `out` is not exactly as
    /// long as the rows. `out` is then as it was.
    fn gather(&self, array: usize, rows: &[u64], out: &mut [u8]) -> Result<(), TrainError>;
}

/// An array of a data set, without its number of rows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ArrayInfo {
    name: String,
    dtype: DType,
    row_shape: Vec<u64>,
    row_bytes: u64,
}

impl ArrayInfo {
    /// Describes an array. `row_shape` is its shape without the first dimension.
    ///
    /// # Errors
    ///
    /// [`TrainError::EmptyRows`] or [`TrainError::RowsTooLarge`].
    pub fn new(name: &str, dtype: DType, row_shape: &[u64]) -> Result<ArrayInfo, TrainError> {
        let array = || (name.to_owned(), row_shape.to_vec());
        if row_shape.contains(&0) {
            let (array, row_shape) = array();
            return Err(TrainError::EmptyRows { array, row_shape });
        }
        let row_bytes = dtype
            .dense_bytes(row_shape)
            .filter(|bytes| isize::try_from(*bytes).is_ok())
            .ok_or_else(|| {
                let (array, row_shape) = array();
                TrainError::RowsTooLarge { array, row_shape }
            })?;
        let (name, row_shape) = array();
        Ok(ArrayInfo { name, dtype, row_shape, row_bytes })
    }

    /// What a program's input of this array is named.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Type of its elements.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Its shape without the first dimension.
    pub fn row_shape(&self) -> &[u64] {
        &self.row_shape
    }

    /// Bytes of one row; at least 1.
    pub fn row_bytes(&self) -> u64 {
        self.row_bytes
    }

    /// Bytes of one row, as an index.
    pub(super) fn row_len(&self) -> usize {
        usize::try_from(self.row_bytes).expect("`new` has held it against isize")
    }
}

/// The checks that come ahead of every gathering.
pub(super) fn check_gather<'a>(
    source: &'a impl RowSource,
    array: usize,
    rows: &[u64],
    out: &[u8],
) -> Result<&'a ArrayInfo, TrainError> {
    let arrays = source.arrays();
    let info = arrays.get(array).ok_or(TrainError::UnknownArray { array, arrays: arrays.len() })?;
    if let Some(row) = rows.iter().find(|row| **row >= source.rows()) {
        return Err(TrainError::UnknownRow { row: *row, rows: source.rows() });
    }
    let needed_bytes = u128::from(info.row_bytes) * rows.len() as u128;
    if needed_bytes != out.len() as u128 {
        let (array, rows, found_bytes) = (info.name.clone(), rows.len(), out.len());
        return Err(TrainError::BufferLength { array, rows, needed_bytes, found_bytes });
    }
    Ok(info)
}

/// No two arrays of a data set have the same name, and there is at least one.
pub(super) fn check_names<'a>(arrays: impl Iterator<Item = &'a ArrayInfo>) -> Result<(), TrainError> {
    let mut names = BTreeSet::new();
    for array in arrays {
        if !names.insert(array.name()) {
            return Err(TrainError::DuplicateArray { array: array.name.clone() });
        }
    }
    if names.is_empty() { Err(TrainError::NoArrays) } else { Ok(()) }
}
