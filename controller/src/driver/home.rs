use std::sync::Arc;

use pswitch_device::DeviceSlice;
use pswitch_mem_pool::{Home, HostStore, Pool, PoolError, Range};
use pswitch_transfer::{CopyIn, GroupCopy, Plan};

use super::mail::ModelSpec;

/// A model in its home: what moves it, group by group, and where it is announced.
#[derive(Debug)]
pub(super) struct HomedModel {
    pub(super) spec: Arc<ModelSpec>,
    pub(super) home: Home,
    /// The copies of a load, in order.
    pub(super) groups: Vec<GroupCopy>,
    /// For every group the node that waits for it.
    pub(super) wait_nodes: Vec<u32>,
    /// Doorbell words that may have been rung since they were last cleared.
    pub(super) used_doorbells: Vec<DeviceSlice>,
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
        pool: &Pool,
        store: &HostStore,
    ) -> Result<Self, PoolError> {
        let mut model = Self {
            spec,
            home,
            groups: Vec::new(),
            wait_nodes: Vec::new(),
            used_doorbells: Vec::new(),
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
        self.divide(&groups, pool, store)
    }

    fn divide(&mut self, groups: &[(usize, usize)], pool: &Pool, store: &HostStore) -> Result<(), PoolError> {
        let (mut copies, mut wait_nodes, mut used) = (Vec::new(), Vec::new(), Vec::new());
        let mut offset = 0;
        for &(first, last) in groups {
            let layers = &self.spec.layers[first..=last];
            let bytes: u64 = layers.iter().map(|layer| layer.bytes).sum();
            // A group without bytes has nothing to wait for.
            let Some(waiting) = layers.iter().find(|layer| layer.bytes > 0) else { continue };
            let doorbell = pool.doorbell(&self.home, u32::try_from(copies.len()).unwrap_or(u32::MAX))?;
            let to = pool.slice(Range::new(self.home.span.offset + offset, bytes))?;
            let from = store.slice(self.spec.id, Range::new(offset, bytes))?;
            copies.push(GroupCopy { copy: CopyIn { from, to }, doorbell: doorbell.clone() });
            wait_nodes.push(u32::try_from(waiting.node).unwrap_or(u32::MAX));
            used.push(doorbell);
            offset += bytes;
        }
        (self.groups, self.wait_nodes) = (copies, wait_nodes);
        if used.len() > self.used_doorbells.len() {
            self.used_doorbells = used;
        }
        Ok(())
    }
}
