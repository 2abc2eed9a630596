//! Figures that nobody measured, for tests.

use std::time::Duration;

use super::{Bar, Cycle, Figure, LeftOut, Load, Parts, Took};

const MODELS: [&str; 3] = ["resnet152", "inception_v3", "bert-base"];

fn took(what: &str, model: Option<&str>) -> Took {
    Took::new(what, model, Duration::from_millis(12_500))
}

/// One with bars of mechanisms and their medians on the first model; a reason for what is left out.
pub(crate) fn bars(number: u8, mechanisms: &[(&str, f64)]) -> Figure {
    let bars = MODELS.iter().zip([1.0, 0.9, 2.5]).flat_map(|(model, factor)| {
        mechanisms.iter().map(move |(mechanism, median)| {
            let around = [0.96, 1.0, 1.07];
            let latencies_ms = around.map(|around| median * around * factor).to_vec();
            let parts = Parts { queue_ms: 0.1, stop_ms: 0.5, switch_ms: 1.0, compute_ms: 3.0, reply_ms: 0.2 };
            let parts = (!mechanism.starts_with("pytorch-")).then_some(parts);
            Bar { model: (*model).to_owned(), mechanism: (*mechanism).to_owned(), latencies_ms, parts }
        })
    });
    let left_out = LeftOut {
        mechanism: "mps".to_owned(),
        model: Some("vit_l_16".to_owned()),
        reason: "a host device has no NVIDIA MPS, which shares a GPU between the processes of one user"
            .to_owned(),
    };
    let took = vec![took(Took::PYTORCH, None), took("mps", Some(MODELS[0]))];
    let left_out = vec![left_out];
    Figure { number, bars: bars.collect(), cycles: Vec::new(), loads: Vec::new(), left_out, took }
}

/// Figure 6.
pub(crate) fn cycles() -> Figure {
    let mut cycles = Vec::new();
    let mechanisms = [
        ("ready", 200.0, 4.9),
        ("pswitch", 195.0, 5.1),
        ("mps", 80.0, 12.0),
        ("stop-and-start", 60.0, 4800.0),
    ];
    for (mechanism, batches, latency) in mechanisms {
        for cycle_s in [1.0, 2.0, 5.0, 10.0, 30.0] {
            let answered = mechanism != "stop-and-start" || cycle_s > 5.0;
            let (batches, latencies) = if answered {
                (batches, [0.9, 1.0, 1.4].map(|around| around * latency).to_vec())
            } else {
                (0.0, Vec::new())
            };
            cycles.push(Cycle {
                mechanism: mechanism.to_owned(),
                model: MODELS[0].to_owned(),
                cycle_s,
                batches_per_s: vec![batches * 0.95, batches, batches * 1.02],
                latencies_ms: latencies,
                steps_per_s: vec![19.0, 19.5],
            });
        }
    }
    let took = vec![took(Took::SERVER, Some(MODELS[0]))];
    Figure { number: 6, bars: Vec::new(), cycles, loads: Vec::new(), left_out: Vec::new(), took }
}

/// Figure 10.
pub(crate) fn loads() -> Figure {
    let mut loads = Vec::new();
    for arrivals in ["poisson", "bursty"] {
        for (models, requests_per_s) in [(12, 10.0), (12, 20.0), (24, 10.0), (24, 20.0)] {
            for (mechanism, factor) in [("pswitch", 1.0), ("load-on-demand", 1.8)] {
                let latencies_ms =
                    (1_u8..=100).map(|place| f64::from(place) * factor * requests_per_s / 20.0);
                loads.push(Load {
                    mechanism: mechanism.to_owned(),
                    arrivals: arrivals.to_owned(),
                    models,
                    oversubscription: 3.0,
                    requests_per_s,
                    latencies_ms: latencies_ms.collect(),
                    slo_ms: 60.0,
                    refused: 2,
                    switches: 40,
                    training_kept: Some(0.8 / factor),
                });
            }
        }
    }
    let took = vec![took("load-on-demand", Some("12 models"))];
    Figure { number: 10, bars: Vec::new(), cycles: Vec::new(), loads, left_out: Vec::new(), took }
}

/// One of each kind, and figures of bars with every mechanism.
pub(crate) fn all() -> Vec<Figure> {
    let pytorch = [
        ("pytorch-eager", 8.6),
        ("pytorch-graph", 4.4),
        ("pytorch-copy-then-run", 18.8),
        ("pytorch-stop-and-start", 7800.0),
    ];
    let five = [("ready", 4.9), ("pswitch", 5.6), ("mps", 24.0), ("stop-and-start", 2380.0)];
    vec![
        bars(5, &[&five[..], &pytorch[..]].concat()),
        cycles(),
        bars(7, &[("pswitch", 5.6), ("per-layer", 7.2), ("grouped", 9.1), ("no-optimization", 12.5)]),
        bars(
            8,
            &[
                ("pswitch", 5.6),
                ("no-unified", 11.0),
                ("no-ipc", 9.5),
                ("no-pinned", 30.0),
                ("managed", 60.0),
            ],
        ),
        bars(9, &[("pswitch", 5.6), ("one-process", 190.0), ("two-processes", 2800.0)]),
        loads(),
    ]
}
