//! Files with a picture.

mod sheet;

use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context as _, anyhow};
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::register_font;

pub(super) use self::sheet::{Drawn, FAINT, GRID, INK, Sheet, Style, label, round_step};

/// Width and height of a canvas, in pixels as everything that is drawn.
const SIZE: (u32, u32) = (1600, 720);
/// A family that every viewer of SVG knows; for bitmaps a font is registered under this name.
const FONT: &str = "sans-serif";

/// What can be drawn.
pub(super) trait Picture {
    /// Draws it on a white canvas of [`SIZE`].
    fn draw<B: DrawingBackend>(&self, sheet: Sheet<'_, B>) -> Drawn
    where
        B::ErrorType: 'static;
}

/// Where a picture goes, and in which format.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PlotFile {
    path: PathBuf,
    format: Format,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Format {
    Svg,
    Png,
}

impl FromStr for PlotFile {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let path = PathBuf::from(text);
        let extension = path.extension().map(|extension| extension.to_ascii_lowercase());
        let format = match extension.as_ref().and_then(|extension| extension.to_str()) {
            Some("svg") => Format::Svg,
            Some("png") => Format::Png,
            _ => return Err("write FILE.svg or FILE.png".to_owned()),
        };
        Ok(Self { path, format })
    }
}

impl PlotFile {
    /// Draws a picture and writes it.
    pub(super) fn write(&self, picture: &impl Picture) -> anyhow::Result<()> {
        let path: &Path = &self.path;
        let bytes = match self.format {
            Format::Svg => svg(picture).map(String::into_bytes),
            Format::Png => png(picture),
        };
        let bytes = bytes.with_context(|| format!("cannot draw {}", path.display()))?;
        std::fs::write(path, bytes).with_context(|| format!("cannot write {}", path.display()))
    }
}

/// A picture as SVG.
pub(super) fn svg(picture: &impl Picture) -> anyhow::Result<String> {
    let mut text = String::new();
    let canvas = SVGBackend::with_string(&mut text, SIZE).into_drawing_area();
    draw_with_font(picture, &canvas)?;
    drop(canvas);
    Ok(text)
}

fn png(picture: &impl Picture) -> anyhow::Result<Vec<u8>> {
    let (width, height) = SIZE;
    let mut pixels = vec![0; usize::try_from(width * height * 3)?];
    let canvas = BitMapBackend::with_buffer(&mut pixels, SIZE).into_drawing_area();
    draw_with_font(picture, &canvas)?;
    drop(canvas);
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, width, height);
    encoder.set_color(png::ColorType::Rgb);
    encoder.write_header()?.write_image_data(&pixels)?;
    Ok(bytes)
}

/// Draws with a font that is part of the binary: no font of the system is asked for.
fn draw_with_font<B: DrawingBackend>(
    picture: &impl Picture,
    canvas: &DrawingArea<B, Shift>,
) -> anyhow::Result<()>
where
    B::ErrorType: 'static,
{
    for (style, font) in
        [(FontStyle::Normal, dejavu::sans::regular()), (FontStyle::Bold, dejavu::sans::bold())]
    {
        register_font(FONT, style, font).map_err(|_| anyhow!("the font is not valid"))?;
    }
    canvas.fill(&WHITE).context("the canvas cannot be filled")?;
    picture.draw(Sheet::new(canvas)).map_err(anyhow::Error::from_boxed)?;
    canvas.present().context("the picture cannot be finished")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_says_the_format() {
        for (text, format) in [("a.svg", Format::Svg), ("b/a.PNG", Format::Png)] {
            assert_eq!(text.parse::<PlotFile>(), Ok(PlotFile { path: text.into(), format }));
        }
        for text in ["", "svg", ".png", "a.jpeg", "a."] {
            assert!(text.parse::<PlotFile>().is_err(), "{text}");
        }
    }
}
