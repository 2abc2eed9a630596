//! Pictures as SVG and PNG from one drawing.
//!
//! What can be drawn is a [`Picture`]: it draws on a [`Sheet`], which knows texts, lines and boxes, and [`PlotFile`] writes it
//! in the format that its name asks for. The font is part of the binary:
//!
//! ```
//! use plotters::prelude::DrawingBackend;
//! use pswitch_plot::{Drawn, Picture, Sheet, svg};
//!
//! struct Title;
//!
//! impl Picture for Title {
//!     fn draw<B: DrawingBackend>(&self, sheet: Sheet<'_, B>) -> Drawn
//!     where
//!         B::ErrorType: 'static,
//!     {
//!         sheet.head("a picture", "and a sentence about it")
//!     }
//! }
//!
//! assert!(svg(&Title)?.contains("a picture"));
//! # Ok::<(), pswitch_plot::PlotError>(())
//! ```

mod sheet;

use std::error::Error;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::register_font;

pub use self::sheet::{Drawn, FAINT, GRID, Hatch, INK, Sheet, Style, between, label, round_step};

/// Width and height of a canvas, in pixels as everything that is drawn.
const SIZE: (u32, u32) = (1600, 720);
/// A family that every viewer of SVG knows; for bitmaps a font is registered under this name.
const FONT: &str = "sans-serif";

/// Why there is no picture.
#[derive(Debug, thiserror::Error)]
pub enum PlotError {
    /// The font that is part of the binary is damaged.
    #[error("the font is not valid")]
    Font,
    /// What the drawing itself, or the library below it, says.
    #[error("cannot draw")]
    Draw(#[source] Box<dyn Error + Send + Sync>),
    /// A bitmap that cannot be encoded.
    #[error("cannot encode a bitmap")]
    Encode(#[from] png::EncodingError),
    /// The file cannot be written.
    #[error("cannot write {}", path.display())]
    Write {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// What can be drawn.
pub trait Picture {
    /// Width and height of its canvas, in pixels.
    fn size(&self) -> (u32, u32) {
        SIZE
    }

    /// Draws it on a white canvas of [`size`](Self::size).
    ///
    /// # Errors
    /// Those of the sheet.
    fn draw<B: DrawingBackend>(&self, sheet: Sheet<'_, B>) -> Drawn
    where
        B::ErrorType: 'static;
}

/// Where a picture goes, and in which format.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlotFile {
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
    /// `FOLDER/NAME.svg` and `FOLDER/NAME.png`.
    pub fn both(folder: &Path, name: &str) -> [Self; 2] {
        [(Format::Svg, "svg"), (Format::Png, "png")]
            .map(|(format, extension)| Self { path: folder.join(format!("{name}.{extension}")), format })
    }

    /// Draws a picture and writes it.
    ///
    /// # Errors
    /// When it cannot be drawn or the file cannot be written.
    pub fn write(&self, picture: &impl Picture) -> Result<(), PlotError> {
        let bytes = match self.format {
            Format::Svg => svg(picture)?.into_bytes(),
            Format::Png => png(picture)?,
        };
        let failed = |source| PlotError::Write { path: self.path.clone(), source };
        std::fs::write(&self.path, bytes).map_err(failed)
    }
}

/// A picture as SVG.
///
/// # Errors
/// When it cannot be drawn.
pub fn svg(picture: &impl Picture) -> Result<String, PlotError> {
    let mut text = String::new();
    let canvas = SVGBackend::with_string(&mut text, picture.size()).into_drawing_area();
    draw_with_font(picture, &canvas)?;
    drop(canvas);
    Ok(text)
}

/// A picture as PNG.
///
/// # Errors
/// When it cannot be drawn.
pub fn png(picture: &impl Picture) -> Result<Vec<u8>, PlotError> {
    let (width, height) = picture.size();
    let mut pixels = vec![0; width as usize * height as usize * 3];
    let canvas = BitMapBackend::with_buffer(&mut pixels, (width, height)).into_drawing_area();
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
) -> Result<(), PlotError>
where
    B::ErrorType: 'static,
{
    for (style, font) in
        [(FontStyle::Normal, dejavu::sans::regular()), (FontStyle::Bold, dejavu::sans::bold())]
    {
        register_font(FONT, style, font).map_err(|_| PlotError::Font)?;
    }
    canvas.fill(&WHITE).map_err(|error| PlotError::Draw(error.into()))?;
    picture.draw(Sheet::new(canvas)).map_err(PlotError::Draw)?;
    canvas.present().map_err(|error| PlotError::Draw(error.into()))
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
