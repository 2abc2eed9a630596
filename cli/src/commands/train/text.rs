//! Training tasks for people.

use pswitch_controller::TaskStatus;
use pswitch_train::ProgressReport;

use super::super::text::{count, printable, seconds};

/// What a task came to when it was told something, in a line.
pub(super) fn told(task: &TaskStatus) -> String {
    let reason =
        if task.reason.is_empty() { String::new() } else { format!(": {}", printable(&task.reason)) };
    // None has one that was refused.
    let on = if task.device.is_empty() { String::new() } else { format!(" on {}", printable(&task.device)) };
    let mut text = format!("{} is {}{on}{reason}", printable(&task.name), task.state.name());
    if !task.checkpoint_error.is_empty() {
        text += &format!("; no checkpoint of its last steps: {}", printable(&task.checkpoint_error));
    }
    if !task.log.as_os_str().is_empty() {
        text += &format!("; its log is {}", task.log.display());
    }
    text + "\n"
}

/// A line for each task.
pub(super) fn table(tasks: &[TaskStatus]) -> String {
    let head = [
        "NAME",
        "STATE",
        "PLACE",
        "STEP",
        "LOSS",
        "STEPS/S",
        "SAMPLES/S",
        "GOODPUT",
        "INTERRUPTIONS",
        "TIME LOST",
    ]
    .map(str::to_owned);
    let rows = tasks.iter().map(|task| {
        let progress = &task.progress;
        [
            printable(&task.name),
            task.state.name().to_owned(),
            if task.state.is_over() { none() } else { task.residence.name().to_owned() },
            steps(task),
            progress.last_loss.map_or_else(none, |loss| format!("{loss:.6}")),
            format!("{:.2}", progress.steps_per_s),
            format!("{:.1}", progress.samples_per_s),
            progress.goodput.map_or_else(none, |share| format!("{:.1} %", share * 100.0)),
            progress.interruptions.to_string(),
            seconds(progress.interruption_cost_us()),
        ]
    });
    let rows: Vec<_> = std::iter::once(head).chain(rows).collect();
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..rows[0].len()).map(width).collect();
    let mut text = String::new();
    for row in &rows {
        let cells = row.iter().zip(&widths).enumerate().map(|(column, (cell, &width))| {
            // Words to the left, numbers to the right.
            if column < 3 { format!("{cell:<width$}") } else { format!("{cell:>width$}") }
        });
        text += cells.collect::<Vec<_>>().join("  ").trim_end();
        text.push('\n');
    }
    text
}

/// All that is known of a task, a line for each fact.
pub(super) fn facts(task: &TaskStatus) -> String {
    let progress = &task.progress;
    let mut facts = vec![("name", printable(&task.name)), ("state", task.state.name().to_owned())];
    if !task.reason.is_empty() {
        facts.push(("reason", printable(&task.reason)));
    }
    facts.extend([
        ("device", if task.device.is_empty() { none() } else { printable(&task.device) }),
        ("steps", steps(task)),
        ("loss", progress.last_loss.map_or_else(none, |loss| loss.to_string())),
        ("learning rate", task.learning_rate.map_or_else(none, |rate| rate.to_string())),
        ("speed", format!("{:.2} steps/s, {:.1} samples/s", progress.steps_per_s, progress.samples_per_s)),
        ("samples", progress.samples.to_string()),
        ("goodput", goodput(progress)),
        ("computed", format!("{} for steps that were kept", seconds(progress.computing_us))),
        ("discarded", format!("{} for steps that were thrown away", seconds(progress.discarded_us))),
        ("interruptions", interruptions(progress)),
        ("last yield", task.last_yield_us.map_or_else(none, yielded)),
        ("its state is", residence(task)),
        ("checkpoint", checkpoint(task)),
    ]);
    if !task.checkpoint_error.is_empty() {
        facts.push(("failed", printable(&task.checkpoint_error)));
    }
    if !task.log.as_os_str().is_empty() {
        facts.push(("log", task.log.display().to_string()));
    }
    facts.iter().map(|(name, fact)| format!("{name:<13}  {fact}\n")).collect()
}

fn yielded(us: u64) -> String {
    // Microseconds of one interruption.
    #[allow(clippy::cast_precision_loss)]
    let ms = us as f64 / 1e3;
    format!("{ms:.2} ms after the request")
}

fn residence(task: &TaskStatus) -> String {
    let place = if task.state.is_over() { "gone" } else { task.residence.name() };
    let times = count(usize::try_from(task.made_room).unwrap_or(usize::MAX), "time");
    format!("{place}, and made room {times}")
}

fn none() -> String {
    "-".to_owned()
}

fn steps(task: &TaskStatus) -> String {
    // The number is not known before the data have been read.
    let total = if task.total_steps == 0 { "?".to_owned() } else { task.total_steps.to_string() };
    format!("{}/{total}", task.steps_done)
}

fn goodput(progress: &ProgressReport) -> String {
    let computed = usize::try_from(progress.steps_computed).unwrap_or(usize::MAX);
    match progress.goodput {
        Some(share) => format!("{:.1} % of {} computed", share * 100.0, count(computed, "step")),
        None => "no step was computed".to_owned(),
    }
}

/// How many in all, how long they were, and the same for each reason.
fn interruptions(progress: &ProgressReport) -> String {
    let mut text = format!("{} in {}", progress.interruptions, seconds(progress.paused_us));
    for (reason, of) in &progress.by_reason {
        let reason = format!("{reason:?}").to_lowercase();
        text += &format!(", {reason} {} in {}", of.interruptions, seconds(of.paused_us));
    }
    text
}

fn checkpoint(task: &TaskStatus) -> String {
    match &task.checkpoint {
        Some(kept) => format!("{} of step {}", kept.path.display(), kept.step),
        None => "none".to_owned(),
    }
}

/// A task for tests.
#[cfg(test)]
pub(super) fn example() -> TaskStatus {
    let text = r#"{
        "name": "resnet18", "state": "waiting", "reason": "", "device": "cuda:0", "steps_done": 120,
        "total_steps": 1000, "learning_rate": 0.05,
        "progress": {
            "steps_done": 120, "steps_computed": 125, "goodput": 0.96, "steps_per_s": 12.5, "samples_per_s": 400.0,
            "samples": 3840, "last_loss": 1.25, "computing_us": 9600000, "discarded_us": 250000,
            "interruptions": 7, "paused_us": 1500000,
            "by_reason": {
                "request": {"interruptions": 6, "paused_us": 1400000},
                "turn": {"interruptions": 1, "paused_us": 100000}
            }
        },
        "checkpoint": {"step": 100, "path": "/kept/step-100.safetensors"}, "checkpoint_error": "", "last_yield_us": 850,
        "residence": "host", "made_room": 3,
        "log": "/logs/resnet18.jsonl"
    }"#;
    serde_json::from_str(text).unwrap()
}

#[cfg(test)]
mod tests {
    use pswitch_controller::TaskState;

    use super::*;

    #[test]
    fn tasks_stand_in_a_table() {
        let mut other = example();
        other.name = "a-longer-name".to_owned();
        other.state = TaskState::Preparing;
        (other.steps_done, other.total_steps) = (0, 0);
        (other.progress.last_loss, other.progress.goodput) = (None, None);
        let expected = "\
NAME           STATE      PLACE      STEP      LOSS  STEPS/S  SAMPLES/S  GOODPUT  INTERRUPTIONS  TIME LOST
resnet18       waiting    host   120/1000  1.250000    12.50      400.0   96.0 %              7     1.75 s
a-longer-name  preparing  host        0/?         -    12.50      400.0        -              7     1.75 s
";
        assert_eq!(table(&[example(), other]), expected);
        assert_eq!(table(&[]).lines().count(), 1);
    }

    #[test]
    fn every_fact_is_shown() {
        let expected = "\
name           resnet18
state          waiting
device         cuda:0
steps          120/1000
loss           1.25
learning rate  0.05
speed          12.50 steps/s, 400.0 samples/s
samples        3840
goodput        96.0 % of 125 steps computed
computed       9.60 s for steps that were kept
discarded      0.250 s for steps that were thrown away
interruptions  7 in 1.50 s, request 6 in 1.40 s, turn 1 in 0.100 s
last yield     0.85 ms after the request
its state is   host, and made room 3 times
checkpoint     /kept/step-100.safetensors of step 100
log            /logs/resnet18.jsonl
";
        assert_eq!(facts(&example()), expected);
        let mut failed = example();
        failed.state = TaskState::Failed;
        failed.reason = "the worker died\u{1b}[31m".to_owned();
        failed.checkpoint_error = "no space left".to_owned();
        let text = facts(&failed);
        assert!(
            text.contains("state          failed\nreason         the worker died\u{fffd}[31m\n"),
            "{text}"
        );
        assert!(text.contains("failed         no space left\n"), "{text}");
        assert!(text.contains("its state is   gone, and made room 3 times\n"), "{text}");
        let text = told(&failed);
        assert_eq!(
            text,
            "resnet18 is failed on cuda:0: the worker died\u{fffd}[31m; no checkpoint of its last steps: no space left; its log is \
             /logs/resnet18.jsonl\n"
        );
        // Refused before it had a device.
        (failed.device, failed.checkpoint_error, failed.log) = Default::default();
        assert_eq!(told(&failed), "resnet18 is failed: the worker died\u{fffd}[31m\n");
        assert!(facts(&failed).contains("device         -\n"));
    }
}
