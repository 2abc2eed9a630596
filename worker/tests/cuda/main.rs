//! A worker on a real GPU, told what to do by a test instead of a controller.
//!
//! Behind the feature `cuda-tests`, since it fails where there is no GPU. The programs and what eager PyTorch made of them
//! on the same GPU lie in the folder that `PSWITCH_FIXTURES` names; `python -m pswitch.gpu_models --fixtures` makes it.

mod desk;

use std::os::fd::AsFd as _;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use pswitch_protocol::{Channel, FaultClass};
use pswitch_worker::serve;

use desk::{Arrival, Case, Desk, OTHER_HOME, OWN_HOME, fixture, folders, is_refused, writes_to_weights};

/// One GPU, one worker at a time: what one test measures another would disturb.
static TURN: Mutex<()> = Mutex::new(());

fn turn() -> MutexGuard<'static, ()> {
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

#[test]
#[ignore = "the worker process that the other tests start"]
fn worker_process() {
    let socket = std::io::stdin().as_fd().try_clone_to_owned().expect("standard input is the channel");
    if let Err(error) = serve(&Channel::from_fd(socket)) {
        eprintln!("the worker ends: {error}");
        // As the zygote's workers end: exit handlers would wait for a stream that is stuck.
        // SAFETY: no preconditions.
        unsafe { libc::_exit(3) }
    }
}

/// Every program in every way in which weights can come: each layer by itself, all at once, already there; and to another
/// place than the one that it was built over.
#[test]
fn outputs_are_those_of_eager_pytorch_on_this_gpu() {
    let _turn = turn();
    let mut desk = Desk::new();
    let mut wrong = Vec::new();
    let mut compared = 0;
    for folder in folders() {
        let name = folder.file_name().unwrap().to_string_lossy().into_owned();
        let model = match desk.load(&folder) {
            Ok(model) => model,
            // The same is refused on the CPU.
            Err(reason) if is_refused(&folder) || reason.contains("eval mode") => continue,
            Err(reason) => {
                wrong.push(format!("{name}: {reason}"));
                continue;
            }
        };
        let writes = writes_to_weights(&folder);
        for case in Case::all(&folder) {
            if case.raises() {
                continue;
            }
            for (home, arrival) in [
                (OWN_HOME, Arrival::EveryLayer),
                (OWN_HOME, Arrival::Whole),
                (OWN_HOME, Arrival::Resident),
                (OWN_HOME, Arrival::HostTables),
                (OTHER_HOME, Arrival::EveryLayer),
                (OTHER_HOME, Arrival::Resident),
                (OTHER_HOME, Arrival::HostTables),
                (OWN_HOME, Arrival::EveryLayer),
            ] {
                desk.home = home;
                let ended = desk.run(model, &case, arrival).map_err(|fault| fault.message);
                match ended.map(|outputs| case.difference(&outputs)) {
                    Err(refusal) if writes && refusal.contains("write to the model's weights") => {}
                    Ok(None) if !writes => compared += 1,
                    Ok(None) => {
                        wrong.push(format!("{name} {case} {arrival:?} at {home}: it wrote to weights"))
                    }
                    Ok(Some(difference)) | Err(difference) => {
                        // At once: whatever kills the test later, this is known.
                        eprintln!("{name} {case} {arrival:?} at {home}: {difference}");
                        wrong.push(format!("{name} {case} {arrival:?} at {home}: {difference}"));
                    }
                }
            }
        }
        desk.unload(model);
    }
    println!("{compared} executions compared");
    assert!(wrong.is_empty(), "{} differ:\n{}", wrong.len(), wrong.join("\n"));
    assert!(compared > 0, "there was nothing to compare");
}

/// A desk that has built a fixture, whose turn it is, and the fixture's cases.
fn loaded(name: &str) -> (MutexGuard<'static, ()>, Desk, u32, Vec<Case>) {
    let turn = turn();
    let folder = fixture(name);
    let mut desk = Desk::new();
    let model = desk.load(&folder).unwrap();
    (turn, desk, model, Case::all(&folder))
}

#[test]
fn executions_allocate_nothing_outside_of_the_pool() {
    let (_turn, mut desk, model, cases) = loaded("resnet18");
    let case = &cases[0];
    desk.run(model, case, Arrival::EveryLayer).unwrap();
    desk.run(model, case, Arrival::Resident).unwrap();
    let (allocations, graphs) = (desk.outside_allocations(), desk.graphs());
    let free_bytes = desk.free_bytes();
    for _ in 0..100 {
        desk.run(model, case, Arrival::EveryLayer).unwrap();
        desk.run(model, case, Arrival::Resident).unwrap();
    }
    assert_eq!((desk.outside_allocations(), desk.graphs()), (allocations, graphs));
    assert_eq!(desk.free_bytes(), free_bytes);
}

#[test]
fn a_batch_size_is_captured_when_it_comes_again_and_kept() {
    let (_turn, mut desk, model, cases) = loaded("resnet18-dynamic");
    assert!(cases.len() > 1);
    desk.run(model, &cases[0], Arrival::EveryLayer).unwrap();
    let at_load = desk.graphs();
    for _ in 0..2 {
        for case in &cases {
            let outputs = desk.run(model, case, Arrival::Resident).unwrap();
            assert_eq!(case.difference(&outputs), None, "{case}");
        }
    }
    let graphs = desk.graphs();
    assert!(graphs > at_load, "what comes twice is captured");
    for case in &cases {
        let outputs = desk.run(model, case, Arrival::Resident).unwrap();
        assert_eq!(case.difference(&outputs), None, "{case}");
    }
    assert_eq!(desk.graphs(), graphs, "graphs are kept");
}

#[test]
fn an_execution_in_another_home_is_captured_when_it_comes_again_and_kept() {
    let (_turn, mut desk, model, cases) = loaded("resnet18");
    let case = &cases[0];
    let run = |desk: &mut Desk, home: u64| {
        desk.home = home;
        for arrival in [Arrival::EveryLayer, Arrival::Resident] {
            let outputs = desk.run(model, case, arrival).unwrap();
            assert_eq!(case.difference(&outputs), None, "{arrival:?} at {home}");
        }
        desk.graphs()
    };
    let own = run(&mut desk, OWN_HOME);
    let once = run(&mut desk, OTHER_HOME);
    let both = run(&mut desk, OTHER_HOME);
    assert!(own < once && once < both, "the second one elsewhere is captured, and then the first");
    for home in [OWN_HOME, OTHER_HOME, OWN_HOME] {
        assert_eq!(run(&mut desk, home), both, "graphs of either home are kept");
    }
}

#[test]
fn what_is_held_back_computes_when_it_is_let_go() {
    let (_turn, mut desk, model, cases) = loaded("resnet18");
    let case = &cases[0];
    desk.run(model, case, Arrival::EveryLayer).unwrap();
    desk.held_back = true;
    for arrival in [Arrival::EveryLayer, Arrival::Resident] {
        desk.let_go(false);
        desk.wipe_outputs();
        desk.begin(model, case, arrival);
        assert!(desk.is_silent(Duration::from_millis(300)), "{arrival:?}: it is held back");
        desk.let_go(true);
        let outputs = desk.finish(model).unwrap();
        assert_eq!(case.difference(&outputs), None, "{arrival:?}");
        // Nobody takes the word back before somebody else is to wait.
        desk.wipe_outputs();
        let begun = Instant::now();
        let outputs = desk.run(model, case, Arrival::Resident).unwrap();
        assert_eq!(case.difference(&outputs), None, "{arrival:?}");
        assert!(begun.elapsed() < Duration::from_secs(1), "{arrival:?}: it was let go before it came");
    }
}

#[test]
fn layers_are_timed_as_they_run() {
    let (_turn, mut desk, model, cases) = loaded("resnet18");
    let case = &cases[0];
    for waits_by_kernels in [true, false] {
        desk.waits_by_kernels = waits_by_kernels;
        desk.replace_worker();
        desk.load_again(model).unwrap();
        let (times, [wait_us, copy_us]) = desk.profile(model, case);
        let total_us: f32 = times.iter().sum();
        assert!(
            times.iter().all(|us| *us >= 0.0) && times.iter().filter(|us| **us > 0.0).count() > 20,
            "{times:?}"
        );
        // Some hundred microseconds; a second would be time spent waiting for something.
        assert!((50.0..1e5).contains(&total_us), "{total_us}");
        assert!((0.1..50.0).contains(&wait_us), "{wait_us}");
        // Not known where they take longer than the kernels that they are to be beside.
        assert!(copy_us == 0.0 || (2.0..50.0).contains(&copy_us), "{copy_us}");
        let outputs = desk.run(model, case, Arrival::EveryLayer).unwrap();
        assert_eq!(case.difference(&outputs), None);
    }
}

#[test]
fn an_index_out_of_range_is_told_and_the_worker_ends() {
    let (_turn, mut desk, model, mut cases) = loaded("lookup");
    let mut case = cases.swap_remove(0);
    desk.run(model, &case, Arrival::EveryLayer).unwrap();
    // Indices far outside of any table.
    case.input_byte = Some(0x11);
    let fault = desk.run(model, &case, Arrival::Resident).unwrap_err();
    assert_eq!(fault.class, FaultClass::Model);
    assert!(fault.message.contains("the GPU failed"), "{}", fault.message);
    assert_eq!(desk.exit_code(), Some(3));
}

#[test]
fn weights_that_never_come_end_the_worker_at_its_deadline() {
    let (_turn, mut desk, model, cases) = loaded("resnet18");
    let case = &cases[0];
    desk.doorbell_timeout = Duration::from_millis(300);
    // The others look inside of a graph, by a kernel and by an operation.
    for (arrival, waits_by_kernels) in
        [(Arrival::Never, true), (Arrival::TwoLayers, true), (Arrival::TwoLayers, false)]
    {
        desk.waits_by_kernels = waits_by_kernels;
        desk.replace_worker();
        desk.load_again(model).unwrap();
        let begun = Instant::now();
        let fault = desk.run(model, case, arrival).unwrap_err();
        assert_eq!(fault.class, FaultClass::Transfer);
        assert!(fault.message.contains("did not come in time"), "{}", fault.message);
        assert_eq!(desk.exit_code(), Some(3));
        assert!(begun.elapsed() < Duration::from_secs(30));
    }
}

#[test]
fn poison_lets_a_stuck_worker_go_on() {
    let (_turn, mut desk, model, cases) = loaded("resnet18");
    let case = &cases[0];
    for waits_by_kernels in [true, false] {
        desk.waits_by_kernels = waits_by_kernels;
        desk.replace_worker();
        desk.load_again(model).unwrap();
        desk.run(model, case, Arrival::Poisoned).unwrap();
        let outputs = desk.run(model, case, Arrival::EveryLayer).unwrap();
        assert_eq!(case.difference(&outputs), None);
    }
}

#[test]
fn a_worker_that_is_killed_at_a_doorbell_leaves_the_pool_to_the_next() {
    let (_turn, mut desk, model, cases) = loaded("resnet18");
    let case = &cases[0];
    for round in 0..5 {
        // Its stream waits, or a kernel of its graph does.
        let arrival = if round % 2 == 0 { Arrival::TwoLayers } else { Arrival::Never };
        desk.begin(model, case, arrival);
        std::thread::sleep(Duration::from_millis(20 * round));
        desk.replace_worker();
        desk.load_again(model).unwrap();
        let outputs = desk.run(model, case, Arrival::EveryLayer).unwrap();
        assert_eq!(case.difference(&outputs), None, "round {round}");
    }
}
