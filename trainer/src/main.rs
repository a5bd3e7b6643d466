//! The `trainer` program: parses the command line, runs a stage, tells the exit code.

use std::process::ExitCode;

use clap::Parser;
use trainer::{cli, exit};

#[expect(clippy::print_stderr, reason = "the one place where an error is told")]
fn main() -> ExitCode {
    trainer::allocator::keep_freed_memory();
    let arguments = cli::Cli::parse();
    match cli::run(&arguments) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            exit::code_of(&error).into()
        }
    }
}
