use std::io;
use std::path::PathBuf;

use pswitch_model::DType;

use crate::NpyError;

/// Everything that a task's configuration, data, checkpoints and account can be refused for or fail at.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrainError {
    /// The program cannot be trained.
    #[error("{reason}")]
    Program {
        /// What is missing or too much, and what to do.
        reason: String,
    },

    /// The file system refused.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What was to be done with it.
        action: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },

    /// A folder of checkpoints that is another's.
    #[error(
        "another task has its checkpoints in {}, of this server or of another, or its process has not ended yet: give each a \
         folder of its own",
        path.display()
    )]
    FolderTaken {
        /// The folder.
        path: PathBuf,
    },

    /// A text that is no configuration of a task: not YAML, an unknown or missing key, a value of the wrong kind.
    #[error("the configuration of the task cannot be read")]
    ConfigText(#[source] serde_yaml::Error),
    /// A value of the configuration that means nothing.
    #[error("the task's `{setting}` is {found}: it must be {needed}")]
    Setting {
        /// The key, with those around it: `optimizer.lr`.
        setting: &'static str,
        /// What the configuration says.
        found: String,
        /// What it may say.
        needed: &'static str,
    },
    /// A warm-up that is longer than the task.
    #[error(
        "a warm-up of {warm_up} steps does not fit into a task of {total_steps}: shorten `schedule.warm_up`"
    )]
    WarmUpTooLong {
        /// Steps of the warm-up.
        warm_up: u64,
        /// Steps of the task.
        total_steps: u64,
    },
    /// More steps than can be counted.
    #[error(
        "{epochs} epochs of {batches_per_epoch} batches are more than 64 bits can count: lower `length.epochs`"
    )]
    TooManySteps {
        /// Epochs of the task.
        epochs: u64,
        /// Batches of one epoch.
        batches_per_epoch: u64,
    },

    /// A path that is no regular file.
    #[error("{} is not a regular file", path.display())]
    NotAFile {
        /// The path.
        path: PathBuf,
    },
    /// A file without a byte in it.
    #[error("{} is empty", path.display())]
    EmptyFile {
        /// The file.
        path: PathBuf,
    },
    /// A data file whose name does not say how to read it.
    #[error("{} cannot be read as data: its name must end in .npy or .safetensors", path.display())]
    UnknownFormat {
        /// The file.
        path: PathBuf,
    },
    /// A .npy file whose name cannot name an array.
    #[error("{} names the array in it and must be UTF-8: rename it", path.display())]
    FileName {
        /// The file.
        path: PathBuf,
    },
    /// A .npy file that cannot be read.
    #[error("{} cannot be read as .npy", path.display())]
    Npy {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: NpyError,
    },
    /// A .safetensors file whose header is too long, or longer than the file.
    #[error(
        "{} is torn or no safetensors file: its header would have {header_bytes} bytes, {most_bytes} are possible",
        path.display()
    )]
    TensorHeaderLength {
        /// The file.
        path: PathBuf,
        /// What its first eight bytes say; 0 if it has fewer.
        header_bytes: u64,
        /// The most that a file of this length can have.
        most_bytes: u64,
    },
    /// A .safetensors file whose header does not describe tensors that follow one another.
    #[error("the header of {} does not describe tensors", path.display())]
    TensorHeader {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// A .safetensors file that is shorter or longer than its tensors.
    #[error("{} is torn: its tensors take {needed_bytes} bytes, it has {found_bytes}", path.display())]
    TensorFileLength {
        /// The file.
        path: PathBuf,
        /// Bytes of all tensors.
        needed_bytes: u64,
        /// Bytes behind the header.
        found_bytes: u64,
    },
    /// An element type that PyTorch or the file format has no name for.
    #[error("`{tensor}` of {} has elements of type {found}, which are not supported here", path.display())]
    ElementType {
        /// The tensor or array.
        tensor: String,
        /// The file.
        path: PathBuf,
        /// Its type.
        found: String,
    },

    /// A file with an array that cannot be in a data set.
    #[error("{} cannot be used as data", path.display())]
    DataFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with the array.
        source: Box<TrainError>,
    },
    /// A data set without an array.
    #[error("the data set has no arrays: name files with at least one")]
    NoArrays,
    /// An array that has no rows.
    #[error("array `{array}` has no rows: its first dimension must be at least 1")]
    NoRows {
        /// The array.
        array: String,
    },
    /// An array whose rows have no bytes.
    #[error("the rows of array `{array}` have the shape {row_shape:?} and so no elements")]
    EmptyRows {
        /// The array.
        array: String,
        /// The shape of a row.
        row_shape: Vec<u64>,
    },
    /// An array whose size in bytes overflows.
    #[error("the rows of array `{array}`, of shape {row_shape:?}, have more bytes than can be addressed")]
    RowsTooLarge {
        /// The array.
        array: String,
        /// The shape of a row.
        row_shape: Vec<u64>,
    },
    /// Two arrays of one data set that differ in their number of rows.
    #[error(
        "array `{array}` of {} has {rows} rows, and `{other}` of {}, in the same data set, has {other_rows}",
        path.display(),
        other_path.display()
    )]
    RowsDiffer {
        /// An array.
        array: String,
        /// The file that it is in.
        path: PathBuf,
        /// Its rows.
        rows: u64,
        /// The array ahead of it.
        other: String,
        /// The file that this one is in.
        other_path: PathBuf,
        /// The rows of that one.
        other_rows: u64,
    },
    /// Two arrays of one data set that have the same name.
    #[error("two arrays of the data set are named `{array}`: rename one")]
    DuplicateArray {
        /// The name.
        array: String,
    },
    /// A bound that the integers of a synthetic array cannot have.
    #[error(
        "the values of array `{array}` ({dtype}) cannot be below {below}: the bound must be from 1 to {most}"
    )]
    Bound {
        /// The array.
        array: String,
        /// Its element type.
        dtype: DType,
        /// The bound given.
        below: u64,
        /// The largest bound of this type.
        most: u64,
    },
    /// An element type that synthetic arrays cannot have.
    #[error("array `{array}` cannot be made of {dtype}: take real floats, integers or bool")]
    NotSynthetic {
        /// The array.
        array: String,
        /// Its element type.
        dtype: DType,
    },
    /// An array that the data set does not have.
    #[error("array {array} does not exist: the data set has {arrays}")]
    UnknownArray {
        /// The array asked for, counted from 0.
        array: usize,
        /// How many there are.
        arrays: usize,
    },
    /// A row that the data set does not have.
    #[error("row {row} does not exist: the data set has {rows}")]
    UnknownRow {
        /// The row asked for, counted from 0.
        row: u64,
        /// How many there are.
        rows: u64,
    },
    /// A buffer that is not as long as the rows that go into it.
    #[error("{rows} rows of array `{array}` take {needed_bytes} bytes, and the buffer has {found_bytes}")]
    BufferLength {
        /// The array.
        array: String,
        /// Rows asked for.
        rows: usize,
        /// Bytes that they take.
        needed_bytes: u128,
        /// Bytes of the buffer.
        found_bytes: usize,
    },
    /// Batches of no rows, or of none.
    #[error("{rows} rows make no batches of {batch_size}: both must be at least 1")]
    NoBatches {
        /// Rows of the data set.
        rows: u64,
        /// Rows of a batch.
        batch_size: u64,
    },
    /// The only batch is a partial one and is dropped.
    #[error("{rows} rows make no full batch of {batch_size}: lower the batch size or keep the last batch")]
    NoFullBatch {
        /// Rows of the data set.
        rows: u64,
        /// Rows of a batch.
        batch_size: u64,
    },
    /// More rows than can be shuffled in memory.
    #[error("{rows} rows are too many to shuffle, {most} can be: turn shuffling off")]
    TooManyRowsToShuffle {
        /// Rows of the data set.
        rows: u64,
        /// The most that can be shuffled.
        most: u64,
    },

    /// A tensor whose name cannot stand in a checkpoint.
    #[error("a tensor named `{tensor}` cannot be saved: {reason}")]
    TensorName {
        /// The name.
        tensor: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A tensor whose size in bytes overflows.
    #[error("tensor `{tensor}`, of shape {shape:?}, has more bytes than can be addressed")]
    TensorTooLarge {
        /// The tensor.
        tensor: String,
        /// Its shape.
        shape: Vec<u64>,
    },
    /// A tensor whose bytes are not as many as its shape says.
    #[error("tensor `{tensor}` has {needed_bytes} bytes, and {found_bytes} were given")]
    TensorLength {
        /// The tensor.
        tensor: String,
        /// Bytes by its shape and type.
        needed_bytes: u64,
        /// Bytes given.
        found_bytes: usize,
    },
    /// The bytes of a tensor could not be had.
    #[error("the bytes of tensor `{tensor}` cannot be fetched")]
    TensorBytes {
        /// The tensor.
        tensor: String,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// So many or so long names that readers refuse the header.
    #[error(
        "the header of the checkpoint has {header_bytes} bytes, {most_bytes} are allowed: save fewer tensors"
    )]
    CheckpointHeader {
        /// Bytes of the header.
        header_bytes: usize,
        /// The most that readers take.
        most_bytes: u64,
    },
    /// A .safetensors file that is no checkpoint of a task.
    #[error("{} is no checkpoint of a training task: its metadata has no `{missing}`", path.display())]
    NotACheckpoint {
        /// The file.
        path: PathBuf,
        /// The key that is not there.
        missing: &'static str,
    },
    /// A checkpoint with metadata that does not say what it should.
    #[error("the metadata of {} has no readable `{key}`", path.display())]
    CheckpointMetadata {
        /// The file.
        path: PathBuf,
        /// The key.
        key: &'static str,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// A folder with checkpoints of which none can be read.
    #[error("no checkpoint in {} can be read: take them away to begin anew, or put back one that can", folder.display())]
    NoCheckpoint {
        /// The folder.
        folder: PathBuf,
        /// What is wrong with the one of the least steps.
        source: Box<TrainError>,
    },

    /// An interruption begins while another lasts.
    #[error("the task is interrupted already: end that before another interruption begins")]
    AlreadyInterrupted,
    /// An interruption ends that never began.
    #[error("the task is not interrupted: an interruption must begin before it ends")]
    NotInterrupted,
    /// A step ends while the task is interrupted.
    #[error("a step ended while the task is interrupted: end the interruption first")]
    StepWhileInterrupted,
}
