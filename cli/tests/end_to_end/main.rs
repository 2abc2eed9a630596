//! The whole of pswitch with real processes: `pswitch serve` and its workers, asked over HTTP.
//!
//! Models and what they must answer are made by `cargo xtask fixtures` (part of `cargo xtask test`): outputs of eager
//! PyTorch on this machine, compared to the last bit. Nothing here holds the time that something takes against a
//! limit, but for a patience that no working server comes near.

mod archives;
mod commands;
mod faults;
mod figures;
mod making_room;
mod places;
mod plan_groups;
mod profiles;
mod refusals;
mod serving;
mod shutdown;
mod support;
mod switching;
mod training;
