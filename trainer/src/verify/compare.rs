//! Both files on the same slices: figures and their change, with paired intervals.

use std::collections::BTreeMap;

use rayon::prelude::*;

use crate::bootstrap::{self, Interval, RESAMPLES};
use crate::cache::Cache;
use crate::metrics::{Measures, NAMES, Sample, Sorted};

use super::Pair;

const BOOTSTRAP_SEED: u64 = 1;

/// The same slices through both files.
pub(super) struct Both {
    pub(super) float: Sorted,
    pub(super) int8: Sorted,
    pub(super) n_studies: usize,
}

/// How far the logits of both files are apart.
pub(super) struct Distance {
    /// Share of slices on which both decide alike.
    pub(super) agreement: f64,
    pub(super) largest: f64,
    pub(super) rmse: f64,
}

impl Distance {
    pub(super) fn between(float: &[f32], int8: &[f32], threshold: f32) -> Self {
        let n = float.len() as f64;
        let pairs = || float.iter().zip(int8);
        let changes = || pairs().map(|(float, int8)| (f64::from(*float) - f64::from(*int8)).abs());
        let alike = pairs().filter(|(float, int8)| (**float >= threshold) == (**int8 >= threshold));
        Self {
            agreement: alike.count() as f64 / n,
            largest: changes().fold(0.0, f64::max),
            rmse: (changes().map(|change| change * change).sum::<f64>() / n).sqrt(),
        }
    }
}

impl Both {
    /// Slices `rows` of `cache` with their logits from both files.
    pub(super) fn new(cache: &Cache, rows: &[usize], float: &[f32], int8: &[f32]) -> Self {
        let mut numbers = BTreeMap::new();
        let of_row = |&row: &usize| {
            let next = numbers.len();
            *numbers.entry(&cache.rows()[row].study_uid).or_insert(next)
        };
        let studies: Vec<usize> = rows.iter().map(of_row).collect();
        let samples = |logits: &[f32]| {
            let of_slice = rows.iter().zip(logits).zip(&studies);
            let samples = of_slice.map(|((&row, &logit), &study)| Sample {
                logit,
                pe_present: cache.rows()[row].pe_present,
                study,
            });
            Sorted::new(samples.collect())
        };
        Self {
            float: samples(float),
            int8: samples(int8),
            n_studies: numbers.len(),
        }
    }

    /// AUROC, sensitivity and specificity at `threshold`; the intervals resample studies, the same ones for both files. A figure that
    /// rests on one study has no interval.
    pub(super) fn compare(&self, threshold: f32) -> [Pair; 3] {
        let figures = ["auroc", "sensitivity", "specificity"]
            .map(|name| NAMES.iter().position(|known| *known == name).unwrap_or(0));
        let pick = |measures: &Measures| figures.map(|index| measures.values[index]);
        let draws: Vec<[f64; 3]> = (0..RESAMPLES)
            .into_par_iter()
            .map(|resample| {
                let weights = bootstrap::study_weights(self.n_studies, BOOTSTRAP_SEED, resample);
                let measure = |sorted: &Sorted| {
                    pick(&sorted.measure_weighted(threshold, |study| weights[study]))
                };
                let (float, int8) = (measure(&self.float), measure(&self.int8));
                [0, 1, 2].map(|index| int8[index] - float[index])
            })
            .collect();
        let (float, int8) = (
            pick(&self.float.measure(threshold)),
            pick(&self.int8.measure(threshold)),
        );
        let carriers = self.float.carriers(threshold);
        [0, 1, 2].map(|index| {
            let change = int8[index] - float[index];
            let Interval { low, high, .. } = bootstrap::percentile_interval(
                change,
                draws.iter().map(|draw| draw[index]).collect(),
            )
            .resting_on(carriers[figures[index]]);
            Pair {
                float: float[index],
                int8: int8[index],
                change,
                low,
                high,
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Slices of study, label and logit.
    fn both(float: &[(usize, bool, f32)], int8: &[(usize, bool, f32)]) -> Both {
        let sorted = |slices: &[(usize, bool, f32)]| {
            let sample = |&(study, pe_present, logit)| Sample {
                logit,
                pe_present,
                study,
            };
            Sorted::new(slices.iter().map(sample).collect())
        };
        Both {
            float: sorted(float),
            int8: sorted(int8),
            n_studies: 3,
        }
    }

    #[test]
    fn identical_logits_change_nothing() {
        let slices = [
            (0, true, 1.0),
            (0, false, -1.0),
            (1, true, -0.5),
            (2, false, 0.5),
        ];
        for pair in both(&slices, &slices).compare(0.0) {
            assert!(
                pair.change.abs() < 1e-12 && pair.low.abs() < 1e-12 && pair.high.abs() < 1e-12,
                "{pair:?}"
            );
        }
    }

    #[test]
    fn one_positive_study_gives_a_change_without_interval() {
        let slices = |logit| [(0, true, logit), (1, false, -1.0), (2, false, 0.5)];
        let found = both(&slices(1.0), &slices(-2.0)).compare(0.0);
        let [auroc, sensitivity, specificity] = found;
        for pair in [auroc, sensitivity] {
            assert!(pair.change < 0.0 && pair.low.is_nan() && pair.high.is_nan());
        }
        assert!(specificity.low.abs() < 1e-12 && specificity.high.abs() < 1e-12);
    }
}
