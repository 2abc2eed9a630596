//! Models of which the first bytes stay on the device.
//!
//! With the blocks before boundary `p` resident, let `L(p)` be the earliest end: these blocks compute without a copy and
//! without a wait, and the others stream in behind them by the best plan there is.
//!
//! *`L` does not rise with `p`.* Take the best plan behind `p`, and let its first block stay as well. What the first group
//! still copies is shorter, or the group is gone: every copy lands no later. The block ends no later either, for it waits
//! for nothing now, and what was computed behind it begins at its end or when its copy lands, as before. So the plan that
//! is left ends by `L(p)`, and `L(p + 1) <= L(p)`. At the last boundary `L` is the time of all layers: the ready model.
//!
//! So the boundaries with `L(p) <= limit` are those from some boundary on, which halving finds in log2(blocks) steps. A
//! step asks only whether a plan ends by `limit` ([`optimal::ends_by`]). Near the ready model that is decided soon: a
//! plan of `k` groups takes `k` waits more than the layers, so that only as many groups are tried as `limit` has room for.

use serde::{Deserialize, Serialize};

use crate::costs::{Costs, NEVER, Ticks};
use crate::plan::groups_behind;
use crate::{Group, Profile, TransferError, optimal};

/// A model whose first bytes stay on the device, while the rest streams in behind them by an optimal plan.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ResidentPrefix {
    /// Bytes from the start of the span that stay.
    pub bytes: u64,
    /// Layers that compute without waiting: the first that waits is the one of this number. All, if all bytes stay.
    pub layers: usize,
    /// How the rest is cut into groups; none if all bytes stay. If nothing stays, these are the groups of the optimal
    /// [`Plan`](crate::Plan), the first of which has the layers ahead of the first bytes too.
    pub groups: Vec<Group>,
    /// What a switch takes from the moment at which the first copy is enqueued to the end of the last layer.
    pub predicted_us: f64,
}

/// What all layers of a model take if it is resident: no copies and no waits. A switch cannot be faster.
///
/// # Errors
/// Those of [`Profile::validate`].
pub fn ready_us(profile: &Profile) -> Result<f64, TransferError> {
    let costs = Costs::new(profile)?;
    Ok(costs.us(costs.ready()))
}

/// What a switch takes if all that the first `layers` layers need stays on the device. More layers than there are mean
/// all of them.
///
/// # Errors
/// Those of [`Profile::validate`].
pub fn resident_prefix(profile: &Profile, layers: usize) -> Result<ResidentPrefix, TransferError> {
    let costs = Costs::new(profile)?;
    Ok(at(&costs, costs.boundary(layers)))
}

/// The fewest leading bytes that must stay on the device for a switch to take at most `1 + tolerance` times what the
/// ready model takes.
///
/// Exact, since keeping more never makes a switch longer: bytes that stay need no copy and delay no other. There is always
/// an answer, for with all bytes resident the switch is the ready model. It takes about as long as a few plans: see the
/// crate's README.
///
/// ```
/// use pswitch_transfer::{Layer, LinkCosts, Profile, ready_us, smallest_resident_prefix};
///
/// let layer = |bytes, compute_us| Layer { name: String::new(), bytes, compute_us, host_bytes: 0 };
/// let profile = Profile {
///     model: "tiny".to_owned(),
///     link: LinkCosts { bandwidth_bytes_per_s: 1e6, per_copy_us: 2.0, per_wait_us: 1.0 },
///     layers: vec![layer(10, 30.0), layer(8, 5.0), layer(8, 5.0), layer(30, 60.0)],
/// };
/// assert_eq!(ready_us(&profile)?, 100.0);
/// // While two layers compute, all but a little of the rest comes.
/// let prefix = smallest_resident_prefix(&profile, 0.1)?;
/// assert_eq!((prefix.bytes, prefix.layers, prefix.groups.len()), (18, 2, 2));
/// assert_eq!(prefix.predicted_us, 103.0);
/// // Even a single wait is more than nothing.
/// assert_eq!(smallest_resident_prefix(&profile, 0.0)?.bytes, 56);
/// # Ok::<(), pswitch_transfer::TransferError>(())
/// ```
///
/// # Errors
/// Those of [`Profile::validate`]; [`TransferError::InvalidTolerance`].
pub fn smallest_resident_prefix(profile: &Profile, tolerance: f64) -> Result<ResidentPrefix, TransferError> {
    if !(tolerance.is_finite() && tolerance >= 0.0) {
        return Err(TransferError::InvalidTolerance { found: tolerance });
    }
    let costs = Costs::new(profile)?;
    let limit = limit(&costs, tolerance);
    // The last boundary is known to do, and those below `low` not to.
    let (mut low, mut high) = (0, costs.blocks());
    while low < high {
        let middle = low + (high - low) / 2;
        if optimal::ends_by(&costs.behind(middle), limit) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    Ok(at(&costs, low))
}

/// What a switch takes by how many leading bytes stay on the device, from none to all in `steps` steps of about as many
/// bytes (at least one step, and no two that end at the same layer). The predictions never rise.
///
/// Each step is an optimal plan, and takes as long.
///
/// # Errors
/// Those of [`Profile::validate`].
pub fn resident_prefix_curve(profile: &Profile, steps: usize) -> Result<Vec<ResidentPrefix>, TransferError> {
    let costs = Costs::new(profile)?;
    let steps = steps.clamp(1, costs.blocks().max(1));
    let between = (1..steps).map(|step| costs.nearest_boundary(step as f64 / steps as f64));
    let mut boundaries: Vec<usize> = std::iter::once(0).chain(between).chain([costs.blocks()]).collect();
    boundaries.dedup();
    Ok(boundaries.into_iter().map(|boundary| at(&costs, boundary)).collect())
}

/// The prefix that ends at a boundary.
fn at(costs: &Costs, boundary: usize) -> ResidentPrefix {
    let rest = costs.behind(boundary);
    let ends = optimal::optimal(&rest);
    ResidentPrefix {
        bytes: costs.bytes_before(boundary),
        layers: costs.layer_at(boundary),
        predicted_us: costs.us(rest.cost(&ends)),
        groups: groups_behind(costs, boundary, ends.into_iter().map(|end| boundary + end)),
    }
}

/// The latest end within a tolerance of the ready model.
fn limit(costs: &Costs, tolerance: f64) -> Ticks {
    let ready = costs.ready();
    // Casts of floats saturate; what is allowed beyond the longest plan makes no difference.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    let allowed = (ready as f64 * tolerance) as Ticks;
    ready.saturating_add(allowed).min(NEVER - 1)
}
