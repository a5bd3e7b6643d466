//! Time that the calling thread has spent on a CPU, so that a measurement holds on a machine that others use too.
#![allow(
    unsafe_code,
    reason = "one system call without a safe wrapper among the dependencies"
)]

use std::time::Duration;

/// CPU time of the calling thread since it started (POSIX `clock_gettime`, `CLOCK_THREAD_CPUTIME_ID`); zero where refused.
pub(crate) fn cpu_time() -> Duration {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the pointer is to a timespec of ours that outlives the call.
    let failed = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    match (
        failed,
        u64::try_from(time.tv_sec),
        u32::try_from(time.tv_nsec),
    ) {
        (0, Ok(seconds), Ok(nanoseconds)) => Duration::new(seconds, nanoseconds),
        _ => Duration::ZERO,
    }
}
