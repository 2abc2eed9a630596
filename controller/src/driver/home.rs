use std::sync::Arc;

use pswitch_device::{DeviceSlice, PinnedMemory};
use pswitch_mem_pool::{Home, HostStore, Pool, PoolError, Range};
use pswitch_model::{Layer, Table};
use pswitch_transfer::{Algorithm, CopyIn, GroupCopy, Plan};

use super::mail::{HostTables, ModelSpec};

/// A model with its place in the pool: what moves it there, group by group, and where it is announced.
#[derive(Debug)]
pub(super) struct HomedModel {
    pub(super) spec: Arc<ModelSpec>,
    /// The home of its own, over which workers build it.
    pub(super) home: Home,
    /// Where its span lies, or goes with the transfer under way. Kept between two loads.
    pub(super) place: Range,
    /// Tables that may be read from the host store, and the span there for whoever reads it.
    host_tables: HostTables,
    pub(super) host_span: PinnedMemory,
    /// No copy is shorter, if the span is not.
    least_copy_bytes: u64,
    /// The copies of a load, in order, tables left out.
    groups: Vec<GroupCopy>,
    /// The copies of tables; their doorbells follow those of the groups.
    table_groups: Vec<GroupCopy>,
    /// For every group the node that waits for it.
    pub(super) wait_nodes: Vec<u32>,
    /// The same for every table.
    pub(super) table_nodes: Vec<u32>,
    /// Doorbell words that may have been rung since they were last cleared.
    pub(super) used_doorbells: Option<DeviceSlice>,
    /// Whether all workers have built it, so that requests may come.
    pub(super) in_service: bool,
    /// Workers in a row that have died while they built it.
    pub(super) deaths: u32,
}

impl HomedModel {
    /// A model that moves as one group, until there is a plan.
    pub(super) fn new(
        spec: Arc<ModelSpec>,
        home: Home,
        host_tables: HostTables,
        least_copy_bytes: u64,
        pool: &Pool,
        store: &HostStore,
    ) -> Result<Self, PoolError> {
        let mut model = Self {
            host_span: store.memory(spec.id)?,
            spec,
            home,
            place: home.span,
            host_tables,
            least_copy_bytes,
            groups: Vec::new(),
            table_groups: Vec::new(),
            wait_nodes: Vec::new(),
            table_nodes: Vec::new(),
            used_doorbells: None,
            in_service: false,
            deaths: 0,
        };
        let whole: Vec<_> =
            model.spec.layers.len().checked_sub(1).map(|last| (0, last)).into_iter().collect();
        model.divide(&whole, pool, store)?;
        Ok(model)
    }

    /// Divides the span as a plan says. Nothing may be under way.
    pub(super) fn follow(&mut self, plan: &Plan, pool: &Pool, store: &HostStore) -> Result<(), PoolError> {
        let groups: Vec<_> = plan.groups.iter().map(|group| (group.first_layer, group.last_layer)).collect();
        self.divide(&groups, pool, store)?;
        if plan.algorithm == Algorithm::Sequential {
            wait_for_all_at_first(&mut self.wait_nodes);
        }
        Ok(())
    }

    /// Has the span go to that place from the next load on.
    pub(super) fn lie_at(&mut self, place: Range, pool: &Pool) -> Result<(), PoolError> {
        if self.place == place {
            return Ok(());
        }
        let moved = |groups: &[GroupCopy]| {
            let to = |group: &GroupCopy| {
                Range::new(place.offset + group.copy.from.offset(), group.copy.to.bytes())
            };
            let moved = groups.iter().map(|group| {
                let copy = CopyIn { to: pool.slice(to(group))?, from: group.copy.from.clone() };
                Ok(GroupCopy { copy, doorbell: group.doorbell.clone() })
            });
            moved.collect::<Result<Vec<_>, PoolError>>()
        };
        (self.groups, self.table_groups) = (moved(&self.groups)?, moved(&self.table_groups)?);
        self.place = place;
        Ok(())
    }

    /// Whether an execution with inputs of so many bytes reads tables from the host store while weights are on their way.
    pub(super) fn reads_host_tables(&self, input_bytes: u64) -> bool {
        !self.host_tables.tables.is_empty() && input_bytes <= self.host_tables.most_input_bytes
    }

    /// Storages of the tables that may be read from the host store.
    pub(super) fn table_storages(&self) -> Vec<u32> {
        self.host_tables.tables.iter().map(|table| table.storage.0).collect()
    }

    /// The copies of a load. Tables come last, when nobody waits for them: the next executions find them in their place.
    /// Whoever does wait needs them early.
    pub(super) fn load(&self, host_tables: bool) -> impl Iterator<Item = &GroupCopy> {
        let (first, last) =
            if host_tables { (&self.groups, &self.table_groups) } else { (&self.table_groups, &self.groups) };
        first.iter().chain(last)
    }

    fn divide(&mut self, groups: &[(usize, usize)], pool: &Pool, store: &HostStore) -> Result<(), PoolError> {
        let mut parts = Vec::new();
        let mut offset = 0;
        for &(first, last) in groups {
            let layers = &self.spec.layers[first..=last];
            parts.extend(without_tables(layers, offset, &self.host_tables.tables));
            offset += layers.iter().map(|layer| layer.bytes).sum::<u64>();
        }
        let tables = self.host_tables.tables.iter();
        let tables: Vec<Part> = tables
            .map(|table| Part { range: Range::new(table.offset, table.bytes), node: table.node })
            .collect();
        let mut copies = Vec::with_capacity(parts.len() + tables.len());
        for (index, Part { range, .. }) in (0..).zip(parts.iter().chain(&tables)) {
            let doorbell = pool.doorbell(&self.home, index)?;
            let range = no_shorter(*range, self.least_copy_bytes, self.spec.span_bytes);
            let to = pool.slice(Range::new(self.place.offset + range.offset, range.bytes))?;
            let from = store.slice(self.spec.id, range)?;
            copies.push(GroupCopy { copy: CopyIn { from, to }, doorbell });
        }
        let used = pool.slice(Range::new(self.home.doorbells.offset, 4 * copies.len() as u64))?;
        let nodes = |parts: &[Part]| {
            parts.iter().map(|part| u32::try_from(part.node).unwrap_or(u32::MAX)).collect::<Vec<_>>()
        };
        self.table_groups = copies.split_off(parts.len());
        self.groups = copies;
        (self.wait_nodes, self.table_nodes) = (nodes(&parts), nodes(&tables));
        if self.used_doorbells.as_ref().is_none_or(|known| known.bytes() < used.bytes()) {
            self.used_doorbells = Some(used);
        }
        Ok(())
    }
}

/// Has the node that waits for the first group wait for all.
fn wait_for_all_at_first(wait_nodes: &mut [u32]) {
    if let Some(&first) = wait_nodes.first() {
        wait_nodes.fill(first);
    }
}

/// A part of a span, longer by what lies behind it, or ahead of it where the span ends. What it overlaps with is copied
/// twice: it was or will be copied by itself, and nobody sees the difference.
fn no_shorter(part: Range, least_bytes: u64, span_bytes: u64) -> Range {
    let bytes = part.bytes.max(least_bytes).min(span_bytes);
    Range::new(part.offset.min(span_bytes - bytes), bytes)
}

/// Some bytes of a span that are copied at once, and the node that waits for them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Part {
    range: Range,
    node: usize,
}

/// The bytes of a group's layers, from `offset` of the span on, without those of tables: in as many parts as these leave.
fn without_tables(layers: &[Layer], offset: u64, tables: &[Table]) -> Vec<Part> {
    let mut parts: Vec<Part> = Vec::new();
    let mut begin = offset;
    for layer in layers {
        let end = begin + layer.bytes;
        // What lies between the tables of this layer.
        let inside = tables.iter().filter(|table| (begin..end).contains(&table.offset));
        let gaps = inside.map(|table| (table.offset, table.offset + table.bytes)).chain([(end, end)]);
        let mut from = begin;
        for (gap, behind) in gaps {
            let bytes = gap.saturating_sub(from);
            match parts.last_mut() {
                _ if bytes == 0 => {}
                Some(last) if last.range.end() == from => last.range.bytes += bytes,
                _ => parts.push(Part { range: Range::new(from, bytes), node: layer.node }),
            }
            from = behind;
        }
        begin = end;
    }
    parts
}

#[cfg(test)]
mod tests {
    use pswitch_model::StorageId;

    use super::*;

    fn layers(bytes: &[u64]) -> Vec<Layer> {
        (0..).zip(bytes).map(|(node, &bytes)| Layer { name: String::new(), node, bytes }).collect()
    }

    fn table(offset: u64, bytes: u64) -> Table {
        Table { storage: StorageId(0), offset, bytes, node: 0, read_bytes: 1 }
    }

    fn parts(found: &[(u64, u64, usize)]) -> Vec<Part> {
        found.iter().map(|&(offset, bytes, node)| Part { range: Range::new(offset, bytes), node }).collect()
    }

    #[test]
    fn a_group_without_tables_is_one_part_that_its_first_layer_with_bytes_waits_for() {
        let layers = layers(&[0, 512, 0, 1024]);
        assert_eq!(without_tables(&layers, 4096, &[]), parts(&[(4096, 1536, 1)]));
        assert_eq!(without_tables(&layers[..1], 4096, &[]), []);
    }

    #[test]
    fn a_part_that_is_short_is_longer_by_its_neighbours() {
        let no_shorter = |offset, bytes| no_shorter(Range::new(offset, bytes), 100, 1000);
        assert_eq!(no_shorter(0, 10), Range::new(0, 100));
        assert_eq!(no_shorter(500, 100), Range::new(500, 100));
        assert_eq!(no_shorter(500, 300), Range::new(500, 300));
        assert_eq!(no_shorter(990, 10), Range::new(900, 100));
        assert_eq!(super::no_shorter(Range::new(8, 8), 100, 64), Range::new(0, 64));
        assert_eq!(super::no_shorter(Range::new(8, 8), 0, 64), Range::new(8, 8));
        assert_eq!(super::no_shorter(Range::new(0, 0), 0, 0), Range::new(0, 0));
    }

    #[test]
    fn nothing_computes_before_all_has_come_if_the_first_node_waits_for_all() {
        let mut nodes = [3, 4, 9];
        wait_for_all_at_first(&mut nodes);
        assert_eq!(nodes, [3; 3]);
        wait_for_all_at_first(&mut []);
    }

    #[test]
    fn tables_cut_a_group() {
        let layers = layers(&[512, 2048, 512]);
        // A layer of its own.
        assert_eq!(without_tables(&layers, 0, &[table(512, 2048)]), parts(&[(0, 512, 0), (2560, 512, 2)]));
        // A part of a layer: at its begin, in its middle.
        assert_eq!(without_tables(&layers, 0, &[table(512, 512)]), parts(&[(0, 512, 0), (1024, 2048, 1)]));
        assert_eq!(without_tables(&layers, 0, &[table(1024, 512)]), parts(&[(0, 1024, 0), (1536, 1536, 1)]));
        // Two in a row, one of another group.
        let two = [table(512, 1024), table(1536, 1024), table(9216, 512)];
        assert_eq!(without_tables(&layers, 0, &two), parts(&[(0, 512, 0), (2560, 512, 2)]));
        // All there is.
        assert_eq!(without_tables(&layers[1..2], 512, &[table(512, 2048)]), []);
    }
}
