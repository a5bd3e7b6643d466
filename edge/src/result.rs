//! A study's result, as the store keeps it and the page, the outbox and the metrics see it.
//!
//! Written by `decide`, read by everything after it. A study is never called negative: "not detected on N of M slices".

use serde::{Deserialize, Serialize};
use shared::uid::Uid;

/// What is said of a study.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct StudyResult {
    /// Study Instance UID.
    pub(crate) study_uid: Uid,
    /// Counts from 1; a revision replaces the ones before.
    pub(crate) revision: u32,
    /// How far the study is.
    pub(crate) state: State,
    /// The answer so far.
    pub(crate) outcome: Outcome,
    /// Score of the judged series, a logit; `None` where nothing is judged.
    pub(crate) score: Option<f32>,
    /// Threshold of the score in the model file, a logit.
    pub(crate) threshold: Option<f32>,
    /// The judged series.
    pub(crate) series_uid: Option<Uid>,
    /// Why this series was chosen, in words.
    pub(crate) series_choice: String,
    /// Slices of the judged series, feet to head; of the whole study where none is judged.
    pub(crate) slices: Vec<SliceResult>,
    /// Indices into `slices` of the highest logits, the highest first; at most five.
    pub(crate) top: Vec<usize>,
    /// The other series, with the reason why they are not judged.
    pub(crate) not_judged: Vec<OtherSeries>,
    /// What else must be known of this answer, each a sentence without patient data: slices that came again with other pixels, gaps.
    #[serde(default)]
    pub(crate) remarks: Vec<String>,
    /// Objects of the study that are not images for analysis (reports, captures), accepted and stored.
    pub(crate) n_other_objects: u64,
    /// The model.
    pub(crate) model: ModelIdentity,
    /// Whose study it is.
    pub(crate) patient: Patient,
    /// Whether every object comes from the phantom.
    pub(crate) is_phantom: bool,
    /// Whether any judged slice came lossily compressed.
    pub(crate) is_lossy: bool,
    /// When the first object came, Unix time in ms.
    pub(crate) first_received_ms: i64,
    /// When the last object came, Unix time in ms.
    pub(crate) last_received_ms: i64,
    /// When this revision was decided, Unix time in ms.
    pub(crate) decided_ms: i64,
}

/// How far a study is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum State {
    /// Objects still come.
    Receiving,
    /// A positive one that is told before the study is complete.
    Provisional,
    /// The study was quiet for the configured time.
    Complete,
}

/// The answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub(crate) enum Outcome {
    /// Nothing can be said yet.
    Pending,
    /// The score reaches the threshold.
    Positive,
    /// It does not; on every slice, or on some, as the counts say.
    NotDetected,
    /// No decision, with a stable code and its words.
    NotAnalysed {
        /// As in docs/reading-dicom.md, or one of the node's own (`identity-conflict`, `self-test`, `worker`).
        code: String,
        /// What, where and how to mend it.
        message: String,
    },
}

/// How far the analysis came, in the words of PS3.16 CID 7001's results and of every page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Attempt {
    /// Every slice of the judged series was analysed.
    Succeeded,
    /// Some were.
    PartiallySucceeded,
    /// Slices were tried, none was analysed.
    Failed,
    /// By the gate, by the series' extent, by an identity conflict or a failed self-test nothing was tried.
    NotAttempted,
}

/// Codes of [`Outcome::NotAnalysed`] where the analysis broke, not the study.
const FAILURES: [&str; 5] = [
    "worker",
    "engine",
    "decoder-failed",
    "unreadable",
    "codestream",
];
/// Code of a study in which objects name different patients.
pub(crate) const IDENTITY_CONFLICT: &str = "identity-conflict";

/// A slice of a study.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct SliceResult {
    /// Where the object lies in the spool.
    pub(crate) sequence: u64,
    /// SOP Class UID.
    pub(crate) sop_class_uid: String,
    /// SOP Instance UID.
    pub(crate) sop_uid: Uid,
    /// Frame, from 1; `None` for an object that is one slice.
    pub(crate) frame: Option<u32>,
    /// Position along the normal, mm.
    pub(crate) z_mm: Option<f64>,
    /// The logit; `None` where the slice was not analysed.
    pub(crate) logit: Option<f32>,
    /// Why it was not analysed.
    pub(crate) reason: Option<String>,
}

/// A series that is not judged.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct OtherSeries {
    /// Series Instance UID.
    pub(crate) series_uid: Option<Uid>,
    /// Its slices.
    pub(crate) n_slices: usize,
    /// Those that were analysed.
    pub(crate) n_analysed: usize,
    /// Why it is not judged.
    pub(crate) reason: String,
}

/// Which model said it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ModelIdentity {
    /// Its name.
    pub(crate) name: String,
    /// BLAKE3 of the file, hexadecimal.
    pub(crate) digest: String,
    /// Whether it was trained on the phantom.
    pub(crate) is_demonstration: bool,
}

/// Patient and study attributes, copied as they came. Never logged.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Patient {
    /// Elements of the Patient, General Study and Patient Study modules, and Specific Character Set (0008,0005) and Timezone Offset From UTC (0008,0201).
    pub(crate) elements: Vec<Element>,
}

/// One data element as it came.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Element {
    /// Group and element.
    pub(crate) tag: (u16, u16),
    /// Value representation, two letters.
    pub(crate) vr: String,
    /// Value in the character set of (0008,0005), padding removed.
    pub(crate) value: Vec<u8>,
}

impl StudyResult {
    /// Slices that were analysed.
    pub(crate) fn n_analysed(&self) -> usize {
        self.slices
            .iter()
            .filter(|slice| slice.logit.is_some())
            .count()
    }

    /// Slices that were not.
    pub(crate) fn n_not_analysed(&self) -> usize {
        self.slices.len() - self.n_analysed()
    }

    /// How far the analysis came; `None` while nothing can be said.
    pub(crate) fn attempt(&self) -> Option<Attempt> {
        Some(match &self.outcome {
            Outcome::Pending => return None,
            Outcome::NotAnalysed { code, .. } if FAILURES.contains(&code.as_str()) => {
                Attempt::Failed
            }
            Outcome::NotAnalysed { .. } => Attempt::NotAttempted,
            Outcome::Positive | Outcome::NotDetected if self.n_not_analysed() == 0 => {
                Attempt::Succeeded
            }
            Outcome::Positive | Outcome::NotDetected => Attempt::PartiallySucceeded,
        })
    }

    /// The answer in words, without patient data.
    pub(crate) fn words(&self) -> String {
        let (n_analysed, n_slices) = (self.n_analysed(), self.slices.len());
        match &self.outcome {
            Outcome::Pending => format!("{n_analysed} of {n_slices} slices analysed so far"),
            Outcome::Positive if self.state == State::Complete => {
                format!("suspected, {n_analysed} of {n_slices} slices analysed")
            }
            Outcome::Positive => {
                format!("suspected, provisional: {n_analysed} of {n_slices} slices analysed so far")
            }
            Outcome::NotDetected => format!("not detected on {n_analysed} of {n_slices} slices"),
            Outcome::NotAnalysed { code, message } => format!("not analysed: {code}: {message}"),
        }
    }

    /// Whether its objects name different patients.
    pub(crate) fn is_held(&self) -> bool {
        matches!(&self.outcome, Outcome::NotAnalysed { code, .. } if code == IDENTITY_CONFLICT)
    }

    /// Whether anything of it may leave the box: never while objects name different patients; with a model that was trained on the
    /// phantom only for phantoms, unless the configuration allows it.
    pub(crate) fn may_leave(&self, allow_demo_results: bool) -> bool {
        !self.is_held() && (!self.model.is_demonstration || self.is_phantom || allow_demo_results)
    }

    /// Whether the answer is positive.
    pub(crate) fn is_positive(&self) -> bool {
        self.outcome == Outcome::Positive
    }
}
