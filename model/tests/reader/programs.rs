//! What the fixtures hold, read back. `fixtures/make_fixtures.py` says what they are.

use crate::support::{self, assert_says, open};
use pswitch_model::{
    Archive, Argument, Constant, DType, Dim, Expr, Given, InputKind, Mutation, MutationKind, Node,
    NodeOutput, OutputKind, Program, Sym, SymbolRange, SymbolicOperator, Target, ValueId, ValueKind,
    WeightKind,
};

fn node<'a>(program: &'a Program, name: &str) -> &'a Node {
    program.nodes.iter().find(|node| node.name == name).unwrap()
}

fn argument<'a>(node: &'a Node, name: &str) -> &'a Argument {
    &node.inputs.iter().find(|input| input.name == name).unwrap().value
}

fn value(program: &Program, name: &str) -> ValueId {
    let index = program.values.iter().position(|value| value.name == name).unwrap();
    ValueId(u32::try_from(index).unwrap())
}

fn floats(archive: &Archive, weight: &str) -> Vec<f32> {
    let weight = archive.program().weights.iter().find(|other| other.name == weight).unwrap();
    assert_eq!(weight.dtype, DType::F32);
    let bytes = &archive.storage_bytes(weight.storage)[usize::try_from(weight.offset_bytes).unwrap()..];
    // Only for contiguous ones.
    let count = usize::try_from(weight.sizes.iter().product::<u64>()).unwrap();
    bytes.chunks_exact(4).take(count).map(|chunk| f32::from_le_bytes(chunk.try_into().unwrap())).collect()
}

#[test]
fn inputs_and_outputs_have_names_types_and_ranges() {
    let archive = open("two_inputs");
    archive.verify().unwrap();
    let program = archive.program();
    assert!(program.torch_version.starts_with("2.11"));
    let names: Vec<&str> = program.inputs.iter().map(|input| input.name.as_str()).collect();
    assert_eq!(names, ["x", "y"]);
    for input in &program.inputs {
        let InputKind::Tensor { dtype, shape, value } = &input.kind else { panic!("{input:?}") };
        assert_eq!(*dtype, DType::F32);
        assert!(matches!(&shape[0], Dim::Symbol { min: 1, max: Some(32), hint: Some(2), .. }));
        assert_eq!(shape[1], Dim::Fixed(4));
        assert_eq!(program.values[value.index()].name, input.name);
    }
    assert_eq!(program.symbols.values().collect::<Vec<_>>(), [&SymbolRange { min: 1, max: Some(32) }]);
    let types: Vec<Option<DType>> = program
        .outputs
        .iter()
        .map(|output| match output.kind {
            OutputKind::Tensor { dtype, .. } => Some(dtype),
            _ => None,
        })
        .collect();
    assert_eq!(types, [Some(DType::F32), Some(DType::I64), Some(DType::BF16), None]);
    assert!(matches!(program.outputs[3].kind, OutputKind::SymInt(_)));
    assert!(!program.outputs[0].is_loss);
}

#[test]
fn nodes_have_targets_arguments_modules_and_places() {
    let archive = open("two_inputs");
    let program = archive.program();
    let linear = node(program, "linear");
    assert_eq!(linear.target.to_string(), "aten::linear.default");
    assert_eq!(linear.module, "linear");
    assert_says(&linear.place, &["make_fixtures.py:"]);
    assert_eq!(linear.grad, None);
    assert_eq!(*argument(linear, "weight"), Argument::Tensor(value(program, "p_linear_weight")));
    let topk = node(program, "topk");
    assert_eq!(topk.outputs.len(), 2);
    let check = node(program, "_assert_tensor_metadata_default");
    assert_eq!(*argument(check, "dtype"), Argument::ScalarType(DType::F32));
    assert_eq!(*argument(check, "device"), Argument::Device { kind: "cpu".to_owned(), index: None });
    assert!(check.inputs.iter().any(|input| input.keyword) && check.outputs.is_empty());
    assert_eq!(node(program, "add_2").target, Target::Symbolic(SymbolicOperator::Add));
    let OutputKind::SymInt(n) = program.outputs[3].kind else { panic!() };
    let ValueKind::Int(Dim::Derived { expr, hint: Some(5) }) = &program.values[n.index()].kind else {
        panic!()
    };
    assert_eq!(expr.to_string().replace(program.symbols.keys().next().unwrap(), "s"), "2*s + 1");
}

#[test]
fn shapes_bind_symbols() {
    let archive = open("two_inputs");
    let program = archive.program();
    let symbols = program.bind_shapes(&[&[7, 4], &[7, 4]]).unwrap();
    assert_eq!(symbols.iter().map(|(_, value)| value).collect::<Vec<_>>(), [7]);
    let OutputKind::Tensor { shape, .. } = &program.outputs[0].kind else { panic!() };
    assert_eq!(shape.iter().map(|dim| dim.evaluate(&symbols)).collect::<Vec<_>>(), [Some(7), Some(3)]);

    let refusal = |shapes: &[&[u64]]| program.bind_shapes(shapes).unwrap_err().to_string();
    assert_says(&refusal(&[&[7, 4]]), &["1 inputs given", "takes 2 (x, y)"]);
    assert_says(&refusal(&[&[7, 4], &[7, 4, 1]]), &["`y`", "3 dimensions", "2 dimensions"]);
    assert_says(&refusal(&[&[7, 5], &[7, 4]]), &["`x`: dimension 1 is 5", "takes 4"]);
    assert_says(&refusal(&[&[0, 4], &[0, 4]]), &["`x`: dimension 0 is 0", "from 1 to 32"]);
    assert_says(&refusal(&[&[33, 4], &[33, 4]]), &["is 33", "from 1 to 32"]);
    assert_says(&refusal(&[&[u64::MAX, 4], &[1, 4]]), &["from 1 to 32"]);
    assert_says(
        &refusal(&[&[7, 4], &[8, 4]]),
        &["`y`: dimension 0 is 8", "takes 7, like dimension 0 of `x`"],
    );
}

#[test]
fn derived_sizes_are_solved_and_checked() {
    let archive = open("derived");
    let program = archive.program();
    let symbols = program.bind_shapes(&[&[6, 3], &[3, 3], &[6, 2]]).unwrap();
    assert_eq!(
        symbols.iter().map(|(_, value)| value).collect::<std::collections::BTreeSet<_>>(),
        [2, 3].into()
    );
    let refusal = |shapes: &[&[u64]]| program.bind_shapes(shapes).unwrap_err().to_string();
    assert_says(&refusal(&[&[7, 3], &[3, 3], &[6, 2]]), &["dimension 0 is 7", "2*s", "= 6"]);
    assert_says(&refusal(&[&[6, 3], &[3, 3], &[7, 2]]), &["dimension 0 is 7", "3*s", "from 2 to 5"]);
    assert_says(&refusal(&[&[6, 3], &[3, 3], &[18, 2]]), &["dimension 0 is 18", "from 2 to 5"]);
}

#[test]
fn integers_are_inputs_too() {
    let archive = open("integer_input");
    let program = archive.program();
    assert!(matches!(program.inputs[1].kind, InputKind::SymInt { .. }));
    let symbols = program.bind(&[Given::Shape(&[1, 3]), Given::Int(9)]).unwrap();
    let OutputKind::Tensor { shape, .. } = &program.outputs[0].kind else { panic!() };
    assert_eq!(shape[0].evaluate(&symbols), Some(9));
    let refusal = program.bind(&[Given::Shape(&[1, 3]), Given::Int(-1)]).unwrap_err();
    assert_says(&refusal.to_string(), &["`n`: its value is -1"]);
    assert_says(&program.bind_shapes(&[&[1, 3], &[]]).unwrap_err().to_string(), &["`n`", "an integer"]);
}

#[test]
fn weights_are_in_the_order_of_their_first_use() {
    let archive = open("weights");
    archive.verify().unwrap();
    let program = archive.program();
    let names: Vec<&str> = program.weights.iter().map(|weight| weight.name.as_str()).collect();
    let used = [
        "first",
        "second",
        "transposed",
        "not_saved",
        "every_second",
        "expanded",
        "flag",
        "empty",
        "returned",
    ];
    assert_eq!(names[1..10], used);
    // Names of one tensor: one is used, the other by nobody; both name one storage.
    let tied = ["head.weight", "embedding.weight"];
    assert!(tied.contains(&names[0]) && names[10..].contains(&"unused"));
    let storage = |name: &str| program.weights.iter().find(|weight| weight.name == name).unwrap().storage;
    assert_eq!(storage(tied[0]), storage(tied[1]));
    assert_eq!(storage("first"), storage("second"));
    assert_eq!(program.storages.len(), 10);
    let first_uses: Vec<_> =
        program.storages.iter().map(|storage| storage.first_use.unwrap_or(usize::MAX)).collect();
    assert!(first_uses.is_sorted());
    // What is only returned is needed by the end; what nobody uses, never.
    let first_use = |name: &str| program.weights.iter().find(|weight| weight.name == name).unwrap().first_use;
    assert_eq!(first_use("returned"), Some(program.nodes.len() - 1));
    assert_eq!(first_use("unused"), None);
    let kind = |name: &str| program.weights.iter().find(|weight| weight.name == name).unwrap().kind;
    assert_eq!(kind("first"), WeightKind::Parameter);
    assert_eq!(kind("empty"), WeightKind::Buffer { persistent: true });
    assert_eq!(kind("not_saved"), WeightKind::Buffer { persistent: false });
}

#[test]
fn weights_are_the_bytes_that_were_saved() {
    let archive = open("weights");
    let count = |from: u16, to: u16| (from..to).map(f32::from).collect::<Vec<_>>();
    assert_eq!(floats(&archive, "first"), count(160, 320));
    assert_eq!(floats(&archive, "second"), count(240, 480));
    assert_eq!(floats(&archive, "embedding.weight"), count(0, 160));
    let program = archive.program();
    let weight = |name: &str| program.weights.iter().find(|weight| weight.name == name).unwrap();
    // Views keep their strides, and their alignment within the whole.
    assert_eq!(
        (&weight("transposed").sizes[..], &weight("transposed").strides[..]),
        (&[16, 8][..], &[1, 16][..])
    );
    assert_eq!(weight("every_second").strides, [2]);
    assert_eq!(weight("expanded").strides, [0, 1]);
    assert_eq!(weight("first").offset_bytes, (160 * 4) % 512);
    let shared = &program.storages[weight("first").storage.index()];
    assert_eq!(shared.bytes, 480 * 4 - 512, "only the part that is used");
    assert_eq!(archive.storage_bytes(weight("flag").storage), [1]);
    assert_eq!(archive.storage_bytes(weight("empty").storage), [0_u8; 0]);
    assert_eq!(weight("returned").dtype, DType::BF16);
}

#[test]
fn spans_and_layers_follow_the_order() {
    for name in support::NAMES {
        let archive = open(name);
        let program = archive.program();
        let span = program.span();
        let mut end = 0;
        for (storage, offset) in program.storages.iter().zip(&span.offsets) {
            assert_eq!(offset % 512, 0);
            assert!(*offset >= end && *offset < end + 512);
            end = offset + storage.bytes;
        }
        assert!(span.bytes >= end && span.bytes.is_multiple_of(512) && span.used_bytes <= span.bytes);
        let layers = program.layers();
        assert_eq!(layers.len(), program.nodes.len());
        assert_eq!(layers.iter().map(|layer| layer.bytes).sum::<u64>(), span.used_bytes);
        for weight in &program.weights {
            if let Some(node) = weight.first_use {
                let landed: u64 = layers[..=node].iter().map(|layer| layer.bytes).sum();
                assert!(span.offset(weight.storage) + weight.offset_bytes <= landed);
            }
        }
    }
    let archive = open("weights");
    let span = archive.program().span();
    assert_eq!((span.used_bytes, span.bytes), (5632, 6144));
}

#[test]
fn values_die_after_their_last_use_and_never_before() {
    for name in support::NAMES {
        let archive = open(name);
        let program = archive.program();
        let dying = program.last_uses();
        let mut alive = vec![false; program.values.len()];
        let mut kept = vec![false; program.values.len()];
        for weight in &program.weights {
            kept[weight.value.index()] = true;
        }
        for input in &program.inputs {
            match input.kind {
                InputKind::Tensor { value, .. } | InputKind::SymInt { value, .. } => {
                    kept[value.index()] = true
                }
                InputKind::Constant(_) => {}
            }
        }
        for (node, dying) in program.nodes.iter().zip(&dying) {
            for value in node.inputs.iter().flat_map(|input| input.value.values()) {
                assert!(alive[value.index()] || kept[value.index()], "{name}: {value} in {}", node.name);
            }
            for value in node.outputs.iter().flat_map(NodeOutput::values) {
                assert!(!kept[value.index()]);
                alive[value.index()] = true;
            }
            for value in dying {
                assert!(std::mem::replace(&mut alive[value.index()], false), "{name}: {value} dies twice");
            }
        }
        let mut last: Vec<ValueId> =
            program.outputs.iter().filter_map(|output| output.kind.value()).collect();
        last.extend(program.mutations.iter().map(|mutation| mutation.from));
        for value in &last {
            assert!(alive[value.index()] || kept[value.index()]);
        }
        let alive: Vec<usize> =
            alive.iter().enumerate().filter_map(|(value, alive)| alive.then_some(value)).collect();
        assert!(
            alive.iter().all(|value| last.iter().any(|other| other.index() == *value)),
            "{name}: leaks {alive:?}"
        );
    }
}

#[test]
fn constants_are_not_asked_for() {
    let archive = open("constants");
    let program = archive.program();
    let constants: Vec<_> = program
        .inputs
        .iter()
        .filter_map(|input| match &input.kind {
            InputKind::Constant(constant) => Some((input.name.as_str(), constant.clone())),
            _ => None,
        })
        .collect();
    let expected = [
        ("nothing", Constant::None),
        ("times", Constant::Int(3)),
        ("factor", Constant::Float(0.5)),
        ("mode", Constant::String("mean".to_owned())),
        ("flag", Constant::Bool(true)),
    ];
    assert_eq!(constants, expected);
    program.bind_shapes(&[&[2, 3]]).unwrap();
    assert_eq!(program.outputs[1].kind, OutputKind::Constant(Constant::Int(7)));
    assert_eq!(program.outputs[2].kind, OutputKind::Constant(Constant::None));
    assert_eq!(program.outputs[1].name, "output_1");
}

#[test]
fn regions_without_gradients_are_inlined() {
    let archive = open("no_grad");
    let program = archive.program();
    let seen: Vec<(String, Option<bool>)> =
        program.nodes.iter().map(|node| (node.target.to_string(), node.grad)).collect();
    let expected = [
        ("aten::linear.default".to_owned(), Some(false)),
        ("aten::mul.Tensor".to_owned(), Some(false)),
        ("aten::add.Tensor".to_owned(), None),
    ];
    assert_eq!(seen, expected);
    // What the sub-graphs return is what the outer graph goes on with.
    let [linear, mul, add] = &program.nodes[..] else { panic!() };
    let [NodeOutput::Tensor(y)] = linear.outputs[..] else { panic!() };
    assert_eq!(*argument(mul, "self"), Argument::Tensor(y));
    assert_eq!(*argument(add, "self"), Argument::Tensor(y));
    let [NodeOutput::Tensor(z)] = mul.outputs[..] else { panic!() };
    assert_eq!(program.outputs[1].kind.value(), Some(z));
    // Names of a sub-graph may be those of the outer graph again.
    let mut names: Vec<&str> = program.values.iter().map(|value| value.name.as_str()).collect();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), program.values.len());
    assert_eq!(open("autocast_off").program().nodes.len(), 2);
}

#[test]
fn functional_programs_write_back() {
    let archive = open("norm_functional");
    let program = archive.program();
    let mutations: Vec<(MutationKind, &str)> = program
        .mutations
        .iter()
        .map(|mutation| (mutation.kind, program.values[mutation.into.index()].name.as_str()))
        .collect();
    let buffers = ["b_norm_running_mean", "b_norm_running_var", "b_norm_num_batches_tracked"];
    assert_eq!(mutations, buffers.map(|name| (MutationKind::Buffer, name)));
    assert_eq!(program.outputs.len(), 1);

    let archive = open("writes_input");
    let program = archive.program();
    let InputKind::Tensor { value, .. } = program.inputs[0].kind else { panic!() };
    let [Mutation { into, kind: MutationKind::Input, .. }] = program.mutations[..] else { panic!() };
    assert_eq!(into, value);
}

#[test]
fn sizes_may_depend_on_the_data() {
    let archive = open("item");
    let program = archive.program();
    let item = node(program, "item");
    let [NodeOutput::SymInt(n)] = item.outputs[..] else { panic!() };
    assert!(matches!(
        &program.values[n.index()].kind,
        ValueKind::Int(Dim::Symbol { min: 0, max: Some(99), .. })
    ));
    let zeros = node(program, "zeros");
    let Argument::SymInts(sizes) = argument(zeros, "size") else { panic!() };
    assert_eq!(sizes[0], Sym::Value(n));
    let less =
        program.nodes.iter().find(|node| node.target == Target::Symbolic(SymbolicOperator::Lt)).unwrap();
    assert!(matches!(less.outputs[..], [NodeOutput::SymBool(_)]));
    // Nothing about the inputs decides it.
    let symbols = program.bind_shapes(&[&[2]]).unwrap();
    let OutputKind::Tensor { shape, .. } = &program.outputs[0].kind else { panic!() };
    assert_eq!(shape[0].evaluate(&symbols), None);
}

#[test]
fn lists_and_infinities() {
    let archive = open("lists");
    let program = archive.program();
    let split = program.nodes.iter().find(|node| node.target.to_string() == "aten::split.Tensor").unwrap();
    let [NodeOutput::Tensors(parts)] = &split.outputs[..] else { panic!("{split:?}") };
    assert_eq!(parts.len(), 3);
    let cat = node(program, "cat");
    assert_eq!(*argument(cat, "tensors"), Argument::Tensors(vec![parts[0], parts[2]]));
    let index = node(program, "index");
    let Argument::OptionalTensors(indices) = argument(index, "indices") else { panic!("{index:?}") };
    assert!(matches!(indices[..], [None, Some(_)]));
    assert_eq!(*argument(node(program, "masked_fill"), "value"), Argument::Float(f64::NEG_INFINITY));
}

#[test]
fn digests_depend_on_contents_alone() {
    let pieces = support::Pieces::of("two_inputs");
    let digest = pieces.open().unwrap().digest();
    let renamed = support::Pieces { root: "other".to_owned(), ..pieces.clone() };
    assert_eq!(renamed.open().unwrap().digest(), digest);
    assert_eq!(open("two_inputs").digest(), digest);
    let mut changed = pieces.clone();
    changed.get("data/weights/weight_0")[0] ^= 1;
    assert_ne!(changed.open().unwrap().digest(), digest);
}

#[test]
fn archives_can_be_shared_between_threads() {
    fn check<T: Send + Sync>(_: &T) {}
    check(&open("two_inputs"));
}

#[test]
fn an_expression_of_a_negative_number_is_none_of_size() {
    let symbols = pswitch_model::Symbols::default();
    assert_eq!(Dim::Derived { expr: Expr::Integer(-1), hint: None }.evaluate(&symbols), None);
}

#[test]
fn tables_are_what_embeddings_alone_read() {
    let archive = open("tables");
    let program = archive.program();
    let [table] = <[_; 1]>::try_from(program.tables()).unwrap();
    let weight = program.weights.iter().find(|weight| weight.storage == table.storage).unwrap();
    assert_eq!(weight.name, "words.weight");
    assert_eq!(program.nodes[table.node].name, "embedding");
    assert_eq!(
        (table.offset, table.bytes),
        (program.span().offset(table.storage), (1000 * 16 * 4_u64).next_multiple_of(512))
    );
    // 2 x 5 rows, and 2 more by the second node.
    assert_eq!(table.read_bytes, 12 * 16 * 4);
    assert_eq!(open("weights").program().tables(), []);
}

#[test]
fn inputs_that_are_row_numbers_are_bounded_by_the_shortest_table() {
    let program = open("tables").program().clone();
    let bounds: Vec<(&str, u64)> = program
        .index_bounds()
        .iter()
        .map(|bound| (program.inputs[bound.input].name.as_str(), bound.rows))
        .collect();
    // `more` numbers 1000 words and 10 tied rows; what numbers the last table is computed.
    assert_eq!(bounds, [("ids", 1000), ("more", 10)]);
    assert_eq!(open("two_inputs").program().index_bounds(), []);
}
