//! What is chosen on the validation part and then frozen: operating points, temperature, study rule.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use shared::manifest::OperatingPoint;
use shared::study::{self, StudyRule};

use super::{Judged, TARGET_SENSITIVITIES, samples};
use crate::cache::Cache;
use crate::metrics::{Sample, Sorted};

/// What was chosen on the validation part.
pub(super) struct Chosen {
    pub(super) points: Vec<OperatingPoint>,
    pub(super) threshold: f32,
    pub(super) temperature: f64,
    pub(super) rule: StudyRule,
}

pub(super) fn choose(cache: &Cache, validation: &Judged) -> Result<Chosen> {
    let sorted = Sorted::new(samples(cache, validation));
    let points = TARGET_SENSITIVITIES
        .iter()
        .filter_map(|&target| {
            let logit_threshold = sorted.threshold_for_sensitivity(target)?;
            let values = sorted.measure(logit_threshold).values;
            Some(OperatingPoint {
                name: format!("sensitivity-{target:.2}"),
                logit_threshold,
                sensitivity: values[2],
                specificity: values[3],
            })
        })
        .collect::<Vec<_>>();
    let threshold = points
        .first()
        .map(|point| point.logit_threshold)
        .context("the validation part has no positive slice")?;
    Ok(Chosen {
        points,
        threshold,
        temperature: temperature(sorted.samples()),
        rule: study_rule(cache, validation),
    })
}

/// Between these the temperature is searched.
pub(super) const TEMPERATURES: (f64, f64) = (0.05, 20.0);

/// The temperature of least log loss within [`TEMPERATURES`]: golden-section search on its logarithm (Guo et al. 2017).
pub(super) fn temperature(samples: &[Sample]) -> f64 {
    let loss = |log_temperature: f64| -> f64 {
        let temperature = log_temperature.exp();
        samples
            .iter()
            .map(|sample| {
                let logit = f64::from(sample.logit) / temperature;
                let signed = if sample.pe_present { -logit } else { logit };
                signed.max(0.0) + (-signed.abs()).exp().ln_1p()
            })
            .sum()
    };
    let ratio = (5.0_f64.sqrt() - 1.0) / 2.0;
    let (mut low, mut high) = (TEMPERATURES.0.ln(), TEMPERATURES.1.ln());
    for _ in 0..60 {
        let (a, b) = (high - ratio * (high - low), low + ratio * (high - low));
        if loss(a) < loss(b) {
            high = b;
        } else {
            low = a;
        }
    }
    ((low + high) / 2.0).exp()
}

/// The rule of highest AUROC over studies, the simplest among equals; its threshold reaches the first target sensitivity.
pub(super) fn study_rule(cache: &Cache, validation: &Judged) -> StudyRule {
    let mut best = (
        f64::NEG_INFINITY,
        StudyRule {
            smoothing_slices: 1,
            top_slices: 1,
            logit_threshold: 0.0,
        },
    );
    for smoothing_slices in [1, 3, 5] {
        for top_slices in [1, 2, 3, 5, 8] {
            let mut rule = StudyRule {
                smoothing_slices,
                top_slices,
                logit_threshold: 0.0,
            };
            let sorted = Sorted::new(study_samples(cache, validation, &rule));
            let auroc = sorted.measure(0.0).values[0];
            rule.logit_threshold = sorted
                .threshold_for_sensitivity(TARGET_SENSITIVITIES[0])
                .unwrap_or(0.0);
            if auroc > best.0 + 1e-9 || best.0 == f64::NEG_INFINITY {
                best = (
                    if auroc.is_nan() {
                        f64::NEG_INFINITY
                    } else {
                        auroc
                    },
                    rule,
                );
            }
        }
    }
    best.1
}

/// One sample a study: the score of its best series, and whether any slice shows an embolus.
pub(super) fn study_samples(cache: &Cache, judged: &Judged, rule: &StudyRule) -> Vec<Sample> {
    study_scores(cache, judged, rule).into_values().collect()
}

/// As [`study_samples`], by Study Instance UID.
pub(super) fn study_scores<'a>(
    cache: &'a Cache,
    judged: &Judged,
    rule: &StudyRule,
) -> BTreeMap<&'a str, Sample> {
    let mut studies: BTreeMap<&str, Sample> = BTreeMap::new();
    let pairs: Vec<(usize, f32)> = judged
        .rows
        .iter()
        .copied()
        .zip(judged.logits.iter().copied())
        .collect();
    let rows = cache.rows();
    for series in pairs.chunk_by(|a, b| rows[a.0].series_uid == rows[b.0].series_uid) {
        let logits: Vec<Option<f32>> = series.iter().map(|(_, logit)| Some(*logit)).collect();
        let Some(score) = study::score(rule, &logits) else {
            continue;
        };
        let pe_present = series.iter().any(|(row, _)| rows[*row].pe_present);
        let next = studies.len();
        let study = studies
            .entry(rows[series[0].0].study_uid.as_str())
            .or_insert(Sample {
                logit: score,
                pe_present,
                study: next,
            });
        study.logit = study.logit.max(score);
        study.pe_present |= pe_present;
    }
    studies
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(logit: f32, pe_present: bool, study: usize) -> Sample {
        Sample {
            logit,
            pe_present,
            study,
        }
    }

    #[test]
    fn temperature_undoes_a_scaling() {
        let mut samples = Vec::new();
        for k in -20..=20_i16 {
            let logit = f32::from(k) / 5.0;
            let probability = shared::probability::sigmoid(logit);
            for n in 0..100_u8 {
                samples.push(sample(3.0 * logit, f32::from(n) < probability * 100.0, 0));
            }
        }
        assert!((temperature(&samples) - 3.0).abs() < 0.15);
    }
}
