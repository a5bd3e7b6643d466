//! The commands of an operator: their arguments and help.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use crate::cli::{OutputArgs, ServeArgs};

/// What an operator asks for.
#[derive(Debug, Subcommand)]
pub(crate) enum OperateCommand {
    /// Say how the running node is: `/api/status` on the terminal.
    #[command(after_help = STATUS_HELP)]
    Status(StatusArgs),
    /// Check what the node needs: clock, disk and sync time, ports, model, PACS.
    #[command(after_help = DOCTOR_HELP)]
    Doctor(DoctorArgs),
    /// Send a C-ECHO to a peer, or to the PACS of the configuration.
    #[command(after_help = PING_HELP)]
    Ping(PingArgs),
    /// Send a synthetic study to this machine's node and print the page's address.
    #[command(after_help = DEMO_HELP)]
    Demo(DemoArgs),
    /// Install, list and take back models.
    #[command(subcommand)]
    Model(ModelCommand),
    /// Write manual pages or shell completions.
    #[command(subcommand)]
    Generate(GenerateCommand),
}

const STATUS_HELP: &str = "\
Examples:
  edge status
  edge status --config /etc/pe-edge/edge.toml --json

Exit code 0: ready; 1: degraded or refusing; 69: no node answers.";

const DOCTOR_HELP: &str = "\
Examples:
  edge doctor
  edge doctor --config /etc/pe-edge/edge.toml --json

Run it as the node's user or as root; it may run beside the node.
Exit code 0: nothing failed; 1: something did.";

const PING_HELP: &str = "\
Examples:
  edge ping PACS@pacs.example.org:104
  edge ping                                 the PACS of the configuration
  edge ping PEEDGE@127.0.0.1:11112 --calling CT1 --json

Exit code 0: answered; 69: not.";

const DEMO_HELP: &str = "\
Examples:
  edge demo                                 starts a node where none runs; Ctrl-C ends it
  edge demo --slices 24 --without-embolus

The study is synthetic: the phantom with an embolus, or without one. The demonstration model is for
studies of 24 slices; the more slices, the more studies it suspects, also without an embolus.";

const INSTALL_HELP: &str = "\
Examples:
  edge model install pe.onnx --key /etc/pe-edge/model.pub
  edge model install pe.onnx --unsigned

pe.onnx.minisig lies beside the file (minisign -Sm pe.onnx). Before the model comes into force it is
loaded and passes its self-test in a process of its own; restart the node then. Where it fails at a
start or crashes twice, the one before comes back by itself.
Exit code 1: the self-test failed; 65: the signature or the file is not good.";

/// Arguments of `edge status`.
#[derive(Debug, Args)]
pub(crate) struct StatusArgs {
    #[command(flatten)]
    pub(crate) config: ServeArgs,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

/// Arguments of `edge doctor`.
#[derive(Debug, Args)]
pub(crate) struct DoctorArgs {
    #[command(flatten)]
    pub(crate) config: ServeArgs,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

/// Arguments of `edge ping`.
#[derive(Debug, Args)]
pub(crate) struct PingArgs {
    /// AE@HOST:PORT [default: the PACS of the configuration].
    #[arg(value_name = "PEER")]
    pub(crate) peer: Option<String>,
    /// The AE title that we call ourselves [default: the configuration's].
    #[arg(long, value_name = "AE")]
    pub(crate) calling: Option<String>,
    /// Seconds to wait.
    #[arg(long, value_name = "S", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=300))]
    pub(crate) timeout: u64,
    /// Speak TLS with the certificate of the configuration's [tls] to the peer given here.
    #[arg(long, requires = "peer")]
    pub(crate) tls: bool,
    #[command(flatten)]
    pub(crate) config: ServeArgs,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

/// Arguments of `edge demo`.
#[derive(Debug, Args)]
pub(crate) struct DemoArgs {
    /// Slices of the study.
    #[arg(long, value_name = "N", default_value_t = 120, value_parser = clap::value_parser!(u32).range(1..=1_000))]
    pub(crate) slices: u32,
    /// A study without an embolus.
    #[arg(long)]
    pub(crate) without_embolus: bool,
    /// Which study; each number is another patient.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) seed: u64,
    #[command(flatten)]
    pub(crate) config: ServeArgs,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

/// What to do with models.
#[derive(Debug, Subcommand)]
pub(crate) enum ModelCommand {
    /// Verify a model, try it and bring it into force.
    #[command(after_help = INSTALL_HELP)]
    Install(InstallArgs),
    /// Say which model is in force and which one a rollback brings back.
    #[command(after_help = "Example:\n  edge model list --json")]
    List(StatusArgs),
    /// Bring the model before back.
    #[command(after_help = "Example:\n  edge model rollback && systemctl restart edge")]
    Rollback(StatusArgs),
}

/// Arguments of `edge model install`.
#[derive(Debug, Args)]
pub(crate) struct InstallArgs {
    /// The model file.
    #[arg(value_name = "FILE")]
    pub(crate) file: PathBuf,
    /// Public key of the signer: a file of minisign's, or its base64 text.
    #[arg(long, value_name = "KEY", required_unless_present = "unsigned")]
    pub(crate) key: Option<String>,
    /// Install without a signature.
    #[arg(long, conflicts_with = "key")]
    pub(crate) unsigned: bool,
    #[command(flatten)]
    pub(crate) config: ServeArgs,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

/// What to write.
#[derive(Debug, Subcommand)]
pub(crate) enum GenerateCommand {
    /// Manual pages, one for each command, into a folder.
    #[command(after_help = "Example:\n  edge generate man /usr/share/man/man1")]
    Man {
        /// The folder; it is made where it does not exist.
        #[arg(value_name = "DIR")]
        folder: PathBuf,
    },
    /// Completions for a shell, to standard output.
    #[command(
        after_help = "Example:\n  edge generate completions bash > /usr/share/bash-completion/completions/edge"
    )]
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
}
