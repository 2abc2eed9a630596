use crate::TrainError;

/// A number of the configuration that is held against rules.
pub(super) struct Check {
    setting: &'static str,
    value: f64,
}

impl Check {
    pub(super) fn new(setting: &'static str, value: f64) -> Check {
        Check { setting, value }
    }

    pub(super) fn holds(&self, rule: bool, needed: &'static str) -> Result<(), TrainError> {
        if rule { Ok(()) } else { Err(refused(self.setting, shown(self.value), needed)) }
    }

    pub(super) fn finite(&self) -> Result<(), TrainError> {
        self.holds(self.value.is_finite(), "finite")
    }

    /// A number that libtorch computes with in 32 bits, where parameters have no more: it refuses those beyond.
    pub(super) fn fits_f32(&self) -> Result<(), TrainError> {
        self.holds(self.value.abs() <= MOST_F32, "within 3.4028234e38 of 0, as 32-bit floats are")
    }

    pub(super) fn not_negative(&self) -> Result<(), TrainError> {
        self.holds(self.value.is_finite() && self.value >= 0.0, "finite and not negative")
    }

    pub(super) fn positive(&self) -> Result<(), TrainError> {
        self.holds(self.value.is_finite() && self.value > 0.0, "finite and more than 0")
    }
}

/// The largest number that a 32-bit float holds.
pub(super) const MOST_F32: f64 = f32::MAX as f64;

/// A number without hundreds of digits.
fn shown(value: f64) -> String {
    if value.abs() < 1e16 { value.to_string() } else { format!("{value:e}") }
}

pub(super) fn at_least_one(setting: &'static str, value: u64) -> Result<(), TrainError> {
    if value > 0 { Ok(()) } else { Err(refused(setting, value, "at least 1")) }
}

pub(super) fn refused(setting: &'static str, found: impl ToString, needed: &'static str) -> TrainError {
    TrainError::Setting { setting, found: found.to_string(), needed }
}
