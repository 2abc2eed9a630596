use std::collections::BTreeMap;

use pswitch_mem_pool::ModelId;

/// A model with requests that wait, at the oldest of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Head {
    pub(super) model: ModelId,
    /// Place of the request in the order of all.
    pub(super) sequence: u64,
    /// Whether the model's weights are in the pool or on their way.
    pub(super) present: bool,
}

/// The heads of all models with requests that wait, the oldest first.
#[derive(Debug, Default)]
pub(super) struct Heads {
    present: BTreeMap<u64, ModelId>,
    absent: BTreeMap<u64, ModelId>,
    listed: BTreeMap<ModelId, Head>,
}

impl Heads {
    /// Lists a model anew, or no more.
    pub(super) fn set(&mut self, model: ModelId, head: Option<Head>) {
        if self.get(model) == head {
            return;
        }
        if let Some(old) = self.listed.remove(&model) {
            self.list_mut(old.present).remove(&old.sequence);
        }
        if let Some(new) = head {
            self.list_mut(new.present).insert(new.sequence, model);
            self.listed.insert(model, new);
        }
    }

    fn list_mut(&mut self, present: bool) -> &mut BTreeMap<u64, ModelId> {
        if present { &mut self.present } else { &mut self.absent }
    }

    pub(super) fn get(&self, model: ModelId) -> Option<Head> {
        self.listed.get(&model).copied()
    }

    pub(super) fn present(&self) -> impl Iterator<Item = Head> {
        self.present.iter().map(|(&sequence, &model)| Head { model, sequence, present: true })
    }

    pub(super) fn absent(&self) -> impl Iterator<Item = Head> {
        self.absent.iter().map(|(&sequence, &model)| Head { model, sequence, present: false })
    }

    /// The oldest that fits. Looks at no more than it must.
    pub(super) fn oldest(&self, fits: impl Fn(&Head) -> bool) -> Option<Head> {
        let (present, absent) = (self.present().find(&fits), self.absent().find(&fits));
        present.into_iter().chain(absent).min_by_key(|head| head.sequence)
    }

    pub(super) fn len(&self) -> usize {
        self.listed.len()
    }
}
