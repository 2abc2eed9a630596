//! The engine on the host device: what is enqueued where and in which order, what lands, and what is reported.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use pswitch_device::{
    CopyStream, Device, DeviceError, DeviceId, DeviceMemory, DeviceProperties, DeviceSlice, Event,
    ExecutionStream, HostSlice, LinkThrottle, MemoryHandle, PinnedMemory, SharedMemory, doorbell,
    open_device,
};
use pswitch_transfer::{
    BringBack, CopyIn, CopyOut, CopyWithin, Engine, GroupCopy, OnLanded, Transfer, TransferError, TransferId,
    TransferReport,
};

type Report = (TransferId, Result<TransferReport, TransferError>);

const LONG: Duration = Duration::from_secs(20);
const KIB: u64 = 1024;

/// What a stream was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Asked {
    In { offset: u64, bytes: u64 },
    Out { offset: u64, bytes: u64 },
    Within { from: u64, to: u64, bytes: u64 },
    Word { offset: u64, value: u32 },
    Wait,
}

/// The host device with notes about what its streams are asked for, which may be told to refuse an operation.
#[derive(Debug)]
struct Spy {
    device: Arc<dyn Device>,
    asked: Arc<Mutex<Vec<(String, Asked)>>>,
    /// Operations until one is refused.
    until_refusal: Arc<AtomicUsize>,
}

#[derive(Debug)]
struct SpyStream {
    name: String,
    stream: Box<dyn CopyStream>,
    asked: Arc<Mutex<Vec<(String, Asked)>>>,
    until_refusal: Arc<AtomicUsize>,
}

impl Spy {
    fn new(throttle: LinkThrottle) -> Arc<Self> {
        Arc::new(Self {
            device: open_device(DeviceId::Host(0), throttle).unwrap(),
            asked: Arc::default(),
            until_refusal: Arc::new(AtomicUsize::new(usize::MAX)),
        })
    }
}

impl Device for Spy {
    fn properties(&self) -> &DeviceProperties {
        self.device.properties()
    }

    fn free_bytes(&self) -> Result<u64, DeviceError> {
        self.device.free_bytes()
    }

    fn allocate(&self, bytes: u64) -> Result<Arc<dyn DeviceMemory>, DeviceError> {
        self.device.allocate(bytes)
    }

    fn allocate_managed(&self, bytes: u64) -> Result<Arc<dyn DeviceMemory>, DeviceError> {
        self.device.allocate_managed(bytes)
    }

    fn send_back(&self, managed: &DeviceSlice) -> Result<(), DeviceError> {
        self.device.send_back(managed)
    }

    fn open(&self, handle: MemoryHandle) -> Result<Arc<dyn DeviceMemory>, DeviceError> {
        self.device.open(handle)
    }

    fn pin(&self, memory: Arc<SharedMemory>) -> Result<PinnedMemory, DeviceError> {
        self.device.pin(memory)
    }

    fn lend(&self, memory: Arc<SharedMemory>) -> PinnedMemory {
        self.device.lend(memory)
    }

    fn copy_stream(&self, name: &str) -> Result<Box<dyn CopyStream>, DeviceError> {
        Ok(Box::new(SpyStream {
            name: name.to_owned(),
            stream: self.device.copy_stream(name)?,
            asked: Arc::clone(&self.asked),
            until_refusal: Arc::clone(&self.until_refusal),
        }))
    }

    fn wait_doorbell(
        &self,
        on: ExecutionStream,
        word: &DeviceSlice,
        deadline: Instant,
    ) -> Result<(), DeviceError> {
        self.device.wait_doorbell(on, word, deadline)
    }

    fn set_word(&self, word: &DeviceSlice, value: u32) -> Result<(), DeviceError> {
        self.device.set_word(word, value)
    }

    fn word(&self, word: &DeviceSlice) -> Result<u32, DeviceError> {
        self.device.word(word)
    }
}

impl SpyStream {
    fn note(&self, asked: Asked) -> Result<(), DeviceError> {
        if self.until_refusal.fetch_sub(1, Ordering::Relaxed) == 0 {
            return Err(DeviceError::StreamEnded { stream: self.name.clone() });
        }
        self.asked.lock().unwrap().push((self.name.clone(), asked));
        Ok(())
    }
}

impl CopyStream for SpyStream {
    fn copy_in(&mut self, from: &HostSlice, to: &DeviceSlice) -> Result<(), DeviceError> {
        self.note(Asked::In { offset: to.offset(), bytes: to.bytes() })?;
        self.stream.copy_in(from, to)
    }

    fn copy_out(&mut self, from: &DeviceSlice, to: &HostSlice) -> Result<(), DeviceError> {
        self.note(Asked::Out { offset: from.offset(), bytes: from.bytes() })?;
        self.stream.copy_out(from, to)
    }

    fn copy_within(&mut self, from: &DeviceSlice, to: &DeviceSlice) -> Result<(), DeviceError> {
        self.note(Asked::Within { from: from.offset(), to: to.offset(), bytes: to.bytes() })?;
        self.stream.copy_within(from, to)
    }

    fn write_word(&mut self, word: &DeviceSlice, value: u32) -> Result<(), DeviceError> {
        self.note(Asked::Word { offset: word.offset(), value })?;
        self.stream.write_word(word, value)
    }

    fn clear_words(&mut self, words: &DeviceSlice) -> Result<(), DeviceError> {
        words
            .words()
            .try_for_each(|word| self.note(Asked::Word { offset: word.offset(), value: doorbell::CLEAR }))?;
        self.stream.clear_words(words)
    }

    fn record(&mut self) -> Result<Arc<dyn Event>, DeviceError> {
        self.stream.record()
    }

    fn wait_event(&mut self, event: &Arc<dyn Event>) -> Result<(), DeviceError> {
        self.note(Asked::Wait)?;
        self.stream.wait_event(event)
    }
}

/// A device with a pool and a span of the same size, a page of doorbells behind the pool, and an engine.
struct Rig {
    device: Arc<Spy>,
    span: PinnedMemory,
    pool: Arc<dyn DeviceMemory>,
    engine: Engine,
    reports: Receiver<Report>,
}

impl Rig {
    fn new(throttle: LinkThrottle) -> Self {
        let (sender, reports) = mpsc::channel();
        Self::with(throttle, reports, Box::new(move |id, result| sender.send((id, result)).unwrap()))
    }

    fn with(throttle: LinkThrottle, reports: Receiver<Report>, on_landed: OnLanded) -> Self {
        let device = Spy::new(throttle);
        let span = device.pin(Arc::new(SharedMemory::create("span", 1024 * KIB).unwrap())).unwrap();
        let pattern: Vec<u8> = (0..1024 * KIB).map(pattern).collect();
        span.memory().write(0, &pattern).unwrap();
        let pool = device.allocate(1028 * KIB).unwrap();
        let engine = Engine::new(device.clone(), on_landed).unwrap();
        Self { device, span, pool, engine, reports }
    }

    fn copy(&self, offset: u64, bytes: u64) -> CopyIn {
        CopyIn {
            from: HostSlice::new(self.span.clone(), offset, bytes).unwrap(),
            to: DeviceSlice::new(self.pool.clone(), offset, bytes).unwrap(),
        }
    }

    fn word(&self, index: u64) -> DeviceSlice {
        DeviceSlice::new(self.pool.clone(), 1024 * KIB + 4 * index, 4).unwrap()
    }

    fn group(&self, index: u64, bytes: u64) -> GroupCopy {
        GroupCopy { copy: self.copy(index * bytes, bytes), doorbell: self.word(index) }
    }

    fn report(&self) -> Report {
        self.reports.recv_timeout(LONG).expect("every transfer is reported")
    }

    /// What is on the device now.
    fn there(&self, offset: u64, bytes: u64) -> Vec<u8> {
        let mut found = vec![0; usize::try_from(bytes).unwrap()];
        let copy = self.device.pin(Arc::new(SharedMemory::create("there", bytes).unwrap())).unwrap();
        let mut stream = self.device.device.copy_stream("there").unwrap();
        let from = DeviceSlice::new(self.pool.clone(), offset, bytes).unwrap();
        stream.copy_out(&from, &HostSlice::new(copy.clone(), 0, bytes).unwrap()).unwrap();
        drop(stream);
        copy.memory().read(0, &mut found).unwrap();
        found
    }
}

#[allow(clippy::cast_possible_truncation)]
fn pattern(offset: u64) -> u8 {
    (offset % 251) as u8 + 1
}

fn patterns(offset: u64, bytes: u64) -> Vec<u8> {
    (offset..offset + bytes).map(pattern).collect()
}

fn transfer(id: u64, groups: Vec<GroupCopy>) -> Transfer {
    Transfer { groups, ..Transfer::new(TransferId(id)) }
}

fn throttled(bytes_per_s: f64) -> LinkThrottle {
    LinkThrottle { bandwidth_bytes_per_s: Some(bytes_per_s), per_copy: Duration::from_micros(50) }
}

#[test]
fn everything_is_enqueued_in_order_on_one_stream() {
    let rig = Rig::new(LinkThrottle::default());
    rig.device.set_word(&rig.word(9), doorbell::RUNG).unwrap();
    rig.engine
        .start(Transfer {
            clear: vec![rig.word(9)],
            inputs: vec![rig.copy(512 * KIB, 100), rig.copy(600 * KIB, 200)],
            input_doorbell: Some(rig.word(8)),
            ..transfer(1, vec![rig.group(0, 64 * KIB), rig.group(1, 64 * KIB)])
        })
        .unwrap();
    let (id, report) = rig.report();
    let report = report.unwrap();

    let word = |index: u64, value| Asked::Word { offset: 1024 * KIB + 4 * index, value };
    let expected = [
        Asked::In { offset: 512 * KIB, bytes: 100 },
        Asked::In { offset: 600 * KIB, bytes: 200 },
        word(8, doorbell::RUNG),
        Asked::In { offset: 0, bytes: 64 * KIB },
        word(0, doorbell::RUNG),
        Asked::In { offset: 64 * KIB, bytes: 64 * KIB },
        word(9, doorbell::CLEAR),
        word(1, doorbell::RUNG),
    ];
    let asked = rig.device.asked.lock().unwrap().clone();
    assert_eq!(asked, expected.map(|asked| ("weights".to_owned(), asked)));

    assert_eq!(id, TransferId(1));
    assert_eq!(report.bytes, 128 * KIB + 300);
    assert!(report.enqueued_at <= report.landed_at);

    assert_eq!(rig.there(0, 128 * KIB), patterns(0, 128 * KIB));
    assert_eq!(rig.there(600 * KIB, 200), patterns(600 * KIB, 200));
    let words = [9, 8, 0, 1].map(|index| rig.device.word(&rig.word(index)).unwrap());
    assert_eq!(words, [doorbell::CLEAR, doorbell::RUNG, doorbell::RUNG, doorbell::RUNG]);
}

#[test]
fn what_is_to_be_done_meanwhile_is_done_once_behind_the_first_group() {
    let rig = Rig::new(LinkThrottle::default());
    let inputs = || Transfer { inputs: vec![rig.copy(512 * KIB, 100)], ..transfer(1, Vec::new()) };
    let groups = || vec![rig.group(0, KIB), rig.group(1, KIB)];
    // A copy, and another with its word.
    for (transfer, until_refusal, expected) in [
        (inputs(), usize::MAX, Some(1)),
        (Transfer { groups: groups(), ..inputs() }, usize::MAX, Some(3)),
        // Not all of it is taken.
        (Transfer { groups: groups(), ..inputs() }, 0, Some(0)),
        (Transfer { groups: groups(), ..inputs() }, 2, Some(2)),
        // Refused: the ends are not of equal length.
        (
            Transfer { inputs: vec![CopyIn { to: rig.word(0), ..rig.copy(0, 100) }], ..inputs() },
            usize::MAX,
            None,
        ),
    ] {
        rig.device.asked.lock().unwrap().clear();
        rig.device.until_refusal.store(until_refusal, Ordering::SeqCst);
        let mut found = Vec::new();
        let started = rig.engine.start_and(transfer, || found.push(rig.device.asked.lock().unwrap().len()));
        assert_eq!((found.first().copied(), found.len()), (expected, usize::from(expected.is_some())));
        assert_eq!(started.is_ok(), expected.is_some());
        rig.device.until_refusal.store(usize::MAX, Ordering::SeqCst);
        if expected.is_some() {
            assert_eq!(rig.report().1.is_ok(), until_refusal == usize::MAX);
        }
    }
}

#[test]
fn a_rehearsal_uses_the_streams_that_have_nothing_to_do_and_is_not_reported() {
    let rig = Rig::new(throttled(2e6));
    let asked = || {
        let asked = std::mem::take(&mut *rig.device.asked.lock().unwrap());
        asked.into_iter().map(|(name, asked)| (name, matches!(asked, Asked::In { .. }))).collect::<Vec<_>>()
    };
    let of = |name: &str| [(name.to_owned(), true), (name.to_owned(), false)];
    rig.engine.rehearse().unwrap();
    assert_eq!(asked(), [of("weights"), of("inputs")].concat());
    // Half a second.
    rig.engine.start(transfer(1, vec![rig.group(0, 1024 * KIB)])).unwrap();
    assert_eq!(asked(), of("weights"));
    rig.engine.rehearse().unwrap();
    assert_eq!(asked(), of("inputs"));
    let (id, report) = rig.report();
    assert_eq!((id, report.unwrap().bytes), (TransferId(1), 1024 * KIB));
    assert_eq!(rig.there(0, 1024 * KIB), patterns(0, 1024 * KIB));
    // It is idle again as soon as the report has been made.
    let begun = Instant::now();
    while rig.engine.rehearse().is_ok() && asked() != [of("weights"), of("inputs")].concat() {
        assert!(begun.elapsed() < LONG);
    }
    assert!(rig.reports.try_recv().is_err());
}

#[test]
fn doorbells_are_cleared_before_the_last_one_rings() {
    let rig = Rig::new(LinkThrottle::default());
    let word = |index: u64, value| Asked::Word { offset: 1024 * KIB + 4 * index, value };
    let cleared = [word(8, doorbell::CLEAR), word(9, doorbell::CLEAR)];
    for groups in 0..5 {
        let groups: Vec<GroupCopy> = (0..groups).map(|index| rig.group(index, KIB)).collect();
        let rings: Vec<Asked> = (0..groups.len() as u64).map(|index| word(index, doorbell::RUNG)).collect();
        let clear = vec![DeviceSlice::new(rig.pool.clone(), rig.word(8).offset(), 8).unwrap()];
        rig.engine.start(Transfer { clear, ..transfer(1, groups) }).unwrap();
        rig.report().1.unwrap();
        let asked = std::mem::take(&mut *rig.device.asked.lock().unwrap());
        let words: Vec<Asked> = asked
            .into_iter()
            .map(|(_, asked)| asked)
            .filter(|asked| matches!(asked, Asked::Word { .. }))
            .collect();
        let (ahead, behind) = rings.split_at(rings.len().saturating_sub(1));
        assert_eq!(words, [ahead, &cleared[..], behind].concat());
    }
}

#[test]
fn start_returns_before_the_bytes_move_and_doorbells_ring_behind_them() {
    // 128 KiB at 1 MiB/s: 125 ms a group, far longer than enqueueing takes.
    let rig = Rig::new(throttled(1024.0 * 1024.0));
    let groups: Vec<GroupCopy> = (0..4).map(|index| rig.group(index, 128 * KIB)).collect();
    rig.engine.start(transfer(1, groups.clone())).unwrap();
    assert_eq!(rig.device.word(&groups[3].doorbell).unwrap(), doorbell::CLEAR);
    assert!(rig.reports.try_recv().is_err());
    for (index, group) in (0..).zip(&groups) {
        let deadline = Instant::now() + LONG;
        rig.device.wait_doorbell(ExecutionStream::Host, &group.doorbell, deadline).unwrap();
        let mut there = vec![0; 128 * 1024];
        // Straight from the shared memory: a copy would queue behind the transfer.
        let MemoryHandle::Memfd { fd, bytes } = rig.pool.export().unwrap() else {
            panic!("the host device exports memfds");
        };
        SharedMemory::from_fd(fd, bytes).unwrap().read(index * 128 * KIB, &mut there).unwrap();
        assert_eq!(there, patterns(index * 128 * KIB, 128 * KIB), "group {index}");
    }
    rig.report().1.unwrap();
}

#[test]
fn inputs_alone_overtake_weights_under_way() {
    // 500 ms for the weights, some 30 of them until the link is free for the input.
    let rig = Rig::new(throttled(1024.0 * 1024.0));
    rig.engine.start(transfer(1, (0..16).map(|index| rig.group(index, 32 * KIB)).collect())).unwrap();
    rig.engine
        .start(Transfer {
            inputs: vec![rig.copy(1000 * KIB, 1000)],
            input_doorbell: Some(rig.word(40)),
            ..transfer(2, vec![])
        })
        .unwrap();
    let (first, report) = rig.report();
    assert_eq!(first, TransferId(2));
    assert_eq!(report.unwrap().bytes, 1000);
    assert_eq!(rig.device.word(&rig.word(40)).unwrap(), doorbell::RUNG);
    assert_eq!(rig.report().0, TransferId(1));
    let asked = rig.device.asked.lock().unwrap();
    assert_eq!(asked.iter().filter(|(stream, _)| stream == "inputs").count(), 2);
}

#[test]
fn transfers_land_in_the_order_in_which_they_were_started() {
    let rig = Rig::new(LinkThrottle::default());
    for id in 0..50 {
        rig.engine.start(transfer(id, vec![rig.group(id % 4, 64 * KIB)])).unwrap();
    }
    let landed: Vec<u64> = (0..50).map(|_| rig.report().0.0).collect();
    assert_eq!(landed, (0..50).collect::<Vec<_>>());
}

/// State in the pool, and host memory that it goes to: what lies at `offset` of the pool goes to `offset` there.
struct State {
    saved: PinnedMemory,
    bytes: Vec<u8>,
}

impl State {
    /// Fills the whole pool with bytes that no span has.
    fn new(rig: &Rig) -> Self {
        let bytes: Vec<u8> = (0..1024 * KIB).map(|offset| !pattern(offset * 7)).collect();
        let memory = || rig.device.pin(Arc::new(SharedMemory::create("state", 1024 * KIB).unwrap())).unwrap();
        let source = memory();
        source.memory().write(0, &bytes).unwrap();
        let mut stream = rig.device.device.copy_stream("state").unwrap();
        let all = DeviceSlice::new(rig.pool.clone(), 0, 1024 * KIB).unwrap();
        stream.copy_in(&HostSlice::new(source, 0, 1024 * KIB).unwrap(), &all).unwrap();
        Self { saved: memory(), bytes }
    }

    fn save(&self, rig: &Rig, offset: u64, bytes: u64) -> CopyOut {
        CopyOut {
            from: DeviceSlice::new(rig.pool.clone(), offset, bytes).unwrap(),
            to: HostSlice::new(self.saved.clone(), offset, bytes).unwrap(),
        }
    }

    fn bring_back(&self, rig: &Rig, offset: u64, bytes: u64) -> CopyIn {
        let CopyOut { from, to } = self.save(rig, offset, bytes);
        CopyIn { from: to, to: from }
    }

    #[track_caller]
    fn assert_saved(&self, offset: u64, bytes: u64) {
        let mut found = vec![0; usize::try_from(bytes).unwrap()];
        self.saved.memory().read(offset, &mut found).unwrap();
        assert!(found == self.part(offset, bytes), "what was at {offset} is not what was saved");
    }

    fn part(&self, offset: u64, bytes: u64) -> &[u8] {
        let [begin, end] = [offset, offset + bytes].map(|at| usize::try_from(at).unwrap());
        &self.bytes[begin..end]
    }
}

#[test]
fn state_makes_room_ahead_of_the_groups_and_comes_back() {
    let rig = Rig::new(LinkThrottle::default());
    let state = State::new(&rig);
    // One that two groups go over, one between two groups' ends, one that nothing goes over; in no order.
    let places = [(300 * KIB, 20 * KIB), (60 * KIB, 8 * KIB), (130 * KIB, 10 * KIB)];
    let save = places.map(|(offset, bytes)| state.save(&rig, offset, bytes)).to_vec();
    let groups = (0..3).map(|index| rig.group(index, 64 * KIB)).collect();
    rig.engine.start(Transfer { save, ..transfer(1, groups) }).unwrap();
    let report = rig.report().1.unwrap();
    assert_eq!(report.bytes, (3 * 64 + 38) * KIB);
    places.iter().for_each(|&(offset, bytes)| state.assert_saved(offset, bytes));
    assert_eq!(rig.there(0, 192 * KIB), patterns(0, 192 * KIB));
    let copied = |offset: u64, bytes: u64| Asked::In { offset: offset * KIB, bytes: bytes * KIB };
    let rung = |index: u64| Asked::Word { offset: 1024 * KIB + 4 * index, value: doorbell::RUNG };
    let expected = [
        copied(0, 60),
        Asked::Wait,
        copied(60, 4),
        rung(0),
        copied(64, 64),
        rung(1),
        copied(128, 2),
        Asked::Wait,
        copied(130, 10),
        copied(140, 52),
        rung(2),
        Asked::Wait,
    ];
    let asked = std::mem::take(&mut *rig.device.asked.lock().unwrap());
    let of = |name: &str| -> Vec<Asked> {
        asked.iter().filter(|(stream, _)| stream == name).map(|(_, it)| it.clone()).collect()
    };
    assert_eq!(of("weights"), expected);
    let saved =
        [1, 2, 0].map(|place: usize| places[place]).map(|(offset, bytes)| Asked::Out { offset, bytes });
    assert_eq!(of("state"), saved);

    rig.device.set_word(&rig.word(1), doorbell::RUNG).unwrap();
    let copies = places.map(|(offset, bytes)| state.bring_back(&rig, offset, bytes)).to_vec();
    rig.engine
        .bring_back(BringBack { id: TransferId(2), clear: vec![rig.word(1)], within: vec![], copies })
        .unwrap();
    let (id, report) = rig.report();
    assert_eq!((id, report.unwrap().bytes), (TransferId(2), 38 * KIB));
    for (offset, bytes) in places {
        assert!(rig.there(offset, bytes) == state.part(offset, bytes), "{offset}");
    }
    assert_eq!(rig.device.word(&rig.word(1)).unwrap(), doorbell::CLEAR);
}

/// Two groups over two states, which are set aside at 512 and 700 KiB.
fn with_asides(rig: &Rig, id: u64) -> Transfer {
    let aside = |from: u64, to: u64, bytes| {
        let there = |offset| DeviceSlice::new(rig.pool.clone(), offset, bytes).unwrap();
        CopyWithin { from: there(from * KIB), to: there(to * KIB) }
    };
    let set_aside = vec![aside(4, 512, 100), aside(60, 700, 8 * KIB)];
    let groups = (0..2).map(|index| rig.group(index, 64 * KIB)).collect();
    Transfer { set_aside, ..transfer(id, groups) }
}

#[test]
fn state_is_set_aside_ahead_of_what_comes_over_it_and_comes_back_from_there_or_is_saved() {
    let rig = Rig::new(LinkThrottle::default());
    let state = State::new(&rig);
    let aside = with_asides(&rig, 1).set_aside;
    rig.engine.start(with_asides(&rig, 1)).unwrap();
    // Over one of both where it is set aside, at once.
    let saved = CopyOut { to: state.save(&rig, 4 * KIB, 100).to, from: aside[0].to.clone() };
    let over = GroupCopy { copy: rig.copy(512 * KIB, KIB), doorbell: rig.word(3) };
    rig.engine.start(Transfer { save: vec![saved], ..transfer(2, vec![over]) }).unwrap();
    for expected in [(1, 128 * KIB), (2, KIB + 100)] {
        let (id, report) = rig.report();
        assert_eq!((id.0, report.unwrap().bytes), expected);
    }
    state.assert_saved(4 * KIB, 100);
    assert_eq!(rig.there(0, 128 * KIB), patterns(0, 128 * KIB));
    assert!(rig.there(700 * KIB, 8 * KIB) == state.part(60 * KIB, 8 * KIB));
    let asked = std::mem::take(&mut *rig.device.asked.lock().unwrap());
    let of = |name: &str| -> Vec<Asked> {
        asked.iter().filter(|(stream, _)| stream == name).map(|(_, it)| it.clone()).collect()
    };
    let moved = |from: u64, to: u64, bytes| Asked::Within { from: from * KIB, to: to * KIB, bytes };
    let saved = Asked::Out { offset: 512 * KIB, bytes: 100 };
    assert_eq!(of("state"), [moved(4, 512, 100), moved(60, 700, 8 * KIB), saved]);
    // What lies where nothing is comes at once, the rest behind the state there.
    let arrives = |begin: u64, end: u64| Asked::In { offset: begin, bytes: end - begin };
    let (over, rest) = (4 * KIB + 100, arrives(4 * KIB + 100, 60 * KIB));
    assert_eq!(of("weights")[..4], [arrives(0, 4 * KIB), Asked::Wait, arrives(4 * KIB, over), rest]);

    let within = vec![CopyWithin { from: aside[1].to.clone(), to: aside[1].from.clone() }];
    let copies = vec![state.bring_back(&rig, 4 * KIB, 100)];
    rig.engine.bring_back(BringBack { id: TransferId(3), clear: vec![], within, copies }).unwrap();
    rig.report().1.unwrap();
    for (offset, bytes) in [(4 * KIB, 100), (60 * KIB, 8 * KIB)] {
        assert!(rig.there(offset, bytes) == state.part(offset, bytes), "{offset}");
    }
}

#[test]
fn no_byte_of_state_that_is_set_aside_is_lost_by_a_failure() {
    let rig = Rig::new(LinkThrottle::default());
    // Eight for the first group, with the state in its place; its bell; another copy and bell; the last wait.
    for refused in 0..12 {
        let state = State::new(&rig);
        rig.device.until_refusal.store(refused, Ordering::Relaxed);
        rig.engine.start(with_asides(&rig, 1)).unwrap();
        rig.report().1.unwrap_err();
        rig.device.until_refusal.store(usize::MAX, Ordering::Relaxed);
        for (offset, aside, bytes) in [(4 * KIB, 512 * KIB, 100), (60 * KIB, 700 * KIB, 8 * KIB)] {
            let is_there = |place| rig.there(place, bytes) == state.part(offset, bytes);
            assert!(is_there(offset) || is_there(aside), "{refused}: {offset}");
        }
    }
}

#[test]
fn both_directions_of_the_link_are_busy_while_state_makes_room() {
    // 16 pieces and groups of 32 KiB, 15.6 ms each, in both directions: 250 ms each way.
    let rig = Rig::new(LinkThrottle {
        bandwidth_bytes_per_s: Some(2.0 * 1024.0 * 1024.0),
        per_copy: Duration::ZERO,
    });
    let state = State::new(&rig);
    let groups: Vec<GroupCopy> = (0..16).map(|index| rig.group(index, 32 * KIB)).collect();
    let save = (0..16).map(|index| state.save(&rig, index * 32 * KIB, 32 * KIB)).collect();
    rig.engine.start(Transfer { save, ..transfer(1, groups) }).unwrap();
    let report = rig.report().1.unwrap();
    let took = report.landed_at - report.enqueued_at;
    // One piece late; one after the other it would be 500 ms.
    assert!(took > Duration::from_millis(255) && took < Duration::from_millis(400), "{took:?}");
    state.assert_saved(0, 512 * KIB);
    assert_eq!(rig.there(0, 512 * KIB), patterns(0, 512 * KIB));
}

#[test]
fn no_byte_of_state_is_lost_by_a_failure() {
    let rig = Rig::new(LinkThrottle::default());
    // Save, wait, copy, ring, three times, and what is left of the state.
    for refused in 0..14 {
        let state = State::new(&rig);
        rig.device.until_refusal.store(refused, Ordering::Relaxed);
        let groups = (0..3).map(|index| rig.group(index, 16 * KIB)).collect();
        let save = (0..4).map(|index| state.save(&rig, index * 16 * KIB, 16 * KIB)).collect();
        rig.engine.start(Transfer { save, ..transfer(1, groups) }).unwrap();
        let (id, report) = rig.report();
        assert_eq!(id, TransferId(1));
        report.unwrap_err();
        rig.device.until_refusal.store(usize::MAX, Ordering::Relaxed);
        let asked = std::mem::take(&mut *rig.device.asked.lock().unwrap());
        let last = |name: &str| asked.iter().rfind(|(stream, _)| stream == name).map(|(_, it)| it);
        // The last of all is that wait.
        if last("state").is_some() && refused < 13 {
            assert_eq!(
                last("weights"),
                Some(&Asked::Wait),
                "{refused}: it is reported and still being saved"
            );
        }
        for piece in 0..4 {
            let offset = piece * 16 * KIB;
            if rig.there(offset, 16 * KIB) != state.part(offset, 16 * KIB) {
                state.assert_saved(offset, 16 * KIB);
            }
        }
    }
}

#[test]
fn an_empty_transfer_lands() {
    let rig = Rig::new(LinkThrottle::default());
    rig.device.set_word(&rig.word(3), doorbell::RUNG).unwrap();
    rig.engine.start(Transfer { clear: vec![rig.word(3)], ..transfer(1, vec![]) }).unwrap();
    let report = rig.report().1.unwrap();
    assert_eq!(report.bytes, 0);
    assert_eq!(rig.device.word(&rig.word(3)).unwrap(), doorbell::CLEAR);
}

#[test]
fn what_cannot_be_right_is_refused_and_not_reported() {
    let rig = Rig::new(LinkThrottle::default());
    let other = open_device(DeviceId::Host(1), LinkThrottle::default()).unwrap();
    let foreign = DeviceSlice::new(other.allocate(64).unwrap(), 0, 64).unwrap();

    let mut unequal = rig.group(0, 64);
    unequal.copy.to = rig.copy(0, 65).to;
    let mut wide = rig.group(0, 64);
    wide.doorbell = rig.copy(0, 8).to;
    let mut odd = rig.group(0, 64);
    odd.doorbell = rig.copy(2, 4).to;
    let mut elsewhere = rig.group(0, 64);
    elsewhere.copy.to = foreign;
    for group in [unequal, wide, odd, elsewhere] {
        let error = rig.engine.start(transfer(1, vec![rig.group(1, 64), group])).unwrap_err();
        assert!(matches!(error, TransferError::Device { .. }), "{error}");
    }
    let within = |from, to| CopyWithin { from: rig.copy(from, 100).to, to: rig.copy(to, 100).to };
    let error =
        rig.engine.start(Transfer { set_aside: vec![within(0, 99)], ..transfer(1, vec![]) }).unwrap_err();
    assert!(matches!(error, TransferError::Device { source: DeviceError::OverlappingCopy { .. }, .. }));
    assert!(rig.device.asked.lock().unwrap().is_empty());
    rig.engine.start(transfer(2, vec![rig.group(0, 64)])).unwrap();
    assert_eq!(rig.report().0, TransferId(2));
}

#[test]
fn a_failure_on_the_way_is_reported_once_and_later_transfers_go_on() {
    let rig = Rig::new(LinkThrottle::default());
    for refused in 0..6 {
        rig.device.until_refusal.store(refused, Ordering::Relaxed);
        let groups = (0..3).map(|index| rig.group(index, 4 * KIB)).collect();
        rig.engine.start(transfer(1, groups)).unwrap();
        let (id, report) = rig.report();
        assert_eq!(id, TransferId(1));
        let error = report.unwrap_err();
        assert!(
            matches!(&error, TransferError::Device { source: DeviceError::StreamEnded { .. }, .. }),
            "{error}"
        );
        rig.device.until_refusal.store(usize::MAX, Ordering::Relaxed);
        rig.engine.start(transfer(2, vec![rig.group(0, 4 * KIB)])).unwrap();
        let (id, report) = rig.report();
        assert_eq!(id, TransferId(2));
        report.unwrap();
    }
}

#[test]
fn dropping_the_engine_lands_and_reports_everything() {
    let Rig { device, span, pool, engine, reports } = Rig::new(throttled(16.0 * 1024.0 * 1024.0));
    let group = |index: u64| GroupCopy {
        copy: CopyIn {
            from: HostSlice::new(span.clone(), index * 64 * KIB, 64 * KIB).unwrap(),
            to: DeviceSlice::new(pool.clone(), index * 64 * KIB, 64 * KIB).unwrap(),
        },
        doorbell: DeviceSlice::new(pool.clone(), 1024 * KIB + 4 * index, 4).unwrap(),
    };
    for id in 0..8 {
        engine.start(transfer(id, vec![group(id)])).unwrap();
    }
    drop(engine);
    assert_eq!(reports.try_iter().filter(|(_, report)| report.is_ok()).count(), 8);
    for id in 0..8 {
        assert_eq!(device.word(&group(id).doorbell).unwrap(), doorbell::RUNG);
    }
}

#[test]
fn a_panic_in_the_callback_goes_no_further() {
    let (sender, reports) = mpsc::channel();
    let on_landed: OnLanded = Box::new(move |id, result| {
        assert_ne!(id, TransferId(1), "this is what the test is about");
        sender.send((id, result)).unwrap();
    });
    let rig = Rig::with(LinkThrottle::default(), reports, on_landed);
    rig.engine.start(transfer(1, vec![rig.group(0, 4 * KIB)])).unwrap();
    rig.engine.start(transfer(2, vec![rig.group(1, 4 * KIB)])).unwrap();
    assert_eq!(rig.report().0, TransferId(2));
}
