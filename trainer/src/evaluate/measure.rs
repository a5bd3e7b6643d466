//! The figures of slices and studies, at natural prevalence and balanced.

use std::collections::HashMap;

use super::choose::{Chosen, study_samples};
use super::{Counts, Curves, Figures, Judged, samples};
use crate::bootstrap::intervals;
use crate::cache::Cache;
use crate::controls::Draw;
use crate::metrics::{Confusion, NAMES, Sample, Sorted};

pub(super) struct AllFigures {
    pub(super) slice: Figures,
    pub(super) balanced: Figures,
    pub(super) balanced_half: Figures,
    pub(super) study: Figures,
}

pub(super) fn measure(
    cache: &Cache,
    judged: &Judged,
    chosen: &Chosen,
    seed: u64,
) -> (AllFigures, Curves) {
    let slices = samples(cache, judged);
    let balanced = balanced(&slices, seed);
    let studies = study_samples(cache, judged, &chosen.rule);
    let natural = Sorted::new(slices.clone());
    let sorted_studies = Sorted::new(studies.clone());
    let tempered = Sorted::new(
        slices
            .iter()
            .map(|sample| Sample {
                logit: tempered_logit(sample.logit, chosen.temperature),
                ..*sample
            })
            .collect(),
    );
    let curves = Curves {
        slice_roc: natural.roc(),
        study_roc: sorted_studies.roc(),
        slice_precision_recall: natural.precision_recall(),
        reliability: tempered.reliability(),
        study_scores: studies
            .iter()
            .map(|study| (study.logit, study.pe_present))
            .collect(),
    };
    let calibrated = |mut figures: Figures, samples: &[Sample]| {
        // Brier and ECE are those of the probability that is shown, after the temperature.
        let samples = samples
            .iter()
            .map(|sample| Sample {
                logit: tempered_logit(sample.logit, chosen.temperature),
                ..*sample
            })
            .collect();
        let with_temperature = figures_of(samples, 0.0, seed);
        for name in ["brier", "ece"] {
            if let Some(interval) = with_temperature.values.get(name) {
                figures.values.insert(name, *interval);
            }
        }
        figures
    };
    let figures = AllFigures {
        slice: calibrated(figures_of(slices.clone(), chosen.threshold, seed), &slices),
        balanced: calibrated(
            figures_of(balanced.clone(), chosen.threshold, seed),
            &balanced,
        ),
        balanced_half: figures_of(balanced.clone(), 0.0, seed),
        study: figures_of(studies, chosen.rule.logit_threshold, seed),
    };
    (figures, curves)
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "a logit is shown and binned in f32"
)]
pub(super) fn tempered_logit(logit: f32, temperature: f64) -> f32 {
    (f64::from(logit) / temperature) as f32
}

pub(super) fn figures_of(samples: Vec<Sample>, threshold: f32, seed: u64) -> Figures {
    let n = samples.len();
    let n_positive = samples.iter().filter(|sample| sample.pe_present).count();
    let n_studies = samples
        .iter()
        .map(|sample| sample.study)
        .collect::<std::collections::HashSet<_>>()
        .len();
    let sorted = Sorted::new(renumbered(samples));
    Figures {
        values: NAMES
            .into_iter()
            .zip(intervals(&sorted, threshold, seed))
            .collect(),
        confusion: counts(&sorted.measure(threshold).confusion),
        threshold,
        n,
        n_positive,
        n_studies,
    }
}

/// Studies numbered without gaps, so that the bootstrap draws as many as there are.
pub(super) fn renumbered(mut samples: Vec<Sample>) -> Vec<Sample> {
    let mut numbers = HashMap::new();
    for sample in &mut samples {
        let next = numbers.len();
        sample.study = *numbers.entry(sample.study).or_insert(next);
    }
    samples
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "sums of ones"
)]
pub(super) fn counts(confusion: &Confusion) -> Counts {
    Counts {
        true_positive: confusion.true_positive as u64,
        false_positive: confusion.false_positive as u64,
        true_negative: confusion.true_negative as u64,
        false_negative: confusion.false_negative as u64,
    }
}

/// All samples of the rarer kind and as many of the other, drawn by the seed.
pub(super) fn balanced(samples: &[Sample], seed: u64) -> Vec<Sample> {
    let (mut positive, mut negative): (Vec<Sample>, Vec<Sample>) =
        samples.iter().partition(|sample| sample.pe_present);
    let n = positive.len().min(negative.len());
    let mut draw = Draw(seed);
    for kind in [&mut positive, &mut negative] {
        for place in 0..n {
            let other = place + draw.below(kind.len() - place);
            kind.swap(place, other);
        }
        kind.truncate(n);
    }
    positive.append(&mut negative);
    positive
}

pub(super) fn false_positives(cache: &Cache, judged: &Judged, threshold: f32) -> f64 {
    let mut studies: HashMap<&str, (bool, u32)> = HashMap::new();
    for (&row, &logit) in judged.rows.iter().zip(&judged.logits) {
        let row = &cache.rows()[row];
        let study = studies.entry(row.study_uid.as_str()).or_default();
        study.0 |= row.pe_present;
        study.1 += u32::from(logit >= threshold);
    }
    let negative: Vec<u32> = studies
        .values()
        .filter(|(pe_present, _)| !pe_present)
        .map(|(_, n_called)| *n_called)
        .collect();
    f64::from(negative.iter().sum::<u32>()) / negative.len() as f64
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
    fn a_balanced_sample_has_as_many_of_each_kind() {
        let samples: Vec<Sample> = (0..50).map(|k| sample(0.0, k % 7 == 0, k)).collect();
        let drawn = balanced(&samples, 4);
        assert_eq!(drawn.iter().filter(|sample| sample.pe_present).count(), 8);
        assert_eq!(drawn.len(), 16);
        assert_eq!(drawn, balanced(&samples, 4));
    }
}
