//! A task's loss over its steps as a picture, with its interruptions.

use std::path::Path;

use plotters::prelude::*;

use super::super::text::{count, seconds, title};
use super::log::{Log, Point};
use pswitch_plot::{Drawn, FAINT, GRID, INK, Picture, Sheet, Style, between, label, round_step};

/// What is drawn.
pub(super) struct Curve<'a> {
    title: String,
    remark: String,
    points: &'a [Point],
    steps: Axis,
    losses: Axis,
}

/// From left to right, and from top to bottom.
const LEFT: i32 = 170;
const RIGHT: i32 = 1560;
const LEGEND: i32 = 130;
const TOP: i32 = 190;
const BOTTOM: i32 = 640;
const STEP_LABELS: i32 = 662;
const STEP_NAME: i32 = 692;

const LOSS: RGBColor = RGBColor(45, 98, 160);
/// Light: there may be many.
const INTERRUPTION: RGBColor = RGBColor(240, 160, 150);

/// A loss beyond is drawn as this: differences of larger ones cannot be computed.
const LARGEST_LOSS: f64 = 1e300;

/// What a log is called: the server's are called alike, in the folders of the tasks' checkpoints.
fn name(path: &Path) -> String {
    let folder = path.parent().and_then(Path::file_name).filter(|_| path.ends_with("progress.jsonl"));
    folder.or(path.file_stem()).unwrap_or_default().to_string_lossy().into_owned()
}

impl<'a> Curve<'a> {
    pub(super) fn new(path: &Path, log: &'a Log) -> Self {
        let points = &log.points;
        let losses = || points.iter().filter_map(|point| Some((point.step, within(point.loss?))));
        let name = title(&name(path));
        let last = losses().next_back().map(|(step, loss)| format!(": {loss:.6} at step {step}"));
        let interruptions = count(usize::try_from(log.interruptions).unwrap_or(usize::MAX), "interruption");
        Self {
            title: format!("loss of {name}{}", last.unwrap_or_default()),
            remark: format!("{interruptions}, {} lost", seconds(log.interruption_cost_us)),
            points,
            steps: Axis::of(points.iter().map(|point| point.step as f64), 0.0, (LEFT, RIGHT)),
            losses: Axis::of(losses().map(|(_, loss)| loss), 0.05, (BOTTOM, TOP)),
        }
    }

    /// The curve, in pieces: it breaks where a loss is no number, and where steps are computed again.
    fn pieces(&self) -> Vec<Vec<(i32, i32)>> {
        let mut pieces: Vec<Vec<(i32, i32)>> = Vec::new();
        let mut before: Option<u64> = None;
        for point in self.points {
            let Some(loss) = point.loss else {
                before = None;
                continue;
            };
            let at = (self.steps.at(point.step as f64), self.losses.at(within(loss)));
            match pieces.last_mut().filter(|_| before.is_some_and(|before| before < point.step)) {
                Some(piece) => piece.push(at),
                None => pieces.push(vec![at]),
            }
            before = Some(point.step);
        }
        pieces.iter().map(|piece| thinned(piece)).collect()
    }

    /// Where the task was interrupted, each place once.
    fn interruptions(&self) -> Vec<i32> {
        let interrupted = self.points.iter().filter(|point| point.interrupted);
        let mut places: Vec<i32> = interrupted.map(|point| self.steps.at(point.step as f64)).collect();
        places.sort_unstable();
        places.dedup();
        places
    }
}

impl Picture for Curve<'_> {
    fn draw<B: DrawingBackend>(&self, sheet: Sheet<'_, B>) -> Drawn
    where
        B::ErrorType: 'static,
    {
        sheet.head(&self.title, &self.remark)?;
        sheet.line([(LEFT, LEGEND), (LEFT + 28, LEGEND)], LOSS, 3)?;
        sheet.text("loss", (LEFT + 38, LEGEND), Style::new(21))?;
        sheet.line([(LEFT + 140, LEGEND - 12), (LEFT + 140, LEGEND + 12)], INTERRUPTION, 3)?;
        sheet.text("interrupted since the point before", (LEFT + 152, LEGEND), Style::new(21))?;

        for (loss, text) in self.losses.ticks(6.0, 0.0) {
            let y = self.losses.at(loss);
            sheet.line([(LEFT, y), (RIGHT, y)], GRID, 1)?;
            sheet.text(&text, (LEFT - 12, y), Style::new(20).right())?;
        }
        for (step, text) in self.steps.ticks(8.0, 1.0) {
            let x = self.steps.at(step);
            sheet.line([(x, BOTTOM), (x, BOTTOM + 8)], INK, 1)?;
            sheet.text(&text, (x, STEP_LABELS), Style::new(20).centred())?;
        }
        for x in self.interruptions() {
            sheet.line([(x, TOP), (x, BOTTOM)], INTERRUPTION, 1)?;
        }
        sheet.line([(LEFT, TOP), (LEFT, BOTTOM), (RIGHT, BOTTOM)], INK, 1)?;
        sheet.text("loss", (LEFT - 12, TOP - 26), Style::new(22).right().color(FAINT))?;
        sheet.text("step", (LEFT + (RIGHT - LEFT) / 2, STEP_NAME), Style::new(22).centred().color(FAINT))?;

        for piece in self.pieces() {
            match piece[..] {
                // A line has two ends.
                [(x, y)] => sheet.rectangle((x - 2, x + 2), (y - 2, y + 2), LOSS.filled())?,
                // Each line is drawn by itself: in bitmaps, sharp corners of a thick path reach far beyond it.
                _ => piece.array_windows().try_for_each(|ends: &[_; 2]| sheet.line(*ends, LOSS, 2))?,
            }
        }
        Ok(())
    }
}

/// Numbers and the pixels that they are at.
struct Axis {
    low: f64,
    high: f64,
    /// Where the lowest and the highest number are.
    ends: (i32, i32),
}

impl Axis {
    /// An axis that all the numbers fit on, with that part of their range left empty at both ends.
    fn of(numbers: impl Iterator<Item = f64> + Clone, margin: f64, ends: (i32, i32)) -> Self {
        let low = numbers.clone().fold(f64::INFINITY, f64::min);
        let high = numbers.fold(f64::NEG_INFINITY, f64::max);
        // Numbers that are all but equal do not fill the axis: it would show how they are rounded.
        let least = low.abs().max(high.abs()) * 1e-6;
        let margin = ((high - low) * margin).max(least);
        let margin = if margin > 0.0 { margin } else { 1.0 };
        Self { low: low - margin, high: high + margin, ends }
    }

    fn at(&self, number: f64) -> i32 {
        between(self.ends, (number - self.low) / (self.high - self.low))
    }

    /// Some round numbers, not closer than `least`, each with its label.
    fn ticks(&self, about: f64, least: f64) -> Vec<(f64, String)> {
        let step = round_step((self.high - self.low) / about).max(least);
        let first = (self.low / step).ceil();
        (0_u8..20)
            .map(|tick| (first + f64::from(tick)) * step)
            .take_while(|number| *number <= self.high)
            .map(|number| (number, label(number, step)))
            .collect()
    }
}

fn within(loss: f64) -> f64 {
    loss.clamp(-LARGEST_LOSS, LARGEST_LOSS)
}

/// The same line with no more than two points in a column of pixels, the highest and the lowest.
fn thinned(line: &[(i32, i32)]) -> Vec<(i32, i32)> {
    let columns = line.chunk_by(|a, b| a.0 == b.0).flat_map(|column| {
        let (x, first) = column[0];
        let ys = || column.iter().map(|(_, y)| *y);
        let (top, bottom) = (ys().min().unwrap_or(first), ys().max().unwrap_or(first));
        let mut kept = if first - top < bottom - first { vec![top, bottom] } else { vec![bottom, top] };
        kept.dedup();
        kept.into_iter().map(move |y| (x, y))
    });
    columns.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use pswitch_plot::svg;

    fn point(step: u64, loss: f64) -> Point {
        Point { step, loss: Some(loss), interrupted: false }
    }

    fn drawn(points: Vec<Point>) -> String {
        let log = Log { points, interruptions: 2, interruption_cost_us: 1_500_000 };
        let svg = svg(&Curve::new(Path::new("logs/resnet18.jsonl"), &log)).unwrap();
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        svg
    }

    /// The points of all lines of a colour and width.
    fn lines(svg: &str, color: &str, width: u32) -> Vec<Vec<(i32, i32)>> {
        let style = format!("stroke=\"{color}\" stroke-width=\"{width}\"");
        let lines = svg.lines().filter(|line| line.contains(&style));
        lines
            .map(|line| {
                let points = line.split_once("points=\"").unwrap().1.split_once('"').unwrap().0;
                let point = |text: &str| {
                    let (x, y) = text.split_once(',').unwrap();
                    (x.parse().unwrap(), y.parse().unwrap())
                };
                points.split_whitespace().map(point).collect()
            })
            .collect()
    }

    /// The pieces of the curve: lines of which each begins where the one before ends.
    fn curves(svg: &str) -> Vec<Vec<(i32, i32)>> {
        let mut curves: Vec<Vec<(i32, i32)>> = Vec::new();
        for line in lines(svg, "#2D62A0", 2) {
            match curves.last_mut().filter(|curve| curve.last() == line.first()) {
                Some(curve) => curve.extend(&line[1..]),
                None => curves.push(line),
            }
        }
        curves
    }

    #[test]
    fn the_curve_and_the_marks_are_there() {
        let mut points: Vec<Point> =
            (0..=10).map(|step| point(step * 100, 2.0 - step as f64 / 10.0)).collect();
        points[3].interrupted = true;
        points[5].interrupted = true;
        let svg = drawn(points);
        for text in [
            "loss of resnet18: 1.000000 at step 1000",
            "2 interruptions, 1.50 s lost",
            "interrupted since the point before",
            "step",
            "1000",
            "1.2",
        ] {
            assert!(svg.contains(text), "{text}: {svg}");
        }
        let curves = curves(&svg);
        let [curve] = &curves[..] else { panic!("{curves:?}") };
        assert_eq!(curve.len(), 11);
        // To the right and down, from end to end.
        assert!(curve.is_sorted() && curve.iter().map(|(_, y)| y).is_sorted(), "{curve:?}");
        assert!(curve[0].0 - LEFT < 5 && RIGHT - curve[10].0 < 5, "{curve:?}");
        let marks = lines(&svg, "#F0A096", 1);
        let expected = [3, 5].map(|point| vec![(curve[point].0, TOP), (curve[point].0, BOTTOM)]);
        assert_eq!(marks, expected);
    }

    #[test]
    fn the_curve_breaks_where_it_has_to() {
        let mut points: Vec<Point> = (0..10).map(|step| point(step, step as f64)).collect();
        points[4].loss = None;
        // Back to the last checkpoint.
        points.push(point(7, 7.0));
        points.push(point(8, 8.0));
        let lengths: Vec<usize> = curves(&drawn(points)).iter().map(Vec::len).collect();
        assert_eq!(lengths, [4, 5, 2]);
    }

    #[test]
    fn a_long_log_makes_a_small_picture() {
        let points = (0..1_000_000).map(|step| Point {
            step,
            loss: Some((step * 7919 % 1000) as f64),
            interrupted: step % 3 == 0,
        });
        let svg = drawn(points.collect());
        assert!(svg.len() < 500_000, "{}", svg.len());
        let curves = curves(&svg);
        let ys = || curves[0].iter().map(|(_, y)| *y);
        assert!(ys().max() > Some(BOTTOM - 30) && ys().min() < Some(TOP + 30));
    }

    #[test]
    fn odd_losses_are_drawn() {
        for losses in [
            [0.0, 0.0],
            [5.0, 5.0],
            [-1e308, 1e308],
            [1e-320, 2e-320],
            [0.7, 0.7 + 1e-15],
            [f64::MIN_POSITIVE, -f64::MIN_POSITIVE],
        ] {
            let svg = drawn(vec![point(1, losses[0]), point(2, losses[1])]);
            assert_eq!(curves(&svg).len(), 1, "{losses:?}");
        }
        // One point is no line.
        assert!(drawn(vec![point(u64::MAX, 1.0)]).contains("fill=\"#2D62A0\""));
    }
}
