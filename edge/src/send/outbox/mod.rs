//! What is to be told and to whom, durable in the results database.
//!
//! [`enqueue`] runs inside the transaction that writes the result, so that a result and its letters exist together or not at all. A letter's bytes
//! are made once, before the first attempt ([`Outbox::freeze`]), and every later attempt sends the same bytes; when it is accepted or
//! given up, that is one transaction, too. Keys are derived from the result ([`super::identity`]), so that the same result is never
//! enqueued twice. Who sends is [`super::delivery`]; the clock is passed in.
//! What is given up and what is lost: [`given_up`].

mod given_up;

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use redb::{
    Database, ReadableDatabase, ReadableTable, ReadableTableMetadata, TableDefinition,
    WriteTransaction,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use shared::uid::Uid;
use tokio::sync::Notify;

pub(crate) use given_up::{Bounds, Trimmed};

use super::identity;
use super::structured_report::{Predecessor, is_reported};
use crate::commitment::asked;
use crate::config::Config;
use crate::result::{Outcome, State, StudyResult};

/// Letters looked at in one go; the rest waits for the next.
const MAX_PASS: usize = 256;

/// Sequence number: letters that wait, as JSON.
const WAITING: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("outbox_waiting");
/// Letters that were accepted, without what they said.
const ACCEPTED: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("outbox_accepted");
/// Letters that were given up, with the reason.
const DEAD: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("outbox_dead");
/// Sequence number: the result that a letter tells, as JSON.
const RESULTS: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("outbox_results");
/// Sequence number: the bytes of a letter.
const FROZEN: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("outbox_frozen");
/// Channel and key of every letter ever enqueued: its sequence number.
const KEYS: TableDefinition<'_, &str, u64> = TableDefinition::new("outbox_keys");
/// Channel and study: the document accepted last, as JSON.
const LATEST: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("outbox_latest");
/// `next`: the next sequence number; `device_high` and `device_low`: this installation.
const COUNTERS: TableDefinition<'_, &str, u64> = TableDefinition::new("outbox_counters");

/// A way out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Channel {
    /// Structured report to the PACS.
    StructuredReport,
    /// Secondary capture to the PACS.
    SecondaryCapture,
    /// JSON by HTTP.
    Webhook,
    /// ORU^R01.
    Hl7,
    /// Structured report by HTTP.
    Stow,
}

impl Channel {
    /// Every one.
    pub(crate) const ALL: [Self; 5] = [
        Self::StructuredReport,
        Self::SecondaryCapture,
        Self::Webhook,
        Self::Hl7,
        Self::Stow,
    ];

    /// Its name in keys, metrics and on the page.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::StructuredReport => "structured_report",
            Self::SecondaryCapture => "secondary_capture",
            Self::Webhook => "webhook",
            Self::Hl7 => "hl7",
            Self::Stow => "stow",
        }
    }
}

/// Which channels are configured.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Channels {
    /// The channels in use.
    pub(crate) open: Vec<Channel>,
    /// Whether results of a demonstration model may leave for studies of patients.
    pub(crate) allow_demo_results: bool,
}

impl Channels {
    /// The channels of a configuration.
    pub(crate) fn configured(config: &Config) -> Self {
        let pacs = config.pacs.as_ref();
        let has_captures = pacs.is_some_and(|pacs| pacs.secondary_capture);
        let is_open = |channel: &Channel| match channel {
            Channel::StructuredReport => pacs.is_some(),
            Channel::SecondaryCapture => has_captures,
            Channel::Webhook => config.webhook.is_some(),
            Channel::Hl7 => config.hl7.is_some(),
            Channel::Stow => config.stow.is_some(),
        };
        Self {
            open: Channel::ALL.into_iter().filter(is_open).collect(),
            allow_demo_results: config.allow_demo_results,
        }
    }
}

/// One message to one receiver.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Letter {
    /// Where to.
    pub(crate) channel: Channel,
    /// The same for the same result, whatever is killed when.
    pub(crate) key: Uid,
    /// Which study.
    pub(crate) study_uid: Uid,
    /// Of the result.
    pub(crate) revision: u32,
    /// When it was enqueued, Unix time in ms.
    pub(crate) enqueued_ms: i64,
    /// What its bytes are, once they are frozen; for DICOM objects.
    pub(crate) document: Option<Document>,
    /// Whether its bytes are frozen.
    pub(crate) is_frozen: bool,
    /// When it was accepted or given up, Unix time in ms.
    pub(crate) ended_ms: Option<i64>,
    /// Why it was given up, or what the receiver remarked.
    pub(crate) remark: Option<String>,
}

impl Letter {
    /// SOP Instance UID of its object; empty where it is none.
    pub(crate) fn instance_uid(&self) -> &str {
        let document = self.document.as_ref();
        document.map_or("", |document| document.sop_instance_uid.as_str())
    }
}

/// A DICOM object of ours.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Document {
    /// SOP Class UID.
    pub(crate) sop_class_uid: String,
    /// Series Instance UID.
    pub(crate) series_uid: Uid,
    /// SOP Instance UID.
    pub(crate) sop_instance_uid: Uid,
}

/// Why the outbox cannot do what it should.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OutboxError {
    /// The database is broken or the medium failed.
    #[error("outbox: database")]
    Database(#[source] Box<redb::Error>),
    /// A row is not what this version writes.
    #[error("outbox: a row cannot be read")]
    Row(#[source] serde_json::Error),
    /// The program ends.
    #[error("outbox: the program ends")]
    Stopped,
}

impl<E: Into<redb::Error>> From<E> for OutboxError {
    fn from(error: E) -> Self {
        Self::Database(Box::new(error.into()))
    }
}

/// How many letters there are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    /// To be sent.
    pub(crate) waiting: u64,
    /// Given up.
    pub(crate) dead: u64,
}

/// The outbox.
#[derive(Debug)]
pub(crate) struct Outbox {
    database: Arc<Database>,
    /// Rung when something may wait.
    pub(crate) bell: Notify,
    n_lost: AtomicU64,
}

/// Puts a result's letters in, within the transaction that writes the result. Nothing where nothing is said yet, where the same was said
/// before, and where a demonstration model's answer about a patient may not leave.
///
/// # Errors
/// The medium fails.
pub(crate) fn enqueue(
    transaction: &WriteTransaction,
    result: &StudyResult,
    channels: &Channels,
) -> Result<(), OutboxError> {
    if !may_leave(result, channels) {
        return Ok(());
    }
    for &channel in channels
        .open
        .iter()
        .filter(|channel| is_told(**channel, result))
    {
        let key = identity::document_uid(result, channel.name());
        let mut keys = transaction.open_table(KEYS)?;
        let name = format!("{}/{key}", channel.name());
        if keys.get(name.as_str())?.is_some() {
            continue;
        }
        let sequence = next(transaction)?;
        keys.insert(name.as_str(), sequence)?;
        let letter = Letter {
            channel,
            key,
            study_uid: result.study_uid.clone(),
            revision: result.revision,
            enqueued_ms: result.decided_ms,
            document: None,
            is_frozen: false,
            ended_ms: None,
            remark: None,
        };
        put(transaction, WAITING, sequence, &letter)?;
        put(transaction, RESULTS, sequence, result)?;
    }
    Ok(())
}

/// Whether a result may leave the box at all.
fn may_leave(result: &StudyResult, channels: &Channels) -> bool {
    let is_said = result.state != State::Receiving && is_reported(&result.outcome);
    is_said && result.may_leave(channels.allow_demo_results)
}

/// Captures show slices of the judged series once it is complete.
fn is_told(channel: Channel, result: &StudyResult) -> bool {
    let is_judged = matches!(result.outcome, Outcome::Positive | Outcome::NotDetected);
    channel != Channel::SecondaryCapture || (is_judged && result.state == State::Complete)
}

fn next(transaction: &WriteTransaction) -> Result<u64, OutboxError> {
    let mut counters = transaction.open_table(COUNTERS)?;
    let sequence = counters.get("next")?.map_or(1, |value| value.value());
    counters.insert("next", sequence + 1)?;
    Ok(sequence)
}

/// A row.
pub(crate) fn json<T: Serialize>(value: &T) -> Result<Vec<u8>, OutboxError> {
    serde_json::to_vec(value).map_err(OutboxError::Row)
}

/// What a row holds.
pub(crate) fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, OutboxError> {
    serde_json::from_slice(bytes).map_err(OutboxError::Row)
}

/// Writes a row.
pub(crate) fn put<T: Serialize>(
    transaction: &WriteTransaction,
    table: TableDefinition<'_, u64, &[u8]>,
    sequence: u64,
    value: &T,
) -> Result<(), OutboxError> {
    let bytes = json(value)?;
    let mut table = transaction.open_table(table)?;
    table.insert(sequence, bytes.as_slice())?;
    Ok(())
}

/// Deletes a row.
pub(crate) fn remove(
    transaction: &WriteTransaction,
    table: TableDefinition<'_, u64, &[u8]>,
    sequence: u64,
) -> Result<(), OutboxError> {
    transaction.open_table(table)?.remove(sequence)?;
    Ok(())
}

fn is_waiting(transaction: &WriteTransaction, sequence: u64) -> Result<bool, OutboxError> {
    Ok(transaction.open_table(WAITING)?.get(sequence)?.is_some())
}

impl Outbox {
    /// The outbox in a database.
    ///
    /// # Errors
    /// The medium fails.
    pub(crate) fn open(database: Arc<Database>) -> Result<Self, OutboxError> {
        let transaction = database.begin_write()?;
        for table in [WAITING, ACCEPTED, DEAD, RESULTS, FROZEN] {
            transaction.open_table(table)?;
        }
        transaction.open_table(KEYS)?;
        transaction.open_table(LATEST)?;
        transaction.open_table(COUNTERS)?;
        transaction.commit()?;
        Ok(Self {
            database,
            bell: Notify::new(),
            n_lost: AtomicU64::new(0),
        })
    }

    /// This installation: `new` at the first call, the same ever after.
    ///
    /// # Errors
    /// The medium fails.
    pub(crate) fn installation(&self, new: u128) -> Result<u128, OutboxError> {
        let transaction = self.database.begin_write()?;
        let known = {
            let mut counters = transaction.open_table(COUNTERS)?;
            let known = |name| Ok::<_, OutboxError>(counters.get(name)?.map(|value| value.value()));
            match (known("device_high")?, known("device_low")?) {
                (Some(high), Some(low)) => u128::from(high) << 64 | u128::from(low),
                _ => {
                    let low = u64::try_from(new & u128::from(u64::MAX)).unwrap_or(0);
                    let high = u64::try_from(new >> 64).unwrap_or(0);
                    counters.insert("device_high", high)?;
                    counters.insert("device_low", low)?;
                    new
                }
            }
        };
        transaction.commit()?;
        Ok(known)
    }

    /// The oldest letters that wait for one of `channels`, in the order in which they were enqueued; of each study only the oldest of
    /// a channel, so that a revision never overtakes.
    ///
    /// # Errors
    /// The medium fails.
    pub(crate) fn waiting(&self, channels: &[Channel]) -> Result<Vec<(u64, Letter)>, OutboxError> {
        let table = self.database.begin_read()?.open_table(WAITING)?;
        let mut letters: Vec<(u64, Letter)> = Vec::new();
        for entry in table.iter()? {
            let (sequence, bytes) = entry?;
            let letter: Letter = parse(bytes.value())?;
            let is_behind = letters.iter().any(|(_, earlier)| {
                earlier.channel == letter.channel && earlier.study_uid == letter.study_uid
            });
            if channels.contains(&letter.channel) && !is_behind {
                letters.push((sequence.value(), letter));
            }
            if letters.len() == MAX_PASS {
                break;
            }
        }
        Ok(letters)
    }

    /// What a letter tells.
    ///
    /// # Errors
    /// The medium fails, or the letter is gone.
    pub(crate) fn result(&self, sequence: u64) -> Result<StudyResult, OutboxError> {
        let table = self.database.begin_read()?.open_table(RESULTS)?;
        let bytes = table.get(sequence)?;
        let bytes = bytes.as_ref().map_or(&[][..], |bytes| bytes.value());
        parse(bytes)
    }

    /// A letter's bytes, once they are frozen.
    ///
    /// # Errors
    /// The medium fails.
    pub(crate) fn frozen(&self, sequence: u64) -> Result<Option<Vec<u8>>, OutboxError> {
        let table = self.database.begin_read()?.open_table(FROZEN)?;
        Ok(table.get(sequence)?.map(|bytes| bytes.value().to_vec()))
    }

    /// Keeps a letter's bytes: from here on every attempt sends these. A fallback class replaces them after the first was refused.
    /// Whether the letter waits still: one that was given up or deleted while it was made is left as it is.
    ///
    /// # Errors
    /// The medium fails.
    pub(crate) fn freeze(
        &self,
        sequence: u64,
        letter: &Letter,
        bytes: &[u8],
    ) -> Result<bool, OutboxError> {
        let transaction = self.database.begin_write()?;
        let is_waiting = is_waiting(&transaction, sequence)?;
        if is_waiting {
            put(&transaction, WAITING, sequence, letter)?;
            transaction.open_table(FROZEN)?.insert(sequence, bytes)?;
        }
        transaction.commit()?;
        Ok(is_waiting)
    }

    /// The receiver has it, and where `is_wanted` shall be asked to commit to it.
    ///
    /// # Errors
    /// The medium fails.
    pub(crate) fn accepted(
        &self,
        sequence: u64,
        mut letter: Letter,
        remark: Option<String>,
        now_ms: i64,
        is_wanted: bool,
    ) -> Result<(), OutboxError> {
        letter.ended_ms = Some(now_ms);
        letter.remark = remark;
        let transaction = self.database.begin_write()?;
        // Among the dead it is where it was given up for want of room while it was under way.
        for table in [WAITING, DEAD, RESULTS, FROZEN] {
            remove(&transaction, table, sequence)?;
        }
        put(&transaction, ACCEPTED, sequence, &letter)?;
        if let Some(document) = &letter.document {
            let bytes = json(document)?;
            let mut latest = transaction.open_table(LATEST)?;
            latest.insert(latest_name(&letter).as_str(), bytes.as_slice())?;
            if is_wanted {
                asked::want(&transaction, sequence, &letter, document)?;
            }
        }
        transaction.commit()?;
        Ok(())
    }

    /// A dead letter: kept with its bytes and its reason until it is too old, or sent again by [`Self::revive`]. One that does not wait any
    /// more was given up or deleted while it was under way, and is left as it is.
    ///
    /// # Errors
    /// The medium fails.
    pub(crate) fn bury(
        &self,
        sequence: u64,
        mut letter: Letter,
        reason: String,
        now_ms: i64,
    ) -> Result<(), OutboxError> {
        letter.ended_ms = Some(now_ms);
        letter.remark = Some(reason);
        let transaction = self.database.begin_write()?;
        if is_waiting(&transaction, sequence)? {
            remove(&transaction, WAITING, sequence)?;
            put(&transaction, DEAD, sequence, &letter)?;
        }
        transaction.commit()?;
        Ok(())
    }

    /// The document that a receiver accepted last about a letter's study.
    ///
    /// # Errors
    /// The medium fails.
    pub(crate) fn predecessor(&self, letter: &Letter) -> Result<Option<Predecessor>, OutboxError> {
        let table = self.database.begin_read()?.open_table(LATEST)?;
        let Some(bytes) = table.get(latest_name(letter).as_str())? else {
            return Ok(None);
        };
        let document: Document = parse(bytes.value())?;
        Ok(Some(Predecessor {
            sop_class_uid: document.sop_class_uid,
            series_uid: document.series_uid,
            sop_instance_uid: document.sop_instance_uid,
        }))
    }

    /// How many letters wait and how many are dead.
    ///
    /// # Errors
    /// The medium fails.
    pub(crate) fn counts(&self) -> Result<Counts, OutboxError> {
        let transaction = self.database.begin_read()?;
        Ok(Counts {
            waiting: transaction.open_table(WAITING)?.len()?,
            dead: transaction.open_table(DEAD)?.len()?,
        })
    }
}

fn latest_name(letter: &Letter) -> String {
    format!("{}/{}", letter.channel.name(), letter.study_uid)
}
