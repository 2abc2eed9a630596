//! The executor against eager PyTorch on this machine, and what it makes of programs and inputs it cannot run.
//!
//! The folders under `target/fixtures` are made by `cargo xtask fixtures` (part of `cargo xtask test`).

mod support;

use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use pswitch_device::{DeviceAddress, SharedMemory};
use pswitch_protocol::FaultClass;
use pswitch_worker::{ExecutionArena, RunError, Watch};
use support::{Cases, Unwatched, check, load};

/// A process has one CPU allocator, which serves one execution at a time.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

const ARENA_BYTES: u64 = 2 << 30;

fn fixture(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/fixtures").join(name);
    assert!(folder.join("model.pt2").exists(), "{} is missing: run `cargo xtask fixtures`", folder.display());
    folder
}

fn exclusive() -> (MutexGuard<'static, ()>, SharedMemory) {
    let guard = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    (guard, support::arena(ARENA_BYTES))
}

fn equal(name: &str) {
    let (_guard, arena) = exclusive();
    match check(&fixture(name), &arena) {
        Ok(cases) => assert!(cases > 0),
        Err(difference) => panic!("{name}: {difference}"),
    }
}

macro_rules! equal {
    ($($test:ident: $fixture:literal,)*) => {
        $(#[test] fn $test() { equal($fixture); })*
    };
}

equal! {
    resnet18: "resnet18",
    resnet18_at_three_batch_sizes: "resnet18-dynamic",
    resnet152: "resnet152",
    inception_v3: "inception_v3",
    mobilenet_v3_small: "mobilenet_v3_small",
    efficientnet_lite0_with_its_real_weights: "efficientnet-lite0",
    vit_b_16: "vit_b_16",
    swin_t: "swin_t",
    bert_of_two_layers: "bert-2-layers",
    bert_base: "bert-base",
    bert_with_dynamic_batch_and_sequence: "bert-dynamic",
    minilm_with_its_real_weights: "all-minilm-l6-v2",
    gpt2: "gpt2",
    two_inputs_and_three_outputs: "two-in-three-out",
    dynamic_batch: "dynamic-batch",
    integer_outputs: "integer-outputs",
    bfloat16: "bfloat16",
    float16: "float16",
    arithmetic_on_symbolic_sizes: "symbolic-arithmetic",
    operators_in_place: "in-place",
    constants_and_lifted_tensors: "constants",
    inputs_fixed_at_export: "fixed-inputs",
    operators_that_return_lists: "lists",
    tied_strided_and_overlapping_weights: "odd-weights",
    recurrent_layers: "recurrent",
    sizes_that_depend_on_data: "data-dependent",
    complex_numbers: "spectrum",
}

#[test]
fn a_model_that_raises_names_the_node_and_stays_usable() {
    let (_guard, arena) = exclusive();
    let folder = fixture("lookup");
    let cases = Cases::read(&folder);
    let mut loaded = load(&folder.join("model.pt2")).unwrap();
    let base = DeviceAddress(arena.as_ptr() as u64);
    for _ in 0..3 {
        let scope = ExecutionArena::begin(base, ARENA_BYTES);
        let good = cases.run(0, &mut loaded).unwrap();
        assert_eq!(scope.end().in_use_bytes, 0);
        assert_eq!(cases.compare(0, &good), "");

        let scope = ExecutionArena::begin(base, ARENA_BYTES);
        let raised = cases.run(1, &mut loaded).unwrap_err();
        assert_eq!(scope.end().in_use_bytes, 0, "a failed execution gives all of its memory back");
        assert!(raised.contains("aten::embedding") && raised.contains("index out of range"), "{raised}");
        assert_eq!(raised.lines().count(), 1, "{raised}");
    }
}

#[test]
fn a_model_that_changes_its_buffers_is_refused() {
    let error = load(&fixture("mutable-buffer").join("model.pt2")).err().unwrap();
    assert!(error.contains("writes to 'count'") && error.contains("eval mode"), "{error}");
}

#[test]
fn a_part_of_a_weight_in_a_list_is_a_weight() {
    let error = load(&fixture("writes-chunk").join("model.pt2")).err().unwrap();
    assert!(error.contains("writes to 'weight'") && error.contains("eval mode"), "{error}");
}

#[test]
fn a_write_that_no_schema_tells_of_is_refused_when_it_is_tried() {
    let (_guard, arena) = exclusive();
    let folder = fixture("writes-through-dropout");
    let cases = Cases::read(&folder);
    let mut loaded = load(&folder.join("model.pt2")).unwrap();
    let base = DeviceAddress(arena.as_ptr() as u64);
    for _ in 0..2 {
        let scope = ExecutionArena::begin(base, ARENA_BYTES);
        let error = cases.run(0, &mut loaded).unwrap_err();
        assert_eq!(scope.end().in_use_bytes, 0);
        assert!(error.contains("aten::mul_") && error.contains("write to the model's weights"), "{error}");
    }
}

#[test]
fn an_arena_that_is_too_small_fails_the_execution_alone() {
    let (_guard, arena) = exclusive();
    let folder = fixture("resnet18");
    let cases = Cases::read(&folder);
    let mut loaded = load(&folder.join("model.pt2")).unwrap();
    let base = DeviceAddress(arena.as_ptr() as u64);
    let scope = ExecutionArena::begin(base, 64 << 10);
    let error = cases.run(0, &mut loaded).unwrap_err();
    let stats = scope.end();
    assert!(error.contains("no room"), "{error}");
    assert_eq!((stats.in_use_bytes, stats.refused), (0, 1));
    let scope = ExecutionArena::begin(base, ARENA_BYTES);
    let outputs = cases.run(0, &mut loaded).unwrap();
    scope.end();
    assert_eq!(cases.compare(0, &outputs), "");
}

/// Ends an execution before a given node.
struct StopAt(usize, usize);

impl Watch for StopAt {
    fn before(&mut self, node: usize) -> Result<(), RunError> {
        assert_eq!(node, self.1, "nodes come one after the other");
        self.1 += 1;
        if node == self.0 {
            return Err(RunError { class: FaultClass::Stopped, message: "stopped".to_owned() });
        }
        Ok(())
    }
}

#[test]
fn an_execution_can_be_stopped_before_any_node_and_begun_anew() {
    let (_guard, arena) = exclusive();
    let folder = fixture("constants");
    let cases = Cases::read(&folder);
    let mut loaded = load(&folder.join("model.pt2")).unwrap();
    let base = DeviceAddress(arena.as_ptr() as u64);
    let nodes = loaded.executable.nodes();
    for stop in 0..nodes {
        let scope = ExecutionArena::begin(base, ARENA_BYTES);
        let error = cases.run_watched(0, &mut loaded, &mut StopAt(stop, 0)).unwrap_err();
        assert_eq!(
            (error.as_str(), scope.end().in_use_bytes),
            ("stopped", 0),
            "before node {stop} of {nodes}"
        );
    }
    let scope = ExecutionArena::begin(base, ARENA_BYTES);
    let outputs = cases.run_watched(0, &mut loaded, &mut Unwatched).unwrap();
    scope.end();
    assert_eq!(cases.compare(0, &outputs), "");
}
