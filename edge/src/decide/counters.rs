//! Counts of what was decided, for status, metrics and the watchdog of the service.
//!
//! In: one call an event. Out: numbers since the start of the process. Reading never waits.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use crate::operate::metrics::Seconds;

/// The counts.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    n_analysed: AtomicU64,
    n_not_analysed: AtomicU64,
    n_recognised: AtomicU64,
    n_unassigned: AtomicU64,
    n_store_failures: AtomicU64,
    n_beats: AtomicU64,
    cursor: AtomicU64,
    n_open_studies: AtomicU64,
    n_workers_replaced: AtomicU64,
    is_unconfined: AtomicBool,
    /// Time of the network for one slice.
    pub(crate) inference_seconds: Seconds,
}

/// The counts at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    /// Slices that were analysed.
    pub(crate) n_analysed: u64,
    /// Slices that were not.
    pub(crate) n_not_analysed: u64,
    /// Of the analysed ones, those that came before with the same pixels: no inference.
    pub(crate) n_recognised: u64,
    /// Objects that name no study.
    pub(crate) n_unassigned: u64,
    /// Times the results database failed.
    pub(crate) n_store_failures: u64,
    /// Turns of the decider: stands still only where it hangs.
    pub(crate) n_beats: u64,
    /// Sequence of the spool up to which everything is decided.
    pub(crate) cursor: u64,
    /// Studies that are not complete.
    pub(crate) n_open_studies: u64,
    /// Workers that died or hung and were replaced.
    pub(crate) n_workers_replaced: u64,
    /// Whether the worker runs without its seccomp filter.
    pub(crate) is_unconfined: bool,
}

impl Counters {
    pub(super) fn slice(&self, is_analysed: bool) {
        let count = if is_analysed {
            &self.n_analysed
        } else {
            &self.n_not_analysed
        };
        count.fetch_add(1, Relaxed);
    }

    pub(super) fn recognised(&self) {
        self.n_recognised.fetch_add(1, Relaxed);
    }

    pub(super) fn unassigned(&self) {
        self.n_unassigned.fetch_add(1, Relaxed);
    }

    pub(super) fn store_failed(&self) {
        self.n_store_failures.fetch_add(1, Relaxed);
    }

    pub(super) fn beat(&self) {
        self.n_beats.fetch_add(1, Relaxed);
    }

    pub(super) fn reached(&self, cursor: u64, n_open_studies: usize) {
        self.cursor.store(cursor, Relaxed);
        self.n_open_studies.store(n_open_studies as u64, Relaxed);
    }

    pub(super) fn workers_replaced(&self, n_replaced: u64) {
        self.n_workers_replaced.store(n_replaced, Relaxed);
    }

    pub(super) fn confined(&self, is_confined: bool) {
        self.is_unconfined.store(!is_confined, Relaxed);
    }

    /// The counts now.
    pub(crate) fn counts(&self) -> Counts {
        Counts {
            n_analysed: self.n_analysed.load(Relaxed),
            n_not_analysed: self.n_not_analysed.load(Relaxed),
            n_recognised: self.n_recognised.load(Relaxed),
            n_unassigned: self.n_unassigned.load(Relaxed),
            n_store_failures: self.n_store_failures.load(Relaxed),
            n_beats: self.n_beats.load(Relaxed),
            cursor: self.cursor.load(Relaxed),
            n_open_studies: self.n_open_studies.load(Relaxed),
            n_workers_replaced: self.n_workers_replaced.load(Relaxed),
            is_unconfined: self.is_unconfined.load(Relaxed),
        }
    }
}
