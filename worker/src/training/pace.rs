//! What is asked ahead of every operator of a step: whether to go on.

use std::sync::atomic::{AtomicU32, Ordering};

/// Watches over the operators of a step, those of the backward pass too, which autograd may launch from threads of its own.
pub trait Pace: Sync {
    /// A step begins.
    fn begin(&self) {}

    /// Ahead of every operator, one at a time: whether the step is to end here. It may hold the caller up.
    fn stops(&self) -> bool;
}

/// A stop flag and nothing else: for the host, where an operator is over when its call returns.
impl Pace for AtomicU32 {
    fn stops(&self) -> bool {
        self.load(Ordering::Relaxed) != 0
    }
}
