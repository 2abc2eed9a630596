//! What the figures of the paper, and our own, are made of: results as they are measured, drawn and kept.

mod data;
mod drawing;
mod look;
#[cfg(test)]
pub(crate) mod made_up;
mod panel;
mod paper;
mod scale;

pub(crate) use data::{Bar, Cycle, Figure, LeftOut, Load, Parts, Took};
pub(crate) use drawing::Drawing;
pub(crate) use paper::total_overheads;
