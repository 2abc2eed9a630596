//! The log of a training task, as far as a picture of it needs it.

use std::fs::File;
use std::io::{BufRead, BufReader, Read as _};
use std::path::Path;

use anyhow::{Context as _, bail};
use pswitch_train::ProgressLine;

/// Those of a log have a tenth of it.
const MOST_BYTES_OF_A_LINE: u64 = 4096;

/// What the lines of a log say.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Log {
    /// One a line.
    pub(super) points: Vec<Point>,
    /// All interruptions, those of earlier runs too.
    pub(super) interruptions: u64,
    /// What these cost.
    pub(super) interruption_cost_us: u64,
}

/// What a line says.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Point {
    pub(super) step: u64,
    /// None where it was no number.
    pub(super) loss: Option<f64>,
    /// Whether the task was interrupted since the line before.
    pub(super) interrupted: bool,
}

impl Log {
    pub(super) fn open(path: &Path) -> anyhow::Result<Self> {
        let shown = path.display();
        let file = File::open(path).with_context(|| format!("cannot read {shown}"))?;
        let log = Self::read(BufReader::new(file)).with_context(|| format!("{shown} is no log of a task"))?;
        if log.points.iter().all(|point| point.loss.is_none()) {
            bail!("{shown} has no loss in any of its {} lines", log.points.len());
        }
        Ok(log)
    }

    /// A last line without its end is one that is being written, and left out if it cannot be read.
    fn read(mut reader: impl BufRead) -> anyhow::Result<Self> {
        let mut log = Self::default();
        let mut before: Option<ProgressLine> = None;
        let mut text = Vec::new();
        for number in 1_u64.. {
            text.clear();
            reader.by_ref().take(MOST_BYTES_OF_A_LINE).read_until(b'\n', &mut text)?;
            if text.is_empty() {
                break;
            }
            let ended = text.ends_with(b"\n");
            if !ended && text.len() as u64 == MOST_BYTES_OF_A_LINE {
                bail!("line {number} has more than {MOST_BYTES_OF_A_LINE} bytes");
            }
            match serde_json::from_slice::<ProgressLine>(&text) {
                Ok(line) => {
                    log.push(&line, before.as_ref());
                    before = Some(line);
                }
                Err(_) if !ended && before.is_some() => break,
                Err(error) => {
                    // Each line is a text of its own for its reader.
                    let place = format!(" at line {} column {}", error.line(), error.column());
                    let error = error.to_string();
                    bail!("line {number}: {}", error.strip_suffix(&place).unwrap_or(&error));
                }
            }
        }
        if log.points.is_empty() {
            bail!("it has no lines");
        }
        Ok(log)
    }

    fn push(&mut self, line: &ProgressLine, before: Option<&ProgressLine>) {
        // The account of a task that goes on in another run begins anew.
        let before = before.filter(|before| before.interruptions <= line.interruptions);
        let more = |count: fn(&ProgressLine) -> u64| count(line).saturating_sub(before.map_or(0, count));
        let interruptions = more(|line| line.interruptions);
        self.interruptions = self.interruptions.saturating_add(interruptions);
        let cost_us = more(|line| line.interruption_cost_us);
        self.interruption_cost_us = self.interruption_cost_us.saturating_add(cost_us);
        self.points.push(Point { step: line.step, loss: line.loss, interrupted: interruptions > 0 });
    }
}

#[cfg(test)]
pub(super) fn line(step: u64, loss: Option<f64>, interruptions: u64) -> String {
    ProgressLine {
        at_us: step * 1000,
        step,
        loss,
        lr: 0.1,
        steps_per_s: 1000.0,
        samples_per_s: 8000.0,
        goodput: Some(1.0),
        interruptions,
        interruption_cost_us: interruptions * 500,
    }
    .to_json()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> anyhow::Result<Log> {
        Log::read(text.as_bytes())
    }

    #[test]
    fn interruptions_are_marked_where_they_became_more() {
        let text = [(10, 0), (20, 2), (30, 2), (40, 3)].map(|(step, count)| line(step, Some(0.5), count));
        let log = read(&text.concat()).unwrap();
        let marks: Vec<bool> = log.points.iter().map(|point| point.interrupted).collect();
        assert_eq!(marks, [false, true, false, true]);
        assert_eq!((log.interruptions, log.interruption_cost_us), (3, 1500));
        assert_eq!(log.points[3], Point { step: 40, loss: Some(0.5), interrupted: true });
    }

    #[test]
    fn another_run_counts_anew() {
        let text = [(10, 5), (20, 5), (20, 0), (30, 1)].map(|(step, count)| line(step, None, count));
        let log = read(&text.concat()).unwrap();
        let marks: Vec<bool> = log.points.iter().map(|point| point.interrupted).collect();
        assert_eq!(marks, [true, false, false, true]);
        assert_eq!((log.interruptions, log.interruption_cost_us), (6, 3000));
    }

    #[test]
    fn a_line_that_is_being_written_is_left_out() {
        let whole = line(10, Some(0.5), 0);
        let text = format!("{whole}{}", &whole[..30]);
        assert_eq!(read(&text).unwrap().points.len(), 1);
        // Complete but for its end.
        let text = format!("{whole}{}", whole.trim_end());
        assert_eq!(read(&text).unwrap().points.len(), 2);
    }

    #[test]
    fn what_is_no_log_is_told_with_its_line() {
        let good = line(10, Some(0.5), 0);
        for (text, says) in [
            (String::new(), "it has no lines"),
            ("hello".to_owned(), "line 1: expected value"),
            (format!("{good}hello\n{good}"), "line 2: expected value"),
            (format!("{good}{{\"step\": 1}}\n"), "line 2: missing field `at_us`"),
            (format!("{good}\n"), "line 2: EOF while parsing a value"),
            (good.replace("\"step\":10", "\"step\":-10"), "line 1: invalid value: integer `-10`"),
            (" ".repeat(5000), "line 1 has more than 4096 bytes"),
        ] {
            let error = format!("{:#}", read(&text).unwrap_err());
            assert!(error.contains(says) && !error.contains("column"), "{error}");
        }
    }

    #[test]
    fn files_that_cannot_be_drawn_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("task.jsonl");
        std::fs::write(&path, line(10, None, 0)).unwrap();
        let error = format!("{:#}", Log::open(&path).unwrap_err());
        assert!(error.contains("task.jsonl has no loss in any of its 1 lines"), "{error}");
        let error = format!("{:#}", Log::open(Path::new("/nowhere.jsonl")).unwrap_err());
        assert!(error.contains("cannot read /nowhere.jsonl"), "{error}");
        // A file without an end.
        let error = format!("{:#}", Log::open(Path::new("/dev/zero")).unwrap_err());
        assert!(error.contains("/dev/zero is no log of a task: line 1 has more than"), "{error}");
    }
}
