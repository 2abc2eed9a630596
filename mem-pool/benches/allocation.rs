//! What an allocation costs.
fn main() {}
