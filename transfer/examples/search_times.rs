//! How long the searches take, beside the paper's own table: its two rules together, each alone, none, and ours.
//!
//! `cargo run --release -p pswitch-transfer --example search_times [SECONDS]`: each search is cut off after so many
//! seconds, one if none are given; `60` gives the table of the crate's README.
//!
//! The profiles are measured (see `profiles/`). Their layers are the operators of the exported program; the paper's are
//! PyTorch's modules. So operators that are no module of their own join the layer before them here, which gives exactly
//! the paper's numbers of layers.

use std::error::Error;
use std::time::{Duration, Instant};
use std::{array, env};

use pswitch_transfer::{Algorithm, Layer, Profile, TransferError, plan, plan_within};

use self::made_up::made_up;

#[path = "profiles/made_up.rs"]
mod made_up;

/// A model of the paper.
struct Model {
    profile: &'static str,
    /// The operators that are modules. Functional ones are not: Inception_v3's ReLUs and poolings, BERT's GELUs. BERT's
    /// attention holds the dropout of its probabilities, a module.
    modules: &'static [&'static str],
    /// The paper's count of layers, and its times: both rules, rule 1 only, rule 2 only, none.
    layers: usize,
    published: [&'static str; 4],
}

const MODELS: [Model; 3] = [
    Model {
        profile: include_str!("profiles/resnet152.yaml"),
        modules: &["conv2d", "batch_norm", "relu_", "max_pool2d", "adaptive_avg_pool2d", "linear"],
        layers: 464,
        published: ["1.33 s", "2.09 s", "3.44 h", "> 24 h"],
    },
    Model {
        profile: include_str!("profiles/inception_v3.yaml"),
        modules: &["conv2d", "batch_norm", "linear"],
        layers: 189,
        published: ["0.18 s", "0.30 s", "5.07 s", "> 24 h"],
    },
    Model {
        profile: include_str!("profiles/bert_base.yaml"),
        modules: &["embedding", "linear", "layer_norm", "dropout", "scaled_dot_product_attention", "tanh"],
        layers: 139,
        published: ["0.34 s", "0.88 s", "> 24 h", "> 24 h"],
    },
];
/// In the order of the columns.
const RULES: [(bool, bool); 4] = [(true, true), (true, false), (false, true), (false, false)];

fn main() -> Result<(), Box<dyn Error>> {
    let limit = env::args().nth(1).map_or(Ok(1.0), |seconds| seconds.parse())?;
    let limit = Duration::try_from_secs_f64(limit)?;
    println!("Searches are cut off after {limit:?}.\n");
    let none = String::new;
    let columns =
        ["layers", "with bytes", "groups", "ours", "both rules", "rule 1 only", "rule 2 only", "none"];
    row("model", columns.map(str::to_owned));
    for Model { profile, modules, layers, published } in MODELS {
        let profile = of_modules(serde_yaml::from_str(profile)?, modules);
        if profile.layers.len() != layers {
            return Err(format!("{} has {} layers, not {layers}", profile.model, profile.layers.len()).into());
        }
        let mut times = array::from_fn(|_| String::new());
        for (time, (rule1, rule2)) in times.iter_mut().zip(RULES) {
            *time = match plan_within(&profile, Algorithm::Paper { rule1, rule2 }, limit) {
                Ok(plan) => text_of(plan.search_us),
                Err(TransferError::CutOff { .. }) => format!("> {}", text_of(limit.as_secs_f64() * 1e6)),
                Err(error) => return Err(error.into()),
            };
        }
        ours(&profile, times)?;
        let [both, first, second, neither] = published.map(str::to_owned);
        row("  the paper's", [layers.to_string(), none(), none(), none(), both, first, second, neither]);
    }
    for layers in [464, 5_000, 100_000] {
        ours(&made_up(layers), array::from_fn(|_| none()))?;
    }
    Ok(())
}

/// Prints the row of a model: the planner's time, and those of the paper's search.
fn ours(profile: &Profile, searches: [String; 4]) -> Result<(), TransferError> {
    // The median of nine, or of as many as a second has time for.
    let begun = Instant::now();
    let mut plans = vec![plan(profile, Algorithm::Optimal)?];
    while plans.len() < 9 && begun.elapsed() < Duration::from_secs(1) {
        plans.push(plan(profile, Algorithm::Optimal)?);
    }
    plans.sort_by(|a, b| a.search_us.total_cmp(&b.search_us));
    let median = &plans[plans.len() / 2];
    let with_bytes = profile.layers.iter().filter(|layer| layer.bytes > 0).count();
    let [both, first, second, neither] = searches;
    row(
        &profile.model,
        [
            profile.layers.len().to_string(),
            with_bytes.to_string(),
            median.groups.len().to_string(),
            text_of(median.search_us),
            both,
            first,
            second,
            neither,
        ],
    );
    Ok(())
}

fn row(name: &str, [layers, with_bytes, groups, ours, both, first, second, none]: [String; 8]) {
    let line = format!(
        "{name:<13}  {layers:>6}  {with_bytes:>10}  {groups:>6}  {ours:>8}  {both:>10}  {first:>11}  {second:>11}  \
         {none:>8}"
    );
    println!("{}", line.trim_end());
}

fn text_of(us: f64) -> String {
    match us {
        ..1e3 => format!("{:.2} ms", us / 1e3),
        ..1e6 => format!("{:.0} ms", us / 1e3),
        _ => format!("{:.1} s", us / 1e6),
    }
}

/// The profile by modules: every operator that is none joins the layer before it, or the first module.
fn of_modules(profile: Profile, modules: &[&str]) -> Profile {
    let mut layers: Vec<Layer> = Vec::new();
    let mut seen = false;
    for layer in profile.layers {
        let is_module = modules.contains(&operator(&layer.name));
        match layers.last_mut() {
            Some(last) if !(is_module && seen) => {
                last.bytes += layer.bytes;
                last.compute_us += layer.compute_us;
            }
            _ => layers.push(layer),
        }
        seen |= is_module;
    }
    Profile { layers, ..profile }
}

/// The operator in the name of a graph's node: `conv2d` in `conv2d_12`, `relu_` in `relu__3`.
fn operator(node: &str) -> &str {
    match node.rsplit_once('_') {
        Some((operator, number)) if !number.is_empty() && number.bytes().all(|c| c.is_ascii_digit()) => {
            operator
        }
        _ => node,
    }
}
