use std::fmt;
use std::str::FromStr;

use crate::DeviceError;

/// Names a device: `host`, `host:1`, `cuda:0`.
///
/// ```
/// use pswitch_device::DeviceId;
///
/// assert_eq!("host".parse(), Ok(DeviceId::Host(0)));
/// assert_eq!("cuda:3".parse(), Ok(DeviceId::Cuda(3)));
/// assert_eq!(DeviceId::Host(0).to_string(), "host");
/// assert_eq!(DeviceId::Host(1).to_string(), "host:1");
/// assert!("gpu".parse::<DeviceId>().is_err());
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum DeviceId {
    /// The CPU and its memory. Several may be opened in one process, each with links of its own.
    Host(u32),
    /// A CUDA GPU by its ordinal.
    Cuda(u32),
}

impl fmt::Display for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host(0) => f.write_str("host"),
            Self::Host(index) => write!(f, "host:{index}"),
            Self::Cuda(index) => write!(f, "cuda:{index}"),
        }
    }
}

impl FromStr for DeviceId {
    type Err = DeviceError;

    fn from_str(text: &str) -> Result<Self, DeviceError> {
        let invalid = || DeviceError::InvalidDeviceId { text: text.to_owned() };
        let (kind, index) = match text.split_once(':') {
            Some((kind, index)) => (kind, Some(index)),
            None => (text, None),
        };
        let index = match index {
            // `u32::from_str` would take a sign as well.
            Some(digits) if digits.bytes().all(|b| b.is_ascii_digit()) => {
                Some(digits.parse::<u32>().map_err(|_| invalid())?)
            }
            Some(_) => return Err(invalid()),
            None => None,
        };
        match (kind, index) {
            ("host", index) => Ok(Self::Host(index.unwrap_or(0))),
            ("cuda", Some(index)) => Ok(Self::Cuda(index)),
            _ => Err(invalid()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_what_it_displays() {
        for id in [DeviceId::Host(0), DeviceId::Host(7), DeviceId::Cuda(0), DeviceId::Cuda(u32::MAX)] {
            assert_eq!(id.to_string().parse(), Ok(id));
        }
        assert_eq!("host:0".parse(), Ok(DeviceId::Host(0)));
    }

    #[test]
    fn refuses_what_names_no_device() {
        for text in
            ["", "host:", "cuda", "cuda:", "cuda:+1", "cuda:-1", "cuda:4294967296", "Host", "host:1:2"]
        {
            let error = text.parse::<DeviceId>().unwrap_err();
            assert_eq!(error, DeviceError::InvalidDeviceId { text: text.to_owned() });
        }
    }
}
