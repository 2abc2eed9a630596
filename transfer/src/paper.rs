//! The search of the PipeSwitch paper (section 4.2), for comparison.
//!
//! All first groups are tried from the smallest up, and for each all groupings of what is left, in the same way. Two
//! rules cut branches off, and neither cuts off the last optimal plan:
//!
//! 1. What is left takes at least its computing time and one wait after what has been computed, and at least until all
//!    bytes have come in one more copy, one wait and the last block: if that is no better than the best plan found, drop
//!    the branch.
//! 2. Blocks that land while the group before them computes delay nothing: make no group end ahead of the last of them.
//!    (Moving the group's end there, out of the groups that follow, delays no copy, and saves waits or leaves them.)
//!
//! The recursion is a stack on the heap: a plan may have a hundred thousand groups.

use std::time::{Duration, Instant};

use crate::TransferError;
use crate::costs::{Costs, NEVER, Ticks};

/// Groups that are tried between two looks at the clock.
const BETWEEN_LOOKS: u64 = 1 << 12;

/// The groups ahead of some boundary, chosen, and where the next group will be tried to end.
struct Choice {
    start: usize,
    /// When computation of all before `start` ends.
    ready: Ticks,
    next_end: usize,
}

/// The boundaries at which the groups of the best plan end.
pub(crate) fn search(
    costs: &Costs,
    rule1: bool,
    rule2: bool,
    limit: Option<Duration>,
) -> Result<Vec<usize>, TransferError> {
    let blocks = costs.blocks();
    let begun = Instant::now();
    let mut visited = 0_u64;
    let mut best = NEVER;
    let mut best_ends = Vec::new();
    // Number `count` begins at `start`: the smallest end worth trying.
    let first_end = |count: usize, start: usize, ready: Ticks| {
        if rule2 { costs.landed(count, ready).max(start + 1) } else { start + 1 }
    };
    let mut choices = vec![Choice { start: 0, ready: costs.lead, next_end: first_end(1, 0, costs.lead) }];

    while let Some(choice) = choices.last_mut() {
        let Choice { start, ready, next_end: end } = *choice;
        if end > blocks {
            choices.pop();
            continue;
        }
        choice.next_end += 1;
        visited += 1;
        if visited.is_multiple_of(BETWEEN_LOOKS) {
            let after = begun.elapsed();
            if limit.is_some_and(|limit| after > limit) {
                return Err(TransferError::CutOff { after, visited });
            }
        }
        let count = choices.len();
        let ends = costs.step(count, start, end, ready).ends;
        if end == blocks {
            if ends < best {
                best = ends;
                best_ends.clear();
                best_ends.extend(choices.iter().skip(1).map(|choice| choice.start));
                best_ends.push(blocks);
            }
            continue;
        }
        let bound = (ends + costs.wait + (costs.total_work() - costs.work[end]))
            .max(costs.lands(count + 1, blocks) + costs.wait + costs.last_work());
        if !(rule1 && bound >= best) {
            choices.push(Choice { start: end, ready: ends, next_end: first_end(count + 1, end, ends) });
        }
    }
    Ok(best_ends)
}
