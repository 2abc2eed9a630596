//! The scheduler without processes, devices or clocks: directed tests, and random histories in a simulated world.

mod desk;
mod faults;
mod places;
mod policy;
mod random;
mod world;
