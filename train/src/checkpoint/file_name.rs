use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// `step-00000123.safetensors`
pub(super) fn of(step: u64) -> String {
    format!("step-{step:08}.safetensors")
}

/// `diverged-00000123.safetensors`
pub(super) fn of_diverged(step: u64) -> String {
    format!("diverged-{step:08}.safetensors")
}

/// The name of a file that is being written: hidden, and without the ending of a checkpoint.
pub(super) fn of_partial(name: &str) -> String {
    format!(".{name}.partial")
}

/// The step of a file that was named by `of`.
fn step(name: &str, of: fn(u64) -> String) -> Option<u64> {
    let digits = name.strip_suffix(".safetensors")?.rsplit('-').next()?;
    let step = digits.parse().ok()?;
    (of(step) == name).then_some(step)
}

fn is_partial(name: &str) -> bool {
    let name = name.strip_prefix('.').and_then(|name| name.strip_suffix(".partial"));
    name.is_some_and(|name| step(name, of).or(step(name, of_diverged)).is_some())
}

/// What is in a folder of checkpoints, by name.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Listing {
    /// The newest first.
    pub(super) checkpoints: Vec<(u64, PathBuf)>,
    /// Left behind by writers that were killed.
    pub(super) partial: Vec<PathBuf>,
}

pub(super) fn list(folder: &Path) -> io::Result<Listing> {
    let mut listing = Listing::default();
    for entry in fs::read_dir(folder)? {
        let name = entry?.file_name();
        let path = folder.join(&name);
        let Some(name) = name.to_str() else { continue };
        match step(name, of) {
            Some(step) => listing.checkpoints.push((step, path)),
            None if is_partial(name) => listing.partial.push(path),
            None => {}
        }
    }
    listing.checkpoints.sort_by(|one, other| other.cmp(one));
    Ok(listing)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_as_they_are_written_are_ours() {
        assert_eq!(of(123), "step-00000123.safetensors");
        for step in [0, 99_999_999, 100_000_000, u64::MAX] {
            assert_eq!(super::step(&of(step), of), Some(step));
            assert!(is_partial(&of_partial(&of(step))) && is_partial(&of_partial(&of_diverged(step))));
        }
        for foreign in [
            "step-123.safetensors",
            "step-000000123.safetensors",
            "step-+0000123.safetensors",
            "step-0000012a.safetensors",
            "step-99999999999999999999.safetensors",
            "step-00000123.safetensors.bak",
            "diverged-00000123.safetensors",
            ".step-00000123.safetensors.partial",
            "model.safetensors",
        ] {
            assert_eq!(super::step(foreign, of), None, "{foreign}");
        }
        assert!(!is_partial(".model.safetensors.partial"));
    }
}
