//! The results store: one redb database with every slice's answer, every study's result and how far the spool is decided.
//!
//! In: batches of answers. Out: what every later stage reads. The cursor (the last sequence of the spool that is decided) and the answers
//! that it stands for are written in one transaction, and so is what is put into the outbox: whatever is killed when, no answer is
//! lost, none counts twice. Values are JSON under one schema version; a database of a later version is refused, not read. The page
//! cache is bounded ([`CACHE_BYTES`]). When a study is complete is left to [`super::decider`].

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use redb::{
    Database, ReadOnlyTable, ReadableDatabase, ReadableTable, TableDefinition, WriteTransaction,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use shared::uid::Uid;

use crate::intake::retention::is_clock_trusted;
use crate::result::{Element, Outcome, State, StudyResult};
use crate::wire::{Reason, SliceFacts};

/// Layout of the tables and of what is in them.
const SCHEMA: u64 = 1;
/// Bytes of database pages that are kept in memory.
const CACHE_BYTES: usize = 8 << 20;

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
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store").finish_non_exhaustive()
    }
}

impl Store {
    /// Opens the database, or makes an empty one.
    ///
    /// # Errors
    /// The medium fails, the database is broken or of a later version.
    pub(crate) fn open(path: &Path) -> Result<Arc<Self>, StoreError> {
        let mut builder = Database::builder();
        builder.set_cache_size(CACHE_BYTES);
        let database = builder.create(path)?;
        let transaction = database.begin_write()?;
        {
            let mut meta = transaction.open_table(META)?;
            let found = meta.get(META_SCHEMA)?.map(|value| value.value());
            match found {
                Some(found) if found > SCHEMA => {
                    let path = path.to_owned();
                    return Err(StoreError::Newer { path, found });
                }
                Some(_) => {}
                None => drop(meta.insert(META_SCHEMA, SCHEMA)?),
            }
            // Readers need not ask whether tables exist.
            transaction.open_table(SLICES)?;
            transaction.open_table(ELEMENTS)?;
            transaction.open_table(STUDIES)?;
            transaction.open_table(STATEMENTS)?;
            transaction.open_table(AGAIN)?;
            transaction.open_table(UNASSIGNED)?;
        }
        transaction.commit()?;
        Ok(Arc::new(Self {
            database: Arc::new(database),
        }))
    }

    /// The database, for the tables of others.
    pub(crate) fn database(&self) -> Arc<Database> {
        Arc::clone(&self.database)
    }

    /// The last sequence of the spool up to which everything is decided.
    ///
    /// # Errors
    /// As all reading: the database is broken or the medium fails.
    pub(crate) fn cursor(&self) -> Result<u64, StoreError> {
        self.meta(META_CURSOR)
    }

    /// The sequence that is decided in part, and its frames that are.
    ///
    /// # Errors
    /// As [`Self::cursor`].
    pub(crate) fn partial(&self) -> Result<(u64, u32), StoreError> {
        let frames = self.meta(META_PARTIAL_FRAMES)?;
        Ok((
            self.meta(META_PARTIAL)?,
            u32::try_from(frames).unwrap_or(u32::MAX),
        ))
    }

    /// Every study, in the order of their UIDs.
    ///
    /// # Errors
    /// As [`Self::cursor`].
    #[cfg(test)]
    pub(crate) fn studies(&self) -> Result<Vec<StudyResult>, StoreError> {
        let table = self.database.begin_read()?.open_table(STUDIES)?;
        let mut studies = Vec::new();
        for entry in table.iter()? {
            studies.push(parse(entry?.1.value())?);
        }
        Ok(studies)
    }

    /// Shows every study, one at a time, so that not all of them are in memory at once.
    ///
    /// # Errors
    /// As [`Self::cursor`].
    pub(crate) fn each_study(&self, show: &mut dyn FnMut(StudyResult)) -> Result<(), StoreError> {
        let table = self.database.begin_read()?.open_table(STUDIES)?;
        for entry in table.iter()? {
            show(parse(entry?.1.value())?);
        }
        Ok(())
    }

    /// How many studies there are, and how many of them are positive.
    ///
    /// # Errors
    /// As [`Self::cursor`].
    pub(crate) fn count_studies(&self) -> Result<(u64, u64), StoreError> {
        /// The rest is skipped, not built.
        #[derive(Deserialize)]
        struct Row {
            outcome: Outcome,
        }
        let table = self.database.begin_read()?.open_table(STUDIES)?;
        let (mut n_studies, mut n_positive) = (0, 0);
        for entry in table.iter()? {
            let row: Row = parse(entry?.1.value())?;
            n_studies += 1;
            n_positive += u64::from(row.outcome == Outcome::Positive);
        }
        Ok((n_studies, n_positive))
    }

    /// Studies that are not complete.
    ///
    /// # Errors
    /// As [`Self::cursor`].
    pub(crate) fn open_studies(&self) -> Result<Vec<Uid>, StoreError> {
        let table = self.database.begin_read()?.open_table(STUDIES)?;
        let mut open = Vec::new();
        for entry in table.iter()? {
            let result: StudyResult = parse(entry?.1.value())?;
            if result.state != State::Complete {
                open.push(result.study_uid);
            }
        }
        Ok(open)
    }

    /// One study.
    ///
    /// # Errors
    /// As [`Self::cursor`].
    pub(crate) fn study(&self, study_uid: &Uid) -> Result<Option<StudyResult>, StoreError> {
        let table = self.database.begin_read()?.open_table(STUDIES)?;
        let found = table.get(study_uid.as_str())?;
        found.map(|value| parse(value.value())).transpose()
    }

    /// The slices of a study and the element sets that they name.
    ///
    /// # Errors
    /// As [`Self::cursor`].
    pub(crate) fn slices(&self, study_uid: &Uid) -> Result<(Rows, ElementSets), StoreError> {
        let transaction = self.database.begin_read()?;
        let study = study_uid.as_str();
        let mut rows = Rows::new();
        let slices: ReadOnlyTable<(&str, &str, u32), &[u8]> = transaction.open_table(SLICES)?;
        for entry in slices.range((study, "", 0)..)? {
            let (key, value) = entry?;
            let (of_study, sop_uid, frame) = key.value();
            if of_study != study {
                break;
            }
            if let Ok(sop_uid) = Uid::new(sop_uid) {
                rows.insert((sop_uid, frame), parse(value.value())?);
            }
        }
        let mut sets = ElementSets::new();
        let elements: ReadOnlyTable<(&str, &str), &[u8]> = transaction.open_table(ELEMENTS)?;
        for entry in elements.range((study, "")..)? {
            let (key, value) = entry?;
            let (of_study, digest) = key.value();
            if of_study != study {
                break;
            }
            sets.insert(digest.to_owned(), parse(value.value())?);
        }
        Ok((rows, sets))
    }

    /// The last thing that was said of a study.
    ///
    /// # Errors
    /// As [`Self::cursor`].
    pub(crate) fn last_statement(&self, study_uid: &Uid) -> Result<Option<Statement>, StoreError> {
        Ok(self.statements(study_uid)?.pop())
    }

    /// Everything that was said of a study, the first first.
    ///
    /// # Errors
    /// As [`Self::cursor`].
    pub(crate) fn statements(&self, study_uid: &Uid) -> Result<Vec<Statement>, StoreError> {
        let table = self.database.begin_read()?.open_table(STATEMENTS)?;
        let study = study_uid.as_str();
        let mut statements = Vec::new();
        for entry in table.range((study, 0)..=(study, u32::MAX))? {
            statements.push(parse(entry?.1.value())?);
        }
        Ok(statements)
    }

    /// Sequences that are to be analysed again.
    ///
    /// # Errors
    /// As [`Self::cursor`].
    pub(crate) fn again(&self) -> Result<Vec<u64>, StoreError> {
        let table = self.database.begin_read()?.open_table(AGAIN)?;
        let mut sequences = Vec::new();
        for entry in table.iter()? {
            sequences.push(entry?.0.value());
        }
        Ok(sequences)
    }

    /// Objects that name no study, with the reason.
    ///
    /// # Errors
    /// As [`Self::cursor`].
    pub(crate) fn unassigned(&self) -> Result<Vec<(u64, Reason)>, StoreError> {
        let table = self.database.begin_read()?.open_table(UNASSIGNED)?;
        let mut unassigned = Vec::new();
        for entry in table.iter()? {
            let (sequence, value) = entry?;
            unassigned.push((sequence.value(), parse(value.value())?));
        }
        Ok(unassigned)
    }

    /// Writes a batch, durably, and puts what is said into the outbox.
    ///
    /// # Errors
    /// The medium fails or the outbox refuses; nothing is written then.
    pub(crate) fn commit(&self, batch: &Batch, enqueue: &Enqueue) -> Result<(), StoreError> {
        let transaction = self.database.begin_write()?;
        write_slices(&transaction, batch)?;
        write_progress(&transaction, batch)?;
        for (result, statement) in &batch.studies {
            write_study(&transaction, result, statement.as_ref())?;
            if statement.is_some() {
                enqueue(&transaction, result).map_err(StoreError::Outbox)?;
            }
        }
        transaction.commit()?;
        Ok(())
    }

    /// Forgets every study whose last object came before `before_ms`, Unix time, and objects without a study up to `before_sequence`.
    /// A study that came while the clock was not set is forgotten when the last of its objects has gone from the spool, that is, lies
    /// at or below `before_sequence`. The studies that had a result.
    ///
    /// # Errors
    /// The medium fails.
    pub(crate) fn forget(
        &self,
        before_ms: i64,
        before_sequence: u64,
    ) -> Result<Vec<Uid>, StoreError> {
        let old = self.old_studies(before_ms, before_sequence)?;
        let is_old = |study: &str| old.contains(study);
        let mut forgotten = Vec::new();
        let transaction = self.database.begin_write()?;
        {
            let mut studies = transaction.open_table(STUDIES)?;
            for study in &old {
                if studies.remove(study.as_str())?.is_some() {
                    forgotten.extend(Uid::new(study));
                }
            }
            if !old.is_empty() {
                let mut slices = transaction.open_table(SLICES)?;
                slices.retain(|(study, _, _), _| !is_old(study))?;
                let mut elements = transaction.open_table(ELEMENTS)?;
                elements.retain(|(study, _), _| !is_old(study))?;
                let mut statements = transaction.open_table(STATEMENTS)?;
                statements.retain(|(study, _), _| !is_old(study))?;
            }
            let mut unassigned = transaction.open_table(UNASSIGNED)?;
            unassigned.retain(|sequence, _| sequence > before_sequence)?;
        }
        transaction.commit()?;
        Ok(forgotten)
    }

    /// Studies, with a result or without, all of whose objects are too old.
    fn old_studies(
        &self,
        before_ms: i64,
        before_sequence: u64,
    ) -> Result<BTreeSet<String>, StoreError> {
        /// The rest is skipped, not built.
        #[derive(Deserialize)]
        struct Row {
            sequence: u64,
            received_ms: i64,
        }
        let table = self.database.begin_read()?.open_table(SLICES)?;
        let (mut known, mut kept) = (BTreeSet::new(), BTreeSet::new());
        for entry in table.iter()? {
            let (key, value) = entry?;
            let row: Row = parse(value.value())?;
            let is_old = if is_clock_trusted(row.received_ms) {
                row.received_ms < before_ms
            } else {
                row.sequence <= before_sequence
            };
            let studies = if is_old { &mut known } else { &mut kept };
            let study = key.value().0;
            if !studies.contains(study) {
                studies.insert(study.to_owned());
            }
        }
        Ok(&known - &kept)
    }

    fn meta(&self, key: &str) -> Result<u64, StoreError> {
        let table = self.database.begin_read()?.open_table(META)?;
        Ok(table.get(key)?.map_or(0, |value| value.value()))
    }
}

fn write_slices(transaction: &WriteTransaction, batch: &Batch) -> Result<(), StoreError> {
    let mut slices = transaction.open_table(SLICES)?;
    for (study_uid, (sop_uid, frame), row) in &batch.rows {
        let key = (study_uid.as_str(), sop_uid.as_str(), *frame);
        slices.insert(key, json(row)?.as_slice())?;
    }
    let mut elements = transaction.open_table(ELEMENTS)?;
    for (study_uid, digest, set) in &batch.elements {
        let key = (study_uid.as_str(), digest.as_str());
        elements.insert(key, json(set)?.as_slice())?;
    }
    let mut unassigned = transaction.open_table(UNASSIGNED)?;
    for (sequence, reason) in &batch.unassigned {
        unassigned.insert(sequence, json(reason)?.as_slice())?;
    }
    Ok(())
}

fn write_progress(transaction: &WriteTransaction, batch: &Batch) -> Result<(), StoreError> {
    let mut meta = transaction.open_table(META)?;
    if let Some(cursor) = batch.cursor {
        meta.insert(META_CURSOR, cursor)?;
    }
    if let Some((sequence, frames)) = batch.partial {
        meta.insert(META_PARTIAL, sequence)?;
        meta.insert(META_PARTIAL_FRAMES, u64::from(frames))?;
    }
    let mut again = transaction.open_table(AGAIN)?;
    for sequence in &batch.again_done {
        again.remove(sequence)?;
    }
    for sequence in &batch.again {
        again.insert(sequence, ())?;
    }
    Ok(())
}

fn write_study(
    transaction: &WriteTransaction,
    result: &StudyResult,
    statement: Option<&Statement>,
) -> Result<(), StoreError> {
    let study = result.study_uid.as_str();
    let mut studies = transaction.open_table(STUDIES)?;
    studies.insert(study, json(result)?.as_slice())?;
    let Some(statement) = statement else {
        return Ok(());
    };
    let mut statements = transaction.open_table(STATEMENTS)?;
    if let Some(before) = statement.revision.checked_sub(1) {
        let earlier = statements.get((study, before))?;
        let earlier: Option<Statement> = earlier.map(|value| parse(value.value())).transpose()?;
        if let Some(mut earlier) = earlier {
            earlier.superseded_by = Some(statement.revision);
            statements.insert((study, before), json(&earlier)?.as_slice())?;
        }
    }
    statements.insert((study, statement.revision), json(statement)?.as_slice())?;
    Ok(())
}

fn json(value: &impl Serialize) -> Result<Vec<u8>, StoreError> {
    serde_json::to_vec(value).map_err(StoreError::Row)
}

fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, StoreError> {
    serde_json::from_slice(bytes).map_err(StoreError::Row)
}
