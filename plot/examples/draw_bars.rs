//! Draws three bars and says how large both files are.

use pswitch_plot::{Drawn, INK, Picture, Sheet, Style};

use plotters::prelude::*;

struct Bars([(&'static str, i32); 3]);

impl Picture for Bars {
    fn draw<B: DrawingBackend>(&self, sheet: Sheet<'_, B>) -> Drawn
    where
        B::ErrorType: 'static,
    {
        sheet.head("three bars", "each as long as its number says")?;
        for ((name, length), top) in self.0.iter().zip((160..).step_by(120)) {
            sheet.text(name, (180, top + 40), Style::new(24).right())?;
            sheet.rectangle((200, 200 + length), (top, top + 80), INK.filled())?;
        }
        Ok(())
    }
}

fn main() -> Result<(), pswitch_plot::PlotError> {
    let bars = Bars([("one", 200), ("two", 600), ("three", 1200)]);
    println!("SVG: {} bytes", pswitch_plot::svg(&bars)?.len());
    println!("PNG: {} bytes", pswitch_plot::png(&bars)?.len());
    Ok(())
}
