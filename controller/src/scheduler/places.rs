//! Where a model goes that has to move in, by [`Homes`].
//!
//! Under [`Homes::Fixed`] it has one place, and who makes room follows from that: lists say who overlaps with whom. Under
//! [`Homes::LeastRecentlyUsed`] it gets a place anew: those used longest ago make room one after the other until a gap is
//! long enough, and of them only those go that really lie there.
//!
//! A model that goes to another place than its own may come back while the transfer that evicted it is under way. It has
//! to wait: that transfer clears its doorbells. Where homes are fixed the two are in each other's place, and it waits anyway.

use std::cell::OnceCell;

use pswitch_mem_pool::{ModelId, Range};

use super::messages::{Action, Homes};
use super::switcher::{Span, SpanState, Switcher, granted, is_granted};

/// A model for which there is no room yet.
pub(super) struct Blocked<'a> {
    switcher: &'a Switcher,
    model: ModelId,
    /// Where it would go if nobody was held: the same for all who ask, and not found before one does.
    wanted: OnceCell<Option<Range>>,
}

impl Blocked<'_> {
    /// Whether beginning an execution of another model could be in its way, if it is not there itself.
    pub(super) fn is_in_the_way(&self, other: ModelId) -> bool {
        let Self { switcher, model, wanted } = self;
        if switcher.has_fixed_homes() {
            return switcher.spans.get(model).is_some_and(|span| span.overlapping.contains(&other));
        }
        if *model == other || !switcher.spans.contains_key(model) {
            return false;
        }
        // Where somebody goes who moves in is not known in advance. While nobody does, the place that is kept free stays the
        // same: whoever lies beside it and is used goes later than before.
        !switcher.is_present(other)
            || wanted
                .get_or_init(|| switcher.wanted(*model))
                .is_none_or(|place| switcher.lies_in(other, place))
    }
}

impl Switcher {
    /// By what models get their places from now on. What is in another place than its own stays there under
    /// [`Homes::Fixed`] until [`send_home`](Self::send_home).
    pub(super) fn set_homes(&mut self, homes: Homes) {
        self.homes = homes;
    }

    /// Where the span could begin to move to now, evicting no model that `keep` says to keep and none that is held. `None`
    /// if there is no room, or if it is not in the host store alone.
    pub(super) fn room(&self, model: ModelId, keep: impl Fn(ModelId) -> bool) -> Option<Range> {
        let span = self.spans.get(&model).filter(|span| span.state == SpanState::Host)?;
        let is_evictable = |(other, span): &(&ModelId, &Span)| {
            span.state == SpanState::Resident && span.leases == 0 && !keep(**other)
        };
        let is_no_obstacle = |other: &ModelId| {
            let span = self.spans.get(other);
            span.is_none_or(|span| span.state == SpanState::Host || is_evictable(&(other, span)))
        };
        if self.has_fixed_homes() {
            let own = granted(self.ledger.own_place(model))?;
            return span.overlapping.iter().all(is_no_obstacle).then_some(own);
        }
        if self.is_being_cleared(model) {
            return None;
        }
        if self.homes == Homes::Fixed || model == ModelId::TRAINING {
            let own = granted(self.ledger.own_place(model))?;
            let mut there = self.spans.keys().filter(|other| **other != model && self.lies_in(**other, own));
            return there.all(is_no_obstacle).then_some(own);
        }
        let victims = in_order_of_use(self.spans.iter().filter(is_evictable));
        granted(self.ledger.find_room(model, &victims))?
    }

    /// What is asked who may begin although that model cannot.
    pub(super) fn blocked(&self, model: ModelId) -> Blocked<'_> {
        Blocked { switcher: self, model, wanted: OnceCell::new() }
    }

    /// Where a model would go if nobody was held; where it is if it is not on the host.
    fn wanted(&self, model: ModelId) -> Option<Range> {
        if self.spans.get(&model).is_some_and(|span| span.state != SpanState::Host) {
            return granted(self.ledger.home(model)).map(|home| home.span);
        }
        if self.homes == Homes::Fixed || model == ModelId::TRAINING {
            return granted(self.ledger.own_place(model));
        }
        let victims = in_order_of_use(self.spans.iter().filter(|(other, _)| **other != model));
        granted(self.ledger.find_room(model, &victims))?
    }

    /// Whether a model is there, or on its way, that overlaps with this place.
    fn lies_in(&self, model: ModelId, place: Range) -> bool {
        let is_there = self.spans.get(&model).is_some_and(|span| span.state != SpanState::Host);
        is_there && granted(self.ledger.home(model)).is_some_and(|home| home.span.overlaps(&place))
    }

    /// Whether everybody has the place of its own, and keeps it.
    fn has_fixed_homes(&self) -> bool {
        self.homes == Homes::Fixed && self.away.is_empty()
    }

    /// Whether a transfer is to clear the doorbells of the model that is not over, or that failed and is not settled.
    fn is_being_cleared(&self, model: ModelId) -> bool {
        let of_transfers = self.transfers.values().filter_map(|transfer| transfer.weights.as_ref());
        let of_poisoned = self.spans.values().filter_map(|span| match &span.state {
            SpanState::Poisoned { evicted, .. } => Some(evicted),
            SpanState::Host | SpanState::Moving { .. } | SpanState::Resident => None,
        });
        of_transfers.map(|(_, evicted)| evicted).chain(of_poisoned).any(|evicted| evicted.contains(&model))
    }

    /// Gives a model in the host store the place that it moves to.
    pub(super) fn settle_at(&mut self, model: ModelId, place: Range) -> Option<()> {
        if granted(self.ledger.home(model))?.span == place {
            return Some(());
        }
        granted(self.ledger.rehome(model, place.offset))?;
        if granted(self.ledger.own_place(model))? == place {
            self.away.remove(&model);
        } else {
            self.away.insert(model);
        }
        Some(())
    }

    /// Notes that a model is used.
    pub(super) fn note_use(&mut self, model: ModelId) {
        if let Some(span) = self.spans.get_mut(&model) {
            span.last_use = self.next_use;
            self.next_use += 1;
        }
    }

    /// Where homes are fixed (again): gives those their own place back that nobody uses elsewhere. Resident -> Host. Returns
    /// who has left the pool.
    pub(super) fn send_home(&mut self, actions: &mut Vec<Action>) -> Vec<ModelId> {
        if self.homes != Homes::Fixed || self.away.is_empty() {
            return Vec::new();
        }
        let mut dropped = Vec::new();
        for model in self.away.clone() {
            let Some(span) = self.spans.get_mut(&model) else { continue };
            if span.state == SpanState::Resident
                && span.leases == 0
                && is_granted(self.ledger.drop_out(model))
            {
                span.state = SpanState::Host;
                span.evictions += 1;
                dropped.push(model);
            }
            if self.spans.get(&model).is_some_and(|span| span.state == SpanState::Host)
                && !self.is_being_cleared(model)
                && let Some(own) = granted(self.ledger.own_place(model))
            {
                self.settle_at(model, own);
            }
        }
        if !dropped.is_empty() {
            // No transfer does it.
            actions.push(Action::Clear { models: dropped.clone() });
        }
        dropped
    }

    pub(super) fn check_places(&self) -> Result<(), String> {
        for (model, span) in &self.spans {
            let (home, own) = (self.ledger.home(*model), self.ledger.own_place(*model));
            let is_away = home.map(|home| home.span) != own;
            if is_away != self.away.contains(model) {
                return Err(format!("{model} is away: {is_away}, and listed otherwise"));
            }
            let rests = span.state == SpanState::Resident && span.leases == 0;
            if self.homes == Homes::Fixed && is_away && rests {
                return Err(format!("{model} rests in another place than its own, and homes are fixed"));
            }
        }
        let unknown = self.away.iter().find(|model| !self.spans.contains_key(model));
        unknown.map_or(Ok(()), |model| Err(format!("{model} is away and gone")))
    }
}

/// Those used longest ago first.
fn in_order_of_use<'a>(spans: impl Iterator<Item = (&'a ModelId, &'a Span)>) -> Vec<ModelId> {
    let mut spans: Vec<_> = spans.map(|(&model, span)| (span.last_use, model)).collect();
    spans.sort_unstable();
    spans.into_iter().map(|(_, model)| model).collect()
}
