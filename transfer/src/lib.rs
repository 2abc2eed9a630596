//! Cuts a model's weights into groups and streams them to a device while its first layers already compute.
//!
//! Two halves that know nothing of each other:
//!
//! - The *planner* is pure. From a [`Profile`] (what each layer needs and takes, what the link costs) [`plan()`] finds the
//!   cuts, exactly and in a fraction of a millisecond; [`predict()`] says what any cuts will cost, group by group;
//!   [`smallest_resident_prefix`] says how many of the first bytes must stay on the device for a switch to be as fast as
//!   the model that is ready. It needs no other crate of pswitch: turn the feature `engine` off.
//! - The *engine* (feature `engine`, on by default) streams a transfer over a device's copy streams and rings a
//!   doorbell behind every group.
//!
//! # Planning
//!
//! ```
//! use pswitch_transfer::{Algorithm, Layer, LinkCosts, Profile, plan, predict};
//!
//! let layer = |bytes, compute_us| Layer { name: String::new(), bytes, compute_us, host_bytes: 0 };
//! let profile = Profile {
//!     model: "tiny".to_owned(),
//!     // A byte a microsecond, to keep the arithmetic visible.
//!     link: LinkCosts { bandwidth_bytes_per_s: 1e6, per_copy_us: 2.0, per_wait_us: 1.0 },
//!     layers: vec![layer(10, 30.0), layer(8, 5.0), layer(8, 5.0), layer(30, 6.0)],
//! };
//! let best = plan(&profile, Algorithm::Optimal)?;
//! // The two small layers cross the link together while layer 0 computes.
//! assert_eq!(best.cuts(), [1, 3]);
//! assert_eq!(best.predicted_us, 69.0);
//! assert_eq!((best.whole_us, best.per_layer_us), (105.0, 71.0));
//!
//! println!("{}", predict(&profile, &best.cuts())?.table());
//! # Ok::<(), pswitch_transfer::TransferError>(())
//! ```
//!
//! # Cost model
//!
//! Copies follow one another on the link, groups compute one after another, and a group computes when it has landed.
//! With `b_k` bytes in group `k`:
//!
//! ```text
//! t_k = t_(k-1) + per_copy + b_k / bandwidth                             copy k has landed
//! c_k = max(t_k, c_(k-1)) + per_wait + times of the layers of group k    group k has computed
//! ```
//!
//! Layers without bytes wait for nothing: they belong to the group before them, and those ahead of the first bytes run
//! before the first wait (`c_0` is their time). The cost of a plan is the last `c_k`.
//!
//! What layers read from the host by themselves ([`Layer::host_bytes`]) crosses the same link. Copy `k` lands later by the
//! time of all that layers ahead of its last bytes read.
//!
//! # Why the plan is exact
//!
//! When copy `k` lands depends only on how many bytes and copies came before, not on how these were cut. So the earliest
//! end of the first `j` layers in `k` groups follows from those in `k - 1` groups:
//!
//! ```text
//! c(k, j) = min over i < j of  max(t(k, j), c(k-1, i)) + per_wait + times of the layers i+1 ... j
//! ```
//!
//! and the least `c(k, n)` over all `k` is the optimum. Let a row keep the better value of the row before it, and the
//! time before `c(k, j)` in which nothing computes does not fall with `j` (drop the last layer of the best plan for
//! `j + 1`: what is left ends earlier by at least that layer's time). Then the best `i` for given `k` and `j` is one of
//! two: the last from which the group still waits for its copy, or the first from which the copy waits for the group
//! before. Both move only forward with `j`, so that a row costs a single sweep, O(layers), and all of it at most
//! O(layers²) time and O(layers) memory. Bounds against the best plan so far keep rows short and few: some hundred
//! layers take less than 0.1 ms, 5,000 a few ms, 100,000 some 0.1 s. The source of the module `optimal` has the whole
//! argument.
//!
//! # Why keeping more is never slower
//!
//! Let one more of a plan's first layers stay on the device. What its group still copies is shorter, so that every copy
//! lands no later; the layer waits for nothing, so that it ends no later; and what follows waits for the same as before.
//! So the time of a switch does not rise with the resident prefix, and [`smallest_resident_prefix`] halves its way to the
//! end that is enough, in log2(layers) questions whether any plan is in time.
//!
//! # Numbers
//!
//! All sums are integers (a tick is a power of two of a microsecond and finer than a double), so that no rounding blurs
//! a tie: no other algorithm's plan is ever predicted to be faster by a last digit.
//!
#![cfg_attr(
    feature = "engine",
    doc = r#"
# Streaming

```
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use pswitch_device::{
    DeviceId, DeviceSlice, ExecutionStream, HostSlice, LinkThrottle, SharedMemory, open_device,
};
use pswitch_transfer::{CopyIn, Engine, GroupCopy, Transfer, TransferId};

# fn main() -> Result<(), Box<dyn std::error::Error>> {
let device = open_device(DeviceId::Host(0), LinkThrottle::default())?;
let span = device.pin(Arc::new(SharedMemory::create("span", 8192)?))?;
let pool = device.allocate(8192 + 8)?;
let group = |index: u64| -> Result<GroupCopy, pswitch_device::DeviceError> {
    Ok(GroupCopy {
        copy: CopyIn {
            from: HostSlice::new(span.clone(), index * 4096, 4096)?,
            to: DeviceSlice::new(pool.clone(), index * 4096, 4096)?,
        },
        doorbell: DeviceSlice::new(pool.clone(), 8192 + index * 4, 4)?,
    })
};

let (reports, landed) = mpsc::channel();
let engine = Engine::new(
    device.clone(),
    Box::new(move |id, result| reports.send((id, result)).expect("the receiver lives")),
)?;
// Enqueues everything and returns.
engine.start(Transfer { groups: vec![group(0)?, group(1)?], ..Transfer::new(TransferId(7)) })?;

// Whoever executes waits for doorbells, not for the engine.
device.wait_doorbell(ExecutionStream::Host, &group(1)?.doorbell, Instant::now() + Duration::from_secs(5))?;
let (id, report) = landed.recv()?;
assert_eq!(id, TransferId(7));
assert_eq!(report?.bytes, 8192);
# Ok(())
# }
```
"#
)]

mod algorithm;
mod compare;
mod costs;
#[cfg(feature = "engine")]
mod engine;
mod error;
mod fixed;
mod margin;
mod optimal;
mod paper;
mod plan;
mod predict;
mod profile;
mod resident;
mod table;

pub use algorithm::Algorithm;
pub use compare::{Compared, Comparison, compare};
#[cfg(feature = "engine")]
pub use engine::{
    BringBack, CopyIn, CopyOut, CopyWithin, Engine, GroupCopy, OnLanded, Transfer, TransferId, TransferReport,
};
pub use error::TransferError;
pub use margin::plan_with_margin;
pub use plan::{Group, Plan, plan, plan_within};
pub use predict::{Bound, GroupTimes, Prediction, lower_bound_us, predict};
pub use profile::{Layer, LinkCosts, Profile};
pub use resident::{
    ResidentPrefix, ready_us, resident_prefix, resident_prefix_curve, smallest_resident_prefix,
};
pub use table::Table;
