use serde::{Deserialize, Serialize};

use super::check;
use super::section::Section;
use crate::TrainError;

/// How long a task is trained: `{steps: 1000}` or `{epochs: 3}` in a configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Text", into = "Text")]
pub enum Length {
    /// That many steps of the optimizer.
    Steps(u64),
    /// That many times through the data.
    Epochs(u64),
}

/// The keys as they are written: a map with one of two keys, which serde has no enum for that YAML's writers would like.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Text {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    steps: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    epochs: Option<u64>,
}

impl TryFrom<Text> for Length {
    type Error = &'static str;

    fn try_from(text: Text) -> Result<Length, &'static str> {
        match (text.steps, text.epochs) {
            (Some(steps), None) => Ok(Length::Steps(steps)),
            (None, Some(epochs)) => Ok(Length::Epochs(epochs)),
            _ => Err("it is either `steps` or `epochs`, exactly one of them"),
        }
    }
}

impl From<Length> for Text {
    fn from(length: Length) -> Text {
        match length {
            Length::Steps(steps) => Text { steps: Some(steps), epochs: None },
            Length::Epochs(epochs) => Text { steps: None, epochs: Some(epochs) },
        }
    }
}

impl Section for Length {
    const EXPECTED: &'static str = "a mapping with `steps` or `epochs`";
}

impl Length {
    pub(super) fn validate(self) -> Result<(), TrainError> {
        match self {
            Length::Steps(steps) => check::at_least_one("length.steps", steps),
            Length::Epochs(epochs) => check::at_least_one("length.epochs", epochs),
        }
    }
}
