use std::collections::{BTreeMap, BTreeSet};

use pswitch_mem_pool::{ArenaId, Home, Lease, Ledger, ModelId, PoolError, Range, Residency};
use pswitch_transfer::TransferId;

use super::messages::{Action, ExecutionId, Homes, Load};

/// States of a model's span; finer than the ledger's, to which `Poisoned` is `Moving`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum SpanState {
    /// In the host store alone.
    Host,
    /// On its way into its home.
    Moving {
        /// The transfer that brings it.
        transfer: TransferId,
    },
    /// In its home.
    Resident,
    /// Its transfer failed, and executions that waited for it are not over yet.
    Poisoned {
        /// Models whose doorbells that transfer was to clear.
        evicted: Vec<ModelId>,
        /// Why it failed.
        reason: String,
    },
}

#[derive(Debug)]
pub(super) struct Span {
    pub(super) state: SpanState,
    pub(super) leases: u32,
    /// Models whose own homes overlap with this one's.
    pub(super) overlapping: Vec<ModelId>,
    /// Its place in the order in which models are used; the highest is the latest.
    pub(super) last_use: u64,
    loads: u64,
    pub(super) evictions: u64,
}

impl Span {
    fn new(state: SpanState, overlapping: Vec<ModelId>) -> Self {
        Self { state, leases: 0, overlapping, last_use: 0, loads: 0, evictions: 0 }
    }
}

/// What travels in one transfer.
#[derive(Debug)]
pub(super) struct Transfer {
    /// The execution whose inputs it carries.
    inputs_of: Option<ExecutionId>,
    /// The model whose weights it carries, and those that it evicted.
    pub(super) weights: Option<(ModelId, Vec<ModelId>)>,
}

/// What came of training's wish for its part of the pool.
pub(super) enum Claimed {
    /// It is there, and stays.
    Held,
    /// It is brought back.
    Moves(TransferId, Load),
}

/// Which weights are in the pool, which move, and who holds them: the part of the scheduler that owns the ledger.
#[derive(Debug)]
pub(super) struct Switcher {
    pub(super) ledger: Ledger,
    pub(super) homes: Homes,
    pub(super) spans: BTreeMap<ModelId, Span>,
    /// Those whose home is not their own now.
    pub(super) away: BTreeSet<ModelId>,
    pub(super) transfers: BTreeMap<TransferId, Transfer>,
    weights_under_way: usize,
    next_transfer: u64,
    pub(super) next_use: u64,
}

impl Switcher {
    pub(super) fn new(ledger: Ledger, homes: Homes) -> Self {
        let mut spans = BTreeMap::new();
        if ledger.state(ModelId::TRAINING).is_ok() {
            spans.insert(ModelId::TRAINING, Span::new(SpanState::Resident, Vec::new()));
        }
        Self {
            ledger,
            homes,
            spans,
            away: BTreeSet::new(),
            transfers: BTreeMap::new(),
            weights_under_way: 0,
            next_transfer: 0,
            next_use: 1,
        }
    }

    pub(super) fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// Unknown, placed -> Host.
    pub(super) fn place(
        &mut self,
        model: ModelId,
        span_bytes: u64,
        doorbells: u32,
    ) -> Result<Home, PoolError> {
        let home = self.ledger.place(model, span_bytes, doorbells)?;
        let mut overlapping = Vec::new();
        for (other, span) in &mut self.spans {
            if self.ledger.own_place(*other)?.overlaps(&home.span) {
                overlapping.push(*other);
                span.overlapping.push(model);
            }
        }
        self.spans.insert(model, Span::new(SpanState::Host, overlapping));
        Ok(home)
    }

    /// Host or Resident without leases, removed -> unknown. Otherwise nothing happens; returns whether it did.
    pub(super) fn remove(&mut self, model: ModelId) -> bool {
        let Some(span) = self.spans.get(&model) else { return false };
        let free = span.leases == 0 && matches!(span.state, SpanState::Host | SpanState::Resident);
        if !free || !is_granted(self.ledger.remove(model)) {
            return false;
        }
        self.spans.remove(&model);
        self.away.remove(&model);
        for span in self.spans.values_mut() {
            span.overlapping.retain(|other| *other != model);
        }
        true
    }

    /// Whether an execution may use the span: it is there or on its way.
    pub(super) fn is_present(&self, model: ModelId) -> bool {
        self.spans
            .get(&model)
            .is_some_and(|span| matches!(span.state, SpanState::Moving { .. } | SpanState::Resident))
    }

    /// Why the span's transfer failed, until that is settled.
    pub(super) fn failure(&self, model: ModelId) -> Option<&str> {
        match &self.spans.get(&model)?.state {
            SpanState::Poisoned { reason, .. } => Some(reason),
            SpanState::Host | SpanState::Moving { .. } | SpanState::Resident => None,
        }
    }

    pub(super) fn is_loading(&self) -> bool {
        self.weights_under_way > 0
    }

    pub(super) fn is_idle(&self) -> bool {
        self.transfers.is_empty()
    }

    /// The execution whose inputs this transfer carries, while it is under way.
    pub(super) fn inputs_under_way(&self, transfer: TransferId) -> Option<ExecutionId> {
        self.transfers.get(&transfer)?.inputs_of
    }

    pub(super) fn counts(&self, model: ModelId) -> (u64, u64) {
        self.spans.get(&model).map_or((0, 0), |span| (span.loads, span.evictions))
    }

    /// Gives an execution its lease and the transfer of its inputs, with the weights behind them if need be.
    pub(super) fn begin(
        &mut self,
        execution: ExecutionId,
        model: ModelId,
        arena: ArenaId,
    ) -> Option<(Lease, TransferId, Option<Load>)> {
        let transfer = TransferId(self.next_transfer);
        let load = if self.is_present(model) {
            None
        } else {
            let place = self.room(model, |_| false)?;
            Some(self.move_in(model, place, transfer)?)
        };
        let lease = granted(self.ledger.lease(model, arena))?;
        self.next_transfer += 1;
        if let Some(span) = self.spans.get_mut(&model) {
            span.leases += 1;
        }
        self.note_use(model);
        let weights = load.as_ref().map(|load| (model, load.evicted.clone()));
        self.transfers.insert(transfer, Transfer { inputs_of: Some(execution), weights });
        Some((lease, transfer, load))
    }

    /// Begins to move a model that nobody executes yet to a place where there is [room](Self::room).
    pub(super) fn prefetch(&mut self, model: ModelId, place: Range) -> Option<(TransferId, Load)> {
        let transfer = TransferId(self.next_transfer);
        let load = self.move_in(model, place, transfer)?;
        self.next_transfer += 1;
        let weights = Some((model, load.evicted.clone()));
        self.transfers.insert(transfer, Transfer { inputs_of: None, weights });
        Some((transfer, load))
    }

    /// Holds training's part of the pool if it is there, or begins to bring it back if nothing in its place is held.
    pub(super) fn claim_for_training(&mut self) -> Option<Claimed> {
        let training = ModelId::TRAINING;
        if let Some(place) = self.room(training, |_| false) {
            return self.prefetch(training, place).map(|(transfer, load)| Claimed::Moves(transfer, load));
        }
        let span = self.spans.get_mut(&training).filter(|span| span.state == SpanState::Resident)?;
        granted(self.ledger.hold(training))?;
        span.leases += 1;
        Some(Claimed::Held)
    }

    /// What was held may be evicted again.
    pub(super) fn let_training_go(&mut self) {
        granted(self.ledger.let_go(ModelId::TRAINING));
        if let Some(span) = self.spans.get_mut(&ModelId::TRAINING) {
            span.leases -= 1;
        }
        self.note_use(ModelId::TRAINING);
    }

    /// Host, a load begins -> Moving. What it evicts: Resident -> Host.
    fn move_in(&mut self, model: ModelId, place: Range, transfer: TransferId) -> Option<Load> {
        self.settle_at(model, place)?;
        let evicted = granted(self.ledger.begin_move(model))?;
        for other in &evicted {
            if let Some(span) = self.spans.get_mut(other) {
                span.state = SpanState::Host;
                span.evictions += 1;
            }
        }
        if let Some(span) = self.spans.get_mut(&model) {
            span.state = SpanState::Moving { transfer };
            span.loads += 1;
        }
        self.note_use(model);
        self.weights_under_way += 1;
        Some(Load { place, evicted })
    }

    /// A transfer is complete. Moving, landed -> Resident. Returns the execution whose inputs it carried and the model
    /// whose weights.
    pub(super) fn landed(&mut self, transfer: TransferId) -> (Option<ExecutionId>, Option<ModelId>) {
        let Some(Transfer { inputs_of, weights }) = self.transfers.remove(&transfer) else {
            return (None, None);
        };
        let Some((model, _)) = weights else { return (inputs_of, None) };
        self.weights_under_way -= 1;
        if is_granted(self.ledger.finish_move(model))
            && let Some(span) = self.spans.get_mut(&model)
        {
            span.state = SpanState::Resident;
        }
        (inputs_of, Some(model))
    }

    /// A transfer failed. Moving, failed -> Poisoned, and from there to Host at once if nobody waits for it. Returns as
    /// [`landed`](Self::landed) does.
    pub(super) fn failed(
        &mut self,
        transfer: TransferId,
        reason: &str,
        actions: &mut Vec<Action>,
    ) -> (Option<ExecutionId>, Option<ModelId>) {
        let Some(Transfer { inputs_of, weights }) = self.transfers.remove(&transfer) else {
            return (None, None);
        };
        let Some((model, evicted)) = weights else { return (inputs_of, None) };
        self.weights_under_way -= 1;
        if let Some(span) = self.spans.get_mut(&model) {
            span.state = SpanState::Poisoned { evicted, reason: reason.to_owned() };
            actions.push(Action::Poison { model });
        }
        self.settle(model, actions);
        (inputs_of, Some(model))
    }

    /// An execution is over and its inputs are too.
    pub(super) fn release(&mut self, lease: Lease, actions: &mut Vec<Action>) {
        let model = lease.model();
        granted(self.ledger.release(lease));
        if let Some(span) = self.spans.get_mut(&model) {
            span.leases -= 1;
        }
        self.settle(model, actions);
    }

    /// Poisoned, the last lease is back -> Host.
    fn settle(&mut self, model: ModelId, actions: &mut Vec<Action>) {
        let Some(span) = self.spans.get_mut(&model) else { return };
        let SpanState::Poisoned { evicted, .. } = &mut span.state else { return };
        if span.leases > 0 {
            return;
        }
        let mut models = std::mem::take(evicted);
        span.state = SpanState::Host;
        granted(self.ledger.fail_move(model));
        models.retain(|evicted| self.spans.contains_key(evicted));
        models.push(model);
        actions.push(Action::Clear { models });
    }

    pub(super) fn check(&self) -> Result<(), String> {
        self.ledger.check()?;
        self.check_places()?;
        let moving = self.transfers.values().filter(|transfer| transfer.weights.is_some()).count();
        if moving != self.weights_under_way {
            return Err(format!("{moving} models move, {} are counted", self.weights_under_way));
        }
        for (model, span) in &self.spans {
            let expected = match span.state {
                SpanState::Host => Residency::Host,
                SpanState::Resident => Residency::Resident,
                SpanState::Moving { .. } | SpanState::Poisoned { .. } => Residency::Moving,
            };
            let (state, leases) = (self.ledger.state(*model), self.ledger.leases(*model));
            if state != Ok(expected) || leases != Ok(span.leases as usize) {
                return Err(format!(
                    "{model} is {span:?} here, {state:?} with {leases:?} leases in the ledger"
                ));
            }
            if let SpanState::Moving { transfer } = span.state {
                let weights = self.transfers.get(&transfer).and_then(|transfer| transfer.weights.as_ref());
                if weights.map(|(moving, _)| moving) != Some(model) {
                    return Err(format!("{model} moves by {transfer:?}, which carries {weights:?}"));
                }
            }
        }
        Ok(())
    }
}

/// The value of what the switcher knows the ledger must grant. Should they ever differ, that is a bug: tests stop, a
/// server logs it and goes on without the step.
pub(super) fn granted<T>(result: Result<T, PoolError>) -> Option<T> {
    match result {
        Ok(value) => Some(value),
        Err(error) => {
            tracing::error!(%error, "the ledger refuses what the switcher takes for granted");
            debug_assert!(false, "the ledger refuses: {error}");
            None
        }
    }
}

pub(super) fn is_granted(result: Result<(), PoolError>) -> bool {
    granted(result).is_some()
}
