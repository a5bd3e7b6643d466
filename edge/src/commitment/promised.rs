//! What this node has committed to, durable in the results database.
//!
//! In: a peer's request. Each instance that lies in the spool under the class named is pinned against retention for the configured time, the newest
//! copy of it; an instance that the maximum age would take sooner is refused. The pins and the report are one transaction, made before
//! anything is said; a report stays until the peer has answered it, or the pins end. The clock is passed in.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use serde::{Deserialize, Serialize};
use shared::uid::Uid;
use tokio::sync::Notify;

use super::message::{Reference, Transaction, failure};
use crate::intake::clock::{Ages, is_clock_trusted};
use crate::intake::spool::Spool;
use crate::send::outbox::{OutboxError, json, parse};

/// Reports that wait for their peers; beyond it requests are refused.
const MAX_REPORTS: usize = 1024;
/// Sequence of the spool: until when it is kept, Unix time in ms.
const PINS: TableDefinition<'_, u64, i64> = TableDefinition::new("commitment_pins");
/// Transaction UID: the report that is owed, as JSON.
const REPORTS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("commitment_reports");

/// A report that is owed to a peer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Owed {
    calling_ae: String,
    committed: Vec<(String, String)>,
    failed: Vec<(String, String, u16)>,
    until_ms: i64,
}

/// For how long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Terms {
    /// How long an instance is kept from the commitment on.
    pub(crate) keep: Duration,
    /// The age at which everything goes.
    pub(crate) max_age: Duration,
    /// What was received before is of an age that nobody knows ([`crate::intake::clock::Clock::ages_known_from_ms`]).
    pub(crate) ages_known_from_ms: i64,
}

/// What this node has committed to.
#[derive(Debug)]
pub(crate) struct Promised {
    database: Arc<Database>,
    spool: Arc<Spool>,
    /// Transactions whose own association is open: nobody else reports them.
    held: Mutex<BTreeSet<Uid>>,
    /// Rung when a report may wait.
    pub(crate) bell: Notify,
}

/// Why there is no commitment.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NotPromised {
    /// Too many reports wait.
    #[error("{MAX_REPORTS} reports of storage commitment wait")]
    Full,
    /// By this clock nothing can be promised.
    #[error("the clock is not set")]
    Clock,
    /// The medium failed.
    #[error(transparent)]
    Outbox(OutboxError),
}

impl<E: Into<OutboxError>> From<E> for NotPromised {
    fn from(error: E) -> Self {
        Self::Outbox(error.into())
    }
}

impl Promised {
    /// What was promised before; its objects are pinned again.
    ///
    /// # Errors
    /// The medium fails.
    pub(crate) fn open(database: Arc<Database>, spool: Arc<Spool>) -> Result<Self, OutboxError> {
        let transaction = database.begin_write()?;
        for entry in transaction.open_table(PINS)?.iter()? {
            let (sequence, until_ms) = entry?;
            // An object that is gone has outlived its pin.
            spool.pin(sequence.value(), until_ms.value());
        }
        transaction.open_table(REPORTS)?;
        transaction.commit()?;
        Ok(Self {
            database,
            spool,
            held: Mutex::default(),
            bell: Notify::new(),
        })
    }

    /// Answers a request: pins what can be committed to. Out: the report, held until [`Self::let_go`].
    ///
    /// # Errors
    /// There is no commitment at all.
    pub(crate) fn promise(
        &self,
        request: &Transaction,
        calling_ae: &str,
        terms: Terms,
        now_ms: i64,
    ) -> Result<Transaction, NotPromised> {
        if !is_clock_trusted(now_ms) {
            return Err(NotPromised::Clock);
        }
        let until_ms = now_ms.saturating_add(milliseconds(terms.keep));
        let mut report = Transaction {
            references: Vec::new(),
            failed: Vec::new(),
            ..request.clone()
        };
        let transaction = self.database.begin_write()?;
        {
            let mut pins = transaction.open_table(PINS)?;
            let found = self.find(&request.references);
            for reference in &request.references {
                let copy = found.get(&reference.sop_instance_uid);
                match self.pin(reference, copy, until_ms, terms) {
                    Ok(sequence) => {
                        pins.insert(sequence, until_ms)?;
                        report.references.push(reference.clone());
                    }
                    Err(reason) => report.failed.push((reference.clone(), reason)),
                }
            }
            let mut reports = transaction.open_table(REPORTS)?;
            if redb::ReadableTableMetadata::len(&reports)? >= MAX_REPORTS as u64 {
                return Err(NotPromised::Full);
            }
            let owed = json(&Owed::new(&report, calling_ae, until_ms))?;
            reports.insert(report.uid.as_str(), owed.as_slice())?;
        }
        transaction.commit()?;
        self.held().insert(report.uid.clone());
        Ok(report)
    }

    /// The newest copies of instances, found from the newest object of the spool backwards.
    fn find(&self, references: &[Reference]) -> HashMap<String, Copy> {
        let mut wanted: BTreeSet<&str> = references
            .iter()
            .map(|reference| reference.sop_instance_uid.as_str())
            .collect();
        let mut found = HashMap::new();
        let sequences: Vec<u64> = self.spool.sequences_after(0).collect();
        for sequence in sequences.into_iter().rev() {
            if wanted.is_empty() {
                break;
            }
            let Ok(header) = self.spool.header(sequence) else {
                continue;
            };
            if wanted.remove(header.sop_instance_uid.as_str()) {
                let copy = Copy {
                    sequence,
                    received_ms: header.received_ms,
                    sop_class_uid: header.sop_class_uid,
                };
                found.insert(header.sop_instance_uid, copy);
            }
        }
        found
    }

    fn pin(
        &self,
        reference: &Reference,
        copy: Option<&Copy>,
        until_ms: i64,
        terms: Terms,
    ) -> Result<u64, u16> {
        let copy = copy.ok_or(failure::NO_SUCH_INSTANCE)?;
        if copy.sop_class_uid != reference.sop_class_uid {
            return Err(failure::CLASS_CONFLICT);
        }
        // Too old to be kept for so long; without a time of receipt nobody knows.
        let goes_ms = copy.received_ms.saturating_add(milliseconds(terms.max_age));
        let is_known =
            is_clock_trusted(copy.received_ms) && copy.received_ms >= terms.ages_known_from_ms;
        if !is_known || goes_ms < until_ms {
            return Err(failure::RESOURCE_LIMITATION);
        }
        let is_pinned = self.spool.pin(copy.sequence, until_ms);
        is_pinned
            .then_some(copy.sequence)
            .ok_or(failure::NO_SUCH_INSTANCE)
    }

    /// The peer has answered the report.
    ///
    /// # Errors
    /// The medium fails.
    pub(crate) fn reported(&self, uid: &Uid) -> Result<(), OutboxError> {
        let transaction = self.database.begin_write()?;
        transaction.open_table(REPORTS)?.remove(uid.as_str())?;
        transaction.commit()?;
        Ok(())
    }

    /// The association of a request is over: a report that was not answered there goes out on one of its own.
    pub(crate) fn let_go(&self, uid: &Uid) {
        self.held().remove(uid);
        self.bell.notify_waiters();
    }

    /// Reports that are owed and that no association holds, with the AE titles of the peers. None of a commitment that has ended: its objects
    /// may be gone.
    ///
    /// # Errors
    /// The medium fails.
    pub(crate) fn owed(&self, now_ms: i64) -> Result<Vec<(String, Transaction)>, OutboxError> {
        let table = self.database.begin_read()?.open_table(REPORTS)?;
        let mut owed = Vec::new();
        for entry in table.iter()? {
            let (uid, bytes) = entry?;
            let Ok(uid) = Uid::new(uid.value()) else {
                continue;
            };
            let one: Owed = parse(bytes.value())?;
            if one.until_ms > now_ms && !self.held().contains(&uid) {
                owed.push((one.calling_ae.clone(), one.report(uid)));
            }
        }
        Ok(owed)
    }

    /// Drops what has ended: pins, and reports that no peer took.
    ///
    /// # Errors
    /// The medium fails.
    pub(crate) fn forget(&self, ages: Ages) -> Result<(), OutboxError> {
        let now_ms = ages.now_ms;
        let transaction = self.database.begin_write()?;
        transaction
            .open_table(PINS)?
            .retain(|_, until_ms| !ages.has_come(until_ms))?;
        transaction
            .open_table(REPORTS)?
            .retain(|_, bytes| parse::<Owed>(bytes).is_ok_and(|owed| owed.until_ms > now_ms))?;
        transaction.commit()?;
        Ok(())
    }

    fn held(&self) -> std::sync::MutexGuard<'_, BTreeSet<Uid>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A copy of an instance in the spool.
#[derive(Debug)]
struct Copy {
    sequence: u64,
    received_ms: i64,
    sop_class_uid: String,
}

impl Owed {
    fn new(report: &Transaction, calling_ae: &str, until_ms: i64) -> Self {
        let pair = |one: &Reference| (one.sop_class_uid.clone(), one.sop_instance_uid.clone());
        let failed = report.failed.iter().map(|(one, reason)| {
            let (class, instance) = pair(one);
            (class, instance, *reason)
        });
        Self {
            calling_ae: calling_ae.to_owned(),
            committed: report.references.iter().map(pair).collect(),
            failed: failed.collect(),
            until_ms,
        }
    }

    fn report(self, uid: Uid) -> Transaction {
        let reference = |sop_class_uid, sop_instance_uid| Reference {
            sop_class_uid,
            sop_instance_uid,
        };
        let committed = self.committed.into_iter();
        let failed = self.failed.into_iter();
        Transaction {
            uid,
            references: committed
                .map(|(class, uid)| reference(class, uid))
                .collect(),
            failed: failed
                .map(|(class, uid, reason)| (reference(class, uid), reason))
                .collect(),
        }
    }
}

fn milliseconds(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}
