//! Controls that expose fooling: how far one gets without looking at the lungs.
//!
//! In: a cache. Out: scores by the slice's position alone and by its mean intensity alone, each from a logistic regression fitted on
//! the training part; and the model's own logits against shuffled labels. An honest model is far above the first two, and the third is 0.5.

use rayon::prelude::*;
use shared::{CHANNELS, SIDE};

use crate::cache::Cache;

/// Rows of the training part that a control is fitted on, at most; evenly spaced.
const MAX_FIT_ROWS: usize = 20_000;
/// Newton steps of the regression; it converges in far fewer.
const NEWTON_STEPS: usize = 30;
/// Pull to zero, which keeps separable data finite.
const RIDGE: f64 = 1e-3;
/// Weights of a regression: three features and the constant.
const N_WEIGHTS: usize = 4;

type Features = [f64; N_WEIGHTS];

/// Which control.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Control {
    /// Relative position in the series, to the third power.
    Position,
    /// Mean of each channel.
    MeanIntensity,
}

/// Scores of `rows` by a control that was fitted on `fit_rows`.
#[must_use]
pub fn scores(cache: &Cache, control: Control, fit_rows: &[usize], rows: &[usize]) -> Vec<f32> {
    let positions = relative_positions(cache);
    let features = |row: usize| match control {
        Control::Position => {
            let x = positions[row] - 0.5;
            [1.0, x, x * x, x * x * x]
        }
        Control::MeanIntensity => mean_intensities(cache.tensor(row)),
    };
    let step = fit_rows.len().div_ceil(MAX_FIT_ROWS).max(1);
    let fit_rows: Vec<usize> = fit_rows.iter().step_by(step).copied().collect();
    let data: Vec<(Features, bool)> = fit_rows
        .par_iter()
        .map(|&row| (features(row), cache.rows()[row].pe_present))
        .collect();
    let weights = fit(&data);
    rows.par_iter()
        .map(|&row| to_f32(dot(&weights, &features(row))))
        .collect()
}

/// `labels` in an order drawn from `seed` (Fisher-Yates).
#[must_use]
pub fn shuffled(labels: &[bool], seed: u64) -> Vec<bool> {
    let mut labels = labels.to_vec();
    let mut draw = Draw(seed);
    for last in (1..labels.len()).rev() {
        labels.swap(last, draw.below(last + 1));
    }
    labels
}

/// SplitMix64 (Steele et al. 2014).
#[derive(Debug)]
pub struct Draw(pub u64);

impl Draw {
    /// A number from 0 to `n - 1`; 0 for `n` = 0.
    pub fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        usize::try_from((u128::from(z ^ (z >> 31)) * n as u128) >> 64).unwrap_or(0)
    }
}

/// Position of each row within its series, 0 to 1; rows of a series follow each other in order of z.
fn relative_positions(cache: &Cache) -> Vec<f64> {
    let mut positions = Vec::with_capacity(cache.n_rows());
    for series in cache.rows().chunk_by(|a, b| a.series_uid == b.series_uid) {
        let last = (series.len().max(2) - 1) as f64;
        positions.extend((0..series.len()).map(|index| index as f64 / last));
    }
    positions
}

fn mean_intensities(tensor: &[u8]) -> Features {
    let mut features = [1.0; N_WEIGHTS];
    for (feature, channel) in features
        .iter_mut()
        .skip(1)
        .zip(tensor.chunks_exact(SIDE * SIDE))
        .take(CHANNELS)
    {
        let sum: u64 = channel.iter().map(|&value| u64::from(value)).sum();
        *feature = sum as f64 / channel.len() as f64 / 64.0 - 1.0;
    }
    features
}

fn dot(a: &Features, b: &Features) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "a score's order is all that counts"
)]
fn to_f32(value: f64) -> f32 {
    value as f32
}

/// Logistic regression by Newton's method.
fn fit(data: &[(Features, bool)]) -> Features {
    let mut weights = [0.0; N_WEIGHTS];
    for _ in 0..NEWTON_STEPS {
        let mut gradient = weights.map(|weight| -RIDGE * weight);
        let mut hessian = [[0.0; N_WEIGHTS]; N_WEIGHTS];
        for (index, row) in hessian.iter_mut().enumerate() {
            row[index] = RIDGE;
        }
        for (features, is_positive) in data {
            let probability = 1.0 / (1.0 + (-dot(&weights, features)).exp());
            let error = f64::from(u8::from(*is_positive)) - probability;
            let curvature = probability * (1.0 - probability);
            for i in 0..N_WEIGHTS {
                gradient[i] += error * features[i];
                for j in 0..N_WEIGHTS {
                    hessian[i][j] += curvature * features[i] * features[j];
                }
            }
        }
        let step = solve(hessian, gradient);
        for (weight, step) in weights.iter_mut().zip(step) {
            *weight += step.clamp(-5.0, 5.0);
        }
    }
    weights
}

/// Gaussian elimination; the matrix is positive definite, so no pivoting is needed.
fn solve(mut matrix: [Features; N_WEIGHTS], mut right: Features) -> Features {
    for pivot in 0..N_WEIGHTS {
        for row in pivot + 1..N_WEIGHTS {
            let factor = matrix[row][pivot] / matrix[pivot][pivot];
            let pivot_row = matrix[pivot];
            for (value, above) in matrix[row].iter_mut().zip(pivot_row).skip(pivot) {
                *value -= factor * above;
            }
            right[row] -= factor * right[pivot];
        }
    }
    for row in (0..N_WEIGHTS).rev() {
        for column in row + 1..N_WEIGHTS {
            right[row] -= matrix[row][column] * right[column];
        }
        right[row] /= matrix[row][row];
    }
    right
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regression_finds_the_weights_it_was_given() {
        let mut draw = Draw(1);
        let mut unit = || draw.below(1_000_000) as f64 / 1e6;
        let data: Vec<(Features, bool)> = (0..20_000)
            .map(|_| {
                let features = [1.0, unit() - 0.5, unit() - 0.5, unit() - 0.5];
                let logit = dot(&[0.5, 3.0, -2.0, 0.0], &features);
                (features, unit() < 1.0 / (1.0 + (-logit).exp()))
            })
            .collect();
        for (found, expected) in fit(&data).into_iter().zip([0.5, 3.0, -2.0, 0.0]) {
            assert!((found - expected).abs() < 0.2, "{found} {expected}");
        }
    }

    #[test]
    fn shuffling_keeps_the_counts() {
        let labels: Vec<bool> = (0..100).map(|index| index < 30).collect();
        let mixed = shuffled(&labels, 5);
        assert_ne!(mixed, labels);
        assert_eq!(mixed.iter().filter(|label| **label).count(), 30);
    }
}
