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
        if rule { Ok(()) } else { Err(refused(self.setting, self.value, needed)) }
    }

    pub(super) fn finite(&self) -> Result<(), TrainError> {
        self.holds(self.value.is_finite(), "finite")
    }

    pub(super) fn not_negative(&self) -> Result<(), TrainError> {
        self.holds(self.value.is_finite() && self.value >= 0.0, "finite and not negative")
    }

    pub(super) fn positive(&self) -> Result<(), TrainError> {
        self.holds(self.value.is_finite() && self.value > 0.0, "finite and more than 0")
    }
}

pub(super) fn at_least_one(setting: &'static str, value: u64) -> Result<(), TrainError> {
    if value > 0 { Ok(()) } else { Err(refused(setting, value, "at least 1")) }
}

pub(super) fn refused(setting: &'static str, found: impl ToString, needed: &'static str) -> TrainError {
    TrainError::Setting { setting, found: found.to_string(), needed }
}
