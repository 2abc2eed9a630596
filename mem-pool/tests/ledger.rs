//! Random histories of a ledger, against its own invariants and a plain model of what should happen.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use pswitch_mem_pool::{
    ArenaId, Home, Lease, Ledger, ModelId, PoolError, PoolLayout, Range, Residency, TENSOR_ALIGNMENT_BYTES,
};

const MODELS: u32 = 6;
const ARENAS: u32 = 3;

/// A pool whose doorbells run out, too.
fn layout(homes_bytes: u64) -> PoolLayout {
    let homes = Range::new(512, homes_bytes);
    let arenas = (0..u64::from(ARENAS)).map(|index| Range::new(homes.end() + index * 512, 512)).collect();
    PoolLayout { doorbells: Range::new(0, 64), homes, arenas, training: Range::default() }
}

/// The same with that many bytes of the homes for training.
fn layout_with_training(homes_bytes: u64, training_bytes: u64) -> PoolLayout {
    layout(homes_bytes).with_training_in_homes(training_bytes).unwrap()
}

#[derive(Debug, Clone)]
enum Step {
    Place {
        model: ModelId,
        span_bytes: u64,
        doorbells: u32,
    },
    Remove(ModelId),
    /// To this offset of the pool, of which some are no places.
    Rehome(ModelId, u64),
    /// To where there is room if these are evicted.
    FindRoom(ModelId, Vec<ModelId>),
    DropOut(ModelId),
    BeginMove(ModelId),
    FinishMove(ModelId),
    FailMove(ModelId),
    Hold(ModelId),
    LetGo(ModelId),
    Lease(ModelId, ArenaId),
    /// Releases the lease at this place, modulo how many there are.
    Release(usize),
}

fn step() -> impl Strategy<Value = Step> {
    let model = || (0..=MODELS).prop_map(|id| if id < MODELS { ModelId(id) } else { ModelId::TRAINING });
    prop_oneof![
        2 => model().prop_map(Step::Hold),
        2 => model().prop_map(Step::LetGo),
        3 => (model(), 0_u64..6_000, 0_u32..7)
            .prop_map(|(model, span_bytes, doorbells)| Step::Place { model, span_bytes, doorbells }),
        1 => model().prop_map(Step::Remove),
        2 => (model(), 0_u64..24, 0_u64..2).prop_map(|(model, at, off)| Step::Rehome(model, at * 512 + off * 100)),
        4 => (model(), prop::collection::vec(model(), 0..4))
            .prop_map(|(model, victims)| Step::FindRoom(model, victims)),
        1 => model().prop_map(Step::DropOut),
        6 => model().prop_map(Step::BeginMove),
        5 => model().prop_map(Step::FinishMove),
        1 => model().prop_map(Step::FailMove),
        5 => (model(), 0..ARENAS + 1).prop_map(|(model, arena)| Step::Lease(model, ArenaId(arena))),
        4 => any::<usize>().prop_map(Step::Release),
    ]
}

/// What a ledger should know, kept the plain way.
#[derive(Debug, Default)]
struct Expected {
    models: BTreeMap<ModelId, (Home, Residency)>,
    leases: Vec<Lease>,
    held: BTreeSet<ModelId>,
}

impl Expected {
    fn state(&self, model: ModelId) -> Option<Residency> {
        self.models.get(&model).map(|&(_, state)| state)
    }

    fn set(&mut self, model: ModelId, state: Residency) {
        self.models.get_mut(&model).unwrap().1 = state;
    }

    fn is_leased(&self, model: ModelId) -> bool {
        self.held.contains(&model) || self.leases.iter().any(|lease| lease.model() == model)
    }

    /// The models in the pool that share a byte with `model`'s home.
    fn in_place_of(&self, model: ModelId) -> Vec<ModelId> {
        let span = self.models[&model].0.span;
        let others = self.models.iter().filter(|&(&other, _)| other != model);
        others
            .filter(|(_, (home, state))| *state != Residency::Host && home.span.overlaps(&span))
            .map(|(&other, _)| other)
            .collect()
    }

    fn is_held(&self, model: ModelId) -> bool {
        self.is_leased(model) || self.state(model) == Some(Residency::Moving)
    }
}

fn take(ledger: &mut Ledger, expected: &mut Expected, step: Step) -> Result<(), TestCaseError> {
    use Residency::{Host, Moving, Resident};
    let before = ledger.report();
    let refused = match step {
        Step::Place { model, span_bytes, doorbells } => match ledger.place(model, span_bytes, doorbells) {
            Ok(home) => {
                prop_assert_eq!(expected.state(model), None);
                prop_assert_eq!(home.span.bytes, span_bytes);
                prop_assert_eq!(home.span.offset % TENSOR_ALIGNMENT_BYTES, 0);
                prop_assert_eq!(home.doorbells.bytes, u64::from(doorbells) * 4);
                expected.models.insert(model, (home, Host));
                None
            }
            Err(error) => {
                match error {
                    PoolError::ModelExists { .. } => prop_assert!(expected.state(model).is_some()),
                    PoolError::NeverFits { asked_bytes, capacity_bytes, .. } => {
                        prop_assert_eq!(asked_bytes, span_bytes);
                        prop_assert!(asked_bytes.next_multiple_of(512) > capacity_bytes);
                    }
                    PoolError::NoDoorbells { free, .. } => prop_assert_eq!(free, 16 - before.doorbells),
                    ref other => prop_assert!(false, "{other:?}"),
                }
                Some(error)
            }
        },
        Step::Remove(model) => {
            let done = ledger.remove(model);
            let may = matches!(expected.state(model), Some(Host | Resident)) && !expected.is_leased(model);
            prop_assert_eq!(done.is_ok(), may);
            if may {
                expected.models.remove(&model);
            }
            done.err()
        }
        Step::Rehome(model, offset) => {
            let done = ledger.rehome(model, offset);
            let homes_end = 512 + before.homes_bytes;
            let fits = expected.models.get(&model).is_some_and(|(home, _)| {
                offset >= 512 && offset + home.span.bytes <= homes_end && offset.is_multiple_of(512)
            });
            let may = expected.state(model) == Some(Host) && model != ModelId::TRAINING && fits;
            prop_assert_eq!(done.is_ok(), may, "{:?}", done);
            if may {
                expected.models.get_mut(&model).unwrap().0.span.offset = offset;
            }
            done.err()
        }
        Step::FindRoom(model, victims) => match ledger.find_room(model, &victims) {
            Ok(Some(span)) => {
                let homes = Range::new(512, before.homes_bytes);
                prop_assert!(homes.contains(&span) && span.offset.is_multiple_of(512));
                prop_assert_eq!(span.bytes, expected.models[&model].0.span.bytes);
                for (other, (home, state)) in &expected.models {
                    let stays = *other != model && *state != Host && !victims.contains(other);
                    prop_assert!(!stays || !home.span.overlaps(&span), "{other} stays and is in the way");
                }
                if expected.state(model) == Some(Host) && model != ModelId::TRAINING {
                    prop_assert_eq!(ledger.rehome(model, span.offset), Ok(()));
                    expected.models.get_mut(&model).unwrap().0.span = span;
                }
                None
            }
            Ok(None) => None,
            Err(error) => {
                let known = |id: &ModelId| expected.models.contains_key(id);
                prop_assert!(!known(&model) || !victims.iter().all(known));
                Some(error)
            }
        },
        Step::DropOut(model) => {
            let done = ledger.drop_out(model);
            let may = expected.state(model) == Some(Resident) && !expected.is_leased(model);
            prop_assert_eq!(done.is_ok(), may);
            if may {
                expected.set(model, Host);
            }
            done.err()
        }
        Step::BeginMove(model) => {
            let done = ledger.begin_move(model);
            if expected.state(model) == Some(Host) {
                let in_place = expected.in_place_of(model);
                let holders: Vec<_> =
                    in_place.iter().copied().filter(|&other| expected.is_held(other)).collect();
                if holders.is_empty() {
                    prop_assert_eq!(&done, &Ok(in_place.clone()));
                    in_place.into_iter().for_each(|evicted| expected.set(evicted, Host));
                    expected.set(model, Moving);
                } else {
                    let asked_bytes = expected.models[&model].0.span.bytes;
                    prop_assert_eq!(
                        &done,
                        &Err(PoolError::PlaceHeld { model, asked_bytes, held_by: holders })
                    );
                }
            } else {
                prop_assert!(done.is_err());
            }
            done.err()
        }
        Step::FinishMove(model) => {
            let done = ledger.finish_move(model);
            prop_assert_eq!(done.is_ok(), expected.state(model) == Some(Moving));
            if done.is_ok() {
                expected.set(model, Resident);
            }
            done.err()
        }
        Step::FailMove(model) => {
            let done = ledger.fail_move(model);
            let may = expected.state(model) == Some(Moving) && !expected.is_leased(model);
            prop_assert_eq!(done.is_ok(), may);
            if may {
                expected.set(model, Host);
            }
            done.err()
        }
        Step::Hold(model) => {
            let done = ledger.hold(model);
            let may = expected.state(model) == Some(Resident) && !expected.held.contains(&model);
            prop_assert_eq!(done.is_ok(), may);
            if may {
                expected.held.insert(model);
            }
            done.err()
        }
        Step::LetGo(model) => {
            let done = ledger.let_go(model);
            prop_assert_eq!(done.is_ok(), expected.held.remove(&model));
            done.err()
        }
        Step::Lease(model, arena) => {
            let in_pool = matches!(expected.state(model), Some(Moving | Resident));
            let free = arena.0 < ARENAS && expected.leases.iter().all(|lease| lease.arena() != arena);
            prop_assert_eq!(ledger.is_arena_free(arena), free);
            match ledger.lease(model, arena) {
                Ok(lease) => {
                    prop_assert!(in_pool && free);
                    prop_assert_eq!((lease.model(), lease.arena()), (model, arena));
                    expected.leases.push(lease);
                    None
                }
                Err(error) => {
                    prop_assert!(!(in_pool && free), "{error:?}");
                    Some(error)
                }
            }
        }
        Step::Release(index) => {
            if !expected.leases.is_empty() {
                let lease = expected.leases.swap_remove(index % expected.leases.len());
                prop_assert_eq!(ledger.release(lease), Ok(()));
            }
            None
        }
    };
    if let Some(error) = refused {
        prop_assert_eq!(ledger.report(), before, "a refusal ({}) changed something", error);
    }
    Ok(())
}

/// What must hold whatever happened, looked up in the report alone.
fn look(ledger: &Ledger, expected: &Expected) -> Result<(), TestCaseError> {
    ledger.check().map_err(TestCaseError::fail)?;
    let report = ledger.report();
    let known: BTreeMap<_, _> = report.models.iter().map(|it| (it.model, (it.home, it.state))).collect();
    prop_assert_eq!(&known, &expected.models);
    for (index, one) in report.models.iter().enumerate() {
        let leases = expected.leases.iter().filter(|lease| lease.model() == one.model).count();
        prop_assert_eq!(one.leases, leases + usize::from(expected.held.contains(&one.model)));
        prop_assert!(!expected.held.contains(&one.model) || one.state == Residency::Resident);
        prop_assert!(leases == 0 || one.state != Residency::Host, "a leased span was evicted");
        for other in &report.models[index + 1..] {
            prop_assert!(!one.home.doorbells.overlaps(&other.home.doorbells), "a doorbell is shared");
            let both = one.state != Residency::Host && other.state != Residency::Host;
            prop_assert!(!(both && one.home.span.overlaps(&other.home.span)), "two spans share bytes");
        }
    }
    let arenas: BTreeSet<ArenaId> = expected.leases.iter().map(Lease::arena).collect();
    prop_assert_eq!(arenas.len(), expected.leases.len(), "an arena is held twice");
    for it in &report.arenas {
        let holder = expected.leases.iter().find(|lease| lease.arena() == it.arena);
        prop_assert_eq!(it.held_by, holder.map(Lease::model));
    }
    let free = (0..ARENAS).map(ArenaId).find(|arena| !arenas.contains(arena));
    prop_assert_eq!(ledger.free_arena(), free);
    let bytes = |state| -> u64 {
        expected.models.values().filter(|(_, it)| *it == state).map(|(home, _)| home.span.bytes).sum()
    };
    prop_assert_eq!(report.resident_bytes, bytes(Residency::Resident));
    prop_assert_eq!(report.moving_bytes, bytes(Residency::Moving));
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn histories_keep_all_invariants(
        homes in 1_u64..20,
        training in 0_u64..10,
        steps in prop::collection::vec(step(), 0..150),
    ) {
        let layout = layout_with_training(homes * 512, training.min(homes) * 512);
        let mut ledger = Ledger::new(&layout);
        let mut expected = Expected::default();
        if layout.training_gives_way() {
            let home = Home { span: layout.training, doorbells: Range::new(0, 0) };
            expected.models.insert(ModelId::TRAINING, (home, Residency::Resident));
        }
        for step in steps {
            take(&mut ledger, &mut expected, step)?;
            look(&ledger, &expected)?;
        }
        // Everything can be given back.
        for lease in std::mem::take(&mut expected.leases) {
            prop_assert_eq!(ledger.release(lease), Ok(()));
        }
        for model in std::mem::take(&mut expected.held) {
            prop_assert_eq!(ledger.let_go(model), Ok(()));
        }
        for (model, (_, state)) in std::mem::take(&mut expected.models) {
            if state == Residency::Moving {
                prop_assert_eq!(ledger.fail_move(model), Ok(()));
            }
            prop_assert_eq!(ledger.remove(model), Ok(()));
        }
        look(&ledger, &expected)?;
        prop_assert_eq!(ledger.report().doorbells, 0);
    }

    /// As long as the sum of all spans fits, no two homes overlap; then all can be resident at once.
    #[test]
    fn nothing_overlaps_while_everything_fits(homes in 1_u64..40, spans in prop::collection::vec(0_u64..8_000, 0..12)) {
        let mut ledger = Ledger::new(&layout(homes * 512));
        let mut placed: Vec<Home> = vec![];
        let mut needed = 0;
        for (model, span_bytes) in (0..).map(ModelId).zip(spans) {
            needed += span_bytes.next_multiple_of(512);
            if needed > homes * 512 {
                break;
            }
            let home = ledger.place(model, span_bytes, 1).unwrap();
            prop_assert!(placed.iter().all(|other| !other.span.overlaps(&home.span)));
            placed.push(home);
            prop_assert_eq!(ledger.begin_move(model), Ok(vec![]));
            ledger.finish_move(model).unwrap();
        }
    }
}

fn resident(ledger: &mut Ledger, model: ModelId) -> Vec<ModelId> {
    let evicted = ledger.begin_move(model).unwrap();
    ledger.finish_move(model).unwrap();
    evicted
}

#[test]
fn a_newcomer_evicts_what_lies_in_its_place_and_nothing_else() {
    let mut ledger = Ledger::new(&layout(4 * 512));
    let [a, b, c] = [0, 1, 2].map(ModelId);
    ledger.place(a, 1024, 1).unwrap();
    ledger.place(b, 1024, 1).unwrap();
    // No place is left: it takes that of one of them.
    ledger.place(c, 512, 1).unwrap();
    resident(&mut ledger, a);
    resident(&mut ledger, b);
    assert_eq!(resident(&mut ledger, c), [a]);
    assert_eq!(ledger.state(b), Ok(Residency::Resident));
    assert_eq!(resident(&mut ledger, a), [c]);
}

#[test]
fn a_model_on_the_host_can_be_given_another_place() {
    let mut ledger = Ledger::new(&layout_with_training(6 * 512, 512));
    let [a, b, c] = [0, 1, 2].map(ModelId);
    for model in [a, b, c] {
        ledger.place(model, 1000, 1).unwrap();
    }
    let own = ledger.home(c).unwrap();
    // Behind training lie a and b; for c there is no room beside them.
    assert_eq!(own.span, Range::new(2560, 1000));
    resident(&mut ledger, a);
    resident(&mut ledger, b);
    assert_eq!(ledger.find_room(c, &[]), Ok(None));
    assert_eq!(ledger.find_room(c, &[b, a]), Ok(Some(Range::new(2048, 1000))));
    ledger.rehome(c, 2048).unwrap();
    assert_eq!(resident(&mut ledger, c), [b]);
    assert_eq!(ledger.home(c), Ok(Home { span: Range::new(2048, 1000), ..own }));
    assert_eq!(ledger.own_place(c), Ok(own.span));
    ledger.check().unwrap();

    let refusals = [(a, 512), (b, 4096), (b, 600), (ModelId::TRAINING, 512)].map(|(model, offset)| {
        if model == ModelId::TRAINING {
            ledger.drop_out(model).unwrap();
        }
        ledger.rehome(model, offset).unwrap_err().to_string()
    });
    assert_eq!(
        refusals,
        [
            "model 0 cannot be given another place: its state is resident, it must be host",
            "1000 bytes at offset 4096 are outside the 3072 bytes of the homes",
            "600 is no place to begin at: it must be a multiple of 512 bytes from the begin of the homes",
            "the place of training is fixed",
        ]
    );
}

#[test]
fn models_lie_beside_training_while_there_is_room_and_then_in_its_place() {
    let mut ledger = Ledger::new(&layout_with_training(4 * 512, 2 * 512));
    let [beside, over] = [0, 1].map(ModelId);
    ledger.place(beside, 1024, 1).unwrap();
    ledger.place(over, 512, 1).unwrap();
    assert_eq!(resident(&mut ledger, beside), []);
    ledger.hold(ModelId::TRAINING).unwrap();
    assert_eq!(
        ledger.begin_move(over).unwrap_err().to_string(),
        "model 1 (512 bytes) does not fit now: its place is held by training; try again when they have finished"
    );
    ledger.let_go(ModelId::TRAINING).unwrap();
    assert_eq!(resident(&mut ledger, over), [ModelId::TRAINING]);
    assert_eq!(resident(&mut ledger, ModelId::TRAINING), [over]);
    assert_eq!(ledger.state(beside), Ok(Residency::Resident));
}

#[test]
fn holders_are_named() {
    let mut ledger = Ledger::new(&layout(2 * 512));
    let [a, b, c] = [0, 1, 2].map(ModelId);
    ledger.place(a, 512, 1).unwrap();
    ledger.place(b, 512, 1).unwrap();
    ledger.place(c, 1024, 1).unwrap();
    resident(&mut ledger, a);
    let lease = ledger.lease(a, ArenaId(0)).unwrap();
    ledger.begin_move(b).unwrap();
    let error = ledger.begin_move(c).unwrap_err();
    assert_eq!(
        error.to_string(),
        "model 2 (1024 bytes) does not fit now: its place is held by model 0, model 1; try again when they have finished"
    );
    ledger.finish_move(b).unwrap();
    ledger.release(lease).unwrap();
    assert_eq!(ledger.begin_move(c), Ok(vec![a, b]));
}

#[test]
fn what_can_never_fit_is_said_at_once() {
    let mut ledger = Ledger::new(&layout(2 * 512));
    assert_eq!(
        ledger.place(ModelId(7), 1025, 1).unwrap_err().to_string(),
        "the span of model 7 needs 1025 bytes and can never fit: there are 1024 bytes in all; make the pool larger, or \
         the arenas smaller or fewer"
    );
    assert!(matches!(ledger.place(ModelId(7), u64::MAX, 1), Err(PoolError::NeverFits { .. })));
    // 16 words in all: 17 never fit, 10 and 10 not at once.
    assert!(matches!(ledger.place(ModelId(7), 512, 17), Err(PoolError::NeverFits { asked_bytes: 68, .. })));
    ledger.place(ModelId(0), 512, 10).unwrap();
    assert_eq!(
        ledger.place(ModelId(7), 512, 10),
        Err(PoolError::NoDoorbells { model: ModelId(7), asked: 10, free: 6, capacity: 16 })
    );
    // A refused model has left nothing behind.
    ledger.place(ModelId(7), 512, 6).unwrap();
}

#[test]
fn wrong_transitions_are_named() {
    let mut ledger = Ledger::new(&layout(512));
    let model = ModelId(0);
    assert_eq!(ledger.begin_move(model), Err(PoolError::UnknownModel { model }));
    ledger.place(model, 512, 1).unwrap();
    assert_eq!(
        ledger.lease(model, ArenaId(0)).unwrap_err().to_string(),
        "model 0 cannot be leased: its state is host, it must be moving or resident"
    );
    ledger.begin_move(model).unwrap();
    let lease = ledger.lease(model, ArenaId(1)).unwrap();
    assert_eq!(
        ledger.lease(model, ArenaId(1)).unwrap_err(),
        PoolError::ArenaBusy { arena: ArenaId(1), held_by: model }
    );
    assert!(matches!(ledger.fail_move(model), Err(PoolError::Leased { leases: 1, .. })));
    ledger.release(lease).unwrap();
    ledger.fail_move(model).unwrap();
    assert!(matches!(ledger.finish_move(model), Err(PoolError::WrongState { .. })));
    ledger.begin_move(model).unwrap();
    let arena = ArenaId(ARENAS);
    assert_eq!(ledger.lease(model, arena), Err(PoolError::UnknownArena { arena, arenas: 3 }));
    assert!(!ledger.is_arena_free(arena));
}

#[test]
fn a_lease_goes_back_to_the_ledger_that_gave_it() {
    let [mut ours, mut other] = [0, 1].map(|_| Ledger::new(&layout(512)));
    for ledger in [&mut ours, &mut other] {
        ledger.place(ModelId(0), 512, 0).unwrap();
        resident(ledger, ModelId(0));
    }
    let first = ours.lease(ModelId(0), ArenaId(0)).unwrap();
    let (model, arena) = (first.model(), first.arena());
    assert_eq!(other.release(first), Err(PoolError::UnknownLease { model, arena }));
    other.check().unwrap();
}

#[test]
fn a_report_is_a_table() {
    let mut ledger = Ledger::new(&layout(4 * 512));
    ledger.place(ModelId(0), 1024, 3).unwrap();
    ledger.place(ModelId(1), 700, 2).unwrap();
    resident(&mut ledger, ModelId(0));
    let lease = ledger.lease(ModelId(0), ArenaId(1)).unwrap();
    let table = ledger.report().to_string();
    assert_eq!(
        table,
        "\
model        state     leases         offset          bytes doorbells
model 0      resident       1            512           1024         3
model 1      host           0           1536            700         2
arena 0      free                       2560            512
arena 1      held by model 0            3072            512
arena 2      free                       3584            512
1024 bytes resident, 0 moving, 1724 placed in 2048; 5 of 16 doorbells in use"
    );
    ledger.release(lease).unwrap();
}
