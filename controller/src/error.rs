use std::io;
use std::path::PathBuf;

use crate::yaml::YamlError;

/// What can go wrong in the controller before a request is involved: reading what it is to serve, and how.
///
/// What can happen to a request is [`Rejection`](crate::scheduler::Rejection) to the scheduler and
/// [`ServiceError`](crate::ServiceError) to a front end.
#[derive(Debug, thiserror::Error)]
pub enum ControllerError {
    /// The configuration file cannot be read.
    #[error("cannot read the configuration {}", path.display())]
    ReadConfig {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The configuration file is not YAML, or has a key or value that is not allowed; the source says where and
    /// what is.
    #[error("the configuration {} is not valid", path.display())]
    ParseConfig {
        /// The file.
        path: PathBuf,
        /// The parser's reason with line and column.
        source: YamlError,
    },
    /// A setting, from a file or a flag, that is out of range or contradicts another.
    #[error("the configuration is not valid: {key}: {reason}")]
    InvalidConfig {
        /// The setting, as in `devices[0].workers`.
        key: String,
        /// What is wrong and what is allowed.
        reason: String,
    },
    /// The model repository cannot be listed.
    #[error("cannot read the model repository {}", path.display())]
    ReadRepository {
        /// The folder.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// An entry of the model repository has a name that cannot be that of a model.
    #[error("'{name}' is not a model's name: {reason}")]
    ModelName {
        /// The name, with what is not UTF-8 replaced.
        name: String,
        /// The rule that it breaks.
        reason: &'static str,
    },
    /// A folder of the model repository has no archive.
    #[error("there is no {} (write one with pswitch-export)", path.display())]
    NoArchive {
        /// The file that is missing.
        path: PathBuf,
    },
    /// A file of the model repository cannot be read.
    #[error("cannot read {}", path.display())]
    ReadModel {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// A model's settings are not YAML, or have a key or value that is not allowed; the source says where and what
    /// is.
    #[error("the settings {} are not valid", path.display())]
    ParseModelSettings {
        /// The file.
        path: PathBuf,
        /// The parser's reason with line and column.
        source: YamlError,
    },
    /// A device cannot be opened or has failed.
    #[error("the device cannot be used")]
    Device(#[from] pswitch_device::DeviceError),
    /// The pool cannot be divided as configured.
    #[error("the pool cannot be set up")]
    Pool(#[from] pswitch_mem_pool::PoolError),
    /// The transfer engine cannot be started.
    #[error("transfers cannot be set up")]
    Transfer(#[from] pswitch_transfer::TransferError),
    /// The operating system refused something that every server needs.
    #[error("cannot make {what}")]
    System {
        /// What was asked for.
        what: &'static str,
        /// The system's reason.
        source: io::Error,
    },
}
