//! What is refused, and what is said then.

use pswitch_model::{Archive, Limits, ModelError};
use serde_json::{Value, json};
use zip::CompressionMethod;

use crate::support::{MODEL, Pieces, WEIGHTS, assert_says, describe, nodes, open_bytes, path};

fn model(fixture: &str, edit: impl FnOnce(&mut Value)) -> String {
    Pieces::of(fixture).edit(MODEL, edit).refusal()
}

fn weights(edit: impl FnOnce(&mut Value)) -> String {
    Pieces::of("weights").edit(WEIGHTS, |json| edit(&mut json["config"])).refusal()
}

#[test]
fn files_that_are_no_archives() {
    let say = |path: &str| describe(&Archive::open(path.as_ref()).unwrap_err());
    assert_says(&say("/nowhere/model.pt2"), &["cannot open /nowhere/model.pt2", "No such file"]);
    assert_says(&say("/"), &["not a regular file"]);
    let say = |bytes: &[u8]| describe(&open_bytes(bytes).unwrap_err());
    assert_says(&say(b""), &["it is empty"]);
    assert_says(&say(b"PK"), &["not a readable zip archive", "no end record"]);
    assert_says(&say(&[0; 4096]), &["no end record"]);
    let whole = std::fs::read(path("two_inputs")).unwrap();
    for part in [1, 2, 3, 5, 10, 100] {
        assert_says(
            &say(&whole[..whole.len() - whole.len() / part / 2 - 1]),
            &["not a readable zip archive"],
        );
    }
    // The front is missing: the directory is there and points to nothing.
    assert_says(&say(&whole[100..]), &["not a readable zip archive"]);
}

#[test]
fn archives_that_hold_something_else() {
    let pieces = Pieces::of("two_inputs");
    assert_says(&pieces.clone().without("archive_format").refusal(), &["not an archive of torch.export"]);
    let mut script = pieces.clone().without("archive_format");
    script.entries.push(("constants.pkl".to_owned(), Vec::new()));
    assert_says(&script.refusal(), &["TorchScript", "torch.export instead"]);
    assert_says(
        &pieces.clone().set("archive_format", b"zip").refusal(),
        &["format is zip", "supported is pt2"],
    );
    assert_says(&pieces.clone().set("archive_version", b"1").refusal(), &["version is 1", "supported is 0"]);
    assert_says(
        &pieces.clone().set("byteorder", b"big").refusal(),
        &["byte order is big", "supported is little"],
    );
    assert!(pieces.clone().without("byteorder").open().is_ok());
    assert_says(&pieces.clone().without(MODEL).refusal(), &["holds no program"]);
    let mut two = pieces.clone();
    two.entries.push(("models/other.json".to_owned(), b"{}".to_vec()));
    assert_says(&two.refusal(), &["2 programs", "model", "other"]);
    let mut old = pieces;
    old.entries.push(("data/weights/model.pt".to_owned(), Vec::new()));
    assert_says(&old.refusal(), &["data/weights/model.pt", "older PyTorch"]);
}

#[test]
fn entries_that_cannot_be_mapped() {
    let pieces = Pieces::of("two_inputs");
    // The directory's record of an entry has its method at byte 10; the local header's, at byte 8.
    let mut bytes = pieces.bytes(CompressionMethod::Stored);
    let directory = find(&bytes, b"PK\x01\x02", b"/models/model.json");
    bytes[directory + 10] = 8;
    let said = describe(&open_bytes(&bytes).unwrap_err());
    assert_says(&said, &["models/model.json", "is compressed (method 8)", "store"]);
    let mut bytes = pieces.bytes(CompressionMethod::Stored);
    let directory = find(&bytes, b"PK\x01\x02", b"/data/weights/weight_0");
    bytes[directory + 10] = 8;
    let said = describe(&open_bytes(&bytes).unwrap_err());
    assert_says(&said, &["linear.weight", "data/weights/weight_0", "is compressed"]);
    // A byte of the model turned over after its checksum was made.
    let mut bytes = pieces.bytes(CompressionMethod::Stored);
    let contents = find(&bytes, b"{\"graph_module\"", b"");
    bytes[contents + 100] ^= 1;
    assert_says(
        &describe(&open_bytes(&bytes).unwrap_err()),
        &["models/model.json", "is damaged", "checksum"],
    );
    // The same in a weight shows when one asks.
    let mut bytes = pieces.bytes(CompressionMethod::Stored);
    let header = find(&bytes, b"PK\x03\x04", b"/data/weights/weight_0");
    bytes[header + 30 + "two_inputs/data/weights/weight_0".len()] ^= 1;
    let archive = open_bytes(&bytes).unwrap();
    assert_says(&describe(&archive.verify().unwrap_err()), &["data/weights/weight_0", "is damaged"]);
}

/// Where `signature` stands with `name` soon after it.
fn find(bytes: &[u8], signature: &[u8], name: &[u8]) -> usize {
    (0..bytes.len())
        .find(|at| {
            let soon = &bytes[*at..bytes.len().min(at + 100)];
            soon.starts_with(signature)
                && (name.is_empty() || soon.windows(name.len()).any(|part| part == name))
        })
        .unwrap()
}

#[test]
fn versions_of_the_schema() {
    let said = model("two_inputs", |json| json["schema_version"]["major"] = json!(9));
    assert_says(&said, &["schema's version is 9.17", "supported is 8.17"]);
    let said = model("two_inputs", |json| json["schema_version"] = json!("8"));
    assert_says(&said, &["models/model.json", "does not follow schema version 8.17", "line 1"]);
    let newer = |json: &mut Value| {
        json["schema_version"]["minor"] = json!(99);
        json["something_new"] = json!({"a": [1, 2]});
    };
    assert!(Pieces::of("two_inputs").edit(MODEL, newer).open().is_ok());
    let said = model("two_inputs", |json| nodes(json)[1]["inputs"][0]["arg"] = json!({"as_new": 1}));
    assert_says(&said, &["unknown variant `as_new`"]);
}

#[test]
fn json_that_is_not_the_schema() {
    let say = |text: &[u8]| Pieces::of("two_inputs").set(MODEL, text).refusal();
    assert_says(&say(b""), &["models/model.json", "EOF"]);
    assert_says(&say(b"{\"schema_version\": {\"major\": 8, \"minor\": 17}}"), &["missing field"]);
    assert_says(&say(&b"[".repeat(100_000)), &["models/model.json"]);
    assert_says(&say(&deep_graph(10)), &["missing field"]);
    assert_says(&say(&deep_graph(20_000)), &["recursion limit"]);
    assert_says(&say(b"\xff\xfe"), &["models/model.json"]);
    let said = model("two_inputs", |json| nodes(json)[1]["inputs"][0]["arg"] = json!({"as_int": 1e300}));
    assert_says(&said, &["models/model.json", "1e+300"]);
}

/// A program of sub-graphs within sub-graphs.
fn deep_graph(depth: usize) -> Vec<u8> {
    let open = r#"{"inputs": [], "outputs": [], "tensor_values": {}, "nodes": [{"target": "t", "metadata": {},
        "outputs": [], "inputs": [{"name": "", "arg": {"as_graph": {"name": "g", "graph": "#;
    let start = r#"{"schema_version": {"major": 8, "minor": 17}, "graph_module": {"graph": "#;
    [start, &open.repeat(depth), "{}", &"}}}]}]}".repeat(depth), "}}"].concat().into_bytes()
}

#[test]
fn higher_order_operators() {
    let said = Pieces::of("cond").refusal();
    assert_says(&said, &["node `cond`", "higher-order operator `cond`", "wrap_with_set_grad_enabled"]);
    let on = |json: &mut Value| {
        let node = nodes(json).iter_mut().find(|node| node["target"].as_str().unwrap().contains("autocast"));
        let inputs = &mut node.unwrap()["inputs"];
        assert_eq!(inputs[2]["arg"], json!({"as_bool": false}));
        inputs[2]["arg"]["as_bool"] = json!(true);
    };
    assert_says(&model("autocast_off", on), &["switches autocast on"]);
    let wrap = |edit: fn(&mut Value)| {
        move |json: &mut Value| {
            let node =
                nodes(json).iter_mut().find(|node| node["target"].as_str().unwrap().contains("set_grad"));
            edit(node.unwrap());
        }
    };
    let refused = |part: &str, edit: fn(&mut Value)| {
        assert_says(&model("no_grad", wrap(edit)), &["wrap_with_set_grad_enabled", part]);
    };
    refused("unknown arguments", |node| node["inputs"][0]["arg"] = json!({"as_int": 1}));
    refused("inputs with", |node| drop(node["inputs"].as_array_mut().unwrap().pop()));
    refused("returns more than the node does", |node| drop(node["outputs"].as_array_mut().unwrap().pop()));
    refused("for its output `q`", |node| {
        node["outputs"].as_array_mut().unwrap().push(json!({"as_tensor": {"name": "q"}}));
    });
    refused("neither a tensor nor a symbolic number", |node| node["inputs"][2]["arg"] = json!({"as_int": 1}));
    refused("`nobody`", |node| node["inputs"][2]["arg"] = json!({"as_tensor": {"name": "nobody"}}));
}

#[test]
fn kinds_of_arguments() {
    let said = |arg: Value| model("two_inputs", |json| nodes(json)[1]["inputs"][1]["arg"] = arg);
    let object = json!({"as_custom_obj": {"name": "o", "class_fqn": "torch.classes.a.B"}});
    assert_says(
        &said(object),
        &["node `linear`", "make_fixtures.py:", "custom object `o` (torch.classes.a.B)"],
    );
    assert_says(&said(json!({"as_operator": "torch.ops.aten.add"})), &["the operator `torch.ops.aten.add`"]);
    assert_says(&said(json!({"as_string_to_argument": {"a": {"as_int": 1}}})), &["a dictionary"]);
    let graph = json!({"inputs": [], "outputs": [], "nodes": [], "tensor_values": {}});
    assert_says(&said(json!({"as_graph": {"name": "g", "graph": graph}})), &["the sub-graph `g`"]);
    assert_says(&said(json!({"as_scalar_type": 99})), &["element type 99", "7 (float32)"]);
    assert_says(&said(json!({"as_memory_format": 0})), &["memory format 0"]);
    assert_says(&said(json!({"as_layout": 0})), &["layout 0"]);
    assert_says(
        &said(json!({"as_tensor": {"name": "later"}})),
        &["node `linear`", "`later`, which no input"],
    );
    assert_says(
        &said(json!({"as_sym_int": {"as_name": "x"}})),
        &["takes `x` for an integer; it is a tensor"],
    );
    // Defined, but by a later node.
    assert_says(
        &said(json!({"as_tensor": {"name": "argmax"}})),
        &["`argmax`, which no input and no earlier node"],
    );
}

#[test]
fn nodes_that_are_inconsistent() {
    let said = |edit: fn(&mut Value)| model("two_inputs", |json| edit(&mut nodes(json)[1]));
    assert_says(&said(|node| node["target"] = json!("os.system")), &["node `linear`", "calls `os.system`"]);
    assert_says(&said(|node| node["target"] = json!("torch.ops.aten")), &["calls `torch.ops.aten`"]);
    let output = |name: &str| json!([{"as_tensor": {"name": name}}]);
    let said = model("two_inputs", |json| nodes(json)[1]["outputs"] = output("x"));
    assert_says(&said, &["node `linear`", "defines `x` a second time"]);
    let said = model("two_inputs", |json| nodes(json)[2]["name"] = json!("linear"));
    assert_says(&said, &["node `linear`", "not the only node of this name"]);
    let said = model("two_inputs", |json| nodes(json)[1]["outputs"] = json!([{"as_string": "s"}]));
    assert_says(&said, &["returns something other than tensors"]);
    let negative = |json: &mut Value| {
        json["graph_module"]["graph"]["tensor_values"]["linear"]["sizes"][1] = json!({"as_int": -3});
    };
    assert_says(&model("two_inputs", negative), &["node `linear`", "`linear`, which has the size -3"]);
    let huge = |json: &mut Value| {
        json["graph_module"]["graph"]["tensor_values"]["linear"]["sizes"] =
            json!(vec![json!({"as_int": 1}); 65]);
    };
    assert_says(&model("two_inputs", huge), &["a tensor's dimensions is 65, over the limit of 64"]);
}

#[test]
fn signatures() {
    let spec = |kind: &str, at: usize, spec: Value| {
        let kind = format!("{kind}_specs");
        model("two_inputs", |json| json["graph_module"]["signature"][&kind][at] = spec)
    };
    let object = json!({"custom_obj": {"arg": {"name": "o", "class_fqn": "a.B"}, "custom_obj_name": "n"}});
    assert_says(&spec("input", 0, object), &["input `o`", "custom object (a.B)"]);
    assert_says(&spec("input", 0, json!({"token": {"arg": {"name": "t"}}})), &["input `t`", "token"]);
    let other = json!({"user_input": {"arg": {"as_tensor": {"name": "z"}}}});
    assert_says(&spec("input", 4, other), &["input `z`", "is `x` in the graph"]);
    let float = json!({"user_input": {"arg": {"as_sym_float": {"as_name": "x"}}}});
    assert_says(&spec("input", 4, float), &["neither a tensor nor an integer"]);
    let twice = json!({"parameter": {"arg": {"name": "p_linear_bias"}, "parameter_name": "linear.weight"}});
    assert_says(&spec("input", 1, twice), &["`linear.weight`", "in the signature twice"]);
    let gradient = json!({"gradient_to_parameter": {"arg": {"name": "g"}, "parameter_name": "p"}});
    assert_says(&spec("output", 0, gradient), &["output `g`", "gradient", "forward pass only"]);
    assert_says(&spec("output", 0, json!({"token": {"arg": {"name": "t"}}})), &["output `t`", "token"]);
    let mutation = json!({"buffer_mutation": {"arg": {"name": "add"}, "buffer_name": "nobody"}});
    assert_says(&spec("output", 0, mutation), &["mutation of `nobody`", "nothing that the signature has"]);
    let loss = json!({"loss_output": {"arg": {"name": "add"}}});
    let with_loss = |json: &mut Value| json["graph_module"]["signature"]["output_specs"][0] = loss;
    let archive = Pieces::of("two_inputs").edit(MODEL, with_loss).open().unwrap();
    assert!(archive.program().outputs[0].is_loss && archive.program().outputs[0].name == "add");

    let fewer = |list: &'static str| {
        model("two_inputs", |json| {
            drop(json["graph_module"]["signature"][list].as_array_mut().unwrap().pop())
        })
    };
    assert_says(&fewer("input_specs"), &["6 inputs; its signature has 5"]);
    assert_says(&fewer("output_specs"), &["4 outputs; its signature has 3"]);
    let output =
        |output: Value| model("two_inputs", |json| json["graph_module"]["graph"]["outputs"][0] = output);
    assert_says(&output(json!({"as_tensor": {"name": "nobody"}})), &["output `add`", "uses `nobody`"]);
    assert_says(&output(json!({"as_ints": [1]})), &["output `add`", "neither a tensor nor a number"]);
    let empty = |json: &mut Value| {
        let ranges = json["range_constraints"].as_object_mut().unwrap();
        ranges.values_mut().for_each(|range| *range = json!({"min_val": 5, "max_val": 4}));
    };
    assert_says(&model("two_inputs", empty), &["symbol `s", "empty range 5 to 4"]);
}

#[test]
fn outputs_that_are_returned_twice_have_two_names() {
    let twice = |json: &mut Value| {
        let output = json!({"as_tensor": {"name": "add"}});
        json["graph_module"]["graph"]["outputs"] = json!([output, output, output]);
        let spec = json!({"user_output": {"arg": output}});
        json["graph_module"]["signature"]["output_specs"] = json!([spec, spec, spec]);
    };
    let archive = Pieces::of("two_inputs").edit(MODEL, twice).open().unwrap();
    let names: Vec<&str> = archive.program().outputs.iter().map(|output| output.name.as_str()).collect();
    assert_eq!(names, ["add", "add_1", "add_2"]);
}

#[test]
fn weights_that_do_not_fit() {
    let pieces = Pieces::of("weights");
    let said = weights(|config| drop(config.as_object_mut().unwrap().remove("first")));
    assert_says(&said, &["weight `first`", "none of the archive's lists"]);
    let said = weights(|config| config["first"]["path_name"] = json!("weight_99"));
    assert_says(&said, &["weight `first`", "data/weights/weight_99", "missing"]);
    let said = weights(|config| config["first"]["path_name"] = json!("../../../../etc/passwd"));
    assert_says(&said, &["weight `first`", "missing"]);
    assert_says(
        &weights(|config| config["first"]["use_pickle"] = json!(true)),
        &["weight `first`", "pickled"],
    );
    assert_says(
        &weights(|config| config["first"]["tensor_meta"] = json!(null)),
        &["weight `first`", "neither type"],
    );
    let meta =
        |field: &'static str, value: Value| weights(|config| config["first"]["tensor_meta"][field] = value);
    assert_says(&meta("dtype", json!(99)), &["weight `first`", "element type 99"]);
    assert_says(
        &meta("dtype", json!(8)),
        &["weight `first`", "float64 [10, 16]", "in the graph it is float32 [10, 16]"],
    );
    assert_says(&meta("layout", json!(1)), &["weight `first`", "layout 1"]);
    let ints =
        |values: &[i64]| json!(values.iter().map(|value| json!({"as_int": value})).collect::<Vec<_>>());
    assert_says(&meta("sizes", ints(&[-10, 16])), &["weight `first`", "size -10"]);
    assert_says(&meta("sizes", ints(&[10, 17])), &["stored as float32 [10, 17]", "float32 [10, 16]"]);
    assert_says(&meta("strides", ints(&[16])), &["weight `first`", "2 sizes and 1 strides"]);
    assert_says(&meta("strides", ints(&[16, -1])), &["weight `first`", "stride -1"]);
    assert_says(&meta("strides", ints(&[1_000, 1])), &["weight `first`", "ends at byte", "2560 bytes"]);
    assert_says(&meta("strides", ints(&[i64::MAX, i64::MAX])), &["weight `first`", "63 bits"]);
    assert_says(&meta("strides", ints(&[1 << 60, 1])), &["weight `first`", "63 bits"]);
    assert_says(&meta("strides", ints(&[1 << 40, 1])), &["bytes of weight `first`", "over the limit"]);
    assert_says(&meta("storage_offset", json!({"as_int": i64::MAX})), &["weight `first`", "63 bits"]);
    assert_says(&meta("storage_offset", json!({"as_int": -1})), &["weight `first`", "storage offset -1"]);
    let symbolic = json!({"as_expr": {"expr_str": "Symbol('s0')", "hint": null}});
    assert_says(&meta("storage_offset", symbolic), &["weight `first`", "Symbol('s0')"]);
    // What an export of fake tensors leaves behind, and a byte too few.
    let mut short = pieces.clone();
    short.get("data/weights/weight_1").truncate(1916);
    assert_says(&short.refusal(), &["`second`", "ends at byte 1920", "1916 bytes"]);
    short.get("data/weights/weight_1").truncate(1915);
    assert_says(&short.refusal(), &["`first`", "1915 bytes"]);
    assert_says(&pieces.clone().set("data/weights/weight_1", b"").refusal(), &["which has 0 bytes"]);
    assert_says(
        &pieces.clone().without("data/weights/weight_1").refusal(),
        &["data/weights/weight_1", "missing"],
    );
    assert_says(&pieces.without(WEIGHTS).refusal(), &["model_weights_config.json` is missing"]);
}

#[test]
fn weights_without_a_node() {
    let empty = |json: &mut Value| {
        let graph = &mut json["graph_module"]["graph"];
        graph["nodes"] = json!([]);
        graph["outputs"] = json!([{"as_tensor": {"name": "p_linear_weight"}}]);
        let spec = json!({"user_output": {"arg": {"as_tensor": {"name": "p_linear_weight"}}}});
        json["graph_module"]["signature"]["output_specs"] = json!([spec]);
    };
    assert_says(&model("two_inputs", empty), &["weight `linear.weight`", "computes nothing"]);
}

#[test]
fn limits() {
    let default = Limits::default();
    let cases = [
        (Limits { entries: 3, ..default }, "number of entries"),
        (Limits { json_bytes: 100, ..default }, "size of entry `models/model.json`"),
        (Limits { nodes: 3, ..default }, "number of nodes is 4, over the limit of 3"),
        (Limits { values: 3, ..default }, "number of values is 4, over the limit of 3"),
        (Limits { weights: 2, ..default }, "number of weights is 4, over the limit of 2"),
        (Limits { dimensions: 1, ..default }, "dimensions is 2, over the limit of 1"),
        (
            Limits { tensor_bytes: 47, ..default },
            "bytes of weight `linear.weight` is 48, over the limit of 47",
        ),
        (Limits { name_bytes: 10, ..default }, "length of the name"),
        (Limits { expression_bytes: 10, ..default }, "length of an expression"),
    ];
    for (limits, part) in cases {
        let error = Archive::open_with(&path("two_inputs"), &limits).unwrap_err();
        assert!(matches!(error, ModelError::Limit { .. }), "{error}");
        assert_says(&error.to_string(), &[part, "over the limit"]);
    }
    let error = Archive::open_with(&path("no_grad"), &Limits { graph_depth: 1, ..default }).unwrap_err();
    assert_says(&error.to_string(), &["nested sub-graphs is 2, over the limit of 1"]);
}

#[test]
fn unknown_expressions_are_unknown_sizes() {
    let unknown = |json: &mut Value| {
        let expr = json!({"as_expr": {"expr_str": "Magic(Integer(3))", "hint": {"as_int": 2}}});
        json["graph_module"]["graph"]["tensor_values"]["x"]["sizes"][0] = expr;
    };
    let archive = Pieces::of("two_inputs").edit(MODEL, unknown).open().unwrap();
    let pswitch_model::InputKind::Tensor { shape, .. } = &archive.program().inputs[0].kind else { panic!() };
    assert_eq!(shape[0], pswitch_model::Dim::Unknown { hint: Some(2) });
    archive.program().bind_shapes(&[&[1_000, 4], &[3, 4]]).unwrap();
}

#[test]
fn ranges_without_an_end() {
    for bound in [json!(null), json!("Infinity"), json!(1e30), json!(i64::MAX), json!(u64::MAX)] {
        let open = |json: &mut Value| {
            let ranges = json["range_constraints"].as_object_mut().unwrap();
            ranges.values_mut().for_each(|range| *range = json!({"min_val": null, "max_val": bound}));
        };
        let archive = Pieces::of("two_inputs").edit(MODEL, open).open().unwrap();
        let range = archive.program().symbols.values().next().unwrap();
        assert_eq!((range.min, range.max), (0, None), "{bound}");
        archive.program().bind_shapes(&[&[1 << 40, 4], &[1 << 40, 4]]).unwrap();
    }
}
