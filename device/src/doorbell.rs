//! The values of a doorbell word.
//!
//! A copy stream writes [`RUNG`] behind a group's bytes; whoever executes waits until the word is at least that.
//! [`POISONED`] is above it, so that a waiter on a GPU, which can only compare, is released as well. What it computes then is
//! garbage: whoever poisons a word knows, before, that nobody may be given that.

/// What the word announces has not arrived.
pub const CLEAR: u32 = 0;
/// What the word announces has arrived.
pub const RUNG: u32 = 1;
/// What the word announces will never arrive.
pub const POISONED: u32 = 2;
