//! Archives with random changes are read or refused, never more: no panic, and nothing outside of the file.

use proptest::prelude::*;
use pswitch_model::{Archive, Expr, Given, InputKind, Symbols};
use serde_json::{Value, json};

use crate::support::{MODEL, NAMES, Pieces, WEIGHTS, open_bytes, path};

/// Does with an archive that was accepted what its users would.
fn use_it(archive: &Archive, sizes: &[u64]) {
    let program = archive.program();
    let span = program.span();
    for (index, storage) in (0..).zip(&program.storages) {
        let id = pswitch_model::StorageId(index);
        assert_eq!(archive.storage_bytes(id).len() as u64, storage.bytes);
        assert!(span.offset(id) + storage.bytes <= span.bytes);
    }
    for weight in &program.weights {
        let storage = &program.storages[weight.storage.index()];
        let last: u64 = weight
            .sizes
            .iter()
            .zip(&weight.strides)
            .map(|(size, stride)| size.saturating_sub(1) * stride)
            .sum();
        let elements = if weight.sizes.contains(&0) { 0 } else { last + 1 };
        assert!(weight.offset_bytes + elements * weight.dtype.size_bytes() <= storage.bytes);
    }
    assert_eq!(program.layers().iter().map(|layer| layer.bytes).sum::<u64>(), span.used_bytes);
    assert_eq!(program.last_uses().len(), program.nodes.len());
    let mut sizes = sizes.iter().copied().cycle();
    let shapes: Vec<Option<Vec<u64>>> = program
        .inputs
        .iter()
        .filter_map(|input| match &input.kind {
            InputKind::Tensor { shape, .. } => Some(Some(sizes.by_ref().take(shape.len()).collect())),
            InputKind::SymInt { .. } => Some(None),
            InputKind::Constant(_) => None,
        })
        .collect();
    let given: Vec<Given<'_>> = shapes
        .iter()
        .map(|shape| shape.as_ref().map_or(Given::Int(3), |shape| Given::Shape(shape)))
        .collect();
    if let Ok(symbols) = program.bind(&given) {
        for value in &program.values {
            if let pswitch_model::ValueKind::Tensor(Some(meta)) = &value.kind {
                let _sizes: Vec<Option<u64>> = meta.shape.iter().map(|dim| dim.evaluate(&symbols)).collect();
            }
        }
    }
    archive.digest();
    drop(archive.verify());
}

/// Numbers that are off by one, too large or negative, and things that are no numbers.
fn leaf() -> impl Strategy<Value = Value> {
    prop_oneof![
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        (-3_i64..70).prop_map(Value::from),
        prop::sample::select(vec![1_i64 << 31, 1 << 32, 1 << 61, 1 << 62, i64::MAX, i64::MIN])
            .prop_map(Value::from),
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        prop::sample::select(vec![
            "x",
            "y",
            "linear",
            "add",
            "p_first",
            "weight_1",
            "Infinity",
            "as_tensor",
            ""
        ])
        .prop_map(Value::from),
        ".{0,20}".prop_map(Value::from),
        Just(json!([])),
        Just(json!({})),
        Just(json!({"as_int": -1})),
        Just(json!({"as_none": true})),
        Just(json!({"as_tensor": {"name": "x"}})),
        Just(json!({"as_expr": {"expr_str": "FloorDiv(Symbol('s0'), Integer(0))", "hint": null}})),
    ]
}

/// What happens to the node of a JSON tree that a random number picks.
#[derive(Debug, Clone)]
enum Change {
    Replace(Value),
    Remove,
    Repeat,
}

fn change() -> impl Strategy<Value = (usize, Change)> {
    let change = prop_oneof![
        4 => leaf().prop_map(Change::Replace),
        1 => Just(Change::Remove),
        1 => Just(Change::Repeat),
    ];
    (any::<usize>(), change)
}

fn count(json: &Value) -> usize {
    1 + match json {
        Value::Array(items) => items.iter().map(count).sum(),
        Value::Object(fields) => fields.values().map(count).sum::<usize>(),
        _ => 0,
    }
}

/// Changes the node with this number, counted from the root.
fn apply(json: &mut Value, mut number: usize, change: &Change) {
    if number == 0 {
        if let Change::Replace(value) = change {
            *json = value.clone();
        }
        return;
    }
    number -= 1;
    match json {
        Value::Array(items) => {
            for index in 0..items.len() {
                let size = count(&items[index]);
                if number < size {
                    match change {
                        Change::Remove if number == 0 => drop(items.remove(index)),
                        Change::Repeat if number == 0 => items.insert(index, items[index].clone()),
                        _ => apply(&mut items[index], number, change),
                    }
                    return;
                }
                number -= size;
            }
        }
        Value::Object(fields) => {
            for key in fields.keys().cloned().collect::<Vec<_>>() {
                let size = count(&fields[&key]);
                if number < size {
                    match change {
                        Change::Remove if number == 0 => drop(fields.remove(&key)),
                        _ => apply(&mut fields[&key], number, change),
                    }
                    return;
                }
                number -= size;
            }
        }
        _ => {}
    }
}

fn edited(pieces: Pieces, entry: &str, changes: &[(usize, Change)]) -> Pieces {
    pieces.edit(entry, |json| {
        for (number, change) in changes {
            let number = number % count(json);
            apply(json, number, change);
        }
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn changed_bytes(
        name in prop::sample::select(&NAMES[..]),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        cut in prop::option::weighted(0.2, any::<prop::sample::Index>()),
        near_end in any::<bool>(),
    ) {
        let mut bytes = std::fs::read(path(name)).unwrap();
        // The directory is at the end, and few bytes of the rest matter.
        let first = if near_end { bytes.len().saturating_sub(1_200) } else { 0 };
        for (place, value) in changes {
            let place = first + place.index(bytes.len() - first);
            bytes[place] = value;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        if let Ok(archive) = open_bytes(&bytes) {
            use_it(&archive, &[2, 4]);
        }
    }

    #[test]
    fn changed_programs(
        name in prop::sample::select(&NAMES[..]),
        changes in prop::collection::vec(change(), 1..4),
        sizes in prop::collection::vec(prop_oneof![0_u64..40, any::<u64>()], 1..6),
    ) {
        if let Ok(archive) = edited(Pieces::of(name), MODEL, &changes).open() {
            use_it(&archive, &sizes);
        }
    }

    #[test]
    fn changed_weights(changes in prop::collection::vec(change(), 1..4)) {
        if let Ok(archive) = edited(Pieces::of("weights"), WEIGHTS, &changes).open() {
            use_it(&archive, &[4]);
        }
    }

    #[test]
    fn any_expression(text in r"((Add|Mul|Pow|Max|FloorDiv|Mod|Integer|Rational|Symbol|CeilToInt)\(|\)|, |-?[0-9]{1,19}|'s0'|s=True|.){0,24}") {
        let mut symbols = Symbols::default();
        symbols.insert("s0", 7);
        if let Some(expr) = Expr::parse(&text) {
            expr.evaluate(&symbols);
            drop(expr.to_string());
        }
    }

    /// Whole expressions, of numbers at the edges.
    #[test]
    fn any_value(expr in expression()) {
        let mut symbols = Symbols::default();
        symbols.insert("s0", 7);
        let expr = Expr::parse(&expr).expect("is well formed");
        expr.evaluate(&symbols);
        drop(expr.to_string());
    }
}

fn expression() -> impl Strategy<Value = String> {
    let leaf = prop_oneof![
        any::<i64>().prop_map(|value| format!("Integer({value})")),
        (-4_i64..5).prop_map(|value| format!("Integer({value})")),
        (any::<i64>(), any::<i64>()).prop_map(|(p, q)| format!("Rational({p}, {q})")),
        Just("Symbol('s0', positive=True, integer=True)".to_owned()),
    ];
    leaf.prop_recursive(6, 40, 3, |inner| {
        let pair = prop::sample::select(vec![
            "FloorDiv",
            "CleanDiv",
            "Mod",
            "PythonMod",
            "Pow",
            "CeilDiv",
            "IntTrueDiv",
        ]);
        let list = prop::sample::select(vec!["Add", "Mul", "Max", "Min"]);
        let one = prop::sample::select(vec!["FloorToInt", "CeilToInt", "TruncToInt"]);
        prop_oneof![
            (pair, inner.clone(), inner.clone()).prop_map(|(name, a, b)| format!("{name}({a}, {b})")),
            (list, prop::collection::vec(inner.clone(), 1..4))
                .prop_map(|(name, terms)| format!("{name}({})", terms.join(", "))),
            (one, inner).prop_map(|(name, a)| format!("{name}({a})")),
        ]
    })
}
