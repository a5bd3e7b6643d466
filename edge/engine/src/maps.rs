//! A feature map between threads.

use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// The rows of one feature map, each behind its own lock: writers and readers never meet, the barrier sees to that.
#[derive(Debug)]
pub(crate) struct FeatureMap<T> {
    rows: Vec<RwLock<Vec<T>>>,
}

impl<T: Copy + Default> FeatureMap<T> {
    /// Rows of zeros.
    pub(crate) fn new(n_rows: usize, row_length: usize) -> Self {
        let row = || RwLock::new(vec![T::default(); row_length]);
        Self {
            rows: std::iter::repeat_with(row).take(n_rows).collect(),
        }
    }
}

impl<T> FeatureMap<T> {
    pub(crate) fn n_rows(&self) -> usize {
        self.rows.len()
    }

    /// One row, to read.
    pub(crate) fn row(&self, index: usize) -> RwLockReadGuard<'_, Vec<T>> {
        self.rows[index]
            .read()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// One row, to write.
    pub(crate) fn row_mut(&self, index: usize) -> RwLockWriteGuard<'_, Vec<T>> {
        self.rows[index]
            .write()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes of all rows.
    pub(crate) fn bytes(&self) -> usize {
        self.rows.len()
            * self
                .rows
                .first()
                .map_or(0, |_| size_of::<T>() * self.row(0).len())
    }
}
