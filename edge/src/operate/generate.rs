//! `edge generate`: manual pages and shell completions, from the command line's own definition.

use std::io::Write;
use std::path::Path;

use anyhow::Context;
use clap::{Command, CommandFactory};

use super::command::GenerateCommand;
use crate::cli::Cli;
use crate::exit::{Exit, Failure, failure};

/// `edge generate`.
///
/// # Errors
/// `CannotWrite`.
pub(crate) fn run(command: &GenerateCommand, out: &mut impl Write) -> Result<Exit, Failure> {
    match command {
        GenerateCommand::Man { folder } => {
            let mut root = Cli::command();
            root.build();
            std::fs::create_dir_all(folder)
                .and_then(|()| manual(&root, "edge", folder))
                .with_context(|| format!("writing to {}", folder.display()))
                .map_err(failure(Exit::CannotWrite))?;
        }
        GenerateCommand::Completions { shell } => {
            let mut text = Vec::new();
            clap_complete::generate(*shell, &mut Cli::command(), "edge", &mut text);
            out.write_all(&text)
                .and_then(|()| out.flush())
                .map_err(failure(Exit::CannotWrite))?;
        }
    }
    Ok(Exit::Ok)
}

/// The page of a command, and of those below it.
fn manual(command: &Command, name: &str, folder: &Path) -> std::io::Result<()> {
    let mut text = Vec::new();
    clap_mangen::Man::new(command.clone().display_name(name.to_owned())).render(&mut text)?;
    std::fs::write(folder.join(format!("{name}.1")), text)?;
    let shown = command.get_subcommands();
    for below in shown.filter(|below| !below.is_hide_set() && below.get_name() != "help") {
        manual(below, &format!("{name}-{}", below.get_name()), folder)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_has_a_manual_page() {
        let folder = tempfile::tempdir().unwrap();
        let command = GenerateCommand::Man {
            folder: folder.path().to_owned(),
        };
        run(&command, &mut Vec::new()).unwrap();
        for name in [
            "edge",
            "edge-serve",
            "edge-model-install",
            "edge-config-init",
        ] {
            let text = std::fs::read_to_string(folder.path().join(format!("{name}.1"))).unwrap();
            assert!(text.contains(".TH"), "{name}");
        }
        assert!(!folder.path().join("edge-worker.1").exists());
    }

    #[test]
    fn completions_know_the_commands() {
        let mut text = Vec::new();
        let command = GenerateCommand::Completions {
            shell: clap_complete::Shell::Bash,
        };
        run(&command, &mut text).unwrap();
        let text = String::from_utf8(text).unwrap();
        assert!(text.contains("rollback") && text.contains("--config"));
    }

    /// Every command that a person types says how, by example, and those that report offer JSON.
    #[test]
    fn every_help_has_an_example_and_every_report_has_json() {
        let mut root = Cli::command();
        root.build();
        let mut waiting = vec![root];
        while let Some(command) = waiting.pop() {
            let below: Vec<Command> = command
                .get_subcommands()
                .filter(|below| !below.is_hide_set() && below.get_name() != "help")
                .cloned()
                .collect();
            if below.is_empty() {
                let help = command.get_after_help().map(ToString::to_string);
                let name = command.get_bin_name().unwrap_or_default().to_owned();
                assert!(
                    help.unwrap_or_default().contains(&name),
                    "{name} has no example"
                );
                let is_report = [
                    "status", "doctor", "ping", "demo", "install", "list", "rollback", "bench",
                    "classify",
                ];
                if is_report.contains(&command.get_name()) {
                    let has_json = command
                        .get_arguments()
                        .any(|one| one.get_long() == Some("json"));
                    assert!(has_json, "{name} has no --json");
                }
            }
            waiting.extend(below);
        }
    }
}
