//! The RSNA challenge's weighted log loss ([`crate::rsna`]) of a model that knows slices alone.
//!
//! Predicted: each image by its logit, and `negative_exam_for_pe` by the study's score, both through a logistic curve fitted on the
//! validation part (Platt 1999, with his smoothed targets), the images' one with the weight that the loss gives them. The other
//! exam labels the model cannot know: they are predicted by their share in the training part. Beside it stands the same loss
//! with images and every label predicted by constants, so that it shows what the model adds.

use std::collections::BTreeMap;

use serde::Serialize;
use shared::study::StudyRule;

use super::choose::study_scores;
use super::{Judged, show};
use crate::bootstrap::{Interval, RESAMPLES, percentile_interval, study_weights};
use crate::cache::Cache;
use crate::index::EXAM_LABELS;
use crate::rsna::{EXAM_WEIGHTS, Exam, weighted_log_loss};

const N_LABELS: usize = EXAM_LABELS.len();

/// `negative_exam_for_pe` in [`EXAM_LABELS`].
const NEGATIVE_EXAM: usize = 0;
/// Newton steps of a curve; it converges in far fewer.
const NEWTON_STEPS: usize = 50;
/// Pull to zero, which keeps a curve finite where all logits are equal.
const RIDGE: f64 = 1e-6;

/// The loss and what it is to be compared with; lower is better.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RsnaLoss {
    /// The model's weighted log loss.
    pub loss: Interval,
    /// That of constants: shares of the training part.
    pub constant_loss: Interval,
    /// Exams.
    pub n_exams: usize,
    /// Exams whose prediction breaks the challenge's rules of label consistency: it would refuse them.
    pub n_inconsistent: usize,
    /// The labels that the model does not predict, with the share that stands for them.
    pub predicted_by_prevalence: BTreeMap<&'static str, f64>,
}

impl RsnaLoss {
    /// The loss beside that of constants, in one line.
    #[must_use]
    pub fn sentence(&self) -> String {
        format!(
            "RSNA weighted log loss {} over {} exams; constants {} (lower is better); predictions of {} exams break the challenge's rules",
            show(&self.loss),
            self.n_exams,
            show(&self.constant_loss),
            self.n_inconsistent
        )
    }
}

/// The loss on `measured`; `None` where a slice of the parts has no exam labels, or the training part has no slice.
#[must_use]
pub(super) fn rsna_loss(
    cache: &Cache,
    training: &[usize],
    validation: &Judged,
    measured: &Judged,
    rule: &StudyRule,
    seed: u64,
) -> Option<RsnaLoss> {
    let shares = Shares::of(&exams(cache, training, |_| 0.5, |_| [0.5; N_LABELS])?);
    let image_curve = image_curve(cache, validation)?;
    let exam_curve = exam_curve(cache, validation, rule)?;
    let scores = study_scores(cache, measured, rule);
    let model = exams(
        cache,
        &measured.rows,
        |place| image_curve.probability(f64::from(measured.logits[place])),
        |study| {
            let mut labels = shares.labels;
            if let Some(score) = scores.get(study) {
                labels[NEGATIVE_EXAM] = exam_curve.probability(f64::from(score.logit));
            }
            labels
        },
    )?;
    let constant = exams(cache, &measured.rows, |_| shares.image, |_| shares.labels)?;
    let unknown = EXAM_LABELS
        .into_iter()
        .zip(shares.labels)
        .filter(|(name, _)| {
            *name != EXAM_LABELS[NEGATIVE_EXAM]
                && EXAM_WEIGHTS.iter().any(|(label, _)| label == name)
        });
    Some(RsnaLoss {
        loss: interval(&model, seed),
        constant_loss: interval(&constant, seed),
        n_exams: model.len(),
        n_inconsistent: model.iter().filter(|exam| !exam.is_consistent()).count(),
        predicted_by_prevalence: unknown.collect(),
    })
}

/// The exams of some rows, by rising study, with what `image` predicts for each row's place and `labels` for each study.
fn exams(
    cache: &Cache,
    rows: &[usize],
    image: impl Fn(usize) -> f64,
    labels: impl Fn(&str) -> [f64; N_LABELS],
) -> Option<Vec<Exam>> {
    let mut exams = BTreeMap::new();
    for (place, &row) in rows.iter().enumerate() {
        let row = &cache.rows()[row];
        let truth = row.exam_labels?;
        let study = row.study_uid.as_str();
        let exam = exams.entry(study).or_insert_with(|| Exam {
            labels: truth,
            label_probabilities: labels(study),
            images: Vec::new(),
        });
        exam.images.push((row.pe_present, image(place)));
    }
    (!exams.is_empty()).then(|| exams.into_values().collect())
}

/// The constants of least loss on the training part.
struct Shares {
    /// Share of the exams with each label.
    labels: [f64; N_LABELS],
    /// Share of the images with an embolus, each with the weight of its exam in the loss.
    image: f64,
}

impl Shares {
    fn of(exams: &[Exam]) -> Self {
        let with = |label: usize| exams.iter().filter(|exam| exam.labels[label]).count();
        let (mut positive, mut all) = (0.0, 0.0);
        for exam in exams {
            let (share, n_images) = (exam.share_positive(), exam.images.len() as f64);
            positive += share * share * n_images;
            all += share * n_images;
        }
        Self {
            labels: std::array::from_fn(|label| with(label) as f64 / exams.len() as f64),
            image: if all > 0.0 { positive / all } else { 0.0 },
        }
    }
}

/// From logits to the probability of an embolus, each slice with its exam's share of positive ones, as the loss weighs it.
fn image_curve(cache: &Cache, validation: &Judged) -> Option<Curve> {
    let mut counts: BTreeMap<&str, (f64, f64)> = BTreeMap::new();
    for &row in &validation.rows {
        let row = &cache.rows()[row];
        let count = counts.entry(row.study_uid.as_str()).or_default();
        count.0 += f64::from(u8::from(row.pe_present));
        count.1 += 1.0;
    }
    let points: Vec<Point> = validation
        .rows
        .iter()
        .zip(&validation.logits)
        .map(|(&row, &logit)| {
            let row = &cache.rows()[row];
            let (n_positive, n) = counts[row.study_uid.as_str()];
            Point {
                score: f64::from(logit),
                is_true: row.pe_present,
                weight: n_positive / n,
            }
        })
        .collect();
    Curve::fit(&points)
}

/// From study scores to the probability of a negative exam.
fn exam_curve(cache: &Cache, validation: &Judged, rule: &StudyRule) -> Option<Curve> {
    let mut negative = BTreeMap::new();
    for &row in &validation.rows {
        let row = &cache.rows()[row];
        negative.insert(row.study_uid.as_str(), row.exam_labels?[NEGATIVE_EXAM]);
    }
    let points: Vec<Point> = study_scores(cache, validation, rule)
        .into_iter()
        .map(|(study, sample)| Point {
            score: f64::from(sample.logit),
            is_true: negative.get(study).copied().unwrap_or(false),
            weight: 1.0,
        })
        .collect();
    Curve::fit(&points)
}

/// A score with its truth.
struct Point {
    score: f64,
    is_true: bool,
    weight: f64,
}

/// `1 / (1 + exp(-(slope x score + offset)))`.
struct Curve {
    slope: f64,
    offset: f64,
}

impl Curve {
    /// The curve of least weighted log loss towards Platt's targets, `(n + 1) / (n + 2)` and `1 / (n + 2)`, by Newton's method with halved steps;
    /// `None` without weight.
    fn fit(points: &[Point]) -> Option<Self> {
        let weight = |is_true: bool| -> f64 {
            let of = points.iter().filter(|point| point.is_true == is_true);
            of.map(|point| point.weight).sum()
        };
        let (n_true, n_false) = (weight(true), weight(false));
        if n_true + n_false <= 0.0 {
            return None;
        }
        let targets = [1.0 / (n_false + 2.0), (n_true + 1.0) / (n_true + 2.0)];
        let target = |point: &Point| targets[usize::from(point.is_true)];
        let loss = |curve: &Self| -> f64 {
            let of = |point: &Point| {
                let x = curve.slope * point.score + curve.offset;
                point.weight * (x.max(0.0) - x * target(point) + (-x.abs()).exp().ln_1p())
            };
            points.iter().map(of).sum::<f64>() + RIDGE / 2.0 * curve.slope * curve.slope
        };
        let mut curve = Self {
            slope: 0.0,
            offset: ((n_true + 1.0) / (n_false + 1.0)).ln(),
        };
        for _ in 0..NEWTON_STEPS {
            let step = curve.newton_step(points, target);
            let at = |share: f64| Self {
                slope: curve.slope + share * step.0,
                offset: curve.offset + share * step.1,
            };
            let before = loss(&curve);
            let better = (0..40)
                .map(|k| at(0.5_f64.powi(k)))
                .find(|next| loss(next) < before);
            match better {
                Some(next) => curve = next,
                None => break,
            }
        }
        Some(curve)
    }

    fn newton_step(&self, points: &[Point], target: impl Fn(&Point) -> f64) -> (f64, f64) {
        let (mut g, mut h) = ([RIDGE * self.slope, 0.0], [RIDGE, 0.0, RIDGE]);
        for point in points {
            let probability = self.probability(point.score);
            let error = point.weight * (probability - target(point));
            let curvature = point.weight * probability * (1.0 - probability);
            g[0] += error * point.score;
            g[1] += error;
            h[0] += curvature * point.score * point.score;
            h[1] += curvature * point.score;
            h[2] += curvature;
        }
        let determinant = h[0] * h[2] - h[1] * h[1];
        (
            -(h[2] * g[0] - h[1] * g[1]) / determinant,
            -(h[0] * g[1] - h[1] * g[0]) / determinant,
        )
    }

    fn probability(&self, score: f64) -> f64 {
        1.0 / (1.0 + (-(self.slope * score + self.offset)).exp())
    }
}

/// The loss with its interval by the bootstrap over exams.
fn interval(exams: &[Exam], seed: u64) -> Interval {
    let terms: Vec<(f64, f64)> = exams.iter().map(Exam::terms).collect();
    let draws = (0..RESAMPLES)
        .map(|resample| {
            let weights = study_weights(terms.len(), seed, resample);
            let drawn = weights.iter().zip(&terms);
            let (loss, total) = drawn.fold((0.0, 0.0), |sum, (weight, term)| {
                (sum.0 + weight * term.0, sum.1 + weight * term.1)
            });
            loss / total
        })
        .collect();
    percentile_interval(weighted_log_loss(exams), draws).resting_on(exams.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn point(score: f64, is_true: bool) -> Point {
        Point {
            score,
            is_true,
            weight: 1.0,
        }
    }

    #[test]
    fn curve_finds_slope_and_offset() {
        let mut points = Vec::new();
        for k in -20..=20_i32 {
            let score = f64::from(k) / 5.0;
            let probability = 1.0 / (1.0 + (-(0.5 * score - 1.0)).exp());
            points.extend((0..200).map(|n| point(score, f64::from(n) < 200.0 * probability)));
        }
        let curve = Curve::fit(&points).unwrap();
        assert!((curve.slope - 0.5).abs() < 0.02 && (curve.offset + 1.0).abs() < 0.05);
    }

    #[test]
    fn separable_and_equal_scores_give_finite_curves() {
        let separable = [point(-1.0, false), point(-2.0, false), point(1.0, true)];
        let curve = Curve::fit(&separable).unwrap();
        assert!((0.6..0.999).contains(&curve.probability(1.0)));
        let equal = [point(0.0, false), point(0.0, false), point(0.0, true)];
        let probability = Curve::fit(&equal).unwrap().probability(0.0);
        assert!((0.25..0.5).contains(&probability), "{probability}");
        assert!(Curve::fit(&[]).is_none());
    }

    #[test]
    fn shares_are_the_constants_of_least_loss() {
        let exam = |n_positive: usize, is_negative: bool| {
            let mut labels = [false; N_LABELS];
            labels[NEGATIVE_EXAM] = is_negative;
            let images = (0..10).map(|image| (image < n_positive, 0.0)).collect();
            let label_probabilities = [0.0; N_LABELS];
            Exam {
                labels,
                label_probabilities,
                images,
            }
        };
        let exams = [exam(0, true), exam(2, false), exam(5, false), exam(0, true)];
        let shares = Shares::of(&exams);
        let loss = |factor: f64| {
            let with = |exam: &Exam| Exam {
                label_probabilities: shares.labels.map(|share| share * factor),
                images: exam
                    .images
                    .iter()
                    .map(|(t, _)| (*t, shares.image * factor))
                    .collect(),
                ..exam.clone()
            };
            weighted_log_loss(&exams.iter().map(with).collect::<Vec<_>>())
        };
        assert!(loss(1.0) < loss(0.98) && loss(1.0) < loss(1.02));
    }
}
