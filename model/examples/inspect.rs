//! Prints what is in a `.pt2` archive: `cargo run -p pswitch-model --example inspect -- FILE.pt2 [--nodes]`.
//! Without a file it shows one of the crate's fixtures.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use pswitch_model::{Archive, Dim, InputKind, ModelError, OutputKind, Program, WeightKind};

fn main() -> ExitCode {
    let (flags, files): (Vec<String>, Vec<String>) =
        std::env::args().skip(1).partition(|arg| arg.starts_with("--"));
    let fixture = || PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/two_inputs.pt2"));
    let path = files.first().map_or_else(fixture, PathBuf::from);
    match inspect(&path, flags.iter().any(|flag| flag == "--nodes")) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            let mut source = std::error::Error::source(&error);
            while let Some(cause) = source {
                eprintln!("  caused by: {cause}");
                source = cause.source();
            }
            ExitCode::FAILURE
        }
    }
}

fn inspect(path: &Path, with_nodes: bool) -> Result<(), ModelError> {
    let archive = Archive::open(path)?;
    archive.verify()?;
    let program = archive.program();
    println!("{} (digest {:016x}, PyTorch {})", path.display(), archive.digest(), program.torch_version);
    print_signature(program);
    print_weights(program);
    print_operators(program);
    if with_nodes {
        print_nodes(program);
    }
    Ok(())
}

fn print_signature(program: &Program) {
    println!("\ninputs:");
    for input in &program.inputs {
        match &input.kind {
            InputKind::Tensor { dtype, shape, .. } => {
                println!("  {}: {dtype} {}", input.name, describe(shape))
            }
            InputKind::SymInt { dim, .. } => println!("  {}: integer {dim}", input.name),
            InputKind::Constant(constant) => println!("  {}: always {constant:?}", input.name),
        }
    }
    println!("outputs:");
    for output in &program.outputs {
        match &output.kind {
            OutputKind::Tensor { dtype, shape, .. } => {
                println!("  {}: {dtype} {}", output.name, describe(shape))
            }
            other => println!("  {}: {other:?}", output.name),
        }
    }
    for mutation in &program.mutations {
        let name = |value: pswitch_model::ValueId| &program.values[value.index()].name;
        println!(
            "afterwards {} is written to {:?} {}",
            name(mutation.from),
            mutation.kind,
            name(mutation.into)
        );
    }
    for (name, range) in &program.symbols {
        println!("  {name}: {} to {}", range.min, range.max.map_or("any".to_owned(), |max| max.to_string()));
    }
}

fn print_weights(program: &Program) {
    let span = program.span();
    println!(
        "\nweights: {} in {} storages, {} bytes",
        program.weights.len(),
        program.storages.len(),
        span.bytes
    );
    for weight in &program.weights {
        let kind = match weight.kind {
            WeightKind::Parameter => "parameter",
            WeightKind::Buffer { .. } => "buffer",
            WeightKind::Constant => "constant",
        };
        let at = span.offset(weight.storage) + weight.offset_bytes;
        let user = weight.first_use.map_or("nothing", |node| &program.nodes[node].name);
        println!(
            "  {at:>12} {kind:<9} {} {:?} {} first used by {user}",
            weight.dtype, weight.sizes, weight.name
        );
    }
}

fn print_operators(program: &Program) {
    let layers = program.layers();
    let with_bytes: Vec<_> = layers.iter().filter(|layer| layer.bytes > 0).collect();
    let modules: BTreeSet<&str> = program.nodes.iter().map(|node| node.module.as_str()).collect();
    println!(
        "\nlayers: {} of which {} bring weights, in {} modules",
        layers.len(),
        with_bytes.len(),
        modules.len()
    );
    for layer in &with_bytes {
        println!(
            "  {:>5} {:>12} bytes {} ({})",
            layer.node, layer.bytes, layer.name, program.nodes[layer.node].module
        );
    }
    let mut operators: BTreeMap<String, usize> = BTreeMap::new();
    for node in &program.nodes {
        *operators.entry(node.target.to_string()).or_default() += 1;
    }
    println!("\noperators:");
    for (operator, count) in operators {
        println!("  {count:>5} {operator}");
    }
}

fn print_nodes(program: &Program) {
    println!("\nnodes:");
    for (node, dying) in program.nodes.iter().zip(program.last_uses()) {
        let inputs: Vec<String> =
            node.inputs.iter().map(|input| format!("{}={:?}", input.name, input.value)).collect();
        println!(
            "  {:?} = {}({}) at {}, then {dying:?}",
            node.outputs,
            node.target,
            inputs.join(", "),
            node.place
        );
    }
}

fn describe(shape: &[Dim]) -> String {
    let sizes: Vec<String> = shape
        .iter()
        .map(|dim| match dim {
            Dim::Symbol { name, min, max: Some(max), .. } => format!("{name} from {min} to {max}"),
            Dim::Symbol { name, min, max: None, .. } => format!("{name} from {min}"),
            other => other.to_string(),
        })
        .collect();
    format!("[{}]", sizes.join(", "))
}
