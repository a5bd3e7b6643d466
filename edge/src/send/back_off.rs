//! When a letter, or a receiver that is down, is tried again: after a time that doubles up to a bound, by the monotonic clock.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

use tokio::time::Instant;

/// How patient we are.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Patience {
    /// Pause after the first failure.
    pub(crate) first: Duration,
    /// Longest pause.
    pub(crate) longest: Duration,
    /// Longest time for one exchange.
    pub(crate) deadline: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            first: Duration::from_secs(1),
            longest: Duration::from_secs(300),
            deadline: Duration::from_secs(60),
        }
    }
}

/// What failed lately, in memory only: after a start everything is tried at once.
#[derive(Debug, Default)]
pub(crate) struct BackOff {
    letters: HashMap<u64, Failures>,
    receiver: Option<Failures>,
}

#[derive(Clone, Copy, Debug)]
struct Failures {
    count: u32,
    until: Instant,
}

impl BackOff {
    /// How long until a letter may be tried; zero: now.
    pub(crate) fn pause(&self, sequence: u64, now: Instant) -> Duration {
        let letter = self.letters.get(&sequence);
        let until = letter.into_iter().chain(&self.receiver);
        let until = until.map(|failures| failures.until).max();
        until.map_or(Duration::ZERO, |until| until.saturating_duration_since(now))
    }

    /// A letter failed.
    pub(crate) fn letter_failed(&mut self, sequence: u64, patience: &Patience) {
        let earlier = self.letters.get(&sequence).copied();
        self.letters.insert(sequence, failed(earlier, patience));
    }

    /// The receiver did not answer.
    pub(crate) fn receiver_failed(&mut self, patience: &Patience) {
        self.receiver = Some(failed(self.receiver, patience));
    }

    /// The receiver answered.
    pub(crate) fn receiver_answered(&mut self) {
        self.receiver = None;
    }

    /// Forgets all letters but those that still wait.
    pub(crate) fn keep(&mut self, is_waiting: impl Fn(u64) -> bool) {
        self.letters.retain(|sequence, _| is_waiting(*sequence));
    }
}

fn failed(earlier: Option<Failures>, patience: &Patience) -> Failures {
    let count = earlier.map_or(0, |failures| failures.count) + 1;
    Failures {
        count,
        until: Instant::now() + pause_after(count, patience),
    }
}

/// `first` doubled with every failure, at most `longest`, less up to a quarter by chance: receivers that come back are not met by all at once.
fn pause_after(count: u32, patience: &Patience) -> Duration {
    let doubled = patience.first.saturating_mul(1 << (count - 1).min(20));
    let chance = RandomState::new().hash_one(count) % 256;
    let pause = doubled.min(patience.longest);
    pause - pause / 1024 * u32::try_from(chance).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_the_longest_and_vary_by_a_quarter() {
        let patience = Patience::default();
        for (count, seconds) in [
            (1, 1),
            (2, 2),
            (5, 16),
            (9, 256),
            (10, 300),
            (u32::MAX, 300),
        ] {
            for _ in 0..20 {
                let pause = pause_after(count, &patience);
                let full = Duration::from_secs(seconds);
                assert!(pause <= full && pause >= full * 3 / 4, "{count}: {pause:?}");
            }
        }
    }

    #[test]
    fn a_receiver_that_is_down_holds_all_letters_and_a_letter_only_itself() {
        let mut back_off = BackOff::default();
        let patience = Patience::default();
        let now = Instant::now();
        back_off.letter_failed(1, &patience);
        assert!(back_off.pause(1, now) > Duration::ZERO);
        assert_eq!(back_off.pause(2, now), Duration::ZERO);
        back_off.receiver_failed(&patience);
        assert!(back_off.pause(2, now) > Duration::ZERO);
        back_off.receiver_answered();
        assert_eq!(back_off.pause(2, now), Duration::ZERO);
        back_off.keep(|sequence| sequence != 1);
        assert_eq!(back_off.pause(1, now), Duration::ZERO);
    }
}
