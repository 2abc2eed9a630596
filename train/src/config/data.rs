use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::check;
use super::section::Section;
use crate::TrainError;

/// What a task is trained on: `{files: [x.npy, y.npy], batch_size: 32}` or `{synthetic: {rows: 1000, batch_size: 32}}` in a
/// configuration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Text", into = "Text")]
pub enum DataConfig {
    /// Arrays in files, see [`Dataset`](crate::Dataset).
    Files {
        /// The files, .npy or .safetensors.
        files: Vec<PathBuf>,
        /// Rows of a batch.
        batch_size: u64,
        /// Whether the rows come in another order in each epoch. The default.
        shuffle: bool,
        /// Whether the rows behind the last full batch are left out. Not the default.
        drop_last: bool,
    },
    /// Made up arrays of the shapes that the program takes, see [`Synthetic`](crate::Synthetic).
    Synthetic {
        /// Rows of the made up data set.
        rows: u64,
        /// Rows of a batch.
        batch_size: u64,
    },
}

/// The keys as they are written.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Text {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    files: Option<Vec<PathBuf>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    synthetic: Option<SyntheticText>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    batch_size: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    shuffle: Option<bool>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    drop_last: Option<bool>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields, expecting = "a mapping with `rows` and `batch_size`")]
struct SyntheticText {
    rows: u64,
    batch_size: u64,
}

impl TryFrom<Text> for DataConfig {
    type Error = &'static str;

    fn try_from(text: Text) -> Result<DataConfig, &'static str> {
        match text {
            Text {
                files: Some(files),
                synthetic: None,
                batch_size: Some(batch_size),
                shuffle,
                drop_last,
            } => {
                let (shuffle, drop_last) = (shuffle.unwrap_or(true), drop_last.unwrap_or(false));
                Ok(DataConfig::Files { files, batch_size, shuffle, drop_last })
            }
            Text { files: Some(_), synthetic: None, batch_size: None, .. } => {
                Err("`files` needs a `batch_size` beside it")
            }
            Text { files: None, synthetic: Some(made), batch_size: None, shuffle: None, drop_last: None } => {
                Ok(DataConfig::Synthetic { rows: made.rows, batch_size: made.batch_size })
            }
            Text { files: None, synthetic: Some(_), .. } => {
                Err("`synthetic` has no other key beside it: `batch_size` stands inside of it")
            }
            _ => Err("it is either `files` or `synthetic`, exactly one of them"),
        }
    }
}

impl From<DataConfig> for Text {
    fn from(data: DataConfig) -> Text {
        match data {
            DataConfig::Files { files, batch_size, shuffle, drop_last } => Text {
                files: Some(files),
                synthetic: None,
                batch_size: Some(batch_size),
                shuffle: Some(shuffle),
                drop_last: Some(drop_last),
            },
            DataConfig::Synthetic { rows, batch_size } => Text {
                files: None,
                synthetic: Some(SyntheticText { rows, batch_size }),
                batch_size: None,
                shuffle: None,
                drop_last: None,
            },
        }
    }
}

impl Section for DataConfig {
    const EXPECTED: &'static str = "a mapping with `files` and `batch_size`, or with `synthetic`";
}

impl DataConfig {
    /// Rows of a batch.
    pub fn batch_size(&self) -> u64 {
        match *self {
            DataConfig::Files { batch_size, .. } | DataConfig::Synthetic { batch_size, .. } => batch_size,
        }
    }

    pub(super) fn validate(&self) -> Result<(), TrainError> {
        match self {
            DataConfig::Files { files, batch_size, .. } => {
                if files.is_empty() {
                    return Err(check::refused("data.files", "an empty list", "a list of at least one file"));
                }
                check::at_least_one("data.batch_size", *batch_size)
            }
            DataConfig::Synthetic { rows, batch_size } => {
                check::at_least_one("data.synthetic.rows", *rows)?;
                check::at_least_one("data.synthetic.batch_size", *batch_size)
            }
        }
    }
}
