//! What the processes of a server hold and do: memory, file descriptors and time, as the kernel counts them.

use std::collections::BTreeSet;
use std::fs;

use anyhow::Context as _;
use serde::Serialize;

use crate::machine::{field, kibibytes};

/// One process at one moment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Usage {
    pub(crate) pid: u32,
    pub(crate) name: String,
    /// All that is mapped and present; what several processes map counts in each.
    pub(crate) resident_bytes: u64,
    /// The part of it that no file or shared memory stands behind.
    pub(crate) anonymous_bytes: u64,
    pub(crate) descriptors: usize,
}

impl Usage {
    fn of(pid: u32) -> anyhow::Result<Self> {
        let gone = || format!("process {pid} cannot be looked at");
        let status = fs::read_to_string(format!("/proc/{pid}/status")).with_context(gone)?;
        let bytes = |name: &str| field(&status, name).as_deref().map_or(0, kibibytes);
        let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).with_context(gone)?.count();
        Ok(Self {
            pid,
            name: field(&status, "Name").unwrap_or_default(),
            resident_bytes: bytes("VmRSS"),
            anonymous_bytes: bytes("RssAnon"),
            descriptors,
        })
    }
}

/// This process, the zygote and its workers, in the order of their numbers.
pub(crate) fn of_server(zygote: u32) -> anyhow::Result<Vec<Usage>> {
    let mut pids: BTreeSet<u32> = children(zygote)?.into_iter().collect();
    pids.extend([std::process::id(), zygote]);
    pids.into_iter().map(Usage::of).collect()
}

/// The processes that a process has forked and that live.
pub(crate) fn children(parent: u32) -> anyhow::Result<Vec<u32>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").context("there is no /proc")? {
        let Some(pid) = entry?.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        // A process that has ended since it was listed is no child any more.
        let Ok(status) = fs::read_to_string(format!("/proc/{pid}/status")) else { continue };
        if field(&status, "PPid").and_then(|text| text.parse::<u32>().ok()) == Some(parent) {
            found.push(pid);
        }
    }
    Ok(found)
}

/// What a process computes at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Activity {
    pub(crate) pid: u32,
    /// Whether its first thread runs or wants to.
    pub(crate) running: bool,
    /// Time that all its threads have had a processor.
    pub(crate) processor_ns: u64,
}

/// Of those processes that live, in the same order.
pub(crate) fn activities(pids: &[u32]) -> Vec<Activity> {
    pids.iter().filter_map(|&pid| activity(pid)).collect()
}

fn activity(pid: u32) -> Option<Activity> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // A name may hold anything but ends at the last parenthesis.
    let running = stat.rsplit_once(')')?.1.trim_start().starts_with('R');
    let mut processor_ns = 0;
    for thread in fs::read_dir(format!("/proc/{pid}/task")).ok()? {
        // A thread that has just ended had no part in what goes on now.
        let Ok(text) = fs::read_to_string(thread.ok()?.path().join("schedstat")) else { continue };
        processor_ns += text.split_whitespace().next()?.parse::<u64>().ok()?;
    }
    Some(Activity { pid, running, processor_ns })
}

/// The one that computes: it runs, or has computed most since before; `None` if none does either.
///
/// The kernel counts the time of a thread that runs only every few milliseconds.
pub(crate) fn busiest(before: &[Activity], now: &[Activity]) -> Option<u32> {
    let gained = |now: &Activity| {
        let before = before.iter().find(|before| before.pid == now.pid);
        now.processor_ns.saturating_sub(before.map_or(0, |before| before.processor_ns))
    };
    let ranked = now.iter().map(|now| (now.running, gained(now), now.pid));
    ranked.filter(|&(running, gained, _)| running || gained > 0).max().map(|(.., pid)| pid)
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn this_process_holds_memory_and_descriptors() {
        let own = Usage::of(std::process::id()).unwrap();
        assert!(own.resident_bytes > own.anonymous_bytes && own.anonymous_bytes > 0, "{own:?}");
        assert!(own.descriptors >= 3, "{own:?}");
    }

    #[test]
    fn children_are_found_while_they_live() {
        let mut child = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        assert!(children(std::process::id()).unwrap().contains(&child.id()));
        drop(child.stdin.take());
        child.wait().unwrap();
        assert!(!children(std::process::id()).unwrap().contains(&child.id()));
    }
    #[test]
    fn a_process_that_computes_is_busy() {
        let mut idle = Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        // Not this process: threads of other tests end meanwhile, and take their time with them.
        let mut busy = Command::new("sh").args(["-c", "while :; do :; done"]).spawn().unwrap();
        let pids = [idle.id(), busy.id()];
        // Once it has answered it is started, and sleeps as soon as it waits for more.
        idle.stdin.as_mut().unwrap().write_all(b"!").unwrap();
        idle.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
        while activities(&[idle.id()])[0].running {
            std::thread::yield_now();
        }
        let before = activities(&pids);
        std::thread::sleep(std::time::Duration::from_millis(50));
        let now = activities(&pids);
        busy.kill().unwrap();
        busy.wait().unwrap();
        drop(idle.stdin.take());
        idle.wait().unwrap();
        assert_eq!(busiest(&before, &now), Some(busy.id()), "{before:?} {now:?}");
        assert_eq!(activities(&[idle.id()]), []);
    }

    #[test]
    fn one_that_runs_is_busier_than_one_that_ran() {
        let one = |pid, running, processor_ns| Activity { pid, running, processor_ns };
        let before = [one(1, false, 100), one(2, true, 100)];
        assert_eq!(busiest(&before, &[one(1, false, 200), one(2, true, 100)]), Some(2));
        assert_eq!(busiest(&before, &[one(1, false, 200), one(2, false, 300)]), Some(2));
        assert_eq!(busiest(&before, &[one(1, false, 100), one(2, false, 100)]), None);
    }
}
