//! How single values are read. Every check sits inside a visitor, so that its error carries line and column.

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use pswitch_device::DeviceId;
use pswitch_transfer::Algorithm;
use serde::de::{Deserialize, Deserializer, Error, MapAccess, Unexpected, Visitor};

use super::DeviceChoice;
use crate::repository::ModelName;

/// The longest time that can be configured: a day.
pub(crate) const LONGEST_MS: u64 = 24 * 60 * 60 * 1000;

/// A whole number between two others, both included.
pub(crate) fn number<'de, D, T, const MIN: u64, const MAX: u64>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: TryFrom<u64>,
{
    let visitor = NumberVisitor { range: MIN..=MAX, what: "a number" };
    let value = deserializer.deserialize_any(visitor)?;
    T::try_from(value).map_err(|_| D::Error::custom(format_args!("{value} is too large")))
}

/// A time in whole milliseconds, at least that many and at most [`LONGEST_MS`].
pub(crate) fn milliseconds<'de, D, const MIN: u64>(deserializer: D) -> Result<Duration, D::Error>
where
    D: Deserializer<'de>,
{
    let visitor = NumberVisitor { range: MIN..=LONGEST_MS, what: "a number of milliseconds" };
    deserializer.deserialize_any(visitor).map(Duration::from_millis)
}

/// As [`milliseconds`], for a key whose absence means something.
pub(crate) fn optional_milliseconds<'de, D, const MIN: u64>(
    deserializer: D,
) -> Result<Option<Duration>, D::Error>
where
    D: Deserializer<'de>,
{
    milliseconds::<_, MIN>(deserializer).map(Some)
}

/// As [`number`], for a key whose absence means something.
pub(crate) fn optional_number<'de, D, T, const MIN: u64, const MAX: u64>(
    deserializer: D,
) -> Result<Option<T>, D::Error>
where
    D: Deserializer<'de>,
    T: TryFrom<u64>,
{
    number::<_, T, MIN, MAX>(deserializer).map(Some)
}

struct NumberVisitor {
    range: RangeInclusive<u64>,
    what: &'static str,
}

impl Visitor<'_> for NumberVisitor {
    type Value = u64;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} from {} to {}", self.what, self.range.start(), self.range.end())
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<u64, E> {
        if self.range.contains(&value) {
            Ok(value)
        } else {
            Err(E::invalid_value(Unexpected::Unsigned(value), &self))
        }
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<u64, E> {
        Err(E::invalid_value(Unexpected::Signed(value), &self))
    }
}

/// Microseconds, with a fraction if need be.
pub(crate) fn microseconds<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    deserializer.deserialize_any(MicrosecondsVisitor)
}

struct MicrosecondsVisitor;

impl MicrosecondsVisitor {
    #[allow(clippy::cast_precision_loss)] // a day is far below 2^53 microseconds
    const LONGEST_US: f64 = (LONGEST_MS * 1000) as f64;

    fn checked<E: Error>(&self, value: f64) -> Result<Duration, E> {
        if (0.0..=Self::LONGEST_US).contains(&value) {
            return Ok(Duration::from_secs_f64(value / 1e6));
        }
        Err(E::invalid_value(Unexpected::Float(value), self))
    }
}

impl Visitor<'_> for MicrosecondsVisitor {
    type Value = Duration;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a number of microseconds from 0 to {}", Self::LONGEST_US)
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Duration, E> {
        self.checked(value)
    }

    #[allow(clippy::cast_precision_loss)] // what is above 2^53 is out of range, rounded or not
    fn visit_u64<E: Error>(self, value: u64) -> Result<Duration, E> {
        self.checked(value as f64)
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<Duration, E> {
        Err(E::invalid_value(Unexpected::Signed(value), &self))
    }
}

/// A value that is written as a text with a form of its own.
struct TextVisitor<T> {
    allowed: &'static str,
    parse: fn(&str) -> Option<T>,
}

impl<T> Visitor<'_> for TextVisitor<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.allowed)
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<T, E> {
        (self.parse)(text).ok_or_else(|| E::invalid_value(Unexpected::Str(text), &self))
    }
}

/// Where to listen.
pub(crate) fn address<'de, D: Deserializer<'de>>(deserializer: D) -> Result<SocketAddr, D::Error> {
    let allowed = "an address and a port such as 127.0.0.1:8000 or [::1]:8000";
    deserializer.deserialize_str(TextVisitor { allowed, parse: |text| text.parse().ok() })
}

/// A plan's algorithm by its name.
pub(crate) fn algorithm<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Algorithm, D::Error> {
    let allowed = "one of optimal, paper, per-layer, whole, sequential, equal-N";
    deserializer.deserialize_str(TextVisitor { allowed, parse: |text| text.parse().ok() })
}

/// A text that says something.
pub(crate) fn text<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    let parse = |text: &str| (!text.trim().is_empty()).then(|| text.to_owned());
    deserializer.deserialize_str(TextVisitor { allowed: "a text", parse })
}

/// Training tasks with their files.
pub(crate) fn tasks<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<BTreeMap<String, PathBuf>, D::Error> {
    deserializer.deserialize_map(TasksVisitor)
}

struct TasksVisitor;

impl<'de> Visitor<'de> for TasksVisitor {
    type Value = BTreeMap<String, PathBuf>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a map of names of tasks to files, as in `resnet: tasks/resnet.yaml`")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut tasks = BTreeMap::new();
        while let Some(TaskName(name)) = map.next_key()? {
            let TaskFile(file) = map.next_value()?;
            if tasks.contains_key(&name) {
                return Err(A::Error::custom(format_args!("duplicate task `{name}`")));
            }
            tasks.insert(name, file);
        }
        Ok(tasks)
    }
}

/// The name of a task, under the rule for names of models.
struct TaskName(String);

impl<'de> Deserialize<'de> for TaskName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let parse = |text: &str| text.parse::<ModelName>().is_ok().then(|| Self(text.to_owned()));
        let allowed = "a name of a task: letters, digits, '.', '_' and '-'";
        deserializer.deserialize_str(TextVisitor { allowed, parse })
    }
}

/// The file of a task's configuration.
struct TaskFile(PathBuf);

impl<'de> Deserialize<'de> for TaskFile {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let parse = |text: &str| (!text.is_empty()).then(|| Self(text.into()));
        deserializer.deserialize_str(TextVisitor { allowed: "the file of a task's configuration", parse })
    }
}

impl FromStr for DeviceChoice {
    type Err = pswitch_device::DeviceError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "auto" => Ok(Self::Auto),
            text => text.parse::<DeviceId>().map(Self::Id),
        }
    }
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Id(id) => id.fmt(f),
        }
    }
}

impl<'de> Deserialize<'de> for DeviceChoice {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let allowed = "auto, host, host:N or cuda:N";
        deserializer.deserialize_str(TextVisitor { allowed, parse: |text| text.parse().ok() })
    }
}
