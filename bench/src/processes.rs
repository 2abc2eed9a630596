//! What the processes of a server hold: memory and file descriptors, as the kernel counts them.

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

#[cfg(test)]
mod tests {
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
}
