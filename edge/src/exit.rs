//! The exit codes, in one table, and an error that carries one (sysexits.h where it has a word for it).

use std::fmt;
use std::process::ExitCode;

/// The table, as `--help` prints it.
pub(crate) const TABLE: &str = "\
Exit codes:
   0  ok
   1  a check failed: the model's self-test, `edge doctor`, a node that is not ready
   2  usage
  65  bad data: nothing could be analysed, or the model file cannot be used
  69  a peer is down, or a port or the state folder is in use
  73  cannot write
  78  configuration: it has faults, names what cannot be read, or asks for what this CPU lacks";

/// How a command ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Exit {
    /// 0.
    Ok = 0,
    /// 1: a check failed.
    FailedCheck = 1,
    /// 2: usage.
    Usage = 2,
    /// 65: bad data.
    BadData = 65,
    /// 69: a peer is down, or something we need is in use.
    Unavailable = 69,
    /// 73: cannot write.
    CannotWrite = 73,
    /// 78: configuration.
    Configuration = 78,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// An error and the code that it ends the program with.
#[derive(Debug)]
pub(crate) struct Failure {
    /// The code.
    pub(crate) exit: Exit,
    /// What went wrong.
    pub(crate) error: anyhow::Error,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&said(&self.error))
    }
}

/// An error with its causes, from the outermost on. A cause that is quoted by its effect is not said twice.
pub(crate) fn said(error: &anyhow::Error) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !text.ends_with(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

/// Gives an error its exit code: `.map_err(failure(Exit::CannotWrite))`.
pub(crate) fn failure<E: Into<anyhow::Error>>(exit: Exit) -> impl Fn(E) -> Failure {
    move |error| Failure {
        exit,
        error: error.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cause_is_said_once() {
        #[derive(Debug, thiserror::Error)]
        #[error("disk: {0}")]
        struct Quoting(#[from] std::io::Error);
        let cause = || std::io::Error::other("worn out");
        let quoted = anyhow::Error::from(Quoting(cause())).context("spool");
        assert_eq!(said(&quoted), "spool: disk: worn out");
        let plain = anyhow::Error::from(cause()).context("spool");
        assert_eq!(said(&plain), "spool: worn out");
    }
}
