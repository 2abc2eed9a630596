use std::fmt;

use serde::{Deserialize, Serialize};

/// Names a model in a ledger and a host store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ModelId(pub u32);

impl ModelId {
    /// No model, but what belongs to training where that [lies among the homes](crate::PoolLayout::with_training_in_homes):
    /// a ledger treats it as if it were one.
    pub const TRAINING: Self = Self(u32::MAX);
}

/// Names an arena of a pool: its place in [`PoolLayout::arenas`](crate::PoolLayout::arenas).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ArenaId(pub u32);

impl fmt::Display for ModelId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if *self == Self::TRAINING { f.write_str("training") } else { write!(f, "model {}", self.0) }
    }
}

impl fmt::Display for ArenaId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "arena {}", self.0)
    }
}
