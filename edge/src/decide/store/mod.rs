//! The results store: one redb database with every slice's answer, every study's result and how far the spool is decided.
//!
//! In: batches of answers. Out: what every later stage reads. The cursor (the last sequence of the spool that is decided) and the answers
//! that it stands for are written in one transaction, and so is what is put into the outbox: whatever is killed when, no answer is
//! lost, none counts twice. Values are JSON under one schema version; a database of a later version is refused, not read, and one that
//! is missing or broken is made anew from the spool ([`open`]). When a study is complete is left to [`super::decider`].

mod open;
mod read;
mod write;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

pub(crate) use open::{Origin, Present};
use redb::{Database, TableDefinition, WriteTransaction};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use shared::uid::Uid;

use crate::result::{Element, StudyResult};
use crate::wire::{Reason, SliceFacts};

/// Layout of the tables and of what is in them.
const SCHEMA: u64 = 1;

const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");
/// Study, SOP Instance UID, frame (0: the whole object) -> [`SliceRow`].
const SLICES: TableDefinition<'_, (&str, &str, u32), &[u8]> = TableDefinition::new("slices");
/// Study, digest -> elements.
const ELEMENTS: TableDefinition<'_, (&str, &str), &[u8]> = TableDefinition::new("elements");
/// Study -> [`StudyResult`].
const STUDIES: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("studies");
/// Study, revision -> [`Statement`].
const STATEMENTS: TableDefinition<'_, (&str, u32), &[u8]> = TableDefinition::new("statements");
/// Sequences that are analysed again when the model is sound.
const AGAIN: TableDefinition<'_, u64, ()> = TableDefinition::new("again");
/// Objects that name no study -> [`Reason`].
const UNASSIGNED: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("unassigned");

const META_SCHEMA: &str = "schema";
const META_CURSOR: &str = "cursor";
const META_PARTIAL: &str = "partial";
const META_PARTIAL_FRAMES: &str = "partial-frames";
/// Up to this sequence studies are decided again, because what had been decided is lost.
const META_REBUILD_UNTIL: &str = "rebuild-until";
/// How many studies have a result.
const META_STUDIES: &str = "studies";
/// How many of them are positive.
const META_POSITIVE: &str = "positive";

/// Why the store cannot do what it should.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum StoreError {
    /// Written by a later version of this program.
    #[error("{} has schema {found}; this version reads {SCHEMA} and older: install the later version again, or move the file away", path.display())]
    Newer {
        /// The database.
        path: PathBuf,
        /// Its schema.
        found: u64,
    },
    /// The database is broken or the medium failed.
    #[error("results database")]
    Database(#[source] Box<redb::Error>),
    /// A row is not what this version writes.
    #[error("results database: a row cannot be read")]
    Row(#[source] serde_json::Error),
    /// The database's library gave up.
    #[error("results database: broken, and not where that is expected")]
    Panic,
    /// The outbox refused.
    #[error("outbox")]
    Outbox(#[source] Box<dyn std::error::Error + Send + Sync>),
}

impl<E: Into<redb::Error>> From<E> for StoreError {
    fn from(error: E) -> Self {
        Self::Database(Box::new(error.into()))
    }
}

/// Where a slice belongs within its study: SOP Instance UID and frame, 0 for an object that is one slice.
pub(crate) type SliceKey = (Uid, u32);

/// What is known of a slice.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct SliceRow {
    /// Where the object lies in the spool: the one that came last.
    pub(crate) sequence: u64,
    /// When that came, Unix time in ms.
    pub(crate) received_ms: i64,
    /// Series Instance UID.
    pub(crate) series_uid: Option<Uid>,
    /// SOP Class UID.
    pub(crate) sop_class_uid: String,
    /// Digest of the copied elements, a key of the study's.
    pub(crate) elements: String,
    /// `None` for a slice that was refused.
    pub(crate) facts: Option<SliceFacts>,
    /// `None` for a slice that was not analysed.
    pub(crate) logit: Option<f32>,
    /// Digest of the model that gave the logit.
    pub(crate) model: Option<String>,
    /// Why it was not analysed.
    pub(crate) reason: Option<Reason>,
    /// How often it came.
    pub(crate) n_received: u32,
    /// Whether it came with other pixels than before.
    pub(crate) is_replaced: bool,
    /// Whether it came again in a form that cannot be analysed; the earlier answer stands.
    pub(crate) is_spoilt: bool,
}

/// The slices of one study.
pub(crate) type Rows = BTreeMap<SliceKey, SliceRow>;
/// The distinct sets of copied elements of one study, by digest.
pub(crate) type ElementSets = BTreeMap<String, Vec<Element>>;

/// Something that was said of a study, to somebody.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Statement {
    /// Counts from 1.
    pub(crate) revision: u32,
    /// Whether it was said before the study was complete.
    pub(crate) is_provisional: bool,
    /// Digest of what was said.
    pub(crate) fingerprint: String,
    /// Unix time in ms.
    pub(crate) decided_ms: i64,
    /// The revision that replaces it.
    pub(crate) superseded_by: Option<u32>,
}

/// What is written in one transaction.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    /// Slices, by study.
    pub(crate) rows: Vec<(Uid, SliceKey, SliceRow)>,
    /// Element sets, by study and digest.
    pub(crate) elements: Vec<(Uid, String, Vec<Element>)>,
    /// Objects without a study.
    pub(crate) unassigned: Vec<(u64, Reason)>,
    /// Every sequence up to this is decided.
    pub(crate) cursor: Option<u64>,
    /// Of this sequence, so many frames are decided.
    pub(crate) partial: Option<(u64, u32)>,
    /// To be analysed again.
    pub(crate) again: Vec<u64>,
    /// Analysed again.
    pub(crate) again_done: Vec<u64>,
    /// Studies as they are now; what is said goes out.
    pub(crate) studies: Vec<(StudyResult, Option<Statement>)>,
}

impl Batch {
    /// Whether there is nothing to write.
    pub(crate) fn is_empty(&self) -> bool {
        self.rows.is_empty()
            && self.unassigned.is_empty()
            && self.cursor.is_none()
            && self.partial.is_none()
            && self.again_done.is_empty()
            && self.studies.is_empty()
    }
}

/// Puts a study's result into the outbox, inside the transaction.
pub(crate) type Enqueue = dyn Fn(&WriteTransaction, &StudyResult) -> Result<(), Box<dyn std::error::Error + Send + Sync>>
    + Send
    + Sync;

/// The store.
pub(crate) struct Store {
    database: Arc<Database>,
    path: PathBuf,
    origin: Origin,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store").finish_non_exhaustive()
    }
}

impl Store {
    /// The database, for the tables of others.
    pub(crate) fn database(&self) -> Arc<Database> {
        Arc::clone(&self.database)
    }
}

fn json(value: &impl Serialize) -> Result<Vec<u8>, StoreError> {
    serde_json::to_vec(value).map_err(StoreError::Row)
}

fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, StoreError> {
    serde_json::from_slice(bytes).map_err(StoreError::Row)
}
