//! The exit codes of the command line, in one table, and the error that carries one.

use std::fmt;
use std::process::ExitCode;

/// How a command ended. The numbers are those of `sysexits.h` where it has one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// 0: done.
    Ok = 0,
    /// 1: a check failed, for example the gate of `trainer verify`.
    FailedCheck = 1,
    /// 2: the command line is wrong.
    Usage = 2,
    /// 65: the data is not what it should be.
    BadData = 65,
    /// 69: a peer or a device is not there.
    PeerDown = 69,
    /// 73: the output cannot be written.
    CannotWrite = 73,
    /// 78: the configuration is wrong.
    Configuration = 78,
}

/// The table for `--help`.
pub const TABLE: &str = "Exit codes: 0 ok, 1 a check failed, 2 usage, 65 bad data, 69 device or peer not there, \
73 cannot write, 78 configuration.\nEvery result is for research use only, not a medical device.";

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// An error that decides the exit code.
#[derive(Debug)]
pub struct Fault {
    exit: Exit,
    message: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.message)
    }
}

impl std::error::Error for Fault {}

/// An error with its exit code.
#[must_use]
pub fn fault(exit: Exit, message: impl Into<String>) -> anyhow::Error {
    Fault {
        exit,
        message: message.into(),
    }
    .into()
}

/// The exit code of an error: that of the first [`Fault`] in its chain, 73 for an input/output error that denies writing,
/// else 65.
#[must_use]
pub fn code_of(error: &anyhow::Error) -> Exit {
    if let Some(found) = error
        .chain()
        .find_map(|cause| cause.downcast_ref::<Fault>())
    {
        return found.exit;
    }
    let cannot_write = error
        .chain()
        .filter_map(|cause| cause.downcast_ref::<std::io::Error>())
        .any(|cause| {
            matches!(
                cause.kind(),
                std::io::ErrorKind::PermissionDenied
                    | std::io::ErrorKind::StorageFull
                    | std::io::ErrorKind::ReadOnlyFilesystem
                    | std::io::ErrorKind::NotADirectory
                    | std::io::ErrorKind::AlreadyExists
                    | std::io::ErrorKind::BrokenPipe
            )
        });
    if cannot_write {
        Exit::CannotWrite
    } else {
        Exit::BadData
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context;

    #[test]
    fn the_code_survives_context() {
        let error: anyhow::Result<()> = Err(fault(Exit::PeerDown, "no device"));
        let error = error.context("training").unwrap_err();
        assert_eq!(code_of(&error), Exit::PeerDown);
        assert_eq!(code_of(&anyhow::anyhow!("odd")), Exit::BadData);
    }
}
