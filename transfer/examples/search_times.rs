//! How long the searches take, in the way of the paper's table: its two rules together, each alone, none, and ours.
//!
//! `cargo run --release -p pswitch-transfer --example search_times [SECONDS]`: each search is cut off after so many
//! seconds, one if none are given. The profiles are measured (see `profiles/`); their layers are the operators of the
//! exported program, and a cut makes sense only ahead of one with bytes.

use std::error::Error;
use std::time::Duration;
use std::{array, env};

use pswitch_transfer::{Algorithm, Plan, Profile, TransferError, plan, plan_within};

const PROFILES: [&str; 3] = [
    include_str!("profiles/resnet152.yaml"),
    include_str!("profiles/inception_v3.yaml"),
    include_str!("profiles/bert_base.yaml"),
];
/// In the order of the columns.
const RULES: [(bool, bool); 4] = [(true, true), (true, false), (false, true), (false, false)];

fn main() -> Result<(), Box<dyn Error>> {
    let limit = env::args().nth(1).map_or(Ok(1.0), |seconds| seconds.parse())?;
    let limit = Duration::try_from_secs_f64(limit)?;
    println!("model         layers  with bytes  groups     ours  both rules    rule 1    rule 2      none");
    for text in PROFILES {
        let profile: Profile = serde_yaml::from_str(text)?;
        let best = plan(&profile, Algorithm::Optimal)?;
        let [both, first, second, none] = array::from_fn(|column| {
            let (rule1, rule2) = RULES[column];
            match plan_within(&profile, Algorithm::Paper { rule1, rule2 }, limit) {
                Ok(plan) => took(&plan),
                Err(TransferError::CutOff { .. }) => format!("> {limit:?}"),
                Err(error) => error.to_string(),
            }
        });
        println!(
            "{:<12}  {:>6}  {:>10}  {:>6}  {:>7}  {both:>10}  {first:>8}  {second:>8}  {none:>8}",
            profile.model,
            profile.layers.len(),
            profile.layers.iter().filter(|layer| layer.bytes > 0).count(),
            best.groups.len(),
            took(&best),
        );
    }
    Ok(())
}

fn took(plan: &Plan) -> String {
    format!("{:.0?}", Duration::from_secs_f64(plan.search_us / 1e6))
}
