//! How this program starts itself again as its worker.
//!
//! In: the process's own facts under `/proc` (proc(5)). Out: a command. Natively that is the program's own path. Under a user-mode emulator
//! (qemu-user, as the tests for other CPUs use it) the kernel cannot run the program by itself; the emulator shows the guest its
//! own idea of `/proc/self`, but not of `/proc/thread-self`, where the emulator's command line stands: the worker is then started
//! through the same emulator with the same options.
//!
//! A process that is killed in the middle of this leaves a child that holds its locks until it has become a worker: [`until_let_go`].

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long a lock is waited for that a killed process may have left with a child.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);

/// Environment variables that an emulator reads begin with this.
const EMULATOR_PREFIX: &[u8] = b"QEMU_";

/// A command that runs this program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Launch {
    /// What is executed.
    pub(crate) program: PathBuf,
    /// Arguments before the program's own.
    pub(crate) arguments: Vec<OsString>,
    /// Environment to keep.
    pub(crate) environment: Vec<(OsString, OsString)>,
}

/// How to run this program again.
///
/// # Errors
/// Where the system does not tell the program's path.
pub(crate) fn launch() -> io::Result<Launch> {
    let program = std::env::current_exe()?;
    let executed = fs::read_link("/proc/thread-self/exe");
    let command_line = fs::read("/proc/thread-self/cmdline");
    match (executed, command_line, std::env::args_os().next()) {
        (Ok(executed), Ok(command_line), Some(name)) if executed != program => {
            let is_kept =
                |(key, _): &(OsString, OsString)| key.as_bytes().starts_with(EMULATOR_PREFIX);
            let environment = std::env::vars_os().filter(is_kept).collect();
            Ok(Launch {
                environment,
                ..through(executed, &command_line, &name, &program)
            })
        }
        _ => Ok(native(program)),
    }
}

/// Takes what only one process may have, such as a locked folder. A child between fork and exec has a copy of every descriptor of its parent,
/// and with them its locks (flock(2)), also when that parent has just been killed: what is held is tried again for a moment.
///
/// # Errors
/// Those of the last attempt.
pub(crate) fn until_let_go<T, E>(
    mut attempt: impl FnMut() -> Result<T, E>,
    is_held: impl Fn(&E) -> bool,
) -> Result<T, E> {
    let start = Instant::now();
    loop {
        match attempt() {
            Err(error) if is_held(&error) && start.elapsed() < LOCK_PATIENCE => {
                std::thread::sleep(Duration::from_millis(10));
            }
            done => return done,
        }
    }
}

fn native(program: PathBuf) -> Launch {
    Launch {
        program,
        arguments: Vec::new(),
        environment: Vec::new(),
    }
}

/// The command through `emulator`, whose own command line holds the program as `name`.
fn through(emulator: PathBuf, command_line: &[u8], name: &OsStr, program: &Path) -> Launch {
    let words: Vec<&[u8]> = command_line.split(|byte| *byte == 0).collect();
    let options = words.iter().skip(1);
    let n_options = options.clone().position(|word| *word == name.as_bytes());
    match n_options {
        None => native(program.to_owned()),
        Some(n_options) => {
            let options = options.take(n_options);
            let mut arguments: Vec<OsString> = options
                .map(|option| OsString::from_vec(option.to_vec()))
                .collect();
            arguments.push(program.into());
            Launch {
                program: emulator,
                arguments,
                environment: Vec::new(),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn natively_the_program_starts_itself() {
        let found = launch().unwrap();
        if found.arguments.is_empty() {
            assert_eq!(found.program, std::env::current_exe().unwrap());
        } else {
            assert_eq!(
                found.arguments.last().unwrap(),
                std::env::current_exe().unwrap().as_os_str()
            );
        }
    }

    #[test]
    fn an_emulators_options_are_repeated() {
        let line = b"qemu-aarch64\0-L\0/usr/sysroot\0-cpu\0cortex-a72\0./edge\0classify\0./edge\0";
        let found = through(
            "/usr/bin/qemu".into(),
            line,
            OsStr::new("./edge"),
            Path::new("/x/edge"),
        );
        assert_eq!(found.program, Path::new("/usr/bin/qemu"));
        assert_eq!(
            found.arguments,
            ["-L", "/usr/sysroot", "-cpu", "cortex-a72", "/x/edge"]
        );
    }

    #[test]
    fn an_unknown_command_line_is_left_alone() {
        let found = through(
            "/usr/bin/loader".into(),
            b"loader\0other\0",
            OsStr::new("./edge"),
            Path::new("/x/edge"),
        );
        assert_eq!(found, native("/x/edge".into()));
    }
}
