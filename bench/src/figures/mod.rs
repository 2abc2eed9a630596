//! What the figures of the paper, and our own, are made of: results as they are measured, drawn and kept.

mod data;

pub(crate) use data::{Bar, Cycle, Figure, LeftOut, Parts};
