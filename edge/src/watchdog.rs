//! The watchdog: kills a worker that is silent for too long.
//!
//! In: "armed" before each wait for the worker, "disarmed" after it. Out: SIGKILL to the process when an armed deadline passes; the
//! pipe then ends and whoever waits on it wakes up. A thread of its own, because a blocking read on a pipe has no deadline.
//! The process must not have been waited for while the watchdog is armed, so that its number is still its own.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

/// Watches one process until dropped.
#[derive(Debug)]
pub(crate) struct Watchdog {
    shared: Arc<Shared>,
    deadline: Duration,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// When to kill; `None` while disarmed.
    armed: Option<Instant>,
    /// When the thread wakes by itself; `None`: only when told.
    wakes: Option<Instant>,
    has_expired: bool,
    is_over: bool,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // No code that holds the lock can panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Watchdog {
    /// Watches `process`, disarmed.
    ///
    /// # Errors
    /// Where the system refuses a thread.
    pub(crate) fn start(process: Pid, deadline: Duration) -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let watched = Arc::clone(&shared);
        std::thread::Builder::new().spawn(move || watch(process, &watched))?;
        Ok(Self { shared, deadline })
    }

    /// From now on the deadline runs.
    pub(crate) fn arm(&self) {
        let until = Instant::now() + self.deadline;
        let mut state = self.shared.state();
        state.armed = Some(until);
        // A thread that wakes too early looks again; only one that sleeps for good must be told.
        if state.wakes.is_none() {
            self.shared.changed.notify_one();
        }
    }

    /// The deadline no longer runs. Whether it has expired.
    pub(crate) fn disarm(&self) -> bool {
        let mut state = self.shared.state();
        state.armed = None;
        state.has_expired
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.shared.state().is_over = true;
        self.shared.changed.notify_one();
    }
}

fn watch(process: Pid, shared: &Shared) {
    let mut state = shared.state();
    while !state.is_over {
        let now = Instant::now();
        if state.armed.is_some_and(|until| until <= now) {
            state.armed = None;
            state.has_expired = true;
            // An error means that it has ended in this moment: then there is nothing left to kill.
            kill_process(process, Signal::KILL).unwrap_or_default();
        }
        state.wakes = state.armed;
        state = match state.armed {
            None => {
                let woken = shared.changed.wait(state);
                woken.unwrap_or_else(PoisonError::into_inner)
            }
            Some(until) => {
                let woken = shared.changed.wait_timeout(state, until - now);
                woken.unwrap_or_else(PoisonError::into_inner).0
            }
        };
    }
}
