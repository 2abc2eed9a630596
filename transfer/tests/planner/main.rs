//! Tests of the planner.

mod bad_profiles;
mod exactness;
mod model;
mod resident;
