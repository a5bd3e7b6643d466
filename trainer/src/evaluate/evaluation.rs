//! All that `trainer evaluate` measures, as it stands in `metrics.json`.

use std::collections::BTreeMap;

use serde::Serialize;
use shared::RESEARCH_USE;
use shared::manifest::{DataKind, Level, Metric, OperatingPoint};
use shared::study::StudyRule;

use super::{Judged, RsnaLoss};
use crate::bootstrap::Interval;
use crate::index::Part;
use crate::split::Split;

/// Figures of one level.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Figures {
    /// Each figure of [`NAMES`] with its interval.
    #[serde(flatten)]
    pub values: BTreeMap<&'static str, Interval>,
    /// Counts at the threshold.
    pub confusion: Counts,
    /// Logit or score at and above which the answer is positive.
    pub threshold: f32,
    /// Slices or studies.
    pub n: usize,
    /// Of these with an embolus.
    pub n_positive: usize,
    /// Studies.
    pub n_studies: usize,
}

/// A confusion matrix.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Counts {
    /// PE present, called positive.
    pub true_positive: u64,
    /// No PE, called positive.
    pub false_positive: u64,
    /// No PE, called negative.
    pub true_negative: u64,
    /// PE present, called negative.
    pub false_negative: u64,
}

/// Figures of the slices that one label or maker singles out.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Subgroup {
    /// Column and value.
    pub name: String,
    /// Slices of the subgroup.
    pub slice: Figures,
}

/// What a control reaches.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ControlFigure {
    /// Which control.
    pub name: &'static str,
    /// Its AUROC on slices.
    pub auroc: Interval,
}

/// A slice that was judged badly.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Miss {
    /// Row of the cache.
    pub row: usize,
    /// SOP Instance UID.
    pub sop_uid: String,
    /// Whether an embolus is visible.
    pub pe_present: bool,
    /// The model's probability after the temperature.
    pub probability: f32,
}

/// All that is measured.
#[derive(Clone, Debug, Serialize)]
pub struct Evaluation {
    /// [`RESEARCH_USE`].
    pub notice: &'static str,
    /// The leakage warning, where the split was by image.
    pub leak: Option<&'static str>,
    /// What makes figures here say less than they seem to.
    pub warnings: Vec<String>,
    /// Part the figures were measured on.
    pub part: Part,
    /// Level of the figures at the top.
    pub level: Level,
    /// The figures at the top: slices at natural prevalence, at the first operating point.
    #[serde(flatten)]
    pub headline: BTreeMap<&'static str, Interval>,
    /// File name of the model.
    pub model: String,
    /// BLAKE3 of the model file.
    pub model_digest: String,
    /// BLAKE3 of the cache.
    pub data_digest: String,
    /// Kind of the data.
    pub data_kind: DataKind,
    /// What the data is.
    pub data_source: String,
    /// How parts were told apart, in words.
    pub data_split: String,
    /// The same.
    pub split: Split,
    /// Seed of bootstrap and samples.
    pub seed: u64,
    /// Version of this program.
    pub trainer: &'static str,
    /// The model file's own, or chosen on the validation part where it has none.
    pub operating_points: Vec<OperatingPoint>,
    /// As the operating points.
    pub temperature: f64,
    /// As the operating points.
    pub study_rule: StudyRule,
    /// Slices at natural prevalence.
    pub slice: Figures,
    /// As many negative slices as positive ones, drawn by the seed.
    pub slice_balanced: Figures,
    /// As `slice_balanced`, at probability 0.5, as the publication decides.
    pub slice_balanced_half: Figures,
    /// Studies by the study rule.
    pub study: Figures,
    /// Mean number of slices called positive in a study without embolus.
    pub false_positive_slices_per_negative_study: f64,
    /// By every label column and maker.
    pub subgroups: Vec<Subgroup>,
    /// Controls.
    pub controls: Vec<ControlFigure>,
    /// The RSNA challenge's loss, where the data has exam labels and the split is by study.
    pub rsna_loss: Option<RsnaLoss>,
    /// The worst misses.
    pub misses: Vec<Miss>,
    /// Curves for the plots.
    #[serde(skip)]
    pub curves: Curves,
    /// The logits, for the tables of predictions.
    #[serde(skip)]
    pub judged: Judged,
    /// What the model's file says of its training; see [`crate::provenance`].
    #[serde(skip)]
    pub provenance: BTreeMap<String, String>,
}

/// Points of the plots.
#[derive(Clone, Debug, Default)]
pub struct Curves {
    /// ROC of the slices.
    pub slice_roc: Vec<(f64, f64)>,
    /// ROC of the studies.
    pub study_roc: Vec<(f64, f64)>,
    /// Precision over sensitivity of the slices.
    pub slice_precision_recall: Vec<(f64, f64)>,
    /// Mean probability, share of positives, count; after the temperature.
    pub reliability: Vec<(f64, f64, f64)>,
    /// Scores of studies without and with embolus.
    pub study_scores: Vec<(f32, bool)>,
}

impl Evaluation {
    /// How many slices of a study without embolus are called positive on average.
    #[must_use]
    pub fn false_positives_sentence(&self) -> String {
        let n = self.false_positive_slices_per_negative_study;
        if n.is_finite() {
            format!(
                "At the first operating point {n:.2} slices of a study without embolus are called positive on average."
            )
        } else {
            "No study without embolus was measured, which would show false alarms.".to_owned()
        }
    }

    /// What every table that was measured with it says of itself.
    #[must_use]
    pub fn notices(&self) -> String {
        let notices = [Some(RESEARCH_USE), self.leak].into_iter().flatten();
        notices.collect::<Vec<_>>().join("; ")
    }

    /// The figures as the model file's manifest holds them.
    #[must_use]
    pub fn manifest_metrics(&self) -> Vec<Metric> {
        let levels = [(Level::Slice, &self.slice), (Level::Study, &self.study)];
        levels
            .iter()
            .flat_map(|(level, figures)| {
                figures
                    .values
                    .iter()
                    .filter(|(_, interval)| interval.value.is_finite() && interval.low.is_finite())
                    .map(|(name, interval)| Metric {
                        name: (*name).to_owned(),
                        level: *level,
                        part: self.part.name().to_owned(),
                        value: interval.value,
                        low: interval.low,
                        high: interval.high,
                    })
            })
            .collect()
    }
}
