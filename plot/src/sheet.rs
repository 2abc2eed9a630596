//! What every picture is drawn with: texts, lines, boxes, and axes' round numbers.

use std::error::Error;

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::FONT;

/// The margin to the left.
const MARGIN: i32 = 32;
/// The middles of the title and of the sentence below it, from the top.
const TITLE: i32 = 44;
const REMARK: i32 = 86;
/// Between two lines of a hatched box.
const HATCH_PITCH: i32 = 10;

/// What is written and what axes are drawn in.
pub const INK: RGBColor = RGBColor(34, 34, 34);
/// What is said in passing.
pub const FAINT: RGBColor = RGBColor(100, 100, 100);
/// Lines behind everything.
pub const GRID: RGBColor = RGBColor(228, 228, 228);

/// Whether something could be drawn.
pub type Drawn = Result<(), Box<dyn Error + Send + Sync>>;

/// A canvas.
pub struct Sheet<'a, B: DrawingBackend>(&'a DrawingArea<B, Shift>);

impl<'a, B: DrawingBackend> Sheet<'a, B>
where
    B::ErrorType: 'static,
{
    pub(crate) fn new(canvas: &'a DrawingArea<B, Shift>) -> Self {
        Self(canvas)
    }

    /// What the picture shows, and a sentence below.
    ///
    /// # Errors
    /// Those of the canvas, as of everything that draws.
    pub fn head(&self, title: &str, remark: &str) -> Drawn {
        self.text(title, (MARGIN, TITLE), Style::new(34).bold())?;
        self.text(remark, (MARGIN, REMARK), Style::new(22).color(FAINT))
    }

    /// A text whose middle is as high as a point.
    ///
    /// # Errors
    /// As [`head`](Self::head).
    pub fn text(&self, text: &str, at: (i32, i32), style: Style) -> Drawn {
        let text_style = style.font().color(&style.color).pos(Pos::new(style.align, VPos::Center));
        Ok(self.0.draw(&Text::new(text, at, text_style))?)
    }

    /// A line from point to point.
    ///
    /// # Errors
    /// As [`head`](Self::head).
    pub fn line(&self, points: impl Into<Vec<(i32, i32)>>, color: RGBColor, width: u32) -> Drawn {
        Ok(self.0.draw(&PathElement::new(points.into(), color.stroke_width(width)))?)
    }

    /// A horizontal line of dashes.
    ///
    /// # Errors
    /// As [`head`](Self::head).
    pub fn dashes(&self, (left, right): (i32, i32), y: i32, color: RGBColor) -> Drawn {
        for x in (left..right).step_by(12) {
            self.rectangle((x, (x + 7).min(right)), (y - 1, y + 1), color.filled())?;
        }
        Ok(())
    }

    /// Lines over a box, as far as it goes.
    ///
    /// # Errors
    /// As [`head`](Self::head).
    pub fn hatch(
        &self,
        hatch: Hatch,
        (left, right): (i32, i32),
        (top, bottom): (i32, i32),
        color: RGBColor,
    ) -> Drawn {
        let (width, height) = (right - left, bottom - top);
        if hatch == Hatch::Level {
            let mut lines = (top + HATCH_PITCH / 2..bottom).step_by(HATCH_PITCH.unsigned_abs() as usize);
            return lines.try_for_each(|y| self.line([(left, y), (right, y)], color, 1));
        }
        // Each line holds the points of one sum of both coordinates, counted from the corner at the top left; falling ones are
        // mirrored.
        for sum in (0..width + height).step_by(HATCH_PITCH.unsigned_abs() as usize) {
            let (from_x, from_y) = (sum.min(width), (sum - width).max(0));
            let (to_x, to_y) = ((sum - height).max(0), sum.min(height));
            if hatch != Hatch::Falling {
                self.line([(left + from_x, top + from_y), (left + to_x, top + to_y)], color, 1)?;
            }
            if hatch != Hatch::Rising {
                self.line([(right - from_x, top + from_y), (right - to_x, top + to_y)], color, 1)?;
            }
        }
        Ok(())
    }

    /// A box, from left to right and from top to bottom.
    ///
    /// # Errors
    /// As [`head`](Self::head).
    pub fn rectangle(
        &self,
        (left, right): (i32, i32),
        (top, bottom): (i32, i32),
        style: ShapeStyle,
    ) -> Drawn {
        Ok(self.0.draw(&Rectangle::new([(left, top), (right, bottom)], style))?)
    }
}

/// Which way the lines of a hatched box go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hatch {
    /// From the lower left to the upper right.
    Rising,
    /// From the upper left to the lower right.
    Falling,
    /// Both ways.
    Crossed,
    /// From left to right.
    Level,
}

/// How a text looks; to the left and in ink unless told otherwise.
#[derive(Clone, Copy)]
pub struct Style {
    size: i32,
    bold: bool,
    color: RGBColor,
    align: HPos,
}

impl Style {
    /// Of a size in pixels.
    pub fn new(size: i32) -> Self {
        Self { size, bold: false, color: INK, align: HPos::Left }
    }

    /// The same in bold.
    #[must_use]
    pub fn bold(self) -> Self {
        Self { bold: true, ..self }
    }

    /// The same in a colour.
    #[must_use]
    pub fn color(self, color: RGBColor) -> Self {
        Self { color, ..self }
    }

    /// The same around its point.
    #[must_use]
    pub fn centred(self) -> Self {
        Self { align: HPos::Center, ..self }
    }

    /// The same to the left of its point.
    #[must_use]
    pub fn right(self) -> Self {
        Self { align: HPos::Right, ..self }
    }

    fn font(self) -> FontDesc<'static> {
        let face = if self.bold { FontStyle::Bold } else { FontStyle::Normal };
        FontDesc::new(FontFamily::Name(FONT), self.size.into(), face)
    }
}

/// The pixel at a share of the way from one to another; shares beyond 0 and 1 are at the ends.
pub fn between((from, to): (i32, i32), share: f64) -> i32 {
    // From zero to a distance of pixels.
    #[allow(clippy::cast_possible_truncation)]
    let distance = (f64::from(to - from) * share.clamp(0.0, 1.0)).round() as i32;
    from + distance
}

/// The round number for the distance of two ticks that are to be about so far from each other.
pub fn round_step(about: f64) -> f64 {
    let magnitude = 10_f64.powf(about.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].map(|factor| factor * magnitude);
    step.into_iter().find(|step| *step >= about).unwrap_or(about)
}

/// A number with as many decimals as its step needs.
pub fn label(number: f64, step: f64) -> String {
    if number == 0.0 {
        "0".to_owned()
    } else if (1e-3..1e6).contains(&step) {
        let decimals = (0..4).find(|decimals| {
            let scaled = step * 10_f64.powi(*decimals);
            (scaled - scaled.round()).abs() < 1e-6 * scaled
        });
        format!("{number:.*}", decimals.map_or(4, |decimals| usize::try_from(decimals).unwrap_or(0)))
    } else {
        let more_digits = number.abs().log10().floor() - step.log10().floor();
        let decimals = (0_u8..8).find(|decimals| f64::from(*decimals) >= more_digits).unwrap_or(8);
        format!("{number:.*e}", usize::from(decimals))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_on_the_way() {
        let places = [-1.0, 0.0, 0.25, 1.0, 2.0].map(|share| between((500, 100), share));
        assert_eq!(places, [500, 500, 400, 100, 100]);
    }

    #[test]
    fn steps_are_round() {
        for (about, step) in [(0.7, 1.0), (1.0, 1.0), (1.1, 2.0), (30.0, 50.0), (0.006, 0.01)] {
            assert!((round_step(about) / step - 1.0).abs() < 1e-9, "{about}");
        }
    }

    #[test]
    fn labels_have_the_decimals_of_the_step() {
        for (number, step, text) in [
            (0.0, 0.5, "0"),
            (1.5, 0.5, "1.5"),
            (-0.02, 0.01, "-0.02"),
            (2000.0, 500.0, "2000"),
            (2e-5, 2e-5, "2e-5"),
            (1.6e-4, 2e-5, "1.6e-4"),
            (0.69312, 2e-5, "6.9312e-1"),
            (1.2e7, 2e6, "1.2e7"),
        ] {
            assert_eq!(label(number, step), text);
        }
    }
}
