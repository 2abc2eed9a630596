//! The graphs of one model.

use pswitch_device::GpuGraph;
use pswitch_protocol::{Execute, InputValue, Region};

use crate::executable::OutputShape;
use crate::libtorch::Number;

/// Sets of graphs that one model may have: those used longest ago make room for others.
const MOST_SETS: usize = 16;

/// One output of a graph. It is always of this type and shape.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct GraphOutput {
    pub(crate) shape: OutputShape,
    /// Its value, if it is no tensor: it follows from the shapes of the inputs.
    pub(crate) number: Option<Number>,
}

/// The graphs of one model for one set of input shapes in one arena.
#[derive(Debug)]
pub(crate) struct GraphSet {
    pub(crate) inputs: Vec<InputValue>,
    /// Where activations lie; what the inputs leave of the arena.
    pub(crate) arena: Region,
    pub(crate) input_doorbell: u64,
    pub(crate) outputs: Vec<GraphOutput>,
    /// For weights that are there.
    pub(crate) ready: Option<GpuGraph>,
    /// For weights on their way.
    pub(crate) cold: Option<GpuGraph>,
    last_use: u64,
}

impl GraphSet {
    pub(crate) fn new(inputs: Vec<InputValue>, arena: Region, input_doorbell: u64) -> Self {
        Self { inputs, arena, input_doorbell, outputs: Vec::new(), ready: None, cold: None, last_use: 0 }
    }

    pub(crate) fn has(&self, waits: bool) -> bool {
        if waits { self.cold.is_some() } else { self.ready.is_some() }
    }

    pub(crate) fn put(&mut self, waits: bool, outputs: Vec<GraphOutput>, graph: GpuGraph) {
        self.outputs = outputs;
        if waits { self.cold = Some(graph) } else { self.ready = Some(graph) }
    }

    pub(crate) fn shapes(&self) -> Vec<OutputShape> {
        self.outputs.iter().map(|output| output.shape.clone()).collect()
    }

    /// The outputs and the graph, which is there.
    pub(crate) fn captured(&mut self, waits: bool) -> (&[GraphOutput], &mut GpuGraph) {
        let graph = if waits { &mut self.cold } else { &mut self.ready };
        (&self.outputs, graph.as_mut().expect("captured before it is used"))
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
    pub(crate) fn add(&mut self, set: GraphSet) -> usize {
        if self.sets.len() >= MOST_SETS
            && let Some((oldest, _)) = self.sets.iter().enumerate().min_by_key(|(_, set)| set.last_use)
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
            set.arena == order.arena
                && set.input_doorbell == order.input_doorbell
                && set.inputs == order.inputs
        };
        let index = self.sets.iter().position(fits).unwrap_or_else(|| {
            self.add(GraphSet::new(order.inputs.clone(), order.arena, order.input_doorbell))
        });
        self.sets[index].last_use = self.uses;
        index
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
            arena: Region { offset: 512, bytes: 3584 },
            resident: true,
            outputs: Region { offset: 0, bytes: 64 },
            profile: None,
            doorbell_timeout_ms: 1,
        }
    }

    #[test]
    fn sets_are_found_by_shapes_and_arena() {
        let mut graphs = ModelGraphs::default();
        let first = graphs.find_or_add(&order(1));
        assert_eq!(graphs.find_or_add(&order(1)), first);
        assert_ne!(graphs.find_or_add(&order(2)), first);
        let elsewhere = Execute { arena: Region { offset: 8192, bytes: 3584 }, ..order(1) };
        assert_ne!(graphs.find_or_add(&elsewhere), first);
        assert_eq!(graphs.sets.len(), 3);
    }

    #[test]
    fn the_set_used_longest_ago_makes_room() {
        let mut graphs = ModelGraphs::default();
        let most = MOST_SETS as u64;
        for batch in 0..most {
            graphs.find_or_add(&order(batch));
        }
        graphs.find_or_add(&order(0));
        let added = graphs.find_or_add(&order(most));
        assert_eq!(graphs.sets.len(), MOST_SETS);
        assert_eq!(graphs.set(added).inputs, order(most).inputs);
        let batches = |batch: u64| graphs.sets.iter().any(|set| set.inputs == order(batch).inputs);
        assert!(batches(0) && !batches(1) && (2..=most).all(batches));
    }
}
