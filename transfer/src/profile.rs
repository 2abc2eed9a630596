use serde::{Deserialize, Serialize};

use crate::TransferError;

/// What a model's layers cost on one device and what its link costs: all that a plan depends on.
///
/// The file format is whatever serde writes: YAML, of which JSON is a subset. Unknown fields are refused.
///
/// ```
/// use pswitch_transfer::Profile;
///
/// let profile: Profile = serde_yaml::from_str(
///     "
///     model: tiny
///     link: {bandwidth_bytes_per_s: 55.5e9, per_copy_us: 2.5, per_wait_us: 1.0}
///     layers:
///       - {name: conv1, bytes: 37632, compute_us: 31.2}
///       - {name: relu, bytes: 0, compute_us: 4}
///     ",
/// )?;
/// profile.validate()?;
/// assert_eq!(profile.layers[0].bytes, 37_632);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Profile {
    /// The model's name.
    pub model: String,
    /// What copies and waits cost.
    pub link: LinkCosts,
    /// The layers in order of execution.
    pub layers: Vec<Layer>,
}

/// What moving a group costs.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LinkCosts {
    /// Bytes that cross the link in a second; finite and more than zero.
    pub bandwidth_bytes_per_s: f64,
    /// What a copy with its doorbell takes beside its bytes, while layers compute; finite and not negative.
    pub per_copy_us: f64,
    /// What waiting for a doorbell takes of the time for computing, even if it has rung; finite and not negative.
    pub per_wait_us: f64,
}

/// One step of a model's execution.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Layer {
    /// Its name, for people.
    pub name: String,
    /// Bytes of the span that it is the first to need.
    pub bytes: u64,
    /// How long it computes; finite and not negative.
    pub compute_us: f64,
    /// Bytes that it reads from the host while it computes, over the link that copies use: rows of a table, say.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub host_bytes: u64,
}

#[allow(clippy::trivially_copy_pass_by_ref)] // serde calls it so
fn is_zero(bytes: &u64) -> bool {
    *bytes == 0
}

impl Profile {
    /// Refuses a profile that describes nothing real.
    ///
    /// Planning does this itself; call it to refuse a file when it is read.
    ///
    /// # Errors
    /// [`TransferError::NoLayers`], [`TransferError::InvalidBandwidth`], [`TransferError::InvalidLinkCost`],
    /// [`TransferError::InvalidLayerTime`], [`TransferError::TooManyBytes`], [`TransferError::TimesOverflow`].
    pub fn validate(&self) -> Result<(), TransferError> {
        self.horizon_us().map(|_| ())
    }

    /// Checks everything and returns a time by which any plan of this profile has ended.
    pub(crate) fn horizon_us(&self) -> Result<f64, TransferError> {
        let LinkCosts { bandwidth_bytes_per_s, per_copy_us, per_wait_us } = self.link;
        if !(bandwidth_bytes_per_s.is_finite() && bandwidth_bytes_per_s > 0.0) {
            return Err(TransferError::InvalidBandwidth { found: bandwidth_bytes_per_s });
        }
        for (field, found) in [("per_copy_us", per_copy_us), ("per_wait_us", per_wait_us)] {
            if !is_time(found) {
                return Err(TransferError::InvalidLinkCost { field, found });
            }
        }
        if self.layers.is_empty() {
            return Err(TransferError::NoLayers);
        }
        let mut bytes = 0_u64;
        let mut horizon_us = 0.0;
        for (index, layer) in self.layers.iter().enumerate() {
            if !is_time(layer.compute_us) {
                return Err(TransferError::InvalidLayerTime {
                    layer: index,
                    name: layer.name.clone(),
                    found: layer.compute_us,
                });
            }
            bytes = bytes
                .checked_add(layer.bytes)
                .and_then(|bytes| bytes.checked_add(layer.host_bytes))
                .ok_or_else(|| TransferError::TooManyBytes { layer: index, name: layer.name.clone() })?;
            horizon_us += layer.compute_us + per_copy_us + per_wait_us;
        }
        if bytes > 0 {
            horizon_us += bytes as f64 * self.link.us_per_byte();
        }
        if horizon_us.is_finite() { Ok(horizon_us) } else { Err(TransferError::TimesOverflow) }
    }
}

impl LinkCosts {
    /// Link time of a byte, without the cost of its copy.
    pub(crate) fn us_per_byte(&self) -> f64 {
        1e6 / self.bandwidth_bytes_per_s
    }
}

fn is_time(us: f64) -> bool {
    us.is_finite() && us >= 0.0
}
