//! Profiles as files: the form in which they are written, and those that are kept beside a model.

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::thread::available_parallelism;

use pswitch_device::{DeviceId, DeviceProperties};
use pswitch_protocol::monotonic_ns;
use pswitch_transfer::{Layer, LinkCosts, Profile};

/// A profile of half a million layers fits.
const MOST_BYTES: u64 = 64 << 20;

/// Longest part of a file's name that tells the device.
const LONGEST_SLUG: usize = 64;

/// A profile as YAML, a line for each layer. Times are rounded to nanoseconds.
///
/// ```
/// use pswitch_controller::profile_yaml;
/// use pswitch_transfer::{Layer, LinkCosts, Profile};
///
/// let profile = Profile {
///     model: "tiny".to_owned(),
///     link: LinkCosts { bandwidth_bytes_per_s: 55.5e9, per_copy_us: 2.5, per_wait_us: 1.0 },
///     layers: vec![Layer { name: "conv1".to_owned(), bytes: 37_632, compute_us: 31.2, host_bytes: 0 }],
/// };
/// assert_eq!(
///     profile_yaml(&profile),
///     r#"model: "tiny"
/// link: {"bandwidth_bytes_per_s":55500000000.0,"per_copy_us":2.5,"per_wait_us":1.0}
/// layers:
///   - {"name":"conv1","bytes":37632,"compute_us":31.2}
/// "#
/// );
/// ```
#[must_use]
pub fn profile_yaml(profile: &Profile) -> String {
    // JSON, of which YAML is a superset: names are quoted whatever is in them.
    let json = |value: serde_json::Result<String>| value.unwrap_or_default();
    let Profile { model, link, layers } = rounded(profile);
    let mut text = format!(
        "model: {}\nlink: {}\nlayers:\n",
        json(serde_json::to_string(&model)),
        json(serde_json::to_string(&link))
    );
    for layer in &layers {
        text.push_str("  - ");
        text.push_str(&json(serde_json::to_string(layer)));
        text.push('\n');
    }
    text
}

fn rounded(profile: &Profile) -> Profile {
    let us = |us: f64| (us * 1e3).round() / 1e3;
    let LinkCosts { bandwidth_bytes_per_s, per_copy_us, per_wait_us } = profile.link;
    Profile {
        model: profile.model.clone(),
        link: LinkCosts {
            // Less than a byte a second is none.
            bandwidth_bytes_per_s: bandwidth_bytes_per_s.round().max(1.0),
            per_copy_us: us(per_copy_us),
            per_wait_us: us(per_wait_us),
        },
        layers: profile
            .layers
            .iter()
            .map(|layer| Layer { compute_us: us(layer.compute_us), ..layer.clone() })
            .collect(),
    }
}

/// Where the layer times of a model on a device are kept from one start to the next: in the folder of its archive, which
/// may be a link to one elsewhere.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ProfileFile {
    path: PathBuf,
    /// Whether what a copy costs beside the layers is kept as well.
    keeps_copies: bool,
}

impl ProfileFile {
    /// Kernels, and with them the times, depend on what the archive holds, this version of pswitch (each is built for one
    /// of libtorch), the device and, on the CPU, the threads; on a GPU, what a wait costs on how it is made.
    pub(super) fn of(
        archive: &Path,
        digest: u64,
        device: &DeviceProperties,
        threads: u32,
        waits_by_kernels: bool,
    ) -> Self {
        let place = match device.id {
            DeviceId::Cuda(_) => {
                let waits = if waits_by_kernels { "kernel" } else { "operation" };
                format!("cuda-{}-{waits}-waits", slug(&device.name))
            }
            DeviceId::Host(_) => {
                let threads = match threads {
                    0 => format!("all-of-{}", available_parallelism().map_or(1, usize::from)),
                    threads => threads.to_string(),
                };
                format!("host-{}-{threads}-threads", slug(&device.name))
            }
        };
        let folder = archive.parent().unwrap_or(Path::new("")).join("profiles");
        let version = env!("CARGO_PKG_VERSION");
        let path = folder.join(format!("{digest:016x}-pswitch-{version}-{place}.yaml"));
        Self { path, keeps_copies: matches!(device.id, DeviceId::Cuda(_)) }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The layer times that are kept there, with what the link costs by `expected`, or, for a copy beside the layers on a GPU, by
    /// what is kept; none unless they are those of just its layers.
    pub(super) fn read(&self, expected: &Profile) -> Option<Profile> {
        let path = self.path.display();
        match read_file(&self.path).and_then(|text| check(&text, expected, self.keeps_copies)) {
            Ok(profile) => Some(profile),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => {
                tracing::info!(%path, %error, "layer times that are kept there cannot be used");
                None
            }
        }
    }

    /// Keeps layer times; whoever reads meanwhile finds those before or these. A model's folder that cannot be written to
    /// keeps none.
    pub(super) fn write(&self, profile: &Profile) {
        if let Err(error) = self.replace(&profile_yaml(profile)) {
            tracing::debug!(path = %self.path.display(), %error, "layer times are not kept");
        }
    }

    fn replace(&self, text: &str) -> io::Result<()> {
        let folder = self.path.parent().unwrap_or(Path::new(""));
        match fs::create_dir(folder) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        let temporary = folder.join(format!(".{}-{}.tmp", std::process::id(), monotonic_ns()));
        let replaced = fs::write(&temporary, text).and_then(|()| fs::rename(&temporary, &self.path));
        if replaced.is_err() {
            // There may be none; then there is nothing to remove.
            let _ = fs::remove_file(&temporary);
        }
        replaced
    }
}

fn read_file(path: &Path) -> io::Result<Vec<u8>> {
    // Whatever else may have the name (a pipe, a device) might never end.
    if !fs::metadata(path)?.is_file() {
        return Err(invalid("it is no file"));
    }
    let mut text = Vec::new();
    File::open(path)?.take(MOST_BYTES + 1).read_to_end(&mut text)?;
    if text.len() as u64 > MOST_BYTES { Err(invalid("it is too long")) } else { Ok(text) }
}

fn check(text: &[u8], expected: &Profile, keeps_copies: bool) -> io::Result<Profile> {
    let found: Profile = serde_yaml::from_slice(text).map_err(|error| invalid(error.to_string()))?;
    let what = |layer: &Layer| (layer.name.clone(), layer.bytes, layer.host_bytes);
    if !found.layers.iter().map(what).eq(expected.layers.iter().map(what)) {
        return Err(invalid("its layers are not the model's"));
    }
    let mut link = LinkCosts { per_wait_us: found.link.per_wait_us, ..expected.link };
    if keeps_copies {
        link.per_copy_us = link.per_copy_us.max(found.link.per_copy_us);
    }
    let profile = Profile { layers: found.layers, link, ..expected.clone() };
    profile.validate().map_err(|error| invalid(error.to_string()))?;
    Ok(profile)
}

fn invalid(reason: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason.into())
}

/// Letters and digits of a name, in lower case, what lies between them being one `-`.
fn slug(name: &str) -> String {
    let words = name.split(|c: char| !c.is_ascii_alphanumeric()).filter(|word| !word.is_empty());
    let mut slug = words.collect::<Vec<_>>().join("-").to_ascii_lowercase();
    slug.truncate(LONGEST_SLUG);
    slug
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use pswitch_device::{LinkThrottle, open_device};

    use super::*;

    fn profile(bandwidth_bytes_per_s: f64, times: [f64; 2]) -> Profile {
        let layer = |(name, compute_us): (&str, f64)| Layer {
            name: name.to_owned(),
            bytes: 512,
            compute_us,
            host_bytes: 0,
        };
        Profile {
            model: "m".to_owned(),
            link: LinkCosts { bandwidth_bytes_per_s, per_copy_us: 1.0, per_wait_us: 0.5 },
            layers: ["conv \"1\"\n", "relu: {"].into_iter().zip(times).map(layer).collect(),
        }
    }

    fn file(archive: &Path, digest: u64, threads: u32) -> ProfileFile {
        let device = open_device(DeviceId::Host(0), LinkThrottle::default()).unwrap();
        ProfileFile::of(archive, digest, device.properties(), threads, false)
    }

    #[test]
    fn names_tell_archive_device_and_threads() {
        assert_eq!(slug("Intel(R) Xeon(R) CPU @ 2.00GHz"), "intel-r-xeon-r-cpu-2-00ghz");
        assert_eq!(slug("NVIDIA H200"), "nvidia-h200");
        assert_eq!(slug(&"x/".repeat(100)).len(), LONGEST_SLUG);
        let archive = Path::new("/models/m/model.pt2");
        let name = file(archive, 0xAB, 3).path().display().to_string();
        assert!(name.starts_with("/models/m/profiles/00000000000000ab-pswitch-"), "{name}");
        assert!(name.ends_with("-3-threads.yaml"), "{name}");
        assert!(file(archive, 1, 0).path().to_string_lossy().contains("-all-of-"));
    }

    #[test]
    fn times_are_kept_beside_the_link_to_an_archive_and_costs_are_not() {
        let root = tempfile::tempdir().unwrap();
        let (elsewhere, folder) = (root.path().join("elsewhere"), root.path().join("m"));
        fs::create_dir(&elsewhere).unwrap();
        fs::create_dir(&folder).unwrap();
        fs::write(elsewhere.join("model.pt2"), "PK").unwrap();
        symlink(elsewhere.join("model.pt2"), folder.join("model.pt2")).unwrap();
        let file = file(&folder.join("model.pt2"), 7, 1);
        let expected = profile(2e9, [0.0, 0.0]);
        assert_eq!(file.read(&expected), None);
        file.write(&profile(1e9, [1.5, 2.0]));
        assert_eq!(file.read(&expected), Some(profile(2e9, [1.5, 2.0])));
        file.write(&profile(1e9, [3.0, 4.0]));
        assert_eq!(file.read(&expected), Some(profile(2e9, [3.0, 4.0])));
        assert_eq!(fs::read_dir(folder.join("profiles")).unwrap().count(), 1, "nothing else is left");
        assert_eq!(fs::read_dir(&elsewhere).unwrap().count(), 1);
    }

    #[test]
    fn what_copies_cost_beside_the_layers_is_kept_of_a_gpu() {
        let (found, mut expected) = (profile_yaml(&profile(1e9, [1.0, 2.0])), profile(2e9, [0.0, 0.0]));
        let kept = |expected: &Profile, keeps_copies| {
            check(found.as_bytes(), expected, keeps_copies).unwrap().link.per_copy_us
        };
        expected.link.per_copy_us = 0.25;
        assert_eq!([false, true].map(|keeps_copies| kept(&expected, keeps_copies)), [0.25, 1.0]);
        expected.link.per_copy_us = 4.0;
        assert_eq!(kept(&expected, true), 4.0);
    }

    #[test]
    fn what_is_damaged_or_of_another_model_is_passed_over_and_replaced() {
        let root = tempfile::tempdir().unwrap();
        let archive = root.path().join("model.pt2");
        let file = file(&archive, 7, 1);
        let good = profile(1e9, [1.0, 2.0]);
        file.write(&good);
        let text = profile_yaml(&good);
        for damaged in [
            String::new(),
            "[".repeat(10_000),
            text[..text.len() / 2].to_owned(),
            text.replacen("512", "1024", 1),
            text.replacen("relu", "gelu", 1),
            text.replacen("\"compute_us\":1.0", "\"compute_us\":-1.0", 1),
            text.replacen("\"compute_us\":1.0", "\"compute_us\":.nan", 1),
            text.lines().take(4).collect::<Vec<_>>().join("\n"),
        ] {
            assert_ne!(damaged, text);
            fs::write(file.path(), &damaged).unwrap();
            assert_eq!(file.read(&good), None, "{damaged}");
        }
        file.write(&good);
        assert_eq!(file.read(&good).as_ref(), Some(&good));
        fs::remove_file(file.path()).unwrap();
        fs::create_dir(file.path()).unwrap();
        assert_eq!(file.read(&good), None);
        // Nor can it be replaced, and that is no failure.
        file.write(&good);
        assert_eq!(fs::read_dir(root.path().join("profiles")).unwrap().count(), 1, "nothing else is left");
    }

    #[test]
    fn a_folder_that_cannot_be_written_to_keeps_nothing() {
        // A file is in the folder's place: that stops the superuser, too.
        let root = tempfile::tempdir().unwrap();
        fs::write(root.path().join("profiles"), "").unwrap();
        let file = file(&root.path().join("model.pt2"), 7, 1);
        file.write(&profile(1e9, [1.0, 2.0]));
        assert_eq!(file.read(&profile(1e9, [0.0, 0.0])), None);
    }
}
