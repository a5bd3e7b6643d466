//! From the logits of a series' slices to one score: the study rule, learnt on validation data and stored in the model file.

use alloc::vec::Vec;

use serde::{Deserialize, Serialize};

/// Mean of the `top_slices` highest logits after smoothing along z.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StudyRule {
    /// Length of the moving average along z, in slices; odd, at least 1 (1: no smoothing).
    pub smoothing_slices: u32,
    /// How many of the highest smoothed logits are averaged; at least 1.
    pub top_slices: u32,
    /// A study is positive when its score is at least this.
    pub logit_threshold: f32,
}

/// Score of a series, or `None` when no slice was analysed.
///
/// `logits` holds one entry a slice in order of z; `None` is a slice that was not analysed, and so is a logit that is not
/// finite: it adds nothing to an average and is none of the highest. Sums are taken in f64 in slice order, so that the score has the same bits everywhere.
#[must_use]
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_precision_loss,
    reason = "a mean of at most 2^32 logits; the one rounding to f32 is the definition"
)]
pub fn score(rule: &StudyRule, logits: &[Option<f32>]) -> Option<f32> {
    let reach = rule.smoothing_slices as usize / 2;
    let mut smoothed: Vec<f64> = Vec::with_capacity(logits.len());
    for (index, logit) in logits.iter().enumerate() {
        if !logit.is_some_and(f32::is_finite) {
            continue;
        }
        let end = index.saturating_add(reach).saturating_add(1);
        let window = &logits[index.saturating_sub(reach)..end.min(logits.len())];
        let (sum, count) = window
            .iter()
            .flatten()
            .filter(|logit| logit.is_finite())
            .fold((0.0, 0_u32), |(sum, n), l| (sum + f64::from(*l), n + 1));
        smoothed.push(sum / f64::from(count));
    }
    smoothed.sort_by(|a, b| b.total_cmp(a));
    smoothed.truncate(rule.top_slices.max(1) as usize);
    if smoothed.is_empty() {
        return None;
    }
    Some((smoothed.iter().sum::<f64>() / smoothed.len() as f64) as f32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(
        smoothing_slices: u32,
        top_slices: u32,
        logits: &[Option<f32>],
        expected: Option<f32>,
    ) {
        assert_eq!(
            score(
                &StudyRule {
                    smoothing_slices,
                    top_slices,
                    logit_threshold: 0.0
                },
                logits
            ),
            expected
        );
    }

    #[test]
    fn score_is_the_mean_of_the_highest_logits() {
        check(1, 2, &[Some(1.0), Some(-4.0), Some(3.0)], Some(2.0));
    }

    #[test]
    fn smoothing_averages_neighbours_that_were_analysed() {
        check(3, 1, &[Some(0.0), Some(3.0), None, Some(9.0)], Some(9.0));
        check(3, 1, &[Some(0.0), Some(3.0), Some(9.0)], Some(6.0));
    }

    #[test]
    fn a_series_without_an_analysed_slice_has_no_score() {
        check(3, 5, &[None, None], None);
        check(3, 5, &[], None);
        check(3, 5, &[Some(f32::NAN)], None);
    }

    #[test]
    fn logits_that_are_no_numbers_count_as_not_analysed() {
        let logits = [Some(f32::NAN), Some(-1.0), Some(f32::INFINITY)];
        check(3, 2, &logits, Some(-1.0));
        check(u32::MAX, 2, &logits, Some(-1.0));
    }
}
