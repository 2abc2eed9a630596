//! Which model is served next, and which is fetched ahead of its turn.

use std::time::Instant;

use pswitch_mem_pool::ModelId;

use super::Scheduler;

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

/// A model with requests that wait, as the policy sees it.
#[derive(Debug, Clone, Copy)]
struct Candidate {
    model: ModelId,
    /// Place of its oldest request in the order of all.
    sequence: u64,
    /// Whether that has waited for too long.
    overdue: bool,
    present: bool,
}

impl Scheduler {
    /// The model whose oldest request begins now, if any can.
    pub(super) fn pick(&self, now: Instant) -> Option<ModelId> {
        let first = self.preferred(now, |_| true)?.model;
        if self.can_begin(first) {
            return Some(first);
        }
        // Nothing new begins in the place of the first.
        let allowed =
            |model: ModelId| model != first && !self.switcher.overlap(first, model) && self.can_begin(model);
        self.preferred(now, allowed).map(|candidate| candidate.model)
    }

    /// The model to be served first among those that are allowed, whether there is room for it or not.
    fn preferred(&self, now: Instant, allowed: impl Fn(ModelId) -> bool) -> Option<Candidate> {
        let others_wait = self.others_wait();
        let exhausted = |candidate: &Candidate| {
            others_wait
                && Some(candidate.model) == self.turn.model
                && self.turn.served >= self.options.max_consecutive
        };
        let oldest_first = self.turn.passed_over >= self.options.max_consecutive;
        // The smallest key wins: overdue requests before others; then whose turn is over comes last; then, unless it is
        // the oldest's turn, the model that was served last, and those that are present; then the oldest.
        let key = |candidate: &Candidate| {
            let current = !oldest_first && Some(candidate.model) == self.turn.model && candidate.present;
            let present = !oldest_first && candidate.present;
            (!candidate.overdue, exhausted(candidate), !current, !present, candidate.sequence)
        };
        self.candidates(now).filter(|candidate| allowed(candidate.model)).min_by_key(key)
    }

    /// All models with requests that wait, but for those whose failed transfer is not settled.
    fn candidates(&self, now: Instant) -> impl Iterator<Item = Candidate> {
        self.waiting_models.iter().filter_map(move |model| {
            let (sequence, request) = self.models.get(model)?.queue.first_key_value()?;
            let waited = now.saturating_duration_since(self.requests.get(request)?.submitted);
            let overdue = waited > self.options.max_wait;
            let present = self.switcher.is_present(*model);
            let candidate = Candidate { model: *model, sequence: *sequence, overdue, present };
            self.switcher.failure(*model).is_none().then_some(candidate)
        })
    }

    fn can_begin(&self, model: ModelId) -> bool {
        self.switcher.is_present(model) || self.switcher.has_room(model, |_| false)
    }

    /// Whether models other than the one that was served last have requests that wait.
    fn others_wait(&self) -> bool {
        let current = self.turn.model.filter(|model| self.waiting_models.contains(model));
        self.waiting_models.len() > usize::from(current.is_some())
    }

    /// Keeps count of turns; `sequence` is the place of the request that begins.
    pub(super) fn take_turn(&mut self, model: ModelId, sequence: u64) {
        let oldest =
            |model: &ModelId| self.models.get(model)?.queue.first_key_value().map(|(first, _)| *first);
        let others = || self.waiting_models.iter().filter(|other| **other != model);
        let older_waits = others().filter_map(oldest).any(|other| other < sequence);
        let others_wait = others().next().is_some();
        let served = if self.turn.model == Some(model) { self.turn.served } else { 0 };
        self.turn = Turn {
            model: Some(model),
            served: if others_wait { served.saturating_add(1) } else { 0 },
            passed_over: if older_waits { self.turn.passed_over.saturating_add(1) } else { 0 },
        };
    }

    /// The model whose weights should move although none of its requests can begin: the oldest whose place is neither
    /// held nor wanted by requests that wait, and not in the way of an older one. One at a time: what is urgent would
    /// queue behind them on the link.
    pub(super) fn pick_prefetch(&self, now: Instant) -> Option<ModelId> {
        if self.waiting == 0 || self.switcher.is_loading() {
            return None;
        }
        let absent = || self.candidates(now).filter(|candidate| !candidate.present);
        let first = absent().min_by_key(|candidate| candidate.sequence)?.model;
        let wanted = |other: ModelId| self.waiting_models.contains(&other);
        let fetchable = |candidate: &Candidate| {
            !self.switcher.overlap(first, candidate.model)
                && self.models.get(&candidate.model).is_some_and(|model| !model.prefetch_failed)
                && self.switcher.has_room(candidate.model, wanted)
        };
        absent().filter(fetchable).min_by_key(|candidate| candidate.sequence).map(|candidate| candidate.model)
    }
}
