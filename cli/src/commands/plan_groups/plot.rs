//! Files with a picture of a plan.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context as _, anyhow};
use plotters::prelude::*;
use plotters::style::register_font;

use super::timeline::{FONT, SIZE, Timeline, draw};

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
    /// Draws a timeline and writes it.
    pub(super) fn write(&self, timeline: &Timeline<'_>) -> anyhow::Result<()> {
        let path: &Path = &self.path;
        let bytes = match self.format {
            Format::Svg => svg(timeline),
            Format::Png => png(timeline),
        };
        let bytes = bytes.with_context(|| format!("cannot draw {}", path.display()))?;
        std::fs::write(path, bytes).with_context(|| format!("cannot write {}", path.display()))
    }
}

fn svg(timeline: &Timeline<'_>) -> anyhow::Result<Vec<u8>> {
    let mut text = String::new();
    let canvas = SVGBackend::with_string(&mut text, SIZE).into_drawing_area();
    draw_with_font(timeline, &canvas)?;
    drop(canvas);
    Ok(text.into_bytes())
}

fn png(timeline: &Timeline<'_>) -> anyhow::Result<Vec<u8>> {
    let (width, height) = SIZE;
    let mut pixels = vec![0; usize::try_from(width * height * 3)?];
    let canvas = BitMapBackend::with_buffer(&mut pixels, SIZE).into_drawing_area();
    draw_with_font(timeline, &canvas)?;
    drop(canvas);
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, width, height);
    encoder.set_color(png::ColorType::Rgb);
    encoder.write_header()?.write_image_data(&pixels)?;
    Ok(bytes)
}

/// Draws with a font that is part of the binary: no font of the system is asked for.
fn draw_with_font<B: DrawingBackend>(
    timeline: &Timeline<'_>,
    canvas: &DrawingArea<B, plotters::coord::Shift>,
) -> anyhow::Result<()>
where
    B::ErrorType: 'static,
{
    for (style, font) in
        [(FontStyle::Normal, dejavu::sans::regular()), (FontStyle::Bold, dejavu::sans::bold())]
    {
        register_font(FONT, style, font).map_err(|_| anyhow!("the font is not valid"))?;
    }
    draw(timeline, canvas).map_err(anyhow::Error::from_boxed)?;
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
