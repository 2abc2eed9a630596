//! What predictions were worth: numbers, a table, and what was asked for.

use pswitch_controller::LinkFit;
use pswitch_device::DeviceId;
use pswitch_transfer::Profile;
use serde::Serialize;

use crate::report::{Goal, Table};
use crate::stats::{Summary, deviation_percent};
use crate::subject::Subject;

/// How much faster than the served plan another one may be measured.
const SLOWER_PERCENT: f64 = 1.0;

/// How far from its prediction a plan may be measured.
pub(super) fn limit_percent(device: DeviceId) -> f64 {
    match device {
        DeviceId::Cuda(_) => 5.0,
        // Its link and its layers share cores and memory.
        DeviceId::Host(_) => 10.0,
    }
}

/// What a plan predicts, and what requests by it took.
pub(super) struct Measured {
    pub(super) algorithms: Vec<String>,
    pub(super) groups: usize,
    /// Copies, waits and layers.
    pub(super) plan_ms: f64,
    pub(super) cold_ms: Summary,
    /// How far each was from the served plan's of the same round: what slows the machine for a while slows both.
    pub(super) from_served_percent: Summary,
}

/// One model.
#[derive(Debug, Serialize)]
pub(super) struct Row {
    model: String,
    span_bytes: u64,
    compared_with: String,
    link_bandwidth_bytes_per_s: f64,
    per_copy_us: f64,
    per_wait_us: f64,
    link_off_percent: f64,
    ready_ms: Summary,
    layers_ms: f64,
    /// What a request takes beside copies, waits and layers.
    rest_ms: f64,
    /// The served one first.
    plans: Vec<PlanRow>,
    /// Algorithms whose search was cut off.
    left_out: Vec<String>,
}

/// One plan.
#[derive(Debug, Serialize)]
struct PlanRow {
    algorithms: Vec<String>,
    groups: usize,
    plan_ms: f64,
    predicted_ms: f64,
    cold_ms: Summary,
    /// How far the median is from the prediction.
    off_percent: f64,
    /// How far each was from the served plan's of the same round.
    from_served_percent: Summary,
}

impl Row {
    pub(super) fn new(
        subject: &Subject,
        compared_with: String,
        profile: &Profile,
        link: &LinkFit,
        ready_ms: Summary,
        measured: Vec<Measured>,
        left_out: Vec<String>,
    ) -> Self {
        let layers_ms = profile.layers.iter().map(|layer| layer.compute_us).sum::<f64>() / 1e3;
        // A resident model reads no table from the host, and hardly takes time to read it on the device.
        let resident = profile.layers.iter().filter(|layer| layer.host_bytes == 0);
        let rest_ms = ready_ms.median - resident.map(|layer| layer.compute_us).sum::<f64>() / 1e3;
        let costs = profile.link;
        Self {
            model: subject.name.clone(),
            span_bytes: subject.span_bytes,
            compared_with,
            link_bandwidth_bytes_per_s: costs.bandwidth_bytes_per_s,
            per_copy_us: costs.per_copy_us,
            per_wait_us: costs.per_wait_us,
            link_off_percent: link.rms_percent,
            ready_ms,
            layers_ms,
            rest_ms,
            plans: plan_rows(measured, rest_ms),
            left_out,
        }
    }
}

fn plan_rows(measured: Vec<Measured>, rest_ms: f64) -> Vec<PlanRow> {
    measured
        .into_iter()
        .map(|Measured { algorithms, groups, plan_ms, cold_ms, from_served_percent }| {
            let predicted_ms = plan_ms + rest_ms;
            PlanRow {
                algorithms,
                groups,
                plan_ms,
                predicted_ms,
                off_percent: deviation_percent(cold_ms.median, predicted_ms),
                from_served_percent,
                cold_ms,
            }
        })
        .collect()
}

pub(super) fn goals(row: &Row, limit_percent: f64) -> Vec<Goal> {
    let model = &row.model;
    let farthest = row.plans.iter().max_by(|a, b| a.off_percent.abs().total_cmp(&b.off_percent.abs()));
    let fastest = row
        .plans
        .iter()
        .skip(1)
        .min_by(|a, b| a.from_served_percent.median.total_cmp(&b.from_served_percent.median));
    let farthest = farthest.map(|plan| {
        let what = format!("{model}: farthest from its prediction, {}", plan.algorithms.join(", "));
        Goal::at_most(what, limit_percent, "%", plan.off_percent.abs())
    });
    let fastest = fastest.map(|plan| {
        let what = format!("{model}: below the served plan, {}", plan.algorithms.join(", "));
        Goal::at_most(what, SLOWER_PERCENT, "%", -plan.from_served_percent.median)
    });
    farthest.into_iter().chain(fastest).collect()
}

pub(super) fn table(row: &Row) -> Table {
    let title = format!("{}, {:.1} MB", row.model, row.span_bytes as f64 / 1e6);
    let mut table = Table::new([
        title.as_str(),
        "groups",
        "predicted ms",
        "measured ms",
        "p99 ms",
        "spread %",
        "off %",
        "from served %",
    ]);
    for plan in &row.plans {
        table.push([
            plan.algorithms.join(", "),
            plan.groups.to_string(),
            format!("{:.3}", plan.predicted_ms),
            format!("{:.3}", plan.cold_ms.median),
            format!("{:.3}", plan.cold_ms.p99),
            format!("{:.1}", plan.cold_ms.spread_percent),
            format!("{:+.1}", plan.off_percent),
            format!("{:+.1}", plan.from_served_percent.median),
        ]);
    }
    for algorithm in &row.left_out {
        table.push([format!("{algorithm} (search cut off)")]);
    }
    table.push([
        "ready".to_owned(),
        "-".to_owned(),
        "-".to_owned(),
        format!("{:.3}", row.ready_ms.median),
        format!("{:.3}", row.ready_ms.p99),
        format!("{:.1}", row.ready_ms.spread_percent),
    ]);
    table.push(["layers, as timed".to_owned(), "-".to_owned(), format!("{:.3}", row.layers_ms)]);
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    fn summary(median: f64) -> Summary {
        Summary { count: 30, median, p99: median * 1.25, least: median, most: median, spread_percent: 4.0 }
    }

    fn row(served: f64, others: &[(&str, f64, f64)]) -> Row {
        let plan = |&(algorithm, plan_ms, measured): &(&str, f64, f64)| Measured {
            algorithms: algorithm.split(' ').map(str::to_owned).collect(),
            groups: 3,
            plan_ms,
            cold_ms: summary(measured),
            from_served_percent: summary(deviation_percent(measured, served)),
        };
        let all = [("served optimal", 8.0, served)].iter().chain(others).map(plan).collect();
        Row {
            model: "m".to_owned(),
            span_bytes: 46_800_000,
            compared_with: "eager PyTorch".to_owned(),
            link_bandwidth_bytes_per_s: 1e9,
            per_copy_us: 2.0,
            per_wait_us: 1.0,
            link_off_percent: 1.5,
            ready_ms: summary(5.0),
            layers_ms: 3.0,
            rest_ms: 2.0,
            plans: plan_rows(all, 2.0),
            left_out: vec!["paper".to_owned()],
        }
    }

    #[test]
    fn what_a_resident_request_takes_beside_its_layers_is_predicted_as_well() {
        let row = row(10.0, &[("whole", 14.0, 20.0)]);
        let found: Vec<_> = row
            .plans
            .iter()
            .map(|plan| (plan.predicted_ms, plan.off_percent, plan.from_served_percent.median))
            .collect();
        assert_eq!(found, [(10.0, 0.0, 0.0), (16.0, 25.0, 100.0)]);
    }

    #[test]
    fn the_worst_prediction_and_the_fastest_other_plan_are_judged() {
        let texts = |row: &Row| goals(row, 10.0).iter().map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!(
            texts(&row(10.0, &[("whole", 14.0, 14.0), ("per-layer", 8.0, 9.75)])),
            [
                "m: farthest from its prediction, whole: 12.5 % (asked: at most 10 %): MISSED",
                "m: below the served plan, per-layer: 2.5 % (asked: at most 1 %): MISSED",
            ]
        );
        assert_eq!(
            texts(&row(10.25, &[("whole", 14.0, 16.0)])),
            [
                "m: farthest from its prediction, served, optimal: 2.5 % (asked: at most 10 %): met",
                "m: below the served plan, whole: -56.098 % (asked: at most 1 %): met",
            ]
        );
        // A model whose plans are all the same has no other.
        assert_eq!(goals(&row(10.0, &[]), 10.0).len(), 1);
    }

    #[test]
    fn tables_have_all_plans() {
        let text = table(&row(10.0, &[("whole", 14.0, 20.0)])).to_string();
        let lines: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(lines.len(), 6);
        assert_eq!(lines[1][..6], ["served,", "optimal", "3", "10.000", "10.000", "12.500"]);
        assert_eq!(lines[2][..4], ["whole", "3", "16.000", "20.000"]);
        assert!(text.contains("\npaper (search cut off)\n"), "{text}");
    }
}
