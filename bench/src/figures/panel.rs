//! A frame with bars in groups.

use plotters::prelude::DrawingBackend;
use plotters::style::{Color as _, WHITE};
use pswitch_plot::{Drawn, FAINT, GRID, INK, Sheet, Style};

use super::look::Look;
use super::scale::Scale;

/// Heights of what stands above and below a frame.
const TITLE: i32 = 44;
const LABELS: i32 = 66;
/// What a frame has to its left, for the numbers of its axis.
const NUMBERS: i32 = 86;
/// From the top of the frame to the end of the axis: room for the number above the highest bar.
const HEADROOM: i32 = 26;
/// Between the middles of two lines of a label.
const LINE: i32 = 24;
/// The widest bar.
const WIDEST: i32 = 76;
/// Half of how far a break goes up and down.
const SLANT: i32 = 5;

/// How high a panel is, with its title and labels.
pub(super) const HEIGHT: i32 = TITLE + 330 + LABELS;

/// Bars of one quantity.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Panel {
    pub(super) title: String,
    pub(super) unit: &'static str,
    pub(super) groups: Vec<Group>,
}

/// Bars that stand together.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Group {
    /// Its lines are centred below the bars.
    pub(super) label: String,
    pub(super) columns: Vec<Column>,
    /// What a dashed line marks.
    pub(super) bound: Option<f64>,
}

/// A bar.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Column {
    pub(super) mechanism: String,
    pub(super) value: f64,
    /// Where its whisker ends; none if both are the value.
    pub(super) whisker: (f64, f64),
}

/// A panel in its place.
struct Frame<'a, B: DrawingBackend> {
    sheet: &'a Sheet<'a, B>,
    scale: Scale,
    left: i32,
    right: i32,
}

impl Panel {
    /// Draws it between two columns of pixels, from a row of pixels down.
    pub(super) fn draw<B: DrawingBackend>(
        &self,
        sheet: &Sheet<'_, B>,
        (left, right): (i32, i32),
        top: i32,
        mechanisms: &[String],
    ) -> Drawn
    where
        B::ErrorType: 'static,
    {
        sheet.text(&self.title, (left, top + TITLE / 2 - 4), Style::new(24).bold())?;
        let ends = (top + HEIGHT - LABELS, top + TITLE + HEADROOM);
        let columns = || self.groups.iter().flat_map(|group| &group.columns);
        let values = columns().flat_map(|column| [column.value, column.whisker.0, column.whisker.1]);
        let scale =
            Scale::of(values.chain(self.groups.iter().filter_map(|group| group.bound)), self.unit, ends);
        let frame = Frame { sheet, scale, left: left + NUMBERS, right };
        frame.axis(self.unit)?;
        let pitch = (right - left - NUMBERS) / i32::try_from(self.groups.len().max(1))?;
        let fullest = self.groups.iter().map(|group| group.columns.len()).max().unwrap_or(0).max(1);
        let bar = ((pitch - (pitch / 6).max(16)) / i32::try_from(fullest)?).min(WIDEST);
        let size = number_size(columns().map(|column| number(column.value)), bar);
        for (group, begin) in self.groups.iter().zip((frame.left..).step_by(usize::try_from(pitch)?)) {
            let width = bar * i32::try_from(group.columns.len())?;
            let first = begin + (pitch - width) / 2;
            for (column, x) in group.columns.iter().zip((first..).step_by(usize::try_from(bar)?)) {
                frame.column(column, (x + 2, x + bar - 2), Look::of(&column.mechanism, mechanisms))?;
            }
            if let Some(bound) = group.bound {
                sheet.dashes((begin + 6, begin + pitch - 6), scale.y(bound), INK)?;
            }
            for (column, x) in group.columns.iter().zip((first..).step_by(usize::try_from(bar)?)) {
                if let Some(size) = size {
                    frame.number(column, x + bar / 2, size)?;
                }
            }
            frame.label(&group.label, begin + pitch / 2, pitch)?;
        }
        frame.break_marks()
    }
}

impl<B: DrawingBackend> Frame<'_, B>
where
    B::ErrorType: 'static,
{
    fn axis(&self, unit: &str) -> Drawn {
        for (at, text) in self.scale.ticks(unit) {
            let y = self.scale.y(at);
            self.sheet.line([(self.left, y), (self.right, y)], GRID, 1)?;
            self.sheet.text(&text, (self.left - 10, y), Style::new(19).right())?;
        }
        let pieces = self.scale.pieces();
        for &(from, to) in &pieces {
            self.sheet.line([(self.left, from), (self.left, to)], INK, 1)?;
        }
        let bottom = self.scale.y(0.0);
        self.sheet.line([(self.left, bottom), (self.right, bottom)], INK, 1)?;
        let top = pieces.last().map_or(bottom, |piece| piece.1);
        self.sheet.text(unit, (self.left - 10, top - 24), Style::new(19).right().color(FAINT))
    }

    /// A bar with its whisker, cut where the axis is broken.
    fn column(&self, column: &Column, across: (i32, i32), look: Look) -> Drawn {
        let bottom = self.scale.y(0.0);
        let top = self.scale.y(column.value);
        if top < bottom {
            look.fill(self.sheet, across, (top, bottom))?;
        }
        if let Some(y) = self.scale.crossed(column.value) {
            self.cut(across, y)?;
        }
        let (low, high) = column.whisker;
        if low < high {
            let middle = (across.0 + across.1) / 2;
            let (low, high) = (self.scale.y(low), self.scale.y(high));
            // Seen on dark bars as well.
            self.sheet.rectangle((middle - 2, middle + 2), (high, low), WHITE.filled())?;
            for ends in [
                [(middle, high), (middle, low)],
                [(middle - 6, high), (middle + 6, high)],
                [(middle - 6, low), (middle + 6, low)],
            ] {
                self.sheet.line(ends, INK, 2)?;
            }
        }
        Ok(())
    }

    /// A white band with two slanting edges over a bar.
    fn cut(&self, (left, right): (i32, i32), y: i32) -> Drawn {
        for offset in -4..=4 {
            self.sheet.line([(left - 1, y + offset + SLANT), (right + 1, y + offset - SLANT)], WHITE, 2)?;
        }
        for offset in [-4, 4] {
            self.sheet.line([(left - 3, y + offset + SLANT), (right + 3, y + offset - SLANT)], INK, 1)?;
        }
        Ok(())
    }

    /// Two slanting lines on the axis where it is broken.
    fn break_marks(&self) -> Drawn {
        if let [(_, below), (above, _)] = self.scale.pieces()[..] {
            for y in [below, above] {
                self.sheet.line([(self.left - 7, y + SLANT), (self.left + 7, y - SLANT)], INK, 2)?;
            }
        }
        Ok(())
    }

    fn number(&self, column: &Column, middle: i32, size: i32) -> Drawn {
        let top = self.scale.y(column.value.max(column.whisker.1));
        let (text, y) = (number(column.value), top - 6 - size / 2);
        // Legible where a bound crosses it.
        let half = i32::try_from(text.chars().count())? * size / 3;
        let across = (middle - half, middle + half);
        self.sheet.rectangle(across, (y - size / 2, y + size / 2), WHITE.filled())?;
        self.sheet.text(&text, (middle, y), Style::new(size).centred())
    }

    fn label(&self, label: &str, middle: i32, width: i32) -> Drawn {
        let longest = label.lines().map(|line| line.chars().count()).max().unwrap_or(0);
        let size = size_within(longest, width, &[21, 18, 15, 12]).unwrap_or(10);
        let first = self.scale.y(0.0) + 20;
        for (line, y) in label.lines().zip((first..).step_by(LINE.unsigned_abs() as usize)) {
            self.sheet.text(line, (middle, y), Style::new(size).centred())?;
        }
        Ok(())
    }
}

/// The size in which all numbers fit above their bars; none if they do not.
fn number_size(numbers: impl Iterator<Item = String>, bar: i32) -> Option<i32> {
    let longest = numbers.map(|number| number.chars().count()).max()?;
    size_within(longest, bar, &[19, 17, 15, 13])
}

/// The largest size in which so many characters are no wider.
fn size_within(characters: usize, width: i32, sizes: &[i32]) -> Option<i32> {
    let characters = i32::try_from(characters).unwrap_or(i32::MAX / 100);
    // A digit is 0.636 of its size wide.
    sizes.iter().copied().find(|size| characters * size * 64 / 100 <= width)
}

/// Three digits, or all that come before the point.
fn number(value: f64) -> String {
    match value {
        100.0.. => format!("{value:.0}"),
        10.0..100.0 => format!("{value:.1}"),
        0.0 => "0".to_owned(),
        _ => format!("{value:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_shrink_and_vanish_with_their_bars() {
        let numbers = || ["6475", "8.62"].map(str::to_owned).into_iter();
        assert_eq!(
            [60, 45, 34, 20].map(|bar| number_size(numbers(), bar)),
            [Some(19), Some(17), Some(13), None]
        );
        assert_eq!([6475.4, 86.54, 8.6, 0.0].map(number), ["6475", "86.5", "8.60", "0"]);
    }
}
