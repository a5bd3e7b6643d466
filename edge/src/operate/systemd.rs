//! What systemd is told: ready, reloading, stopping, and that the daemon is alive.
//!
//! The watchdog is fed only while work is done: [`Progress`] is asked with the counts of what waits and what is finished. Where something waits
//! and nothing is finished for [`STALL`], the feeding stops and systemd starts the daemon anew; what was acknowledged is on disk. Outside systemd
//! (no `NOTIFY_SOCKET`) all of this does nothing. Governs: sd_notify(3).

use std::time::{Duration, Instant};

use sd_notify::NotifyState;
use tokio::sync::watch;

/// How long something may wait while nothing is finished. Longer than a worker's deadline with its retry.
pub(crate) const STALL: Duration = Duration::from_secs(180);

/// Tells that the daemon accepts associations, with a word for `systemctl status`.
pub(crate) fn ready(status: &str) {
    tell(&[NotifyState::Ready, NotifyState::Status(status)]);
}

/// Tells that the configuration is read again; [`ready`] follows.
pub(crate) fn reloading() {
    match NotifyState::monotonic_usec_now() {
        Ok(now) => tell(&[NotifyState::Reloading, now]),
        Err(_) => tell(&[NotifyState::Reloading]),
    }
}

/// Tells that the daemon drains.
pub(crate) fn stopping() {
    tell(&[NotifyState::Stopping]);
}

/// Feeds the watchdog.
pub(crate) fn alive() {
    tell(&[NotifyState::Watchdog]);
}

/// How often to feed: a third of what the unit allows; `None` without a watchdog.
pub(crate) fn interval() -> Option<Duration> {
    let mut micros = 0;
    let is_enabled = sd_notify::watchdog_enabled(false, &mut micros);
    (is_enabled && micros > 0).then(|| Duration::from_micros(micros / 3))
}

/// Feeds the watchdog while work is done, until the node stops. `work` says what waits and what is finished.
pub(crate) async fn feed(mut stopping: watch::Receiver<bool>, work: impl Fn() -> (u64, u64)) {
    let Some(interval) = interval() else {
        return;
    };
    let mut progress = Progress::new(Instant::now());
    loop {
        let (n_waiting, n_finished) = work();
        if progress.is_made(n_waiting, n_finished, Instant::now()) {
            alive();
        } else {
            tracing::error!(n_waiting, "no progress; the watchdog is not fed");
        }
        tokio::select! {
            () = tokio::time::sleep(interval) => {}
            _ = stopping.wait_for(|is_stopping| *is_stopping) => return,
        }
    }
}

fn tell(states: &[NotifyState<'_>]) {
    // Where systemd cannot be told, it acts by its own deadlines.
    drop(sd_notify::notify(false, states));
}

/// Whether work is done.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Progress {
    n_finished: u64,
    since: Instant,
}

impl Progress {
    /// Nothing is finished yet.
    pub(crate) fn new(now: Instant) -> Self {
        Self {
            n_finished: 0,
            since: now,
        }
    }

    /// Whether something was finished lately, or nothing waits.
    pub(crate) fn is_made(&mut self, n_waiting: u64, n_finished: u64, now: Instant) -> bool {
        if n_waiting == 0 || n_finished != self.n_finished {
            self.n_finished = n_finished;
            self.since = now;
        }
        now.saturating_duration_since(self.since) < STALL
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_watchdog_starves_only_while_work_waits_and_none_is_done() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut progress = Progress::new(start);
        assert!(progress.is_made(0, 0, at(1_000)), "idle");
        assert!(progress.is_made(9, 0, at(1_100)), "just begun to wait");
        assert!(progress.is_made(9, 1, at(1_170)), "one done");
        assert!(progress.is_made(8, 1, at(1_349)));
        assert!(!progress.is_made(8, 1, at(1_350)), "stalled");
        assert!(progress.is_made(7, 2, at(1_351)), "again");
    }
}
