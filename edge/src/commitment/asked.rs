//! What the PACS is asked to commit to, durable in the results database.
//!
//! [`want`] runs inside the transaction that records a document as accepted. Each request is a new transaction UID, made durable before it is
//! sent; a report may name any of them, however late. A document ends as committed, or, refused or never answered, as not committed: delivered,
//! but nothing that anyone may rely on. Who asks is [`super::asking`]; the clock is passed in.

use std::sync::Arc;

use redb::{
    Database, ReadableDatabase, ReadableTable, ReadableTableMetadata, TableDefinition,
    WriteTransaction,
};
use serde::{Deserialize, Serialize};
use shared::uid::Uid;
use tokio::sync::Notify;

use super::message::{Transaction, failure};
use crate::intake::clock::Ages;
use crate::send::identity;
use crate::send::outbox::{Channel, Document, Letter, OutboxError, json, parse, put, remove};

/// Documents looked at in one go; the rest waits for the next.
const MAX_PASS: usize = 64;
/// Sequence of the letter: a document that is to be committed, as JSON.
const WAITING: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("commitment_waiting");
/// Documents that the PACS has committed to.
const COMMITTED: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("commitment_committed");
/// Documents that it has not, with the reason.
const FAILED: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("commitment_failed");
/// Transaction UID: the sequence that it asks for.
const TRANSACTIONS: TableDefinition<'_, &str, u64> =
    TableDefinition::new("commitment_transactions");

/// A document that is, or was, asked about.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Wanted {
    /// Which study it is about.
    pub(crate) study_uid: Uid,
    /// Of the result.
    pub(crate) revision: u32,
    /// What it is.
    pub(crate) channel: Channel,
    /// The document.
    pub(crate) document: Document,
    /// When its letter was enqueued, Unix time in ms.
    pub(crate) enqueued_ms: i64,
    /// Requests made since it was last wanted, those that were refused included.
    pub(crate) attempts: u32,
    /// Transactions begun, ever.
    pub(crate) transactions: u32,
    /// Why it is not committed.
    pub(crate) remark: Option<String>,
}

/// How asking for a document ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// The PACS has taken it over.
    Committed,
    /// It has not, or never said so.
    NotCommitted,
}

/// How many documents there are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    /// Asked about, or to be.
    pub(crate) waiting: u64,
    /// Delivered, but not committed.
    pub(crate) failed: u64,
}

/// Told how asking ended: for audit and page.
pub(crate) type Observe = dyn Fn(&Wanted, End) + Send + Sync;

/// The documents that are asked about.
pub(crate) struct Asked {
    database: Arc<Database>,
    observe: Box<Observe>,
    /// Rung when a document may wait.
    pub(crate) bell: Notify,
}

impl std::fmt::Debug for Asked {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Asked").finish_non_exhaustive()
    }
}

/// Puts an accepted document in, within the transaction that records it as accepted.
///
/// # Errors
/// The medium fails.
pub(crate) fn want(
    transaction: &WriteTransaction,
    sequence: u64,
    letter: &Letter,
    document: &Document,
) -> Result<(), OutboxError> {
    let wanted = Wanted {
        study_uid: letter.study_uid.clone(),
        revision: letter.revision,
        channel: letter.channel,
        document: document.clone(),
        enqueued_ms: letter.enqueued_ms,
        attempts: 0,
        transactions: 0,
        remark: None,
    };
    put(transaction, WAITING, sequence, &wanted)
}

impl Asked {
    /// What is asked about in a database.
    ///
    /// # Errors
    /// The medium fails.
    pub(crate) fn open(
        database: Arc<Database>,
        observe: Box<Observe>,
    ) -> Result<Self, OutboxError> {
        let transaction = database.begin_write()?;
        for table in [WAITING, COMMITTED, FAILED] {
            transaction.open_table(table)?;
        }
        transaction.open_table(TRANSACTIONS)?;
        transaction.commit()?;
        Ok(Self {
            database,
            observe,
            bell: Notify::new(),
        })
    }

    /// The oldest documents that wait, at most [`MAX_PASS`].
    ///
    /// # Errors
    /// The medium fails.
    pub(crate) fn waiting(&self) -> Result<Vec<(u64, Wanted)>, OutboxError> {
        let table = self.database.begin_read()?.open_table(WAITING)?;
        let mut waiting = Vec::new();
        for entry in table.iter()?.take(MAX_PASS) {
            let (sequence, bytes) = entry?;
            waiting.push((sequence.value(), parse(bytes.value())?));
        }
        Ok(waiting)
    }

    /// Begins a transaction for a document: from here on its report is understood.
    ///
    /// # Errors
    /// The medium fails.
    pub(crate) fn begin(&self, sequence: u64, wanted: &Wanted) -> Result<Uid, OutboxError> {
        let number = wanted.transactions + 1;
        let uid = identity::transaction_uid(&wanted.document.sop_instance_uid, number);
        let wanted = Wanted {
            attempts: wanted.attempts + 1,
            transactions: number,
            ..wanted.clone()
        };
        let transaction = self.database.begin_write()?;
        put(&transaction, WAITING, sequence, &wanted)?;
        let mut transactions = transaction.open_table(TRANSACTIONS)?;
        transactions.insert(uid.as_str(), sequence)?;
        drop(transactions);
        transaction.commit()?;
        Ok(uid)
    }

    /// Takes the report of a transaction. Whether it is one of ours; one that comes again changes nothing.
    ///
    /// # Errors
    /// The medium fails.
    pub(crate) fn reported(&self, report: &Transaction) -> Result<bool, OutboxError> {
        let transaction = self.database.begin_write()?;
        let sequence = transaction
            .open_table(TRANSACTIONS)?
            .get(report.uid.as_str())?
            .map(|sequence| sequence.value());
        let Some(sequence) = sequence else {
            return Ok(false);
        };
        let mut ended = None;
        for (table, is_open) in [(WAITING, true), (FAILED, false)] {
            let Some(found) = get(&transaction, table, sequence)? else {
                continue;
            };
            let (end, remark) = judge(report, &found.document);
            // A late success mends what was given up; a late failure adds nothing to it.
            if is_open || end == End::Committed {
                remove(&transaction, table, sequence)?;
                ended = Some((Wanted { remark, ..found }, end));
            }
        }
        if let Some((wanted, end)) = &ended {
            put(&transaction, table_of(*end), sequence, wanted)?;
        }
        transaction.commit()?;
        if let Some((wanted, end)) = ended {
            (self.observe)(&wanted, end);
        }
        Ok(true)
    }

    /// A request that the PACS refused, or that cannot be sent to it; after `most` of them the document is given up.
    ///
    /// # Errors
    /// The medium fails.
    pub(crate) fn refused(
        &self,
        sequence: u64,
        reason: &str,
        most: u32,
    ) -> Result<(), OutboxError> {
        let transaction = self.database.begin_write()?;
        let found = get(&transaction, WAITING, sequence)?;
        let Some(found) = found.filter(|found| found.attempts >= most) else {
            return Ok(());
        };
        let remark = Some(reason.to_owned());
        let wanted = Wanted { remark, ..found };
        remove(&transaction, WAITING, sequence)?;
        put(&transaction, FAILED, sequence, &wanted)?;
        transaction.commit()?;
        (self.observe)(&wanted, End::NotCommitted);
        Ok(())
    }

    /// Asks again for what is not committed: an operator has changed something.
    ///
    /// # Errors
    /// The medium fails.
    pub(crate) fn revive(&self) -> Result<usize, OutboxError> {
        let failed = self.failed()?;
        let transaction = self.database.begin_write()?;
        for (sequence, wanted) in &failed {
            let wanted = Wanted {
                attempts: 0,
                remark: None,
                ..wanted.clone()
            };
            remove(&transaction, FAILED, *sequence)?;
            put(&transaction, WAITING, *sequence, &wanted)?;
        }
        transaction.commit()?;
        self.bell.notify_waiters();
        Ok(failed.len())
    }

    /// What was delivered and not committed.
    ///
    /// # Errors
    /// The medium fails.
    pub(crate) fn failed(&self) -> Result<Vec<(u64, Wanted)>, OutboxError> {
        let table = self.database.begin_read()?.open_table(FAILED)?;
        let mut failed = Vec::new();
        for entry in table.iter()? {
            let (sequence, bytes) = entry?;
            failed.push((sequence.value(), parse(bytes.value())?));
        }
        Ok(failed)
    }

    /// How many documents wait, and how many are not committed.
    ///
    /// # Errors
    /// The medium fails.
    pub(crate) fn counts(&self) -> Result<Counts, OutboxError> {
        let transaction = self.database.begin_read()?;
        Ok(Counts {
            waiting: transaction.open_table(WAITING)?.len()?,
            failed: transaction.open_table(FAILED)?.len()?,
        })
    }

    /// Deletes what is too old, whatever became of it. What was enqueued while the clock was wrong counts from now.
    ///
    /// # Errors
    /// The medium fails.
    pub(crate) fn forget(&self, ages: Ages) -> Result<(), OutboxError> {
        let transaction = self.database.begin_write()?;
        for table in [WAITING, COMMITTED, FAILED] {
            let mut table = transaction.open_table(table)?;
            let (mut old, mut restamped) = (Vec::new(), Vec::new());
            for entry in table.iter()? {
                let (sequence, bytes) = entry?;
                let mut wanted: Wanted = parse(bytes.value())?;
                match ages.is_too_old(wanted.enqueued_ms) {
                    Some(false) => {}
                    Some(true) => old.push((sequence.value(), wanted)),
                    None => {
                        wanted.enqueued_ms = ages.now_ms;
                        restamped.push((sequence.value(), json(&wanted)?));
                    }
                }
            }
            for (sequence, bytes) in restamped {
                table.insert(sequence, bytes.as_slice())?;
            }
            let mut transactions = transaction.open_table(TRANSACTIONS)?;
            for (sequence, wanted) in old {
                table.remove(sequence)?;
                for number in 1..=wanted.transactions {
                    let instance = &wanted.document.sop_instance_uid;
                    let uid = identity::transaction_uid(instance, number);
                    transactions.remove(uid.as_str())?;
                }
            }
        }
        transaction.commit()?;
        Ok(())
    }
}

fn get(
    transaction: &WriteTransaction,
    table: TableDefinition<'_, u64, &[u8]>,
    sequence: u64,
) -> Result<Option<Wanted>, OutboxError> {
    let table = transaction.open_table(table)?;
    let bytes = table.get(sequence)?;
    bytes.map(|bytes| parse(bytes.value())).transpose()
}

fn table_of(end: End) -> TableDefinition<'static, u64, &'static [u8]> {
    match end {
        End::Committed => COMMITTED,
        End::NotCommitted => FAILED,
    }
}

/// What a report says of a document, and why.
fn judge(report: &Transaction, document: &Document) -> (End, Option<String>) {
    let is_it = |uid: &str| uid == document.sop_instance_uid.as_str();
    let failed = report.failed.iter();
    let failed = failed
        .filter(|(reference, _)| is_it(&reference.sop_instance_uid))
        .map(|(_, reason)| *reason)
        .next();
    if let Some(reason) = failed {
        let words = failure::words(reason);
        let remark = format!("failure reason {reason:04X}H, {words}");
        return (End::NotCommitted, Some(remark));
    }
    let references = &mut report.references.iter();
    if references.any(|reference| is_it(&reference.sop_instance_uid)) {
        (End::Committed, None)
    } else {
        let remark = "its report does not name it".to_owned();
        (End::NotCommitted, Some(remark))
    }
}
