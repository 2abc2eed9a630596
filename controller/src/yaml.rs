//! The one place that knows the YAML parser.

use serde::de::DeserializeOwned;

/// A text that is not YAML, or has a key or value that is not allowed: what, where by line and column, and what is.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub struct YamlError(serde_yaml::Error);

/// Reads a text; one that says nothing is the default.
pub(crate) fn read<T: DeserializeOwned + Default>(text: &str) -> Result<T, YamlError> {
    let value: Option<T> = serde_yaml::from_str(text).map_err(YamlError)?;
    Ok(value.unwrap_or_default())
}
