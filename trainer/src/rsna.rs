//! The weighted log loss of the RSNA Pulmonary Embolism Detection challenge.
//!
//! With `q` the share of positive images of an exam, `n` its images and `w` the image weight,
//! `loss = sum over exams [ sum over labels w_k BCE_k + w q sum over images BCE ] / sum over exams [ 1 + w q n ]`.
//! The exam weights add up to 1. What is predicted, and from what, is left to `evaluate`.

use shared::phantom::ExamLabels;

use crate::index::EXAM_LABELS;

/// Weight of an image.
pub const IMAGE_WEIGHT: f64 = 0.073_619_63;

/// Exam labels that count, with their weights.
pub const EXAM_WEIGHTS: [(&str, f64); 9] = [
    ("negative_exam_for_pe", 0.073_619_631_9),
    ("indeterminate", 0.092_024_539_88),
    ("chronic_pe", 0.104_294_478_5),
    ("acute_and_chronic_pe", 0.104_294_478_5),
    ("central_pe", 0.187_730_061_3),
    ("leftsided_pe", 0.062_576_687_12),
    ("rightsided_pe", 0.062_576_687_12),
    ("rv_lv_ratio_gte_1", 0.234_662_576_7),
    ("rv_lv_ratio_lt_1", 0.078_220_858_9),
];

/// Probabilities are kept this far from 0 and 1.
const CLIP: f64 = 1e-7;

/// One exam with its truth and its prediction.
#[derive(Clone, Debug, PartialEq)]
pub struct Exam {
    /// Exam labels in the order of [`EXAM_LABELS`].
    pub labels: [bool; EXAM_LABELS.len()],
    /// Predicted probabilities of the labels in the order of [`EXAM_LABELS`].
    pub label_probabilities: [f64; EXAM_LABELS.len()],
    /// For each image whether an embolus is visible, and the predicted probability of it.
    pub images: Vec<(bool, f64)>,
}

/// The loss over exams; NaN for none.
#[must_use]
pub fn weighted_log_loss(exams: &[Exam]) -> f64 {
    let (loss, weight) = exams
        .iter()
        .map(Exam::terms)
        .fold((0.0, 0.0), |sum, term| (sum.0 + term.0, sum.1 + term.1));
    loss / weight
}

impl Exam {
    /// Share of its images that show an embolus; 0 without images.
    #[must_use]
    pub fn share_positive(&self) -> f64 {
        let n_positive = self.images.iter().filter(|(present, _)| *present).count();
        n_positive as f64 / self.images.len().max(1) as f64
    }

    /// What the exam adds to the loss's numerator and to its denominator.
    #[must_use]
    pub fn terms(&self) -> (f64, f64) {
        let of_labels: f64 = EXAM_WEIGHTS
            .iter()
            .filter_map(|(name, weight)| {
                let label = EXAM_LABELS.iter().position(|label| label == name)?;
                let probability = self.label_probabilities[label];
                Some(weight * cross_entropy(self.labels[label], probability))
            })
            .sum();
        let of_images: f64 = self
            .images
            .iter()
            .map(|&(present, probability)| cross_entropy(present, probability))
            .sum();
        let image_weight = IMAGE_WEIGHT * self.share_positive();
        (
            of_labels + image_weight * of_images,
            1.0 + image_weight * self.images.len() as f64,
        )
    }

    /// Whether the prediction obeys the challenge's rules of label consistency, each probability read as a label at above 0.5
    /// ([`ExamLabels::is_consistent`]).
    #[must_use]
    pub fn is_consistent(&self) -> bool {
        let has_positive_image = self
            .images
            .iter()
            .any(|(_, probability)| *probability > 0.5);
        labelled(
            self.label_probabilities
                .map(|probability| probability > 0.5),
        )
        .is_consistent(has_positive_image)
    }
}

/// Labels in the order of [`EXAM_LABELS`] by their names.
fn labelled(labels: [bool; EXAM_LABELS.len()]) -> ExamLabels {
    let [
        negative_exam_for_pe,
        qa_motion,
        qa_contrast,
        flow_artifact,
        rv_lv_ratio_gte_1,
        rv_lv_ratio_lt_1,
        leftsided_pe,
        chronic_pe,
        true_filling_defect_not_pe,
        rightsided_pe,
        acute_and_chronic_pe,
        central_pe,
        indeterminate,
    ] = labels;
    ExamLabels {
        negative_exam_for_pe,
        indeterminate,
        chronic_pe,
        acute_and_chronic_pe,
        central_pe,
        leftsided_pe,
        rightsided_pe,
        rv_lv_ratio_gte_1,
        rv_lv_ratio_lt_1,
        qa_motion,
        qa_contrast,
        flow_artifact,
        true_filling_defect_not_pe,
    }
}

fn cross_entropy(is_positive: bool, probability: f64) -> f64 {
    let probability = probability.clamp(CLIP, 1.0 - CLIP);
    -if is_positive {
        probability
    } else {
        1.0 - probability
    }
    .ln()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exam_weights_add_up_to_one() {
        let sum: f64 = EXAM_WEIGHTS.iter().map(|(_, weight)| weight).sum();
        assert!((sum - 1.0).abs() < 1e-8, "{sum}");
        assert!(
            EXAM_WEIGHTS
                .iter()
                .all(|(name, _)| EXAM_LABELS.contains(name))
        );
    }

    #[test]
    fn guessing_one_half_costs_the_logarithm_of_two() {
        let exam = |n_positive: usize| Exam {
            labels: [true; 13],
            label_probabilities: [0.5; 13],
            images: (0..10).map(|index| (index < n_positive, 0.5)).collect(),
        };
        let loss = weighted_log_loss(&[exam(0), exam(4), exam(10)]);
        assert!((loss - 2_f64.ln()).abs() < 1e-8, "{loss}");
    }

    /// Probabilities of the labels: `other` but for those named.
    fn probabilities(other: f64, named: &[(&str, f64)]) -> [f64; 13] {
        EXAM_LABELS.map(|label| {
            let found = named.iter().find(|(name, _)| *name == label);
            found.map_or(other, |(_, probability)| *probability)
        })
    }

    /// Reckoned with pencil and paper from the formula, the weights rounded to five digits:
    /// positive exam (right-sided, RV/LV below 1; 4 images, 1 positive, q = 1/4): all labels at 0.2 but right-sided 0.5;
    /// labels: (1 - 0.06258 - 0.07822) x 0.22314 + 0.06258 x 0.69315 + 0.07822 x 1.60944 = 0.36099;
    /// images: 0.07362 / 4 x (0.69315 + 3 x 0.10536) = 0.01857; denominator 1.07362.
    /// Negative exam at 0.9, all others 0.1, 2 images: 0.10536; denominator 1.
    #[test]
    fn loss_equals_an_example_by_hand() {
        let positive = Exam {
            labels: probabilities(0.0, &[("rightsided_pe", 1.0), ("rv_lv_ratio_lt_1", 1.0)])
                .map(|label| label > 0.5),
            label_probabilities: probabilities(0.2, &[("rightsided_pe", 0.5)]),
            images: vec![(true, 0.5), (false, 0.1), (false, 0.1), (false, 0.1)],
        };
        let negative = Exam {
            labels: probabilities(0.0, &[("negative_exam_for_pe", 1.0)]).map(|label| label > 0.5),
            label_probabilities: probabilities(0.1, &[("negative_exam_for_pe", 0.9)]),
            images: vec![(false, 0.4); 2],
        };
        let loss = weighted_log_loss(&[positive, negative]);
        let expected = (0.360_99 + 0.018_57 + 0.105_36) / (1.073_62 + 1.0);
        assert!((loss - expected).abs() < 2e-5, "{loss} {expected}");
    }

    #[test]
    fn predictions_obey_the_rules_or_are_told_to_break_them() {
        let exam = |named: &[(&str, f64)], image: f64| Exam {
            labels: [false; 13],
            label_probabilities: probabilities(0.2, named),
            images: vec![(false, 0.1), (false, image)],
        };
        let check = |named: &[(&str, f64)], image, expected| {
            assert_eq!(exam(named, image).is_consistent(), expected, "{named:?}");
        };
        check(&[("negative_exam_for_pe", 0.6)], 0.4, true);
        check(&[("negative_exam_for_pe", 0.6)], 0.6, false);
        check(&[("negative_exam_for_pe", 0.5)], 0.4, false);
        check(&[("indeterminate", 0.6)], 0.4, true);
        let located = ("central_pe", 0.7);
        check(&[located, ("rv_lv_ratio_lt_1", 0.7)], 0.6, true);
        check(&[located], 0.6, false);
        let both = [("rv_lv_ratio_lt_1", 0.7), ("rv_lv_ratio_gte_1", 0.7)];
        check(&[located, both[0], both[1]], 0.6, false);
        check(&[both[0]], 0.6, false);
        let chronic = [("chronic_pe", 0.7), ("acute_and_chronic_pe", 0.7)];
        check(&[located, both[0], chronic[0]], 0.6, true);
        check(&[located, both[0], chronic[0], chronic[1]], 0.6, false);
    }
}
