//! The wall clock, and whether anything may be deleted by it.
//!
//! In: the wall clock and the monotonic one, again and again. Out: what is too old ([`Ages`]), nothing while the wall clock cannot be right: before it
//! was set, and until it has gone as the monotonic one does for [`SETTLED`]. A board may start in 1970, or in 2031 until the network corrects it;
//! neither may cost a study. What is stamped with such a time counts from when the clock was right again. A board may also start at the time at
//! which it was switched off: what was stamped in a stretch of time that a jump ended counts from the jump. Such stretches, and the last time
//! that was right, are kept over a restart.

use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

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
/// A jump from which what was stamped before it counts; for a smaller one nothing goes sooner by more than this.
const FAR_JUMP_MS: i64 = 3_600_000;
/// Such jumps that are remembered; of more, the oldest become one.
const MAX_JUMPS: usize = 8;
/// How long a jump is remembered after what came before it was too old.
const FORGET_AFTER_MS: i64 = 86_400_000;
/// A clock that is so far ahead of the last time that was right is wrong, unless the system says that it is synchronised.
const FAR_AHEAD_MS: i64 = 366 * 86_400_000;
/// How exactly the last time that was right is kept.
const RIGHT_WITHIN_MS: i64 = 86_400_000;
/// What systemd-timesyncd makes when it has set the clock.
const SYNCHRONISED: &str = "/run/systemd/timesync/synchronized";

/// Whether a time can be right. A board without a battery-backed clock starts in 1970; by such a clock nothing is deleted.
pub(crate) fn is_clock_trusted(now_ms: i64) -> bool {
    (FIRST_TRUSTED_MS..LAST_TRUSTED_MS).contains(&now_ms)
}

/// The clock of a running node. It must be looked at more often than every few minutes.
#[derive(Debug, Default)]
pub(crate) struct Clock {
    state: Mutex<ClockState>,
    /// Where it is kept; nowhere without.
    path: Option<PathBuf>,
}

#[derive(Debug, Default)]
struct ClockState {
    seen: Option<Seen>,
    known: Known,
}

/// What is known of the clock over a restart.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Known {
    /// The last time that was right, within a day; 0 where there was none.
    right_ms: i64,
    /// Since when it is right, over restarts; 0 where it was wrong meanwhile.
    #[serde(default)]
    since_ms: i64,
    /// The oldest first.
    stretches: Vec<Stretch>,
}

/// A stretch of time, as the clock showed it, that a jump ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Stretch {
    from_ms: i64,
    until_ms: i64,
    jumped_to_ms: i64,
}

#[derive(Clone, Copy, Debug)]
struct Seen {
    wall_ms: i64,
    at: Instant,
    /// Since when there was no jump.
    since: Instant,
    /// What the clock showed then, or when the system started.
    from_ms: i64,
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
    stretches: [Stretch; MAX_JUMPS],
}

impl Clock {
    /// A clock that remembers in a folder. What cannot be read there is as if it had never been.
    pub(crate) fn open(folder: &Path) -> Self {
        let path = folder.join("clock.json");
        let read = fs::read(&path).ok();
        let known = read.and_then(|bytes| serde_json::from_slice(&bytes).ok());
        let (now_ms, now) = (unix_ms(), Instant::now());
        let seen = Seen {
            wall_ms: now_ms,
            at: now,
            since: now,
            // The node may have run before in this stretch.
            from_ms: now_ms.saturating_sub(milliseconds(uptime())),
        };
        let state = ClockState {
            seen: Some(seen),
            known: known.unwrap_or_default(),
        };
        Self {
            state: Mutex::new(state),
            path: Some(path),
        }
    }

    /// Whether a time can be right, by what is known.
    pub(crate) fn is_plausible(&self, now_ms: i64) -> bool {
        self.state()
            .known
            .is_plausible(now_ms, Path::new(SYNCHRONISED).exists())
    }

    /// Looks at the clocks. Out: what is too old; `None` while nothing may be deleted by age.
    pub(crate) fn ages(&self, retention: &Retention) -> Option<Ages> {
        let is_synchronised = Path::new(SYNCHRONISED).exists();
        self.ages_at(unix_ms(), Instant::now(), retention, is_synchronised)
    }

    fn ages_at(
        &self,
        now_ms: i64,
        now: Instant,
        retention: &Retention,
        is_synchronised: bool,
    ) -> Option<Ages> {
        let mut state = self.state();
        let (steady, jump) = state.look(now_ms, now);
        let mut is_news = jump.is_some();
        state.known.stretches.extend(jump);
        state.known.bound();
        let is_plausible = state.known.is_plausible(now_ms, is_synchronised);
        let is_right = steady >= SETTLED && is_plausible;
        let steady_from_ms = now_ms.saturating_sub(milliseconds(steady));
        is_news |= state.known.note(is_plausible, is_right, steady_from_ms);
        let max_age_ms = milliseconds(retention.max_age);
        let oldest_ms = now_ms.saturating_sub(max_age_ms);
        if is_right {
            // Whatever came before such a jump has gone by age.
            let gone_ms = oldest_ms.saturating_sub(FORGET_AFTER_MS);
            let stretches = &mut state.known.stretches;
            stretches.retain(|stretch| stretch.jumped_to_ms >= gone_ms);
        }
        let ages = is_right.then(|| Ages {
            oldest_ms,
            now_ms,
            since_ms: state.known.since_ms,
            stretches: state.known.padded(),
        });
        if is_right && now_ms.abs_diff(state.known.right_ms) >= RIGHT_WITHIN_MS.unsigned_abs() {
            state.known.right_ms = now_ms;
            is_news = true;
        }
        if is_news && let Some(path) = &self.path {
            // What is not kept is known until the node stops.
            if let Err(error) = state.known.write(path) {
                tracing::warn!(%error, "what is known of the clock is not kept");
            }
        }
        ages
    }

    /// From when on stamps tell an age: all do by a clock that is right; before, those since the system started or the clock jumped.
    pub(crate) fn ages_known_from_ms(&self, retention: &Retention) -> i64 {
        let ages = self.ages(retention);
        let from_ms = self.state().seen.map_or(i64::MAX, |seen| seen.from_ms);
        ages.map_or(from_ms, |_| i64::MIN)
    }

    fn state(&self) -> MutexGuard<'_, ClockState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ClockState {
    /// How long the clock has gone without a jump, and the stretch that a far one has just ended.
    fn look(&mut self, now_ms: i64, now: Instant) -> (Duration, Option<Stretch>) {
        let first = Seen {
            wall_ms: now_ms,
            at: now,
            since: now,
            from_ms: now_ms,
        };
        let seen = self.seen.unwrap_or(first);
        let passed = milliseconds(now.saturating_duration_since(seen.at));
        let until_ms = seen.wall_ms.saturating_add(passed);
        let jumped_ms = now_ms.saturating_sub(until_ms);
        let is_steady = jumped_ms.abs() < JUMP_MS;
        if !is_steady {
            tracing::warn!(
                seconds = jumped_ms / 1000,
                "the clock jumped: nothing is deleted by age for an hour"
            );
        }
        let kept = if is_steady { seen } else { first };
        self.seen = Some(Seen {
            wall_ms: now_ms,
            at: now,
            ..kept
        });
        let jump = (jumped_ms.abs() >= FAR_JUMP_MS).then_some(Stretch {
            from_ms: seen.from_ms,
            until_ms,
            jumped_to_ms: now_ms,
        });
        (now.saturating_duration_since(kept.since), jump)
    }
}

impl Known {
    fn is_plausible(&self, now_ms: i64, is_synchronised: bool) -> bool {
        let is_far_ahead = self.right_ms > 0 && now_ms > self.right_ms.saturating_add(FAR_AHEAD_MS);
        is_clock_trusted(now_ms) && (is_synchronised || !is_far_ahead)
    }

    /// Notes since when the clock is right. Whether that is news.
    fn note(&mut self, is_plausible: bool, is_right: bool, steady_from_ms: i64) -> bool {
        let is_known = (1..=steady_from_ms).contains(&self.since_ms);
        let since_ms = match (is_plausible, is_right) {
            (false, _) => 0,
            (true, true) if !is_known => steady_from_ms,
            (true, _) => self.since_ms,
        };
        std::mem::replace(&mut self.since_ms, since_ms) != since_ms
    }

    /// Makes one of the two oldest stretches where there are too many: what lies between them counts from the later jump too.
    fn bound(&mut self) {
        while self.stretches.len() > MAX_JUMPS {
            let oldest = self.stretches.remove(0);
            let next = &mut self.stretches[0];
            next.from_ms = next.from_ms.min(oldest.from_ms);
            next.until_ms = next.until_ms.max(oldest.until_ms);
            next.jumped_to_ms = next.jumped_to_ms.max(oldest.jumped_to_ms);
        }
    }

    /// The stretches; empty ones after them change nothing.
    fn padded(&self) -> [Stretch; MAX_JUMPS] {
        let mut padded = [Stretch::default(); MAX_JUMPS];
        for (to, from) in padded.iter_mut().zip(&self.stretches) {
            *to = *from;
        }
        padded
    }

    /// Whole or not at all.
    fn write(&self, path: &Path) -> io::Result<()> {
        let partial = path.with_extension("json.partial");
        let mut file = fs::File::create(&partial)?;
        file.write_all(&serde_json::to_vec(self)?)?;
        file.sync_all()?;
        fs::rename(partial, path)
    }
}

impl Ages {
    /// Whether what is stamped with a time is too old; `None` where the stamp cannot be right: from before the clock was set, or far ahead.
    pub(crate) fn is_too_old(self, stamp_ms: i64) -> Option<bool> {
        // A jump may have led to another wrong time.
        let counts_from_ms = self.stretches.iter().fold(stamp_ms, |from_ms, stretch| {
            let is_within = |ms| (stretch.from_ms..=stretch.until_ms).contains(&ms);
            if is_within(stamp_ms) || is_within(from_ms) {
                from_ms.max(stretch.jumped_to_ms)
            } else {
                from_ms
            }
        });
        let is_right = is_clock_trusted(counts_from_ms)
            && counts_from_ms <= self.now_ms.saturating_add(AHEAD_MS);
        is_right.then_some(counts_from_ms < self.oldest_ms)
    }

    /// Whether what is stamped with a time goes by age; what was stamped while the clock was wrong counts from when it was right.
    pub(crate) fn is_gone_by(self, stamp_ms: i64) -> bool {
        let is_old = self.is_too_old(stamp_ms);
        is_old.unwrap_or(self.since_ms < self.oldest_ms)
    }

    /// Whether a time has come that was fixed ahead of it. What had not come when the clock jumped is put off by the jump.
    pub(crate) fn has_come(self, until_ms: i64) -> bool {
        let put_off = self.stretches.iter().fold(until_ms, |until_ms, stretch| {
            if until_ms > stretch.until_ms {
                let jumped_ms = stretch.jumped_to_ms.saturating_sub(stretch.until_ms);
                until_ms.saturating_add(jumped_ms)
            } else {
                until_ms
            }
        });
        put_off <= self.now_ms
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
            stretches: [Stretch::default(); MAX_JUMPS],
        }
    }
}

/// How long the system has run.
fn uptime() -> Duration {
    let text = fs::read_to_string("/proc/uptime").unwrap_or_default();
    let seconds = text.split(' ').next().and_then(|text| text.parse().ok());
    seconds
        .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
        .unwrap_or_default()
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

    /// A clock that knows what another one has written to `path`.
    fn started_again(watched: &Watched, path: &Path) -> Watched {
        let known = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
        let state = ClockState {
            known,
            ..ClockState::default()
        };
        let clock = Clock {
            state: Mutex::new(state),
            path: Some(path.to_owned()),
        };
        Watched(clock, watched.1)
    }

    /// Looks at the clock `after` seconds, while it shows `wall_ms`. Out: whether anything may be deleted.
    struct Watched(Clock, Instant);

    impl Watched {
        fn look(&self, after: u64, wall_ms: i64) -> Option<Ages> {
            let now = self.1 + Duration::from_secs(after);
            self.0.ages_at(wall_ms, now, &retention(), false)
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
            ..Ages::before(0)
        };
        assert_eq!(ages.is_too_old(NOW_MS - 8 * DAY_MS), Some(true));
        assert_eq!(ages.is_too_old(NOW_MS - 7 * DAY_MS), Some(false));
        assert_eq!(ages.is_too_old(NOW_MS + DAY_MS), Some(false));
        assert_eq!(ages.is_too_old(NOW_MS + DAY_MS + 1), None);
        assert_eq!(ages.is_too_old(600_000), None);
    }

    #[test]
    fn what_came_on_a_clock_that_stood_counts_from_the_jump_to_the_right_time() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("clock.json");
        let clock = Clock {
            path: Some(path.clone()),
            ..Clock::default()
        };
        let watched = Watched(clock, Instant::now());
        let stale_ms = NOW_MS - 30 * DAY_MS;
        watched.look(0, stale_ms);
        watched.look(600, stale_ms + 600_000);
        watched.look(601, NOW_MS);
        let check = |watched: &Watched, after: u64| {
            let shown_ms = NOW_MS + after.cast_signed() * 1000 - 601_000;
            let ages = watched.look(after, shown_ms).unwrap();
            assert_eq!(ages.is_too_old(stale_ms + 300_000), Some(false));
            assert_eq!(ages.is_too_old(stale_ms - 1), Some(true), "from before");
            assert_eq!(ages.is_too_old(NOW_MS - 8 * DAY_MS), Some(true));
            // Promised on the wrong clock for three days.
            let until_ms = stale_ms + 300_000 + 3 * DAY_MS;
            assert!(!ages.has_come(until_ms));
            assert!(ages.has_come(stale_ms + 1), "ended before the jump");
        };
        check(&watched, 601 + 3600);
        // The same after a restart.
        let again = started_again(&watched, &path);
        again.look(5000, NOW_MS + 4_399_000);
        check(&again, 5000 + 3600);
        let later_ms = NOW_MS + 699_399_000;
        again.look(700_000, later_ms);
        let ages = again.look(703_600, later_ms + 3_600_000).unwrap();
        assert_eq!(ages.is_too_old(stale_ms + 300_000), Some(true));
        assert!(ages.has_come(stale_ms + 300_000 + 3 * DAY_MS));
    }

    #[test]
    fn a_clock_years_ahead_of_the_last_right_time_deletes_nothing_unless_synchronised() {
        let clock = watched();
        clock.look(0, NOW_MS);
        assert!(clock.look(3600, NOW_MS + 3_600_000).is_some());
        let wrong_ms = NOW_MS + 5 * 365 * DAY_MS;
        assert_eq!(clock.look(3601, wrong_ms), None);
        assert_eq!(clock.look(90_000, wrong_ms + 86_399_000), None);
        assert!(!clock.0.is_plausible(wrong_ms) || Path::new(SYNCHRONISED).exists());
        let now = clock.1 + Duration::from_secs(90_000);
        let ages = clock
            .0
            .ages_at(wrong_ms + 86_399_000, now, &retention(), true);
        assert!(ages.is_some());
    }

    #[test]
    fn the_clock_is_right_since_before_a_restart_unless_it_was_wrong_meanwhile() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("clock.json");
        let first = Watched(
            Clock {
                path: Some(path.clone()),
                ..Clock::default()
            },
            Instant::now(),
        );
        // Looks at the start and an hour later. Out: since when the clock is right.
        let since_ms = |watched: &Watched, after: u64, wall_ms: i64| {
            watched.look(after, wall_ms);
            let ages = watched.look(after + 3600, wall_ms + 3_600_000);
            ages.map(|ages| ages.since_ms)
        };
        assert_eq!(since_ms(&first, 0, NOW_MS), Some(NOW_MS));
        let day = |days: i64| NOW_MS + days * DAY_MS;
        let again = started_again(&first, &path);
        assert_eq!(since_ms(&again, 90_000, day(1)), Some(NOW_MS));
        // What came on this one and has a stamp of 1970 counts from when the clock is right after it.
        let wrong = started_again(&first, &path);
        assert_eq!(since_ms(&wrong, 180_000, 600_000), None);
        let right = started_again(&first, &path);
        assert_eq!(since_ms(&right, 270_000, day(3)), Some(day(3)));
        let again = started_again(&first, &path);
        assert_eq!(since_ms(&again, 360_000, day(4)), Some(day(3)));
    }

    #[test]
    fn jumps_without_end_are_bounded_and_make_nothing_older() {
        let clock = watched();
        for jump in 0..20_u64 {
            let shown_ms = NOW_MS + jump.cast_signed() * DAY_MS;
            clock.look(jump * 60, shown_ms);
        }
        let ages = clock.look(5000, NOW_MS + 19 * DAY_MS + 3_860_000).unwrap();
        assert_eq!(ages.is_too_old(NOW_MS), Some(false));
        assert_eq!(ages.is_too_old(NOW_MS - 1), Some(true));
    }
}
