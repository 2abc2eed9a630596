//! `pswitch models`.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::Context as _;
use pswitch_controller::{Repository, describe};
use pswitch_model::Archive;
use serde::Serialize;

use crate::args::{Format, Models};
use crate::client::{Client, TensorMetadata};
use crate::exit::{Classify as _, Failure, print};

/// What is known of a model.
#[derive(Debug, Serialize)]
struct Row {
    name: String,
    version: String,
    state: String,
    reason: String,
    inputs: Vec<String>,
    outputs: Vec<String>,
    /// Known of a folder only.
    #[serde(skip_serializing_if = "Option::is_none")]
    weight_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    layers: Option<usize>,
}

pub(crate) fn run(args: &Models) -> anyhow::Result<()> {
    let rows = match &args.repository {
        Some(folder) => of_folder(folder)?,
        None => of_server(&args.server.server)?,
    };
    if args.format == Format::Json {
        return print(&format!("{}\n", serde_json::to_string_pretty(&rows)?));
    }
    let mut text = String::new();
    for row in &rows {
        let size = row.weight_bytes.map_or(String::new(), |bytes| {
            format!("  {}, {} layers", indicatif::HumanBytes(bytes), row.layers.unwrap_or(0))
        });
        writeln!(text, "{} (version {})  {}{size}", row.name, row.version, row.state)?;
        if !row.reason.is_empty() {
            writeln!(text, "    {}", row.reason)?;
        }
        for (arrow, tensors) in [("in ", &row.inputs), ("out", &row.outputs)] {
            for tensor in tensors {
                writeln!(text, "    {arrow} {tensor}")?;
            }
        }
    }
    print(&text)
}

fn of_server(server: &str) -> anyhow::Result<Vec<Row>> {
    let client = Client::new(server, None);
    let text = |tensors: Vec<TensorMetadata>| {
        tensors
            .into_iter()
            .map(|tensor| format!("{} {} {:?}", tensor.name, tensor.datatype, tensor.shape))
            .collect()
    };
    client
        .index()?
        .into_iter()
        .map(|entry| {
            let (inputs, outputs) = if entry.state == "READY" {
                let metadata = client.metadata(&entry.name)?;
                (text(metadata.inputs), text(metadata.outputs))
            } else {
                (Vec::new(), Vec::new())
            };
            Ok(Row {
                name: entry.name,
                version: entry.version,
                state: entry.state,
                reason: entry.reason,
                inputs,
                outputs,
                weight_bytes: None,
                layers: None,
            })
        })
        .collect()
}

fn of_folder(folder: &Path) -> anyhow::Result<Vec<Row>> {
    let repository = Repository::scan(folder).class(Failure::Input)?;
    let broken = |name: String, version: String, reason: String| Row {
        name,
        version,
        state: "BROKEN".to_owned(),
        reason,
        inputs: Vec::new(),
        outputs: Vec::new(),
        weight_bytes: None,
        layers: None,
    };
    let mut rows = Vec::new();
    for entry in repository.models {
        let (name, version) = (entry.name.as_str().to_owned(), entry.settings.version.clone());
        let described = Archive::open(&entry.archive)
            .context("it cannot be read")
            .and_then(|archive| Ok((describe(archive.program()).map_err(anyhow::Error::msg)?, archive)));
        rows.push(match described {
            Ok((signature, archive)) => {
                let text = |tensors: &[pswitch_controller::TensorSignature]| {
                    let line = |tensor: &pswitch_controller::TensorSignature| {
                        format!("{} {} {}", tensor.name, tensor.datatype, tensor.shape_text())
                    };
                    tensors.iter().map(line).collect()
                };
                Row {
                    name,
                    version,
                    state: "READABLE".to_owned(),
                    reason: String::new(),
                    inputs: text(&signature.inputs),
                    outputs: text(&signature.outputs),
                    weight_bytes: Some(archive.program().span().bytes),
                    layers: Some(archive.program().nodes.len()),
                }
            }
            Err(error) => broken(name, version, format!("{error:#}")),
        });
    }
    for entry in repository.broken {
        let error = anyhow::Error::from(entry.error);
        rows.push(broken(entry.name, String::new(), format!("{error:#}")));
    }
    rows.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(rows)
}
