//! What is chosen on the validation part and then frozen: operating points, temperature, study rule. A model file that holds them keeps its own,
//! for they are what the board decides by.

use std::collections::{BTreeMap, HashMap};

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
    let rows = cache.rows();
    for series in series(cache, judged) {
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

/// Row and logit of each series' slices in order of z, wherever they lie in the cache: files of two folders lie by their label.
fn series(cache: &Cache, judged: &Judged) -> Vec<Vec<(usize, f32)>> {
    let rows = cache.rows();
    let mut all: Vec<Vec<(usize, f32)>> = Vec::new();
    let mut places = HashMap::new();
    for (&row, &logit) in judged.rows.iter().zip(&judged.logits) {
        let next = all.len();
        let place = *places
            .entry((&rows[row].study_uid, &rows[row].series_uid))
            .or_insert(next);
        if place == next {
            all.push(Vec::new());
        }
        all[place].push((row, logit));
    }
    let z = |(row, _): &(usize, f32)| rows[*row].z_mm.unwrap_or(f64::NEG_INFINITY);
    for slices in &mut all {
        slices.sort_by(|a, b| z(a).total_cmp(&z(b)));
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::Source;

    #[test]
    fn slices_of_a_series_are_taken_by_height_wherever_they_lie() {
        let folder = tempfile::tempdir().unwrap();
        let source = Source::phantom(3, 1, 5, 64, false);
        let spec = shared::spec::PreprocessSpec::default();
        let path = folder.path().join("cache");
        crate::prepare::prepare(&source, &spec, 1, None, &path).unwrap();
        let cache = Cache::open(&path).unwrap();
        let rule = StudyRule {
            smoothing_slices: 3,
            top_slices: 1,
            logit_threshold: 0.0,
        };
        let logits: Vec<f32> = (0..15_u8).map(|row| f32::from(row * 7 % 11)).collect();
        let scores = |order: Vec<usize>| {
            let judged = Judged {
                logits: order.iter().map(|&row| logits[row]).collect(),
                rows: order,
            };
            let scores = study_scores(&cache, &judged, &rule);
            let score =
                |(study, sample): (&str, Sample)| (study.to_owned(), sample.logit.to_bits());
            scores.into_iter().map(score).collect::<Vec<_>>()
        };
        let in_order = scores((0..15).collect());
        // As two folders have them: one label first, then the other.
        let by_label = (0..15).step_by(2).chain((1..15).step_by(2)).collect();
        assert_eq!(scores(by_label), in_order);
    }
}
