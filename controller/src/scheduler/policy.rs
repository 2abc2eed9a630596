//! Which model is served next, and which is fetched ahead of its turn.

use std::time::Instant;

use pswitch_mem_pool::{ModelId, Range};

use super::Scheduler;
use super::heads::Head;

/// So many of the oldest are looked at for one to prefetch.
const PREFETCH_CANDIDATES: usize = 8;

/// Whose turn it is.
#[derive(Debug, Default)]
pub(super) struct Turn {
    /// The model that was served last.
    model: Option<ModelId>,
    /// Requests of it that were served in a row while others waited.
    served: u32,
    /// Requests in a row that were served while an older one waited.
    passed_over: u32,
}

impl Scheduler {
    /// The model whose oldest request begins now, if any can.
    pub(super) fn pick(&self, now: Instant) -> Option<ModelId> {
        let first = self.preferred(now, |_| true)?.model;
        if self.can_begin(first) {
            return Some(first);
        }
        // Nothing new begins in the place of the first.
        let blocked = self.switcher.blocked(first);
        let allowed = |head: &Head| {
            head.model != first && !blocked.is_in_the_way(head.model) && self.can_begin(head.model)
        };
        self.preferred(now, allowed).map(|head| head.model)
    }

    /// The head to be served first among those that are allowed, whether there is room for it or not.
    fn preferred(&self, now: Instant, allowed: impl Fn(&Head) -> bool) -> Option<Head> {
        let oldest = self.heads.oldest(&allowed)?;
        // Overdue ones go before all others. Who came earlier has waited longer: if any is overdue, the oldest is.
        let overdue_only = self.is_overdue(&oldest, now);
        let fits = |head: &Head| allowed(head) && (!overdue_only || self.is_overdue(head, now));
        let current = self.turn.model.filter(|_| self.turn.served < self.options.max_consecutive);
        let ended = self.turn.model.filter(|model| Some(*model) != current);
        let others = |head: &Head| Some(head.model) != ended;
        // Whose turn has ended comes last, which is first if nobody else is there.
        let Some(oldest) = self.heads.oldest(|head| others(head) && fits(head)) else { return Some(oldest) };
        if self.turn.passed_over >= self.options.max_consecutive {
            return Some(oldest);
        }
        let current = current.and_then(|model| self.heads.get(model));
        let current = current.filter(|head| head.present && fits(head));
        let present = || self.heads.present().find(|head| others(head) && fits(head));
        current.or_else(present).or(Some(oldest))
    }

    fn is_overdue(&self, head: &Head, now: Instant) -> bool {
        let request = self.models.get(&head.model).and_then(|model| model.queue.get(&head.sequence));
        let submitted = request.and_then(|request| self.requests.get(request)).map(|it| it.submitted);
        submitted.is_some_and(|at| now.saturating_duration_since(at) > self.options.max_wait)
    }

    fn can_begin(&self, model: ModelId) -> bool {
        self.switcher.is_present(model) || self.switcher.room(model, |_| false).is_some()
    }

    /// Keeps count of turns, when the request at that place in the order of all has been taken from its queue.
    pub(super) fn take_turn(&mut self, model: ModelId, sequence: u64) {
        let others_wait = self.heads.len() > usize::from(self.heads.get(model).is_some());
        let older_waits =
            self.heads.oldest(|head| head.model != model).is_some_and(|head| head.sequence < sequence);
        let served = if self.turn.model == Some(model) { self.turn.served } else { 0 };
        self.turn = Turn {
            model: Some(model),
            served: if others_wait { served.saturating_add(1) } else { 0 },
            passed_over: if older_waits { self.turn.passed_over.saturating_add(1) } else { 0 },
        };
    }

    /// The model whose weights should move although none of its requests can begin, and where to: the oldest whose place is
    /// neither held nor wanted by requests that wait, and not in the way of the oldest of all. One at a time: what is urgent
    /// would queue behind them on the link.
    pub(super) fn pick_prefetch(&self) -> Option<(ModelId, Range)> {
        if !self.options.prefetch || self.switcher.is_loading() {
            return None;
        }
        let first = self.heads.absent().next()?.model;
        let wanted = |other: ModelId| self.models.get(&other).is_some_and(|model| !model.queue.is_empty());
        // Its turn is for training alone, which would have to drive it out again.
        let training = self.switcher.blocked(ModelId::TRAINING);
        let in_its_way = |model| self.held && training.is_in_the_way(model);
        let blocked = self.switcher.blocked(first);
        let fetchable = |head: &Head| {
            !in_its_way(head.model)
                && !blocked.is_in_the_way(head.model)
                && self.models.get(&head.model).is_some_and(|model| !model.prefetch_failed)
        };
        let mut candidates = self.heads.absent().take(PREFETCH_CANDIDATES).filter(fetchable);
        candidates.find_map(|head| Some((head.model, self.switcher.room(head.model, wanted)?)))
    }

    /// Lists the head of a model whose queue or presence has changed.
    pub(super) fn relist(&mut self, model: ModelId) {
        let head = self.head(model);
        self.heads.set(model, head);
    }

    pub(super) fn head(&self, model: ModelId) -> Option<Head> {
        let (&sequence, _) = self.models.get(&model)?.queue.first_key_value()?;
        Some(Head { model, sequence, present: self.switcher.is_present(model) })
    }
}
