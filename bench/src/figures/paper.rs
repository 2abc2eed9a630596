//! What the paper and its artifact have published: Bai, Zhang, Zhu, Jin, "PipeSwitch: Fast Pipelined Context Switching for
//! Deep Learning Applications", OSDI 2020.
//!
//! Latencies are those of a run of the artifact on a V100 (p3.2xlarge, PCIe 3.0 x16, PyTorch 1.3.0), total overheads and
//! the throughput of figure 6 those of the paper. They stand beside what is measured here, and are never mixed with it.

use super::{Bar, Cycle, Figure};
use crate::report::Table;

/// Where the published values were measured.
pub(super) const WHERE: &str = "published, V100 (PipeSwitch, OSDI 2020, and its artifact; PyTorch 1.3)";

/// The paper's models, in the order of the values below.
const MODELS: [&str; 3] = ["ResNet152", "Inception_v3", "BERT-base"];

/// Milliseconds of a request, by mechanism as it is named here, and model.
type Latencies = &'static [(&'static str, [f64; 3])];

const FIGURE_5: Latencies = &[
    ("ready", [37.1, 40.5, 39.3]),
    ("pswitch", [43.5, 40.6, 53.8]),
    ("mps", [659.0, 464.0, 522.0]),
    ("stop-and-start", [5678.0, 6276.0, 7243.0]),
];

const FIGURE_7: Latencies = &[
    ("pswitch", [41.1, 39.5, 53.7]),
    ("per-layer", [76.4, 53.7, 70.3]),
    ("grouped", [60.1, 50.4, 83.2]),
    ("no-optimization", [86.5, 58.1, 89.9]),
];

const FIGURE_8: Latencies = &[
    ("pswitch", [42.4, 41.2, 53.8]),
    ("no-unified", [68.6, 62.0, 66.4]),
    ("no-ipc", [95.2, 65.8, 88.7]),
    ("no-pinned", [55.8, 40.0, 67.7]),
    ("managed", [64.1, 60.9, 81.2]),
];

const FIGURE_9: Latencies = &[
    ("pswitch", [43.3, 39.6, 55.3]),
    ("one-process", [225.0, 190.0, 221.0]),
    ("two-processes", [5682.0, 6280.0, 7378.0]),
];

/// Lengths of figure 6's turns in seconds, and batches of ResNet152 a second in them.
const CYCLES_S: [f64; 5] = [1.0, 2.0, 5.0, 10.0, 30.0];
const FIGURE_6: &[(&str, [f64; 5])] = &[
    ("ready", [26.1, 27.1, 25.9, 27.0, 26.4]),
    ("pswitch", [26.8, 27.1, 26.4, 26.6, 26.2]),
    ("mps", [3.5, 2.4, 3.1, 2.3, 3.0]),
    ("stop-and-start", [0.0, 0.0, 0.0, 11.4, 20.8]),
];

/// Milliseconds that a request takes beyond the ready model's: mechanism, V100 and T4, each by model.
const TOTAL_OVERHEADS_MS: [(&str, [f64; 3], [f64; 3]); 3] = [
    ("pswitch", [6.01, 5.40, 10.27], [5.57, 7.66, 34.56]),
    ("mps", [307.02, 232.25, 204.52], [259.20, 193.05, 338.25]),
    ("stop-and-start", [6475.40, 7536.07, 6371.32], [5486.74, 6558.76, 5355.95]),
];

/// What figure 5's mechanisms cost on both GPUs of the paper; none of other figures.
pub(crate) fn total_overheads(figure: &Figure) -> Option<Table> {
    let mut table = Table::new(["mechanism", "GPU", MODELS[0], MODELS[1], MODELS[2]]);
    for (mechanism, v100, t4) in TOTAL_OVERHEADS_MS {
        for (gpu, values) in [("V100", v100), ("T4", t4)] {
            let [first, second, third] = values.map(|value| value.to_string());
            table.push([mechanism.to_owned(), gpu.to_owned(), first, second, third]);
        }
    }
    (figure.number == 5).then_some(table)
}

/// The same figure as it was published; none of one that is ours.
pub(super) fn published(number: u8) -> Option<Figure> {
    let bars = match number {
        5 => FIGURE_5,
        7 => FIGURE_7,
        8 => FIGURE_8,
        9 => FIGURE_9,
        6 => &[],
        _ => return None,
    };
    let bars = bars.iter().flat_map(|(mechanism, values)| {
        MODELS.iter().zip(values).map(|(model, &value)| Bar {
            model: (*model).to_owned(),
            mechanism: (*mechanism).to_owned(),
            latencies_ms: vec![value],
            parts: None,
        })
    });
    let cycles = FIGURE_6.iter().filter(|_| number == 6).flat_map(|(mechanism, values)| {
        CYCLES_S.iter().zip(values).map(|(&cycle_s, &value)| Cycle {
            mechanism: (*mechanism).to_owned(),
            model: MODELS[0].to_owned(),
            cycle_s,
            batches_per_s: vec![value],
            latencies_ms: Vec::new(),
            steps_per_s: Vec::new(),
        })
    });
    let (bars, cycles) = (bars.collect(), cycles.collect());
    Some(Figure { number, bars, cycles, loads: Vec::new(), left_out: Vec::new(), took: Vec::new() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mechanisms_are_published_for_each_model() {
        for (number, bars, cycles) in [(5, 12, 0), (6, 0, 20), (7, 12, 0), (8, 15, 0), (9, 9, 0)] {
            let figure = published(number).unwrap();
            assert_eq!((figure.bars.len(), figure.cycles.len()), (bars, cycles), "{number}");
        }
        assert_eq!(published(10), None);
    }

    #[test]
    fn overheads_are_those_of_figure_5() {
        let overheads = |number| total_overheads(&Figure { number, ..published(5).unwrap() });
        assert_eq!(overheads(5).unwrap().rows().len(), 1 + 3 * 2);
        assert_eq!(overheads(9), None);
    }
}
