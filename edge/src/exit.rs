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
  78  configuration: it has faults, the model file cannot be read, or this CPU lacks the kernel asked for";

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
        write!(f, "{:#}", self.error)
    }
}

/// Gives an error its exit code: `.map_err(failure(Exit::CannotWrite))`.
pub(crate) fn failure<E: Into<anyhow::Error>>(exit: Exit) -> impl Fn(E) -> Failure {
    move |error| Failure {
        exit,
        error: error.into(),
    }
}
