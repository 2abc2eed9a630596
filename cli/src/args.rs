//! Flags, each declared here and nowhere else.

mod train;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Parser, Subcommand, ValueEnum};
use pswitch_controller::{Bandwidth, ByteSize, ConfigOverrides, DeviceChoice, SizeSetting};
use pswitch_plot::PlotFile;
use pswitch_transfer::Algorithm;

pub(crate) use self::train::{Named, Train, TrainCommand};

/// Time-shares a device between many PyTorch models.
#[derive(Debug, Parser)]
#[command(
    version,
    about,
    max_term_width = 110,
    after_help = "\
Exit codes: 0 success, 1 failure, 2 wrong usage, 3 a file that cannot be read or is not valid, 4 no server answers, \
5 the server refused."
)]
pub(crate) struct Args {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Serves the models of a repository.
    Serve(Serve),
    /// Sends one request to a server and prints or saves the outputs.
    Infer(Infer),
    /// Lists the models of a server or of a repository.
    Models(Models),
    /// Measures a model's layers and the link, and writes the profile from which plans are made.
    Profile(Profile),
    /// Divides a model's transfer into groups and predicts what that gives.
    #[command(name = "plan-groups")]
    PlanGroups(PlanGroups),
    Train(Train),
    Bench(pswitch_bench::Args),
    /// Prints a completion script for a shell.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
}

/// Serves the models of a repository.
///
/// A repository is a folder of NAME/model.pt2, written by torch.export.save or pswitch-export, each with an optional
/// NAME/model.yaml. SIGTERM and Ctrl-C finish what runs and refuse what is new.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  pswitch serve models
  pswitch serve models --pool-size 8GiB --http 127.0.0.1:9000
  pswitch serve --config server.yaml
  pswitch serve models --training-size 4GiB --train resnet=tasks/resnet.yaml
  pswitch serve models --device host --link-bandwidth 1GB/s    # see switching without a GPU")]
pub(crate) struct Serve {
    /// Folder of the models.
    pub(crate) repository: Option<PathBuf>,
    /// Configuration; flags go before it.
    #[arg(long, value_name = "FILE.yaml")]
    pub(crate) config: Option<PathBuf>,
    #[command(flatten)]
    device: DeviceFlags,
    /// Part of a device's pool for training: states, and activations of one step, as in 4GiB. With 0 no task can be trained.
    #[arg(long, value_name = "SIZE")]
    training_size: Option<ByteSize>,
    /// Lets models lie in that part where not all have room beside it: states make room for them, and come back.
    #[arg(long)]
    training_gives_way: bool,
    /// Share of the time, up to 0.9, that training has although requests never end.
    #[arg(long, value_name = "SHARE")]
    training_share: Option<f64>,
    /// A task that is trained beside serving, with the file of its configuration; may be given more than once.
    #[arg(long, value_name = "NAME=FILE.yaml", value_parser = task)]
    train: Vec<(String, PathBuf)>,
    /// Worker processes of a device: one executes, the others stand by.
    #[arg(long, value_name = "N")]
    workers: Option<u32>,
    /// How transfers are divided: optimal, paper, per-layer, whole, sequential or equal-N.
    #[arg(long, value_name = "ALGORITHM")]
    plan: Option<Algorithm>,
    /// Times all layers anew, and keeps no times in NAME/profiles for the next start.
    #[arg(long)]
    no_profile_cache: bool,
    /// Address of the HTTP front end; port 0 takes any free one.
    #[arg(long, value_name = "ADDRESS")]
    http: Option<SocketAddr>,
    /// What is logged, as in info or warn,pswitch_controller=debug.
    #[arg(long, value_name = "FILTER")]
    log: Option<String>,
}

impl Serve {
    /// What the flags say over the configuration.
    pub(crate) fn overrides(&self) -> ConfigOverrides {
        ConfigOverrides {
            repository: self.repository.clone(),
            training_size: self.training_size,
            training_gives_way: self.training_gives_way.then_some(true),
            training_share: self.training_share,
            training_tasks: self.train.clone(),
            workers: self.workers,
            http_address: self.http,
            plan: self.plan,
            profile_cache: self.no_profile_cache.then_some(false),
            log: self.log.clone(),
            ..self.device.overrides()
        }
    }
}

fn task(text: &str) -> Result<(String, PathBuf), String> {
    match text.split_once('=') {
        Some((name, file)) if !name.is_empty() && !file.is_empty() => Ok((name.to_owned(), file.into())),
        _ => Err("write NAME=FILE.yaml".to_owned()),
    }
}

/// The device that models run on.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct DeviceFlags {
    /// Device to run on: auto, host, host:N or cuda:N.
    #[arg(long)]
    device: Option<DeviceChoice>,
    /// Threads that one operator may use on the CPU; 0 leaves it to libtorch.
    #[arg(long, value_name = "N")]
    threads: Option<u32>,
    /// Slows the link of a host device down, as in 1GB/s.
    #[arg(long, value_name = "RATE")]
    link_bandwidth: Option<Bandwidth>,
    /// Lets every copy over the link of a host device cost so much more.
    #[arg(long, value_name = "US", value_parser = microseconds)]
    link_per_copy_us: Option<Duration>,
    /// Device memory for weights and activations, as in 8GiB, or auto.
    #[arg(long, value_name = "SIZE")]
    pool_size: Option<SizeSetting>,
    /// Part of the pool for the activations of one execution, or auto.
    #[arg(long, value_name = "SIZE")]
    arena_size: Option<SizeSetting>,
}

impl DeviceFlags {
    /// What the flags say over the configuration.
    pub(crate) fn overrides(&self) -> ConfigOverrides {
        ConfigOverrides {
            device: self.device,
            pool_size: self.pool_size,
            arena_size: self.arena_size,
            threads: self.threads,
            link_bandwidth: self.link_bandwidth,
            link_per_copy: self.link_per_copy_us,
            ..ConfigOverrides::default()
        }
    }
}

fn microseconds(text: &str) -> Result<Duration, String> {
    let number: f64 = text.parse().map_err(|_| format!("{text:?} is no number of microseconds"))?;
    Duration::try_from_secs_f64(number / 1e6).map_err(|error| error.to_string())
}

/// Where the server is.
#[derive(Debug, clap::Args)]
pub(crate) struct ServerAddress {
    /// Address of the server.
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:8000", env = "PSWITCH_SERVER")]
    pub(crate) server: String,
}

/// Sends one request to a server and prints or saves the outputs.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  pswitch infer resnet152 --input x=picture.npy
  pswitch infer bert --input input_ids='[[101, 7592, 102]]' --input attention_mask='[[1, 1, 1]]'
  pswitch infer resnet152 --input x=picture.npy --save outputs/ --print none")]
pub(crate) struct Infer {
    /// The model.
    pub(crate) model: String,
    /// An input: NAME=FILE.npy, NAME=FILE.json, or NAME=JSON with the data itself, nested as its shape is.
    #[arg(long = "input", short = 'i', value_name = "NAME=VALUE", value_parser = named)]
    pub(crate) inputs: Vec<(String, String)>,
    #[command(flatten)]
    pub(crate) server: ServerAddress,
    /// Folder to save every output to, as NAME.npy.
    #[arg(long, value_name = "FOLDER")]
    pub(crate) save: Option<PathBuf>,
    /// What is printed of the outputs.
    #[arg(long, value_enum, default_value_t = Print::Summary)]
    pub(crate) print: Print,
    /// Time that the server may take.
    #[arg(long, value_name = "MS")]
    pub(crate) timeout_ms: Option<u64>,
}

/// How much of the outputs is printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Print {
    /// Type, shape and the first values of each.
    Summary,
    /// All of it, as one JSON object.
    Json,
    /// Nothing.
    None,
}

fn named(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err("write NAME=VALUE".to_owned()),
    }
}

/// Lists the models of a server, or with REPOSITORY those of a folder.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  pswitch models                        # of the server on 127.0.0.1:8000
  pswitch models --server http://127.0.0.1:9000
  pswitch models ./models               # of a folder: no server is needed
  pswitch models ./models --format json")]
pub(crate) struct Models {
    /// Folder to read instead of asking a server.
    pub(crate) repository: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) server: ServerAddress,
    /// How it is printed.
    #[arg(long, value_enum, default_value_t = Format::Table)]
    pub(crate) format: Format,
}

/// Measures a model's layers and the link, and writes the profile from which plans are made.
///
/// Layers are timed as a server does when it loads the model, with made-up inputs of the shapes at export. The costs of
/// the link are those that explain the times of transfers of many sizes best; how far off they are is said on standard
/// error.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  pswitch profile models/resnet152 --out resnet152.yaml
  pswitch profile models/resnet152 --device cuda:0 --format json
  pswitch profile resnet152.pt2 --device host --threads 1 --link-bandwidth 1GB/s")]
pub(crate) struct Profile {
    /// The model: a folder with model.pt2, or an archive.
    pub(crate) model: PathBuf,
    #[command(flatten)]
    pub(crate) device: DeviceFlags,
    /// File to write to instead of standard output; JSON if it ends with .json.
    #[arg(long, value_name = "FILE")]
    pub(crate) out: Option<PathBuf>,
    /// What is written.
    #[arg(long, value_enum)]
    pub(crate) format: Option<ProfileFormat>,
}

/// The form of a profile.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ProfileFormat {
    /// A line for each layer.
    Yaml,
    /// The same as JSON.
    Json,
}

/// Divides a model's transfer into groups and predicts what that gives.
///
/// A plan cuts the span into groups: each is copied at once and announced once, and layers compute as soon as their
/// group is there. Short groups let computation begin early, long ones cost fewer calls. A model is measured first, as by
/// `pswitch profile`.
#[derive(Debug, clap::Args)]
#[command(
    group = clap::ArgGroup::new("source").required(true).args(["model", "profile"]),
    after_help = "\
Examples:
  pswitch plan-groups models/resnet152 --device host
  pswitch plan-groups --profile resnet152.yaml
  pswitch plan-groups --profile resnet152.yaml --algorithm per-layer --format json
  pswitch plan-groups --profile resnet152.yaml --plot resnet152.svg --plot resnet152.png"
)]
pub(crate) struct PlanGroups {
    /// The model to be measured: a folder with model.pt2, or an archive.
    pub(crate) model: Option<PathBuf>,
    /// Layer times, layer sizes and link costs, as YAML or JSON; then nothing is measured.
    #[arg(long, value_name = "FILE", conflicts_with = "DeviceFlags")]
    pub(crate) profile: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) device: DeviceFlags,
    /// optimal, paper, paper-rule-1, paper-rule-2, paper-exhaustive, per-layer, whole or equal-N.
    #[arg(long, default_value = "optimal", value_parser = pipelined)]
    pub(crate) algorithm: Algorithm,
    /// How it is printed.
    #[arg(long, value_enum, default_value_t = Format::Table)]
    pub(crate) format: Format,
    /// Draws the plan over time; may be given more than once.
    #[arg(long, value_name = "FILE.svg|FILE.png")]
    pub(crate) plot: Vec<PlotFile>,
    /// A resident prefix lets a switch take so much longer than the ready model.
    #[arg(long, value_name = "PERCENT", default_value = "1", value_parser = percent)]
    pub(crate) tolerance: f64,
    /// Time after which a search is cut off.
    #[arg(long, value_name = "S", default_value_t = 60)]
    pub(crate) search_limit_s: u64,
}

/// An algorithm whose plans have a timeline of groups.
fn pipelined(text: &str) -> Result<Algorithm, String> {
    match text.parse().map_err(|error: pswitch_transfer::TransferError| error.to_string())? {
        Algorithm::Sequential => Err("a sequential plan computes nothing before all has come".to_owned()),
        algorithm => Ok(algorithm),
    }
}

fn percent(text: &str) -> Result<f64, String> {
    let number = text.strip_suffix('%').unwrap_or(text).trim_end().parse();
    number
        .ok()
        .filter(|number: &f64| number.is_finite() && *number >= 0.0)
        .ok_or_else(|| format!("{text:?} is no percentage that is not negative"))
}

/// How something is printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// For people.
    Table,
    /// For programs.
    Json,
}
