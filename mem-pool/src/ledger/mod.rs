mod placement;
mod report;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::ledger::placement::{in_place_of_the_first, least_overlap};
use crate::range::{align_down, align_up};
use crate::{ArenaId, FreeList, ModelId, PoolError, PoolLayout, Range, TENSOR_ALIGNMENT_BYTES};

pub use report::{ArenaReport, LedgerReport, ModelReport};

/// The place of a model in a pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Home {
    /// Where its span lies.
    pub span: Range,
    /// Its doorbells: words of [`Home::DOORBELL_BYTES`], one a group.
    pub doorbells: Range,
}

impl Home {
    /// The size of a doorbell.
    pub const DOORBELL_BYTES: u64 = 4;
}

/// Where a model's span is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Residency {
    /// Only in the host store.
    Host,
    /// On its way into its home.
    Moving,
    /// In its home.
    Resident,
}

impl Residency {
    const fn name(self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::Moving => "moving",
            Self::Resident => "resident",
        }
    }
}

impl fmt::Display for Residency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// The right of one execution to a model's span and to an arena. It goes back by [`Ledger::release`]; one that is
/// dropped holds both for ever.
#[must_use = "a lease must be released, or its span and arena stay held"]
#[derive(Debug, PartialEq, Eq)]
pub struct Lease {
    serial: u64,
    model: ModelId,
    arena: ArenaId,
}

impl Lease {
    /// The model that may be executed.
    pub fn model(&self) -> ModelId {
        self.model
    }

    /// Where its activations may lie.
    pub fn arena(&self) -> ArenaId {
        self.arena
    }
}

/// The account of every byte of a pool: which model is where, and who holds a lease on it.
///
/// A pure state machine: it touches no memory and knows no time. A model moves through
///
/// ```text
/// Host --begin_move--> Moving --finish_move--> Resident
///  ^                     |                        |
///  +------fail_move------+-------- evicted by another model's begin_move, or dropped
/// ```
///
/// A model keeps the home that it is given first, unless it is [given another](Self::rehome), which can be in `Host` alone.
/// Models whose homes overlap are never both out of `Host`, and a model that is moving or leased is never evicted.
/// Every error leaves the ledger as it was.
#[derive(Debug)]
pub struct Ledger {
    homes: Range,
    doorbells: Range,
    free_doorbells: FreeList,
    models: BTreeMap<ModelId, Account>,
    /// One for each arena: who holds it.
    arenas: Vec<Arena>,
    next_serial: u64,
}

#[derive(Debug)]
struct Account {
    home: Home,
    /// Where its span was placed first.
    own: Range,
    state: Residency,
    leases: usize,
    /// Kept in its place by somebody who needs no arena.
    held: bool,
}

impl Account {
    fn holders(&self) -> usize {
        self.leases + usize::from(self.held)
    }
}

/// A span's place, counted from the begin of the homes and rounded up to whole tensors.
fn within(homes: Range, span: Range) -> Range {
    Range::new(span.offset - homes.offset, span.bytes.next_multiple_of(TENSOR_ALIGNMENT_BYTES))
}

#[derive(Debug)]
struct Arena {
    range: Range,
    held: Option<Held>,
}

#[derive(Debug)]
struct Held {
    serial: u64,
    model: ModelId,
}

impl Ledger {
    /// An account of a pool that holds nothing yet. Training that gives way has its place, which it need not be brought to.
    pub fn new(layout: &PoolLayout) -> Self {
        let arena = |&range: &Range| Arena { range, held: None };
        let mut models = BTreeMap::new();
        if layout.training_gives_way() {
            let home = Home { span: layout.training, doorbells: Range::new(layout.doorbells.offset, 0) };
            let (own, state) = (home.span, Residency::Resident);
            let training = Account { home, own, state, leases: 0, held: false };
            models.insert(ModelId::TRAINING, training);
        }
        Self {
            homes: layout.homes,
            doorbells: layout.doorbells,
            free_doorbells: FreeList::new(layout.doorbells.bytes),
            models,
            arenas: layout.arenas.iter().map(arena).collect(),
            next_serial: 0,
        }
    }

    /// Gives a model a home of its own: where its span overlaps least with those that others were given so. Without any
    /// overlap if a gap is long enough, which is so while everything fits and nothing was removed. Its doorbells are
    /// its own, for good.
    ///
    /// # Errors
    /// [`PoolError::NeverFits`] if the span is longer than all homes together or there are fewer doorbells in all,
    /// [`PoolError::NoDoorbells`], [`PoolError::ModelExists`].
    pub fn place(&mut self, model: ModelId, span_bytes: u64, doorbells: u32) -> Result<Home, PoolError> {
        if self.models.contains_key(&model) {
            return Err(PoolError::ModelExists { model });
        }
        let rounded = align_up(span_bytes, TENSOR_ALIGNMENT_BYTES).unwrap_or(u64::MAX);
        let taken: Vec<Range> = self.models.values().map(|account| within(self.homes, account.own)).collect();
        let capacity_bytes = align_down(self.homes.bytes, TENSOR_ALIGNMENT_BYTES);
        let Some(offset) = least_overlap(capacity_bytes, rounded, &taken) else {
            return Err(PoolError::NeverFits {
                what: format!("the span of {model}"),
                asked_bytes: span_bytes,
                capacity_bytes,
                advice: "make the pool larger, or the arenas smaller or fewer",
            });
        };
        let span = Range::new(self.homes.offset + offset, span_bytes);
        let doorbells = self.allocate_doorbells(model, doorbells)?;
        let home = Home { span, doorbells };
        let account = Account { home, own: span, state: Residency::Host, leases: 0, held: false };
        self.models.insert(model, account);
        Ok(home)
    }

    fn allocate_doorbells(&mut self, model: ModelId, words: u32) -> Result<Range, PoolError> {
        if words == 0 {
            return Ok(Range::new(self.doorbells.offset, 0));
        }
        let bytes = u64::from(words) * Home::DOORBELL_BYTES;
        if bytes > self.doorbells.bytes {
            return Err(PoolError::NeverFits {
                what: format!("{model} with {words} doorbells"),
                asked_bytes: bytes,
                capacity_bytes: self.doorbells.bytes,
                advice: "cut its plan into fewer groups or make the pool larger",
            });
        }
        let range = self.free_doorbells.allocate(bytes, Home::DOORBELL_BYTES).map_err(|_| {
            let free = self.doorbells.bytes - self.free_doorbells.in_use_bytes();
            PoolError::NoDoorbells {
                model,
                asked: words.into(),
                free: free / Home::DOORBELL_BYTES,
                capacity: self.doorbells.bytes / Home::DOORBELL_BYTES,
            }
        })?;
        Ok(Range::new(self.doorbells.offset + range.offset, range.bytes))
    }

    /// Forgets a model; its home and doorbells are free for others.
    ///
    /// # Errors
    /// [`PoolError::Leased`], [`PoolError::WrongState`] while it is moving, [`PoolError::UnknownModel`].
    pub fn remove(&mut self, model: ModelId) -> Result<(), PoolError> {
        let account = self.account(model)?;
        if account.holders() > 0 {
            return Err(PoolError::Leased { model, leases: account.holders(), action: "remove it" });
        }
        if account.state == Residency::Moving {
            let needed = "host or resident";
            return Err(PoolError::WrongState { model, action: "be removed", found: account.state, needed });
        }
        let doorbells = account.home.doorbells;
        if doorbells.bytes > 0 {
            self.free_doorbells.free(doorbells.offset - self.doorbells.offset)?;
        }
        self.models.remove(&model);
        Ok(())
    }

    /// The model's home.
    ///
    /// # Errors
    /// [`PoolError::UnknownModel`].
    pub fn home(&self, model: ModelId) -> Result<Home, PoolError> {
        Ok(self.account(model)?.home)
    }

    /// The place of the span that the model was given first.
    ///
    /// # Errors
    /// [`PoolError::UnknownModel`].
    pub fn own_place(&self, model: ModelId) -> Result<Range, PoolError> {
        Ok(self.account(model)?.own)
    }

    /// Where the model's span could lie if the `victims` were evicted in this order until there is a gap that is long
    /// enough: the lowest such place. Not all that come before the last one need lie there. Others that are in the pool stay.
    /// Nothing is changed, and nobody asks whether the victims may go.
    ///
    /// # Errors
    /// [`PoolError::UnknownModel`], for victims as well.
    pub fn find_room(&self, model: ModelId, victims: &[ModelId]) -> Result<Option<Range>, PoolError> {
        let span = self.account(model)?.home.span;
        let in_pool = |account: &&Account| account.state != Residency::Host;
        let place = |account: &Account| within(self.homes, account.home.span);
        let may_go: BTreeSet<&ModelId> = victims.iter().collect();
        let others = self.models.iter().filter(|(id, _)| **id != model && !may_go.contains(id));
        let stay: Vec<Range> = others.map(|(_, account)| account).filter(in_pool).map(place).collect();
        let victims: Vec<&Account> = victims.iter().map(|id| self.account(*id)).collect::<Result<_, _>>()?;
        let victims: Vec<Range> = victims.into_iter().filter(in_pool).map(place).collect();
        let capacity_bytes = align_down(self.homes.bytes, TENSOR_ALIGNMENT_BYTES);
        let bytes = span.bytes.next_multiple_of(TENSOR_ALIGNMENT_BYTES);
        let offset = in_place_of_the_first(capacity_bytes, bytes, &stay, &victims);
        Ok(offset.map(|offset| Range::new(self.homes.offset + offset, span.bytes)))
    }

    /// Gives a model in `Host` another place for its span, at that offset of the pool. Its doorbells stay where they are.
    ///
    /// # Errors
    /// [`PoolError::OutOfRange`] outside of the homes, [`PoolError::Misaligned`], [`PoolError::FixedPlace`] for training,
    /// [`PoolError::WrongState`], [`PoolError::UnknownModel`].
    pub fn rehome(&mut self, model: ModelId, offset: u64) -> Result<(), PoolError> {
        self.expect_state(model, Residency::Host, "be given another place")?;
        if model == ModelId::TRAINING {
            return Err(PoolError::FixedPlace { model });
        }
        let homes = self.homes;
        let bytes = self.account(model)?.home.span.bytes;
        let span = Range::new(offset, bytes);
        if !homes.contains(&span) {
            let what = "the homes".to_owned();
            return Err(PoolError::OutOfRange { what, offset, bytes, capacity_bytes: homes.bytes });
        }
        if !(offset - homes.offset).is_multiple_of(TENSOR_ALIGNMENT_BYTES) {
            return Err(PoolError::Misaligned { at: offset, alignment: TENSOR_ALIGNMENT_BYTES });
        }
        self.account_mut(model)?.home.span = span;
        Ok(())
    }

    /// Where the model's span is.
    ///
    /// # Errors
    /// [`PoolError::UnknownModel`].
    pub fn state(&self, model: ModelId) -> Result<Residency, PoolError> {
        Ok(self.account(model)?.state)
    }

    /// How many hold the model: executions, and who keeps it in its place.
    ///
    /// # Errors
    /// [`PoolError::UnknownModel`].
    pub fn leases(&self, model: ModelId) -> Result<usize, PoolError> {
        Ok(self.account(model)?.holders())
    }

    /// Keeps what is resident in its place until [`let_go`](Self::let_go), without an arena: training, while it computes.
    ///
    /// # Errors
    /// [`PoolError::Leased`] if it is held already, [`PoolError::WrongState`], [`PoolError::UnknownModel`].
    pub fn hold(&mut self, model: ModelId) -> Result<(), PoolError> {
        self.expect_state(model, Residency::Resident, "be held")?;
        let account = self.account_mut(model)?;
        if account.held {
            return Err(PoolError::Leased { model, leases: account.holders(), action: "hold it" });
        }
        account.held = true;
        Ok(())
    }

    /// Lets what was held be evicted again.
    ///
    /// # Errors
    /// [`PoolError::NotHeld`], [`PoolError::UnknownModel`].
    pub fn let_go(&mut self, model: ModelId) -> Result<(), PoolError> {
        let account = self.account_mut(model)?;
        if std::mem::take(&mut account.held) { Ok(()) } else { Err(PoolError::NotHeld { model }) }
    }

    /// Host -> Moving. Evicts what overlaps with the model's home (Resident -> Host) and returns it, in order.
    ///
    /// # Errors
    /// [`PoolError::PlaceHeld`] if something in its place is leased or moving, [`PoolError::WrongState`],
    /// [`PoolError::UnknownModel`].
    pub fn begin_move(&mut self, model: ModelId) -> Result<Vec<ModelId>, PoolError> {
        self.expect_state(model, Residency::Host, "begin to move")?;
        let place = self.account(model)?.home.span;
        let in_place: Vec<ModelId> = self
            .models
            .iter()
            .filter(|(_, other)| other.state != Residency::Host && other.home.span.overlaps(&place))
            .map(|(&id, _)| id)
            .collect();
        let held_by: Vec<ModelId> = in_place.iter().copied().filter(|id| self.is_held(*id)).collect();
        if !held_by.is_empty() {
            return Err(PoolError::PlaceHeld { model, asked_bytes: place.bytes, held_by });
        }
        for evicted in &in_place {
            self.set_state(*evicted, Residency::Host);
        }
        self.set_state(model, Residency::Moving);
        Ok(in_place)
    }

    /// Resident -> Host, for nobody who comes in its place.
    ///
    /// # Errors
    /// [`PoolError::Leased`], [`PoolError::WrongState`], [`PoolError::UnknownModel`].
    pub fn drop_out(&mut self, model: ModelId) -> Result<(), PoolError> {
        self.expect_state(model, Residency::Resident, "be dropped")?;
        let leases = self.account(model)?.holders();
        if leases > 0 {
            return Err(PoolError::Leased { model, leases, action: "drop it" });
        }
        self.set_state(model, Residency::Host);
        Ok(())
    }

    /// Moving -> Resident: all of the span has landed.
    ///
    /// # Errors
    /// [`PoolError::WrongState`], [`PoolError::UnknownModel`].
    pub fn finish_move(&mut self, model: ModelId) -> Result<(), PoolError> {
        self.expect_state(model, Residency::Moving, "have landed")?;
        self.set_state(model, Residency::Resident);
        Ok(())
    }

    /// Moving -> Host: the transfer has failed or was given up.
    ///
    /// # Errors
    /// [`PoolError::Leased`] while an execution waits for it, [`PoolError::WrongState`], [`PoolError::UnknownModel`].
    pub fn fail_move(&mut self, model: ModelId) -> Result<(), PoolError> {
        self.expect_state(model, Residency::Moving, "fail to land")?;
        let leases = self.account(model)?.leases;
        if leases > 0 {
            return Err(PoolError::Leased { model, leases, action: "give its transfer up" });
        }
        self.set_state(model, Residency::Host);
        Ok(())
    }

    /// Gives one execution the right to a span that is moving or resident and to a free arena.
    ///
    /// # Errors
    /// [`PoolError::WrongState`], [`PoolError::ArenaBusy`], [`PoolError::UnknownArena`], [`PoolError::UnknownModel`].
    pub fn lease(&mut self, model: ModelId, arena: ArenaId) -> Result<Lease, PoolError> {
        let found = self.state(model)?;
        if found == Residency::Host {
            let needed = "moving or resident";
            return Err(PoolError::WrongState { model, action: "be leased", found, needed });
        }
        let serial = self.next_serial;
        let held = &mut self.arena_mut(arena)?.held;
        if let Some(holder) = held {
            return Err(PoolError::ArenaBusy { arena, held_by: holder.model });
        }
        *held = Some(Held { serial, model });
        self.next_serial += 1;
        self.account_mut(model)?.leases += 1;
        Ok(Lease { serial, model, arena })
    }

    /// Takes a lease back.
    ///
    /// # Errors
    /// [`PoolError::UnknownLease`] if it comes from another ledger.
    pub fn release(&mut self, lease: Lease) -> Result<(), PoolError> {
        let Lease { serial, model, arena } = lease;
        let unknown = PoolError::UnknownLease { model, arena };
        let held = &mut self.arena_mut(arena).map_err(|_| unknown.clone())?.held;
        match held {
            Some(holder) if holder.serial == serial && holder.model == model => *held = None,
            _ => return Err(unknown),
        }
        self.account_mut(model)?.leases -= 1;
        Ok(())
    }

    /// The first arena that nobody holds.
    pub fn free_arena(&self) -> Option<ArenaId> {
        (0..).zip(&self.arenas).find(|(_, arena)| arena.held.is_none()).map(|(index, _)| ArenaId(index))
    }

    /// Whether nobody holds the arena. One that does not exist is not free.
    pub fn is_arena_free(&self, arena: ArenaId) -> bool {
        self.arenas.get(arena.0 as usize).is_some_and(|arena| arena.held.is_none())
    }

    /// How many arenas there are, held or not.
    pub fn arenas(&self) -> usize {
        self.arenas.len()
    }

    /// Whether the model may not be evicted.
    fn is_held(&self, model: ModelId) -> bool {
        self.models.get(&model).is_some_and(|it| it.holders() > 0 || it.state == Residency::Moving)
    }

    fn account(&self, model: ModelId) -> Result<&Account, PoolError> {
        self.models.get(&model).ok_or(PoolError::UnknownModel { model })
    }

    fn account_mut(&mut self, model: ModelId) -> Result<&mut Account, PoolError> {
        self.models.get_mut(&model).ok_or(PoolError::UnknownModel { model })
    }

    fn arena_mut(&mut self, arena: ArenaId) -> Result<&mut Arena, PoolError> {
        let arenas = self.arenas.len();
        self.arenas.get_mut(arena.0 as usize).ok_or(PoolError::UnknownArena { arena, arenas })
    }

    fn set_state(&mut self, model: ModelId, state: Residency) {
        if let Some(account) = self.models.get_mut(&model) {
            account.state = state;
        }
    }

    fn expect_state(&self, model: ModelId, needed: Residency, action: &'static str) -> Result<(), PoolError> {
        let found = self.account(model)?.state;
        if found == needed {
            return Ok(());
        }
        Err(PoolError::WrongState { model, action, found, needed: needed.name() })
    }
}
