//! What is written to the store, each batch in one transaction, and what is forgotten by age.

use std::collections::BTreeSet;

use redb::{ReadableDatabase, ReadableTable, WriteTransaction};
use serde::Deserialize;
use shared::uid::Uid;

use super::{
    AGAIN, Batch, ELEMENTS, Enqueue, META, META_CURSOR, META_PARTIAL, META_PARTIAL_FRAMES,
    META_POSITIVE, META_STUDIES, SLICES, STATEMENTS, STUDIES, Statement, Store, StoreError,
    UNASSIGNED, json, parse,
};
use crate::intake::clock::Ages;
use crate::result::{Outcome, StudyResult};

impl Store {
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

    /// Forgets every study whose last object is too old, and objects without a study up to `before_sequence`. A study that came while the
    /// clock was wrong is forgotten when the last of its objects has gone from the spool, that is, lies at or below `before_sequence`. The
    /// studies that had a result.
    ///
    /// # Errors
    /// The medium fails.
    pub(crate) fn forget(&self, ages: Ages, before_sequence: u64) -> Result<Vec<Uid>, StoreError> {
        let old = self.old_studies(ages, before_sequence)?;
        let is_old = |study: &str| old.contains(study);
        let mut forgotten = Vec::new();
        let transaction = self.database.begin_write()?;
        {
            let mut studies = transaction.open_table(STUDIES)?;
            for study in &old {
                if let Some(row) = studies.remove(study.as_str())? {
                    count(&transaction, Some(is_positive(row.value())?), None)?;
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
        ages: Ages,
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
            let is_old = ages.is_too_old(row.received_ms);
            let is_old = is_old.unwrap_or(row.sequence <= before_sequence);
            let studies = if is_old { &mut known } else { &mut kept };
            let study = key.value().0;
            if !studies.contains(study) {
                studies.insert(study.to_owned());
            }
        }
        Ok(&known - &kept)
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
    let before = studies.insert(study, json(result)?.as_slice())?;
    let before = before.map(|row| is_positive(row.value())).transpose()?;
    count(transaction, before, Some(result.is_positive()))?;
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

/// Whether a study as it is stored is positive; the rest of the row is skipped, not built.
pub(super) fn is_positive(row: &[u8]) -> Result<bool, StoreError> {
    #[derive(Deserialize)]
    struct Row {
        outcome: Outcome,
    }
    let row: Row = parse(row)?;
    Ok(row.outcome == Outcome::Positive)
}

/// Counts studies, where a row's answer (whether it is positive) takes the place of another.
fn count(
    transaction: &WriteTransaction,
    before: Option<bool>,
    after: Option<bool>,
) -> Result<(), StoreError> {
    let mut meta = transaction.open_table(META)?;
    for (key, is_counted) in [
        (META_STUDIES, (|_| true) as fn(bool) -> bool),
        (META_POSITIVE, |is_positive| is_positive),
    ] {
        let n_before = meta.get(key)?.map_or(0, |value| value.value());
        let n = (n_before + u64::from(after.is_some_and(is_counted)))
            .saturating_sub(u64::from(before.is_some_and(is_counted)));
        meta.insert(key, n)?;
    }
    Ok(())
}
