//! The wall clock, and whether anything may be deleted by it.
//!
//! In: the wall clock and the monotonic one, again and again. Out: what is too old ([`Ages`]), nothing while the wall clock cannot be right: before it
//! was set, and until it has gone as the monotonic one does for [`SETTLED`]. A board may start in 1970, or in 2031 until the network corrects it;
//! neither may cost a study. What is stamped with such a time counts from when the clock was right again.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::unix_ms;
use crate::config::Retention;

/// Before this time a clock was never set: 2025-01-01.
const FIRST_TRUSTED_MS: i64 = 1_735_689_600_000;
/// After this time it was set wrongly: 2100-01-01.
const LAST_TRUSTED_MS: i64 = 4_102_444_800_000;
/// How long the clock must have gone without a jump before anything is deleted by it.
const SETTLED: Duration = Duration::from_secs(3600);
/// A difference to the monotonic clock that is a jump; adjusting a clock gradually makes less between two looks.
const JUMP_MS: i64 = 60_000;
/// What is stamped further ahead than this was stamped by a wrong clock.
const AHEAD_MS: i64 = 86_400_000;

/// Whether a time can be right. A board without a battery-backed clock starts in 1970; by such a clock nothing is deleted.
pub(crate) fn is_clock_trusted(now_ms: i64) -> bool {
    (FIRST_TRUSTED_MS..LAST_TRUSTED_MS).contains(&now_ms)
}

/// The clock of a running node. It must be looked at more often than every few minutes.
#[derive(Debug, Default)]
pub(crate) struct Clock {
    seen: Mutex<Option<Seen>>,
}

#[derive(Clone, Copy, Debug)]
struct Seen {
    wall_ms: i64,
    at: Instant,
    /// Since when there was no jump.
    since: Instant,
}

/// What is too old by a clock that is right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ages {
    /// What is older is too old, Unix time in ms.
    pub(crate) oldest_ms: i64,
    /// Now.
    pub(crate) now_ms: i64,
    /// Since when the clock is right.
    pub(crate) since_ms: i64,
}

impl Clock {
    /// Looks at the clocks. Out: what is too old; `None` while nothing may be deleted by age.
    pub(crate) fn ages(&self, retention: &Retention) -> Option<Ages> {
        self.ages_at(unix_ms(), Instant::now(), retention)
    }

    fn ages_at(&self, now_ms: i64, now: Instant, retention: &Retention) -> Option<Ages> {
        let steady = self.steady(now_ms, now);
        let max_age_ms = i64::try_from(retention.max_age.as_millis()).unwrap_or(i64::MAX);
        (is_clock_trusted(now_ms) && steady >= SETTLED).then(|| Ages {
            oldest_ms: now_ms.saturating_sub(max_age_ms),
            now_ms,
            since_ms: now_ms.saturating_sub(milliseconds(steady)),
        })
    }

    /// How long the clock has gone without a jump.
    fn steady(&self, now_ms: i64, now: Instant) -> Duration {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let jumped_ms = seen.map_or(0, |seen| {
            let passed = milliseconds(now.saturating_duration_since(seen.at));
            now_ms.saturating_sub(seen.wall_ms).saturating_sub(passed)
        });
        let is_steady = jumped_ms.abs() < JUMP_MS;
        if !is_steady {
            tracing::warn!(
                seconds = jumped_ms / 1000,
                "the clock jumped: nothing is deleted by age for an hour"
            );
        }
        let since = seen.map_or(now, |seen| if is_steady { seen.since } else { now });
        *seen = Some(Seen {
            wall_ms: now_ms,
            at: now,
            since,
        });
        now.saturating_duration_since(since)
    }
}

impl Ages {
    /// Whether what is stamped with a time is too old; `None` where the stamp cannot be right: from before the clock was set, or far ahead.
    pub(crate) fn is_too_old(self, stamp_ms: i64) -> Option<bool> {
        let is_right =
            is_clock_trusted(stamp_ms) && stamp_ms <= self.now_ms.saturating_add(AHEAD_MS);
        is_right.then_some(stamp_ms < self.oldest_ms)
    }
}

#[cfg(test)]
impl Ages {
    /// By a clock that has just become right: what is from before `oldest_ms` is too old.
    pub(crate) fn before(oldest_ms: i64) -> Self {
        Self {
            oldest_ms,
            now_ms: oldest_ms + 1000,
            since_ms: oldest_ms + 1000,
        }
    }
}

fn milliseconds(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW_MS: i64 = 1_790_000_000_000;
    const DAY_MS: i64 = 86_400_000;

    fn retention() -> Retention {
        Retention {
            max_age: Duration::from_secs(7 * 86_400),
            keep_free_bytes: 0,
            quota_bytes: 0,
        }
    }

    /// Looks at the clock `after` seconds, while it shows `wall_ms`. Out: whether anything may be deleted.
    struct Watched(Clock, Instant);

    impl Watched {
        fn look(&self, after: u64, wall_ms: i64) -> Option<Ages> {
            let now = self.1 + Duration::from_secs(after);
            self.0.ages_at(wall_ms, now, &retention())
        }
    }

    fn watched() -> Watched {
        Watched(Clock::default(), Instant::now())
    }

    #[test]
    fn nothing_goes_by_age_while_the_clock_is_not_set() {
        for wall_ms in [0, 3_600_000, FIRST_TRUSTED_MS - 7_200_001, LAST_TRUSTED_MS] {
            let clock = watched();
            assert_eq!(clock.look(0, wall_ms), None);
            assert_eq!(clock.look(7200, wall_ms + 7_200_000), None);
        }
    }

    #[test]
    fn nothing_goes_by_age_within_an_hour_of_a_start_or_of_a_jump() {
        let clock = watched();
        assert_eq!(clock.look(0, NOW_MS), None);
        assert_eq!(clock.look(3599, NOW_MS + 3_599_000), None);
        let ages = clock.look(3600, NOW_MS + 3_600_000).unwrap();
        assert_eq!(ages.oldest_ms, NOW_MS + 3_600_000 - 7 * DAY_MS);
        assert_eq!(ages.since_ms, NOW_MS);
        // Five years ahead, then back.
        let wrong_ms = NOW_MS + 5 * 365 * DAY_MS;
        assert_eq!(clock.look(3601, wrong_ms), None);
        assert_eq!(clock.look(3700, wrong_ms + 99_000), None);
        assert_eq!(clock.look(3701, NOW_MS + 3_701_000), None);
        assert_eq!(clock.look(7300, NOW_MS + 7_300_000), None);
        let ages = clock.look(7301, NOW_MS + 7_301_000).unwrap();
        assert_eq!(ages.since_ms, NOW_MS + 3_701_000);
    }

    #[test]
    fn a_clock_that_is_adjusted_gradually_has_not_jumped() {
        let clock = watched();
        // A twelfth faster, as chrony does it at most.
        let looks =
            (0..400_u64).map(|minute| (minute * 60, NOW_MS + minute.cast_signed() * 65_000));
        let last = looks.map(|(after, wall_ms)| clock.look(after, wall_ms));
        assert!(last.last().unwrap().is_some());
    }

    #[test]
    fn a_stamp_of_a_wrong_clock_says_nothing_of_an_age() {
        let ages = Ages {
            oldest_ms: NOW_MS - 7 * DAY_MS,
            now_ms: NOW_MS,
            since_ms: NOW_MS,
        };
        assert_eq!(ages.is_too_old(NOW_MS - 8 * DAY_MS), Some(true));
        assert_eq!(ages.is_too_old(NOW_MS - 7 * DAY_MS), Some(false));
        assert_eq!(ages.is_too_old(NOW_MS + DAY_MS), Some(false));
        assert_eq!(ages.is_too_old(NOW_MS + DAY_MS + 1), None);
        assert_eq!(ages.is_too_old(600_000), None);
    }
}
