//! A study that is not complete: its slices so far, and what has been said of it.
//!
//! In: one slice's answer after another, then the question what is to be said now. Out: rows for the store, a result, and a
//! [`Statement`] where something is to be said that differs from what was said before. Pure but for [`OpenStudy::load`]. An answer that
//! was given stands until another one is.

use std::time::Instant;

use shared::uid::Uid;

use super::store::{ElementSets, Rows, SliceKey, SliceRow, Statement, Store, StoreError};
use super::studies::Judge;
use crate::result::{Outcome, State, StudyResult};
use crate::wire::Reason;

/// Remark of a study that is held after something was said of it: a correction would have to name one of the patients.
const SAID_BEFORE: &str = "a result was sent before the contradiction appeared; it is not corrected by this node while the study is held";
/// Most slices of one study; later ones are refused.
const MAX_SLICES: usize = 20_000;
/// Hexadecimal digits of a fingerprint.
const FINGERPRINT_DIGITS: usize = 32;

/// How far a study is when it is settled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// Everything is there: whatever follows is said.
    Complete,
    /// More may come: only a positive is said.
    Growing,
    /// It is decided again after its results were lost: nothing is said on the way, only when it is complete.
    Rebuilt,
}

/// The study.
#[derive(Debug)]
pub(super) struct OpenStudy {
    /// Its slices and element sets; `None` while they are not in memory.
    pub(super) known: Option<(Rows, ElementSets)>,
    /// When its last object arrived.
    pub(super) last_arrival: Instant,
    /// When its result was last written.
    pub(super) written: Option<Instant>,
    /// Whether slices have come since.
    pub(super) is_dirty: bool,
    /// What was said last.
    statement: Option<Statement>,
    /// What the store's result says.
    stored: Option<(State, Outcome)>,
    /// When the last revision was decided.
    decided_ms: i64,
}

/// What follows from the slices that are there.
#[derive(Debug)]
pub(super) struct Settled {
    /// The result.
    pub(super) result: StudyResult,
    /// What is to be said, where anything is.
    pub(super) statement: Option<Statement>,
    /// Whether it differs from what is stored in more than slices.
    pub(super) is_urgent: bool,
}

impl OpenStudy {
    /// The study as the store knows it, without its slices.
    pub(super) fn load(store: &Store, study_uid: &Uid, now: Instant) -> Result<Self, StoreError> {
        let result = store.study(study_uid)?;
        Ok(Self {
            known: None,
            last_arrival: now,
            written: None,
            is_dirty: false,
            statement: store.last_statement(study_uid)?,
            decided_ms: result.as_ref().map_or(0, |result| result.decided_ms),
            stored: result.map(|result| (result.state, result.outcome)),
        })
    }

    /// Slices in memory.
    pub(super) fn n_rows(&self) -> usize {
        self.known.as_ref().map_or(0, |(rows, _)| rows.len())
    }

    /// The last sequence of the slices in memory.
    pub(super) fn latest_sequence(&self) -> u64 {
        let rows = self.known.iter().flat_map(|(rows, _)| rows.values());
        rows.map(|row| row.sequence).max().unwrap_or_default()
    }

    /// Whether one more slice is kept.
    pub(super) fn has_room(&self) -> Result<(), Reason> {
        if self.n_rows() < MAX_SLICES {
            return Ok(());
        }
        let text = format!("the study has {MAX_SLICES} slices, its most");
        Err(Reason::new("too-many-slices", text))
    }

    /// The logit of the same pixels from the same model, where the slice has come before.
    pub(super) fn known_logit(
        &self,
        key: &SliceKey,
        pixel_digest: &str,
        model_digest: &str,
    ) -> Option<f32> {
        let row = self.known.as_ref()?.0.get(key)?;
        let is_same = row.facts.as_ref()?.pixel_digest == pixel_digest
            && row.model.as_deref() == Some(model_digest);
        row.logit.filter(|_| is_same)
    }

    /// Puts a slice in, with what is known of it from before; the row as it is now.
    pub(super) fn take(&mut self, key: SliceKey, mut row: SliceRow) -> SliceRow {
        let (rows, _) = self.known.get_or_insert_default();
        if let Some(before) = rows.get(&key) {
            let digest =
                |row: &SliceRow| row.facts.as_ref().map(|facts| facts.pixel_digest.clone());
            row.n_received = before.n_received.saturating_add(1);
            row.is_spoilt = before.is_spoilt;
            row.is_replaced = before.is_replaced
                || (digest(before).is_some()
                    && digest(&row).is_some()
                    && digest(before) != digest(&row));
            if before.logit.is_some() && row.logit.is_none() {
                // A good answer is not lost to a bad copy.
                row = SliceRow {
                    n_received: row.n_received,
                    is_spoilt: true,
                    ..before.clone()
                };
            }
        }
        self.is_dirty = true;
        rows.insert(key, row.clone());
        row
    }

    /// What follows now; `None` for a study without an image.
    pub(super) fn settle(
        &mut self,
        judge: &Judge,
        study_uid: &Uid,
        stage: Stage,
        now_ms: i64,
    ) -> Option<Settled> {
        let (rows, elements) = self.known.as_ref()?;
        let is_complete = stage == Stage::Complete;
        let mut result = judge.result(study_uid, rows, elements, is_complete)?;
        if stage == Stage::Rebuilt || !(is_complete || is_enough(judge, &result)) {
            result.outcome = Outcome::Pending;
        }
        if result.is_held() && self.statement.is_some() {
            result.remarks.push(SAID_BEFORE.to_owned());
        }
        let statement = self.statement(&result, is_complete, now_ms);
        let last = statement.as_ref().or(self.statement.as_ref());
        result.revision = last.map_or(1, |statement| statement.revision);
        result.decided_ms = last.map_or(self.decided_ms, |statement| statement.decided_ms);
        result.state = match last {
            _ if is_complete => State::Complete,
            Some(statement) if statement.is_provisional => State::Provisional,
            _ => State::Receiving,
        };
        if let (Outcome::Pending, Some((_, said)), Some(_)) =
            (&result.outcome, &self.stored, &self.statement)
        {
            result.outcome = said.clone();
        }
        let now = (result.state, result.outcome.clone());
        let is_urgent = statement.is_some() || self.stored.as_ref() != Some(&now);
        Some(Settled {
            result,
            statement,
            is_urgent,
        })
    }

    /// The result has been written.
    pub(super) fn wrote(&mut self, settled: &Settled, now: Instant) {
        self.stored = Some((settled.result.state, settled.result.outcome.clone()));
        self.decided_ms = settled.result.decided_ms;
        if let Some(statement) = &settled.statement {
            self.statement = Some(statement.clone());
        }
        self.written = Some(now);
        self.is_dirty = false;
    }

    fn statement(&self, result: &StudyResult, is_complete: bool, now_ms: i64) -> Option<Statement> {
        let before = self.statement.as_ref();
        let fingerprint = fingerprint(result);
        let is_new = if is_complete {
            before.is_none_or(|said| said.is_provisional || said.fingerprint != fingerprint)
        } else {
            let was_positive = matches!(&self.stored, Some((_, Outcome::Positive)));
            result.is_positive() && !(was_positive && before.is_some())
        };
        is_new.then(|| Statement {
            revision: before.map_or(1, |said| said.revision + 1),
            is_provisional: !is_complete,
            fingerprint,
            decided_ms: now_ms,
            superseded_by: None,
        })
    }
}

/// Whether a positive answer may be said already: the mean of the rule's highest slices needs that many.
fn is_enough(judge: &Judge, result: &StudyResult) -> bool {
    let wanted = judge.rule.as_ref().map_or(1, |rule| rule.top_slices);
    result.n_analysed() >= usize::try_from(wanted).unwrap_or(usize::MAX)
}

/// Digest of what a result says: equal where nothing that anybody is told differs.
fn fingerprint(result: &StudyResult) -> String {
    let mut digest = blake3::Hasher::new();
    let mut add = |text: &str| {
        digest.update(&(text.len() as u64).to_le_bytes());
        digest.update(text.as_bytes());
    };
    add(&format!("{:?}", result.outcome));
    add(&format!("{:?}", result.score.map(f32::to_bits)));
    add(&format!("{:?} {}", result.series_uid, result.model.digest));
    for slice in &result.slices {
        let logit = slice.logit.map(f32::to_bits);
        add(&format!(
            "{} {:?} {logit:?} {:?}",
            slice.sop_uid, slice.frame, slice.reason
        ));
    }
    for element in &result.patient.elements {
        add(&format!(
            "{:?} {} {:?}",
            element.tag, element.vr, element.value
        ));
    }
    let digest = digest.finalize().to_hex();
    digest[..FINGERPRINT_DIGITS].to_owned()
}
