//! Figures as pictures: what was measured, and below it what was published.

use std::path::Path;

use plotters::prelude::DrawingBackend;
use pswitch_plot::{Drawn, FAINT, INK, Picture, PlotError, PlotFile, Sheet, Style};

use super::look::{self, Look};
use super::panel::{self, Column, Group, Panel};
use super::{Cycle, Figure, Load, paper};
use crate::stats::Summary;

/// From left to right, and where the legend begins.
const WIDTH: u32 = 1600;
const LEFT: i32 = 32;
const RIGHT: i32 = 1568;
const BETWEEN_PANELS: i32 = 40;
const LEGEND: i32 = 122;
const LEGEND_LINE: i32 = 36;
const NOTE_LINE: i32 = 26;
const REMARK_LINE: i32 = 28;
/// Characters of a note in one line, and of the remark below the title.
const NOTE: usize = 150;
const REMARK: usize = 125;

/// A figure that can be drawn.
#[derive(Debug)]
pub(crate) struct Drawing {
    title: String,
    /// Where it was measured, line by line.
    remark: Vec<String>,
    /// In the order of the legend.
    mechanisms: Vec<String>,
    /// The mechanism that is a dashed line instead of bars.
    bound: Option<String>,
    rows: Vec<Vec<Panel>>,
    notes: Vec<String>,
}

impl Drawing {
    /// Of a figure, with a sentence on where it was measured.
    pub(crate) fn of(figure: &Figure, place: &str) -> Self {
        let mut mechanisms: Vec<String> = Vec::new();
        let published = paper::published(figure.number);
        for name in [Some(figure), published.as_ref()].into_iter().flatten().flat_map(names) {
            if !mechanisms.contains(name) {
                mechanisms.push(name.clone());
            }
        }
        mechanisms.sort_by_key(|name| Look::order(name));
        let bound = Some(READY.to_owned()).filter(|_| !figure.cycles.is_empty());
        let mut rows = measured(figure, "median, lowest to highest; measured");
        let published = published.filter(|_| !rows.is_empty());
        rows.extend(published.iter().flat_map(|published| measured(published, paper::WHERE)));
        let notes = figure.left_out.iter().flat_map(|left_out| {
            let model = left_out.model.as_ref().map(|model| format!(" ({model})")).unwrap_or_default();
            let reason = &left_out.reason;
            wrapped(&format!("left out: {}{model}: {reason}", look::name(&left_out.mechanism)), NOTE)
        });
        Self {
            title: format!("Figure {}: {}", figure.number, title(figure.number)),
            remark: wrapped(place, REMARK),
            mechanisms,
            bound,
            rows,
            notes: notes.collect(),
        }
    }

    /// As SVG.
    pub(crate) fn svg(&self) -> Result<String, PlotError> {
        pswitch_plot::svg(self)
    }

    /// Writes `FOLDER/NAME.svg` and `FOLDER/NAME.png`.
    pub(crate) fn save(&self, folder: &Path, name: &str) -> Result<(), PlotError> {
        PlotFile::both(folder, name).iter().try_for_each(|file| file.write(self))
    }

    /// Where each entry of the legend is, and how many lines there are.
    fn legend(&self) -> (Vec<(i32, i32)>, i32) {
        let (mut x, mut line) = (LEFT, 0);
        let places = self.mechanisms.iter().map(|mechanism| {
            let characters = i32::try_from(look::name(mechanism).chars().count()).unwrap_or(0);
            let width = 46 + characters * 12 + 34;
            if x > LEFT && x + width > RIGHT {
                (x, line) = (LEFT, line + 1);
            }
            let place = (x, self.head_end() + line * LEGEND_LINE);
            x += width;
            place
        });
        let places = places.collect();
        (places, line + 1)
    }

    /// Where the legend begins.
    fn head_end(&self) -> i32 {
        LEGEND + i32::try_from(self.remark.len().saturating_sub(1)).unwrap_or(0) * REMARK_LINE
    }

    /// Where the panels begin.
    fn top(&self) -> i32 {
        self.head_end() + self.legend().1 * LEGEND_LINE
    }

    /// Where the notes begin.
    fn end(&self) -> i32 {
        self.top() + i32::try_from(self.rows.len()).unwrap_or(0) * panel::HEIGHT
    }
}

impl Picture for Drawing {
    fn size(&self) -> (u32, u32) {
        let notes = i32::try_from(self.notes.len()).unwrap_or(0) * NOTE_LINE;
        (WIDTH, (self.end() + notes + 20).unsigned_abs())
    }

    fn draw<B: DrawingBackend>(&self, sheet: Sheet<'_, B>) -> Drawn
    where
        B::ErrorType: 'static,
    {
        let mut remark = self.remark.iter();
        sheet.head(&self.title, remark.next().map_or("", String::as_str))?;
        let second = LEGEND - LEGEND_LINE + REMARK_LINE;
        for (line, y) in remark.zip((second..).step_by(REMARK_LINE.unsigned_abs() as usize)) {
            sheet.text(line, (LEFT, y), Style::new(22).color(FAINT))?;
        }
        for (mechanism, (x, y)) in self.mechanisms.iter().zip(self.legend().0) {
            if self.bound.as_ref() == Some(mechanism) {
                sheet.dashes((x, x + 36), y, INK)?;
            } else {
                Look::of(mechanism, &self.mechanisms).fill(&sheet, (x, x + 36), (y - 11, y + 11))?;
            }
            sheet.text(&look::name(mechanism), (x + 46, y), Style::new(21))?;
        }
        for (row, top) in self.rows.iter().zip((self.top()..).step_by(panel::HEIGHT.unsigned_abs() as usize))
        {
            let count = i32::try_from(row.len())?;
            let width = (RIGHT - LEFT - (count - 1) * BETWEEN_PANELS) / count.max(1);
            let lefts = (LEFT..).step_by(usize::try_from(width + BETWEEN_PANELS)?);
            for (panel, left) in row.iter().zip(lefts) {
                panel.draw(&sheet, (left, left + width), top, &self.mechanisms)?;
            }
        }
        for (note, y) in self.notes.iter().zip((self.end() + 8..).step_by(NOTE_LINE.unsigned_abs() as usize))
        {
            sheet.text(note, (LEFT, y), Style::new(18).color(FAINT))?;
        }
        Ok(())
    }
}

/// The mechanism that bounds the others of figure 6.
const READY: &str = "ready";

/// What a figure is about.
pub(crate) fn title(number: u8) -> &'static str {
    match number {
        5 => "latency of a request that interrupts training",
        6 => "throughput and latency when training and inference take turns",
        7 => "pipelined transmission",
        8 => "unified memory management",
        9 => "active and standby workers",
        _ => "many models on one device",
    }
}

/// All mechanisms of a figure, some of them more than once.
fn names(figure: &Figure) -> impl Iterator<Item = &String> {
    let bars = figure.bars.iter().map(|bar| &bar.mechanism);
    let cycles = figure.cycles.iter().map(|cycle| &cycle.mechanism);
    bars.chain(cycles).chain(figure.loads.iter().map(|load| &load.mechanism))
}

/// The panels of what a figure holds.
fn measured(figure: &Figure, place: &str) -> Vec<Vec<Panel>> {
    let mut rows = Vec::new();
    if !figure.bars.is_empty() {
        let title = format!("latency: {place}");
        let bars = figure.bars.iter().filter_map(|bar| {
            let column = column(&bar.mechanism, &Summary::of(&bar.latencies_ms)?);
            Some((bar.model.clone(), column))
        });
        rows.push(vec![Panel { title, unit: "ms", groups: grouped(bars) }]);
    }
    rows.extend(of_cycles(&figure.cycles, place));
    let mut arrivals: Vec<&str> = figure.loads.iter().map(|load| load.arrivals.as_str()).collect();
    arrivals.dedup();
    for quantity in QUANTITIES {
        let panels = arrivals.iter().map(|&kind| of_loads(&figure.loads, kind, quantity));
        let panels: Vec<Panel> = panels.filter(|panel| !panel.groups.is_empty()).collect();
        if !panels.is_empty() {
            rows.push(panels);
        }
    }
    rows
}

/// Throughput, and where it was measured latency, with the ready model's as a bound.
fn of_cycles(cycles: &[Cycle], place: &str) -> Vec<Vec<Panel>> {
    let several = cycles.iter().any(|cycle| cycle.model != cycles[0].model);
    let label = |cycle: &Cycle| {
        let model = if several { format!("{}\n", cycle.model) } else { String::new() };
        format!("{model}{} s", cycle.cycle_s)
    };
    let panel = |title: &str, unit, of: &dyn Fn(&Cycle) -> Option<Summary>| {
        let columns = cycles.iter().filter_map(|cycle| {
            let column = column(&cycle.mechanism, &of(cycle)?);
            Some((label(cycle), column))
        });
        let mut groups = grouped(columns);
        for group in &mut groups {
            let ready = group.columns.iter().position(|column| column.mechanism == READY);
            group.bound = ready.map(|place| group.columns.remove(place).value);
        }
        let model = cycles.first().filter(|_| !several).map(|cycle| format!(", {}", cycle.model));
        let title = format!("{title} by length of a turn{}: {place}", model.unwrap_or_default());
        Panel { title, unit, groups }
    };
    let throughput = panel("throughput", "batches/s", &|cycle| Summary::of(&cycle.batches_per_s));
    let latency = panel("latency", "ms", &|cycle| Summary::of(&cycle.latencies_ms));
    [throughput, latency]
        .into_iter()
        .filter(|panel| !panel.groups.is_empty())
        .map(|panel| vec![panel])
        .collect()
}

/// What is drawn of loads.
#[derive(Debug, Clone, Copy)]
struct Quantity {
    title: &'static str,
    unit: &'static str,
    of: fn(&Load) -> Option<(f64, f64)>,
}

/// Each with where its whisker ends.
const QUANTITIES: [Quantity; 3] = [
    Quantity {
        title: "latency: median, up to p99",
        unit: "ms",
        of: |load| Summary::of(&load.latencies_ms).map(|found| (found.median, found.p99)),
    },
    Quantity {
        title: "answered within the SLO",
        unit: "%",
        of: |load| load.within_slo().map(|share| (share * 100.0, share * 100.0)),
    },
    Quantity {
        title: "training kept",
        unit: "%",
        of: |load| load.training_kept.map(|share| (share * 100.0, share * 100.0)),
    },
];

fn of_loads(loads: &[Load], arrivals: &str, quantity: Quantity) -> Panel {
    let columns = loads.iter().filter(|load| load.arrivals == arrivals).filter_map(|load| {
        let (value, to) = (quantity.of)(load)?;
        let column = Column { mechanism: load.mechanism.clone(), value, whisker: (value, to) };
        Some((format!("{} models\n{}/s", load.models, (load.requests_per_s * 10.0).round() / 10.0), column))
    });
    let arrivals = if arrivals == "poisson" { "Poisson" } else { arrivals };
    Panel {
        title: format!("{}; {arrivals} arrivals", quantity.title),
        unit: quantity.unit,
        groups: grouped(columns),
    }
}

/// Columns of one label together, in the order in which labels come first.
fn grouped(columns: impl Iterator<Item = (String, Column)>) -> Vec<Group> {
    let mut groups: Vec<Group> = Vec::new();
    for (label, column) in columns {
        match groups.iter_mut().find(|group| group.label == label) {
            Some(group) => group.columns.push(column),
            None => groups.push(Group { label, columns: vec![column], bound: None }),
        }
    }
    groups
}

fn column(mechanism: &str, summary: &Summary) -> Column {
    let Summary { median, least, most, .. } = *summary;
    Column { mechanism: mechanism.to_owned(), value: median, whisker: (least, most) }
}

/// Lines of words, of at most so many characters.
fn wrapped(text: &str, characters: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        match lines.last_mut() {
            Some(line) if line.is_empty() => line.push_str(word),
            Some(line) if line.len() + word.len() < characters => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::super::made_up;
    use super::*;

    fn texts(drawing: &Drawing) -> String {
        drawing.svg().unwrap()
    }

    #[test]
    fn every_figure_is_drawn_with_all_that_it_has() {
        for figure in made_up::all() {
            let drawing = Drawing::of(&figure, "a GPU");
            let svg = texts(&drawing);
            assert!(!svg.contains("NaN") && !svg.contains(">inf<"), "{}", figure.number);
            for name in names(&figure) {
                assert!(svg.contains(&look::name(name)), "{}: {name}", figure.number);
            }
            assert_eq!(svg.contains("published, V100"), figure.number != 10, "{}", figure.number);
            assert_eq!(svg.contains("left out: NVIDIA MPS (vit_l_16)"), !figure.bars.is_empty());
            let folder = tempfile::tempdir().unwrap();
            drawing.save(folder.path(), "figure").unwrap();
            assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2);
        }
    }

    #[test]
    fn published_bars_stand_in_a_panel_of_their_own() {
        let drawing = Drawing::of(&made_up::bars(7, &[("pswitch", 5.0)]), "");
        let [measured, published] = &drawing.rows[..] else { panic!("{:?}", drawing.rows) };
        let columns =
            |row: &[Panel]| row[0].groups.iter().map(|group| group.columns.len()).collect::<Vec<_>>();
        assert_eq!((columns(measured), columns(published)), (vec![1; 3], vec![4; 3]));
        assert!(published[0].title.contains("published, V100") && !measured[0].title.contains("published"));
    }

    #[test]
    fn the_ready_model_bounds_the_turns() {
        let drawing = Drawing::of(&made_up::cycles(), "");
        let [throughput, latency, published] = &drawing.rows[..] else { panic!("{:?}", drawing.rows) };
        let bounds = |row: &[Panel]| row[0].groups.iter().map(|group| group.bound).collect::<Vec<_>>();
        assert_eq!(bounds(throughput), [Some(200.0); 5]);
        assert_eq!(bounds(latency), [Some(4.9); 5]);
        assert_eq!(bounds(published)[0], Some(26.1));
        // Turns in which nothing was answered have no latency.
        let columns: Vec<_> = latency[0].groups.iter().map(|group| group.columns.len()).collect();
        assert_eq!(columns, [2, 2, 2, 3, 3]);
    }

    #[test]
    fn nothing_measured_has_no_panel() {
        let mut figure = made_up::bars(5, &[]);
        figure.left_out[0].reason = "a long word ".repeat(40);
        let drawing = Drawing::of(&figure, "");
        assert!(drawing.rows.is_empty() && drawing.notes.len() > 1);
        assert!(drawing.notes.iter().all(|note| note.len() <= NOTE + 4));
        assert!(drawing.svg().unwrap().contains("left out"));
    }
}
