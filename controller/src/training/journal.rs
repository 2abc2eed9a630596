//! Lines of progress, written by a thread of its own: a disk that hangs holds nobody else up.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use pswitch_train::ProgressLine;

/// Lines that wait to be written; with so many the next are lost.
const MOST_WAITING: usize = 4096;

/// As a line begins, and more than it can have.
const LINE_START: &[u8] = b"{\"at_us\":";
const LONGEST_LINE: u64 = 4096;

/// How long it is waited for the last lines of a file, unless the disk hangs already.
const PATIENCE: Duration = Duration::from_millis(200);

/// Appends lines to files, in the order in which they come.
pub(super) struct Journal {
    orders: mpsc::SyncSender<Order>,
    /// Lines are being lost, which was said.
    is_behind: bool,
    /// Files to be closed for which there was no room among the orders, and how many of the others are not yet.
    to_close: Vec<PathBuf>,
    closing: usize,
    closed: mpsc::Receiver<()>,
    /// It was waited for a file in vain.
    hangs: bool,
}

enum Order {
    Line { file: PathBuf, line: String },
    Close { file: PathBuf },
}

/// A file that lines go to.
#[derive(Default)]
struct Page {
    file: Option<File>,
    /// The last line could not be written, which was said.
    has_failed: bool,
}

impl Journal {
    pub(super) fn start(device: &str) -> io::Result<Self> {
        let (orders, received) = mpsc::sync_channel(MOST_WAITING);
        let (done, closed) = mpsc::channel();
        let name = format!("pswitch-journal-{device}");
        std::thread::Builder::new().name(name).spawn(move || write_all(&received, &done))?;
        Ok(Self { orders, is_behind: false, to_close: Vec::new(), closing: 0, closed, hangs: false })
    }

    /// Has a line written, if not too many wait.
    pub(super) fn write(&mut self, file: &Path, line: String) {
        self.order_closes();
        let sent = self.orders.try_send(Order::Line { file: file.to_owned(), line });
        if sent.is_err() && !self.is_behind {
            let file = file.display();
            tracing::warn!(%file, "lines of progress are lost: those before are not written yet");
        }
        self.is_behind = sent.is_err();
    }

    /// No line comes any more. Those that came are written then, unless that takes long. None have come for an empty path.
    pub(super) fn close(&mut self, file: &Path) {
        if file.as_os_str().is_empty() {
            return;
        }
        self.to_close.push(file.to_owned());
        self.order_closes();
        let until = Instant::now() + if self.hangs { Duration::ZERO } else { PATIENCE };
        while self.closing > 0
            && self.closed.recv_timeout(until.saturating_duration_since(Instant::now())).is_ok()
        {
            self.closing -= 1;
        }
        self.hangs = self.closing > 0 || !self.to_close.is_empty();
    }

    fn order_closes(&mut self) {
        while let Some(file) = self.to_close.pop() {
            match self.orders.try_send(Order::Close { file }) {
                Ok(()) => self.closing += 1,
                Err(mpsc::TrySendError::Full(Order::Close { file })) => return self.to_close.push(file),
                // Its thread is gone, and its files with it.
                Err(_) => {}
            }
        }
    }
}

fn write_all(orders: &mpsc::Receiver<Order>, closed: &mpsc::Sender<()>) {
    let mut pages: BTreeMap<PathBuf, Page> = BTreeMap::new();
    for order in orders {
        match order {
            Order::Line { file, line } => {
                let page = pages.entry(file.clone()).or_default();
                let written = page.append(&file, &line);
                if let Err(error) = &written
                    && !page.has_failed
                {
                    // Once, and not for each line.
                    let file = file.display();
                    tracing::warn!(%file, %error, "no lines of progress until it can be written");
                }
                page.has_failed = written.is_err();
            }
            Order::Close { file } => {
                pages.remove(&file);
                let _ = closed.send(());
            }
        }
    }
}

impl Page {
    fn append(&mut self, path: &Path, line: &str) -> io::Result<()> {
        // Somebody may have removed it.
        let file = self.file.take().filter(|file| file.metadata().is_ok_and(|found| found.nlink() > 0));
        let mut file = match file {
            Some(file) => file,
            None => {
                path.parent().map_or(Ok(()), std::fs::create_dir_all)?;
                if path.is_file() {
                    mend(path)?;
                }
                OpenOptions::new().create(true).append(true).open(path)?
            }
        };
        // After an error it is opened anew, and a part of a line taken back.
        file.write_all(line.as_bytes())?;
        self.file = Some(file);
        Ok(())
    }
}

/// Sees to it that a line begins behind what is there. A part of one of ours is taken back: the disk was full, or the machine died.
fn mend(path: &Path) -> io::Result<()> {
    let mut file = OpenOptions::new().read(true).append(true).open(path)?;
    let bytes = file.metadata()?.len();
    let start = bytes.saturating_sub(LONGEST_LINE);
    file.seek(SeekFrom::Start(start))?;
    let mut end = Vec::new();
    (&mut file).take(LONGEST_LINE).read_to_end(&mut end)?;
    let rest = match end.iter().rposition(|&byte| byte == b'\n') {
        Some(newline) => &end[newline + 1..],
        None => &end,
    };
    let is_ours = rest.starts_with(LINE_START) || LINE_START.starts_with(rest);
    if rest.is_empty() {
        Ok(())
    } else if is_ours && serde_json::from_slice::<ProgressLine>(rest).is_err() {
        file.set_len(bytes - rest.len() as u64)
    } else {
        file.write_all(b"\n")
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use pswitch_train::Progress;

    use super::*;

    #[test]
    fn lines_are_there_when_their_file_is_closed() {
        let place = tempfile::tempdir().unwrap();
        let files = ["a/one", "b/two"].map(|name| place.path().join(name));
        let mut journal = Journal::start("test").unwrap();
        for round in 0..2 {
            for number in 0..100 {
                files.iter().for_each(|file| journal.write(file, format!("{number}\n")));
            }
            for file in &files {
                journal.close(file);
                assert_eq!(fs::read_to_string(file).unwrap().lines().count(), 100 * (round + 1));
            }
        }
    }

    #[test]
    fn lines_are_whole_whatever_was_there_before() {
        let place = tempfile::tempdir().unwrap();
        let file = place.path().join("log");
        let mut journal = Journal::start("test").unwrap();
        let whole = Progress::new(0, Duration::ZERO, Duration::ZERO).line(Duration::ZERO, 0.1).to_json();
        let (torn, long) = (whole[..whole.len() / 2].to_owned(), "x".repeat(10_000));
        for (before, after) in [
            (String::new(), "new\n".to_owned()),
            (whole.clone(), format!("{whole}new\n")),
            (format!("{whole}{torn}"), format!("{whole}new\n")),
            (format!("{whole}{{\"a"), format!("{whole}new\n")),
            (torn.clone(), "new\n".to_owned()),
            // Without its end only.
            (whole.trim_end().to_owned(), format!("{whole}new\n")),
            // Somebody else's.
            (format!("{whole}{long}"), format!("{whole}{long}\nnew\n")),
            ("a note".to_owned(), "a note\nnew\n".to_owned()),
        ] {
            fs::write(&file, before).unwrap();
            journal.write(&file, "new\n".to_owned());
            journal.close(&file);
            assert_eq!(fs::read_to_string(&file).unwrap(), after);
        }
        // It comes back.
        journal.write(&file, "lost\n".to_owned());
        let deadline = Instant::now() + Duration::from_secs(20);
        while !fs::read_to_string(&file).unwrap().ends_with("lost\n") && Instant::now() < deadline {
            std::thread::yield_now();
        }
        fs::remove_file(&file).unwrap();
        journal.write(&file, "kept\n".to_owned());
        journal.close(&file);
        assert_eq!(fs::read_to_string(&file).unwrap(), "kept\n");
    }

    #[test]
    fn a_file_that_cannot_be_written_holds_nobody_up() {
        let place = tempfile::tempdir().unwrap();
        let (stuck, blocked) = (place.path().join("fifo"), place.path().join("file"));
        let mut journal = Journal::start("test").unwrap();
        fs::write(&blocked, "").unwrap();
        let good = place.path().join("good");
        for file in [&blocked.join("log"), &good] {
            journal.write(file, "line\n".to_owned());
            journal.close(file);
        }
        assert_eq!(fs::read_to_string(&good).unwrap(), "line\n");
        // Nobody ever reads it: to open it takes for ever.
        nix::unistd::mkfifo(&stuck, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let begun = Instant::now();
        for _ in 0..2 * MOST_WAITING {
            journal.write(&stuck, "line\n".to_owned());
        }
        for _ in 0..200 {
            journal.close(&stuck);
        }
        assert!(begun.elapsed() < Duration::from_secs(20) && journal.is_behind);
        // Somebody reads it.
        let reader = std::thread::spawn({
            let stuck = stuck.clone();
            move || std::io::copy(&mut File::open(stuck).unwrap(), &mut std::io::sink()).unwrap()
        });
        while journal.hangs {
            journal.close(&good);
        }
        // All is closed, or it would read for ever.
        assert!(reader.join().unwrap() > 0);
        journal.write(&good, "last\n".to_owned());
        journal.close(&good);
        assert_eq!(fs::read_to_string(&good).unwrap(), "line\nlast\n");
    }
}
