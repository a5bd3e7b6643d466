//! The float arithmetic over vectors of any width, written once; each instruction set fills in its vector.

/// Writes `first_row`, `convolve_rows`, `dense` and `peak` for the vector of the surrounding module: `Vector`, `LANES`, and the functions
/// `zero, splat, load, store, add, sub, product, multiply_add, max, sum_of_lanes, prefetch`. `gemm` and `direct` list the vectors that a block of
/// output channels may have.
macro_rules! float_body {
    ($features:literal, gemm: [$($gemm:literal),+], direct: [$($direct:literal),+]) => {
        /// See [`super::first_row`]. `patches` is `[column, position, tap]`.
        #[target_feature(enable = $features)]
        pub(super) fn first_row(layer: &FirstLayer, patches: &[f32], out: &mut [f32]) {
            let patch = layer.patch_length();
            for block in &layer.blocks {
                let pixels = out.chunks_exact_mut(layer.out_stride);
                for (pixel, patches) in pixels.zip(patches.chunks_exact(4 * patch)) {
                    let pixel = &mut pixel[block.channels.clone()];
                    match block.channels.len() / LANES {
                        $($direct => first_tile::<$direct>(block, patches, patch, pixel),)+
                        n => panic!("a block of {n} vectors was not packed for this kernel"),
                    }
                }
            }
        }

        /// The four positions of a window times `VECTORS` x [`LANES`] channels.
        #[target_feature(enable = $features)]
        fn first_tile<const VECTORS: usize>(
            block: &FirstBlock,
            patches: &[f32],
            patch: usize,
            pixel: &mut [f32],
        ) {
            let [a, b, c, d] = multiply::<4, VECTORS>(patches, patch, &block.weights);
            let bias = block.bias.as_chunks::<LANES>().0;
            for (v, (pixel, bias)) in pixel.as_chunks_mut::<LANES>().0.iter_mut().zip(bias).enumerate() {
                store(pixel, pool([a[v], b[v], c[v], d[v]], bias));
            }
        }

        /// The highest of four sums, bias added, at least 0.
        #[inline]
        #[target_feature(enable = $features)]
        fn pool([a, b, c, d]: [Vector; 4], bias: &[f32; LANES]) -> Vector {
            let highest = max(max(a, b), max(c, d));
            max(add(highest, load(bias)), zero())
        }

        /// See [`super::convolve_rows`].
        #[target_feature(enable = $features)]
        pub(super) fn convolve_rows(
            layer: &WinogradLayer,
            rows: &[&[f32]; SIDE],
            scratch: &mut Scratch,
            out: [&mut [f32]; 2],
        ) {
            let n_tiles = out[0].len().div_ceil(2 * layer.out_stride);
            let activations = &mut scratch.activations[..FREQUENCIES * n_tiles * layer.in_stride];
            for tile in 0..n_tiles {
                transform_tile(layer, rows, tile, n_tiles, activations);
            }
            let sums = &mut scratch.sums[..FREQUENCIES * n_tiles * layer.out_stride];
            let activations = activations.chunks_exact(n_tiles * layer.in_stride);
            let sums_of = sums.chunks_exact_mut(n_tiles * layer.out_stride);
            let weights = layer.weights.chunks_exact(layer.n_inputs * layer.out_stride);
            for ((activations, sums), weights) in activations.zip(sums_of).zip(weights) {
                products(layer, activations, weights, sums);
            }
            let [top, bottom] = out;
            for tile in 0..n_tiles {
                combine_tile(layer, sums, tile, n_tiles, [&mut *top, &mut *bottom]);
            }
        }

        /// `B' d B` of the 6 x 6 pixels under one tile, all channels.
        #[target_feature(enable = $features)]
        fn transform_tile(
            layer: &WinogradLayer,
            rows: &[&[f32]; SIDE],
            tile: usize,
            n_tiles: usize,
            activations: &mut [f32],
        ) {
            let stride = layer.in_stride;
            let rows = rows.map(|row| &row[OUTPUTS * tile * stride..][..SIDE * stride]);
            for channel in (0..stride).step_by(LANES) {
                let mut lines = [[zero(); SIDE]; SIDE];
                for (line, row) in lines.iter_mut().zip(&rows) {
                    let mut pixels = [zero(); SIDE];
                    for (column, pixel) in pixels.iter_mut().enumerate() {
                        *pixel = load(vector(row, column * stride + channel));
                    }
                    *line = transform_line(pixels);
                }
                for column in 0..SIDE {
                    let [a, b, c, d, e, f] = lines;
                    let transformed = transform_line([
                        a[column], b[column], c[column], d[column], e[column], f[column],
                    ]);
                    for (row, value) in transformed.into_iter().enumerate() {
                        let at = ((row * SIDE + column) * n_tiles + tile) * stride + channel;
                        store(vector_mut(activations, at), value);
                    }
                }
            }
        }

        /// A line of `B'`.
        #[inline]
        #[target_feature(enable = $features)]
        fn transform_line([a, b, c, d, e, f]: [Vector; SIDE]) -> [Vector; SIDE] {
            let (two, four, minus_four, minus_five) = (splat(2.0), splat(4.0), splat(-4.0), splat(-5.0));
            let outer_even = multiply_add(minus_four, c, e);
            let outer_odd = multiply_add(minus_four, b, d);
            let inner_even = sub(e, c);
            let inner_odd = product(two, sub(d, b));
            [
                multiply_add(four, a, multiply_add(minus_five, c, e)),
                add(outer_even, outer_odd),
                sub(outer_even, outer_odd),
                add(inner_even, inner_odd),
                sub(inner_even, inner_odd),
                multiply_add(four, b, multiply_add(minus_five, d, f)),
            ]
        }

        /// The products of one frequency: `sums[tile][output] = sum over inputs of activations x weights`.
        #[target_feature(enable = $features)]
        fn products(layer: &WinogradLayer, activations: &[f32], weights: &[f32], sums: &mut [f32]) {
            let n_tiles = activations.len() / layer.in_stride;
            for block in &layer.blocks {
                let weights = &weights[block.start * layer.n_inputs..block.end * layer.n_inputs];
                for tiles in parts(n_tiles, TILES) {
                    let activations = &activations[tiles.start * layer.in_stride..];
                    let sums = &mut sums[tiles.start * layer.out_stride + block.start..];
                    match block.len() / LANES {
                        $($gemm => match tiles.len() {
                            1 => multiply_tile::<1, $gemm>(layer, activations, weights, sums),
                            2 => multiply_tile::<2, $gemm>(layer, activations, weights, sums),
                            3 => multiply_tile::<3, $gemm>(layer, activations, weights, sums),
                            4 => multiply_tile::<4, $gemm>(layer, activations, weights, sums),
                            5 => multiply_tile::<5, $gemm>(layer, activations, weights, sums),
                            6 => multiply_tile::<6, $gemm>(layer, activations, weights, sums),
                            n => panic!("{n} tiles do not fit the registers"),
                        },)+
                        n => panic!("a block of {n} vectors was not packed for this kernel"),
                    }
                }
            }
        }

        /// `N` tiles by `VECTORS` x [`LANES`] output channels.
        #[target_feature(enable = $features)]
        fn multiply_tile<const N: usize, const VECTORS: usize>(
            layer: &WinogradLayer,
            activations: &[f32],
            weights: &[f32],
            sums: &mut [f32],
        ) {
            let registers = multiply::<N, VECTORS>(activations, layer.in_stride, weights);
            for (tile, registers) in registers.into_iter().enumerate() {
                for (v, register) in registers.into_iter().enumerate() {
                    store(vector_mut(sums, tile * layer.out_stride + v * LANES), register);
                }
            }
        }

        /// `N` rows of activations, `stride` apart, times weights `[step][VECTORS x LANES]`: the sums stand in registers.
        #[inline]
        #[target_feature(enable = $features)]
        fn multiply<const N: usize, const VECTORS: usize>(
            activations: &[f32],
            stride: usize,
            weights: &[f32],
        ) -> [[Vector; VECTORS]; N] {
            let steps = weights.as_chunks::<LANES>().0.as_chunks::<VECTORS>().0;
            let rows: [&[f32]; N] =
                std::array::from_fn(|row| &activations[row * stride..][..steps.len()]);
            let mut registers = [[zero(); VECTORS]; N];
            for (step, weights) in steps.iter().enumerate() {
                prefetch(weights.as_flattened());
                let mut w = [zero(); VECTORS];
                for (w, weights) in w.iter_mut().zip(weights) {
                    *w = load(weights);
                }
                for (registers, row) in registers.iter_mut().zip(&rows) {
                    // SAFETY: each slice has as many elements as there are steps, and `step` counts steps.
                    let activation = splat(*unsafe { row.get_unchecked(step) });
                    for (register, &w) in registers.iter_mut().zip(&w) {
                        *register = multiply_add(activation, w, *register);
                    }
                }
            }
            registers
        }

        /// `A' m A` of one tile: 4 x 4 sums, pooled to 2 x 2 pixels.
        #[target_feature(enable = $features)]
        fn combine_tile(
            layer: &WinogradLayer,
            sums: &[f32],
            tile: usize,
            n_tiles: usize,
            mut out: [&mut [f32]; 2],
        ) {
            let stride = layer.out_stride;
            for (channel, bias) in (0..).step_by(LANES).zip(layer.bias.as_chunks::<LANES>().0) {
                let mut columns = [[zero(); OUTPUTS]; SIDE];
                for (column, combined) in columns.iter_mut().enumerate() {
                    let mut line = [zero(); SIDE];
                    for (row, value) in line.iter_mut().enumerate() {
                        let at = ((row * SIDE + column) * n_tiles + tile) * stride + channel;
                        *value = load(vector(sums, at));
                    }
                    *combined = combine_line(line);
                }
                let [a, b, c, d, e, f] = columns;
                for (pooled_row, out) in out.iter_mut().enumerate() {
                    let row = |row: usize| combine_line([a[row], b[row], c[row], d[row], e[row], f[row]]);
                    let (top, bottom) = (row(2 * pooled_row), row(2 * pooled_row + 1));
                    for column in 0..OUTPUTS / 2 {
                        let at = (2 * tile + column) * stride + channel;
                        if at < out.len() {
                            let x = 2 * column;
                            let window = [top[x], top[x + 1], bottom[x], bottom[x + 1]];
                            store(vector_mut(out, at), pool(window, bias));
                        }
                    }
                }
            }
        }

        /// A line of `A'`.
        #[inline]
        #[target_feature(enable = $features)]
        fn combine_line([a, b, c, d, e, f]: [Vector; SIDE]) -> [Vector; OUTPUTS] {
            let (near_even, near_odd) = (add(b, c), sub(b, c));
            let (far_even, far_odd) = (add(d, e), sub(d, e));
            [
                add(add(a, near_even), far_even),
                multiply_add(splat(2.0), far_odd, near_odd),
                multiply_add(splat(4.0), far_even, near_even),
                add(multiply_add(splat(8.0), far_odd, near_odd), f),
            ]
        }

        /// See [`super::dense`].
        #[target_feature(enable = $features)]
        pub(super) fn dense(features: &[f32], weights: &[f32], sums: &mut [f32]) {
            let n = features.len();
            let full = sums.len() / NEURONS * NEURONS;
            for first in (0..full).step_by(NEURONS) {
                let sums = &mut sums[first..][..NEURONS];
                sums.copy_from_slice(&neurons::<NEURONS>(features, &weights[first * n..]));
            }
            for (sum, weights) in sums.iter_mut().zip(weights.chunks_exact(n)).skip(full) {
                [*sum] = neurons::<1>(features, weights);
            }
        }

        /// `N` neurons side by side, so that as many streams of weights are under way; in chunks, so that the sums of lanes stay short and
        /// with them the rounding errors.
        #[target_feature(enable = $features)]
        fn neurons<const N: usize>(features: &[f32], weights: &[f32]) -> [f32; N] {
            let mut totals = [0.0; N];
            for (index, features_of) in features.chunks(DENSE_CHUNK).enumerate() {
                let (vectors, rest) = features_of.as_chunks::<LANES>();
                let rows: [&[f32]; N] = std::array::from_fn(|neuron| {
                    &weights[neuron * features.len() + index * DENSE_CHUNK..][..features_of.len()]
                });
                let mut sums = [zero(); N];
                for (step, features) in vectors.iter().enumerate() {
                    let features = load(features);
                    for (sum, row) in sums.iter_mut().zip(rows) {
                        *sum = multiply_add(features, load(vector(row, step * LANES)), *sum);
                    }
                }
                for ((total, sum), row) in totals.iter_mut().zip(sums).zip(rows) {
                    let tail = row[vectors.len() * LANES..].iter().zip(rest);
                    *total += sum_of_lanes(sum) + tail.map(|(&w, &x)| w * x).sum::<f32>();
                }
            }
            totals
        }

        /// Multiplies in 12 registers, without loads; returns the multiply-accumulates done.
        #[target_feature(enable = $features)]
        pub(super) fn peak(repetitions: u32) -> u32 {
            const SUMS: u32 = 12;
            let half = black_box(splat(0.5));
            let mut sums = [half; SUMS as usize];
            for _ in 0..repetitions {
                for sum in &mut sums {
                    *sum = multiply_add(*sum, half, half);
                }
            }
            black_box(sums);
            u32::try_from(LANES).map_or(0, |lanes| repetitions * SUMS * lanes)
        }

        /// One vector of a slice.
        #[inline]
        fn vector(values: &[f32], start: usize) -> &[f32; LANES] {
            values[start..].first_chunk().expect("strides are whole vectors")
        }

        /// One vector of a slice, to write.
        #[inline]
        fn vector_mut(values: &mut [f32], start: usize) -> &mut [f32; LANES] {
            values[start..].first_chunk_mut().expect("strides are whole vectors")
        }
    };
}

pub(super) use float_body;
