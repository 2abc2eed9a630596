//! A model measured: a server in this process loads it alone and says what its plans are made from.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use pswitch_controller::{
    Config, ConfigOverrides, DeviceProfile, InferenceService as _, LoadEvent, LoadObserver, ModelName,
    ModelState, Server,
};
use pswitch_model::Archive;
use pswitch_worker::Zygote;
use tracing_subscriber::EnvFilter;

use super::worker;
use crate::args::DeviceFlags;
use crate::exit::{Classify as _, Failure};

/// What is logged; why layers cannot be timed is among it.
const LOG: &str = "warn";

/// Time that the server has to end.
const END_TIMEOUT: Duration = Duration::from_secs(5);

/// Times the layers of a folder's `model.pt2`, or of an archive, and the link.
///
/// Call it before the process has threads: workers are forked from it.
pub(super) fn measure(model: &Path, device: &DeviceFlags) -> anyhow::Result<DeviceProfile> {
    let (name, archive) = find(model).class(Failure::Input)?;
    Archive::open(&archive)
        .with_context(|| format!("cannot read {}", archive.display()))
        .class(Failure::Input)?;
    let repository = tempfile::tempdir().context("no folder for a repository")?;
    let folder = repository.path().join(name.as_str());
    std::fs::create_dir(&folder)
        .and_then(|()| symlink(&archive, folder.join("model.pt2")))
        .with_context(|| format!("cannot make a repository in {}", folder.display()))?;
    let overrides = ConfigOverrides {
        repository: Some(repository.path().to_owned()),
        // They would go with the folder.
        profile_cache: Some(false),
        ..device.overrides()
    };
    let config = Config::default().with(overrides).class(Failure::Input)?;
    tracing_subscriber::fmt().with_env_filter(EnvFilter::new(LOG)).with_writer(std::io::stderr).init();
    // Before the first thread: a process with threads cannot be forked safely.
    let zygote = Zygote::fork(worker).context("cannot fork the zygote")?;
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().build().context("cannot start threads")?;
    let entered = runtime.enter();
    let (server, pending) = Server::start(config, zygote.channel, observer())?;
    drop(entered);
    runtime.block_on(server.load_all(pending));
    let measured = profile(&server, name.as_str());
    // Nothing runs; it only ends the workers in order.
    runtime.block_on(server.drain(END_TIMEOUT));
    drop(server);
    runtime.shutdown_timeout(END_TIMEOUT);
    measured
}

fn profile(server: &Server, name: &str) -> anyhow::Result<DeviceProfile> {
    let status = server.model(name, None)?;
    if status.state != ModelState::Ready {
        bail!("'{name}' cannot be loaded: {}", status.reason);
    }
    server.profiles(name)?.into_iter().next().with_context(|| format!("'{name}' is on no device"))
}

/// The model's name and its archive: named as in a repository, by its folder, or as the file is.
fn find(model: &Path) -> anyhow::Result<(ModelName, PathBuf)> {
    let is_file = model.is_file();
    let archive = if is_file { model.to_owned() } else { model.join("model.pt2") };
    let archive = archive.canonicalize().with_context(|| format!("there is no {}", archive.display()))?;
    let by_itself = is_file && archive.file_name().is_some_and(|name| name != "model.pt2");
    let named = if by_itself { archive.file_stem() } else { archive.parent().and_then(Path::file_name) };
    let named = named.unwrap_or_default().to_string_lossy();
    // Whatever a file may be called, a model may not.
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    let name: String = named.chars().map(|c| if allowed(c) { c } else { '-' }).collect();
    let name = name.parse().or_else(|_| "model".parse())?;
    Ok((name, archive))
}

/// Says what is going on; it may take a while.
fn observer() -> LoadObserver {
    Arc::new(|event| match event {
        LoadEvent::Opened { model, .. } => eprintln!("reading {model} ..."),
        LoadEvent::Profiling { model } => eprintln!("timing the layers of {model} ..."),
        _ => {}
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn models_are_named_by_their_folder_or_their_file() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("odd name");
        std::fs::create_dir(&folder).unwrap();
        for file in ["model.pt2", "resnet18.pt2", "-.pt2"] {
            std::fs::write(folder.join(file), "PK").unwrap();
        }
        let name = |path: &Path| find(path).unwrap().0.to_string();
        assert_eq!(name(&folder), "odd-name");
        assert_eq!(name(&folder.join("model.pt2")), "odd-name");
        assert_eq!(name(&folder.join("resnet18.pt2")), "resnet18");
        assert_eq!(name(&folder.join("-.pt2")), "model");
        assert!(find(&root.path().join("nobody")).unwrap_err().to_string().contains("nobody/model.pt2"));
    }
}
