//! 95 % intervals by the bootstrap over studies.
//!
//! Slices of one study resemble each other; drawing slices would make intervals too narrow. So whole studies are drawn
//! with replacement (Efron and Tibshirani 1993, chapter 6; percentile interval), seeded, and every figure is computed anew.

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::metrics::{N_MEASURES, Sorted};

/// Draws of an interval.
pub const RESAMPLES: u64 = 1000;

/// A figure with its 95 % interval; NaN is written as null.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Interval {
    /// The figure on the data as they are.
    pub value: f64,
    /// 2.5th percentile of the resampled figure.
    pub low: f64,
    /// 97.5th percentile of the resampled figure.
    pub high: f64,
}

/// Every figure of `sorted` at `threshold` with its interval, in the order of [`crate::metrics::NAMES`].
#[must_use]
pub fn intervals(sorted: &Sorted, threshold: f32, seed: u64) -> [Interval; N_MEASURES] {
    let n_studies = sorted
        .samples()
        .iter()
        .map(|s| s.study + 1)
        .max()
        .unwrap_or(0);
    let draws: Vec<[f64; N_MEASURES]> = (0..RESAMPLES)
        .into_par_iter()
        .map(|resample| {
            let weights = study_weights(n_studies, seed, resample);
            sorted
                .measure_weighted(threshold, |study| weights[study])
                .values
        })
        .collect();
    let values = sorted.measure(threshold).values;
    std::array::from_fn(|k| {
        percentile_interval(values[k], draws.iter().map(|draw| draw[k]).collect())
    })
}

/// How often each of `n_studies` is drawn in draw number `resample`.
#[must_use]
pub fn study_weights(n_studies: usize, seed: u64, resample: u64) -> Vec<f64> {
    let mut state = seed ^ resample.wrapping_mul(0xD134_2543_DE82_EF95);
    let mut weights = vec![0.0; n_studies];
    for _ in 0..n_studies {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = (state ^ (state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        let drawn = (u128::from(z ^ (z >> 31)) * n_studies as u128) >> 64;
        weights[usize::try_from(drawn).unwrap_or(0)] += 1.0;
    }
    weights
}

/// The 2.5th and 97.5th percentile of `draws` (nearest rank; undefined draws left out) around `value`.
#[must_use]
pub fn percentile_interval(value: f64, mut draws: Vec<f64>) -> Interval {
    draws.retain(|draw| !draw.is_nan());
    draws.sort_by(f64::total_cmp);
    let at = |permille: usize| {
        draws
            .get((draws.len().max(1) - 1) * permille / 1000)
            .copied()
            .unwrap_or(f64::NAN)
    };
    Interval {
        value,
        low: at(25),
        high: at(975),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::Sample;

    fn sorted(slices_per_study: usize) -> Sorted {
        let studies = 0..60_usize;
        let slices = studies.flat_map(|study| (0..slices_per_study).map(move |_| study));
        Sorted::new(
            slices
                .map(|study| Sample {
                    logit: ((study * 37) % 11) as f32 - 5.0,
                    pe_present: study % 3 == 0,
                    study,
                })
                .collect(),
        )
    }

    #[test]
    fn intervals_hold_their_figure_and_depend_on_the_seed_alone() {
        let once = intervals(&sorted(1), 0.0, 1);
        assert_eq!(
            format!("{once:?}"),
            format!("{:?}", intervals(&sorted(1), 0.0, 1))
        );
        for interval in once {
            assert!(
                interval.low <= interval.value && interval.value <= interval.high,
                "{interval:?}"
            );
        }
    }

    #[test]
    fn repeating_slices_within_studies_does_not_narrow_an_interval() {
        let (once, often) = (
            intervals(&sorted(1), 0.0, 1)[0],
            intervals(&sorted(20), 0.0, 1)[0],
        );
        assert!(((once.high - once.low) - (often.high - often.low)).abs() < 1e-12);
    }

    #[test]
    fn every_study_is_drawn_about_once() {
        let sum: f64 = (0..200)
            .map(|resample| study_weights(50, 3, resample)[7])
            .sum();
        assert!((sum / 200.0 - 1.0).abs() < 0.3, "{sum}");
    }
}
