//! How mechanisms look and what readers know them by.

use plotters::prelude::{Color as _, DrawingBackend, RGBColor, WHITE};
use pswitch_plot::{Drawn, Hatch, INK, Sheet};

/// A colour with a pattern: either tells mechanisms apart, on a screen and in print without colours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Look {
    fill: RGBColor,
    hatch: Option<(Hatch, RGBColor)>,
}

/// In the order in which a figure's mechanisms come.
const LOOKS: [Look; 9] = [
    Look { fill: RGBColor(206, 210, 216), hatch: None },
    Look { fill: RGBColor(45, 98, 160), hatch: None },
    Look { fill: RGBColor(247, 183, 92), hatch: Some((Hatch::Rising, INK)) },
    Look { fill: RGBColor(150, 42, 42), hatch: Some((Hatch::Crossed, WHITE)) },
    Look { fill: RGBColor(190, 224, 200), hatch: Some((Hatch::Falling, INK)) },
    Look { fill: RGBColor(104, 60, 140), hatch: Some((Hatch::Level, WHITE)) },
    Look { fill: RGBColor(252, 240, 160), hatch: Some((Hatch::Crossed, INK)) },
    Look { fill: RGBColor(30, 110, 100), hatch: Some((Hatch::Rising, WHITE)) },
    Look { fill: RGBColor(255, 255, 255), hatch: Some((Hatch::Level, INK)) },
];

impl Look {
    /// That of a mechanism among the others of its figure. Those that most figures have look the same in all.
    pub(super) fn of(mechanism: &str, all: &[String]) -> Self {
        let mut place = Self::order(mechanism);
        if place == FIXED.len() {
            let others = all.iter().filter(|name| Self::order(name) == FIXED.len());
            place += others.take_while(|name| *name != mechanism).count() % (LOOKS.len() - FIXED.len());
        }
        LOOKS[place]
    }

    /// Where a mechanism comes in a legend: those that most figures have are first.
    pub(super) fn order(mechanism: &str) -> usize {
        FIXED.iter().position(|known| *known == mechanism).unwrap_or(FIXED.len())
    }

    /// Fills a box.
    pub(super) fn fill<B: DrawingBackend>(
        self,
        sheet: &Sheet<'_, B>,
        across: (i32, i32),
        down: (i32, i32),
    ) -> Drawn
    where
        B::ErrorType: 'static,
    {
        sheet.rectangle(across, down, self.fill.filled())?;
        if let Some((hatch, color)) = self.hatch {
            sheet.hatch(hatch, across, down, color)?;
        }
        sheet.rectangle(across, down, INK.into())
    }
}

/// Mechanisms that have the first looks, wherever they are.
const FIXED: [&str; 4] = ["ready", "pswitch", "mps", "stop-and-start"];

/// What a legend calls a mechanism.
pub(super) fn name(mechanism: &str) -> String {
    match mechanism {
        "ready" => "ready model".to_owned(),
        "mps" => "NVIDIA MPS".to_owned(),
        "stop-and-start" => mechanism.to_owned(),
        "per-layer" => "per-layer pipeline".to_owned(),
        "grouped" => "grouped transmission".to_owned(),
        "no-unified" => "no unified memory management".to_owned(),
        "no-ipc" => "no IPC optimization".to_owned(),
        "no-pinned" => "no pinned memory".to_owned(),
        "managed" => "CUDA managed memory".to_owned(),
        "load-on-demand" => "load on demand, LRU eviction".to_owned(),
        other => match other.strip_prefix("pytorch-") {
            Some("stop-and-start") => "PyTorch: stop-and-start".to_owned(),
            Some(row) => format!("PyTorch: {}", row.replace('-', " ")),
            None => other.replace('-', " "),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mechanisms_of_a_figure_look_different() {
        let all = ["a", "mps", "ready", "stop-and-start", "pswitch", "b", "c", "d", "e"];
        let all = all.map(str::to_owned);
        let looks: Vec<_> = all.iter().map(|name| Look::of(name, &all)).collect();
        for (index, look) in looks.iter().enumerate() {
            assert!(!looks[..index].contains(look), "{}", all[index]);
        }
        // The same wherever it stands.
        assert_eq!(Look::of("pswitch", &all), Look::of("pswitch", &["pswitch".to_owned()]));
    }

    #[test]
    fn names_are_those_of_readers() {
        assert_eq!(name("pytorch-copy-then-run"), "PyTorch: copy then run");
        assert_eq!(name("no-optimization"), "no optimization");
    }
}
