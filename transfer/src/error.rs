use std::time::Duration;

#[cfg(feature = "engine")]
use pswitch_device::DeviceError;

/// Everything that the planner and the engine can refuse or fail at.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TransferError {
    /// A profile without a single layer.
    #[error("the profile has no layers")]
    NoLayers,
    /// A bandwidth that moves nothing.
    #[error("the link's bandwidth is {found} bytes/s: it must be finite and more than zero")]
    InvalidBandwidth {
        /// What the profile says.
        found: f64,
    },
    /// A cost of the link that is no time.
    #[error("the link's {field} is {found}: it must be finite and not negative")]
    InvalidLinkCost {
        /// The profile's field.
        field: &'static str,
        /// What the profile says.
        found: f64,
    },
    /// A layer's time that is no time.
    #[error("layer {layer} ({name:?}) takes {found} us: a time must be finite and not negative")]
    InvalidLayerTime {
        /// The layer, counted from 0.
        layer: usize,
        /// Its name.
        name: String,
        /// What the profile says.
        found: f64,
    },
    /// More bytes than can be counted.
    #[error("the bytes of the layers up to layer {layer} ({name:?}) overflow 64 bits")]
    TooManyBytes {
        /// The layer at which the sum overflows, counted from 0.
        layer: usize,
        /// Its name.
        name: String,
    },
    /// Times that are finite one by one but not in sum.
    #[error("the times of the profile add up to more than a number can hold")]
    TimesOverflow,
    /// A cut ahead of layer 0, behind the last layer or not behind the cut before it.
    #[error("cut {cut} is not a layer from {least} to {most}: cuts rise, and each begins a group")]
    InvalidCut {
        /// The cut.
        cut: usize,
        /// The first layer that it may be.
        least: usize,
        /// The last layer that it may be.
        most: usize,
    },
    /// A share of the ready model's time that is none.
    #[error("the tolerance is {found}: it must be finite and not negative")]
    InvalidTolerance {
        /// What was given.
        found: f64,
    },
    /// A plan of no groups was asked for.
    #[error("a plan has at least one group, 0 were asked for")]
    NoGroups,
    /// A text that names no algorithm.
    #[error(
        "{text:?} names no algorithm: write `optimal`, `paper`, `paper-rule-1`, `paper-rule-2`, \
         `paper-exhaustive`, `per-layer`, `whole`, `sequential` or `equal-8`"
    )]
    UnknownAlgorithm {
        /// What was given.
        text: String,
    },
    /// A search that did not finish in the time that it was given.
    #[error("the search was cut off after {after:?} and {visited} groups tried")]
    CutOff {
        /// How long it ran.
        after: Duration,
        /// How many groups it tried.
        visited: u64,
    },
    /// The thread that reports completions could not be started.
    #[cfg(feature = "engine")]
    #[error("a thread for completed transfers cannot be started")]
    Thread {
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The device refused an operation or failed at it.
    #[cfg(feature = "engine")]
    #[error("the device cannot {what}")]
    Device {
        /// What it was asked for.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: DeviceError,
    },
}
