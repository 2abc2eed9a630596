//! Prints what is in a `.pt2` archive: `cargo run -p pswitch-model --example inspect -- FILE.pt2 [--nodes]`.
//! Without a file it shows one of the crate's fixtures.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, ErrorKind, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use pswitch_model::{Archive, Dim, InputKind, OutputKind, Program, WeightKind};

fn main() -> ExitCode {
    let (flags, files): (Vec<String>, Vec<String>) =
        std::env::args().skip(1).partition(|arg| arg.starts_with("--"));
    let fixture = || PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/two_inputs.pt2"));
    let path = files.first().map_or_else(fixture, PathBuf::from);
    let archive = match Archive::open(&path).and_then(|archive| archive.verify().map(|()| archive)) {
        Ok(archive) => archive,
        Err(error) => {
            eprintln!("error: {error}");
            let mut source = std::error::Error::source(&error);
            while let Some(cause) = source {
                eprintln!("  caused by: {cause}");
                source = cause.source();
            }
            return ExitCode::FAILURE;
        }
    };
    match print(&archive, flags.iter().any(|flag| flag == "--nodes"), &mut io::stdout().lock()) {
        // Whoever reads this may have seen enough.
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            eprintln!("error: cannot print: {error}");
            ExitCode::FAILURE
        }
        _ => ExitCode::SUCCESS,
    }
}

fn print(archive: &Archive, with_nodes: bool, out: &mut impl Write) -> io::Result<()> {
    let program = archive.program();
    let (path, digest) = (archive.path().display(), archive.digest());
    writeln!(out, "{path} (digest {digest:016x}, PyTorch {})", program.torch_version)?;
    print_signature(program, out)?;
    print_weights(program, out)?;
    print_operators(program, out)?;
    if with_nodes {
        print_nodes(program, out)?;
    }
    Ok(())
}

fn print_signature(program: &Program, out: &mut impl Write) -> io::Result<()> {
    writeln!(out, "\ninputs:")?;
    for input in &program.inputs {
        match &input.kind {
            InputKind::Tensor { dtype, shape, .. } => {
                writeln!(out, "  {}: {dtype} {}", input.name, describe(shape))?
            }
            InputKind::SymInt { dim, .. } => writeln!(out, "  {}: integer {dim}", input.name)?,
            InputKind::Constant(constant) => writeln!(out, "  {}: always {constant:?}", input.name)?,
        }
    }
    writeln!(out, "outputs:")?;
    for output in &program.outputs {
        match &output.kind {
            OutputKind::Tensor { dtype, shape, .. } => {
                writeln!(out, "  {}: {dtype} {}", output.name, describe(shape))?
            }
            other => writeln!(out, "  {}: {other:?}", output.name)?,
        }
    }
    for mutation in &program.mutations {
        let name = |value: pswitch_model::ValueId| &program.values[value.index()].name;
        writeln!(
            out,
            "afterwards {} is written to {:?} {}",
            name(mutation.from),
            mutation.kind,
            name(mutation.into)
        )?;
    }
    for (name, range) in &program.symbols {
        writeln!(
            out,
            "  {name}: {} to {}",
            range.min,
            range.max.map_or("any".to_owned(), |max| max.to_string())
        )?;
    }
    Ok(())
}

fn print_weights(program: &Program, out: &mut impl Write) -> io::Result<()> {
    let span = program.span();
    writeln!(
        out,
        "\nweights: {} in {} storages, {} bytes",
        program.weights.len(),
        program.storages.len(),
        span.bytes
    )?;
    for weight in &program.weights {
        let kind = match weight.kind {
            WeightKind::Parameter => "parameter",
            WeightKind::Buffer { .. } => "buffer",
            WeightKind::Constant => "constant",
        };
        let at = span.offset(weight.storage) + weight.offset_bytes;
        let user = weight.first_use.map_or("nothing", |node| &program.nodes[node].name);
        writeln!(
            out,
            "  {at:>12} {kind:<9} {} {:?} {} first used by {user}",
            weight.dtype, weight.sizes, weight.name
        )?;
    }
    Ok(())
}

fn print_operators(program: &Program, out: &mut impl Write) -> io::Result<()> {
    let layers = program.layers();
    let with_bytes: Vec<_> = layers.iter().filter(|layer| layer.bytes > 0).collect();
    let modules: BTreeSet<&str> = program.nodes.iter().map(|node| node.module.as_str()).collect();
    writeln!(
        out,
        "\nlayers: {} of which {} bring weights, in {} modules",
        layers.len(),
        with_bytes.len(),
        modules.len()
    )?;
    for layer in &with_bytes {
        writeln!(
            out,
            "  {:>5} {:>12} bytes {} ({})",
            layer.node, layer.bytes, layer.name, program.nodes[layer.node].module
        )?;
    }
    let mut operators: BTreeMap<String, usize> = BTreeMap::new();
    for node in &program.nodes {
        *operators.entry(node.target.to_string()).or_default() += 1;
    }
    writeln!(out, "\noperators:")?;
    for (operator, count) in operators {
        writeln!(out, "  {count:>5} {operator}")?;
    }
    Ok(())
}

fn print_nodes(program: &Program, out: &mut impl Write) -> io::Result<()> {
    writeln!(out, "\nnodes:")?;
    for (node, dying) in program.nodes.iter().zip(program.last_uses()) {
        let inputs: Vec<String> =
            node.inputs.iter().map(|input| format!("{}={:?}", input.name, input.value)).collect();
        writeln!(
            out,
            "  {:?} = {}({}) at {}, then {dying:?}",
            node.outputs,
            node.target,
            inputs.join(", "),
            node.place
        )?;
    }
    Ok(())
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
