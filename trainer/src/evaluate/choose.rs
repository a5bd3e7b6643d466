//! What is chosen on the validation part and then frozen: operating points, temperature, study rule. A model file that holds them keeps its own,
//! for they are what the board decides by.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use shared::manifest::{Manifest, OperatingPoint};
use shared::study::{self, StudyRule};

use super::{Judged, TARGET_SENSITIVITIES, samples};
use crate::cache::Cache;
use crate::metrics::{Sample, Sorted};
use crate::temperature::temperature;

/// What the figures are measured with.
pub(super) struct Chosen {
    pub(super) points: Vec<OperatingPoint>,
    pub(super) threshold: f32,
    pub(super) temperature: f64,
    pub(super) rule: StudyRule,
}

/// What the model file says; `None` where it has no operating point. A study rule that it lacks is chosen, for the studies' figures need one.
pub(super) fn frozen(manifest: &Manifest, cache: &Cache, validation: &Judged) -> Option<Chosen> {
    let points = manifest.operating_points.clone();
    let threshold = points.first()?.logit_threshold;
    Some(Chosen {
        points,
        threshold,
        temperature: manifest.temperature.unwrap_or(1.0),
        rule: manifest
            .study_rule
            .unwrap_or_else(|| study_rule(cache, validation)),
    })
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
