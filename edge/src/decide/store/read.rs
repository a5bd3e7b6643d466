//! What every later stage reads from the store.

use redb::{ReadOnlyTable, ReadableDatabase, ReadableTable};
use shared::uid::Uid;

use super::{
    AGAIN, ELEMENTS, ElementSets, META, META_CURSOR, META_PARTIAL, META_PARTIAL_FRAMES,
    META_POSITIVE, META_REBUILD_UNTIL, META_STUDIES, Rows, SLICES, STATEMENTS, STUDIES, Statement,
    Store, StoreError, UNASSIGNED, parse,
};
use crate::result::{State, StudyResult};
use crate::wire::Reason;

impl Store {
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
        Ok((self.meta(META_STUDIES)?, self.meta(META_POSITIVE)?))
    }

    /// Up to this sequence studies are decided again; 0 where nothing was lost.
    ///
    /// # Errors
    /// As [`Self::cursor`].
    pub(crate) fn rebuild_until(&self) -> Result<u64, StoreError> {
        self.meta(META_REBUILD_UNTIL)
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

    fn meta(&self, key: &str) -> Result<u64, StoreError> {
        let table = self.database.begin_read()?.open_table(META)?;
        Ok(table.get(key)?.map_or(0, |value| value.value()))
    }
}
