//! The folder of models: which there are, with which settings, and what is wrong with the others.

use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use serde::Deserialize;
use serde::de::{Deserializer, Error, Unexpected, Visitor};

use crate::config::fields;
use crate::error::ControllerError;
use crate::yaml;

const ARCHIVE: &str = "model.pt2";
const SETTINGS: &str = "model.yaml";
const LONGEST_NAME_BYTES: usize = 128;
const NAME_RULE: &str =
    "it must begin with a letter or a digit and go on with letters, digits, '.', '_' and '-'";
const LENGTH_RULE: &str = "it must be 1 to 128 bytes long";

/// What was found in a model repository.
///
/// ```no_run
/// use pswitch_controller::Repository;
///
/// let repository = Repository::scan("models".as_ref())?;
/// for model in &repository.models {
///     println!("{} at {}", model.name, model.archive.display());
/// }
/// for broken in &repository.broken {
///     println!("{} is left out: {}", broken.name, broken.error);
/// }
/// # Ok::<(), pswitch_controller::ControllerError>(())
/// ```
#[derive(Debug, Default)]
pub struct Repository {
    /// The models that can be opened, sorted by name.
    pub models: Vec<ModelEntry>,
    /// The entries that cannot, sorted by name.
    pub broken: Vec<BrokenEntry>,
}

/// One model of a repository. Its archive is there; nobody has looked into it yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelEntry {
    /// Its name, which is its folder's.
    pub name: ModelName,
    /// Its archive, `NAME/model.pt2`.
    pub archive: PathBuf,
    /// Its settings, from `NAME/model.yaml` if there is one.
    pub settings: ModelSettings,
}

/// An entry of a repository that is no model.
#[derive(Debug)]
pub struct BrokenEntry {
    /// The folder's name, with what is not UTF-8 replaced.
    pub name: String,
    /// Why it is left out.
    pub error: ControllerError,
}

/// Settings of one model, in `NAME/model.yaml`. Every key may be left out; one that does not exist is refused.
///
/// ```yaml
/// version: "2"
/// max_queue: 64
/// deadline_ms: 2000
/// execution_timeout_ms: 10000
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ModelSettings {
    /// Version that the front ends report and accept, by the rules of a name. Default: `1`.
    #[serde(deserialize_with = "version")]
    pub version: String,
    /// Requests of this model that may wait; more are refused, whatever room the device's queue has. Default: no
    /// limit but the device's.
    #[serde(deserialize_with = "fields::optional_number::<_, _, 1, 1_000_000>")]
    pub max_queue: Option<usize>,
    /// Time for a request that brings no deadline of its own, waiting included, in milliseconds. Default: the
    /// server's `request_timeout_ms`.
    #[serde(rename = "deadline_ms", deserialize_with = "fields::optional_milliseconds::<_, 1>")]
    pub deadline: Option<Duration>,
    /// Time for one execution, in milliseconds; then it is stopped. Default: the server's `execution_timeout_ms`.
    #[serde(rename = "execution_timeout_ms", deserialize_with = "fields::optional_milliseconds::<_, 1>")]
    pub execution_timeout: Option<Duration>,
}

impl Default for ModelSettings {
    fn default() -> Self {
        Self { version: "1".to_owned(), max_queue: None, deadline: None, execution_timeout: None }
    }
}

impl ModelSettings {
    /// Reads the text of a file; `path` is its name in errors. An empty text gives the defaults.
    ///
    /// # Errors
    /// [`ControllerError::ParseModelSettings`] with line and column.
    pub fn parse(path: impl AsRef<Path>, text: &str) -> Result<Self, ControllerError> {
        yaml::read(text)
            .map_err(|source| ControllerError::ParseModelSettings { path: path.as_ref().to_owned(), source })
    }
}

/// Name of a model: safe in a path, in a URL and in a terminal.
///
/// ```
/// use pswitch_controller::ModelName;
///
/// assert!("efficientnet-lite0".parse::<ModelName>().is_ok());
/// assert!("../etc".parse::<ModelName>().is_err());
/// ```
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ModelName(String);

impl ModelName {
    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ModelName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for ModelName {
    type Err = ControllerError;

    fn from_str(name: &str) -> Result<Self, ControllerError> {
        match broken_rule(name) {
            None => Ok(Self(name.to_owned())),
            Some(reason) => Err(ControllerError::ModelName { name: name.escape_debug().to_string(), reason }),
        }
    }
}

fn broken_rule(name: &str) -> Option<&'static str> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if name.is_empty() || name.len() > LONGEST_NAME_BYTES {
        Some(LENGTH_RULE)
    } else if !name.starts_with(|c: char| c.is_ascii_alphanumeric()) || !name.chars().all(allowed) {
        Some(NAME_RULE)
    } else {
        None
    }
}

fn version<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    deserializer.deserialize_any(VersionVisitor)
}

/// A version reads best as a number, so `2` is as good as `"2"`.
struct VersionVisitor;

impl Visitor<'_> for VersionVisitor {
    type Value = String;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a version such as 2 or \"2.1\": letters, digits, '.', '_' and '-'")
    }

    fn visit_u64<E: Error>(self, version: u64) -> Result<String, E> {
        Ok(version.to_string())
    }

    fn visit_str<E: Error>(self, version: &str) -> Result<String, E> {
        match broken_rule(version) {
            None => Ok(version.to_owned()),
            Some(_) => Err(E::invalid_value(Unexpected::Str(version), &self)),
        }
    }
}

impl Repository {
    /// Lists the folder. What is hidden (`.git`) or no folder (a README) is passed over; a folder that is no model is
    /// reported and does not stop the others. Looks into no archive.
    ///
    /// # Errors
    /// [`ControllerError::ReadRepository`] if the folder itself cannot be listed.
    pub fn scan(root: &Path) -> Result<Self, ControllerError> {
        let unreadable = |source| ControllerError::ReadRepository { path: root.to_owned(), source };
        let mut found = Self::default();
        for entry in fs::read_dir(root).map_err(unreadable)? {
            let entry = entry.map_err(unreadable)?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.starts_with('.') || !entry.path().is_dir() {
                continue;
            }
            match read_entry(&entry.path(), &name) {
                Ok(model) => found.models.push(model),
                Err(error) => found.broken.push(BrokenEntry { name, error }),
            }
        }
        found.models.sort_by(|a, b| a.name.cmp(&b.name));
        found.broken.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(found)
    }
}

fn read_entry(folder: &Path, name: &str) -> Result<ModelEntry, ControllerError> {
    let name = name.parse()?;
    let archive = folder.join(ARCHIVE);
    match fs::metadata(&archive) {
        Ok(metadata) if metadata.is_file() => {}
        Ok(_) => return Err(ControllerError::NoArchive { path: archive }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(ControllerError::NoArchive { path: archive });
        }
        Err(source) => return Err(ControllerError::ReadModel { path: archive, source }),
    }
    let path = folder.join(SETTINGS);
    let settings = match fs::read_to_string(&path) {
        Ok(text) => ModelSettings::parse(&path, &text)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => ModelSettings::default(),
        Err(source) => return Err(ControllerError::ReadModel { path, source }),
    };
    Ok(ModelEntry { name, archive, settings })
}

#[cfg(test)]
mod tests {
    use std::error::Error as _;

    use super::*;

    fn add(root: &Path, name: &str, archive: bool, settings: Option<&str>) {
        let folder = root.join(name);
        fs::create_dir(&folder).unwrap();
        if archive {
            fs::write(folder.join(ARCHIVE), b"PK").unwrap();
        }
        if let Some(text) = settings {
            fs::write(folder.join(SETTINGS), text).unwrap();
        }
    }

    #[test]
    fn models_are_found_sorted_and_the_broken_do_not_stop_them() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        add(root, "vit", true, None);
        add(root, "bert-base", true, Some("version: 2\nmax_queue: 8\ndeadline_ms: 1500\n"));
        add(root, "empty", false, None);
        add(root, "odd name", true, None);
        add(root, "typo", true, Some("version: 1\nmax_que: 8\n"));
        add(root, "zero", true, Some("max_queue: 0\n"));
        add(root, "nothing-set", true, Some("# nothing yet\n"));
        add(root, ".git", false, None);
        fs::write(root.join("README.md"), "models").unwrap();

        let found = Repository::scan(root).unwrap();
        let names: Vec<_> = found.models.iter().map(|model| model.name.as_str()).collect();
        assert_eq!(names, ["bert-base", "nothing-set", "vit"]);
        let bert = &found.models[0];
        assert_eq!(bert.archive, root.join("bert-base/model.pt2"));
        let deadline = Some(Duration::from_millis(1500));
        let expected =
            ModelSettings { version: "2".into(), max_queue: Some(8), deadline, ..Default::default() };
        assert_eq!(bert.settings, expected);
        assert_eq!(found.models[2].settings, ModelSettings::default());

        let reasons: Vec<_> = found
            .broken
            .iter()
            .map(|broken| {
                let source = broken.error.source().map(|source| format!(": {source}"));
                format!("{}: {}{}", broken.name, broken.error, source.unwrap_or_default())
            })
            .collect();
        assert_eq!(reasons.len(), 4, "{reasons:#?}");
        assert!(
            reasons[0].contains("empty: there is no") && reasons[0].contains("model.pt2"),
            "{}",
            reasons[0]
        );
        assert!(reasons[1].starts_with("odd name: 'odd name' is not a model's name"), "{}", reasons[1]);
        assert!(reasons[2].contains("unknown field `max_que`, expected one of `version`, `max_queue`"));
        assert!(reasons[2].ends_with("at line 2 column 1"), "{}", reasons[2]);
        assert!(
            reasons[3].contains("max_queue: invalid value: integer `0`, expected a number from 1 to 1000000")
        );
        assert!(reasons[3].ends_with("at line 1 column 12"), "{}", reasons[3]);
    }

    #[test]
    fn a_repository_that_is_not_there_is_an_error() {
        let root = tempfile::tempdir().unwrap();
        let error = Repository::scan(&root.path().join("models")).unwrap_err();
        assert!(matches!(error, ControllerError::ReadRepository { .. }), "{error}");
    }

    #[test]
    fn names_are_safe_everywhere() {
        for name in ["a", "resnet152", "bert-base_v1.5", "0"] {
            assert_eq!(name.parse::<ModelName>().unwrap().as_str(), name);
        }
        let long = "x".repeat(129);
        for name in ["", ".", "..", "../etc", "a/b", "a b", "-a", ".hidden", "naïve", "a\n", &long] {
            assert!(name.parse::<ModelName>().is_err(), "{name:?}");
        }
    }

    #[test]
    fn versions_may_be_numbers_or_texts() {
        for (text, version) in [("version: 3", "3"), ("version: \"3.1\"", "3.1"), ("version: v2", "v2")] {
            assert_eq!(ModelSettings::parse("model.yaml", text).unwrap().version, version);
        }
        for text in ["version: a/b", "version: []", "version: 1.5", "version: -1"] {
            assert!(ModelSettings::parse("model.yaml", text).is_err(), "{text}");
        }
    }
}
