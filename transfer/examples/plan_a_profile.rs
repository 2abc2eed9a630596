//! Plans a profile with every algorithm and shows what the best plan does.
//!
//! `cargo run -p pswitch-transfer --example plan_a_profile [PROFILE.yaml]`; without an argument ResNet152 as measured on
//! one H200.

use std::error::Error;
use std::time::Duration;
use std::{env, fs};

use pswitch_transfer::{Algorithm, Profile, compare, plan, predict};

fn main() -> Result<(), Box<dyn Error>> {
    let text = match env::args().nth(1) {
        Some(path) => fs::read_to_string(path)?,
        None => include_str!("profiles/resnet152.yaml").to_owned(),
    };
    let profile: Profile = serde_yaml::from_str(&text)?;
    let best = plan(&profile, Algorithm::Optimal)?;
    let prediction = predict(&profile, &best.cuts())?;

    println!("{} in {} groups\n\n{}\n", best.model, best.groups.len(), prediction.table());
    println!("{prediction}; no plan ends before {:.1} us\n", best.lower_bound_us);
    println!("{}", compare(&profile, Duration::from_secs(1))?.table());
    Ok(())
}
