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
            for Leaving { part, before } in stayed.iter().filter(|it| state.place.contains(&it.part)) {
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
mod tests {
    use proptest::prelude::*;
    use std::sync::mpsc;

    use pswitch_device::{Device, DeviceId, LinkThrottle, SharedMemory, open_device};
    use pswitch_transfer::{Engine, GroupCopy, Transfer};

    use super::*;

    const POOL_BYTES: u64 = 64;

    struct Rig {
        device: Arc<dyn Device>,
        states: States,
    }

    impl Rig {
        fn new() -> Self {
            let device = open_device(DeviceId::Host(0), LinkThrottle::default()).unwrap();
            let states = States::new(device.allocate(POOL_BYTES).unwrap());
            Self { device, states }
        }

        fn add(&self, place: Range) {
            let memory = SharedMemory::create("state", place.bytes).unwrap();
            self.states.add(place, self.device.pin(Arc::new(memory)).unwrap());
        }

        /// What is to be saved, as ranges of the pool.
        fn make_room(&self, transfer: u64, part: Range) -> Vec<Range> {
            let made = self.states.make_room(TransferId(transfer), part, None).unwrap();
            assert!(made.set_aside.is_empty());
            made.save.iter().map(|copy| Range::new(copy.from.offset(), copy.from.bytes())).collect()
        }

        fn bring_back(&self, transfer: u64) -> Vec<Range> {
            let back = self.states.bring_back(TransferId(transfer), vec![]).unwrap();
            back.copies.iter().map(|copy| Range::new(copy.to.offset(), copy.to.bytes())).collect()
        }
    }

    #[test]
    fn a_part_is_saved_once_and_comes_back_with_the_rest() {
        let rig = Rig::new();
        let place = Range::new(8, 32);
        rig.add(place);
        assert_eq!(rig.states.view(place), (Residence::Resident, 0));
        assert_eq!(rig.make_room(1, Range::new(0, 8)), []);
        assert_eq!(rig.states.view(place), (Residence::Resident, 0));
        assert_eq!(rig.make_room(2, Range::new(16, 8)), [Range::new(16, 8)]);
        assert_eq!(rig.states.view(place), (Residence::Moving, 1));
        assert!(rig.states.landed(TransferId(2)) && !rig.states.landed(TransferId(1)));
        assert_eq!(rig.states.view(place), (Residence::Host, 1));
        assert_eq!(rig.make_room(3, Range::new(12, 64)), [Range::new(12, 4), Range::new(24, 16)]);
        assert!(rig.states.landed(TransferId(3)));
        let parts = [Range::new(12, 4), Range::new(16, 8), Range::new(24, 16)];
        assert_eq!(rig.bring_back(4), parts);
        assert_eq!(rig.states.view(place), (Residence::Moving, 2));
        // Cut off, and once more.
        assert_eq!(rig.states.failed(TransferId(4)), []);
        assert_eq!(rig.states.view(place), (Residence::Host, 2));
        assert_eq!(rig.bring_back(5), parts);
        assert!(rig.states.landed(TransferId(5)));
        assert_eq!((rig.states.view(place), rig.bring_back(6)), ((Residence::Resident, 2), vec![]));
    }

    #[test]
    fn what_was_refused_is_where_it_was_and_what_failed_is_lost() {
        let rig = Rig::new();
        let (one, other) = (Range::new(0, 16), Range::new(16, 16));
        rig.add(one);
        rig.add(other);
        assert_eq!(rig.make_room(1, Range::new(8, 16)), [Range::new(8, 8), Range::new(16, 8)]);
        rig.states.refused(TransferId(1));
        assert_eq!(rig.states.view(one), (Residence::Resident, 0));
        assert_eq!(rig.make_room(2, Range::new(16, 4)), [Range::new(16, 4)]);
        assert_eq!(rig.make_room(3, Range::new(0, 4)), [Range::new(0, 4)]);
        assert_eq!(rig.states.failed(TransferId(2)), [other]);
        assert!(rig.states.landed(TransferId(3)));
        // Nobody wants to see what is left of the other one.
        assert_eq!(rig.make_room(4, Range::new(0, 64)), [Range::new(4, 12)]);
    }

    #[test]
    fn a_state_is_set_aside_where_there_is_room_and_goes_to_the_host_from_there() {
        let device = open_device(DeviceId::Host(0), LinkThrottle::default()).unwrap();
        let states = States::new(device.allocate(16 << 10).unwrap());
        let place = Range::new(512, 2048);
        let memory = SharedMemory::create("state", place.bytes).unwrap();
        states.add(place, device.pin(Arc::new(memory)).unwrap());
        let unused = |bytes| Some(Unused { range: Range::new(0, bytes), least_bytes: 512 });
        let view = || states.view(place);
        let make_room = |id, part, unused| states.make_room(TransferId(id), part, unused).unwrap();
        // It does not fit into what model and state leave of the beginning, or is not worth it.
        for (part, unused) in [(Range::new(0, 1024), unused(3000)), (Range::new(0, 768), unused(16 << 10))] {
            let made = make_room(1, part, unused);
            assert!(made.set_aside.is_empty() && made.save.len() == 1, "{part}");
            states.refused(TransferId(1));
            assert_eq!(view(), (Residence::Resident, 0));
        }
        let made = make_room(2, Range::new(0, 1024), unused(16 << 10));
        assert!(made.save.is_empty());
        let [CopyWithin { from, to }] = &made.set_aside[..] else { panic!("{made:?}") };
        assert_eq!((from.offset(), to.offset(), to.bytes()), (512, 2560, 512));
        assert_eq!(view(), (Residence::Moving, 1));
        assert!(states.landed(TransferId(2)));
        assert_eq!(view(), (Residence::Aside, 1));
        // Somebody comes over a little of what is aside, and is refused before he comes.
        for _ in 0..2 {
            let made = make_room(3, Range::new(3000, 512), None);
            let [CopyOut { from, to }] = &made.save[..] else { panic!("{made:?}") };
            assert_eq!((from.offset(), to.offset(), to.bytes()), (2560, 0, 512));
            states.refused(TransferId(3));
            assert_eq!(view(), (Residence::Aside, 1));
        }
        let back = states.bring_back(TransferId(4), vec![]).unwrap();
        assert_eq!((back.within.len(), back.copies.len()), (1, 0));
        assert_eq!((back.within[0].from.offset(), back.within[0].to.offset()), (2560, 512));
        assert_eq!(states.failed(TransferId(4)), []);
        make_room(5, Range::new(3000, 512), None);
        assert!(states.landed(TransferId(5)));
        assert_eq!(view(), (Residence::Host, 2));
        let back = states.bring_back(TransferId(6), vec![]).unwrap();
        assert_eq!((back.within.len(), back.copies.len()), (0, 1));
        assert!(states.landed(TransferId(6)));
        assert_eq!(view(), (Residence::Resident, 2));
        make_room(7, Range::new(0, 1024), unused(16 << 10));
        assert_eq!(states.failed(TransferId(7)), [place]);
    }

    /// Two states and whatever comes over them, moved by a real engine: they are what they were when all is back.
    #[test]
    fn no_byte_changes_on_the_way_out_and_back() {
        const BYTES: u64 = 64 << 10;
        // Behind the states.
        const UNUSED: Range = Range::new(BYTES, 32 << 10);
        let device = open_device(DeviceId::Host(0), LinkThrottle::default()).unwrap();
        let pool = device.allocate(UNUSED.end() + 4).unwrap();
        let memory = |bytes| device.pin(Arc::new(SharedMemory::create("test", bytes).unwrap())).unwrap();
        let [before, weights, after] = [0; 3].map(|_| memory(BYTES));
        let content: Vec<u8> = (0..BYTES).map(|at| u8::try_from(at * 31 % 251).unwrap()).collect();
        before.memory().write(0, &content).unwrap();
        weights.memory().write(0, &vec![0xEE; content.len()]).unwrap();
        let there = |offset, bytes| DeviceSlice::new(Arc::clone(&pool), offset, bytes).unwrap();
        let here = |from: &PinnedMemory, offset, bytes| HostSlice::new(from.clone(), offset, bytes).unwrap();
        let states = States::new(Arc::clone(&pool));
        let places = [Range::new(1 << 10, 20 << 10), Range::new(30 << 10, 7 << 10)];
        for place in places {
            states.add(place, memory(place.bytes));
        }
        let (sender, landed) = mpsc::channel();
        let on_landed = Box::new(move |id, result: Result<_, _>| sender.send((id, result.is_ok())).unwrap());
        let engine = Engine::new(Arc::clone(&device), on_landed).unwrap();
        let mut stream = device.copy_stream("test").unwrap();
        stream.copy_in(&here(&before, 0, BYTES), &there(0, BYTES)).unwrap();
        drop(stream);
        for round in 0..8 {
            let parts = [(8 << 10, 4 << 10), (16 << 10, 16 << 10), (0, 9 << 10), (UNUSED.offset, 8 << 10)];
            for (transfer, (offset, bytes)) in (round * 10..).zip(parts) {
                let id = TransferId(transfer);
                let copy = CopyIn { from: here(&weights, 0, bytes), to: there(offset, bytes) };
                let groups = vec![GroupCopy { copy, doorbell: there(UNUSED.end(), 4) }];
                // None, all, some: the last comes over what is aside by then.
                let aside = offset < BYTES && (round % 3 == 1 || (round % 3 == 2 && offset == 0));
                let unused = aside.then_some(Unused { range: UNUSED, least_bytes: 0 });
                let made = states.make_room(id, Range::new(offset, bytes), unused).unwrap();
                let MadeRoom { save, set_aside } = made;
                let lies_aside = offset == UNUSED.offset && round % 3 > 0;
                let saves = lies_aside || (!aside && offset < BYTES);
                assert_eq!((save.is_empty(), set_aside.is_empty()), (!saves, !aside), "{round}, {offset}");
                let (clear, inputs, input_doorbell) = (vec![], vec![], None);
                let all = Transfer { id, clear, inputs, input_doorbell, groups, save, set_aside };
                engine.start(all).unwrap();
                assert_eq!(landed.recv().unwrap(), (id, true));
                assert_eq!(states.landed(id), aside || saves);
            }
            let id = TransferId(round * 10 + 9);
            engine.bring_back(states.bring_back(id, vec![]).unwrap()).unwrap();
            assert_eq!(landed.recv().unwrap(), (id, true));
            assert!(states.landed(id));
            let mut stream = device.copy_stream("test").unwrap();
            stream.copy_out(&there(0, BYTES), &here(&after, 0, BYTES)).unwrap();
            drop(stream);
            for place in places {
                let [begin, end] = [place.offset, place.end()].map(|at| usize::try_from(at).unwrap());
                let mut found = vec![0; end - begin];
                after.memory().read(place.offset, &mut found).unwrap();
                assert!(found == content[begin..end], "round {round}, {place}");
            }
        }
    }

    proptest! {
        /// Whatever models have lain there: no byte is saved twice, and all that was saved comes back.
        #[test]
        fn every_byte_is_in_one_place(
            place in (0..32_u64, 1..32_u64),
            parts in proptest::collection::vec((0..48_u64, 1..16_u64), 0..12),
        ) {
            let (rig, place) = (Rig::new(), Range::new(place.0, place.1));
            rig.add(place);
            let mut out = [false; 64];
            for (transfer, (offset, bytes)) in (0..).zip(parts) {
                let part = Range::new(offset, bytes);
                for saved in rig.make_room(transfer, part) {
                    prop_assert!(part.contains(&saved) && place.contains(&saved));
                    for byte in saved.offset..saved.end() {
                        prop_assert!(!std::mem::replace(&mut out[usize::try_from(byte).unwrap()], true));
                    }
                }
                for byte in part.offset.max(place.offset)..part.end().min(place.end()) {
                    prop_assert!(out[usize::try_from(byte).unwrap()]);
                }
                rig.states.landed(TransferId(transfer));
            }
            for back in rig.bring_back(100) {
                for byte in back.offset..back.end() {
                    prop_assert!(std::mem::take(&mut out[usize::try_from(byte).unwrap()]));
                }
            }
            prop_assert!(!out.contains(&true));
        }
    }
}
