//! Both files on the same slices: figures and their change, with paired intervals.

use rayon::prelude::*;

use crate::bootstrap::{self, Interval, RESAMPLES};
use crate::metrics::{Measures, NAMES, Sorted};

use super::Pair;

const BOOTSTRAP_SEED: u64 = 1;

/// The same slices through both files.
pub(super) struct Both {
    pub(super) float: Sorted,
    pub(super) int8: Sorted,
    pub(super) n_studies: usize,
}

impl Both {
    /// AUROC, sensitivity and specificity at `threshold`; the intervals resample studies, the same ones for both files.
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
        [0, 1, 2].map(|index| {
            let change = int8[index] - float[index];
            let Interval { low, high, .. } = bootstrap::percentile_interval(
                change,
                draws.iter().map(|draw| draw[index]).collect(),
            );
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
    use super::super::tests::samples;
    use super::*;

    #[test]
    fn identical_logits_change_nothing() {
        let both = Both {
            float: Sorted::new(samples(1.0)),
            int8: Sorted::new(samples(1.0)),
            n_studies: 1,
        };
        for pair in both.compare(0.0) {
            assert!(
                pair.change.abs() < 1e-12 && pair.low.abs() < 1e-12 && pair.high.abs() < 1e-12,
                "{pair:?}"
            );
        }
    }
}
