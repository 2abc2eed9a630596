//! A profile as the planner sees it: blocks instead of layers, prefix sums instead of lengths, integers instead of
//! floating point.

use crate::{Group, Profile, TransferError};

/// Whole ticks of time. A tick is a power of two of a microsecond, chosen so that the longest plan stays below 2^61:
/// finer than a double for every profile, exact for costs that are whole (halves, quarters ...) microseconds, and sums
/// do not depend on their order, so that the arguments of the planner hold to the last bit.
pub(crate) type Ticks = u64;

/// Later than any plan can end, with room to add to it.
pub(crate) const NEVER: Ticks = 1 << 62;

/// The longest plan, in ticks, is below two to this power (and its rounding errors).
const HORIZON_BITS: i32 = 60;
/// A tick is at least two to minus this power of a microsecond, so that a microsecond in ticks is a double.
const FINEST_BITS: i32 = 1000;

/// The costs of a profile's blocks.
///
/// A block is a layer with bytes and the layers without bytes behind it; layers ahead of the first bytes are the lead.
/// Cuts make sense between blocks only. A *boundary* `j` stands behind the first `j` blocks.
#[derive(Debug, Clone)]
pub(crate) struct Costs {
    ticks_per_us: f64,
    /// What a copy costs before its first byte.
    pub(crate) copy: Ticks,
    /// What a wait costs.
    pub(crate) wait: Ticks,
    /// Computing time of the layers ahead of the first block.
    pub(crate) lead: Ticks,
    /// By boundary: link time of all bytes before it, and of those that layers ahead of its last block read by themselves.
    pub(crate) sent: Vec<Ticks>,
    /// By boundary: link time that is saved if all layers before it need nothing from the host.
    saved: Vec<Ticks>,
    /// By boundary: computing time of all blocks before it, without the lead.
    pub(crate) work: Vec<Ticks>,
    /// By boundary: bytes before it.
    bytes: Vec<u64>,
    /// By boundary but the last: the layer that begins the block behind it. The last: the number of layers.
    layer: Vec<usize>,
}

/// One group of layers at its place in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Step {
    pub(crate) lands: Ticks,
    pub(crate) starts: Ticks,
    pub(crate) ends: Ticks,
}

impl Costs {
    /// Checks a profile and sums it up.
    pub(crate) fn new(profile: &Profile) -> Result<Self, TransferError> {
        let horizon_us = profile.horizon_us()?;
        let ticks_per_us = 2_f64.powi((HORIZON_BITS - exponent_above(horizon_us)).min(FINEST_BITS));
        // Every time is at most the horizon, so that the product is below 2^60 (casts of floats saturate anyway).
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        let ticks = |us: f64| (us * ticks_per_us).round() as Ticks;

        let us_per_byte = profile.link.us_per_byte();
        let mut costs = Self {
            ticks_per_us,
            copy: ticks(profile.link.per_copy_us),
            wait: ticks(profile.link.per_wait_us),
            lead: 0,
            sent: vec![0],
            saved: Vec::new(),
            work: vec![0],
            bytes: vec![0],
            layer: Vec::new(),
        };
        let mut read = 0;
        for (index, layer) in profile.layers.iter().enumerate() {
            let mut block = costs.layer.len();
            if layer.bytes > 0 {
                let bytes = costs.bytes[block] + layer.bytes;
                costs.layer.push(index);
                costs.saved.push(ticks((costs.bytes[block] + read) as f64 * us_per_byte));
                costs.bytes.push(bytes);
                costs.sent.push(ticks((bytes + read) as f64 * us_per_byte));
                costs.work.push(costs.work[block]);
                block += 1;
            }
            let time = if block == 0 { &mut costs.lead } else { &mut costs.work[block] };
            *time += ticks(layer.compute_us);
            read += layer.host_bytes;
        }
        costs.saved.push(ticks((costs.bytes[costs.layer.len()] + read) as f64 * us_per_byte));
        costs.layer.push(profile.layers.len());
        Ok(costs)
    }

    /// The costs if all that the blocks before a boundary need is on the device already: these blocks join the lead.
    pub(crate) fn behind(&self, boundary: usize) -> Self {
        let rest = |sums: &[Ticks]| sums[boundary..].iter().map(|sum| sum - sums[boundary]).collect();
        // Before the first block nothing is there.
        let saved = if boundary == 0 { 0 } else { self.saved[boundary] };
        let sent = self.sent[boundary + 1..].iter().map(|sent| sent - saved);
        Self {
            ticks_per_us: self.ticks_per_us,
            copy: self.copy,
            wait: self.wait,
            lead: self.lead + self.work[boundary],
            sent: std::iter::once(0).chain(sent).collect(),
            saved: rest(&self.saved),
            work: rest(&self.work),
            bytes: rest(&self.bytes),
            layer: self.layer[boundary..].to_vec(),
        }
    }

    /// How many blocks there are; 0 if no layer has bytes.
    pub(crate) fn blocks(&self) -> usize {
        self.layer.len() - 1
    }

    /// How many layers there are.
    pub(crate) fn layers(&self) -> usize {
        self.layer[self.blocks()]
    }

    pub(crate) fn us(&self, ticks: Ticks) -> f64 {
        ticks as f64 / self.ticks_per_us
    }

    /// Computing time of all layers.
    pub(crate) fn ready(&self) -> Ticks {
        self.lead + self.total_work()
    }

    /// Computing time of all blocks.
    pub(crate) fn total_work(&self) -> Ticks {
        self.work[self.blocks()]
    }

    /// Computing time of the last block.
    pub(crate) fn last_work(&self) -> Ticks {
        let blocks = self.blocks();
        self.work[blocks] - self.work[blocks.saturating_sub(1)]
    }

    /// When copy number `count` (from 1) has landed if it ends at a boundary.
    pub(crate) fn lands(&self, count: usize, end: usize) -> Ticks {
        count as u64 * self.copy + self.sent[end]
    }

    /// The last boundary at which copy number `count` can end and have landed by a time; 0 if there is none.
    pub(crate) fn landed(&self, count: usize, by: Ticks) -> usize {
        let copies = self.lands(count, 0);
        self.sent.partition_point(|&sent| copies + sent <= by).saturating_sub(1)
    }

    /// The group of the blocks from boundary `start` to boundary `end`, number `count` (from 1), after computation has
    /// come to an end at `ready`.
    pub(crate) fn step(&self, count: usize, start: usize, end: usize, ready: Ticks) -> Step {
        let lands = self.lands(count, end);
        let starts = lands.max(ready);
        Step { lands, starts, ends: starts + self.wait + (self.work[end] - self.work[start]) }
    }

    /// The groups of a plan in time. `ends` are the boundaries at which its groups end; the last is the last of all.
    pub(crate) fn steps<'a>(&'a self, ends: &'a [usize]) -> impl Iterator<Item = Step> + 'a {
        let mut start = 0;
        let mut ready = self.lead;
        ends.iter().enumerate().map(move |(index, &end)| {
            let step = self.step(index + 1, start, end, ready);
            (start, ready) = (end, step.ends);
            step
        })
    }

    /// When a plan ends.
    pub(crate) fn cost(&self, ends: &[usize]) -> Ticks {
        self.steps(ends).last().map_or(self.lead, |step| step.ends)
    }

    /// When a plan ends of which no group computes before the last has landed.
    pub(crate) fn sequential(&self, ends: &[usize]) -> Ticks {
        let Some(&end) = ends.last() else { return self.lead };
        self.lands(ends.len(), end).max(self.lead) + ends.len() as u64 * self.wait + self.work[end]
    }

    /// The group of the blocks between two boundaries; the first begins with the lead.
    pub(crate) fn group(&self, start: usize, end: usize) -> Group {
        Group {
            first_layer: if start == 0 { 0 } else { self.layer[start] },
            last_layer: self.layer[end] - 1,
            bytes: self.bytes[end] - self.bytes[start],
        }
    }

    /// Bytes before a boundary.
    pub(crate) fn bytes_before(&self, boundary: usize) -> u64 {
        self.bytes[boundary]
    }

    /// The layer that begins the block behind a boundary; the number of layers for the last boundary.
    pub(crate) fn layer_at(&self, boundary: usize) -> usize {
        self.layer[boundary]
    }

    /// The boundary at which cutting ahead of a layer cuts: layers without bytes belong to the group before them.
    pub(crate) fn boundary(&self, layer: usize) -> usize {
        self.layer[..self.blocks()].partition_point(|&first| first < layer)
    }

    /// The boundary nearest to a share of all bytes.
    pub(crate) fn nearest_boundary(&self, share: f64) -> usize {
        let blocks = self.blocks();
        let wanted = self.bytes[blocks] as f64 * share;
        let above = self.bytes.partition_point(|&bytes| (bytes as f64) < wanted).min(blocks);
        let below = above.saturating_sub(1);
        if wanted - (self.bytes[below] as f64) < (self.bytes[above] as f64) - wanted { below } else { above }
    }

    /// No plan ends earlier: every block's bytes come as early as in a single copy that announces each as it arrives,
    /// and one wait is all that is paid.
    pub(crate) fn lower_bound(&self) -> Ticks {
        let blocks = self.blocks();
        if blocks == 0 {
            return self.lead;
        }
        let remaining = |boundary: usize| self.wait + (self.total_work() - self.work[boundary]);
        (0..blocks)
            .map(|block| self.copy + self.sent[block + 1] + remaining(block))
            .fold(self.lead + remaining(0), Ticks::max)
    }
}

/// The least `e` for which `value < 2^e`, for a finite `value` that is not negative; very small for zero.
fn exponent_above(value: f64) -> i32 {
    if value > 0.0 {
        // Rounding of the logarithm costs at most one, for which the horizon has room.
        #[allow(clippy::cast_possible_truncation)]
        let exponent = value.log2().floor() as i32;
        exponent + 1
    } else {
        i32::MIN / 2
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::{Layer, LinkCosts};

    pub(crate) fn profile(layers: &[(u64, f64)]) -> Profile {
        Profile {
            model: String::new(),
            link: LinkCosts { bandwidth_bytes_per_s: 1e6, per_copy_us: 2.0, per_wait_us: 1.0 },
            layers: layers
                .iter()
                .map(|&(bytes, compute_us)| Layer { name: String::new(), bytes, compute_us, host_bytes: 0 })
                .collect(),
        }
    }

    #[test]
    fn layers_without_bytes_join_the_block_before_them() {
        let costs =
            Costs::new(&profile(&[(0, 3.0), (0, 4.0), (5, 1.0), (0, 2.0), (6, 8.0), (0, 1.0)])).unwrap();
        assert_eq!(costs.blocks(), 2);
        assert_eq!(costs.us(costs.lead), 7.0);
        assert_eq!(costs.sent.iter().map(|&t| costs.us(t)).collect::<Vec<_>>(), [0.0, 5.0, 11.0]);
        assert_eq!(costs.work.iter().map(|&t| costs.us(t)).collect::<Vec<_>>(), [0.0, 3.0, 12.0]);
        assert_eq!(costs.group(0, 1), Group { first_layer: 0, last_layer: 3, bytes: 5 });
        assert_eq!(costs.group(1, 2), Group { first_layer: 4, last_layer: 5, bytes: 6 });
        // A cut ahead of any layer up to the one with bytes is the same cut.
        assert_eq!([1, 2, 3, 4, 5].map(|layer| costs.boundary(layer)), [0, 0, 1, 1, 2]);
    }

    #[test]
    fn extremes_neither_overflow_nor_vanish() {
        for us in [1e-300, 1e-9, 1.0, 1e9, 1e300] {
            let mut extreme = profile(&[(1, us), (1, us)]);
            extreme.link = LinkCosts { bandwidth_bytes_per_s: 1e6 / us, per_copy_us: us, per_wait_us: us };
            let costs = Costs::new(&extreme).unwrap();
            let whole = costs.us(costs.cost(&[2]));
            assert!(
                (whole / us - 6.0).abs() < 1e-9 || us < 1e-290,
                "{us}: {whole} is not a copy, two bytes, a wait and two layers"
            );
            assert!(costs.cost(&[1, 2]) < NEVER);
        }
    }
}
