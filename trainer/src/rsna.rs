//! The weighted log loss of the RSNA Pulmonary Embolism Detection challenge.
//!
//! With `q` the share of positive images of an exam, `n` its images and `w` the image weight,
//! `loss = sum over exams [ sum over labels w_k BCE_k + w q sum over images BCE ] / sum over exams [ 1 + w q n ]`.
//! The exam weights add up to 1. Nothing here predicts exam labels yet: the function waits for the heads that will.

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
    let (mut loss, mut total) = (0.0, 0.0);
    for exam in exams {
        for (name, weight) in EXAM_WEIGHTS {
            let label = EXAM_LABELS.iter().position(|label| *label == name);
            let Some(label) = label else { continue };
            loss += weight * cross_entropy(exam.labels[label], exam.label_probabilities[label]);
        }
        let n_images = exam.images.len() as f64;
        let n_positive = exam.images.iter().filter(|(present, _)| *present).count() as f64;
        let share = if n_images > 0.0 {
            n_positive / n_images
        } else {
            0.0
        };
        let images: f64 = exam
            .images
            .iter()
            .map(|&(present, probability)| cross_entropy(present, probability))
            .sum();
        loss += IMAGE_WEIGHT * share * images;
        total += 1.0 + IMAGE_WEIGHT * share * n_images;
    }
    loss / total
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
}
