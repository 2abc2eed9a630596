//! Bars of PyTorch itself, measured in the same run by a process of its own.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use serde::Deserialize;

use crate::figures::{Bar, LeftOut, Took};
use crate::progress;
use crate::pytorch;
use crate::subject::{Served, Subject};

const MODULE: &str = "pswitch.pytorch_rows";

/// All rows, in the order of the plot.
const ROWS: [&str; 4] = ["pytorch-eager", "pytorch-graph", "pytorch-copy-then-run", "pytorch-stop-and-start"];

/// What the module prints.
#[derive(Debug, Deserialize)]
struct Printed {
    models: BTreeMap<String, Rows>,
}

/// What was measured of one model, and why there is no more.
#[derive(Debug, Deserialize)]
struct Rows {
    rows: BTreeMap<String, Vec<f64>>,
    left_out: BTreeMap<String, String>,
}

/// The bars of PyTorch, and what is left out of them.
#[derive(Debug, Default, PartialEq)]
pub(super) struct PyTorch {
    pub(super) bars: Vec<Bar>,
    pub(super) left_out: Vec<LeftOut>,
    pub(super) took: Vec<Took>,
}

impl PyTorch {
    /// Measures so many requests and starts of a process a model, while nothing else uses the device. What fails is left
    /// out.
    pub(super) fn measure(
        python: &Path,
        served: Served,
        subjects: &[Subject],
        (requests, starts): (usize, usize),
    ) -> Self {
        progress::say("PyTorch's own rows ...");
        let archives: Vec<&Path> = subjects.iter().map(|subject| subject.archive.as_path()).collect();
        let (requests, starts) = (requests.to_string(), starts.to_string());
        let arguments = ["--requests", &requests, "--starts", &starts];
        let begun = Instant::now();
        let mut found = match pytorch::run(python, MODULE, served, &arguments, &archives) {
            Ok(printed) => Self::of(printed, subjects.iter().map(|s| (s.name.as_str(), s.archive.as_path()))),
            Err(error) => {
                let reason = format!("{error:#}");
                progress::say(format_args!("PyTorch is left out: {reason}"));
                let left_out = LeftOut { mechanism: "pytorch".to_owned(), model: None, reason };
                Self { left_out: vec![left_out], ..Self::default() }
            }
        };
        found.took.push(Took::new(Took::PYTORCH, None, begun.elapsed()));
        found
    }

    fn of<'a>(mut printed: Printed, subjects: impl Iterator<Item = (&'a str, &'a Path)>) -> Self {
        let mut found = Self::default();
        for (model, archive) in subjects {
            let rows = pytorch::name(archive).and_then(|name| printed.models.remove(&name));
            for mechanism in ROWS {
                let (model, mechanism) = (model.to_owned(), mechanism.to_owned());
                let latencies_ms = rows.as_ref().and_then(|rows| rows.rows.get(&mechanism)).cloned();
                if let Some(latencies_ms) = latencies_ms {
                    found.bars.push(Bar { model, mechanism, latencies_ms, parts: None });
                } else {
                    let reason = rows.as_ref().and_then(|rows| rows.left_out.get(&mechanism)).cloned();
                    let reason = reason.unwrap_or_else(|| format!("{MODULE} has not measured it"));
                    found.left_out.push(LeftOut { mechanism, model: Some(model), reason });
                }
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_become_bars_and_the_others_say_why_they_are_missing() {
        // As `python/src/pswitch/pytorch_rows.py` prints it.
        let printed = r#"{"torch": "2.11.0", "models": {"a": {
            "rows": {"pytorch-eager": [8.5, 8.75], "pytorch-stop-and-start": [7800.0]},
            "left_out": {"pytorch-graph": "CUDA graphs need a GPU"}}}}"#;
        let printed = pytorch::parse(MODULE, printed.as_bytes()).unwrap();
        let subjects = [("first", Path::new("/models/a/model.pt2")), ("second", Path::new("b.pt2"))];
        let PyTorch { bars, left_out, .. } = PyTorch::of(printed, subjects.into_iter());
        let bars: Vec<_> =
            bars.iter().map(|bar| (&*bar.model, &*bar.mechanism, bar.latencies_ms.len())).collect();
        assert_eq!(bars, [("first", "pytorch-eager", 2), ("first", "pytorch-stop-and-start", 1)]);
        let reasons: Vec<_> = left_out.iter().map(|left_out| &*left_out.reason).collect();
        let unmeasured = "pswitch.pytorch_rows has not measured it";
        assert_eq!(
            reasons,
            ["CUDA graphs need a GPU", unmeasured, unmeasured, unmeasured, unmeasured, unmeasured]
        );
    }

    #[test]
    fn a_python_that_fails_is_left_out_with_its_reason() {
        let served = Served { device: pswitch_device::DeviceId::Host(0), threads: 1 };
        let found = PyTorch::measure(Path::new("false"), served, &[], (1, 1));
        assert!(found.bars.is_empty());
        assert!(found.left_out[0].reason.starts_with("false -m pswitch.pytorch_rows failed"));
    }
}
