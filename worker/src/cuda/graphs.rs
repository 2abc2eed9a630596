//! The graphs of one model.

use pswitch_protocol::{Execute, InputValue, Region};

use super::Weights;
use super::launch::{Produced, Segment};
use crate::error::RunError;

/// Sets of graphs that one model may have beside those of the export: those used longest ago make room for others.
const MOST_SETS: usize = 16;

/// A captured execution.
#[derive(Debug)]
pub(crate) struct Captured {
    pub(crate) outputs: Vec<Produced>,
    pub(crate) segments: Vec<Segment>,
}

/// The graphs of one model in one home for one set of input shapes in one arena.
#[derive(Debug)]
pub(crate) struct GraphSet {
    /// Where the span begins in the pool.
    pub(crate) home: u64,
    pub(crate) inputs: Vec<InputValue>,
    /// Where activations lie; what the inputs leave of the arena.
    pub(crate) arena: Region,
    pub(crate) input_doorbell: u64,
    /// For weights that are there.
    ready: Option<Captured>,
    /// For weights on their way, and whether it reads tables from the host store.
    cold: Option<(bool, Captured)>,
    /// Of the shapes of the export: captured in advance and kept.
    is_of_export: bool,
    uses: u64,
    last_use: u64,
}

impl GraphSet {
    /// For the shapes of the export.
    pub(crate) fn of_export(home: u64, inputs: Vec<InputValue>, arena: Region, input_doorbell: u64) -> Self {
        Self {
            home,
            inputs,
            arena,
            input_doorbell,
            ready: None,
            cold: None,
            is_of_export: true,
            uses: 0,
            last_use: 0,
        }
    }

    /// Whether it is likely to be used again.
    pub(crate) fn is_worth_it(&self) -> bool {
        self.is_of_export || self.uses > 1
    }

    /// Whether what waits for groups reads tables from the host store, if it is captured.
    pub(crate) fn cold_host_tables(&self) -> Option<bool> {
        self.cold.as_ref().map(|(host_tables, _)| *host_tables)
    }

    pub(crate) fn put(&mut self, weights: Weights, captured: Captured) {
        match weights {
            Weights::Resident => self.ready = Some(captured),
            Weights::Moving { host_tables } => self.cold = Some((host_tables, captured)),
        }
    }

    /// Forgets what waits for groups: they are others from now on.
    pub(crate) fn forget_cold(&mut self) {
        self.cold = None;
    }

    /// What was captured for such weights, if anything was.
    pub(crate) fn captured(&self, weights: Weights) -> Option<&Captured> {
        match weights {
            Weights::Resident => self.ready.as_ref(),
            Weights::Moving { host_tables } => {
                self.cold.as_ref().filter(|(found, _)| *found == host_tables).map(|(_, captured)| captured)
            }
        }
    }
}

/// All graphs of one model.
#[derive(Debug, Default)]
pub(crate) struct ModelGraphs {
    sets: Vec<GraphSet>,
    /// Why it runs operator by operator, if it does.
    pub(crate) refusal: Option<String>,
    uses: u64,
}

impl ModelGraphs {
    /// None, nor ever any, for such a reason.
    pub(crate) fn refused(reason: &str) -> Self {
        Self { refusal: Some(reason.to_owned()), ..Self::default() }
    }

    pub(crate) fn add(&mut self, set: GraphSet) -> usize {
        let others = || self.sets.iter().enumerate().filter(|(_, set)| !set.is_of_export);
        if others().count() >= MOST_SETS
            && let Some((oldest, _)) = others().min_by_key(|(_, set)| set.last_use)
        {
            self.sets.swap_remove(oldest);
        }
        self.sets.push(set);
        self.sets.len() - 1
    }

    /// The set for the inputs of an order; empty if there was none.
    pub(crate) fn find_or_add(&mut self, order: &Execute) -> usize {
        self.uses += 1;
        let fits = |set: &GraphSet| {
            set.home == order.home
                && set.arena == order.arena
                && set.input_doorbell == order.input_doorbell
                && set.inputs == order.inputs
        };
        let index = self.sets.iter().position(fits).unwrap_or_else(|| {
            let (inputs, arena) = (order.inputs.clone(), order.arena);
            let set = GraphSet::of_export(order.home, inputs, arena, order.input_doorbell);
            self.add(GraphSet { is_of_export: false, ..set })
        });
        self.sets[index].uses += 1;
        self.sets[index].last_use = self.uses;
        index
    }

    /// Lets the model run operator by operator from now on.
    pub(crate) fn refuse(&mut self, model: &str, error: RunError) {
        tracing::warn!(
            model,
            reason = error.message,
            "cannot be captured as a graph and runs operator by operator"
        );
        self.refusal = Some(error.message);
        self.sets.clear();
    }

    pub(crate) fn set(&self, index: usize) -> &GraphSet {
        &self.sets[index]
    }

    pub(crate) fn set_mut(&mut self, index: usize) -> &mut GraphSet {
        &mut self.sets[index]
    }

    pub(crate) fn remove(&mut self, index: usize) {
        self.sets.swap_remove(index);
    }

    pub(crate) fn sets_mut(&mut self) -> impl Iterator<Item = &mut GraphSet> {
        self.sets.iter_mut()
    }
}

#[cfg(test)]
mod tests {
    use pswitch_protocol::PlacedTensor;

    use super::*;

    fn order(batch: u64) -> Execute {
        let at = Region { offset: 0, bytes: 4 * batch };
        Execute {
            execution: 0,
            model: 0,
            inputs: vec![InputValue::Tensor(PlacedTensor { dtype: 7, shape: vec![batch], at })],
            input_doorbell: 4096,
            home: 16384,
            arena: Region { offset: 512, bytes: 3584 },
            resident: true,
            held_back: false,
            host_tables: false,
            outputs: Region { offset: 0, bytes: 64 },
            profile: None,
            doorbell_timeout_ms: 1,
        }
    }

    #[test]
    fn sets_are_found_by_shapes_arena_and_home() {
        let mut graphs = ModelGraphs::default();
        let first = graphs.find_or_add(&order(1));
        assert_eq!(graphs.find_or_add(&order(1)), first);
        assert_ne!(graphs.find_or_add(&order(2)), first);
        let elsewhere = Execute { arena: Region { offset: 8192, bytes: 3584 }, ..order(1) };
        assert_ne!(graphs.find_or_add(&elsewhere), first);
        let moved = graphs.find_or_add(&Execute { home: 0, ..order(1) });
        assert_ne!(moved, first);
        assert!(!graphs.set(moved).is_worth_it(), "it has to come to that home again");
        assert_eq!(graphs.sets.len(), 4);
    }

    #[test]
    fn shapes_have_to_come_twice_to_be_captured() {
        let mut graphs = ModelGraphs::default();
        let index = graphs.find_or_add(&order(1));
        assert!(!graphs.set(index).is_worth_it());
        let index = graphs.find_or_add(&order(1));
        assert!(graphs.set(index).is_worth_it());
    }

    #[test]
    fn the_set_used_longest_ago_makes_room_and_that_of_the_export_stays() {
        let mut graphs = ModelGraphs::default();
        let export = order(1000);
        graphs.add(GraphSet::of_export(
            export.home,
            export.inputs.clone(),
            export.arena,
            export.input_doorbell,
        ));
        let most = MOST_SETS as u64;
        for batch in 0..most {
            graphs.find_or_add(&order(batch));
        }
        graphs.find_or_add(&order(0));
        let added = graphs.find_or_add(&order(most));
        assert_eq!(graphs.sets.len(), MOST_SETS + 1);
        assert!(graphs.sets.iter().any(|set| set.inputs == export.inputs));
        assert_eq!(graphs.set(added).inputs, order(most).inputs);
        let batches = |batch: u64| graphs.sets.iter().any(|set| set.inputs == order(batch).inputs);
        assert!(batches(0) && !batches(1) && (2..=most).all(batches));
    }
}
