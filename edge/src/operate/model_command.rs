//! `edge model`: installs, lists and takes back models.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use serde::Serialize;

use super::audit::{Audit, Event};
use super::command::{InstallArgs, ModelCommand, StatusArgs};
use super::model_store::{Entry, ModelStore, Trust, give_to_owner};
use crate::config::Config;
use crate::exit::{Exit, Failure, failure};
use crate::intake::unix_ms;

/// How long a model may take to load, test itself and answer once.
const PROBE_DEADLINE: Duration = Duration::from_secs(120);
/// Between two looks at the probing process.
const PROBE_LOOK: Duration = Duration::from_millis(20);

/// `edge model`.
///
/// # Errors
/// As the store says; `Configuration` for faults of the file.
pub(crate) fn run(command: &ModelCommand, out: &mut impl Write) -> Result<Exit, Failure> {
    match command {
        ModelCommand::Install(arguments) => install(arguments, out),
        ModelCommand::List(arguments) => {
            let (store, config) = store(arguments.config.config.as_deref())?;
            say(&store, &config, arguments, "in force", out)
        }
        ModelCommand::Rollback(arguments) => {
            let (store, config) = store(arguments.config.config.as_deref())?;
            let state = store.rollback()?;
            record(&config, "rolled_back", state.current.as_ref())?;
            say(&store, &config, arguments, "restart the node to use", out)
        }
    }
}

fn store(config: Option<&Path>) -> Result<(ModelStore, Config), Failure> {
    let config = Config::load(config).map_err(failure(Exit::Configuration))?;
    Ok((ModelStore::new(&config.state_dir), config))
}

fn install(arguments: &InstallArgs, out: &mut impl Write) -> Result<Exit, Failure> {
    let (store, config) = store(arguments.config.config.as_deref())?;
    let trust = match &arguments.key {
        Some(key) => Trust::Key(key.clone()),
        None => Trust::Unsigned,
    };
    let entry = store.install(&arguments.file, &trust, unix_ms(), probe)?;
    record(&config, "installed", Some(&entry))?;
    let list = StatusArgs {
        config: crate::cli::ServeArgs {
            config: arguments.config.config.clone(),
        },
        output: arguments.output,
    };
    say(&store, &config, &list, "restart the node to use", out)
}

/// One line in the node's audit log, whether the node runs or not. Only the node closes files that have become too large.
fn record(config: &Config, change: &str, entry: Option<&Entry>) -> Result<(), Failure> {
    let folder = config.state_dir.join("audit");
    let digest = entry.map_or("", |entry| entry.digest.as_str());
    let recorded = Audit::open(&folder, u64::MAX).and_then(|audit| {
        // Run by root, it must not shut the node out of its own log.
        give_to_owner(&folder)?;
        give_to_owner(&folder.join("audit.jsonl"))?;
        audit.record(&Event::Model { change, digest }, jiff::Timestamp::now())
    });
    recorded
        .context("it is done, but the audit log cannot be written")
        .map_err(failure(Exit::CannotWrite))
}

/// Loads a model and runs it once in a process of its own, so that one that crashes the engine crashes nothing else. Its name.
fn probe(path: &Path) -> Result<String, Failure> {
    let launch = crate::launch::launch().map_err(failure(Exit::CannotWrite))?;
    let mut child = Command::new(&launch.program)
        .args(&launch.arguments)
        .args(["bench", "--slices", "1", "--json", "--model"])
        .arg(path)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("starting a process to try the model")
        .map_err(failure(Exit::CannotWrite))?;
    let end = Instant::now() + PROBE_DEADLINE;
    loop {
        match child.try_wait() {
            Ok(Some(_)) => break,
            Ok(None) if Instant::now() < end => std::thread::sleep(PROBE_LOOK),
            _ => {
                // It has ended, or is ended now; `wait_with_output` says how.
                drop(child.kill());
                break;
            }
        }
    }
    let output = child
        .wait_with_output()
        .map_err(failure(Exit::CannotWrite))?;
    let said = String::from_utf8_lossy(&output.stderr);
    let said = said.lines().last().unwrap_or_default();
    // This process says its own name.
    let said = said.strip_prefix("edge: ").unwrap_or(said);
    match output.status.code() {
        Some(0) => {}
        Some(1) => return Err(failure(Exit::FailedCheck)(anyhow!("{said}"))),
        Some(_) => return Err(failure(Exit::BadData)(anyhow!("{said}"))),
        None => {
            let error = anyhow!(
                "the model ended the process that tried it, {}",
                output.status
            );
            return Err(failure(Exit::FailedCheck)(error));
        }
    }
    let answer: serde_json::Value =
        serde_json::from_slice(&output.stdout).map_err(failure(Exit::BadData))?;
    Ok(answer["model"].as_str().unwrap_or_default().to_owned())
}

/// What `list` prints.
#[derive(Debug, Serialize)]
struct Listed<'a> {
    current: Option<&'a Entry>,
    previous: Option<&'a Entry>,
    on_trial: bool,
    /// The configuration names a file, which takes precedence.
    configured: Option<&'a Path>,
}

fn say(
    store: &ModelStore,
    config: &Config,
    arguments: &StatusArgs,
    what: &str,
    out: &mut impl Write,
) -> Result<Exit, Failure> {
    let state = store.state()?;
    let listed = Listed {
        current: state.current.as_ref(),
        previous: state.previous.as_ref(),
        on_trial: state.trial_starts.is_some(),
        configured: config.model.as_deref(),
    };
    let written = if arguments.output.json {
        serde_json::to_string(&listed)
            .map_err(Into::into)
            .and_then(|text| writeln!(out, "{text}"))
    } else {
        lines(&listed, what, out)
    };
    written
        .and_then(|()| out.flush())
        .map_err(failure(Exit::CannotWrite))?;
    Ok(Exit::Ok)
}

fn lines(listed: &Listed<'_>, what: &str, out: &mut impl Write) -> std::io::Result<()> {
    let name = |entry: Option<&Entry>| match entry {
        Some(entry) if entry.is_signed => format!("{}, signed", entry.name),
        Some(entry) => format!("{}, not signed", entry.name),
        None => "the demonstration model".to_owned(),
    };
    let trial = if listed.on_trial { ", on trial" } else { "" };
    writeln!(out, "{what}: {}{trial}", name(listed.current))?;
    if listed.current.is_some() || listed.previous.is_some() {
        writeln!(out, "before: {}", name(listed.previous))?;
    }
    if let Some(path) = listed.configured {
        writeln!(
            out,
            "but the configuration names {}, which takes precedence",
            path.display()
        )?;
    }
    Ok(())
}
