//! What the measurements of a model come to: ratios, tables, goals.

use serde::Serialize;

use super::pytorch::{LEFT_OUT, Latencies, Quantiles};
use crate::report::{Goal, Table};
use crate::stats::Summary;

/// One model, measured.
#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct Measured {
    /// A request whose model is resident, inside the server, as all that is not said to be otherwise.
    pub(super) ready_ms: Summary,
    /// The same as the caller waits for it.
    pub(super) ready_answered_ms: Summary,
    /// The weights in one copy, without a server.
    pub(super) copy_floor_ms: Summary,
    /// A request whose weights have to come, in planned groups.
    pub(super) cold_ms: Summary,
    pub(super) cold_answered_ms: Summary,
    /// Of a cold request, from the decision to the first layer.
    pub(super) startup_ms: Summary,
    /// A cold request with all weights in one group.
    pub(super) copy_then_run_ms: Summary,
    /// A cold request as an HTTP client on this machine waits for it.
    pub(super) client_ms: Summary,
    /// The weights in one group, through the engine without a server.
    pub(super) engine_whole_ms: Summary,
    /// The same in as many equal groups as the plan has.
    pub(super) engine_groups_ms: Summary,
    /// Of the plan.
    pub(super) groups: usize,
    pub(super) predicted_ms: f64,
}

/// A model's numbers.
#[derive(Debug, Serialize)]
pub(super) struct Row {
    model: String,
    span_bytes: u64,
    compared_with: String,
    #[serde(flatten)]
    measured: Measured,
    pytorch: Option<Latencies>,
    #[serde(flatten)]
    ratios: Ratios,
}

/// Medians against each other.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
struct Ratios {
    ready_to_pytorch_graph: Option<f64>,
    ready_to_pytorch_eager: Option<f64>,
    /// Cold to the larger of ready and the copy floor.
    ratio: f64,
    copy_then_run_to_cold: f64,
    cold_p99_to_median: f64,
    /// Cold less ready.
    total_overhead_ms: f64,
    /// Of the engine with the plan's number of groups, of that with one.
    engine_bandwidth_percent: f64,
}

impl Ratios {
    fn new(measured: &Measured, pytorch: Option<&Latencies>) -> Self {
        let (cold, ready) = (measured.cold_ms.median, measured.ready_ms.median);
        let graph = pytorch.and_then(|latencies| latencies.graph_ms);
        Self {
            ready_to_pytorch_graph: graph.map(|graph| ready / graph.median),
            ready_to_pytorch_eager: pytorch.map(|latencies| ready / latencies.eager_ms.median),
            ratio: cold / ready.max(measured.copy_floor_ms.median),
            copy_then_run_to_cold: measured.copy_then_run_ms.median / cold,
            cold_p99_to_median: measured.cold_ms.p99 / cold,
            total_overhead_ms: cold - ready,
            engine_bandwidth_percent: measured.engine_whole_ms.median / measured.engine_groups_ms.median
                * 100.0,
        }
    }
}

impl Row {
    pub(super) fn new(
        model: &str,
        span_bytes: u64,
        compared_with: String,
        measured: Measured,
        pytorch: Option<Latencies>,
    ) -> Self {
        let ratios = Ratios::new(&measured, pytorch.as_ref());
        Self { model: model.to_owned(), span_bytes, compared_with, measured, pytorch, ratios }
    }
}

/// How far a cold request may be above its floor. Where copying takes as long as computing, as with ResNet152, neither
/// hides the first group of the one or the last of the other.
fn cold_limit(model: &str) -> f64 {
    if model == "resnet152" { 1.05 } else { 1.02 }
}

/// What was asked of a model.
pub(super) fn goals(row: &Row) -> Vec<Goal> {
    let Row { model, ratios, .. } = row;
    let graph = ratios.ready_to_pytorch_graph;
    let graph = graph
        .map(|found| Goal::at_most(format!("{model}: ready over PyTorch's CUDA graph"), 1.03, "x", found));
    graph
        .into_iter()
        .chain([
            Goal::at_most(
                format!("{model}: cold over the larger of ready and copy"),
                cold_limit(model),
                "x",
                ratios.ratio,
            ),
            Goal::at_most(
                format!("{model}: p99 of cold over its median"),
                1.2,
                "x",
                ratios.cold_p99_to_median,
            ),
            Goal::at_most(format!("{model}: cold less ready"), 0.3, "ms", ratios.total_overhead_ms),
            Goal::at_least(
                format!("{model}: the engine's bandwidth in {} groups, of that in one", row.measured.groups),
                97.0,
                "%",
                ratios.engine_bandwidth_percent,
            ),
        ])
        .collect()
}

/// Latencies, and below them what they are to each other.
pub(super) fn tables(rows: &[Row]) -> Vec<Table> {
    vec![latencies(rows), ratios(rows)]
}

fn latencies(rows: &[Row]) -> Table {
    let mut table = Table::new(["milliseconds", "requests", "median", "p99", "least", "most", "spread %"]);
    for row in rows {
        let Row { model, span_bytes, measured, pytorch, .. } = row;
        table.push([format!("{model}, {}.{} MB", span_bytes / 1_000_000, span_bytes / 100_000 % 10)]);
        for (name, summary) in [
            ("ready", &measured.ready_ms),
            ("ready, answered", &measured.ready_answered_ms),
            ("copy floor", &measured.copy_floor_ms),
            ("cold", &measured.cold_ms),
            ("cold, answered", &measured.cold_answered_ms),
            ("cold, over HTTP", &measured.client_ms),
            ("cold, start-up", &measured.startup_ms),
            ("cold, copy then run", &measured.copy_then_run_ms),
            ("engine alone, one group", &measured.engine_whole_ms),
            ("engine alone, planned groups", &measured.engine_groups_ms),
        ] {
            let &Summary { count, median, p99, least, most, spread_percent } = summary;
            let [a, b, c, d] = cells(Quantiles { median, p99, least, most });
            table.push([format!("  {name}"), count.to_string(), a, b, c, d, format!("{spread_percent:.1}")]);
        }
        let Some(pytorch) = pytorch else {
            table.push([format!("  PyTorch {LEFT_OUT}")]);
            continue;
        };
        let eager = ("ready, PyTorch eager", pytorch.eager_ms);
        let graph = pytorch.graph_ms.map(|graph| ("ready, PyTorch CUDA graph", graph));
        for (name, quantiles) in std::iter::once(eager).chain(graph) {
            let [a, b, c, d] = cells(quantiles);
            table.push([format!("  {name}"), "-".to_owned(), a, b, c, d, "-".to_owned()]);
        }
    }
    table
}

fn cells(quantiles: Quantiles) -> [String; 4] {
    let Quantiles { median, p99, least, most } = quantiles;
    [median, p99, least, most].map(|ms| format!("{ms:.3}"))
}

fn ratios(rows: &[Row]) -> Table {
    let mut table = Table::new([
        "medians",
        "ready/graph",
        "ready/eager",
        "cold/max(ready, copy)",
        "copy then run/cold",
        "cold p99/median",
        "cold-ready ms",
        "groups",
        "engine % of one",
        "compared with",
    ]);
    for row in rows {
        let Row { ratios, measured, .. } = row;
        let ratio = |ratio: f64| format!("{ratio:.3}");
        let or_dash = |found: Option<f64>| found.map_or_else(|| "-".to_owned(), ratio);
        table.push([
            row.model.clone(),
            or_dash(ratios.ready_to_pytorch_graph),
            or_dash(ratios.ready_to_pytorch_eager),
            ratio(ratios.ratio),
            ratio(ratios.copy_then_run_to_cold),
            ratio(ratios.cold_p99_to_median),
            ratio(ratios.total_overhead_ms),
            measured.groups.to_string(),
            format!("{:.1}", ratios.engine_bandwidth_percent),
            row.compared_with.clone(),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    fn summary(median: f64) -> Summary {
        Summary {
            count: 200,
            median,
            p99: median * 1.25,
            least: median,
            most: median * 2.0,
            spread_percent: 4.0,
        }
    }

    fn measured(ready: f64, copy: f64, cold: f64) -> Measured {
        Measured {
            ready_ms: summary(ready),
            ready_answered_ms: summary(ready + 0.125),
            copy_floor_ms: summary(copy),
            cold_ms: summary(cold),
            cold_answered_ms: summary(cold + 0.125),
            startup_ms: summary(0.125),
            copy_then_run_ms: summary(ready + copy),
            client_ms: summary(cold + 0.5),
            engine_whole_ms: summary(copy),
            engine_groups_ms: summary(copy * 1.25),
            groups: 16,
            predicted_ms: cold,
        }
    }

    fn pytorch(graph: Option<f64>) -> Latencies {
        let quantiles = |median: f64| serde_json::json!({"median": median, "p99": median, "least": median, "most": median});
        let latencies = serde_json::json!({
            "eager_ms": quantiles(8.0), "graph_ms": graph.map(quantiles), "weights_bytes": 4,
        });
        serde_json::from_value(latencies).unwrap()
    }

    fn row(model: &str, measured: Measured, pytorch: Option<Latencies>) -> Row {
        Row::new(model, 241_300_000, "eager PyTorch".to_owned(), measured, pytorch)
    }

    #[test]
    fn the_larger_of_ready_and_copy_is_the_floor() {
        let copied = Ratios::new(&measured(4.0, 5.0, 6.0), None);
        let expected = Ratios {
            ready_to_pytorch_graph: None,
            ready_to_pytorch_eager: None,
            ratio: 1.2,
            copy_then_run_to_cold: 1.5,
            cold_p99_to_median: 1.25,
            total_overhead_ms: 2.0,
            engine_bandwidth_percent: 80.0,
        };
        assert_eq!(copied, expected);
        assert_eq!(Ratios::new(&measured(8.0, 5.0, 10.0), None).ratio, 1.25);
        let beside = Ratios::new(&measured(4.0, 5.0, 6.0), Some(&pytorch(Some(5.0))));
        assert_eq!((beside.ready_to_pytorch_graph, beside.ready_to_pytorch_eager), (Some(0.8), Some(0.5)));
        assert_eq!(Ratios::new(&measured(4.0, 5.0, 6.0), Some(&pytorch(None))).ready_to_pytorch_graph, None);
    }

    #[test]
    fn goals_are_as_strict_as_the_model_allows() {
        let texts = |row: &Row| goals(row).iter().map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!(
            texts(&row("resnet152", measured(4.0, 4.0, 4.125), Some(pytorch(Some(4.0))))),
            [
                "resnet152: ready over PyTorch's CUDA graph: 1 x (asked: at most 1.03 x): met",
                "resnet152: cold over the larger of ready and copy: 1.031 x (asked: at most 1.05 x): met",
                "resnet152: p99 of cold over its median: 1.25 x (asked: at most 1.2 x): MISSED",
                "resnet152: cold less ready: 0.125 ms (asked: at most 0.3 ms): met",
                "resnet152: the engine's bandwidth in 16 groups, of that in one: 80 % (asked: at least 97 %): MISSED",
            ]
        );
        let other = texts(&row("bert-base", measured(8.0, 4.0, 9.0), None));
        assert_eq!(
            other[0],
            "bert-base: cold over the larger of ready and copy: 1.125 x (asked: at most 1.02 x): MISSED"
        );
        assert_eq!(other.len(), 4);
    }

    #[test]
    fn tables_say_what_was_left_out() {
        let rows = [
            row("resnet152", measured(4.0, 4.0, 4.125), Some(pytorch(Some(4.0)))),
            row("bert-base", measured(8.0, 4.0, 9.0), None),
        ];
        let [latencies, ratios] = tables(&rows).try_into().unwrap();
        let latencies = latencies.to_string();
        assert_eq!(latencies.lines().count(), 1 + (1 + 10 + 2) + (1 + 10 + 1));
        assert!(latencies.contains("resnet152, 241.3 MB\n"), "{latencies}");
        assert!(latencies.ends_with("  PyTorch left out: no --python\n"), "{latencies}");
        let ratios: Vec<Vec<String>> = ratios
            .to_string()
            .lines()
            .map(|line| line.split_whitespace().map(str::to_owned).collect())
            .collect();
        assert_eq!(ratios[1][..4], ["resnet152", "1.000", "0.500", "1.031"]);
        assert_eq!(ratios[2][..4], ["bert-base", "-", "-", "1.125"]);
    }

    #[test]
    fn results_stand_beside_each_other() {
        let json = serde_json::to_value(row("m", measured(4.0, 5.0, 6.0), None)).unwrap();
        assert_eq!((&json["ratio"], &json["cold_ms"]["median"]), (&1.2.into(), &6.0.into()));
        assert_eq!((&json["pytorch"], &json["total_overhead_ms"]), (&serde_json::Value::Null, &2.0.into()));
    }
}
