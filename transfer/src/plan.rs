use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::costs::Costs;
use crate::{Algorithm, Profile, TransferError, fixed, optimal, paper};

/// Layers that cross the link in one copy and are announced by one doorbell.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Group {
    /// Its first layer, counted from 0.
    pub first_layer: usize,
    /// Its last layer, itself included.
    pub last_layer: usize,
    /// Bytes of all its layers. Zero only if no layer of the model has bytes: such a plan copies and waits for nothing.
    pub bytes: u64,
}

/// How a model is cut into groups, and what that is predicted to cost.
///
/// All times count from the moment at which the first copy is enqueued to the end of the last layer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// The model's name.
    pub model: String,
    /// How the cuts were found.
    pub algorithm: Algorithm,
    /// The groups in order; together they are all layers.
    pub groups: Vec<Group>,
    /// What the plan takes.
    pub predicted_us: f64,
    /// What one group for all layers takes.
    pub whole_us: f64,
    /// What a group for every layer with bytes takes.
    pub per_layer_us: f64,
    /// No plan of this model takes less; see [`lower_bound_us`](crate::lower_bound_us).
    pub lower_bound_us: f64,
    /// How long the search for the cuts took.
    pub search_us: f64,
}

impl Plan {
    /// The layers at which groups begin, without layer 0.
    pub fn cuts(&self) -> Vec<usize> {
        self.groups.iter().skip(1).map(|group| group.first_layer).collect()
    }
}

/// Cuts a profile into groups.
///
/// [`Algorithm::Optimal`] is exact: no grouping has a lower cost in the model of the [crate's documentation](crate), and
/// of those of the same cost none has fewer groups. It takes a fraction of a millisecond for some hundred layers and at
/// most O(layers²). [`Algorithm::Paper`] may take for ever: see [`plan_within`].
///
/// # Errors
/// Those of [`Profile::validate`]; [`TransferError::NoGroups`].
pub fn plan(profile: &Profile, algorithm: Algorithm) -> Result<Plan, TransferError> {
    plan_until(profile, algorithm, None)
}

/// As [`plan`], but gives the paper's search up after some time. The other algorithms take no notice.
///
/// # Errors
/// Those of [`plan`]; [`TransferError::CutOff`].
pub fn plan_within(profile: &Profile, algorithm: Algorithm, limit: Duration) -> Result<Plan, TransferError> {
    plan_until(profile, algorithm, Some(limit))
}

fn plan_until(
    profile: &Profile,
    algorithm: Algorithm,
    limit: Option<Duration>,
) -> Result<Plan, TransferError> {
    let begun = Instant::now();
    let costs = Costs::new(profile)?;
    let ends = match algorithm {
        Algorithm::Optimal => optimal::optimal(&costs),
        Algorithm::Paper { rule1, rule2 } => paper::search(&costs, rule1, rule2, limit)?,
        Algorithm::PerLayer | Algorithm::Sequential => fixed::per_layer(&costs),
        Algorithm::Whole => fixed::whole(&costs),
        Algorithm::Equal { groups: 0 } => return Err(TransferError::NoGroups),
        Algorithm::Equal { groups } => fixed::equal(&costs, groups),
    };
    let search_us = begun.elapsed().as_secs_f64() * 1e6;
    let predicted = match algorithm {
        Algorithm::Sequential => costs.sequential(&ends),
        _ => costs.cost(&ends),
    };
    Ok(Plan {
        model: profile.model.clone(),
        algorithm,
        groups: groups(&costs, &ends),
        predicted_us: costs.us(predicted),
        whole_us: costs.us(costs.cost(&fixed::whole(&costs))),
        per_layer_us: costs.us(costs.cost(&fixed::per_layer(&costs))),
        lower_bound_us: costs.us(costs.lower_bound()),
        search_us,
    })
}

/// The groups that end at these boundaries; one of all layers if there are no blocks.
pub(crate) fn groups(costs: &Costs, ends: &[usize]) -> Vec<Group> {
    if ends.is_empty() {
        return vec![Group { first_layer: 0, last_layer: costs.layers() - 1, bytes: 0 }];
    }
    groups_behind(costs, 0, ends.iter().copied())
}

/// The groups that end at these boundaries, the first of which begins at `start`.
pub(crate) fn groups_behind(
    costs: &Costs,
    start: usize,
    ends: impl IntoIterator<Item = usize>,
) -> Vec<Group> {
    let mut start = start;
    ends.into_iter().map(|end| costs.group(std::mem::replace(&mut start, end), end)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Layer, LinkCosts};

    #[test]
    fn a_sequential_plan_is_per_layer_and_computes_when_all_has_come() {
        let layer = |bytes, compute_us| Layer { name: String::new(), bytes, compute_us, host_bytes: 0 };
        let profile = Profile {
            model: "m".to_owned(),
            link: LinkCosts { bandwidth_bytes_per_s: 1e6, per_copy_us: 2.0, per_wait_us: 1.0 },
            layers: vec![layer(0, 5.0), layer(10, 4.0), layer(20, 8.0)],
        };
        let [sequential, per_layer] =
            [Algorithm::Sequential, Algorithm::PerLayer].map(|algorithm| plan(&profile, algorithm).unwrap());
        assert_eq!(sequential.groups, per_layer.groups);
        // Two copies of 30 bytes in all, two waits, and both layers with bytes; the one without is over by then.
        assert_eq!(sequential.predicted_us, 34.0 + 2.0 + 12.0);
        assert_eq!(per_layer.predicted_us, 34.0 + 1.0 + 8.0);
    }
}
