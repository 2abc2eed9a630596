//! States in a pool that random models come over: every byte is followed, whatever becomes of the transfers.

use std::collections::VecDeque;

use proptest::prelude::*;

use pswitch_device::{DeviceId, LinkThrottle, SharedMemory, open_device};

use super::super::*;

/// States, where they and their memory are, and transfers that are over when a test says so.
struct Simulation {
    states: States,
    /// The part of the pool for states.
    region: Range,
    memory: Memory,
    tasks: Vec<Task>,
    /// In the order of the stream.
    under_way: VecDeque<UnderWay>,
    next_transfer: u64,
    /// Whether nothing has come into the region since everything was there.
    is_home: bool,
    /// Where others came since then.
    came: Vec<Range>,
}

/// All bytes there are.
#[derive(Clone)]
struct Memory {
    pool: Vec<u8>,
    /// One for each task.
    hosts: Vec<Vec<u8>>,
}

struct Task {
    place: Range,
    host: PinnedMemory,
    /// The state that its worker is at, if it has one: which of all it has had.
    state: Option<u8>,
    had: u8,
}

struct UnderWay {
    id: TransferId,
    /// Where something comes; otherwise all is brought back.
    newcomer: Option<Range>,
    copies: Vec<Copied>,
}

#[derive(Debug, Clone, Copy)]
enum Spot {
    Pool(u64),
    Host { task: usize, at: u64 },
}

#[derive(Debug, Clone, Copy)]
struct Copied {
    from: Spot,
    to: Spot,
    bytes: u64,
}

#[derive(Debug, Clone, Copy)]
enum Step {
    /// A model comes over this part of the pool.
    Come {
        at: u64,
        units: u64,
        least_bytes: u64,
        refused: bool,
    },
    BringBack {
        refused: bool,
    },
    /// The first transfer lands or fails.
    End {
        lands: bool,
    },
    /// A worker is lost.
    Lose(usize),
}

/// What is no byte of a state.
const GARBAGE: u8 = 0xFF;
const UNIT_BYTES: u64 = 128;

/// A byte of a state: no two that are some units apart are the same.
fn byte(state: u8, at: u64) -> u8 {
    u8::try_from((at * 31 + u64::from(state) * 7) % 251).unwrap()
}

fn index(at: u64) -> usize {
    usize::try_from(at).unwrap()
}

impl Memory {
    fn at(&mut self, spot: Spot, bytes: u64) -> &mut [u8] {
        let (part, at) = match spot {
            Spot::Pool(at) => (&mut self.pool, at),
            Spot::Host { task, at } => (&mut self.hosts[task], at),
        };
        &mut part[index(at)..index(at + bytes)]
    }

    fn byte(&self, spot: Spot) -> u8 {
        match spot {
            Spot::Pool(at) => self.pool[index(at)],
            Spot::Host { task, at } => self.hosts[task][index(at)],
        }
    }

    fn spoil(&mut self, spot: Spot, bytes: u64) {
        self.at(spot, bytes).fill(GARBAGE);
    }

    fn land(&mut self, transfer: &UnderWay) {
        for Copied { from, to, bytes } in &transfer.copies {
            let moved = self.at(*from, *bytes).to_vec();
            self.at(*to, *bytes).copy_from_slice(&moved);
        }
        if let Some(part) = transfer.newcomer {
            self.spoil(Spot::Pool(part.offset), part.bytes);
        }
    }

    /// Leaves the worst of what a transfer may have done before it failed.
    fn fail(&mut self, transfer: &UnderWay) {
        for Copied { to, bytes, .. } in &transfer.copies {
            self.spoil(*to, *bytes);
        }
        if let Some(part) = transfer.newcomer {
            self.spoil(Spot::Pool(part.offset), part.bytes);
        }
    }
}

impl Simulation {
    /// States of so many units, each so many tensors behind the other; some tensors of the region are behind all.
    fn new(sizes: &[(u64, u64)], tensors_behind: u64, units_outside: u64) -> Self {
        let device = open_device(DeviceId::Host(0), LinkThrottle::default()).unwrap();
        let mut end = 0_u64;
        let mut tasks = Vec::new();
        for (gap, units) in sizes {
            let place = Range::new(end + gap * TENSOR_ALIGNMENT_BYTES, units * UNIT_BYTES);
            end = place.end().next_multiple_of(TENSOR_ALIGNMENT_BYTES);
            let memory = SharedMemory::create("state", place.bytes).unwrap();
            let host = device.pin(Arc::new(memory)).unwrap();
            tasks.push(Task { place, host, state: None, had: 0 });
        }
        let region = Range::new(0, end + tensors_behind * TENSOR_ALIGNMENT_BYTES);
        let pool_bytes = region.bytes + units_outside * UNIT_BYTES;
        let hosts = tasks.iter().map(|task| vec![GARBAGE; index(task.place.bytes)]).collect();
        let states = States::new(device.allocate(pool_bytes).unwrap());
        let memory = Memory { pool: vec![GARBAGE; index(pool_bytes)], hosts };
        let (under_way, next_transfer, is_home, came) = (VecDeque::new(), 0, false, Vec::new());
        let mut simulation = Self { states, region, memory, tasks, under_way, next_transfer, is_home, came };
        simulation.come_home();
        simulation
    }

    /// Everything is there. Whoever has no worker gets one, with a state of its own.
    fn come_home(&mut self) {
        self.is_home = true;
        self.came.clear();
        for task in self.tasks.iter_mut().filter(|task| task.state.is_none()) {
            self.states.add(task.place, task.host.clone());
            task.state = Some(task.had);
            for at in 0..task.place.bytes {
                self.memory.pool[index(task.place.offset + at)] = byte(task.had, at);
            }
            task.had += 1;
        }
    }

    fn take(&mut self, step: Step) {
        match step {
            Step::Come { at, units, least_bytes, refused } => {
                let pool_bytes = self.memory.pool.len() as u64;
                let bytes = (units * UNIT_BYTES).min(pool_bytes);
                let begin = (at * UNIT_BYTES) % (pool_bytes - bytes + UNIT_BYTES);
                self.come(Range::new(begin, bytes), least_bytes, refused);
            }
            Step::BringBack { refused } => self.bring_back(refused),
            Step::End { lands } => self.end(lands),
            Step::Lose(nth) => {
                let nth = nth % self.tasks.len();
                self.tasks[nth].state = None;
                self.states.remove(self.tasks[nth].place);
            }
        }
        self.check();
    }

    /// As the driver does it, who lets nobody come over what is on its way.
    fn come(&mut self, part: Range, least_bytes: u64, refused: bool) {
        let is_over_states = part.overlaps(&self.region);
        let is_in_the_way =
            |it: &UnderWay| it.newcomer.map_or(is_over_states, |newcomer| newcomer.overlaps(&part));
        if self.under_way.iter().any(is_in_the_way) {
            return;
        }
        let unused = (is_over_states && self.is_home).then_some(Unused { range: self.region, least_bytes });
        // Those who decide who may come know nothing of refusals: all has to be brought back first.
        self.is_home &= !is_over_states;
        let id = self.number();
        let MadeRoom { save, set_aside } = self.states.make_room(id, part, unused).unwrap();
        assert!(set_aside.is_empty() || (unused.is_some() && save.is_empty()));
        let saved = save.iter().map(|copy| Copied {
            from: Spot::Pool(copy.from.offset()),
            to: self.on_host(&copy.to),
            bytes: copy.from.bytes(),
        });
        let copies = saved.chain(set_aside.iter().map(within)).collect();
        self.start(UnderWay { id, newcomer: Some(part), copies }, refused);
        self.came.extend((is_over_states && !refused).then_some(part));
    }

    /// As the driver does it, who waits until nobody is on his way to where states belong.
    fn bring_back(&mut self, refused: bool) {
        let is_in_the_way = |it: &UnderWay| it.newcomer.is_none_or(|it| it.overlaps(&self.region));
        if self.is_home || self.under_way.iter().any(is_in_the_way) {
            return;
        }
        let id = self.number();
        let back = self.states.bring_back(id, vec![]).unwrap();
        let from_host = back.copies.iter().map(|copy| Copied {
            from: self.on_host(&copy.from),
            to: Spot::Pool(copy.to.offset()),
            bytes: copy.from.bytes(),
        });
        let copies = from_host.chain(back.within.iter().map(within)).collect();
        self.start(UnderWay { id, newcomer: None, copies }, refused);
    }

    fn number(&mut self) -> TransferId {
        self.next_transfer += 1;
        TransferId(self.next_transfer)
    }

    fn on_host(&self, slice: &HostSlice) -> Spot {
        let is_its = |task: &Task| Arc::ptr_eq(task.host.memory(), slice.memory().memory());
        Spot::Host { task: self.tasks.iter().position(is_its).unwrap(), at: slice.offset() }
    }

    fn start(&mut self, transfer: UnderWay, refused: bool) {
        if refused {
            self.states.refused(transfer.id);
        } else {
            self.under_way.push_back(transfer);
        }
    }

    fn end(&mut self, lands: bool) {
        let Some(transfer) = self.under_way.pop_front() else { return };
        let moves_something = !transfer.copies.is_empty();
        if lands {
            self.memory.land(&transfer);
            assert_eq!(self.states.landed(transfer.id), moves_something || transfer.newcomer.is_none());
            if transfer.newcomer.is_none() {
                let is_empty = |state: &State| state.out.is_empty();
                assert!(self.states.account().states.values().all(is_empty));
                self.come_home();
            }
            return;
        }
        self.memory.fail(&transfer);
        let lost = self.states.failed(transfer.id);
        for (nth, task) in self.tasks.iter_mut().enumerate().filter(|(_, task)| lost.contains(&task.place)) {
            let mut moved = transfer.copies.iter().map(|copy| match (copy.from, copy.to) {
                (_, Spot::Host { task, .. }) => task == nth,
                (Spot::Pool(at), _) => task.place.contains(&Range::new(at, copy.bytes)),
                (Spot::Host { .. }, _) => false,
            });
            assert!(moved.any(|is_its| is_its), "{} is given up for nothing", task.place);
            task.state = None;
        }
    }

    fn check(&self) {
        let account = self.states.account();
        let places: Vec<Range> = account.states.values().map(|state| state.place).collect();
        let alive = self.tasks.iter().filter(|task| task.state.is_some()).map(|task| task.place);
        assert_eq!(places, alive.collect::<Vec<_>>());
        let asides = || account.states.values().flat_map(|state| &state.out).filter_map(Out::lies);
        for (nth, aside) in asides().enumerate() {
            assert!(self.region.contains(&aside));
            let mut others = asides().take(nth).chain(places.iter().chain(&self.came).copied());
            assert!(others.all(|other| !other.overlaps(&aside)), "{aside} is somebody else's");
        }
        let mut then = self.memory.clone();
        self.under_way.iter().for_each(|transfer| then.land(transfer));
        for (nth, task) in self.tasks.iter().enumerate() {
            let (Some(number), Some(state)) = (task.state, account.states.get(&task.place.offset)) else {
                continue;
            };
            for at in task.place.offset..task.place.end() {
                let byte = byte(number, at - task.place.offset);
                let lies = |out: Option<&Out>| match out {
                    None => Spot::Pool(at),
                    Some(Out { part, aside: Some(aside) }) => Spot::Pool(aside + at - part.offset),
                    Some(_) => Spot::Host { task: nth, at: at - task.place.offset },
                };
                let one = Range::new(at, 1);
                let mut outs = state.out.iter().filter(|out| out.part.contains(&one));
                let out = outs.next();
                assert!(outs.next().is_none(), "{at} is in two places: {state:?}");
                assert_eq!(then.byte(lies(out)), byte, "{at} of {state:?} when all has landed");
                // What is on its way is where the first transfer found it that moves it.
                let first = account.leaving.values().flatten().find(|leaving| leaving.part.contains(&one));
                let before = first.map(|leaving| Out { part: leaving.part, aside: leaving.before });
                let now = before.map_or(out.copied(), |out| out.aside.is_some().then_some(out));
                assert_eq!(self.memory.byte(lies(now.as_ref())), byte, "{at} of {state:?} now");
            }
        }
    }
}

fn within(copy: &CopyWithin) -> Copied {
    let (from, to) = (Spot::Pool(copy.from.offset()), Spot::Pool(copy.to.offset()));
    Copied { from, to, bytes: copy.from.bytes() }
}

fn steps() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => (0..200_u64, 1..24_u64, prop_oneof![4 => Just(0), 1 => 0..4096_u64], 0..5_u8).prop_map(
            |(at, units, least_bytes, luck)| Step::Come { at, units, least_bytes, refused: luck == 0 },
        ),
        3 => (0..5_u8).prop_map(|luck| Step::BringBack { refused: luck == 0 }),
        8 => (0..6_u8).prop_map(|luck| Step::End { lands: luck > 0 }),
        1 => (0..3_usize).prop_map(Step::Lose),
    ]
}

proptest! {
    /// Whatever comes over states, lands, is refused or fails: those that are not given up are where the account has them, and
    /// whole.
    #[test]
    fn the_account_is_right_of_every_byte(
        sizes in proptest::collection::vec((0..5_u64, 1..17_u64), 1..4),
        tensors_behind in 0..10_u64,
        units_outside in 0..12_u64,
        steps in proptest::collection::vec(steps(), 1..60),
    ) {
        let mut simulation = Simulation::new(&sizes, tensors_behind, units_outside);
        for step in steps {
            simulation.take(step);
        }
        // Nothing more goes wrong.
        while !simulation.under_way.is_empty() {
            simulation.take(Step::End { lands: true });
        }
        simulation.take(Step::BringBack { refused: false });
        simulation.take(Step::End { lands: true });
        prop_assert!(simulation.is_home);
    }
}
