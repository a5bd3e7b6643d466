//! The program itself, as a user starts it.
#![allow(dead_code, reason = "each test file uses its share")]

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

/// Longest wait for a file of another process.
pub(crate) const PATIENCE: Duration = Duration::from_secs(300);
/// How often a run is begun anew that ended before this process, on a busy machine, could kill it.
pub(crate) const TRIALS: u32 = 10;

pub(crate) fn trainer(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_trainer"));
    command
        .args(arguments)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    for name in ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"] {
        command.env_remove(name);
    }
    command.env("RAYON_NUM_THREADS", "1");
    command
}

/// Runs to the end without a fault; returns what it printed.
#[track_caller]
pub(crate) fn done(mut command: Command) -> String {
    let output = command.output().unwrap();
    let message = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{message}");
    String::from_utf8(output.stdout).unwrap()
}

/// Runs to a fault; returns exit code and message.
#[track_caller]
pub(crate) fn refused(mut command: Command) -> (i32, String) {
    let output = command.output().unwrap();
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success(), "{message}");
    (output.status.code().unwrap(), message)
}

/// A phantom's cache in `folder`.
pub(crate) fn prepared(folder: &Path, studies: &str) -> String {
    let cache = folder.join("cache").to_str().unwrap().to_owned();
    let source = "prepare --slices 6 --matrix 64 --seed 4 --phantom";
    let arguments = source.split(' ').chain([studies, "--out", &cache]);
    done(trainer(&arguments.collect::<Vec<_>>()));
    cache
}
