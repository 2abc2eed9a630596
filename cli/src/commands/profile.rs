//! `pswitch profile`.

use std::path::Path;

use anyhow::Context as _;
use pswitch_controller::{DeviceProfile, profile_yaml};
use pswitch_transfer::{Algorithm, plan};

use super::measure::measure;
use super::text::{count, megabytes, milliseconds};
use crate::args::{Profile, ProfileFormat};
use crate::exit::print;

pub(crate) fn run(args: &Profile) -> anyhow::Result<()> {
    let measured = measure(&args.model, &args.device)?;
    eprint!("{}", summary(&measured));
    let text = match args.format.unwrap_or_else(|| format_of(args.out.as_deref())) {
        ProfileFormat::Json => format!("{}\n", serde_json::to_string_pretty(&measured.profile)?),
        ProfileFormat::Yaml => format!("{}{}", remarks(&measured), profile_yaml(&measured.profile)),
    };
    match &args.out {
        Some(path) => std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display())),
        None => print(&text),
    }
}

fn format_of(out: Option<&Path>) -> ProfileFormat {
    match out.and_then(Path::extension) {
        Some(extension) if extension.eq_ignore_ascii_case("json") => ProfileFormat::Json,
        _ => ProfileFormat::Yaml,
    }
}

/// What was measured, and how well, for people.
pub(super) fn summary(measured: &DeviceProfile) -> String {
    let DeviceProfile { device, device_name, profile, link } = measured;
    let bytes: u64 = profile.layers.iter().map(|layer| layer.bytes).sum();
    let compute_us: f64 = profile.layers.iter().map(|layer| layer.compute_us).sum();
    let planned = plan(profile, Algorithm::Optimal).map_or_else(
        |error| format!("no plan: {error}"),
        |plan| {
            format!(
                "best plan: {}, predicted {}; one group for all {}",
                count(plan.groups.len(), "group"),
                milliseconds(plan.predicted_us),
                milliseconds(plan.whole_us)
            )
        },
    );
    format!(
        "{} on {device} ({device_name}): {}, {}, computing {}\n\
         link: {:.3} GB/s, {:.2} us a copy, {:.2} us beside computation, {:.2} us a wait, {:.1} us before the first copy; \
         off by {:.1} % (root mean square), at most {:.1} %, over {} transfers\n\
         {planned}\n",
        profile.model,
        count(profile.layers.len(), "layer"),
        megabytes(bytes),
        milliseconds(compute_us),
        link.bandwidth_bytes_per_s / 1e9,
        link.per_copy_us,
        profile.link.per_copy_us,
        profile.link.per_wait_us,
        link.per_transfer_us,
        link.rms_percent,
        link.largest_percent,
        link.samples,
    )
}

/// The same at the head of a file.
fn remarks(measured: &DeviceProfile) -> String {
    summary(measured).lines().map(|line| format!("# {line}\n")).collect()
}
