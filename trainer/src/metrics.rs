//! How good a classifier is, from logits and labels. Positive means PE present.
//!
//! Every figure is computed from weighted samples in one pass over them in order of falling logit, so that the bootstrap
//! ([`crate::bootstrap`]) can call it a thousand times with other weights. Undefined figures (no positive sample, say) are NaN.

use std::collections::HashSet;

use shared::probability::sigmoid;

/// One classified slice or study.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sample {
    /// The network's logit, or a study's score; finite.
    pub logit: f32,
    /// Whether an embolus is there.
    pub pe_present: bool,
    /// Which study it belongs to: an index below the number of studies. The bootstrap draws studies.
    pub study: usize,
}

/// Number of figures in [`Measures`].
pub const N_MEASURES: usize = 9;

/// The names of the figures, in the order of [`Measures::values`].
pub const NAMES: [&str; N_MEASURES] = [
    "auroc",
    "auprc",
    "sensitivity",
    "specificity",
    "precision",
    "accuracy",
    "f1",
    "brier",
    "ece",
];

/// Bins of the expected calibration error: equal width in probability (Naeini et al. 2015).
pub const CALIBRATION_BINS: usize = 10;

/// Weighted counts at a threshold.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Confusion {
    /// PE present, called positive.
    pub true_positive: f64,
    /// No PE, called positive.
    pub false_positive: f64,
    /// No PE, called negative.
    pub true_negative: f64,
    /// PE present, called negative.
    pub false_negative: f64,
}

/// All figures of one set of samples.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Measures {
    /// In the order of [`NAMES`].
    pub values: [f64; N_MEASURES],
    /// Counts at the threshold.
    pub confusion: Confusion,
}

/// Samples in order of falling logit.
#[derive(Clone, Debug)]
pub struct Sorted(Vec<Sample>);

impl Sorted {
    /// Sorts by falling logit; equal logits keep their order.
    #[must_use]
    pub fn new(mut samples: Vec<Sample>) -> Self {
        samples.sort_by(|a, b| b.logit.total_cmp(&a.logit));
        Self(samples)
    }

    /// The samples, by falling logit.
    #[must_use]
    pub fn samples(&self) -> &[Sample] {
        &self.0
    }

    /// All figures with weight 1 for every sample; a sample is called positive when its logit is at least `threshold`.
    #[must_use]
    pub fn measure(&self, threshold: f32) -> Measures {
        self.measure_weighted(threshold, |_| 1.0)
    }

    /// All figures, each sample with the weight of its study.
    ///
    /// AUROC counts ties half (Mann-Whitney); AUPRC is the step-wise average precision over distinct logits; Brier and
    /// ECE take the probability [`sigmoid`] gives.
    #[must_use]
    pub fn measure_weighted(&self, threshold: f32, weight: impl Fn(usize) -> f64) -> Measures {
        let mut ranking = Ranking::default();
        let mut confusion = Confusion::default();
        let mut calibration = Calibration::default();
        for ties in self.0.chunk_by(|a, b| a.logit.total_cmp(&b.logit).is_eq()) {
            let (mut positive, mut negative) = (0.0, 0.0);
            for sample in ties {
                *(if sample.pe_present {
                    &mut positive
                } else {
                    &mut negative
                }) += weight(sample.study);
            }
            let logit = ties[0].logit;
            ranking.add(positive, negative);
            confusion.add(logit >= threshold, positive, negative);
            calibration.add(f64::from(sigmoid(logit)), positive, negative);
        }
        let Confusion {
            true_positive: tp,
            false_positive: fp,
            true_negative: tn,
            false_negative: fnn,
        } = confusion;
        let values = [
            ranking.auroc(),
            ranking.auprc(),
            tp / (tp + fnn),
            tn / (tn + fp),
            tp / (tp + fp),
            (tp + tn) / (tp + fp + tn + fnn),
            2.0 * tp / (2.0 * tp + fp + fnn),
            calibration.brier(),
            calibration.expected_error(),
        ];
        Measures { values, confusion }
    }

    /// How many studies each figure of [`NAMES`] rests on: those with a sample that counts in its denominator, and for the areas under the
    /// curves the fewer of those with and without an embolus.
    #[must_use]
    pub fn carriers(&self, threshold: f32) -> [usize; N_MEASURES] {
        let count = |counts: &dyn Fn(&Sample) -> bool| {
            let studies = self.0.iter().filter(|sample| counts(sample));
            studies
                .map(|sample| sample.study)
                .collect::<HashSet<_>>()
                .len()
        };
        let is_called = |sample: &Sample| sample.logit >= threshold;
        let (positive, negative) = (count(&|s| s.pe_present), count(&|s| !s.pe_present));
        let (both, all) = (positive.min(negative), count(&|_| true));
        let called = count(&is_called);
        let either = count(&|s| s.pe_present || is_called(s));
        [
            both, both, positive, negative, called, all, either, all, all,
        ]
    }

    /// The points of the ROC curve, `(1 - specificity, sensitivity)`, from (0, 0) to (1, 1).
    #[must_use]
    pub fn roc(&self) -> Vec<(f64, f64)> {
        self.curve()
            .iter()
            .map(|c| {
                (
                    c.false_positive / (c.false_positive + c.true_negative),
                    recall(c),
                )
            })
            .collect()
    }

    /// The points of the precision-recall curve, `(sensitivity, precision)`.
    #[must_use]
    pub fn precision_recall(&self) -> Vec<(f64, f64)> {
        self.curve()
            .iter()
            .skip(1)
            .map(|c| {
                (
                    recall(c),
                    c.true_positive / (c.true_positive + c.false_positive),
                )
            })
            .collect()
    }

    /// The highest threshold whose sensitivity is at least `target` (0 to 1), half-way to the next lower positive sample's logit so that
    /// small changes of the logits, as by quantization, lose about as many positive samples as they gain; `None` without a positive sample.
    #[must_use]
    pub fn threshold_for_sensitivity(&self, target: f64) -> Option<f32> {
        let positives: Vec<f32> = self
            .0
            .iter()
            .filter(|s| s.pe_present)
            .map(|s| s.logit)
            .collect();
        let needed =
            (1..=positives.len()).find(|n| *n as f64 >= target * positives.len() as f64)?;
        let lowest = positives[needed - 1];
        let below = positives.iter().find(|logit| **logit < lowest);
        Some(below.map_or(lowest - 1.0, |below| midpoint(*below, lowest)))
    }

    /// Bins of the reliability diagram: `(mean probability, share of positives, samples)`, empty bins left out.
    #[must_use]
    pub fn reliability(&self) -> Vec<(f64, f64, f64)> {
        let mut calibration = Calibration::default();
        for sample in &self.0 {
            let (positive, negative) = if sample.pe_present {
                (1.0, 0.0)
            } else {
                (0.0, 1.0)
            };
            calibration.add(f64::from(sigmoid(sample.logit)), positive, negative);
        }
        let bins = calibration.bins.iter().filter(|bin| bin.total > 0.0);
        bins.map(|bin| {
            (
                bin.probability / bin.total,
                bin.positive / bin.total,
                bin.total,
            )
        })
        .collect()
    }

    fn curve(&self) -> Vec<Confusion> {
        let all = |present: bool| self.0.iter().filter(|s| s.pe_present == present).count() as f64;
        let mut now = Confusion {
            false_negative: all(true),
            true_negative: all(false),
            ..Confusion::default()
        };
        let mut curve = vec![now];
        for ties in self.0.chunk_by(|a, b| a.logit.total_cmp(&b.logit).is_eq()) {
            let positive = ties.iter().filter(|s| s.pe_present).count() as f64;
            let negative = ties.len() as f64 - positive;
            now.true_positive += positive;
            now.false_negative -= positive;
            now.false_positive += negative;
            now.true_negative -= negative;
            curve.push(now);
        }
        curve
    }
}

/// A number between `low` and `high` that is above `low` and at most `high`.
fn midpoint(low: f32, high: f32) -> f32 {
    let middle = low + (high - low) / 2.0;
    if middle > low { middle } else { high }
}

fn recall(c: &Confusion) -> f64 {
    c.true_positive / (c.true_positive + c.false_negative)
}

impl Confusion {
    fn add(&mut self, is_called_positive: bool, positive: f64, negative: f64) {
        if is_called_positive {
            self.true_positive += positive;
            self.false_positive += negative;
        } else {
            self.false_negative += positive;
            self.true_negative += negative;
        }
    }
}

/// Areas under the curves, summed over falling logits.
#[derive(Default)]
struct Ranking {
    positive: f64,
    negative: f64,
    pairs: f64,
    precision: f64,
}

impl Ranking {
    fn add(&mut self, positive: f64, negative: f64) {
        self.pairs += negative * (self.positive + positive / 2.0);
        self.positive += positive;
        self.negative += negative;
        if positive > 0.0 {
            self.precision += positive * self.positive / (self.positive + self.negative);
        }
    }

    fn auroc(&self) -> f64 {
        self.pairs / (self.positive * self.negative)
    }

    fn auprc(&self) -> f64 {
        self.precision / self.positive
    }
}

#[derive(Clone, Copy, Default)]
struct Bin {
    probability: f64,
    positive: f64,
    total: f64,
}

#[derive(Default)]
struct Calibration {
    bins: [Bin; CALIBRATION_BINS],
    squared_error: f64,
}

impl Calibration {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a probability times 10 is 0 to 10"
    )]
    fn add(&mut self, probability: f64, positive: f64, negative: f64) {
        let bin = &mut self.bins
            [((probability * CALIBRATION_BINS as f64) as usize).min(CALIBRATION_BINS - 1)];
        bin.probability += probability * (positive + negative);
        bin.positive += positive;
        bin.total += positive + negative;
        self.squared_error +=
            positive * (1.0 - probability).powi(2) + negative * probability.powi(2);
    }

    fn total(&self) -> f64 {
        self.bins.iter().map(|bin| bin.total).sum()
    }

    fn brier(&self) -> f64 {
        self.squared_error / self.total()
    }

    fn expected_error(&self) -> f64 {
        self.bins
            .iter()
            .map(|bin| (bin.probability - bin.positive).abs())
            .sum::<f64>()
            / self.total()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples(pairs: &[(f32, bool)]) -> Sorted {
        let sample = |(study, (logit, pe_present)): (usize, &(f32, bool))| Sample {
            logit: *logit,
            pe_present: *pe_present,
            study,
        };
        Sorted::new(pairs.iter().enumerate().map(sample).collect())
    }

    fn figure(measures: &Measures, name: &str) -> f64 {
        measures.values[NAMES.iter().position(|n| *n == name).unwrap()]
    }

    #[track_caller]
    fn check(measures: &Measures, name: &str, expected: f64) {
        assert!(
            (figure(measures, name) - expected).abs() < 1e-12,
            "{name}: {} instead of {expected}",
            figure(measures, name)
        );
    }

    #[test]
    fn figures_agree_with_a_count_by_hand() {
        let measures = samples(&[
            (2.0, true),
            (1.0, false),
            (0.5, true),
            (-1.0, false),
            (-2.0, true),
        ])
        .measure(0.0);
        check(&measures, "auroc", 3.0 / 6.0);
        check(&measures, "auprc", (1.0 + 2.0 / 3.0 + 3.0 / 5.0) / 3.0);
        check(&measures, "sensitivity", 2.0 / 3.0);
        check(&measures, "specificity", 0.5);
        check(&measures, "precision", 2.0 / 3.0);
        check(&measures, "accuracy", 0.6);
        check(&measures, "f1", 2.0 / 3.0);
    }

    #[test]
    fn ties_count_half() {
        check(
            &samples(&[(0.0, true), (0.0, false)]).measure(0.0),
            "auroc",
            0.5,
        );
        check(
            &samples(&[(1.0, true), (0.0, true), (0.0, false), (0.0, false)]).measure(0.0),
            "auroc",
            0.75,
        );
    }

    #[test]
    fn weights_repeat_samples() {
        let weighted = samples(&[(1.0, true), (0.0, false), (-1.0, true)])
            .measure_weighted(0.5, |study| [3.0, 1.0, 1.0][study]);
        let repeated = samples(&[
            (1.0, true),
            (1.0, true),
            (1.0, true),
            (0.0, false),
            (-1.0, true),
        ])
        .measure(0.5);
        for (a, b) in weighted.values.iter().zip(repeated.values) {
            assert!((a - b).abs() < 1e-12);
        }
    }

    #[test]
    fn undefined_figures_are_not_numbers() {
        let measures = samples(&[(1.0, false), (0.0, false)]).measure(0.5);
        assert!(figure(&measures, "auroc").is_nan() && figure(&measures, "sensitivity").is_nan());
    }

    #[test]
    fn threshold_reaches_the_target_sensitivity_and_no_more() {
        let sorted = samples(&[
            (4.0, true),
            (3.0, false),
            (2.0, true),
            (1.0, false),
            (0.0, true),
        ]);
        let threshold = sorted.threshold_for_sensitivity(0.6).unwrap();
        assert!((0.99..1.01).contains(&threshold), "{threshold}");
        assert!(sorted.threshold_for_sensitivity(1.0).unwrap() < 0.0);
        assert_eq!(
            samples(&[(1.0, false)]).threshold_for_sensitivity(0.9),
            None
        );
    }

    #[test]
    fn curves_run_from_corner_to_corner() {
        let roc = samples(&[(2.0, true), (1.0, false), (1.0, true)]).roc();
        assert_eq!(roc, [(0.0, 0.0), (0.0, 0.5), (1.0, 1.0)]);
    }
}
