//! Plans that need no search.

use crate::costs::Costs;

/// One group for all blocks, none if there are no blocks.
pub(crate) fn whole(costs: &Costs) -> Vec<usize> {
    equal(costs, 1)
}

/// A group for every block.
pub(crate) fn per_layer(costs: &Costs) -> Vec<usize> {
    (1..=costs.blocks()).collect()
}

/// So many groups, or as many as there are blocks, each ending as near to its share of the bytes as it can.
pub(crate) fn equal(costs: &Costs, groups: usize) -> Vec<usize> {
    let blocks = costs.blocks();
    let groups = groups.min(blocks);
    let mut ends: Vec<usize> = Vec::with_capacity(groups);
    for group in 1..=groups {
        let nearest = costs.nearest_boundary(group as f64 / groups as f64);
        // At least one block for this group and for each of those to come.
        let least = ends.last().map_or(1, |end| end + 1);
        ends.push(nearest.clamp(least, blocks - (groups - group)));
    }
    ends
}
