//! Where and of what a result was made.

use std::fs;
use std::time::{SystemTime, UNIX_EPOCH};

use pswitch_device::{DeviceId, DeviceProperties, cuda_devices};
use serde::Serialize;

/// Facts that a result means nothing without.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Machine {
    /// The processor's name.
    pub cpu: String,
    /// Cores that this process may use.
    pub cores: usize,
    /// All the memory that there is.
    pub memory_bytes: u64,
    /// The kernel's release.
    pub kernel: String,
    /// Version of libtorch.
    pub torch: &'static str,
    /// Commit that was built; `-dirty` if tracked files differed from it.
    pub commit: &'static str,
    /// Whether the compiler optimised.
    pub build: &'static str,
    /// When it was measured, in UTC.
    pub date: String,
    /// Processes that ran or wanted to in the minute before: more than the cores have to spare spoils times.
    pub load_average: f64,
    /// The GPU that was measured, where one was.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gpu: Option<Gpu>,
}

/// The GPU that a result was measured on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Gpu {
    /// Its maker's name for it.
    pub name: String,
    /// All the memory that it has.
    pub memory_bytes: u64,
    /// Version of the kernel driver, where the system tells.
    pub driver: Option<String>,
    /// Version of CUDA that the driver supports.
    pub cuda: String,
    /// Speed and width of its link, where the system tells.
    pub pci_link: Option<String>,
}

impl Machine {
    /// This one, now, without a GPU.
    pub fn here() -> Self {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self {
            cpu: field(&read("/proc/cpuinfo"), "model name").unwrap_or_else(|| "unknown".to_owned()),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            memory_bytes: field(&read("/proc/meminfo"), "MemTotal").as_deref().map_or(0, kibibytes),
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            torch: env!("PSWITCH_BENCH_TORCH"),
            commit: env!("PSWITCH_BENCH_COMMIT"),
            build: if cfg!(debug_assertions) { "debug" } else { "release" },
            date: utc(since.as_secs()),
            load_average: read("/proc/loadavg")
                .split_whitespace()
                .next()
                .and_then(|text| text.parse().ok())
                .unwrap_or(0.0),
            gpu: None,
        }
    }

    /// What a reader has to know before the numbers.
    pub(crate) fn line(&self) -> String {
        let Self { cpu, cores, torch, commit, build, date, load_average, .. } = self;
        let gpu = self.gpu.as_ref().map(|gpu| format!("{}; ", gpu.line())).unwrap_or_default();
        format!(
            "{gpu}{cpu}, {cores} cores, load {load_average}; libtorch {torch}, commit {commit}, {build} build; {date}"
        )
    }
}

impl Gpu {
    /// None of a device that is no GPU.
    fn of(device: DeviceProperties) -> Option<Self> {
        let gpu = device.gpu?;
        Some(Self {
            name: device.name,
            memory_bytes: device.total_memory_bytes,
            driver: gpu.driver_version,
            cuda: format!("{}.{}", gpu.cuda_version.0, gpu.cuda_version.1),
            pci_link: gpu.pci_link,
        })
    }

    fn line(&self) -> String {
        let Self { name, driver, cuda, pci_link, .. } = self;
        let or_unknown = |text: &Option<String>| text.clone().unwrap_or_else(|| "unknown".to_owned());
        format!("{name}, driver {}, CUDA {cuda}, link {}", or_unknown(driver), or_unknown(pci_link))
    }
}

/// What a device is as a GPU; `None` of the host, and of a GPU that is not there.
pub(crate) fn gpu(device: DeviceId) -> Option<Gpu> {
    match device {
        DeviceId::Host(_) => None,
        DeviceId::Cuda(_) => {
            cuda_devices().ok()?.into_iter().find(|found| found.id == device).and_then(Gpu::of)
        }
    }
}

/// The value of a line `NAME: VALUE` of one of the kernel's files.
pub(crate) fn field(text: &str, name: &str) -> Option<String> {
    text.lines().find_map(|line| {
        let (found, value) = line.split_once(':')?;
        (found.trim() == name).then(|| value.trim().to_owned())
    })
}

/// The bytes in `123 kB`; 0 if that is no such text.
pub(crate) fn kibibytes(text: &str) -> u64 {
    let number = text.split_whitespace().next().and_then(|number| number.parse::<u64>().ok());
    number.unwrap_or(0) * 1024
}

/// Seconds since 1970 as `2026-01-31T12:00:00Z`.
fn utc(seconds: u64) -> String {
    let (days, of_day) = (seconds / 86_400, seconds % 86_400);
    // Years that begin in March put the leap day last; 400 of them have 146,097 days. Day 0 is the 1st of March 0.
    let days = days + 719_468;
    let (era, of_era) = (days / 146_097, days % 146_097);
    let year = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let month_from_march = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = era * 400 + year + u64::from(month <= 2);
    let (hour, minute, second) = (of_day / 3600, of_day / 60 % 60, of_day % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        for (seconds, date) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_709_164_800, "2024-02-29T00:00:00Z"),
            (1_735_689_599, "2024-12-31T23:59:59Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
        ] {
            assert_eq!(utc(seconds), date);
        }
    }

    #[test]
    fn fields_of_the_kernel_are_found_by_their_whole_name() {
        let text = "processor\t: 0\nmodel name\t: Some CPU @ 2.00GHz\nmodel\t\t: 85\nVmRSS:\t  12 kB\n";
        assert_eq!(field(text, "model name").as_deref(), Some("Some CPU @ 2.00GHz"));
        assert_eq!(field(text, "model").as_deref(), Some("85"));
        assert_eq!(field(text, "VmRSS").as_deref().map(kibibytes), Some(12 * 1024));
        assert_eq!(field(text, "VmR"), None);
    }

    #[test]
    fn this_machine_has_cores_and_a_kernel() {
        let here = Machine::here();
        assert!(here.cores > 0 && here.memory_bytes > 0 && !here.kernel.is_empty(), "{here:?}");
        assert!(here.torch.starts_with(|c: char| c.is_ascii_digit()), "{here:?}");
    }

    #[test]
    fn a_gpu_leads_the_line_and_the_host_is_none() {
        assert_eq!(gpu(DeviceId::Host(0)), None);
        let gpu = Gpu {
            name: "NVIDIA H200".to_owned(),
            memory_bytes: 1,
            driver: None,
            cuda: "13.0".to_owned(),
            pci_link: Some("32.0 GT/s PCIe x16".to_owned()),
        };
        let line = Machine { gpu: Some(gpu), ..Machine::here() }.line();
        let expected = "NVIDIA H200, driver unknown, CUDA 13.0, link 32.0 GT/s PCIe x16; ";
        assert!(line.starts_with(expected), "{line}");
    }
}
