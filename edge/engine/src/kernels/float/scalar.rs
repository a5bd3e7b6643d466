//! The definition of the float arithmetic: direct convolutions, sums in f64, one rounding to f32.

use super::{Filters, ImageLines};

/// See [`super::first_row`].
pub(super) fn first_row(filters: &Filters, lines: &ImageLines<'_>, out: &mut [f32]) {
    for (column, pixel) in out.chunks_exact_mut(filters.n_outputs()).enumerate() {
        for (channel, value) in pixel.iter_mut().enumerate() {
            *value = pooled(filters, channel, |input, row, tap| {
                lines.values[(row * lines.channels + input) * lines.columns + 2 * column + tap]
            });
        }
    }
}

/// See [`super::convolve_rows`].
pub(super) fn convolve_rows(filters: &Filters, rows: &[&[f32]; 6], out: [&mut [f32]; 2]) {
    for (pooled_row, out) in out.into_iter().enumerate() {
        for (column, pixel) in out.chunks_exact_mut(filters.n_outputs()).enumerate() {
            for (channel, value) in pixel.iter_mut().enumerate() {
                *value = pooled(filters, channel, |input, row, tap| {
                    rows[2 * pooled_row + row][(2 * column + tap) * filters.n_inputs + input]
                });
            }
        }
    }
}

/// One channel of one pooled pixel: bias, ReLU and pool of the four sums. `at(input, row, column)` are the 4 x 4 pixels under the window.
fn pooled(filters: &Filters, channel: usize, at: impl Fn(usize, usize, usize) -> f32) -> f32 {
    let weights = &filters.weights[channel * 9 * filters.n_inputs..][..9 * filters.n_inputs];
    let sum = |position: usize| {
        let products = weights.iter().enumerate().map(|(index, &weight)| {
            let (input, row, column) = (index / 9, index / 3 % 3, index % 3);
            let activation = at(input, position / 2 + row, position % 2 + column);
            f64::from(weight) * f64::from(activation)
        });
        products.sum::<f64>() + f64::from(filters.bias[channel])
    };
    #[expect(
        clippy::cast_possible_truncation,
        reason = "the one rounding of the definition"
    )]
    let highest = (0..4).map(sum).fold(0.0, f64::max) as f32;
    highest
}

/// See [`super::dense`].
pub(super) fn dense(features: &[f32], weights: &[f32], sums: &mut [f32]) {
    for (sum, weights) in sums.iter_mut().zip(weights.chunks_exact(features.len())) {
        let products = weights.iter().zip(features);
        let exact: f64 = products.map(|(&w, &x)| f64::from(w) * f64::from(x)).sum();
        #[expect(
            clippy::cast_possible_truncation,
            reason = "the one rounding of the definition"
        )]
        let rounded = exact as f32;
        *sum = rounded;
    }
}
