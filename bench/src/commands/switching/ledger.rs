//! Memory of a GPU as the server accounts for it, beside what the driver says is in use.

use pswitch_controller::ServiceSnapshot;
use pswitch_device::{DeviceId, LinkThrottle, open_device};
use serde::Serialize;

use super::megabytes;
use crate::report::{Goal, Table};

/// A GPU before the server starts.
#[derive(Debug, Clone, Copy)]
pub(super) struct Baseline {
    total_bytes: u64,
    /// With the context of this process, which will be the server's, and whatever others have.
    used_bytes: u64,
}

impl Baseline {
    /// None of the host. Makes the context of this process: call it when what is to be forked has been forked.
    pub(super) fn of(device: DeviceId) -> anyhow::Result<Option<Self>> {
        if matches!(device, DeviceId::Host(_)) {
            return Ok(None);
        }
        let device = open_device(device, LinkThrottle::default())?;
        let total_bytes = device.properties().total_memory_bytes;
        Ok(Some(Self { total_bytes, used_bytes: total_bytes.saturating_sub(device.free_bytes()?) }))
    }
}

/// What the numbers of one moment say of the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
struct Moment {
    device_free_bytes: u64,
    outside_bytes: u64,
    outside_allocations: u64,
    graphs: u64,
}

/// Both accounts.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(super) struct Ledger {
    total_bytes: u64,
    used_before_bytes: u64,
    pool_bytes: u64,
    workers: u64,
    after_100: Moment,
    at_the_end: Moment,
    used_bytes: u64,
    /// What no account of the server explains: contexts of the workers and the server, and what others have.
    unexplained_bytes: i64,
    /// The same for each worker, without what was in use before.
    each_worker_bytes: i64,
}

impl Moment {
    fn of(snapshot: &ServiceSnapshot) -> Self {
        let &ServiceSnapshot { device_free_bytes, outside_bytes, outside_allocations, graphs, .. } = snapshot;
        Self { device_free_bytes, outside_bytes, outside_allocations, graphs }
    }
}

impl Ledger {
    pub(super) fn new(
        baseline: Baseline,
        settled: &ServiceSnapshot,
        end: &ServiceSnapshot,
        workers: u64,
    ) -> Self {
        let (after_100, at_the_end) = (Moment::of(settled), Moment::of(end));
        let used_bytes = baseline.total_bytes.saturating_sub(end.device_free_bytes);
        let explained = end.pool_bytes.saturating_add(end.outside_bytes);
        // A device has far fewer bytes than half of what 64 bits count.
        let less = |more: u64, less: u64| more.cast_signed().wrapping_sub(less.cast_signed());
        let unexplained_bytes = less(used_bytes, explained);
        let without_before = less(used_bytes, explained.saturating_add(baseline.used_bytes));
        Self {
            total_bytes: baseline.total_bytes,
            used_before_bytes: baseline.used_bytes,
            pool_bytes: end.pool_bytes,
            workers,
            after_100,
            at_the_end,
            used_bytes,
            unexplained_bytes,
            each_worker_bytes: without_before / workers.max(1).cast_signed(),
        }
    }

    pub(super) fn goals(&self) -> Vec<Goal> {
        let Self { after_100: before, at_the_end: end, .. } = self;
        // Sizes and counts far below what a float holds exactly.
        #[allow(clippy::cast_precision_loss)]
        let more = |end: u64, before: u64| end.saturating_sub(before) as f64;
        vec![
            Goal::at_most(
                "allocations of device memory outside of the pool after the first 100 requests",
                0.0,
                "",
                more(end.outside_allocations, before.outside_allocations),
            ),
            Goal::at_most(
                "device memory that is free no more after the first 100 requests",
                0.0,
                "bytes",
                more(before.device_free_bytes, end.device_free_bytes),
            ),
            Goal::at_most(
                "graphs captured after the first 100 requests",
                0.0,
                "",
                more(end.graphs, before.graphs),
            ),
        ]
    }

    /// What changed while requests came, and where the device's memory is at the end.
    pub(super) fn tables(&self) -> [Table; 2] {
        let mut changes = Table::new(["device", "after 100", "at the end"]);
        let mut change = |name: &str, cell: &dyn Fn(&Moment) -> String| {
            changes.push([name.to_owned(), cell(&self.after_100), cell(&self.at_the_end)]);
        };
        change("free MB", &|moment| megabytes(moment.device_free_bytes));
        change("outside of the pool MB", &|moment| megabytes(moment.outside_bytes));
        change("allocations outside of the pool", &|moment| moment.outside_allocations.to_string());
        change("graphs", &|moment| moment.graphs.to_string());

        let workers = self.workers;
        let mut accounts = Table::new(["MB of the device", "ledger", "driver"]);
        let dash = || "-".to_owned();
        accounts.push(["the pool".to_owned(), megabytes(self.pool_bytes), dash()]);
        accounts.push([
            format!("outside of the pool, libtorch in {workers} workers"),
            megabytes(self.at_the_end.outside_bytes),
            dash(),
        ]);
        let explained = self.pool_bytes.saturating_add(self.at_the_end.outside_bytes);
        accounts.push(["in use in all".to_owned(), megabytes(explained), megabytes(self.used_bytes)]);
        accounts.push([
            format!("the difference: contexts of {workers} workers and the server, and of others"),
            dash(),
            signed(self.unexplained_bytes),
        ]);
        accounts.push([
            "in use before the server started, with its context".to_owned(),
            dash(),
            megabytes(self.used_before_bytes),
        ]);
        accounts.push([
            "the difference without that, for each worker".to_owned(),
            dash(),
            signed(self.each_worker_bytes),
        ]);
        [changes, accounts]
    }
}

/// As [`megabytes`], of what may be less than nothing.
fn signed(bytes: i64) -> String {
    let sign = if bytes < 0 { "-" } else { "" };
    format!("{sign}{}", megabytes(bytes.unsigned_abs()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MB: u64 = 1_000_000;

    fn snapshot(device_free_bytes: u64, outside_allocations: u64) -> ServiceSnapshot {
        ServiceSnapshot {
            pool_bytes: 2_000 * MB,
            device_free_bytes,
            outside_bytes: 100 * MB,
            outside_allocations,
            graphs: 8,
            ..ServiceSnapshot::default()
        }
    }

    fn ledger(end: &ServiceSnapshot) -> Ledger {
        let baseline = Baseline { total_bytes: 10_000 * MB, used_bytes: 600 * MB };
        Ledger::new(baseline, &snapshot(6_300 * MB, 40), end, 2)
    }

    #[test]
    fn the_host_has_no_such_account() {
        assert!(Baseline::of(DeviceId::Host(0)).unwrap().is_none());
    }

    #[test]
    fn what_the_ledger_does_not_explain_are_contexts() {
        let ledger = ledger(&snapshot(6_300 * MB, 40));
        assert_eq!(ledger.used_bytes, 3_700 * MB);
        assert_eq!((ledger.unexplained_bytes, ledger.each_worker_bytes), (1_600_000_000, 500_000_000));
        let [changes, accounts] = ledger.tables();
        assert!(
            changes.to_string().contains("free MB                             6300.0      6300.0"),
            "{changes}"
        );
        let text = accounts.to_string();
        assert!(text.contains("in use in all") && text.contains("2100.0  3700.0"), "{text}");
        assert!(text.ends_with("500.0\n"), "{text}");
        assert!(ledger.goals().iter().all(|goal| goal.to_string().ends_with(": met")));
    }

    #[test]
    fn every_byte_counts() {
        let ledger = ledger(&snapshot(6_300 * MB - 512, 41));
        let texts: Vec<String> = ledger.goals().iter().map(ToString::to_string).collect();
        assert_eq!(
            texts,
            [
                "allocations of device memory outside of the pool after the first 100 requests: 1 (asked: at most 0): \
                 MISSED",
                "device memory that is free no more after the first 100 requests: 512 bytes (asked: at most 0 bytes): \
                 MISSED",
                "graphs captured after the first 100 requests: 0 (asked: at most 0): met",
            ]
        );
        assert_eq!(signed(-1_500_000), "-1.5");
    }
}
