//! `pswitch infer`.

use std::fmt::Write as _;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};

use crate::args::{Infer, Print};
use crate::client::{Client, ModelMetadata};
use crate::exit::{Classify as _, Failure, print};
use crate::tensors::Tensor;

/// Values of an output that a summary shows.
const SHOWN_VALUES: usize = 8;

pub(crate) fn run(args: &Infer) -> anyhow::Result<()> {
    let client = Client::new(
        &args.server.server,
        args.timeout_ms.map(|ms| Duration::from_millis(ms) + Duration::from_secs(5)),
    );
    let metadata = client.metadata(&args.model)?;
    let inputs = read_inputs(args, &metadata).class(Failure::Input)?;
    let tensors: Vec<Value> = inputs
        .iter()
        .map(|input| {
            json!({
                "name": input.name,
                "datatype": input.datatype,
                "shape": input.shape,
                "parameters": {"binary_data_size": input.data.len()},
            })
        })
        .collect();
    let mut header = json!({"inputs": tensors, "parameters": {"binary_data_output": true}});
    if let Some(ms) = args.timeout_ms {
        header["parameters"]["timeout"] = (ms * 1000).into();
    }
    let data: Vec<Vec<u8>> = inputs.into_iter().map(|input| input.data).collect();
    let answer = client.infer(&args.model, &header, &data)?;
    let outputs = split_outputs(&answer.header, &answer.data)?;
    if let Some(folder) = &args.save {
        std::fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
        for output in &outputs {
            output.save(&folder.join(format!("{}.npy", output.name.replace('/', "_"))))?;
        }
    }
    show(args.print, &outputs, &answer.header)
}

fn read_inputs(args: &Infer, metadata: &ModelMetadata) -> anyhow::Result<Vec<Tensor>> {
    let names = || metadata.inputs.iter().map(|input| input.name.as_str()).collect::<Vec<_>>().join(", ");
    args.inputs
        .iter()
        .map(|(name, value)| {
            let input = metadata
                .inputs
                .iter()
                .find(|input| &input.name == name)
                .with_context(|| format!("'{}' has no input '{name}', only {}", args.model, names()))?;
            Tensor::parse(name, &input.datatype, value).with_context(|| format!("input '{name}'"))
        })
        .collect()
}

fn split_outputs(header: &Value, mut data: &[u8]) -> anyhow::Result<Vec<Tensor>> {
    let outputs = header["outputs"].as_array().context("the answer has no outputs")?;
    outputs
        .iter()
        .map(|output| {
            let text = |key: &str| output[key].as_str().unwrap_or_default().to_owned();
            let size = output["parameters"]["binary_data_size"].as_u64().unwrap_or(0);
            let size = usize::try_from(size).unwrap_or(usize::MAX);
            ensure!(size <= data.len(), "the answer is shorter than it says");
            let (own, rest) = data.split_at(size);
            data = rest;
            let shape = output["shape"].as_array().into_iter().flatten().filter_map(Value::as_u64).collect();
            Ok(Tensor { name: text("name"), datatype: text("datatype"), shape, data: own.to_vec() })
        })
        .collect()
}

fn show(what: Print, outputs: &[Tensor], header: &Value) -> anyhow::Result<()> {
    let mut text = String::new();
    match what {
        Print::None => {}
        Print::Json => {
            let mut all = serde_json::Map::new();
            for output in outputs {
                all.insert(output.name.clone(), output.to_json()?);
            }
            writeln!(text, "{}", Value::Object(all))?;
        }
        Print::Summary => {
            for output in outputs {
                let values: Vec<String> =
                    output.values(SHOWN_VALUES)?.iter().map(ToString::to_string).collect();
                let count: u64 = output.shape.iter().product();
                let more = if count > values.len() as u64 { ", ..." } else { "" };
                let Tensor { name, datatype, shape, .. } = output;
                writeln!(text, "{name} {datatype} {shape:?}: {}{more}", values.join(", "))?;
            }
            let time = |key: &str| header["parameters"][key].as_f64().unwrap_or(0.0) / 1e3;
            writeln!(
                text,
                "queue {:.2} ms, switch {:.2} ms, compute {:.2} ms",
                time("queue_us"),
                time("switch_us"),
                time("compute_us")
            )?;
        }
    }
    print(&text)
}
