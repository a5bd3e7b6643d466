//! The command line of `trainer`.

use clap::{Parser, Subcommand};

use crate::exit::{Exit, TABLE};

/// Trains, evaluates, quantizes and exports a pulmonary embolism classifier.
#[derive(Debug, Parser)]
#[command(name = "trainer", version, about, after_help = TABLE)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Option<Command>,
}

/// The stages.
#[derive(Debug, Subcommand)]
pub enum Command {}

/// Runs a parsed command line.
///
/// # Errors
/// What the stage says; [`crate::exit::code_of`] gives the exit code.
pub fn run(cli: &Cli) -> anyhow::Result<Exit> {
    match &cli.command {
        Some(_) | None => Ok(Exit::Ok),
    }
}
