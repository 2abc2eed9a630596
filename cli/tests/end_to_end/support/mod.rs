//! What all tests share: fixtures, servers, clients, and a look at processes.

mod fixtures;
mod http;
mod processes;
mod server;

use std::time::{Duration, Instant};

pub(crate) use fixtures::{Case, Fixture, Models, Tensor};
pub(crate) use http::{Answer, Client, Refusal};
pub(crate) use processes::{Process, await_end, children};
pub(crate) use server::{Ended, Serve, Server, pswitch, run, span_bytes};

/// Time that anything may take before a test gives up on it: far longer than it takes on a loaded machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(90);

/// Looks again and again until there is something to see.
///
/// # Panics
/// With what was seen last, when patience is over.
#[track_caller]
pub(crate) fn eventually<T>(what: &str, mut look: impl FnMut() -> Result<T, String>) -> T {
    let begin = Instant::now();
    loop {
        match look() {
            Ok(seen) => return seen,
            Err(found) if begin.elapsed() > PATIENCE => {
                panic!("{what}: not within {} s; last {found}", PATIENCE.as_secs())
            }
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}

/// Asserts that a message holds all of these.
#[track_caller]
pub(crate) fn assert_says(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "`{message}` does not say `{part}`");
    }
}

/// Numbers that look random and are the same in every run.
pub(crate) struct Dice(u64);

impl Dice {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    /// A number below `limit`, by xorshift64*.
    pub(crate) fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        let high = self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33;
        usize::try_from(high).unwrap() % limit
    }
}
