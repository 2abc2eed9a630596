//! Where the states of training tasks are, where that gives way to models: in their places in the pool, or, as far as a
//! model lies there, in host memory.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pswitch_device::{DeviceError, DeviceMemory, DeviceSlice, HostSlice, PinnedMemory};
use pswitch_mem_pool::{Range, TENSOR_ALIGNMENT_BYTES};
use pswitch_transfer::{CopyIn, CopyOut, SetAside, TransferId};

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
    /// What leaves its place, by the reports that are to come of it.
    leaving: BTreeMap<TransferId, Leaving>,
    /// The number of the next report of state that is set aside.
    next_aside: u64,
    /// The transfer that brings all back.
    returning: Option<TransferId>,
}

/// Parts of states that make room.
#[derive(Debug)]
struct Leaving {
    /// The transfer that they make room for.
    transfer: TransferId,
    parts: Vec<Range>,
}

/// How a transfer makes room: by copies to the host piece by piece, or by way of other memory of the pool.
#[derive(Debug, Default)]
pub(crate) struct MadeRoom {
    pub(crate) save: Vec<CopyOut>,
    pub(crate) set_aside: Option<SetAside>,
}

/// Reports of state that is set aside have numbers from here on, which transfers do not come to.
const ASIDES: u64 = 1 << 63;

#[derive(Debug)]
struct State {
    place: Range,
    /// As long as the place.
    host: PinnedMemory,
    /// Parts that are on the host, or on their way there; sorted, no two overlap.
    out: Vec<Range>,
    /// Times that it was saved, all of it or a part.
    made_room: u64,
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
        let mut leaving = account.leaving.values().flat_map(|leaving| &leaving.parts);
        let mut leaves = || leaving.any(|part| part.overlaps(&place));
        let residence = match state.out.is_empty() {
            true => Residence::Resident,
            false if account.returning.is_some() || leaves() => Residence::Moving,
            false => Residence::Host,
        };
        (residence, state.made_room)
    }

    /// What has to be saved before a transfer may write to a part of the pool. It is set aside, if there is room for that in
    /// what is `unused` until training comes back.
    pub(crate) fn make_room(
        &self,
        transfer: TransferId,
        part: Range,
        unused: Option<Range>,
    ) -> Result<MadeRoom, DeviceError> {
        let mut account = self.account();
        let there = account
            .states
            .values()
            .flat_map(|state| state.there(part).into_iter().map(move |it| (state, it)));
        let copies = there.map(|(state, it)| self.ends(state, it).map(|(from, to)| CopyOut { from, to }));
        let copies: Vec<CopyOut> = copies.collect::<Result<_, _>>()?;
        if copies.is_empty() {
            return Ok(MadeRoom::default());
        }
        let needed_bytes = SetAside::needed_bytes(copies.iter().map(|copy| copy.from.bytes()));
        let taken = account.states.values().map(|state| state.place).chain([part]);
        let aside = unused.map(|unused| longest_gap(unused, taken)).filter(|gap| gap.bytes >= needed_bytes);
        let memory = aside.map(|gap| DeviceSlice::new(Arc::clone(&self.pool), gap.offset, needed_bytes));
        let memory = memory.transpose()?;
        let mut parts = Vec::new();
        for state in account.states.values_mut() {
            let there = state.there(part);
            state.made_room += u64::from(!there.is_empty());
            state.out.extend(&there);
            state.out.sort_by_key(|out| out.offset);
            parts.extend(there);
        }
        let (report, made) = match memory {
            None => (transfer, MadeRoom { save: copies, set_aside: None }),
            Some(memory) => {
                let id = TransferId(ASIDES | account.next_aside);
                account.next_aside += 1;
                let set_aside = Some(SetAside { id, memory, save: copies });
                (id, MadeRoom { save: Vec::new(), set_aside })
            }
        };
        account.leaving.insert(report, Leaving { transfer, parts });
        Ok(made)
    }

    /// All that a transfer has to bring back.
    pub(crate) fn bring_back(&self, transfer: TransferId) -> Result<Vec<CopyIn>, DeviceError> {
        let mut account = self.account();
        account.returning = Some(transfer);
        let parts =
            account.states.values().flat_map(|state| state.out.iter().map(move |part| (state, *part)));
        parts
            .map(|(state, part)| {
                let (to, from) = self.ends(state, part)?;
                Ok(CopyIn { from, to })
            })
            .collect()
    }

    /// A transfer was refused: it has touched nothing.
    pub(crate) fn refused(&self, transfer: TransferId) {
        let mut account = self.account();
        account.returning.take_if(|returning| *returning == transfer);
        let made_for_it = |leaving: &Leaving| leaving.transfer == transfer;
        let report = account.leaving.iter().find_map(|(id, leaving)| made_for_it(leaving).then_some(*id));
        let leaving = report.and_then(|report| account.leaving.remove(&report));
        let stayed = leaving.map(|leaving| leaving.parts).unwrap_or_default();
        for state in account.states.values_mut() {
            let out = state.out.len();
            state.out.retain(|part| !stayed.contains(part));
            state.made_room -= u64::from(state.out.len() < out);
        }
    }

    /// Whether a report is of state that was set aside, and of no transfer.
    pub(crate) fn is_aside(report: TransferId) -> bool {
        report.0 >= ASIDES
    }

    /// A transfer has landed, or what was set aside; returns whether that moved a state.
    pub(crate) fn landed(&self, transfer: TransferId) -> bool {
        let mut account = self.account();
        let returned = account.returning.take_if(|returning| *returning == transfer).is_some();
        if returned {
            account.states.values_mut().for_each(|state| state.out.clear());
        }
        account.leaving.remove(&transfer).is_some() || returned
    }

    /// A transfer failed on its way, or what was set aside. What it was to save may be lost, and is forgotten: the places are returned. What it was
    /// to bring back is on the host still.
    pub(crate) fn failed(&self, transfer: TransferId) -> Vec<Range> {
        let mut account = self.account();
        account.returning.take_if(|returning| *returning == transfer);
        let lost = account.leaving.remove(&transfer).map(|leaving| leaving.parts).unwrap_or_default();
        let is_lost = |state: &State| lost.iter().any(|part| part.overlaps(&state.place));
        let places: Vec<Range> =
            account.states.values().filter(|state| is_lost(state)).map(|state| state.place).collect();
        account.states.retain(|_, state| !is_lost(state));
        places
    }

    /// Where a part of a state lies in the pool, and on the host.
    fn ends(&self, state: &State, part: Range) -> Result<(DeviceSlice, HostSlice), DeviceError> {
        let there = DeviceSlice::new(Arc::clone(&self.pool), part.offset, part.bytes)?;
        let here = HostSlice::new(state.host.clone(), part.offset - state.place.offset, part.bytes)?;
        Ok((there, here))
    }

    fn account(&self) -> MutexGuard<'_, Account> {
        // Whoever panicked has at worst saved something twice.
        self.account.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// What of the state lies in a part of the pool and not on the host.
    fn there(&self, part: Range) -> Vec<Range> {
        let (mut from, end) = (self.place.offset.max(part.offset), self.place.end().min(part.end()));
        let mut there = Vec::new();
        let gaps = self.out.iter().map(|out| (out.offset, out.end())).chain([(end, end)]);
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
    use pswitch_transfer::{BringBack, Engine, GroupCopy, Transfer};

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
            assert!(made.set_aside.is_none());
            made.save.iter().map(|copy| Range::new(copy.from.offset(), copy.from.bytes())).collect()
        }

        fn bring_back(&self, transfer: u64) -> Vec<Range> {
            let copies = self.states.bring_back(TransferId(transfer)).unwrap();
            copies.iter().map(|copy| Range::new(copy.to.offset(), copy.to.bytes())).collect()
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
    fn a_state_is_set_aside_where_there_is_room_and_has_a_report_of_its_own() {
        let device = open_device(DeviceId::Host(0), LinkThrottle::default()).unwrap();
        let states = States::new(device.allocate(16 << 10).unwrap());
        let place = Range::new(512, 2048);
        let memory = SharedMemory::create("state", place.bytes).unwrap();
        states.add(place, device.pin(Arc::new(memory)).unwrap());
        let whole = Range::new(0, 16 << 10);
        // It does not fit into what model and state leave of the beginning.
        let made = states.make_room(TransferId(1), Range::new(0, 1024), Some(Range::new(0, 3000))).unwrap();
        assert!(made.set_aside.is_none() && made.save.len() == 1);
        states.refused(TransferId(1));
        let made = states.make_room(TransferId(2), Range::new(0, 1024), Some(whole)).unwrap();
        let aside = made.set_aside.unwrap();
        assert!(made.save.is_empty() && States::is_aside(aside.id) && !States::is_aside(TransferId(2)));
        assert_eq!((aside.memory.offset(), aside.memory.bytes()), (2560, 512));
        assert!(!states.landed(TransferId(2)));
        assert_eq!(states.view(place), (Residence::Moving, 1));
        assert!(states.landed(aside.id));
        assert_eq!(states.view(place), (Residence::Host, 1));
        let aside = states.make_room(TransferId(3), whole, Some(whole)).unwrap();
        assert!(aside.set_aside.is_none() && aside.save.len() == 1, "there is no room beside the model");
        assert!(states.landed(TransferId(3)));
        states.bring_back(TransferId(4)).unwrap();
        states.landed(TransferId(4));
        let aside =
            states.make_room(TransferId(5), Range::new(512, 512), Some(whole)).unwrap().set_aside.unwrap();
        states.refused(TransferId(5));
        assert_eq!(states.view(place).0, Residence::Resident);
        let again =
            states.make_room(TransferId(6), Range::new(512, 512), Some(whole)).unwrap().set_aside.unwrap();
        assert_ne!(aside.id, again.id);
        assert_eq!(states.failed(TransferId(6)), []);
        assert_eq!(states.failed(again.id), [place]);
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
            for (transfer, (offset, bytes)) in
                (round * 10..).zip([(8 << 10, 4 << 10), (16 << 10, 16 << 10), (0, 9 << 10)])
            {
                let id = TransferId(transfer);
                let copy = CopyIn { from: here(&weights, offset, bytes), to: there(offset, bytes) };
                let groups = vec![GroupCopy { copy, doorbell: there(UNUSED.end(), 4) }];
                let part = Range::new(offset, bytes);
                let unused = (round % 2 == 1).then_some(UNUSED);
                let MadeRoom { save, set_aside } = states.make_room(id, part, unused).unwrap();
                assert_eq!((save.is_empty(), set_aside.is_none()), (round % 2 == 1, round % 2 == 0));
                let reports = 1 + usize::from(set_aside.is_some());
                let (clear, inputs, input_doorbell) = (vec![], vec![], None);
                let all = Transfer { id, clear, inputs, input_doorbell, groups, save, set_aside };
                engine.start(all).unwrap();
                let moved = (0..reports).filter(|_| {
                    let (id, has_landed) = landed.recv().unwrap();
                    assert!(has_landed);
                    states.landed(id)
                });
                assert_eq!(moved.count(), 1);
            }
            let id = TransferId(round * 10 + 9);
            let copies = states.bring_back(id).unwrap();
            engine.bring_back(BringBack { id, clear: vec![], copies }).unwrap();
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
