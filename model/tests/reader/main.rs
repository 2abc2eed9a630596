//! Tests of the reader on small archives that PyTorch wrote, and on what can be made of them.

mod programs;
mod properties;
mod refusals;
mod support;
mod zips;
