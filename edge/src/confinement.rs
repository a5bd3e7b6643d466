//! The worker's confinement: a seccomp filter after which the process can do nothing but read its input, write its output, take memory, and end.
//!
//! In: nothing. Out: a filter that holds for every thread (seccomp(2), `SECCOMP_FILTER_FLAG_TSYNC`); a system call outside [`ALLOWED`] ends the
//! process, which [`crate::supervisor`] notices. Memory may not become executable, and no file can be mapped. Kernels and emulators without seccomp
//! leave the worker with its resource limits alone; the supervisor looks and says so.

use std::collections::BTreeMap;
use std::io;

use seccompiler::{
    BpfProgram, Error, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch,
};

/// System calls without conditions on their arguments: memory, waiting for threads, signals' ends, time, randomness for hash maps, the end.
const ALLOWED: [i64; 15] = [
    libc::SYS_brk,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_futex,
    libc::SYS_sched_yield,
    libc::SYS_rt_sigreturn,
    libc::SYS_rt_sigprocmask,
    libc::SYS_sigaltstack,
    libc::SYS_restart_syscall,
    libc::SYS_clock_gettime,
    libc::SYS_getrandom,
    libc::SYS_set_robust_list,
    libc::SYS_exit,
    libc::SYS_exit_group,
];
/// Reading and writing calls with the descriptors that they may use: standard input, output and error.
const STREAMS: [(i64, &[u64]); 4] = [
    (libc::SYS_read, &[0]),
    (libc::SYS_readv, &[0]),
    (libc::SYS_write, &[1, 2]),
    (libc::SYS_writev, &[1, 2]),
];
/// `PROT_EXEC` of mmap(2) and mprotect(2), the third argument of both.
const PROT_EXEC: u64 = 4;
/// `MAP_ANONYMOUS` of mmap(2), in its fourth argument.
const MAP_ANONYMOUS: u64 = 0x20;

/// Confines the whole process.
///
/// # Errors
/// The filter cannot be set although the kernel knows such filters.
pub(crate) fn confine() -> io::Result<()> {
    let program = filter(SeccompAction::KillProcess).map_err(io::Error::other)?;
    match seccompiler::apply_filter_all_threads(&program) {
        Ok(()) => Ok(()),
        Err(Error::Seccomp(error) | Error::Prctl(error)) if is_unknown(&error) => Ok(()),
        Err(error) => Err(io::Error::other(error)),
    }
}

/// Whether the system says that it knows no filters.
fn is_unknown(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EINVAL))
}

/// The filter; what it does not allow ends in `otherwise`.
fn filter(otherwise: SeccompAction) -> Result<BpfProgram, Error> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
        ALLOWED.iter().map(|&call| (call, Vec::new())).collect();
    for (call, descriptors) in STREAMS {
        let of = |&descriptor: &u64| rule(&[(0, SeccompCmpOp::Eq, descriptor)]);
        rules.insert(call, descriptors.iter().map(of).collect::<Result<_, _>>()?);
    }
    let not_executable = (2, SeccompCmpOp::MaskedEq(PROT_EXEC), 0);
    let anonymous = (3, SeccompCmpOp::MaskedEq(MAP_ANONYMOUS), MAP_ANONYMOUS);
    rules.insert(
        libc::SYS_mprotect,
        vec![rule(std::slice::from_ref(&not_executable))?],
    );
    rules.insert(libc::SYS_mmap, vec![rule(&[not_executable, anonymous])?]);
    let architecture = TargetArch::try_from(std::env::consts::ARCH)?;
    let filter = SeccompFilter::new(rules, otherwise, SeccompAction::Allow, architecture)?;
    Ok(filter.try_into()?)
}

fn rule(conditions: &[(u8, SeccompCmpOp, u64)]) -> Result<SeccompRule, Error> {
    let conditions = conditions.iter().map(|(argument, operator, value)| {
        SeccompCondition::new(*argument, SeccompCmpArgLen::Dword, operator.clone(), *value)
    });
    Ok(SeccompRule::new(conditions.collect::<Result<_, _>>()?)?)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::net::TcpListener;

    use super::*;

    /// What a thread can do behind the filter, where what is not allowed is an error instead of the end.
    fn behind_the_filter<T: Send>(work: impl FnOnce() -> T + Send) -> Option<T> {
        let confined = || {
            let program = filter(SeccompAction::Errno(libc::EPERM.cast_unsigned())).unwrap();
            // Emulators know no filters.
            seccompiler::apply_filter(&program).ok()?;
            Some(work())
        };
        std::thread::scope(|scope| scope.spawn(confined).join().unwrap())
    }

    fn is_refused<T>(done: io::Result<T>) -> bool {
        done.is_err_and(|error| error.kind() == io::ErrorKind::PermissionDenied)
    }

    #[test]
    fn files_sockets_and_programs_are_out_of_reach() {
        let folder = tempfile::tempdir().unwrap();
        let never = folder.path().join("never");
        let refused = behind_the_filter(|| {
            [
                is_refused(File::open("/dev/null")),
                is_refused(File::create(&never)),
                is_refused(TcpListener::bind("127.0.0.1:0")),
                is_refused(std::process::Command::new("/bin/true").status()),
            ]
        });
        assert!(
            refused.is_none_or(|refused| refused == [true; 4]),
            "{refused:?}"
        );
    }

    #[test]
    fn memory_can_be_had() {
        let sum = behind_the_filter(|| {
            let sizes = [1 << 10, 1 << 18, 1 << 24];
            let sum = |size| {
                vec![1_u8; size]
                    .iter()
                    .map(|&byte| usize::from(byte))
                    .sum::<usize>()
            };
            sizes.map(sum).iter().sum::<usize>()
        });
        assert!(sum.is_none_or(|sum| sum == (1 << 10) + (1 << 18) + (1 << 24)));
    }
}
