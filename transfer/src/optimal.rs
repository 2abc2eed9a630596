//! The exact planner.
//!
//! # Recurrence
//!
//! With the boundaries `0 ..= n` between `n` blocks, let `sent(j)` be the link time of the bytes before boundary `j`,
//! `work(j)` the computing time before it, and `c(k, j)` the earliest end of the first `j` blocks in *at most* `k`
//! groups:
//!
//! ```text
//! c(0, 0) = lead        c(0, j) = never for j > 0
//! c(k, j) = min( c(k-1, j),  min over i < j of  max(k * copy + sent(j), c(k-1, i)) + wait + work(j) - work(i) )
//! ```
//!
//! When copy `k` lands depends on `k` and `j` alone, not on how the blocks before were cut: that is what makes this a
//! dynamic program. "At most" lets a row inherit from the one before it. A group that follows an inherited value is
//! charged for more copies than there were: no row promises too little, and the same plan is charged rightly in an
//! earlier row. So the least of `c(1, n), ..., c(n, n)` is the optimum, and the row in which it first appears is the
//! number of groups.
//!
//! # O(1) for each state
//!
//! Write `idle(k, j) = c(k, j) - work(j)`: all the time before that end in which nothing computes (and the lead).
//!
//! *`idle` does not fall with `j`.* Take the best plan behind `c(k, j+1)` and drop its last block. If it shared its
//! group, the group starts no later and computes less by exactly that block; if it was alone, the plan ended no earlier
//! than the group before plus that block. So `c(k, j) <= c(k, j+1) - (work(j+1) - work(j))`. With it, `c` does not fall.
//!
//! So the boundaries `i` split at a point `r` that does not fall with `j`: below `r`, `c(k-1, i)` is no later than the
//! landing of copy `k`, the term is `landing - work(i)`, and the largest `i = r-1` is best, for `work` does not fall;
//! from `r` on, the term is `idle(k-1, i)`, and the smallest `i = r` is best. A row is one sweep with one pointer.
//!
//! # Fewer states
//!
//! - *Below:* if no boundary below `l` improved in row `k`, none up to and including `l` can in row `k+1`: its
//!   predecessors are the same and the copy lands no earlier. So a row begins above the lowest improvement of the last.
//! - *Above:* a boundary `j < n` with `idle(j) + wait + work(n) >= best` starts no better plan. Since a group that ends
//!   at `j` begins at most where the last row reached to, its idle time is at least `landing - work(reach)`, which
//!   bounds the row from above. Values beyond are left as they were, too high but still in order, and beyond the bound
//!   for good, since `best` only falls.
//! - *Rows:* a plan of `k` groups ends no earlier than the first block's landing, `k` waits and all work, nor than `k`
//!   copies with all bytes, a wait and the last block. Both grow with `k`; once one reaches `best`, it is over.
//!
//! Time O(n * groups tried), at worst O(n^2); memory O(n): rows overwrite each other, and the plan is found again from
//! the optimum alone ([`cuts_for`]).
//!
//! Whether any plan ends by a given time ([`ends_by`]) is the same search with that time for the best plan so far, over
//! at the first plan that it finds.

use crate::costs::{Costs, NEVER, Ticks};
use crate::fixed;

/// The boundaries at which the groups of an optimal plan end; of all optimal plans it has the fewest groups.
pub(crate) fn optimal(costs: &Costs) -> Vec<usize> {
    if costs.blocks() == 0 {
        return Vec::new();
    }
    // One more than a plan that is at hand, so that the search itself finds that one or a better one.
    let below = first_guess(costs) + 1;
    let (groups, end) = search(costs, below, 0).expect("the plan at hand is among those searched");
    cuts_for(costs, groups, end)
}

/// Whether any plan ends by a time.
pub(crate) fn ends_by(costs: &Costs, time: Ticks) -> bool {
    if costs.blocks() == 0 { costs.lead <= time } else { search(costs, time + 1, time).is_some() }
}

/// The number of groups and the end of the best plan that ends before `below`, if there is one, or of the first that is
/// found to end by `enough`.
fn search(costs: &Costs, below: Ticks, enough: Ticks) -> Option<(usize, Ticks)> {
    let blocks = costs.blocks();
    let total = costs.total_work();
    // `c(k, j)` by boundary, every row in the place of the row before it.
    let mut row = vec![NEVER; blocks];
    row[0] = costs.lead;
    let mut found = None;
    let mut best = below;
    let mut low = 1;
    let mut reach = 0;

    for count in 1..=blocks {
        let copies = costs.lands(count, 0);
        let first_landing = costs.lead.max(costs.lands(1, 1));
        let last_landing = costs.lands(count, blocks);
        if first_landing + count as Ticks * costs.wait + total >= best
            || last_landing + costs.wait + costs.last_work() >= best
        {
            break;
        }

        let split = row.partition_point(|&end| end <= last_landing);
        let end = earliest_end(costs, &row, split, blocks, last_landing);
        if end < best {
            best = end;
            found = Some((count, end));
            if end <= enough {
                break;
            }
        }

        // Boundaries with less idle time than this may be on the way to a better plan.
        let useful = best.saturating_sub(costs.wait + total);
        let latest = (useful + costs.work[reach]).saturating_sub(copies + costs.wait);
        let high = costs.sent[..blocks].partition_point(|&sent| sent < latest).saturating_sub(1);
        let mut split = row[..high].partition_point(|&end| end <= copies + costs.sent[high]);
        let mut lowest_improved = None;
        // Downwards, so that predecessors are still those of the row before.
        for boundary in (low..=high).rev() {
            let landing = copies + costs.sent[boundary];
            split = split.min(boundary);
            while split > 0 && row[split - 1] > landing {
                split -= 1;
            }
            let end = earliest_end(costs, &row, split, boundary, landing);
            if end < row[boundary] {
                row[boundary] = end;
                lowest_improved = Some(boundary);
            }
        }
        match lowest_improved {
            Some(boundary) => low = boundary + 1,
            None => break,
        }
        while reach + 1 < blocks && row[reach + 1] < useful + costs.work[reach + 1] {
            reach += 1;
        }
    }
    found
}

/// The earliest end of a group that ends at a boundary and whose copy lands at `landing`. `row` has the ends of what may
/// come before it, of which those below `split` are no later than the landing.
fn earliest_end(costs: &Costs, row: &[Ticks], split: usize, boundary: usize, landing: Ticks) -> Ticks {
    let after_copy = if split > 0 { landing - costs.work[split - 1] } else { NEVER };
    let after_work = if split < boundary { row[split] - costs.work[split] } else { NEVER };
    after_copy.min(after_work) + costs.wait + costs.work[boundary]
}

/// The end of the best among some plans that are found at once.
fn first_guess(costs: &Costs) -> Ticks {
    let blocks = costs.blocks();
    let equal = std::iter::successors(Some(1), |groups| Some(groups * 2))
        .take_while(|&groups| groups < blocks)
        .map(|groups| costs.cost(&fixed::equal(costs, groups)));
    equal.fold(costs.cost(&fixed::per_layer(costs)), Ticks::min)
}

/// Finds the cuts of a plan of `groups` groups that ends at `end`, the earliest end of all and the fewest groups that
/// have it.
///
/// From the back: if a group must begin computing by some time, it must hold at least the blocks that take until then
/// at the latest, so that the last boundary before it, `least`, is the first for which the rest ends in time. Every plan
/// that ends in time has its boundaries at or behind these, and these end in time themselves. (Were one of these groups
/// empty, the plan would have fewer groups.)
///
/// From the front: a group ends there or, if more has landed by the time at which the group before it ends, behind that,
/// as the paper's second rule says: it costs nothing, and later groups need not be cut as closely. Neither delays the
/// end: a group that starts as soon as the one before it ends keeps what was in time in time, and one that begins at
/// `least` or behind and ends at `least` starts in time by construction.
fn cuts_for(costs: &Costs, groups: usize, end: Ticks) -> Vec<usize> {
    let blocks = costs.blocks();
    let total = costs.total_work();
    let mut least = vec![blocks; groups + 1];
    for count in (1..=groups).rev() {
        let waits = (groups - count + 1) as Ticks * costs.wait;
        let without = (costs.lands(count, least[count]) + waits + total).saturating_sub(end);
        least[count - 1] = costs.work.partition_point(|&work| work < without);
    }
    let mut ends = Vec::with_capacity(groups);
    let (mut start, mut ready) = (0, costs.lead);
    for &least in &least[1..] {
        let count = ends.len() + 1;
        let free = costs.landed(count, ready);
        let boundary = least.max(free);
        if boundary > start {
            ready = costs.step(count, start, boundary, ready).ends;
            start = boundary;
            ends.push(boundary);
        }
    }
    ends
}
