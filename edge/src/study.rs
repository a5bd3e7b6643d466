//! The verdict on a study: from its assembled series and the model file's study rule to a score and a decision.
//!
//! In: a [`Study`]. Out: a [`Verdict`] with the counts that every result states. Pure; the rule's arithmetic is
//! [`shared::study`]'s. Without a rule in the model file there is no score and no decision.

use shared::study::{StudyRule, score};
use shared::uid::Uid;

use crate::series::{SliceRecord, Study};

/// Slices named as the highest.
pub(crate) const TOP_SLICES: usize = 5;

/// What is said of a study.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Verdict {
    /// The judged series.
    pub(crate) series_uid: Option<Uid>,
    /// Slices of the judged series; of the whole study where no series is judged.
    pub(crate) n_slices: usize,
    /// Those that were analysed.
    pub(crate) n_analysed: usize,
    /// Mean of the highest smoothed logits; `None` without a judged series or a rule.
    pub(crate) score: Option<f32>,
    /// Whether the score reaches the threshold of the model file.
    pub(crate) is_positive: Option<bool>,
    /// The slices with the highest logits, the highest first: at most [`TOP_SLICES`].
    pub(crate) top: Vec<SliceRecord>,
}

/// Judges a study.
pub(crate) fn judge(study: &Study, rule: Option<&StudyRule>) -> Verdict {
    let Some(series) = &study.judged else {
        let others = study.not_judged.iter();
        return Verdict {
            series_uid: None,
            n_slices: others.clone().map(|other| other.series.slices.len()).sum(),
            n_analysed: others.map(|other| other.series.n_analysed()).sum(),
            score: None,
            is_positive: None,
            top: Vec::new(),
        };
    };
    let logits: Vec<Option<f32>> = series.slices.iter().map(|slice| slice.logit).collect();
    let score = rule.and_then(|rule| score(rule, &logits));
    let is_positive = rule
        .zip(score)
        .map(|(rule, score)| score >= rule.logit_threshold);
    let mut top: Vec<(f32, &SliceRecord)> = series
        .slices
        .iter()
        .filter_map(|slice| slice.logit.map(|logit| (logit, slice)))
        .collect();
    top.sort_by(|a, b| b.0.total_cmp(&a.0));
    top.truncate(TOP_SLICES);
    Verdict {
        series_uid: series.series_uid.clone(),
        n_slices: series.slices.len(),
        n_analysed: series.n_analysed(),
        score,
        is_positive,
        top: top.into_iter().map(|(_, slice)| slice.clone()).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::series::{Limits, assemble};
    use crate::wire::SliceFacts;

    const RULE: StudyRule = StudyRule {
        smoothing_slices: 1,
        top_slices: 2,
        logit_threshold: 2.5,
    };

    fn study(logits: &[Option<f32>]) -> Study {
        let record = |(index, logit): (usize, &Option<f32>)| SliceRecord {
            study_uid: Uid::new("1.1").ok(),
            series_uid: Uid::new("1.2").ok(),
            sop_uid: Uid::new(&format!("1.3.{index}")).ok(),
            facts: logit.map(|_| SliceFacts {
                z_mm: Some(f64::from(u8::try_from(index).unwrap())),
                ..SliceFacts::default()
            }),
            logit: *logit,
            ..SliceRecord::default()
        };
        let records = logits.iter().enumerate().map(record).collect();
        assemble(records, &Limits::NONE).remove(0)
    }

    #[test]
    fn the_score_decides_by_the_models_own_threshold() {
        let verdict = judge(
            &study(&[Some(2.0), None, Some(3.0), Some(-1.0)]),
            Some(&RULE),
        );
        assert_eq!(
            (verdict.score, verdict.is_positive),
            (Some(2.5), Some(true))
        );
        assert_eq!((verdict.n_slices, verdict.n_analysed), (4, 3));
        let top: Vec<Option<f32>> = verdict.top.iter().map(|slice| slice.logit).collect();
        assert_eq!(top, [Some(3.0), Some(2.0), Some(-1.0)]);
    }

    #[test]
    fn without_a_rule_nothing_is_decided() {
        let verdict = judge(&study(&[Some(9.0)]), None);
        assert_eq!((verdict.score, verdict.is_positive), (None, None));
    }

    #[test]
    fn a_study_without_an_analysed_slice_is_not_negative() {
        let verdict = judge(&study(&[None, None]), Some(&RULE));
        assert_eq!((verdict.score, verdict.is_positive), (None, None));
        assert_eq!((verdict.n_slices, verdict.n_analysed), (2, 0));
        assert_eq!(verdict.series_uid, None);
    }
}
