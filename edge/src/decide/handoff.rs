//! The hand-off between analysis and decision: a bounded queue that blocks, between two threads.
//!
//! In: slices that are ready for the network. Out: the same, in order. At most [`CAPACITY`] wait (a tensor has 192 KiB); a full queue
//! holds up the thread that fills it, which holds up the worker, never intake: that one ends at the spool.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use heapless::Deque;

/// Slices that wait.
pub(crate) const CAPACITY: usize = 4;

/// The queue.
#[derive(Debug)]
pub(crate) struct Handoff<T> {
    state: Mutex<State<T>>,
    changed: Condvar,
}

#[derive(Debug)]
struct State<T> {
    waiting: Deque<T, CAPACITY>,
    is_closed: bool,
}

/// The other side has closed the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Closed;

impl<T> Default for Handoff<T> {
    fn default() -> Self {
        Self {
            state: Mutex::new(State {
                waiting: Deque::new(),
                is_closed: false,
            }),
            changed: Condvar::new(),
        }
    }
}

impl<T> Handoff<T> {
    /// Appends, waiting while the queue is full.
    ///
    /// # Errors
    /// [`Closed`]; the item is lost then.
    pub(crate) fn push(&self, item: T) -> Result<(), Closed> {
        let is_full = |state: &mut State<T>| !state.is_closed && state.waiting.is_full();
        let waited = self.changed.wait_while(self.state(), is_full);
        let mut state = waited.unwrap_or_else(PoisonError::into_inner);
        if state.is_closed {
            return Err(Closed);
        }
        state.waiting.push_back(item).map_err(|_| Closed)?;
        self.changed.notify_all();
        Ok(())
    }

    /// Takes the first, waiting for at most `patience`; `None` where none came.
    ///
    /// # Errors
    /// [`Closed`] where the queue is closed and empty.
    pub(crate) fn pop(&self, patience: Duration) -> Result<Option<T>, Closed> {
        let is_empty = |state: &mut State<T>| !state.is_closed && state.waiting.is_empty();
        let waited = self
            .changed
            .wait_timeout_while(self.state(), patience, is_empty);
        let mut state = waited.unwrap_or_else(PoisonError::into_inner).0;
        match state.waiting.pop_front() {
            None if state.is_closed => Err(Closed),
            item => {
                self.changed.notify_all();
                Ok(item)
            }
        }
    }

    /// Nothing more comes in, or nobody takes anything any more.
    pub(crate) fn close(&self) {
        self.state().is_closed = true;
        self.changed.notify_all();
    }

    fn state(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_queue_holds_up_the_sender_until_there_is_room() {
        let handoff = Handoff::default();
        let n_items = CAPACITY * 10;
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for item in 0..n_items {
                    handoff.push(item).unwrap();
                    assert!(handoff.state().waiting.len() <= CAPACITY);
                }
                handoff.close();
            });
            for expected in 0..n_items {
                let item = handoff.pop(Duration::from_secs(60));
                assert_eq!(item, Ok(Some(expected)));
            }
            assert_eq!(handoff.pop(Duration::from_secs(60)), Err(Closed));
        });
    }

    #[test]
    fn closing_frees_a_sender_that_waits() {
        let handoff = Handoff::default();
        for item in 0..CAPACITY {
            handoff.push(item).unwrap();
        }
        std::thread::scope(|scope| {
            let sender = scope.spawn(|| handoff.push(CAPACITY));
            handoff.close();
            assert_eq!(sender.join().unwrap(), Err(Closed));
        });
    }
}
