//! A plan as a picture: what link and device do over time, where computation stalls, and how long other plans take.

use plotters::prelude::*;
use pswitch_transfer::{Algorithm, Group, GroupTimes, Plan, Prediction};

use super::super::text::{count, megabytes, milliseconds, title};
use pswitch_plot::{Drawn, FAINT, GRID, Hatch, INK, Picture, Sheet, Style, label, round_step};

/// What is drawn.
pub(super) struct Timeline<'a> {
    pub(super) plan: &'a Plan,
    pub(super) prediction: &'a Prediction,
    /// What the best plan takes.
    pub(super) optimal_us: f64,
    /// What the layers take if the model is resident.
    pub(super) ready_us: f64,
    /// A sentence below the title.
    pub(super) remark: &'a str,
}

/// From left to right: where time begins, where it ends.
const LEFT: i32 = 190;
const RIGHT: i32 = 1560;
/// From top to bottom; of lanes top and bottom.
const LEGEND: (i32, i32) = (120, 140);
const LINK: (i32, i32) = (180, 250);
const COMPUTE: (i32, i32) = (262, 332);
const BARS: i32 = 392;
const BETWEEN_BARS: i32 = 12;
const AXIS: i32 = 668;
const TICK_LABEL: i32 = 690;

/// Neighbours have different shades.
const COPIES: [RGBColor; 2] = [RGBColor(45, 98, 160), RGBColor(92, 143, 200)];
const LAYERS: [RGBColor; 2] = [RGBColor(40, 120, 76), RGBColor(88, 162, 118)];
const STALL: RGBColor = RGBColor(206, 44, 34);
const STALL_FILL: RGBColor = RGBColor(253, 228, 224);
const BOUND: RGBColor = RGBColor(126, 64, 168);
const THIS_PLAN: RGBColor = LAYERS[0];
const OTHER_PLAN: RGBColor = RGBColor(176, 182, 190);

/// A bar of more than so many times the plan is cut off, so that the plan stays legible.
const LONGEST_BAR: f64 = 3.0;
/// The axis goes on so far behind the longest bar, for its label.
const BEHIND_BARS: f64 = 1.18;

impl Picture for Timeline<'_> {
    fn draw<B: DrawingBackend>(&self, sheet: Sheet<'_, B>) -> Drawn
    where
        B::ErrorType: 'static,
    {
        let bars = self.bars();
        let whole = bars.iter().map(|bar| bar.us).filter(|us| *us <= self.plan.predicted_us * LONGEST_BAR);
        let longest = whole.fold(0.0, f64::max) * BEHIND_BARS;
        let pen = Pen { sheet, full_us: if longest > 0.0 { longest } else { 1.0 } };
        pen.sheet.head(&self.title(), self.remark)?;
        pen.legend(self.prediction.stall_us)?;
        pen.axis()?;
        pen.lanes(self.prediction)?;
        pen.bars(&bars, self.plan.predicted_us)?;
        pen.lower_bound(self.plan.lower_bound_us)
    }
}

/// How long something takes, for comparison.
struct Bar<'a> {
    name: &'a str,
    us: f64,
    color: RGBColor,
}

impl Timeline<'_> {
    fn title(&self) -> String {
        let Plan { model, algorithm, groups, predicted_us, .. } = self.plan;
        let groups = count(groups.len(), "group");
        let model = title(model);
        format!("{model}, {groups} by \u{201c}{algorithm}\u{201d}: {}", milliseconds(*predicted_us))
    }

    /// From the shortest to the longest.
    fn bars(&self) -> Vec<Bar<'_>> {
        let Plan { algorithm, predicted_us, whole_us, per_layer_us, lower_bound_us, .. } = *self.plan;
        let others = [
            (Algorithm::Optimal, "best plan", self.optimal_us),
            (Algorithm::PerLayer, "group per layer", per_layer_us),
            (Algorithm::Whole, "one group", whole_us),
        ];
        let mut bars = vec![
            Bar { name: "ready model", us: self.ready_us, color: FAINT },
            Bar { name: "lower bound", us: lower_bound_us, color: BOUND },
            Bar { name: "this plan", us: predicted_us, color: THIS_PLAN },
        ];
        let others = others.into_iter().filter(|(other, ..)| *other != algorithm);
        bars.extend(others.map(|(_, name, us)| Bar { name, us, color: OTHER_PLAN }));
        bars.sort_by(|a, b| a.us.total_cmp(&b.us));
        bars
    }
}

/// A canvas with an axis of time.
struct Pen<'a, B: DrawingBackend> {
    sheet: Sheet<'a, B>,
    /// The time at the right end.
    full_us: f64,
}

impl<B: DrawingBackend> Pen<'_, B>
where
    B::ErrorType: 'static,
{
    /// Where a time is; its end if it is beyond.
    fn x(&self, us: f64) -> i32 {
        let width = f64::from(RIGHT - LEFT);
        // From zero to the width of the canvas.
        #[allow(clippy::cast_possible_truncation)]
        let right = (width * (us / self.full_us).clamp(0.0, 1.0)).round() as i32;
        LEFT + right
    }

    fn legend(&self, stall_us: f64) -> Drawn {
        let stall = format!("stall: bytes have not landed ({} in all)", milliseconds(stall_us));
        let mut left = LEFT;
        for (color, name, width) in [
            (Some(COPIES[0]), "copy of a group", 230),
            (Some(LAYERS[0]), "its layers compute", 250),
            (None, stall.as_str(), 520),
        ] {
            let box_ = (left, left + 28);
            match color {
                Some(color) => self.sheet.rectangle(box_, LEGEND, color.filled())?,
                None => self.hatched(box_, LEGEND)?,
            }
            self.sheet.text(name, (left + 38, middle(LEGEND)), Style::new(21))?;
            left += width;
        }
        self.dashes(left, LEGEND)?;
        self.sheet.text("lower bound", (left + 12, middle(LEGEND)), Style::new(21))
    }

    fn axis(&self) -> Drawn {
        for (us, label) in ticks(self.full_us) {
            let x = self.x(us);
            self.sheet.line([(x, LINK.0 - 10), (x, AXIS)], GRID, 1)?;
            self.sheet.text(&label, (x, TICK_LABEL), Style::new(20).centred())?;
        }
        self.sheet.line([(LEFT, AXIS), (RIGHT, AXIS)], INK, 1)?;
        self.sheet.text("ms", (RIGHT, TICK_LABEL), Style::new(20).right())
    }

    fn lanes(&self, prediction: &Prediction) -> Drawn {
        for (name, lane) in [("link", LINK), ("compute", COMPUTE)] {
            self.sheet.text(name, (LEFT - 16, middle(lane)), Style::new(24).right())?;
        }
        self.group((0.0, prediction.lead_us), COMPUTE, LAYERS[1], None)?;
        let mut landed_us = 0.0;
        let mut ready_us = prediction.lead_us;
        for (index, times) in prediction.groups.iter().enumerate() {
            let GroupTimes { group: Group { bytes, .. }, lands_us, starts_us, ends_us, .. } = *times;
            let number = index.to_string();
            let shade = index % 2;
            self.group((landed_us, lands_us), LINK, COPIES[shade], Some([&number, &megabytes(bytes)]))?;
            self.stall((ready_us, starts_us))?;
            let computes = milliseconds(ends_us - starts_us);
            self.group((starts_us, ends_us), COMPUTE, LAYERS[shade], Some([&number, &computes]))?;
            (landed_us, ready_us) = (lands_us, ends_us);
        }
        Ok(())
    }

    /// A box, with a number and an explanation in it as far as they fit. What is too short for a pixel is left out.
    fn group(
        &self,
        (begin_us, end_us): (f64, f64),
        lane: (i32, i32),
        color: RGBColor,
        label: Option<[&str; 2]>,
    ) -> Drawn {
        let (left, right) = (self.x(begin_us), self.x(end_us));
        if left == right {
            return Ok(());
        }
        self.sheet.rectangle((left, right), lane, color.filled())?;
        let Some([number, explanation]) = label else { return Ok(()) };
        let center = left + (right - left) / 2;
        let style = Style::new(21).centred().color(WHITE);
        if fits(explanation, right - left) {
            self.sheet.text(number, (center, middle(lane) - 13), style.bold())?;
            self.sheet.text(explanation, (center, middle(lane) + 15), style)?;
        } else if fits(number, right - left) {
            self.sheet.text(number, (center, middle(lane)), style.bold())?;
        }
        Ok(())
    }

    fn stall(&self, (begin_us, end_us): (f64, f64)) -> Drawn {
        let (left, right) = (self.x(begin_us), self.x(end_us));
        if left == right {
            return Ok(());
        }
        self.hatched((left, right), COMPUTE)?;
        let label = milliseconds(end_us - begin_us);
        if fits(&label, right - left) {
            let center = left + (right - left) / 2;
            let half = i32::try_from(label.chars().count())? * 6 + 4;
            let (top, bottom) = (middle(COMPUTE) - 14, middle(COMPUTE) + 14);
            self.sheet.rectangle((center - half, center + half), (top, bottom), STALL_FILL.filled())?;
            self.sheet.text(
                &label,
                (center, middle(COMPUTE)),
                Style::new(21).centred().color(STALL).bold(),
            )?;
        }
        Ok(())
    }

    /// A frame with slanting lines in it.
    fn hatched(&self, (left, right): (i32, i32), (top, bottom): (i32, i32)) -> Drawn {
        self.sheet.rectangle((left, right), (top, bottom), STALL_FILL.filled())?;
        self.sheet.hatch(Hatch::Rising, (left, right), (top, bottom), STALL)?;
        self.sheet.rectangle((left, right), (top, bottom), STALL.into())
    }

    fn bars(&self, bars: &[Bar<'_>], plan_us: f64) -> Drawn {
        let pitch = (AXIS - BARS) / i32::try_from(bars.len())?;
        for (top, Bar { name, us, color }) in (BARS..).step_by(usize::try_from(pitch)?).zip(bars) {
            let lane = (top, top + pitch - BETWEEN_BARS);
            let style = Style::new(21);
            let style = if *color == THIS_PLAN { style.bold() } else { style };
            self.sheet.text(name, (LEFT - 16, middle(lane)), style.right())?;
            self.sheet.rectangle((LEFT, self.x(*us)), lane, color.filled())?;
            let mut value = milliseconds(*us);
            let more_percent = (us / plan_us - 1.0) * 100.0;
            if more_percent.abs() >= 0.05 {
                value += &format!("  ({more_percent:+.1} %)");
            }
            if *us > self.full_us {
                let value = format!("{value} \u{2192}");
                self.sheet.text(&value, (RIGHT - 10, middle(lane)), style.right())?;
            } else {
                self.sheet.text(&value, (self.x(*us) + 10, middle(lane)), style)?;
            }
        }
        Ok(())
    }

    fn lower_bound(&self, us: f64) -> Drawn {
        self.dashes(self.x(us), (LINK.0 - 10, BARS - 30))
    }

    fn dashes(&self, x: i32, (top, bottom): (i32, i32)) -> Drawn {
        for y in (top..bottom).step_by(10) {
            self.sheet.rectangle((x - 1, x + 1), (y, (y + 6).min(bottom)), BOUND.filled())?;
        }
        Ok(())
    }
}

fn middle((top, bottom): (i32, i32)) -> i32 {
    top + (bottom - top) / 2
}

/// Whether a text of the size used in boxes fits into a width.
fn fits(text: &str, width: i32) -> bool {
    i32::try_from(text.chars().count()).is_ok_and(|characters| characters * 12 + 6 < width)
}

/// Round times from zero up, some eight of them, each with its label in milliseconds.
fn ticks(full_us: f64) -> Vec<(f64, String)> {
    let step = round_step(full_us / 1e3 / 8.0);
    (0..=8)
        .map(|tick| f64::from(tick) * step)
        .filter(|ms| ms * 1e3 <= full_us * 0.97)
        .map(|ms| (ms * 1e3, label(ms, step)))
        .collect()
}
