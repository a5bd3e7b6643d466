//! The command line.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use engine::{Kernel, Options};

use crate::exit;
use crate::operate::command::OperateCommand;
use crate::report::Form;

/// The hidden subcommand that makes this program its own worker.
pub(crate) const WORKER_COMMAND: &str = "worker";

/// Classifies chest CT slices for pulmonary embolism. Research use only, not a medical device.
#[derive(Debug, Parser)]
#[command(name = "edge", version, after_help = exit::TABLE, subcommand_required = true, arg_required_else_help = true)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Classify DICOM files and folders: a line for each slice, then for each study.
    #[command(after_help = CLASSIFY_HELP)]
    Classify(ClassifyArgs),
    /// Measure how fast the model runs on this machine, and in how much memory.
    #[command(after_help = BENCH_HELP)]
    Bench(BenchArgs),
    /// Write a study's result as the documents that would be sent.
    #[command(hide = true)]
    Report(crate::send::export::ReportArguments),
    /// Run the node: receive studies by DICOM, classify them while they arrive, send the results on.
    #[command(after_help = SERVE_HELP)]
    Serve(ServeArgs),
    /// Check a configuration file; all its faults are printed at once.
    #[command(after_help = "Example:\n  edge check --config edge.toml")]
    Check(ServeArgs),
    /// Print a configuration.
    #[command(subcommand)]
    Config(ConfigCommand),
    #[command(flatten)]
    Operate(OperateCommand),
    /// Parses foreign bytes for the other commands.
    #[command(name = WORKER_COMMAND, hide = true)]
    Worker,
}

const CLASSIFY_HELP: &str = "\
Examples:
  edge classify study/                      a table on the terminal
  edge classify --json a.dcm b.dcm          one JSON object a line
  edge classify --model pe.onnx --tensors out/ study/

Every file gets an answer or a reason. Exit code 0: something was analysed; 65: nothing was.
Suspected: the answer reaches the model file's threshold. Research use only, not a medical device.";

const BENCH_HELP: &str = "\
Examples:
  edge bench
  edge bench --model pe.onnx --threads 4 --slices 100 --json
  edge bench --explain                      what runs where, layer by layer";

const SERVE_HELP: &str = "\
Examples:
  edge serve                                AE PEEDGE on port 11112, page on http://127.0.0.1:8080
  edge config init > edge.toml              a commented configuration to begin with
  edge serve --config edge.toml

SIGTERM: finish what is being sent, then stop.
SIGHUP: read the configuration and the certificates again.";

/// Arguments of `edge serve` and `edge check`.
#[derive(Debug, Args)]
pub(crate) struct ServeArgs {
    /// The configuration file [default: none; every setting has a default].
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
}

/// What to print.
#[derive(Debug, Subcommand)]
pub(crate) enum ConfigCommand {
    /// A commented configuration to begin with.
    #[command(after_help = "Example:\n  edge config init > edge.toml")]
    Init,
    /// The settings in force: the file's, and the defaults.
    #[command(after_help = "Example:\n  edge config show --config edge.toml")]
    Show(ServeArgs),
}

/// Arguments of `edge classify`.
#[derive(Debug, Args)]
pub(crate) struct ClassifyArgs {
    /// Files and folders; folders are walked in the order of names.
    #[arg(required = true, value_name = "PATH")]
    pub(crate) paths: Vec<PathBuf>,
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    /// Write each analysed slice's input as DIR/<SOP UID>[.frame].npy, u8 [3,256,256].
    #[arg(long, value_name = "DIR")]
    pub(crate) tensors: Option<PathBuf>,
    /// Write a heat map over each analysed slice as DIR/<SOP UID>[.frame].png.
    #[arg(long, value_name = "DIR")]
    pub(crate) heatmap: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

/// Arguments of `edge bench`.
#[derive(Debug, Args)]
pub(crate) struct BenchArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    /// How many slices to time after warm-up.
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub(crate) slices: u32,
    /// Say for each layer what it runs on and how long it takes.
    #[arg(long)]
    pub(crate) explain: bool,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

/// Which model, and how it runs.
#[derive(Debug, Args)]
pub(crate) struct ModelArgs {
    /// The model file [default: the demonstration model in this program].
    #[arg(long, value_name = "FILE")]
    pub(crate) model: Option<PathBuf>,
    /// Threads of the network [default: all cores].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=64))]
    pub(crate) threads: Option<u32>,
    /// Kernel of the network [default: the fastest that this CPU runs].
    #[arg(long, value_name = "NAME")]
    pub(crate) kernel: Option<Kernel>,
    /// Run an int8 file in f32: for CPUs without a dot product; answers then differ from CPU to CPU, and say so.
    #[arg(long)]
    pub(crate) float: bool,
}

/// How results are printed.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct OutputArgs {
    /// Print JSON, one object a line.
    #[arg(long)]
    pub(crate) json: bool,
}

impl ModelArgs {
    /// The engine's options.
    pub(crate) fn options(&self) -> Options {
        let all = || std::thread::available_parallelism().map_or(1, usize::from);
        let asked = self
            .threads
            .and_then(|threads| usize::try_from(threads).ok());
        Options {
            kernel: self.kernel,
            threads: asked.unwrap_or_else(all).clamp(1, 64),
            is_float: self.float,
        }
    }
}

impl OutputArgs {
    /// The form of the output.
    pub(crate) fn form(self) -> Form {
        if self.json {
            Form::JsonLines
        } else {
            Form::Table
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
