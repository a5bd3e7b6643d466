//! Every float kernel that this CPU runs agrees with the definition, for odd sizes and tails.

use proptest::prelude::{ProptestConfig, any, prop_assert, proptest};
use proptest::test_runner::TestCaseError;

use super::{
    Filters, FloatKernel, FloatLayer, ImageLines, OUTPUTS, SIDE, Scratch, convolve_rows, dense,
    first_row,
};

/// Largest error as a part of the largest sum of products' magnitudes: the transforms of F(4 x 4) multiply a rounding error by up to 100, the
/// sums of a few hundred products by a few more.
const TOLERANCE: f32 = 2e-6;

/// Seeded numbers in -1 to 1 (SplitMix64).
fn floats(seed: u64, n: usize) -> Vec<f32> {
    let mut state = seed;
    let next = || {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let [.., a, b] = (mixed ^ (mixed >> 27))
            .wrapping_mul(0x94D0_49BB_1331_11EB)
            .to_le_bytes();
        f32::from(i16::from_le_bytes([a, b])) / 32768.0
    };
    std::iter::repeat_with(next).take(n).collect()
}

fn filters(seed: u64, n_inputs: usize, n_outputs: usize) -> Filters {
    Filters {
        weights: floats(seed, n_outputs * n_inputs * 9),
        n_inputs,
        bias: floats(!seed, n_outputs),
    }
}

/// Channels of each pixel without the padding.
fn pixels(row: &[f32], layer: &FloatLayer) -> Vec<f32> {
    let pixels = row.chunks_exact(layer.out_stride());
    pixels
        .flat_map(|pixel| &pixel[..layer.n_outputs()])
        .copied()
        .collect()
}

fn close(
    found: &[f32],
    expected: &[f32],
    magnitude: f32,
    kernel: FloatKernel,
) -> Result<(), TestCaseError> {
    prop_assert!(found.len() == expected.len());
    for (found, expected) in found.iter().zip(expected) {
        let difference = (found - expected).abs();
        prop_assert!(
            difference <= TOLERANCE * magnitude,
            "{kernel}: {found} and {expected}, of {magnitude}"
        );
    }
    Ok(())
}

fn later_rows(
    kernel: FloatKernel,
    filters: &Filters,
    seed: u64,
    n_columns: usize,
    n_rows: usize,
) -> Vec<f32> {
    let layer = FloatLayer::new(kernel, filters.clone(), false);
    let in_stride = match kernel {
        FloatKernel::Scalar => filters.n_inputs,
        _ => filters
            .n_inputs
            .next_multiple_of(kernel.geometry().unwrap().lanes),
    };
    let n_pixels = OUTPUTS * n_columns.div_ceil(2) + 2;
    let values = floats(seed, SIDE * n_pixels * filters.n_inputs);
    let mut input = vec![0.0; SIDE * n_pixels * in_stride];
    for (to, from) in input
        .chunks_exact_mut(in_stride)
        .zip(values.chunks_exact(filters.n_inputs))
    {
        to[..filters.n_inputs].copy_from_slice(from);
    }
    let rows: Vec<&[f32]> = input.chunks_exact(n_pixels * in_stride).collect();
    let mut scratch = Scratch::default();
    layer.reserve(n_columns, &mut scratch);
    let mut out = vec![f32::NAN; 2 * n_columns * layer.out_stride()];
    let (top, bottom) = out.split_at_mut(n_columns * layer.out_stride());
    let bottom = if n_rows == 2 { bottom } else { &mut [] };
    convolve_rows(
        &layer,
        rows.as_slice().try_into().unwrap(),
        &mut scratch,
        [top, bottom],
    );
    pixels(&out[..n_rows * n_columns * layer.out_stride()], &layer)
}

fn image_row(kernel: FloatKernel, filters: &Filters, seed: u64, columns: usize) -> Vec<f32> {
    let layer = FloatLayer::new(kernel, filters.clone(), true);
    let values = floats(seed, 4 * filters.n_inputs * columns + 1);
    let lines = ImageLines {
        values: &values,
        channels: filters.n_inputs,
        columns,
    };
    let mut out = vec![f32::NAN; (columns - 2) / 2 * layer.out_stride()];
    let mut scratch = Scratch::default();
    layer.reserve((columns - 2) / 2, &mut scratch);
    first_row(&layer, &lines, &mut scratch, &mut out);
    pixels(&out, &layer)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn later_layers_agree_with_the_definition(
        seed in any::<u64>(),
        n_inputs in 1_usize..40,
        n_outputs in 1_usize..150,
        n_columns in 1_usize..30,
        n_rows in 1_usize..3,
    ) {
        let filters = filters(seed, n_inputs, n_outputs);
        let expected = later_rows(FloatKernel::Scalar, &filters, seed ^ 1, n_columns, n_rows);
        #[expect(clippy::cast_precision_loss, reason = "far below 2^24")]
        let magnitude = 1.0 + 9.0 * n_inputs as f32;
        for kernel in FloatKernel::available() {
            close(&later_rows(kernel, &filters, seed ^ 1, n_columns, n_rows), &expected, magnitude, kernel)?;
        }
    }

    #[test]
    fn first_layers_agree_with_the_definition(
        seed in any::<u64>(),
        n_inputs in 1_usize..5,
        n_outputs in 1_usize..220,
        columns in 4_usize..40,
    ) {
        let filters = filters(seed, n_inputs, n_outputs);
        let expected = image_row(FloatKernel::Scalar, &filters, seed ^ 1, columns);
        for kernel in FloatKernel::available() {
            close(&image_row(kernel, &filters, seed ^ 1, columns), &expected, 46.0, kernel)?;
        }
    }

    #[test]
    fn dense_sums_agree_with_the_definition(
        seed in any::<u64>(),
        n_features in 1_usize..5000,
        n_neurons in 1_usize..20,
    ) {
        let (features, weights) = (floats(seed, n_features), floats(!seed, n_features * n_neurons));
        let sums = |kernel| {
            let mut sums = vec![0.0; n_neurons];
            dense(kernel, &features, &weights, &mut sums);
            sums
        };
        #[expect(clippy::cast_precision_loss, reason = "far below 2^24")]
        let magnitude = n_features as f32;
        for kernel in FloatKernel::available() {
            close(&sums(kernel), &sums(FloatKernel::Scalar), magnitude, kernel)?;
        }
    }
}
