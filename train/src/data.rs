mod array;
mod dataset;
mod mapped;
mod npy;
mod synthetic;
mod tensor_file;

pub use array::{ArrayInfo, RowSource};
pub use dataset::Dataset;
pub use npy::NpyError;
pub use synthetic::{Synthetic, SyntheticArray};

pub(crate) use tensor_file::{MOST_HEADER_BYTES, TensorFile, file_type};
