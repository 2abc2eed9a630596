mod account;

use std::sync::mpsc;

use proptest::prelude::*;

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
            let all = Transfer { groups, save, set_aside, ..Transfer::new(id) };
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
