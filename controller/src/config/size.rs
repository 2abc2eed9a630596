use std::fmt;
use std::str::FromStr;

use serde::de::{Deserialize, Deserializer, Error, Unexpected, Visitor};

/// Names of the units, with their bytes. Binary before decimal: that is the order in which sizes are printed.
const UNITS: [(&str, u64); 9] = [
    ("TiB", 1 << 40),
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", 1 << 10),
    ("TB", 1_000_000_000_000),
    ("GB", 1_000_000_000),
    ("MB", 1_000_000),
    ("kB", 1_000),
    ("B", 1),
];

const SIZE_FORMS: &str = "a size such as 8GiB, 512MiB, 1.5GB or a plain number of bytes";
const BANDWIDTH_FORMS: &str = "a bandwidth such as 1GB/s, 55.5GB/s or 800MiB/s";

/// A number of bytes that people write with a unit: `8GiB`, `512MiB`, `1.5GB`, `4096`.
///
/// KiB, MiB, GiB and TiB are powers of 1024, kB, MB, GB and TB powers of 1000; no unit means bytes. What it prints it
/// reads back as the same number.
///
/// ```
/// use pswitch_controller::ByteSize;
///
/// let size: ByteSize = "1.5GiB".parse()?;
/// assert_eq!(size.bytes(), 1_610_612_736);
/// assert_eq!(size.to_string(), "1536MiB");
/// assert!("8 apples".parse::<ByteSize>().is_err());
/// # Ok::<(), pswitch_controller::ParseSizeError>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ByteSize(u64);

impl ByteSize {
    /// That many bytes.
    #[must_use]
    pub const fn from_bytes(bytes: u64) -> Self {
        Self(bytes)
    }

    /// That many MiB; saturates.
    #[must_use]
    pub const fn from_mib(mib: u64) -> Self {
        Self(mib.saturating_mul(1 << 20))
    }

    /// The number of bytes.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        self.0
    }
}

/// A text that should be a size or a bandwidth and is not.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{text}' is not {allowed}")]
pub struct ParseSizeError {
    /// The text.
    pub text: String,
    /// What is allowed.
    pub allowed: &'static str,
}

impl FromStr for ByteSize {
    type Err = ParseSizeError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        parse_bytes(text)
            .map(Self)
            .ok_or_else(|| ParseSizeError { text: text.to_owned(), allowed: SIZE_FORMS })
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unit = UNITS.iter().find(|(_, unit)| self.0 != 0 && self.0.is_multiple_of(*unit) && *unit > 1);
        match unit {
            Some((name, unit)) => write!(f, "{}{name}", self.0 / unit),
            None => write!(f, "{}", self.0),
        }
    }
}

/// The exact product of a decimal number and a unit, rounded down to bytes.
fn parse_bytes(text: &str) -> Option<u64> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let unit = match unit.trim_start() {
        "" => 1,
        "KB" => 1_000,
        name => UNITS.iter().find(|(known, _)| *known == name)?.1,
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, "0"));
    // Twelve places are more than any byte of a TiB needs; u64 whole parts keep the arithmetic inside u128.
    if whole.is_empty() || fraction.is_empty() || fraction.len() > 12 {
        return None;
    }
    let whole = u128::from(whole.parse::<u64>().ok()?) * u128::from(unit);
    let scale = 10_u128.pow(u32::try_from(fraction.len()).ok()?);
    let fraction = u128::from(fraction.parse::<u64>().ok()?) * u128::from(unit) / scale;
    u64::try_from(whole + fraction).ok()
}

impl<'de> Deserialize<'de> for ByteSize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(SizeVisitor)
    }
}

/// Reads inside the visitor, so that errors carry line and column of the value.
struct SizeVisitor;

impl Visitor<'_> for SizeVisitor {
    type Value = ByteSize;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(SIZE_FORMS)
    }

    fn visit_u64<E: Error>(self, bytes: u64) -> Result<ByteSize, E> {
        Ok(ByteSize(bytes))
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<ByteSize, E> {
        text.parse().map_err(|_| E::invalid_value(Unexpected::Str(text), &self))
    }
}

/// A size that is given, or left to the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SizeSetting {
    /// `auto`: the server decides when it knows device and models.
    #[default]
    Auto,
    /// Exactly that.
    Fixed(ByteSize),
}

impl FromStr for SizeSetting {
    type Err = ParseSizeError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.trim() {
            "auto" => Ok(Self::Auto),
            text => text.parse().map(Self::Fixed),
        }
    }
}

impl fmt::Display for SizeSetting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Fixed(size) => size.fmt(f),
        }
    }
}

impl<'de> Deserialize<'de> for SizeSetting {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(SettingVisitor)
    }
}

struct SettingVisitor;

impl Visitor<'_> for SettingVisitor {
    type Value = SizeSetting;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "auto or {SIZE_FORMS}")
    }

    fn visit_u64<E: Error>(self, bytes: u64) -> Result<SizeSetting, E> {
        Ok(SizeSetting::Fixed(ByteSize(bytes)))
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<SizeSetting, E> {
        text.parse().map_err(|_| E::invalid_value(Unexpected::Str(text), &self))
    }
}

/// Bytes per second, written as `1GB/s`, `55.5GB/s`, `800MiB/s`; never zero.
///
/// ```
/// use pswitch_controller::Bandwidth;
///
/// let link: Bandwidth = "1.5GB/s".parse()?;
/// assert_eq!(link.bytes_per_s(), 1.5e9);
/// assert_eq!(link.to_string(), "1500MB/s");
/// # Ok::<(), pswitch_controller::ParseSizeError>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Bandwidth(ByteSize);

impl Bandwidth {
    /// The number that copy times are computed with.
    #[must_use]
    #[allow(clippy::cast_precision_loss)] // rounding the 54th bit of a bandwidth changes nothing
    pub fn bytes_per_s(self) -> f64 {
        self.0.0 as f64
    }
}

impl FromStr for Bandwidth {
    type Err = ParseSizeError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bytes = text.trim().strip_suffix("/s").and_then(parse_bytes).filter(|bytes| *bytes > 0);
        bytes
            .map(|bytes| Self(ByteSize(bytes)))
            .ok_or_else(|| ParseSizeError { text: text.to_owned(), allowed: BANDWIDTH_FORMS })
    }
}

impl fmt::Display for Bandwidth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // A decimal unit where one divides evenly: links are sold in them.
        let unit = UNITS.iter().find(|(name, unit)| !name.contains('i') && self.0.0.is_multiple_of(*unit));
        let (name, unit) = unit.copied().unwrap_or(("B", 1));
        write!(f, "{}{name}/s", self.0.0 / unit)
    }
}

impl<'de> Deserialize<'de> for Bandwidth {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(BandwidthVisitor)
    }
}

struct BandwidthVisitor;

impl Visitor<'_> for BandwidthVisitor {
    type Value = Bandwidth;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(BANDWIDTH_FORMS)
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Bandwidth, E> {
        text.parse().map_err(|_| E::invalid_value(Unexpected::Str(text), &self))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn sizes_are_read_exactly() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("17B", 17),
            ("8GiB", 8 << 30),
            (" 512 MiB ", 512 << 20),
            ("1.5GB", 1_500_000_000),
            ("1.5KB", 1_500),
            ("0.000000000001TB", 1),
            ("18446744073709551615", u64::MAX),
        ] {
            assert_eq!(text.parse::<ByteSize>().map(ByteSize::bytes), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn what_is_not_a_size_is_refused_with_what_is() {
        for text in ["", "GiB", "8G", "8 gib", "-1", "1..5GB", "1.GB", ".5GB", "1e9", "16777216TiB", "8GiBx"]
        {
            let error = text.parse::<ByteSize>().unwrap_err();
            assert!(error.to_string().contains("such as 8GiB"), "{text}: {error}");
        }
        for text in ["1GB", "0GB/s", "GB/s", "fast"] {
            assert!(text.parse::<Bandwidth>().is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn sizes_are_read_back_as_printed(bytes: u64, shift in 0_u32..64) {
            let size = ByteSize(bytes >> shift << (shift / 2));
            prop_assert_eq!(size.to_string().parse::<ByteSize>(), Ok(size));
            prop_assert_eq!(SizeSetting::Fixed(size).to_string().parse::<SizeSetting>(), Ok(SizeSetting::Fixed(size)));
            if size.0 > 0 {
                let link = Bandwidth(size);
                prop_assert_eq!(link.to_string().parse::<Bandwidth>(), Ok(link));
            }
        }
    }
}
