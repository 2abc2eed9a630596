use std::time::Duration;

use crate::table::us;
use crate::{Algorithm, Plan, Profile, Table, TransferError, plan, plan_within};

/// The plans of all algorithms for one profile.
#[derive(Debug, Clone, PartialEq)]
pub struct Comparison {
    /// One for each algorithm, the optimal plan first.
    pub entries: Vec<Compared>,
}

/// What one algorithm came to.
#[derive(Debug, Clone, PartialEq)]
pub struct Compared {
    /// The algorithm.
    pub algorithm: Algorithm,
    /// Its plan, or how long it searched before it was cut off.
    pub outcome: Result<Plan, Duration>,
}

/// Plans a profile with every algorithm: optimal, the paper's search (cut off after `limit`), one group for each layer,
/// one for all, and as many as the optimal plan has but of equal size.
///
/// # Errors
/// Those of [`Profile::validate`].
pub fn compare(profile: &Profile, limit: Duration) -> Result<Comparison, TransferError> {
    let optimal = plan(profile, Algorithm::Optimal)?;
    let others = [
        Algorithm::Paper { rule1: true, rule2: true },
        Algorithm::Equal { groups: optimal.groups.len() },
        Algorithm::PerLayer,
        Algorithm::Whole,
    ];
    let mut entries = vec![Compared { algorithm: Algorithm::Optimal, outcome: Ok(optimal) }];
    for algorithm in others {
        let outcome = match plan_within(profile, algorithm, limit) {
            Ok(plan) => Ok(plan),
            Err(TransferError::CutOff { after, .. }) => Err(after),
            Err(error) => return Err(error),
        };
        entries.push(Compared { algorithm, outcome });
    }
    Ok(Comparison { entries })
}

impl Comparison {
    /// A row for each algorithm: groups, predicted time, how much that is above the lower bound, and how long the search
    /// took.
    pub fn table(&self) -> Table {
        let mut table = Table::new(["algorithm", "groups", "predicted us", "above bound", "search"]);
        for Compared { algorithm, outcome } in &self.entries {
            let none = || "-".to_owned();
            let [groups, predicted, above, search] = match outcome {
                Ok(plan) => [
                    plan.groups.len().to_string(),
                    us(plan.predicted_us),
                    if plan.lower_bound_us > 0.0 {
                        format!("{:.2} %", (plan.predicted_us / plan.lower_bound_us - 1.0) * 100.0)
                    } else {
                        none()
                    },
                    format!("{:.2?}", Duration::from_secs_f64(plan.search_us / 1e6)),
                ],
                Err(after) => [none(), none(), none(), format!("cut off after {after:.1?}")],
            };
            table.push([algorithm.to_string(), groups, predicted, above, search]);
        }
        table
    }
}
