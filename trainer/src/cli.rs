//! The command line of `trainer`.

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::exit::TABLE;
use crate::{evaluate, prepare, train};

/// Trains, evaluates, quantizes and exports a pulmonary embolism classifier.
#[derive(Debug, Parser)]
#[command(name = "trainer", version, about, after_help = TABLE)]
pub struct Cli {
    /// What to do; without a command the whole pipeline runs on a phantom, into runs/demo
    #[command(subcommand)]
    pub command: Option<Command>,
}

/// The stages.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Decode a source into a cache folder
    Prepare(prepare::PrepareArgs),
    /// Measure a model on a part of a cache and write the report
    Evaluate(evaluate::EvaluateArgs),
    /// Train a network on a cache
    Train(train::TrainArgs),
}

/// Runs a parsed command line.
///
/// # Errors
/// What the stage says; [`crate::exit::code_of`] gives the exit code.
pub fn run(cli: &Cli) -> anyhow::Result<ExitCode> {
    match &cli.command {
        Some(Command::Prepare(args)) => prepare::run(args),
        Some(Command::Evaluate(args)) => evaluate::run(args),
        Some(Command::Train(args)) => train::run(args),
        None => Ok(ExitCode::SUCCESS),
    }
}
