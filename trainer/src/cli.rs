//! The command line of `trainer`.

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::exit::TABLE;
use crate::{compare, demo, evaluate, export, phantom, prepare, quantize, stats, train, verify};

/// Trains, evaluates, quantizes and exports a pulmonary embolism classifier.
#[derive(Debug, Parser)]
#[command(name = "trainer", version, about, after_help = TABLE, args_conflicts_with_subcommands = true)]
pub struct Cli {
    /// What to do; without a command the whole pipeline runs on a phantom, into runs/demo
    #[command(subcommand)]
    pub command: Option<Command>,
    /// Without a command: the demo's arguments.
    #[command(flatten)]
    pub demo: demo::DemoArgs,
}

/// The stages.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Write synthetic studies as DICOM or JPEG, in the layouts that `prepare` reads
    Phantom(phantom::PhantomArgs),
    /// Decode a source into a cache folder
    Prepare(prepare::PrepareArgs),
    /// Count a cache: classes, labels, spacing, leaks
    Stats(stats::StatsArgs),
    /// Train a network on a cache
    Train(train::TrainArgs),
    /// Measure a model on a part of a cache and write the report
    Evaluate(evaluate::EvaluateArgs),
    /// Train the publication's systems and print its table with ours beside it
    Compare(compare::CompareArgs),
    /// Write weights as a standard f32 ONNX file
    Export(export::ExportArgs),
    /// Make an int8 ONNX file of an f32 one
    Quantize(quantize::QuantizeArgs),
    /// Hold an int8 file against its f32 file: exit 1 when it is not good enough
    Verify(verify::VerifyArgs),
}

/// Runs a parsed command line.
///
/// # Errors
/// What the stage says; [`crate::exit::code_of`] gives the exit code.
pub fn run(cli: &Cli) -> anyhow::Result<ExitCode> {
    match &cli.command {
        Some(Command::Phantom(args)) => phantom::run(args),
        Some(Command::Prepare(args)) => prepare::run(args),
        Some(Command::Stats(args)) => stats::run(args),
        Some(Command::Train(args)) => train::run(args),
        Some(Command::Evaluate(args)) => evaluate::run(args),
        Some(Command::Compare(args)) => compare::run(args),
        Some(Command::Export(args)) => export::run(args),
        Some(Command::Quantize(args)) => quantize::run(args),
        Some(Command::Verify(args)) => verify::run(args),
        None => demo::run(&cli.demo),
    }
}
