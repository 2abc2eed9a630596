//! Plans a profile with every algorithm, and shows what the best plan does and what keeping its first bytes would do.
//!
//! `cargo run -p pswitch-transfer --example plan_a_profile [PROFILE.yaml]`; without an argument ResNet152 as measured on
//! one H200.

use std::error::Error;
use std::time::Duration;
use std::{env, fs};

use pswitch_transfer::{
    Algorithm, Profile, compare, plan, predict, ready_us, resident_prefix_curve, smallest_resident_prefix,
};

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
    println!("{}\n", compare(&profile, Duration::from_secs(1))?.table());

    let ready_us = ready_us(&profile)?;
    println!("resident MB  predicted us  above the ready model's {ready_us:.1} us");
    let smallest = smallest_resident_prefix(&profile, 0.01)?;
    let mut curve = resident_prefix_curve(&profile, 10)?;
    curve.push(smallest.clone());
    curve.sort_by_key(|prefix| prefix.bytes);
    curve.dedup();
    for prefix in curve {
        let mark = if prefix == smallest { "  <- enough" } else { "" };
        println!(
            "{:>11.2}  {:>12.1}  {:>6.2} %{mark}",
            prefix.bytes as f64 / 1e6,
            prefix.predicted_us,
            (prefix.predicted_us / ready_us - 1.0) * 100.0
        );
    }
    Ok(())
}
