//! The flags of `pswitch train`.

use std::path::PathBuf;

use clap::Subcommand;
use pswitch_controller::ModelName;
use pswitch_plot::PlotFile;

use super::{Format, ServerAddress};

/// Gives a server training tasks, looks after them and draws their losses.
///
/// A task computes while no request wants the device. It ends when its steps are done, or when it is told to stop.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  pswitch train submit resnet18 resnet18.yaml
  pswitch train list
  pswitch train show resnet18 --format json
  pswitch train pause resnet18
  pswitch train plot resnet18.jsonl --out loss.svg")]
pub(crate) struct Train {
    #[command(subcommand)]
    pub(crate) command: TrainCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum TrainCommand {
    Submit(Submit),
    /// Lists the tasks of a server, those that are over too.
    List(List),
    /// Shows all that is known of a task.
    Show(Show),
    /// Lets a task compute no further step until it is told to go on.
    Pause(Named),
    /// Lets a paused task go on.
    Resume(Named),
    Stop(Stop),
    Plot(Plot),
}

/// Ends a task, with a last checkpoint if it has a place for them.
///
/// One whose checkpoint cannot be written is paused instead; one that has made all its steps goes on trying. Both are an error.
#[derive(Debug, clap::Args)]
pub(crate) struct Stop {
    #[command(flatten)]
    pub(crate) task: Named,
    /// Writes no checkpoint: what it has learned since its last one is lost.
    #[arg(long)]
    pub(crate) discard: bool,
}

/// Gives a server a training task.
///
/// The configuration is read and checked before anything is sent. Relative paths in it are taken from its folder. The
/// server opens the files itself: it must run where they are. It is waited for the task to be prepared, 10 s at most: what
/// cannot be trained is an error.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  pswitch train submit resnet18 resnet18.yaml
  pswitch train submit resnet18 tasks/resnet18.yaml --server http://127.0.0.1:9000

A configuration:
  program: resnet18-step              # a folder with model.pt2, or an archive
  optimizer: {kind: sgd, lr: 0.1, momentum: 0.9}
  schedule: {kind: cosine, warm_up: 500}
  data: {files: [images.npy, labels.npy], batch_size: 64}
  length: {epochs: 90}
  checkpoint: {folder: checkpoints, every_steps: 1000}")]
pub(crate) struct Submit {
    /// The task, under a name that no other has that is not over.
    #[arg(value_parser = name)]
    pub(crate) name: String,
    /// The task's configuration, YAML or JSON.
    pub(crate) config: PathBuf,
    #[command(flatten)]
    pub(crate) server: ServerAddress,
}

#[derive(Debug, clap::Args)]
pub(crate) struct List {
    #[command(flatten)]
    pub(crate) server: ServerAddress,
    /// How it is printed.
    #[arg(long, value_enum, default_value_t = Format::Table)]
    pub(crate) format: Format,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Show {
    #[command(flatten)]
    pub(crate) task: Named,
    /// How it is printed.
    #[arg(long, value_enum, default_value_t = Format::Table)]
    pub(crate) format: Format,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Named {
    /// The task.
    #[arg(value_parser = name)]
    pub(crate) name: String,
    #[command(flatten)]
    pub(crate) server: ServerAddress,
}

/// Draws a task's loss over its steps, and marks where it was interrupted.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  pswitch train plot resnet18.jsonl --out loss.svg
  pswitch train plot resnet18.jsonl --out loss.png")]
pub(crate) struct Plot {
    /// The task's log: a line of JSON for every step that is logged. `pswitch train show` tells where it is.
    pub(crate) log: PathBuf,
    /// File to draw to.
    #[arg(long, value_name = "FILE.svg|FILE.png")]
    pub(crate) out: PlotFile,
}

/// A task's name goes into a URL, so what else could stand there is refused.
fn name(text: &str) -> Result<String, String> {
    let rule = "a name has up to 128 letters, digits, '.', '_' and '-', and begins with a letter or a digit";
    text.parse::<ModelName>().map(|_| text.to_owned()).map_err(|_| rule.to_owned())
}
