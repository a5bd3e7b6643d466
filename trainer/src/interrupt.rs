//! Ctrl-C: the first asks the running stage to save and stop, the second ends the process.
#![expect(
    unsafe_code,
    reason = "a signal handler; the crates that wrap it rebuild every dependency for one call"
)]

use std::sync::atomic::{AtomicBool, Ordering};

/// Whether Ctrl-C was pressed since [`watch`].
static IS_ASKED: AtomicBool = AtomicBool::new(false);

extern "C" fn ask(_signal: libc::c_int) {
    // Storing to an atomic is all that a signal handler may do here.
    IS_ASKED.store(true, Ordering::Relaxed);
}

/// Watches for SIGINT and SIGTERM from now on; returns what becomes true with the first of them. The handler then
/// removes itself, so that the second ends the process at once.
///
/// # Errors
/// What the system answers.
pub fn watch() -> std::io::Result<&'static AtomicBool> {
    for signal in [libc::SIGINT, libc::SIGTERM] {
        // SAFETY: an all-zero sigaction is a valid one: no flags, an empty mask, the default handler.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = ask as *const () as usize;
        action.sa_flags = libc::SA_RESETHAND | libc::SA_RESTART;
        // SAFETY: `action` is initialised and its handler is async-signal-safe.
        if unsafe { libc::sigaction(signal, &raw const action, std::ptr::null_mut()) } != 0 {
            return Err(std::io::Error::last_os_error());
        }
    }
    Ok(&IS_ASKED)
}
