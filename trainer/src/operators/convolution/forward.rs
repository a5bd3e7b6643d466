//! Forward: register tiles over rows of windows.

use std::ops::Range;

use rayon::prelude::*;

#[cfg(target_arch = "x86_64")]
use super::super::vector::{Avx2, Avx512};
use super::super::vector::{Instructions, Portable, Vector};
use super::{BAND, BLOCK, Band, Batch, Geometry, IMAGE_CHANNELS, Input, Shared};

/// Pooled values and argmax of a batch, both in blocks of 16 channels.
pub(super) fn forward(
    instructions: Instructions,
    geometry: &Geometry,
    batch: Batch<'_>,
    weight: &[f32],
    bias: &[f32],
) -> (Vec<f32>, Vec<u8>) {
    let packed = pack_forward(geometry, weight, lanes(instructions));
    let mut padded_bias = bias.to_vec();
    padded_bias.resize(geometry.blocks_out() * BLOCK, 0.0);
    let n_values = geometry.n_images * geometry.pooled_values();
    let (mut pooled, mut argmax) = (vec![0f32; n_values], vec![0u8; n_values]);
    let (pooled_to, argmax_to) = (Shared(pooled.as_mut_ptr()), Shared(argmax.as_mut_ptr()));
    let n_bands = geometry.pooled_rows().div_ceil(BAND);
    (0..geometry.n_images * n_bands)
        .into_par_iter()
        .for_each(|task| {
            let (image, band) = (task / n_bands, task % n_bands);
            let rows = band * BAND..((band + 1) * BAND).min(geometry.pooled_rows());
            let work = ForwardRows {
                geometry,
                packed: &packed,
                bias: &padded_bias,
                rows: rows.clone(),
                pooled: pooled_to.at(image * geometry.pooled_values()),
                argmax: argmax_to.at(image * geometry.pooled_values()),
            };
            match batch.image(geometry, image) {
                Input::Image(image) => work.run::<IMAGE_CHANNELS>(
                    instructions,
                    &Band::of_image(geometry, image, &rows).scaled,
                ),
                Input::Map(map) => {
                    work.run::<BLOCK>(instructions, &map[2 * rows.start * geometry.row_stride()..])
                }
            }
        });
    (pooled, argmax)
}

fn lanes(instructions: Instructions) -> (usize, usize) {
    match instructions {
        #[cfg(target_arch = "x86_64")]
        Instructions::Avx512 => (Avx512::LANES, Avx512::TILE),
        #[cfg(target_arch = "x86_64")]
        Instructions::Avx2 => (Avx2::LANES, Avx2::TILE),
        Instructions::Portable => (Portable::LANES, Portable::TILE),
    }
}

/// `[group of TILE vectors][block in, i, position in the row of three pixels][TILE * LANES]`; the last group may be
/// narrower.
fn pack_forward(geometry: &Geometry, weight: &[f32], (lanes, tile): (usize, usize)) -> Vec<f32> {
    let stride = geometry.column_stride();
    let run = 3 * stride;
    let depth = geometry.blocks_in() * 3 * run;
    let n_vectors = geometry.blocks_out() * BLOCK / lanes;
    let mut packed = vec![0f32; n_vectors * lanes * depth];
    for out in 0..geometry.channels_out {
        let group = out / (tile * lanes);
        let width = tile.min(n_vectors - group * tile) * lanes;
        let base = group * tile * lanes * depth + out % (tile * lanes);
        for channel in 0..geometry.channels_in {
            let (block, lane) = if geometry.is_image {
                (0, channel)
            } else {
                (channel / BLOCK, channel % BLOCK)
            };
            for (tap, &value) in weight[(out * geometry.channels_in + channel) * 9..][..9]
                .iter()
                .enumerate()
            {
                let k = (block * 3 + tap / 3) * run + (tap % 3) * stride + lane;
                packed[base + k * width] = value;
            }
        }
    }
    packed
}

/// Some pooled rows of one image.
struct ForwardRows<'a> {
    geometry: &'a Geometry,
    packed: &'a [f32],
    bias: &'a [f32],
    rows: Range<usize>,
    /// This image's pooled map; only `rows` of each block are written.
    pooled: *mut f32,
    argmax: *mut u8,
}

impl ForwardRows<'_> {
    /// `input` begins at row `2 * rows.start` of the first block. `STRIDE` is the geometry's column stride.
    fn run<const STRIDE: usize>(&self, instructions: Instructions, input: &[f32]) {
        let g = self.geometry;
        assert_eq!(STRIDE, g.column_stride(), "the kernel's column stride");
        let n_rows = 2 * self.rows.len() + 2;
        let last_block = (g.blocks_in() - 1) * g.block_stride();
        assert!(
            input.len() >= last_block + n_rows * g.row_stride(),
            "the input holds the rows"
        );
        match instructions {
            // SAFETY: detected; the assertions above bound every read, `rows` lie in the pooled map.
            #[cfg(target_arch = "x86_64")]
            Instructions::Avx512 => unsafe { forward_avx512::<STRIDE>(self, input.as_ptr()) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Instructions::Avx2 => unsafe { forward_avx2::<STRIDE>(self, input.as_ptr()) },
            // SAFETY: as above; needs no instructions.
            Instructions::Portable => unsafe {
                forward_rows::<Portable, STRIDE>(self, input.as_ptr())
            },
        }
    }
}

/// # Safety
/// AVX-512F, and as [`forward_rows`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn forward_avx512<const STRIDE: usize>(work: &ForwardRows<'_>, input: *const f32) {
    // SAFETY: the caller's condition.
    unsafe { forward_rows::<Avx512, STRIDE>(work, input) }
}

/// # Safety
/// AVX2 and FMA, and as [`forward_rows`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn forward_avx2<const STRIDE: usize>(work: &ForwardRows<'_>, input: *const f32) {
    // SAFETY: the caller's condition.
    unsafe { forward_rows::<Avx2, STRIDE>(work, input) }
}

/// # Safety
/// The CPU has V's instructions; `input` holds the rows of `work` in every block; `work.pooled` and `work.argmax` hold
/// a whole pooled map whose rows `work.rows` nobody else touches.
#[inline(always)]
unsafe fn forward_rows<V: Vector, const STRIDE: usize>(work: &ForwardRows<'_>, input: *const f32) {
    let g = work.geometry;
    let n_vectors = g.blocks_out() * BLOCK / V::LANES;
    for row in work.rows.clone() {
        // SAFETY: the row lies in the input by the caller's condition.
        let input = unsafe { input.add(2 * (row - work.rows.start) * g.row_stride()) };
        let mut vector = 0;
        while vector < n_vectors {
            // SAFETY: the caller's condition; the group lies in the packed weights.
            unsafe {
                if V::TILE == 2 && vector + 1 < n_vectors {
                    forward_row::<V, STRIDE, 2>(work, input, row, vector);
                    vector += 2;
                } else {
                    forward_row::<V, STRIDE, 1>(work, input, row, vector);
                    vector += 1;
                }
            }
        }
    }
}

/// # Safety
/// As [`forward_rows`]; `input` at convolution row `2 * row`.
#[inline(always)]
unsafe fn forward_row<V: Vector, const STRIDE: usize, const TILE: usize>(
    work: &ForwardRows<'_>,
    input: *const f32,
    row: usize,
    vector: usize,
) {
    let n_columns = work.geometry.pooled_columns();
    let mut column = 0;
    while column < n_columns {
        // SAFETY: the caller's condition; the tile's columns lie in the row.
        unsafe {
            match n_columns - column {
                1 => forward_tile::<V, STRIDE, TILE, 1, 2>(work, input, row, vector, column),
                2 => forward_tile::<V, STRIDE, TILE, 2, 4>(work, input, row, vector, column),
                _ => forward_tile::<V, STRIDE, TILE, 3, 6>(work, input, row, vector, column),
            }
        }
        column += 3;
    }
}

/// `POOLED` windows (`COLUMNS` = 2 `POOLED` columns of two rows) of `TILE` vectors of channels.
///
/// # Safety
/// As [`forward_row`], `column + POOLED` at most the pooled columns.
#[inline(always)]
#[expect(
    clippy::needless_range_loop,
    reason = "the index runs through two arrays of different order at once"
)]
unsafe fn forward_tile<
    V: Vector,
    const STRIDE: usize,
    const TILE: usize,
    const POOLED: usize,
    const COLUMNS: usize,
>(
    work: &ForwardRows<'_>,
    input: *const f32,
    row: usize,
    vector: usize,
    column: usize,
) {
    let g = work.geometry;
    let run = 3 * STRIDE;
    let depth = g.blocks_in() * 3 * run;
    let (row_stride, block_stride) = (g.row_stride(), g.block_stride());
    let bias: &[f32] = &work.bias[vector * V::LANES..(vector + TILE) * V::LANES];
    let weights: &[f32] = &work.packed[vector * V::LANES * depth..][..TILE * V::LANES * depth];
    // SAFETY: reads of `input` reach row 3 and column 2 * (column + POOLED) + 1 of each block; weights and bias are
    // sliced above; writes go to windows column .. column + POOLED of `row`.
    unsafe {
        let mut sums = [[[V::splat(0.0); TILE]; COLUMNS]; 2];
        for t in 0..TILE {
            let start = V::load(bias.as_ptr().add(t * V::LANES));
            for sums in &mut sums {
                for sum in sums {
                    sum[t] = start;
                }
            }
        }
        let mut weight = weights.as_ptr();
        for block in 0..g.blocks_in() {
            for i in 0..3 {
                let upper = input.add(block * block_stride + i * row_stride + 2 * column * STRIDE);
                let lower = upper.add(row_stride);
                for position in 0..run {
                    let mut w = [V::splat(0.0); TILE];
                    for (t, w) in w.iter_mut().enumerate() {
                        *w = V::load(weight.add(t * V::LANES));
                    }
                    weight = weight.add(TILE * V::LANES);
                    for (sums, x) in sums.iter_mut().zip([upper, lower]) {
                        for (c, sum) in sums.iter_mut().enumerate() {
                            let x = V::splat(*x.add(position + c * STRIDE));
                            for t in 0..TILE {
                                sum[t] = x.mul_add(w[t], sum[t]);
                            }
                        }
                    }
                }
            }
        }
        for t in 0..TILE {
            let channel = (vector + t) * V::LANES;
            let start = (((channel / BLOCK) * g.pooled_rows() + row) * g.pooled_columns() + column)
                * BLOCK
                + channel % BLOCK;
            for p in 0..POOLED {
                let window = [
                    sums[0][2 * p][t],
                    sums[0][2 * p + 1][t],
                    sums[1][2 * p][t],
                    sums[1][2 * p + 1][t],
                ];
                let at = start + p * BLOCK;
                V::pool(window, work.pooled.add(at), work.argmax.add(at));
            }
        }
    }
}
