//! 95 % intervals by the bootstrap over studies.
//!
//! Slices of one study resemble each other; drawing slices would make intervals too narrow. So whole studies are drawn
//! with replacement (Efron and Tibshirani 1993, chapter 6; percentile interval), seeded, and every figure is computed anew.
//!
//! The bootstrap cannot know what it never saw: one study drawn again and again gives an interval of no width. So a figure that rests on one
//! study has no interval, and where all n studies agree a share of trials has the exact bound of n trials without a failure. For other figures there
//! is no such bound: at 0 or 1 in every draw their interval is unknown.
//!
//! The calibration error is a sum of absolute values, which noise makes greater: a draw, which adds the noise once more, has a greater one than the
//! data on average, so that percentiles of the draws can all lie above the figure. [`ECE_NOTE`] says so beside it.

use rayon::prelude::*;
use serde::{Deserialize, Deserializer, Serialize};

use crate::metrics::{N_MEASURES, NAMES, Sorted};

/// Draws of an interval.
pub const RESAMPLES: u64 = 1000;
/// Fewest studies that an interval can rest on.
const MIN_STUDIES: usize = 2;
/// What a 95 % interval leaves out on either side.
const TAIL: f64 = 0.025;
/// What is to be said beside the calibration error.
pub const ECE_NOTE: &str = "The calibration error (`ece`) is made greater by chance, the more so the fewer slices there are, in the data and once more in each draw of \
the bootstrap: its interval can lie above it.";
/// The figures that are shares of trials.
const SHARES: [&str; 4] = ["sensitivity", "specificity", "precision", "accuracy"];

/// A figure with its 95 % interval; NaN (undefined, or unknown for too few studies) is written as null.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Interval {
    /// The figure on the data as they are.
    #[serde(deserialize_with = "nan_for_null")]
    pub value: f64,
    /// 2.5th percentile of the resampled figure.
    #[serde(deserialize_with = "nan_for_null")]
    pub low: f64,
    /// 97.5th percentile of the resampled figure.
    #[serde(deserialize_with = "nan_for_null")]
    pub high: f64,
}

fn nan_for_null<'a, D: Deserializer<'a>>(from: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or(f64::NAN))
}

impl Interval {
    /// The same where `n_studies` carry the figure: with fewer than two its interval is unknown.
    #[must_use]
    pub fn resting_on(self, n_studies: usize) -> Self {
        if n_studies >= MIN_STUDIES {
            return self;
        }
        Self {
            low: f64::NAN,
            high: f64::NAN,
            ..self
        }
    }

    /// The same of a share that is 0 or 1 in every draw: from the other end `0.025^(1/n)`, the exact bound of n trials without a failure
    /// (Clopper and Pearson 1934). A study counts as one trial, for its slices resemble each other.
    fn not_certain(mut self, n_studies: usize) -> Self {
        let without_failure = TAIL.powf(1.0 / n_studies as f64);
        if self.low >= 1.0 {
            self.low = without_failure;
        }
        if self.high <= 0.0 {
            self.high = 1.0 - without_failure;
        }
        self
    }
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
    let carriers = sorted.carriers(threshold);
    std::array::from_fn(|k| {
        let draws = draws.iter().map(|draw| draw[k]).collect();
        let interval = percentile_interval(values[k], draws);
        let interval = interval.resting_on(carriers[k]);
        if SHARES.contains(&NAMES[k]) {
            interval.not_certain(carriers[k])
        } else if interval.low >= 1.0 || interval.high <= 0.0 {
            interval.resting_on(0)
        } else {
            interval
        }
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

    fn of(samples: &[(f32, bool, usize)]) -> [Interval; N_MEASURES] {
        let sample = |&(logit, pe_present, study)| Sample {
            logit,
            pe_present,
            study,
        };
        intervals(&Sorted::new(samples.iter().map(sample).collect()), 0.0, 1)
    }

    #[test]
    fn one_study_gives_a_figure_without_interval() {
        // The only embolus is of study 0; slices without one are of three studies, of which study 2 is called positive.
        let found = of(&[
            (1.0, true, 0),
            (-1.0, true, 0),
            (-2.0, false, 0),
            (-3.0, false, 1),
            (0.5, false, 2),
        ]);
        let [auroc, _, sensitivity, specificity, ..] = found;
        assert!((sensitivity.value - 0.5).abs() < 1e-12);
        assert!(sensitivity.low.is_nan() && sensitivity.high.is_nan());
        assert!(auroc.value > 0.5 && auroc.low.is_nan());
        assert!(specificity.low < specificity.value && specificity.value < specificity.high);
        let json = serde_json::to_string(&sensitivity).unwrap();
        assert_eq!(json, r#"{"value":0.5,"low":null,"high":null}"#);
        let read: Interval = serde_json::from_str(&json).unwrap();
        assert!(read.low.is_nan() && read.high.is_nan());
    }

    #[test]
    fn studies_that_all_agree_are_not_certain() {
        let all_right: Vec<_> = (0..20)
            .map(|study| (if study < 5 { 1.0 } else { -1.0 }, study < 5, study))
            .collect();
        let [auroc, _, sensitivity, specificity, _, _, f1, ..] = of(&all_right);
        // 0.025^(1/5), 0.025^(1/15): five and fifteen trials without a failure.
        for (found, low) in [(sensitivity, 0.478), (specificity, 0.782)] {
            assert!((found.low - low).abs() < 1e-3, "{found:?}");
            assert!(found.value >= 1.0 && found.high >= 1.0);
        }
        // No shares of trials, so there is no such bound.
        for found in [auroc, f1] {
            assert!(found.value >= 1.0 && found.low.is_nan() && found.high.is_nan());
        }
        let all_wrong: Vec<_> = all_right.iter().map(|s| (-s.0, s.1, s.2)).collect();
        let sensitivity = of(&all_wrong)[2];
        assert!(sensitivity.low <= 0.0 && (sensitivity.high - 0.522).abs() < 1e-3);
    }

    #[test]
    fn every_study_is_drawn_about_once() {
        let sum: f64 = (0..200)
            .map(|resample| study_weights(50, 3, resample)[7])
            .sum();
        assert!((sum / 200.0 - 1.0).abs() < 0.3, "{sum}");
    }
}
