//! Processes as /proc shows them.

use std::fs;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::eventually;

/// A process, told apart from a later one of the same number by its start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Process {
    pub(crate) pid: i32,
    pub(crate) name: String,
    started: u64,
}

struct Stat {
    process: Process,
    state: String,
    parent: i32,
}

impl Stat {
    fn of(pid: i32) -> Option<Self> {
        let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // A name may hold anything but ends at the last parenthesis.
        let (begin, rest) = text.rsplit_once(')')?;
        let name = begin.split_once('(')?.1.to_owned();
        let fields: Vec<&str> = rest.split_whitespace().collect();
        let started = fields.get(19)?.parse().ok()?;
        let parent = fields.get(1)?.parse().ok()?;
        Some(Self { process: Process { pid, name, started }, state: fields[0].to_owned(), parent })
    }

    fn is_alive(&self) -> bool {
        !matches!(self.state.as_str(), "Z" | "X" | "x")
    }
}

/// The children of a process that live, by number.
pub(crate) fn children(parent: i32) -> Vec<Process> {
    let pids =
        fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    let mut found: Vec<Process> = pids
        .filter_map(Stat::of)
        .filter(|stat| stat.parent == parent && stat.is_alive())
        .map(|stat| stat.process)
        .collect();
    found.sort_by_key(|process| process.pid);
    found
}

/// Waits until none of these processes lives.
#[track_caller]
pub(crate) fn await_end(processes: &[Process]) {
    eventually("all processes end", || {
        let left: Vec<_> = processes.iter().filter(|process| process.is_alive()).collect();
        if left.is_empty() { Ok(()) } else { Err(format!("{left:?} live")) }
    });
}

impl Process {
    pub(crate) fn of(pid: i32) -> Self {
        Stat::of(pid).unwrap_or_else(|| panic!("there is no process {pid}")).process
    }

    /// Whether it has neither ended nor been replaced by another of its number.
    pub(crate) fn is_alive(&self) -> bool {
        Stat::of(self.pid).is_some_and(|stat| stat.process.started == self.started && stat.is_alive())
    }

    /// Sends a signal; false if it has ended.
    pub(crate) fn signal(&self, signal: Signal) -> bool {
        self.is_alive() && kill(Pid::from_raw(self.pid), signal).is_ok()
    }

    /// Resident memory, counted page by page: the sums in `status` lag behind.
    pub(crate) fn resident_bytes(&self) -> u64 {
        let text = fs::read_to_string(format!("/proc/{}/smaps_rollup", self.pid)).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix("Rss:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
    }

    /// What its descriptors point at, sorted; numbers are left out, so that one socket is like another.
    pub(crate) fn descriptors(&self) -> Vec<String> {
        let entries = fs::read_dir(format!("/proc/{}/fd", self.pid)).unwrap();
        let targets = entries.filter_map(|entry| fs::read_link(entry.ok()?.path()).ok());
        let kind = |target: &str| target.replace(|c: char| c.is_ascii_digit(), "");
        let mut targets: Vec<String> = targets.map(|target| kind(&target.to_string_lossy())).collect();
        targets.sort();
        targets
    }

    /// Files that it has mapped.
    pub(crate) fn maps(&self) -> String {
        fs::read_to_string(format!("/proc/{}/maps", self.pid)).unwrap()
    }

    /// Whether its main thread sleeps in a futex, as a worker does that waits for weights; one without work sleeps in
    /// its socket.
    pub(crate) fn waits_at_a_doorbell(&self) -> bool {
        let path = format!("/proc/{}/syscall", self.pid);
        match fs::read_to_string(&path) {
            Ok(text) => text.split_whitespace().next() == Some(&nix::libc::SYS_futex.to_string()),
            // It has ended in the meantime.
            Err(error) if !self.is_alive() => {
                assert_ne!(error.kind(), std::io::ErrorKind::PermissionDenied, "{path}: {error}");
                false
            }
            Err(error) => panic!("{path}: {error}"),
        }
    }
}
