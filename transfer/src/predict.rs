use std::fmt;

use crate::costs::Costs;
use crate::plan::groups;
use crate::table::us;
use crate::{Group, Profile, Table, TransferError};

/// One group of a plan in time, counted from the moment at which the first copy is enqueued.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GroupTimes {
    /// Its layers and bytes.
    pub group: Group,
    /// When its bytes have landed; its copy begins when that of the group before has.
    pub lands_us: f64,
    /// When it starts computing: it has landed, and the group before it has ended. The wait's cost comes first; layers
    /// ahead of the model's first bytes have been computed before.
    pub starts_us: f64,
    /// When its last layer ends.
    pub ends_us: f64,
    /// How long nothing computed because it had not landed.
    pub stall_us: f64,
}

/// What a plan is predicted to do.
#[derive(Debug, Clone, PartialEq)]
pub struct Prediction {
    /// The groups in order.
    pub groups: Vec<GroupTimes>,
    /// Computing time of the layers ahead of the first bytes, which wait for nothing.
    pub lead_us: f64,
    /// Time in which the link is busy; copies follow each other without a gap.
    pub copy_us: f64,
    /// Time in which layers compute or pay for a wait.
    pub compute_us: f64,
    /// Time in which computation stands still because bytes have not landed.
    pub stall_us: f64,
    /// When the last layer ends: `compute_us` and `stall_us` together.
    pub predicted_us: f64,
}

/// Which lane has more to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bound {
    /// Computing takes longer than copying.
    Compute,
    /// Copying takes longer than computing.
    Transfer,
}

impl fmt::Display for Bound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Compute => "compute-bound",
            Self::Transfer => "transfer-bound",
        })
    }
}

/// Predicts what a plan does that begins a new group at each of the layers in `cuts` (rising, layer 0 left out; as
/// [`Plan::cuts`](crate::Plan::cuts) returns them; none: one group for all).
///
/// Layers without bytes belong to the group before them: a cut ahead of some cuts ahead of the next layer with bytes, and
/// one ahead of the first bytes or behind the last cuts nothing.
///
/// # Errors
/// Those of [`Profile::validate`]; [`TransferError::InvalidCut`].
pub fn predict(profile: &Profile, cuts: &[usize]) -> Result<Prediction, TransferError> {
    let costs = Costs::new(profile)?;
    let mut ends = Vec::with_capacity(cuts.len() + 1);
    let mut least = 1;
    for &cut in cuts {
        if !(least..costs.layers()).contains(&cut) {
            return Err(TransferError::InvalidCut { cut, least, most: costs.layers() - 1 });
        }
        ends.push(costs.boundary(cut));
        least = cut + 1;
    }
    ends.push(costs.blocks());
    ends.dedup();
    ends.retain(|&end| end > 0);
    Ok(Prediction::new(&costs, &ends))
}

/// A time that no plan of this profile goes below: the most that any layer's bytes, sent in order in a single copy, one
/// wait and all layers from that one on take, and that one wait and all layers take. Better than the longer of copying
/// and computing, and mostly out of reach: it pays for one copy and one wait only.
///
/// # Errors
/// Those of [`Profile::validate`].
pub fn lower_bound_us(profile: &Profile) -> Result<f64, TransferError> {
    let costs = Costs::new(profile)?;
    Ok(costs.us(costs.lower_bound()))
}

impl Prediction {
    fn new(costs: &Costs, ends: &[usize]) -> Self {
        let mut ready = costs.lead;
        let mut stall = 0;
        let mut times: Vec<GroupTimes> = groups(costs, ends)
            .into_iter()
            .zip(costs.steps(ends))
            .map(|(group, step)| {
                let stalled = step.starts - ready;
                ready = step.ends;
                stall += stalled;
                GroupTimes {
                    group,
                    lands_us: costs.us(step.lands),
                    starts_us: costs.us(step.starts),
                    ends_us: costs.us(step.ends),
                    stall_us: costs.us(stalled),
                }
            })
            .collect();
        if times.is_empty() {
            // No layer has bytes: one group, without a copy and without a wait.
            times.extend(groups(costs, ends).into_iter().map(|group| GroupTimes {
                group,
                lands_us: 0.0,
                starts_us: 0.0,
                ends_us: costs.us(ready),
                stall_us: 0.0,
            }));
        }
        Self {
            groups: times,
            lead_us: costs.us(costs.lead),
            copy_us: costs.us(costs.lands(ends.len(), costs.blocks())),
            compute_us: costs.us(ready - stall),
            stall_us: costs.us(stall),
            predicted_us: costs.us(ready),
        }
    }

    /// Which lane has more to do.
    pub fn bound(&self) -> Bound {
        if self.copy_us > self.compute_us { Bound::Transfer } else { Bound::Compute }
    }

    /// A row for each group: its layers and bytes, when it lands, starts and ends, and where the pipeline stalls.
    pub fn table(&self) -> Table {
        let mut table =
            Table::new(["group", "layers", "bytes", "lands us", "starts us", "ends us", "stall us"]);
        for (index, times) in self.groups.iter().enumerate() {
            let Group { first_layer, last_layer, bytes } = times.group;
            table.push([
                index.to_string(),
                if first_layer == last_layer {
                    first_layer.to_string()
                } else {
                    format!("{first_layer}-{last_layer}")
                },
                bytes.to_string(),
                us(times.lands_us),
                us(times.starts_us),
                us(times.ends_us),
                if times.stall_us > 0.0 { us(times.stall_us) } else { "-".to_owned() },
            ]);
        }
        table
    }
}

/// The verdict in a sentence.
impl fmt::Display for Prediction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}: {} us, in which the link is busy {} us, layers and waits take {} us and stalls {} us",
            self.bound(),
            us(self.predicted_us),
            us(self.copy_us),
            us(self.compute_us),
            us(self.stall_us)
        )
    }
}
