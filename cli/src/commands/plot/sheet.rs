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

pub(in crate::commands) const INK: RGBColor = RGBColor(34, 34, 34);
pub(in crate::commands) const FAINT: RGBColor = RGBColor(100, 100, 100);
pub(in crate::commands) const GRID: RGBColor = RGBColor(228, 228, 228);

pub(in crate::commands) type Drawn = Result<(), Box<dyn Error + Send + Sync>>;

/// A canvas.
pub(in crate::commands) struct Sheet<'a, B: DrawingBackend>(&'a DrawingArea<B, Shift>);

impl<'a, B: DrawingBackend> Sheet<'a, B>
where
    B::ErrorType: 'static,
{
    pub(super) fn new(canvas: &'a DrawingArea<B, Shift>) -> Self {
        Self(canvas)
    }

    /// What the picture shows, and a sentence below.
    pub(in crate::commands) fn head(&self, title: &str, remark: &str) -> Drawn {
        self.text(title, (MARGIN, TITLE), Style::new(34).bold())?;
        self.text(remark, (MARGIN, REMARK), Style::new(22).color(FAINT))
    }

    pub(in crate::commands) fn text(&self, text: &str, at: (i32, i32), style: Style) -> Drawn {
        let Style { size, bold, color, align } = style;
        let face = if bold { FontStyle::Bold } else { FontStyle::Normal };
        let font = FontDesc::new(FontFamily::Name(FONT), size.into(), face);
        let style = font.color(&color).pos(Pos::new(align, VPos::Center));
        Ok(self.0.draw(&Text::new(text, at, style))?)
    }

    pub(in crate::commands) fn line(
        &self,
        points: impl Into<Vec<(i32, i32)>>,
        color: RGBColor,
        width: u32,
    ) -> Drawn {
        Ok(self.0.draw(&PathElement::new(points.into(), color.stroke_width(width)))?)
    }

    pub(in crate::commands) fn rectangle(
        &self,
        (left, right): (i32, i32),
        (top, bottom): (i32, i32),
        style: ShapeStyle,
    ) -> Drawn {
        Ok(self.0.draw(&Rectangle::new([(left, top), (right, bottom)], style))?)
    }
}

/// How a text looks; to the left and in ink unless told otherwise.
#[derive(Clone, Copy)]
pub(in crate::commands) struct Style {
    size: i32,
    bold: bool,
    color: RGBColor,
    align: HPos,
}

impl Style {
    pub(in crate::commands) fn new(size: i32) -> Self {
        Self { size, bold: false, color: INK, align: HPos::Left }
    }

    pub(in crate::commands) fn bold(self) -> Self {
        Self { bold: true, ..self }
    }

    pub(in crate::commands) fn color(self, color: RGBColor) -> Self {
        Self { color, ..self }
    }

    pub(in crate::commands) fn centred(self) -> Self {
        Self { align: HPos::Center, ..self }
    }

    pub(in crate::commands) fn right(self) -> Self {
        Self { align: HPos::Right, ..self }
    }
}

/// The round number for the distance of two ticks that are to be about so far from each other.
pub(in crate::commands) fn round_step(about: f64) -> f64 {
    let magnitude = 10_f64.powf(about.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].map(|factor| factor * magnitude);
    step.into_iter().find(|step| *step >= about).unwrap_or(about)
}

/// A number with as many decimals as its step needs.
pub(in crate::commands) fn label(number: f64, step: f64) -> String {
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
