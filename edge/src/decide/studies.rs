//! A study's result from what is known of its slices.
//!
//! In: the rows of a study, in any order of arrival, and the element sets that they name. Out: a [`StudyResult`]. Pure. Which series is
//! judged is [`crate::series`]'s rule, the score [`crate::study`]'s, contradictions [`super::identity`]'s; when the study is complete, and what is said
//! to whom, is left to [`super::decider`].
//!
//! - Nothing is decided against a positive: a gap or refused slices are remarked and counted, the answer stays.
//! - "Not detected" needs a complete study and a judged series without a gap. Everything else is "not analysed" with a reason.

use std::collections::{BTreeMap, VecDeque};

use shared::study::StudyRule;
use shared::uid::Uid;

use super::identity;
use super::store::{ElementSets, Rows, SliceKey, SliceRow};
use crate::result::{
    IDENTITY_CONFLICT, ModelIdentity, OtherSeries, Outcome, Patient, SliceResult, State,
    StudyResult,
};
use crate::series::{Limits, NotJudged, Series, SliceRecord, Study, Why, assemble_study};
use crate::study::{Verdict, judge};

/// SOP classes whose objects are images for analysis.
pub(crate) const IMAGE_CLASSES: [&str; 3] = [
    shared::dicom::gate::CT_IMAGE,
    shared::dicom::gate::ENHANCED_CT_IMAGE,
    shared::dicom::gate::LEGACY_CONVERTED_ENHANCED_CT_IMAGE,
];

/// What judges: the same for every study.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Judge {
    /// The model.
    pub(crate) model: ModelIdentity,
    /// Its study rule.
    pub(crate) rule: Option<StudyRule>,
    /// What a series must have.
    pub(crate) limits: Limits,
    /// Sequences of objects that name no study, the newest last.
    pub(crate) unassigned: Vec<u64>,
}

/// Objects without a study are remarked on studies whose objects came at most so many before or after.
const UNASSIGNED_REACH: u64 = 64;
/// Objects without a study that are remembered.
const MAX_UNASSIGNED: usize = 4_096;

/// Of the sequences that are not among `kept`, which rise, those that studies still kept may miss: at most [`MAX_UNASSIGNED`], the newest.
pub(crate) fn deleted_beside(kept: impl Iterator<Item = u64>) -> Vec<u64> {
    let mut deleted = VecDeque::new();
    let mut next = 1;
    for sequence in kept {
        let reach = UNASSIGNED_REACH.min(sequence - next);
        let (after, before) = (next..next + reach, sequence - reach..sequence);
        deleted.extend(after.chain(before.skip_while(|deleted| *deleted < next + reach)));
        while deleted.len() > MAX_UNASSIGNED {
            deleted.pop_front();
        }
        next = sequence + 1;
    }
    deleted.into()
}

/// Whether objects of the class are images for analysis.
pub(crate) fn is_image(sop_class_uid: &str) -> bool {
    IMAGE_CLASSES.contains(&sop_class_uid)
}

impl Judge {
    /// The result as it is now; `revision`, `state` and `decided_ms` are for the caller to set. `None` where no object is an image: such a
    /// study has no result.
    pub(crate) fn result(
        &self,
        study_uid: &Uid,
        rows: &Rows,
        elements: &ElementSets,
        is_complete: bool,
    ) -> Option<StudyResult> {
        let mut arrived: Vec<(&SliceKey, &SliceRow)> = rows.iter().collect();
        arrived.sort_by_key(|((_, frame), row)| (row.sequence, *frame));
        let is_row_image = |row: &SliceRow| is_image(&row.sop_class_uid);
        let (images, others): (Vec<_>, Vec<_>) =
            arrived.into_iter().partition(|(_, row)| is_row_image(row));
        if images.is_empty() {
            return None;
        }
        let records = images
            .iter()
            .map(|(key, row)| self.record(study_uid, key, row));
        let study = assemble_study(study_uid.clone(), records.collect(), &self.limits);
        let verdict = judge(&study, self.rule.as_ref());
        let conflict = identity::conflict(&sets(rows.values(), elements));
        let judged = self.judged_slices(&study);
        let slices: Vec<SliceResult> = judged
            .iter()
            .filter_map(|record| slice_result(record, rows))
            .collect();
        let outcome = self.outcome(&study, &verdict, rows, conflict, is_complete);
        let of_image = || images.iter().map(|(_, row)| *row);
        let received = || rows.values().map(|row| row.received_ms);
        Some(StudyResult {
            study_uid: study_uid.clone(),
            revision: 1,
            state: State::Receiving,
            outcome,
            score: verdict.score,
            threshold: self.rule.as_ref().map(|rule| rule.logit_threshold),
            series_uid: verdict.series_uid.clone(),
            series_choice: choice(&study),
            top: top(&slices),
            slices,
            not_judged: study.not_judged.iter().map(other_series).collect(),
            remarks: self.remarks(&study, rows, is_complete),
            n_other_objects: others.len() as u64,
            model: self.model.clone(),
            patient: patient(&study, rows, elements),
            is_phantom: sets(of_image(), elements).all(identity::is_phantom),
            is_lossy: is_lossy(&judged),
            first_received_ms: received().min().unwrap_or_default(),
            last_received_ms: received().max().unwrap_or_default(),
            decided_ms: 0,
        })
    }

    /// Slices of the judged series; where none is judged, of all.
    fn judged_slices<'s>(&self, study: &'s Study) -> Vec<&'s SliceRecord> {
        match &study.judged {
            Some(series) => series.slices.iter().collect(),
            None => {
                let others = study.not_judged.iter();
                others.flat_map(|other| &other.series.slices).collect()
            }
        }
    }

    fn outcome(
        &self,
        study: &Study,
        verdict: &Verdict,
        rows: &Rows,
        conflict: Option<&'static str>,
        is_complete: bool,
    ) -> Outcome {
        let not_analysed = |code: &str, message: String| Outcome::NotAnalysed {
            code: code.to_owned(),
            message,
        };
        if let Some(attribute) = conflict {
            let message = format!(
                "objects of this study differ in {attribute}; nothing is sent until the sender corrects it"
            );
            return if is_complete {
                not_analysed(IDENTITY_CONFLICT, message)
            } else {
                Outcome::Pending
            };
        }
        match (&study.judged, verdict.is_positive) {
            (Some(_), Some(true)) => Outcome::Positive,
            _ if !is_complete => Outcome::Pending,
            (Some(series), Some(false)) => match series.gap_mm(&self.limits) {
                None => Outcome::NotDetected,
                Some(mm) => not_analysed(
                    "gap",
                    format!(
                        "{mm:.1} mm without an analysed slice in the judged series, allowed {:.1} mm; send the missing slices",
                        self.limits.max_gap_mm
                    ),
                ),
            },
            (Some(_), None) => not_analysed(
                "no-study-rule",
                "the model file has no rule that makes a study's answer of its slices'".to_owned(),
            ),
            (None, _) => {
                let (code, message) = why_nothing(study, rows);
                not_analysed(&code, message)
            }
        }
    }
}

/// Distinct element sets of rows.
fn sets<'a>(
    rows: impl Iterator<Item = &'a SliceRow>,
    elements: &'a ElementSets,
) -> impl Iterator<Item = &'a [crate::result::Element]> + Clone {
    let digests: std::collections::BTreeSet<&str> = rows.map(|row| row.elements.as_str()).collect();
    let digests: Vec<&str> = digests.into_iter().collect();
    digests
        .into_iter()
        .map(|digest| elements.get(digest).map_or(&[][..], Vec::as_slice))
}

impl Judge {
    /// Logits of another model do not count: they are none of this one's.
    fn record(&self, study_uid: &Uid, (sop_uid, frame): &SliceKey, row: &SliceRow) -> SliceRecord {
        SliceRecord {
            study_uid: Some(study_uid.clone()),
            series_uid: row.series_uid.clone(),
            sop_uid: Some(sop_uid.clone()),
            frame: (*frame > 0).then_some(*frame),
            facts: row.facts.clone(),
            logit: row.logit.filter(|_| !self.is_of_another_model(row)),
        }
    }

    /// Whether the row's logit comes from another model than this one.
    pub(super) fn is_of_another_model(&self, row: &SliceRow) -> bool {
        row.logit.is_some() && row.model.as_deref() != Some(self.model.digest.as_str())
    }
}

fn row_of<'r>(record: &SliceRecord, rows: &'r Rows) -> Option<&'r SliceRow> {
    let sop_uid = record.sop_uid.clone()?;
    rows.get(&(sop_uid, record.frame.unwrap_or(0)))
}

fn slice_result(record: &SliceRecord, rows: &Rows) -> Option<SliceResult> {
    let row = row_of(record, rows)?;
    Some(SliceResult {
        sequence: row.sequence,
        sop_class_uid: row.sop_class_uid.clone(),
        sop_uid: record.sop_uid.clone()?,
        frame: record.frame,
        z_mm: record.facts.as_ref().and_then(|facts| facts.z_mm),
        logit: record.logit,
        reason: match (&row.reason, record.logit) {
            (Some(reason), _) => Some(reason.to_string()),
            (None, Some(_)) => None,
            (None, None) => Some("model: its answer comes from another model".to_owned()),
        },
    })
}

/// Indices of the highest logits, the highest first.
fn top(slices: &[SliceResult]) -> Vec<usize> {
    let mut analysed: Vec<(f32, usize)> = slices
        .iter()
        .enumerate()
        .filter_map(|(index, slice)| slice.logit.map(|logit| (logit, index)))
        .collect();
    analysed.sort_by(|a, b| b.0.total_cmp(&a.0));
    analysed.truncate(crate::study::TOP_SLICES);
    analysed.into_iter().map(|(_, index)| index).collect()
}

fn is_lossy(records: &[&SliceRecord]) -> bool {
    let facts = records.iter().filter_map(|record| record.facts.as_ref());
    facts.into_iter().any(|facts| facts.is_lossy)
}

fn other_series(other: &NotJudged) -> OtherSeries {
    OtherSeries {
        series_uid: other.series.series_uid.clone(),
        n_slices: other.series.slices.len(),
        n_analysed: other.series.n_analysed(),
        reason: other.why.to_string(),
    }
}

/// Why the judged series was chosen, in words.
fn choice(study: &Study) -> String {
    let Some(series) = &study.judged else {
        return String::new();
    };
    let kind = if series.is_original() {
        "original primary axial"
    } else {
        "no original axial series is there"
    };
    let kernel = series.kernel().unwrap_or("not stated");
    let thickness = series
        .thickness_mm()
        .map_or("of unknown thickness".to_owned(), |mm| {
            format!("{mm:.2} mm thick")
        });
    format!(
        "first of {} by the rule: {kind}, kernel {kernel}, {:.0} mm covered, slices {thickness}",
        study.not_judged.len() + 1,
        series.coverage_mm(),
    )
}

impl Judge {
    /// An object came that names no study: it may belong to any.
    pub(crate) fn remember_unassigned(&mut self, sequence: u64) {
        if self.unassigned.len() >= MAX_UNASSIGNED {
            self.unassigned.remove(0);
        }
        self.unassigned.push(sequence);
    }

    /// Objects without a study that came among the study's.
    fn n_unassigned(&self, rows: &Rows) -> usize {
        let sequences = || rows.values().map(|row| row.sequence);
        let first = sequences().min().unwrap_or_default();
        let last = sequences().max().unwrap_or_default();
        let among = first.saturating_sub(UNASSIGNED_REACH)..=last.saturating_add(UNASSIGNED_REACH);
        let unassigned = self.unassigned.iter();
        unassigned
            .filter(|sequence| among.contains(sequence))
            .count()
    }

    fn remarks(&self, study: &Study, rows: &Rows, is_complete: bool) -> Vec<String> {
        let mut remarks = remarks(rows);
        // While slices come, in whatever order, a gap means nothing.
        let judged = study.judged.as_ref().filter(|_| is_complete);
        if let Some(mm) = judged.and_then(|series| series.gap_mm(&self.limits)) {
            remarks.push(format!(
                "{mm:.1} mm of the judged series have no analysed slice"
            ));
        }
        let n_unassigned = self.n_unassigned(rows);
        if n_unassigned > 0 {
            let objects = counted(n_unassigned, "object");
            remarks.push(format!(
                "{objects} came among those of this study and may be missing here: deleted, or of no study that can be read"
            ));
        }
        remarks
    }
}

fn remarks(rows: &Rows) -> Vec<String> {
    let mut remarks = Vec::new();
    let mut count = |n: usize, text: &str| {
        if n > 0 {
            remarks.push(format!("{} {text}", counted(n, "slice")));
        }
    };
    let images = || rows.values().filter(|row| is_image(&row.sop_class_uid));
    count(
        images().filter(|row| row.is_replaced).count(),
        "came again under the same UID with other pixels, analysed anew",
    );
    count(
        images().filter(|row| row.is_spoilt).count(),
        "came again in a form that cannot be analysed; the answer for what came before stands",
    );
    remarks
}

fn counted(n: usize, noun: &str) -> String {
    format!("{n} {noun}{}", if n == 1 { "" } else { "s" })
}

/// Patient and study attributes of the object that came last, of the judged series where there is one: a correction wins.
fn patient(study: &Study, rows: &Rows, elements: &ElementSets) -> Patient {
    let judged = study.judged.iter();
    let of_judged = judged
        .flat_map(|series: &Series| &series.slices)
        .filter_map(|record| row_of(record, rows))
        .max_by_key(|row| row.sequence);
    let images = rows.values().filter(|row| is_image(&row.sop_class_uid));
    let newest = of_judged.or_else(|| images.max_by_key(|row| row.sequence));
    Patient {
        elements: newest
            .and_then(|row| elements.get(&row.elements))
            .cloned()
            .unwrap_or_default(),
    }
}

/// Code and words where no series is judged: what stands against the first series, or the reason that most of its slices were refused for.
fn why_nothing(study: &Study, rows: &Rows) -> (String, String) {
    let first = study
        .not_judged
        .iter()
        .find(|other| other.why != Why::NothingAnalysed);
    if let Some(other) = first {
        let text = other.why.to_string();
        let message = text
            .split_once(": ")
            .map_or(text.as_str(), |(_, words)| words);
        return (
            other.why.code().to_owned(),
            format!("no series can be judged: {message}"),
        );
    }
    let mut reasons: BTreeMap<&str, (usize, &str)> = BTreeMap::new();
    let images = rows.values().filter(|row| is_image(&row.sop_class_uid));
    for reason in images.filter_map(|row| row.reason.as_ref()) {
        reasons.entry(&reason.code).or_insert((0, &reason.text)).0 += 1;
    }
    let commonest = reasons.iter().max_by_key(|(_, (n, _))| *n);
    match commonest {
        Some((code, (n, text))) => (
            (*code).to_owned(),
            format!("{text} ({n} of {} slices)", rows.len()),
        ),
        None => (
            Why::NothingAnalysed.code().to_owned(),
            "none of its slices could be analysed".to_owned(),
        ),
    }
}
