//! Opening the store: the one that is there, a new one, or a new one in the place of one that is broken.
//!
//! In: the database's path and what the spool holds. Out: a store, and where it is a new one beside objects that were there before, a rebuild:
//! the spool is decided again from its first object on. A broken database is set aside under [`Store::aside`], one at most, for whoever wants to
//! look; it holds patient data and goes by age. Broken is what cannot be opened, and after [`Store::suspect`] what does not pass a look at
//! every row. A medium that fails and a database of a later version are no reason to set anything aside.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use redb::{Database, ReadableDatabase, ReadableTable, Table, WriteTransaction};
use serde_json::Value;

use super::write::is_positive;
use super::{
    AGAIN, ELEMENTS, META, META_POSITIVE, META_REBUILD_UNTIL, META_SCHEMA, META_STUDIES, SCHEMA,
    SLICES, STATEMENTS, STUDIES, SliceRow, Statement, Store, StoreError, UNASSIGNED, json, parse,
};
use crate::intake::clock::Ages;
use crate::launch::until_let_go;
use crate::result::StudyResult;
use crate::wire::Reason;

/// Bytes of database pages that are kept in memory.
const CACHE_BYTES: usize = 8 << 20;

/// How the store came to be what it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) enum Origin {
    /// It was there, or nothing was there at all: this node has never run.
    #[default]
    Found,
    /// It was not there, but objects were.
    Missing,
    /// It was broken, as these words say, and was set aside.
    Broken(String),
}

/// What the spool holds while the store is opened.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Present {
    /// The last sequence; 0 where there is none.
    pub(crate) latest: u64,
    /// Sequences beside those that are kept, which were deleted.
    pub(crate) deleted: Vec<u64>,
}

impl Store {
    /// Opens the database, or makes one in the place of one that is missing or broken.
    ///
    /// # Errors
    /// The medium fails, or the database is of a later version.
    pub(crate) fn open(path: &Path, present: &Present) -> Result<Arc<Self>, StoreError> {
        let suspect = beside(path, "suspect");
        let found = guarded(|| {
            let (mut database, is_new) = open_file(path, present)?;
            if suspect.exists() {
                look_at_everything(&mut database)?;
            }
            Ok((database, is_new))
        });
        let (database, origin) = match found {
            Ok((database, true)) if present.latest > 0 => (database, Origin::Missing),
            Ok((database, _)) => (database, Origin::Found),
            Err(fault) if fault.is_broken() => {
                fs::rename(path, beside(path, "broken")).map_err(redb::Error::Io)?;
                let (database, _) = open_file(path, present)?;
                (database, Origin::Broken(in_full(&fault)))
            }
            Err(fault) => return Err(fault),
        };
        if suspect.exists() {
            fs::remove_file(suspect).map_err(redb::Error::Io)?;
        }
        Ok(Arc::new(Self {
            database: Arc::new(database),
            path: path.to_owned(),
            origin,
        }))
    }

    /// How the store came to be.
    pub(crate) fn origin(&self) -> &Origin {
        &self.origin
    }

    /// Where a broken database lies, once there was one.
    pub(crate) fn aside(&self) -> PathBuf {
        beside(&self.path, "broken")
    }

    /// Something in it cannot be read: the next start looks at all of it.
    pub(crate) fn suspect(&self) {
        // Where nothing can be written, the medium is at fault, and that says so by itself.
        drop(fs::write(beside(&self.path, "suspect"), b""));
    }

    /// Deletes what was set aside, when it was last written to too long ago.
    ///
    /// # Errors
    /// The medium fails.
    pub(crate) fn forget_aside(&self, ages: Ages) -> std::io::Result<()> {
        let Ok(metadata) = fs::metadata(self.aside()) else {
            return Ok(());
        };
        let modified = jiff::Timestamp::try_from(metadata.modified()?);
        let modified_ms = modified.map_or(0, jiff::Timestamp::as_millisecond);
        if ages.is_gone_by(modified_ms) {
            fs::remove_file(self.aside())?;
        }
        Ok(())
    }
}

impl StoreError {
    /// Whether the database itself is at fault, not the medium or the program.
    pub(crate) fn is_broken(&self) -> bool {
        use std::io::ErrorKind::{InvalidData, UnexpectedEof};
        match self {
            Self::Row(_) | Self::Panic => true,
            Self::Database(error) => match error.as_ref() {
                redb::Error::Corrupted(_)
                | redb::Error::TableTypeMismatch { .. }
                | redb::Error::TableIsMultimap(_)
                | redb::Error::TypeDefinitionChanged { .. } => true,
                redb::Error::Io(error) => matches!(error.kind(), InvalidData | UnexpectedEof),
                _ => false,
            },
            Self::Newer { .. } | Self::Outbox(_) => false,
        }
    }
}

/// `results.redb` and `broken`: `results.redb.broken`.
fn beside(path: &Path, ending: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".");
    name.push(ending);
    name.into()
}

/// The database's library checks what it reads, but not everywhere before it counts on it.
fn guarded<T>(work: impl FnOnce() -> Result<T, StoreError>) -> Result<T, StoreError> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or(Err(StoreError::Panic))
}

/// The database with all its tables, and whether it is new. A new one begins with the rebuild, in the same transaction.
fn open_file(path: &Path, present: &Present) -> Result<(Database, bool), StoreError> {
    let mut builder = Database::builder();
    builder.set_cache_size(CACHE_BYTES);
    let database = until_let_go(
        || builder.create(path),
        |error| matches!(error, redb::DatabaseError::DatabaseAlreadyOpen),
    )?;
    let transaction = database.begin_write()?;
    let is_new = {
        let mut meta = transaction.open_table(META)?;
        let found = meta.get(META_SCHEMA)?.map(|value| value.value());
        if let Some(found) = found.filter(|found| *found > SCHEMA) {
            let path = path.to_owned();
            return Err(StoreError::Newer { path, found });
        }
        // Readers need not ask whether tables exist.
        transaction.open_table(SLICES)?;
        transaction.open_table(ELEMENTS)?;
        transaction.open_table(STUDIES)?;
        transaction.open_table(STATEMENTS)?;
        transaction.open_table(AGAIN)?;
        let mut unassigned = transaction.open_table(UNASSIGNED)?;
        if found.is_none() {
            meta.insert(META_SCHEMA, SCHEMA)?;
            meta.insert(META_REBUILD_UNTIL, present.latest)?;
            meta.insert(META_STUDIES, 0)?;
            let reason = json(&Reason::new("deleted", "retention has deleted it"))?;
            for sequence in &present.deleted {
                unassigned.insert(sequence, reason.as_slice())?;
            }
        }
        if meta.get(META_STUDIES)?.is_none() {
            recount(&transaction, &mut meta)?;
        }
        found.is_none()
    };
    transaction.commit()?;
    Ok((database, is_new))
}

/// Counts the studies of a database that does not hold their number yet.
fn recount(
    transaction: &WriteTransaction,
    meta: &mut Table<'_, &str, u64>,
) -> Result<(), StoreError> {
    let (mut n_studies, mut n_positive) = (0, 0);
    for entry in transaction.open_table(STUDIES)?.iter()? {
        n_studies += 1;
        n_positive += u64::from(is_positive(entry?.1.value())?);
    }
    meta.insert(META_STUDIES, n_studies)?;
    meta.insert(META_POSITIVE, n_positive)?;
    Ok(())
}

/// Reads every page and every row.
fn look_at_everything(database: &mut Database) -> Result<(), StoreError> {
    database.check_integrity()?;
    let transaction = database.begin_read()?;
    for entry in transaction.open_table(SLICES)?.iter()? {
        parse::<SliceRow>(entry?.1.value())?;
    }
    for entry in transaction.open_table(ELEMENTS)?.iter()? {
        parse::<Value>(entry?.1.value())?;
    }
    for entry in transaction.open_table(STUDIES)?.iter()? {
        parse::<StudyResult>(entry?.1.value())?;
    }
    for entry in transaction.open_table(STATEMENTS)?.iter()? {
        parse::<Statement>(entry?.1.value())?;
    }
    for entry in transaction.open_table(UNASSIGNED)?.iter()? {
        parse::<Reason>(entry?.1.value())?;
    }
    Ok(())
}

/// An error with its causes.
fn in_full(error: &StoreError) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        text.push_str(&format!(": {error}"));
        cause = error.source();
    }
    text
}
