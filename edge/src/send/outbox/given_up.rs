//! What becomes of letters that nobody accepted: given up, sent again, lost.
//!
//! Bounds: of more than [`Bounds::waiting`] letters the oldest are given up, of more than [`Bounds::dead`] that were given up the oldest are
//! lost, and all are deleted by age; what is lost is counted. The clock is passed in.

use std::sync::atomic::Ordering;

use redb::{
    ReadableDatabase, ReadableTable, ReadableTableMetadata, TableDefinition, TableHandle,
    WriteTransaction,
};

use super::{
    ACCEPTED, DEAD, FROZEN, KEYS, LATEST, Letter, Outbox, OutboxError, RESULTS, WAITING,
    latest_name, parse, put, remove,
};
use crate::intake::clock::Ages;

/// Most letters that are kept. A board makes some hundred a day, so a receiver may be away for as long as letters are kept at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Bounds {
    /// Of those that wait.
    pub(crate) waiting: u64,
    /// Of those that were given up.
    pub(crate) dead: u64,
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            waiting: 4096,
            dead: 4096,
        }
    }
}

/// What had to go to keep the bounds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Trimmed {
    /// Letters that were given up.
    pub(crate) given_up: Vec<Letter>,
    /// Letters given up before that are gone now.
    pub(crate) n_lost: u64,
}

impl Outbox {
    /// Gives up the oldest of too many letters that wait, and loses the oldest of too many that were given up.
    ///
    /// # Errors
    /// The medium fails.
    pub(crate) fn trim(&self, bounds: Bounds, now_ms: i64) -> Result<Trimmed, OutboxError> {
        let counts = self.counts()?;
        let mut trimmed = Trimmed::default();
        if counts.waiting <= bounds.waiting && counts.dead <= bounds.dead {
            return Ok(trimmed);
        }
        let transaction = self.database.begin_write()?;
        for (sequence, letter) in oldest(&transaction, WAITING, bounds.waiting)? {
            let letter = Letter {
                ended_ms: Some(now_ms),
                remark: Some(format!("more than {} letters wait", bounds.waiting)),
                ..letter
            };
            remove(&transaction, WAITING, sequence)?;
            put(&transaction, DEAD, sequence, &letter)?;
            trimmed.given_up.push(letter);
        }
        for (sequence, letter) in oldest(&transaction, DEAD, bounds.dead)? {
            erase(&transaction, sequence, &letter)?;
            trimmed.n_lost += 1;
        }
        transaction.commit()?;
        Ok(trimmed)
    }

    /// Puts dead letters back among those that wait, but not those that a later one to the same receiver about the same study has
    /// overtaken: what they say is no longer so.
    ///
    /// # Errors
    /// The medium fails.
    pub(crate) fn revive(&self) -> Result<usize, OutboxError> {
        let transaction = self.database.begin_write()?;
        let mut dead = Vec::new();
        for entry in transaction.open_table(DEAD)?.iter()? {
            let (sequence, bytes) = entry?;
            dead.push((sequence.value(), parse::<Letter>(bytes.value())?));
        }
        for entry in transaction.open_table(ACCEPTED)?.iter()? {
            let (accepted, bytes) = entry?;
            let later: Letter = parse(bytes.value())?;
            dead.retain(|(sequence, letter)| {
                let is_same =
                    later.channel == letter.channel && later.study_uid == letter.study_uid;
                !is_same || *sequence > accepted.value()
            });
        }
        for (sequence, letter) in &dead {
            let letter = Letter {
                ended_ms: None,
                remark: None,
                ..letter.clone()
            };
            put(&transaction, WAITING, *sequence, &letter)?;
            remove(&transaction, DEAD, *sequence)?;
        }
        transaction.commit()?;
        self.bell.notify_waiters();
        Ok(dead.len())
    }

    /// The dead letters, the latest first, at most `most`.
    ///
    /// # Errors
    /// The medium fails.
    pub(crate) fn dead_letters(&self, most: usize) -> Result<Vec<Letter>, OutboxError> {
        let table = self.database.begin_read()?.open_table(DEAD)?;
        let mut letters = Vec::new();
        for entry in table.iter()?.rev().take(most) {
            letters.push(parse(entry?.1.value())?);
        }
        Ok(letters)
    }

    /// Counts letters that were deleted and never accepted, for their age or for want of room.
    pub(crate) fn lose(&self, n_letters: u64) {
        if n_letters > 0 {
            tracing::error!(n_letters, "results were deleted that nobody had accepted");
            self.n_lost.fetch_add(n_letters, Ordering::Relaxed);
        }
    }

    /// Letters deleted and never accepted since the start.
    pub(crate) fn n_lost(&self) -> u64 {
        self.n_lost.load(Ordering::Relaxed)
    }

    /// Deletes what is too old, sent or not; what was enqueued while the clock was wrong counts from now. How many letters were never
    /// accepted.
    ///
    /// # Errors
    /// The medium fails.
    pub(crate) fn forget(&self, ages: Ages) -> Result<u64, OutboxError> {
        let transaction = self.database.begin_write()?;
        let mut lost = 0;
        for table in [WAITING, DEAD, ACCEPTED] {
            let (mut old, mut restamped) = (Vec::new(), Vec::new());
            for entry in transaction.open_table(table)?.iter()? {
                let (sequence, bytes) = entry?;
                let mut letter: Letter = parse(bytes.value())?;
                match ages.is_too_old(letter.enqueued_ms) {
                    Some(false) => {}
                    Some(true) => old.push((sequence.value(), letter)),
                    None => {
                        letter.enqueued_ms = ages.now_ms;
                        restamped.push((sequence.value(), letter));
                    }
                }
            }
            for (sequence, letter) in restamped {
                put(&transaction, table, sequence, &letter)?;
            }
            for (sequence, letter) in old {
                lost += u64::from(letter.ended_ms.is_none() || table.name() == DEAD.name());
                erase(&transaction, sequence, &letter)?;
                let latest = latest_name(&letter);
                transaction.open_table(LATEST)?.remove(latest.as_str())?;
            }
        }
        transaction.commit()?;
        Ok(lost)
    }
}

/// The oldest letters of a table, as many as it has above `most`.
fn oldest(
    transaction: &WriteTransaction,
    table: TableDefinition<'_, u64, &[u8]>,
    most: u64,
) -> Result<Vec<(u64, Letter)>, OutboxError> {
    let table = transaction.open_table(table)?;
    let n_above = usize::try_from(table.len()?.saturating_sub(most)).unwrap_or(usize::MAX);
    let mut letters = Vec::new();
    for entry in table.iter()?.take(n_above) {
        let (sequence, bytes) = entry?;
        letters.push((sequence.value(), parse(bytes.value())?));
    }
    Ok(letters)
}

/// Deletes a letter, what it tells and its key.
fn erase(
    transaction: &WriteTransaction,
    sequence: u64,
    letter: &Letter,
) -> Result<(), OutboxError> {
    for table in [WAITING, ACCEPTED, DEAD, RESULTS, FROZEN] {
        remove(transaction, table, sequence)?;
    }
    let key = format!("{}/{}", letter.channel.name(), letter.key);
    transaction.open_table(KEYS)?.remove(key.as_str())?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use redb::Database;
    use redb::backends::InMemoryBackend;

    use super::super::{Channel, Channels, Counts, enqueue};
    use super::*;
    use crate::send::sample;

    const NOW_MS: i64 = 1_790_000_000_000;

    /// A letter under way: taken by the sender, and `moved` before it is frozen or buried.
    #[track_caller]
    fn check(moved: impl FnOnce(&Outbox), expected: Counts) {
        let backend = InMemoryBackend::new();
        let database = Arc::new(Database::builder().create_with_backend(backend).unwrap());
        let outbox = Outbox::open(Arc::clone(&database)).unwrap();
        let transaction = database.begin_write().unwrap();
        let channels = Channels {
            open: vec![Channel::StructuredReport],
            allow_demo_results: true,
        };
        enqueue(&transaction, &sample::positive(), &channels).unwrap();
        transaction.commit().unwrap();
        let mut waiting = outbox.waiting(&Channel::ALL).unwrap();
        let (sequence, letter) = waiting.pop().unwrap();
        moved(&outbox);
        assert!(!outbox.freeze(sequence, &letter, b"patient").unwrap());
        let reason = "refused".to_owned();
        outbox.bury(sequence, letter, reason, NOW_MS).unwrap();
        assert_eq!(outbox.counts().unwrap(), expected);
        assert_eq!(outbox.frozen(sequence).unwrap(), None);
    }

    #[test]
    fn a_letter_that_was_given_up_under_way_does_not_wait_again() {
        let bounds = Bounds {
            waiting: 0,
            dead: 9,
        };
        let give_up = |outbox: &Outbox| {
            outbox.trim(bounds, NOW_MS).unwrap();
        };
        check(
            give_up,
            Counts {
                waiting: 0,
                dead: 1,
            },
        );
    }

    #[test]
    fn a_letter_that_was_deleted_under_way_leaves_nothing_behind() {
        let delete = |outbox: &Outbox| {
            outbox.forget(Ages::before(i64::MAX - 1000)).unwrap();
        };
        check(delete, Counts::default());
    }
}
