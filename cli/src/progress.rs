//! What `serve` shows while models are loaded: one bar of bytes, and a line for what people want to know.

use std::io::{self, IsTerminal as _, Write};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use indicatif::{HumanBytes, ProgressBar, ProgressDrawTarget, ProgressStyle};
use pswitch_controller::{LoadEvent, LoadObserver};

/// Progress of loading, on a terminal as a bar, elsewhere as lines.
#[derive(Clone)]
pub(crate) struct Progress {
    bar: ProgressBar,
    state: Arc<Mutex<State>>,
}

struct State {
    begin: Instant,
    total_bytes: u64,
    models: usize,
    ready: usize,
    unavailable: usize,
    /// Whether all models were loaded once: those that come later are not counted.
    finished: bool,
}

impl Progress {
    pub(crate) fn new() -> Self {
        let target = if io::stderr().is_terminal() {
            ProgressDrawTarget::stderr()
        } else {
            ProgressDrawTarget::hidden()
        };
        let bar = ProgressBar::with_draw_target(Some(0), target);
        let style = ProgressStyle::with_template("{bar:32} {bytes}/{total_bytes} {bytes_per_sec}  {msg}");
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        let begin = Instant::now();
        let state = State { begin, total_bytes: 0, models: 0, ready: 0, unavailable: 0, finished: false };
        Self { bar, state: Arc::new(Mutex::new(state)) }
    }

    pub(crate) fn observer(&self) -> LoadObserver {
        let progress = self.clone();
        Arc::new(move |event| progress.show(event))
    }

    /// A writer for log lines that leaves the bar whole.
    pub(crate) fn log_writer(&self) -> LogWriter {
        LogWriter { bar: self.bar.clone(), drawn_by: std::process::id() }
    }

    /// Takes the bar away and says what there is.
    pub(crate) fn finish(&self, address: &str) {
        self.bar.finish_and_clear();
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.finished = true;
        let failed = match state.unavailable {
            0 => String::new(),
            failed => format!(", {failed} unavailable"),
        };
        self.line(&format!(
            "{} models ready in {:.1} s{failed}; serving on http://{address}",
            state.ready,
            state.begin.elapsed().as_secs_f64()
        ));
    }

    fn show(&self, event: LoadEvent) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        match event {
            LoadEvent::Found { models } => {
                state.models = models;
                self.bar.set_message(format!("reading {models} models"));
            }
            LoadEvent::Opened { model, span_bytes } => {
                state.total_bytes += span_bytes;
                self.bar.set_length(state.total_bytes);
                self.bar.set_message(format!("read {model}"));
            }
            LoadEvent::Copied { model, bytes } => {
                self.bar.inc(bytes);
                self.bar.set_message(format!("pinning {model}"));
            }
            LoadEvent::Building { model } => self.bar.set_message(format!("building {model}")),
            LoadEvent::Profiling { model } => self.bar.set_message(format!("timing {model}")),
            LoadEvent::Ready { model, groups } if state.finished => {
                self.line(&format!("{model} is ready ({groups} groups)"));
            }
            LoadEvent::Ready { model, groups } => {
                state.ready += 1;
                let (ready, models) = (state.ready, state.models);
                self.line(&format!("[{ready}/{models}] {model} is ready ({groups} groups)"));
            }
            LoadEvent::Unavailable { model, reason } => {
                state.unavailable += 1;
                self.line(&format!("{model} is not available: {reason}"));
            }
        }
    }

    fn line(&self, text: &str) {
        self.bar.suspend(|| {
            // Whoever closed standard error does not want to read it.
            let _ = writeln!(io::stderr(), "{text}");
        });
    }

    /// Says how large the pools are.
    pub(crate) fn pools(&self, pool_bytes: &[u64]) {
        let sizes: Vec<String> = pool_bytes.iter().map(|&bytes| HumanBytes(bytes).to_string()).collect();
        self.line(&format!("pool: {}", sizes.join(", ")));
    }
}

/// Writes log lines to standard error, past the bar.
#[derive(Clone)]
pub(crate) struct LogWriter {
    bar: ProgressBar,
    /// The process that draws the bar; those forked from it have but a copy that stands still.
    drawn_by: u32,
}

impl Write for LogWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if std::process::id() == self.drawn_by {
            self.bar.suspend(|| io::stderr().write(bytes))
        } else {
            io::stderr().write(bytes)
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}
