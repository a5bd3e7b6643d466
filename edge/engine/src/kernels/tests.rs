//! Every kernel that this CPU runs equals the scalar definition, over the full range of weights and activations.

use proptest::prelude::{Just, ProptestConfig, any, prop_assert_eq, prop_oneof, proptest};
use proptest::test_runner::TestCaseError;

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
use super::float::FloatKernel;
use super::{
    ConvRow, Kernel, Levels, Unpacked, WinogradLayer, WinogradRow, WinogradScratch, conv_row,
    conv_rows, dense, is_exact, pack, winograd_row,
};

/// Seeded bytes (SplitMix64); `weight` keeps them out of -128.
fn bytes(seed: u64, n: usize) -> Vec<u8> {
    let mut state = seed;
    let next = || {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        (mixed ^ (mixed >> 27))
            .wrapping_mul(0x94D0_49BB_1331_11EB)
            .to_le_bytes()[7]
    };
    std::iter::repeat_with(next).take(n).collect()
}

/// Mostly seeded bytes, or all the extreme ones that bring sums to the limits of 16-bit halves.
fn activations(seed: u64, n: usize, extreme: u8) -> Vec<u8> {
    match extreme {
        0 => vec![255; n],
        1 => vec![0; n],
        _ => bytes(seed, n),
    }
}

fn weights(seed: u64, n: usize, extreme: u8) -> Vec<u8> {
    let weight = |byte: u8| if byte == 0x80 { 0x81 } else { byte };
    match extreme {
        0 => vec![0x81; n],
        1 => vec![0x7f; n],
        _ => bytes(!seed, n).into_iter().map(weight).collect(),
    }
}

/// A row of a layer through one kernel, pooled or, with levels, not: the bytes of the true channels, pixel by pixel.
fn layer_row(kernel: Kernel, layer: &Layer, levels: Option<Levels>) -> Vec<u8> {
    let step = kernel.geometry().step;
    let row_bytes = layer.row_bytes.next_multiple_of(step);
    let (filters, width) = (layer.n_channels * layer.kernel_rows, layer.row_bytes);
    let packed_weights = weights(layer.seed, filters * width, layer.extreme.1);
    let mut arranged = vec![0; filters * row_bytes];
    for (to, from) in arranged
        .chunks_exact_mut(row_bytes)
        .zip(packed_weights.chunks_exact(width))
    {
        to[..width].copy_from_slice(from);
    }
    let bias: Vec<i32> = (0..layer.n_channels)
        .map(|n| i32::from(bytes(layer.seed, n + 1)[n]) * 999 - 99_999)
        .collect();
    let scale: Vec<f32> = (0..layer.n_channels)
        .map(|n| layer.scale * (1.0 + f32::from(bytes(3, n + 1)[n])))
        .collect();
    let blocks = pack(
        kernel.geometry(),
        Unpacked {
            weights: &arranged,
            kernel_rows: layer.kernel_rows,
            kernel_row_bytes: row_bytes,
            bias: &bias,
            scale: &scale,
        },
    );
    let out_stride = layer.n_channels.next_multiple_of(16);
    // A kernel reads up to its next step, 16 at most, so that all must be given the same input.
    let input_bytes =
        (2 * layer.n_columns - 1) * layer.column_bytes + layer.row_bytes.next_multiple_of(16);
    let input = activations(
        layer.seed,
        input_bytes * (layer.kernel_rows + 1),
        layer.extreme.0,
    );
    let rows: Vec<&[u8]> = input.chunks_exact(input_bytes).collect();
    let half = 2 * layer.n_columns * out_stride;
    let mut out = vec![0; if levels.is_some() { 2 * half } else { half / 2 }];
    for block in &blocks {
        let row = ConvRow {
            rows: &rows,
            column_bytes: layer.column_bytes,
            kernel_row_bytes: row_bytes,
            weights: &block.weights,
            bias: &block.bias,
            scale: &block.scale,
            n_columns: layer.n_columns,
            out_stride,
        };
        match levels {
            None => conv_row(kernel, &row, &mut out[block.first_channel..]),
            Some(levels) => {
                let (top, bottom) = out.split_at_mut(half);
                let out = [top, bottom].map(|half| &mut half[block.first_channel..]);
                conv_rows(kernel, &row, levels, out);
            }
        }
    }
    out.chunks_exact(out_stride)
        .flat_map(|pixel| &pixel[..layer.n_channels])
        .copied()
        .collect()
}

#[derive(Debug)]
struct Layer {
    seed: u64,
    kernel_rows: usize,
    /// Bytes of a kernel row that have weights.
    row_bytes: usize,
    column_bytes: usize,
    n_channels: usize,
    n_columns: usize,
    scale: f32,
    extreme: (u8, u8),
}

fn check_layer(layer: &Layer) -> Result<(), TestCaseError> {
    let zero = layer.seed.to_le_bytes()[0];
    let lowest = if layer.extreme.0 > 2 { zero } else { 0 };
    for levels in [None, Some(Levels { zero, lowest })] {
        let expected = layer_row(Kernel::Scalar, layer, levels);
        for kernel in Kernel::available() {
            let kernel = levels.map_or(kernel, |_| kernel.without_pool());
            prop_assert_eq!(&layer_row(kernel, layer, levels), &expected, "{}", kernel);
        }
    }
    Ok(())
}

/// A 3 x 3 layer over pixels of `n_inputs` channels, by Winograd and by the scalar definition.
fn check_winograd(
    seed: u64,
    [n_inputs, n_channels, n_columns]: [usize; 3],
    scale: f32,
    extreme: (u8, u8),
) -> Result<(), TestCaseError> {
    let column_bytes = n_inputs.next_multiple_of(16);
    let row_bytes = (2 * n_columns + 2) * column_bytes;
    let input = activations(seed, 4 * row_bytes, extreme.0);
    let rows: Vec<&[u8]> = input.chunks_exact(row_bytes).collect();
    let filters = weights(seed, n_channels * n_inputs * 9, extreme.1);
    let bias: Vec<i32> = bytes(seed, n_channels)
        .into_iter()
        .map(|byte| i32::from(byte) * 999 - 99_999)
        .collect();
    let scale = vec![scale; n_channels];
    let out_stride = n_channels.next_multiple_of(16);

    let mut arranged = vec![0; n_channels * 9 * column_bytes];
    for (to, from) in arranged
        .chunks_exact_mut(9 * column_bytes)
        .zip(filters.chunks_exact(9 * n_inputs))
    {
        for (index, &weight) in from.iter().enumerate() {
            to[index % 9 * column_bytes + index / 9] = weight;
        }
    }
    let unpacked = Unpacked {
        weights: &arranged,
        kernel_rows: 3,
        kernel_row_bytes: 3 * column_bytes,
        bias: &bias,
        scale: &scale,
    };
    let mut expected = vec![0; n_columns * out_stride];
    for block in pack(Kernel::Scalar.geometry(), unpacked) {
        let row = ConvRow {
            rows: &rows,
            column_bytes,
            kernel_row_bytes: 3 * column_bytes,
            weights: &block.weights,
            bias: &block.bias,
            scale: &block.scale,
            n_columns,
            out_stride,
        };
        conv_row(Kernel::Scalar, &row, &mut expected[block.first_channel..]);
    }
    assert!(is_exact(&filters, n_channels), "few channels are");
    for kernel in Kernel::available() {
        let Some(block_channels) = kernel.winograd_channels(n_inputs) else {
            continue;
        };
        let layer = WinogradLayer::new(block_channels, &filters, n_inputs, &bias, &scale);
        let mut scratch = WinogradScratch::default();
        layer.reserve(n_columns, &mut scratch);
        let row = WinogradRow {
            layer: &layer,
            rows: [rows[0], rows[1], rows[2], rows[3]],
            column_bytes,
            n_columns,
            out_stride,
        };
        let mut out = vec![0; n_columns * out_stride];
        winograd_row(kernel, &row, &mut scratch, &mut out);
        let true_channels = |row: &[u8]| -> Vec<u8> {
            let pixels = row.chunks_exact(out_stride);
            pixels
                .flat_map(|pixel| &pixel[..n_channels])
                .copied()
                .collect()
        };
        prop_assert_eq!(true_channels(&out), true_channels(&expected), "{}", kernel);
    }
    Ok(())
}

#[test]
fn winograd_is_refused_where_four_times_a_sum_leaves_32_bits() {
    let n = 2_147_483_647 / (4 * 255 * 127);
    assert!(is_exact(&vec![0x81; n], 1));
    assert!(!is_exact(&vec![0x81; n + 1], 1));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn winograd_rows_equal_the_scalar_definition(
        seed in any::<u64>(),
        n_inputs in 8_usize..70,
        n_channels in 1_usize..40,
        n_columns in 1_usize..45,
        exponent in -20_i32..-4,
        extreme in (0_u8..6, 0_u8..6),
    ) {
        check_winograd(seed, [n_inputs, n_channels, n_columns], 2.0_f32.powi(exponent), extreme)?;
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn convolution_rows_equal_the_scalar_definition(
        seed in any::<u64>(),
        // Three rows; one row; the patches of an image of three channels, for which kernels have code of their own.
        (kernel_rows, row_bytes, column_bytes) in prop_oneof![
            (Just(3), 1_usize..150, 1_usize..50),
            (Just(1), 1_usize..150, 1_usize..50),
            (Just(1), 27_usize..28, 36_usize..37),
        ],
        n_channels in 1_usize..100,
        n_columns in 1_usize..9,
        exponent in -16_i32..2,
        extreme in (0_u8..6, 0_u8..6),
    ) {
        let scale = 2.0_f32.powi(exponent) / 255.0;
        check_layer(&Layer { seed, kernel_rows, row_bytes, column_bytes, n_channels, n_columns, scale, extreme })?;
    }

    #[test]
    fn dense_sums_equal_the_scalar_definition(
        seed in any::<u64>(),
        n_inputs in 1_usize..260,
        n_neurons in 1_usize..20,
        start in 0_usize..64,
        extreme in (0_u8..6, 0_u8..6),
    ) {
        let activations = activations(seed, start + n_inputs, extreme.0);
        let weights = weights(seed, start + n_inputs * n_neurons, extreme.1);
        let sums = |kernel| {
            let mut sums = vec![0; n_neurons];
            dense(kernel, &activations[start..], &weights[start..], &mut sums);
            sums
        };
        for kernel in Kernel::available() {
            prop_assert_eq!(sums(kernel), sums(Kernel::Scalar), "{}", kernel);
        }
    }
}

#[test]
fn every_width_of_the_published_systems_is_exact() {
    for n_channels in [4, 8, 16, 32, 64, 128, 256, 512, 1024] {
        let (seed, scale, extreme) = (n_channels as u64, 1e-5, (9, 9));
        let layer = Layer {
            seed,
            kernel_rows: 3,
            row_bytes: 48,
            column_bytes: 16,
            n_channels,
            n_columns: 2,
            scale,
            extreme,
        };
        check_layer(&layer).unwrap();
    }
}

/// The other tests run the kernels that detection finds; here it must find all that the system speaks of.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
#[test]
fn no_kernel_of_this_cpu_is_left_out() {
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap();
    let has = |flag: &str| cpu.split_whitespace().any(|word| word == flag);
    let kernels: Vec<_> = Kernel::available().collect();
    let floats: Vec<_> = FloatKernel::available().collect();
    println!("kernels of this CPU: {kernels:?}, in f32 {floats:?}");
    for (kernel, flag) in [
        (Kernel::Avx2, "avx2"),
        (Kernel::AvxVnni, "avx_vnni"),
        (Kernel::Avx512Vnni, "avx512_vnni"),
    ] {
        assert_eq!(kernels.contains(&kernel), has(flag), "{kernel}");
    }
    for (kernel, flag) in [
        (FloatKernel::Avx2, "avx2"),
        (FloatKernel::Avx512, "avx512f"),
    ] {
        assert_eq!(floats.contains(&kernel), has(flag), "{kernel}");
    }
}

#[test]
fn kernel_names_parse_back() {
    for kernel in Kernel::ALL {
        assert_eq!(kernel.to_string().parse(), Ok(kernel));
    }
    assert!("vnni".parse::<Kernel>().is_err());
}
