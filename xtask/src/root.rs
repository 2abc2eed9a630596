//! Where things are in the repository.

use std::path::{Path, PathBuf};

/// The root folder of the repository.
pub(crate) struct Root(PathBuf);

impl Root {
    /// The repository that this binary was built in.
    pub(crate) fn of_this_repository() -> Self {
        let xtask = Path::new(env!("CARGO_MANIFEST_DIR"));
        Self(xtask.parent().map_or_else(|| PathBuf::from("."), Path::to_path_buf))
    }

    /// A file or folder of the repository.
    pub(crate) fn join(&self, path: impl AsRef<Path>) -> PathBuf {
        self.0.join(path)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    /// Everything that set-up makes, ignored by git.
    pub(crate) fn torch(&self) -> PathBuf {
        self.join(".torch")
    }

    /// The link that `.cargo/config.toml` names as `LIBTORCH`.
    pub(crate) fn libtorch(&self) -> PathBuf {
        self.torch().join("libtorch")
    }

    /// The virtual environment, made by set-up.
    pub(crate) fn venv(&self) -> PathBuf {
        self.torch().join("venv")
    }

    /// The Python that all tasks use.
    pub(crate) fn python(&self) -> PathBuf {
        self.venv().join("bin/python")
    }

    pub(crate) fn requirements(&self) -> PathBuf {
        self.join("python/requirements.txt")
    }

    /// Where cargo builds.
    pub(crate) fn target(&self) -> PathBuf {
        std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| self.join("target"), |folder| self.join(folder))
    }

    /// Where tests look for fixtures.
    pub(crate) fn fixtures(&self) -> PathBuf {
        self.join("target/fixtures")
    }

    /// Where tests look for training programs with reference runs.
    pub(crate) fn training_fixtures(&self) -> PathBuf {
        self.join("target/training")
    }
}
