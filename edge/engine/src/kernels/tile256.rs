//! The tile of the kernels with 16 registers of 256 bits, for any multiplication.
//!
//! A tile is one 2 x 2 window by 24 output channels: 12 registers hold sums, the rest is the multiplication's.

/// Writes `conv_row` and `conv_rows` for a multiplication: `$add(sums of a position, its four activations, their weights)`, with `$weight_bytes` bytes of
/// weights for eight channels.
macro_rules! tile_256 {
    ($features:literal, $weight_bytes:literal, $add:ident) => {
        /// See [`super::conv_row`].
        #[target_feature(enable = $features)]
        pub(super) fn conv_row(row: &ConvRow<'_>, out: &mut [u8]) {
            columns::<true>(row, Levels::default(), [out, &mut []]);
        }

        /// See [`super::conv_rows`].
        #[target_feature(enable = $features)]
        pub(super) fn conv_rows(row: &ConvRow<'_>, levels: Levels, out: [&mut [u8]; 2]) {
            columns::<false>(row, levels, out);
        }

        #[target_feature(enable = $features)]
        fn columns<const IS_POOLED: bool>(
            row: &ConvRow<'_>,
            levels: Levels,
            mut out: [&mut [u8]; 2],
        ) {
            let (columns, out) = (0..row.n_columns, &mut out);
            match row.bias.len() {
                8 => columns.for_each(|column| tile::<1, IS_POOLED>(row, column, levels, out)),
                16 => columns.for_each(|column| tile::<2, IS_POOLED>(row, column, levels, out)),
                24 => columns.for_each(|column| tile::<3, IS_POOLED>(row, column, levels, out)),
                n => panic!("a block of {n} channels was not packed for this kernel"),
            }
        }

        /// One window of `VECTORS` x 8 channels: pooled to the first of `out`, or its two rows. One function for both, because the compiler does not inline
        /// one that returns the sums, which then leave the registers.
        #[target_feature(enable = $features)]
        fn tile<const VECTORS: usize, const IS_POOLED: bool>(
            row: &ConvRow<'_>,
            column: usize,
            levels: Levels,
            out: &mut [&mut [u8]; 2],
        ) {
            let mut sums = [[_mm256_setzero_si256(); VECTORS]; POSITIONS];
            for (v, bias) in row.bias::<8, VECTORS>().iter().enumerate() {
                let bias = load_i32(bias);
                for sums in &mut sums {
                    sums[v] = bias;
                }
            }
            for kernel_row in 0..row.kernel_rows() {
                let window = row.window::<4>(kernel_row, column);
                let weights = row
                    .kernel_row_weights(kernel_row)
                    .as_chunks::<$weight_bytes>()
                    .0;
                for (step, weights) in (0..window.n_steps).zip(weights.as_chunks::<VECTORS>().0) {
                    for (position, sums) in sums.iter_mut().enumerate() {
                        $add(sums, window.at(position, step), weights);
                    }
                }
            }
            let scales = row.scale::<8, VECTORS>();
            if IS_POOLED {
                let [a, b, c, d] = sums;
                let pixel = row.pixel::<8, VECTORS>(column, out[0]);
                for (v, (bytes, scale)) in pixel.iter_mut().zip(scales).enumerate() {
                    pool_and_store([a[v], b[v], c[v], d[v]], scale, bytes);
                }
                return;
            }
            for (position, sums) in sums.into_iter().enumerate() {
                let pixel = row.pixel::<8, VECTORS>(2 * column + position % 2, out[position / 2]);
                for ((bytes, scale), sum) in pixel.iter_mut().zip(scales).zip(sums) {
                    requantize_and_store(sum, scale, levels, bytes);
                }
            }
        }
    };
}

pub(super) use tile_256;
