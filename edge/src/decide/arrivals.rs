//! When objects arrived, by the monotonic clock: what quiet time is counted from.
//!
//! In: the spool's highest durable sequence, whenever it grows. Out: the moment at which a sequence was there at the latest, and whether
//! everything that was there at some moment has been decided. Wall-clock time plays no part (a board may have none). Memory is
//! bounded: with a long backlog, moments become coarser, always towards later ones, so that no study ends too early.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Most moments kept.
const MAX_MARKS: usize = 4_096;

/// The moments.
#[derive(Debug)]
pub(crate) struct Arrivals {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    /// Moments at which the sequence was durable; both rise.
    marks: VecDeque<(u64, Instant)>,
    latest: u64,
    is_closed: bool,
}

impl Arrivals {
    /// Everything up to `latest` was there at `now`.
    pub(crate) fn new(latest: u64, now: Instant) -> Self {
        Self {
            state: Mutex::new(State {
                marks: VecDeque::from([(latest, now)]),
                latest,
                is_closed: false,
            }),
            changed: Condvar::new(),
        }
    }

    /// Everything up to `latest` is there at `now`.
    pub(crate) fn note(&self, latest: u64, now: Instant) {
        let mut state = self.state();
        if latest <= state.latest {
            return;
        }
        state.latest = latest;
        if state.marks.len() >= MAX_MARKS {
            let mut index = 0;
            // The later of each pair stays: its moment holds for the earlier sequence, too.
            state.marks.retain(|_| {
                index += 1;
                index % 2 == 0
            });
        }
        state.marks.push_back((latest, now));
        self.changed.notify_all();
    }

    /// When the sequence was there at the latest; `now` for one that has not been noted.
    pub(crate) fn moment(&self, sequence: u64, now: Instant) -> Instant {
        let state = self.state();
        let at = state.marks.partition_point(|&(mark, _)| mark < sequence);
        state.marks.get(at).map_or(now, |&(_, moment)| moment)
    }

    /// Whether everything that had arrived by `moment` is decided when everything up to `cursor` is. Forgets what is not needed any more.
    pub(crate) fn is_decided(&self, moment: Instant, cursor: u64) -> bool {
        let mut state = self.state();
        // The mark at the cursor itself tells nothing about what is left.
        while state.marks.front().is_some_and(|&(mark, _)| mark <= cursor) {
            state.marks.pop_front();
        }
        state.marks.front().is_none_or(|&(_, first)| first > moment)
    }

    /// The highest sequence.
    pub(crate) fn latest(&self) -> u64 {
        self.state().latest
    }

    /// Waits until there is a sequence above `sequence`, for at most `patience`. Whether more may come.
    pub(crate) fn wait_beyond(&self, sequence: u64, patience: Duration) -> bool {
        let is_waiting = |state: &mut State| !state.is_closed && state.latest <= sequence;
        let waited = self
            .changed
            .wait_timeout_while(self.state(), patience, is_waiting);
        !waited.unwrap_or_else(PoisonError::into_inner).0.is_closed
    }

    /// Whether more may come.
    pub(crate) fn is_open(&self) -> bool {
        !self.state().is_closed
    }

    /// Whoever waits shall stop.
    pub(crate) fn close(&self) {
        self.state().is_closed = true;
        self.changed.notify_all();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_backlog_does_not_move_the_moment_of_arrival() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let arrivals = Arrivals::new(10, at(0));
        arrivals.note(20, at(5));
        arrivals.note(30, at(9));
        // Decided only at 60 s, but there since 5 s.
        assert_eq!(arrivals.moment(11, at(60)), at(5));
        assert_eq!(arrivals.moment(20, at(60)), at(5));
        assert_eq!(arrivals.moment(21, at(60)), at(9));
        assert_eq!(arrivals.moment(31, at(60)), at(60));
    }

    #[test]
    fn a_study_waits_for_what_arrived_before_its_quiet_time_was_over() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let arrivals = Arrivals::new(10, at(0));
        arrivals.note(20, at(5));
        arrivals.note(30, at(9));
        assert!(!arrivals.is_decided(at(8), 15));
        assert!(arrivals.is_decided(at(8), 20));
        assert!(!arrivals.is_decided(at(9), 20));
        assert!(arrivals.is_decided(at(9), 30));
    }

    #[test]
    fn moments_are_bounded_and_only_become_later() {
        let start = Instant::now();
        let arrivals = Arrivals::new(0, start);
        let millis = |sequence| start + Duration::from_millis(sequence);
        for sequence in 1..=20_000 {
            arrivals.note(sequence, millis(sequence));
        }
        assert!(arrivals.state().marks.len() <= MAX_MARKS);
        for sequence in [1, 777, 10_001, 20_000] {
            assert!(arrivals.moment(sequence, start) >= millis(sequence));
        }
    }
}
