//! What is to be analysed again: slices that came while there was no sound model, or that another model has answered.
//!
//! In: sequences of the spool, each once. Out: the lowest. The store remembers them over a restart; here they wait for [`super::analysis`], which
//! takes them before anything new.

use std::collections::BTreeSet;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The sequences.
#[derive(Debug, Default)]
pub(crate) struct Again {
    waiting: Mutex<BTreeSet<u64>>,
}

impl Again {
    /// Adds sequences.
    pub(crate) fn ask(&self, sequences: &[u64]) {
        self.waiting().extend(sequences);
    }

    /// Takes the lowest.
    pub(crate) fn next(&self) -> Option<u64> {
        self.waiting().pop_first()
    }

    fn waiting(&self) -> MutexGuard<'_, BTreeSet<u64>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
