//! Where the states of training tasks are, where that gives way to models: in their places in the pool, or, as far as a
//! model lies there, elsewhere in the pool or in host memory.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pswitch_device::{DeviceError, DeviceMemory, DeviceSlice, HostSlice, PinnedMemory};
use pswitch_mem_pool::{Range, TENSOR_ALIGNMENT_BYTES};
use pswitch_transfer::{BringBack, CopyIn, CopyOut, CopyWithin, TransferId};

use crate::service::Residence;

/// All states that are worth to be kept: those of tasks that have a worker. Shared by the driver, which moves them, and the
/// thread that trains, which uses them only while it has their part of the pool.
#[derive(Debug)]
pub(crate) struct States {
    pool: Arc<dyn DeviceMemory>,
    account: Mutex<Account>,
}

#[derive(Debug, Default)]
struct Account {
    /// By where they begin.
    states: BTreeMap<u64, State>,
    /// What leaves the place where it is by transfers that are not over.
    leaving: BTreeMap<TransferId, Vec<Leaving>>,
    /// The transfer that brings all back.
    returning: Option<TransferId>,
}

/// A part of a state that makes room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Leaving {
    /// Its place.
    part: Range,
    /// Where it was set aside, if it was.
    before: Option<u64>,
}

/// How a transfer makes room.
#[derive(Debug, Default)]
pub(crate) struct MadeRoom {
    pub(crate) save: Vec<CopyOut>,
    pub(crate) set_aside: Vec<CopyWithin>,
}

/// Memory of the pool that nobody uses until all states are back.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Unused {
    pub(crate) range: Range,
    /// To set less aside is no gain.
    pub(crate) least_bytes: u64,
}

#[derive(Debug)]
struct State {
    place: Range,
    /// As long as the place.
    host: PinnedMemory,
    /// Parts that are not in their place, or on their way elsewhere; sorted, no two overlap.
    out: Vec<Out>,
    /// Times that it made room, all of it or a part.
    made_room: u64,
}

/// A part of a state that is not in its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Out {
    part: Range,
    /// Where in the pool it begins; on the host otherwise.
    aside: Option<u64>,
}

impl Out {
    /// Where it lies in the pool.
    fn lies(&self) -> Option<Range> {
        self.aside.map(|offset| Range::new(offset, self.part.bytes))
    }
}

impl States {
    pub(super) fn new(pool: Arc<dyn DeviceMemory>) -> Self {
        Self { pool, account: Mutex::default() }
    }

    /// A worker fills the state of that place, which is there and held.
    pub(super) fn add(&self, place: Range, host: PinnedMemory) {
        let state = State { place, host, out: Vec::new(), made_room: 0 };
        self.account().states.insert(place.offset, state);
    }

    /// Nobody wants the state of that place any more.
    pub(super) fn remove(&self, place: Range) {
        self.account().states.remove(&place.offset);
    }

    /// Where a state is, and how often it made room.
    pub(super) fn view(&self, place: Range) -> (Residence, u64) {
        let account = self.account();
        let Some(state) = account.states.get(&place.offset) else { return (Residence::Resident, 0) };
        let leaves = || account.leaving.values().flatten().any(|it| it.part.overlaps(&place));
        let residence = match state.out.is_empty() {
            true => Residence::Resident,
            false if account.returning.is_some() || leaves() => Residence::Moving,
            false if state.out.iter().any(|out| out.aside.is_none()) => Residence::Host,
            false => Residence::Aside,
        };
        (residence, state.made_room)
    }

    /// What has to make room before a transfer may write to a part of the pool: to what is `unused`, or else to the host.
    pub(crate) fn make_room(
        &self,
        transfer: TransferId,
        part: Range,
        unused: Option<Unused>,
    ) -> Result<MadeRoom, DeviceError> {
        let mut account = self.account();
        let moves = account.make_room(part, unused);
        let mut made = MadeRoom::default();
        for Move { of, from, to } in &moves {
            let state = &account.states[of];
            match to.aside {
                Some(offset) => made.set_aside.push(CopyWithin {
                    from: self.there(*from)?,
                    to: self.there(Range::new(offset, from.bytes))?,
                }),
                None => made.save.push(CopyOut { from: self.there(*from)?, to: state.here(to.part)? }),
            }
        }
        let mut leaving = Vec::new();
        for Move { of, to, .. } in moves {
            let Some(state) = account.states.get_mut(&of) else { continue };
            leaving.push(Leaving { part: to.part, before: state.put(to) });
        }
        for state in account.states.values_mut() {
            state.made_room += u64::from(leaving.iter().any(|it| state.place.contains(&it.part)));
        }
        if !leaving.is_empty() {
            account.leaving.insert(transfer, leaving);
        }
        Ok(made)
    }

    /// All that a transfer has to bring back.
    pub(crate) fn bring_back(
        &self,
        id: TransferId,
        clear: Vec<DeviceSlice>,
    ) -> Result<BringBack, DeviceError> {
        let mut account = self.account();
        let (mut within, mut copies) = (Vec::new(), Vec::new());
        for (state, out) in
            account.states.values().flat_map(|state| state.out.iter().map(move |it| (state, it)))
        {
            let to = self.there(out.part)?;
            match out.lies() {
                Some(aside) => within.push(CopyWithin { from: self.there(aside)?, to }),
                None => copies.push(CopyIn { from: state.here(out.part)?, to }),
            }
        }
        account.returning = Some(id);
        Ok(BringBack { id, clear, within, copies })
    }

    /// A transfer was refused: it has touched nothing.
    pub(crate) fn refused(&self, transfer: TransferId) {
        let mut account = self.account();
        account.returning.take_if(|returning| *returning == transfer);
        let stayed = account.leaving.remove(&transfer).unwrap_or_default();
        for state in account.states.values_mut() {
            let its = || stayed.iter().filter(|it| state.place.contains(&it.part));
            state.made_room -= u64::from(its().next().is_some());
            for Leaving { part, before } in its() {
                state.out.retain(|out| out.part != *part);
                state.out.extend(before.map(|offset| Out { part: *part, aside: Some(offset) }));
            }
            state.out.sort_by_key(|out| out.part.offset);
        }
    }

    /// A transfer has landed; returns whether it moved a state.
    pub(crate) fn landed(&self, transfer: TransferId) -> bool {
        let mut account = self.account();
        let returned = account.returning.take_if(|returning| *returning == transfer).is_some();
        if returned {
            account.states.values_mut().for_each(|state| state.out.clear());
        }
        account.leaving.remove(&transfer).is_some() || returned
    }

    /// A transfer failed on its way. What was to make room for it may be lost, and is forgotten: the places are returned. What
    /// it was to bring back is where it was still.
    pub(crate) fn failed(&self, transfer: TransferId) -> Vec<Range> {
        let mut account = self.account();
        account.returning.take_if(|returning| *returning == transfer);
        let lost = account.leaving.remove(&transfer).unwrap_or_default();
        let is_lost = |state: &State| lost.iter().any(|it| it.part.overlaps(&state.place));
        let places: Vec<Range> =
            account.states.values().filter(|state| is_lost(state)).map(|state| state.place).collect();
        account.states.retain(|_, state| !is_lost(state));
        places
    }

    fn there(&self, range: Range) -> Result<DeviceSlice, DeviceError> {
        DeviceSlice::new(Arc::clone(&self.pool), range.offset, range.bytes)
    }

    fn account(&self) -> MutexGuard<'_, Account> {
        // Whoever panicked has at worst saved something twice.
        self.account.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A part of a state that goes elsewhere.
#[derive(Debug, Clone, Copy)]
struct Move {
    /// Where its state begins.
    of: u64,
    /// Where it lies.
    from: Range,
    to: Out,
}

impl Account {
    /// What lies in a part of the pool, and where it goes.
    fn make_room(&self, part: Range, unused: Option<Unused>) -> Vec<Move> {
        let to_the_host = |state: &State, from: Range, of: Range| Move {
            of: state.place.offset,
            from,
            to: Out { part: of, aside: None },
        };
        let states = || self.states.values();
        let mut moves: Vec<Move> = states()
            .flat_map(|state| state.there(part).into_iter().map(move |it| to_the_host(state, it, it)))
            .collect();
        let asides = states().flat_map(|state| &state.out).filter_map(Out::lies);
        let taken = states().map(|state| state.place).chain(asides).chain([part]);
        let bytes: u64 = moves.iter().map(|it| it.from.bytes).sum();
        let padded = |it: &Move| it.from.bytes.next_multiple_of(TENSOR_ALIGNMENT_BYTES);
        let needed_bytes: u64 = moves.iter().map(padded).sum();
        let unused = unused.filter(|unused| bytes >= unused.least_bytes);
        let gap = unused.map(|unused| longest_gap(unused.range, taken));
        if let Some(gap) = gap.filter(|gap| gap.bytes >= needed_bytes) {
            let mut offset = gap.offset;
            for it in &mut moves {
                it.to.aside = Some(offset);
                offset += padded(it);
            }
        }
        // What was set aside where others come goes to the host.
        let asides = states().flat_map(|state| state.out.iter().map(move |out| (state, out)));
        moves.extend(asides.filter_map(|(state, out)| {
            let from = out.lies().filter(|lies| lies.overlaps(&part))?;
            Some(to_the_host(state, from, out.part))
        }));
        moves
    }
}

impl State {
    /// Where a part of it lies on the host.
    fn here(&self, part: Range) -> Result<HostSlice, DeviceError> {
        HostSlice::new(self.host.clone(), part.offset - self.place.offset, part.bytes)
    }

    /// Notes that a part is elsewhere from now on; returns where it was set aside before.
    fn put(&mut self, out: Out) -> Option<u64> {
        let before = self.out.iter().position(|known| known.part == out.part);
        let before = before.and_then(|index| self.out.remove(index).aside);
        self.out.push(out);
        self.out.sort_by_key(|out| out.part.offset);
        before
    }

    /// What of the state lies in a part of the pool and in its place.
    fn there(&self, part: Range) -> Vec<Range> {
        let (mut from, end) = (self.place.offset.max(part.offset), self.place.end().min(part.end()));
        let mut there = Vec::new();
        let gaps = self.out.iter().map(|out| (out.part.offset, out.part.end())).chain([(end, end)]);
        for (begin, behind) in gaps {
            let until = begin.min(end);
            if until > from {
                there.push(Range::new(from, until - from));
            }
            from = from.max(behind);
        }
        there
    }
}

/// The longest part of a range where none of some others lies, from a whole tensor's place on.
fn longest_gap(whole: Range, taken: impl Iterator<Item = Range>) -> Range {
    let mut taken: Vec<Range> = taken.filter(|range| range.bytes > 0).collect();
    taken.sort_by_key(|range| range.offset);
    let mut from = whole.offset;
    let mut longest = Range::new(whole.offset, 0);
    let ends = taken.iter().map(|range| (range.offset, range.end())).chain([(whole.end(), whole.end())]);
    for (begin, behind) in ends {
        let at = from.next_multiple_of(TENSOR_ALIGNMENT_BYTES);
        let bytes = begin.min(whole.end()).saturating_sub(at);
        if bytes > longest.bytes {
            longest = Range::new(at, bytes);
        }
        from = from.max(behind);
    }
    longest
}

#[cfg(test)]
mod tests;
