//! 3x3 valid convolution + bias + ReLU + 2x2 max pool as one operator, forward and backward.
//!
//! In: an image batch `[image, 3, row, column]` u8, scaled by 1/255 here, or a feature map in blocks of 16 channels,
//! `[image, channel / 16, row, column, channel % 16]` f32, whose missing channels are 0; weights `[out, in, 3, 3]` f32;
//! bias `[out]` f32. Out: the pooled feature map in blocks of 16 channels.
//!
//! Definition, for output channel o and window position (y, x) of the pooled map:
//! `pooled = max over the window of max(0, bias[o] + sum of weight[o, c, i, j] * input[c, 2y + .. + i, 2x + .. + j])`;
//! an odd last row or column of the convolution is dropped. The whole gradient goes to the first maximum in row-major
//! order, as in `TensorFlow` and `PyTorch` on the CPU, and none where that maximum is not above 0.
//!
//! **Forward** computes tiles of 2 rows x 6 columns x 32 channels in registers, pools them there and writes pooled
//! values and one byte a window (index of the maximum 0 to 3, or 4: closed), so the convolution's output never
//! exists in memory. **Backward** uses that at most one position of each window has a gradient: it lists the open
//! positions of one output channel and adds their 3x3 neighbourhoods, a quarter of the arithmetic of a dense
//! convolution or less. Work is split over images (and bands of rows, forward), not inside the arithmetic.
#![expect(
    unsafe_code,
    reason = "register tiles over raw pointers: 4 to 10 times the speed of the safe matrix product on this shape"
)]
#![expect(
    clippy::multiple_unsafe_ops_per_block,
    reason = "vector arithmetic through one trait, all of it under the condition of the enclosing function"
)]

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use candle_core::{CpuStorage, CustomOp3, DType, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

#[cfg(target_arch = "x86_64")]
use super::vector::{Avx2, Avx512};
use super::vector::{Instructions, Portable, Vector};
use super::{values, with_values};

/// Channels in one block of a feature map.
pub const BLOCK: usize = 16;
/// Channels of the image.
const IMAGE_CHANNELS: usize = 3;
/// Pooled rows that one forward task computes, and that are held of the scaled image at a time.
const BAND: usize = 8;
/// Pooled columns whose open positions are listed at a time: their input block stays in the first-level cache.
const SEGMENT: usize = 32;
/// Most partial sums of the weights' gradient; images are spread over them evenly.
const MAX_PARTIAL_SUMS: usize = 16;
/// `argmax` of a window whose maximum is not above 0.
const CLOSED: u8 = 4;
/// The image's scale: what `DequantizeLinear` with scale 1/255 in f32 computes.
pub const IMAGE_SCALE: f32 = 1.0 / 255.0;

/// The operator. It holds what the backward pass needs, so make a new one for each forward pass.
#[derive(Debug)]
pub struct ConvolutionReluPool {
    needs_input_gradient: bool,
    argmax: Mutex<Vec<u8>>,
}

impl ConvolutionReluPool {
    /// For one forward pass. An image never gets a gradient; a feature map does where `needs_input_gradient`.
    #[must_use]
    pub fn new(needs_input_gradient: bool) -> Self {
        Self {
            needs_input_gradient,
            argmax: Mutex::new(Vec::new()),
        }
    }
}

/// Sizes of one application.
#[derive(Debug, Clone, Copy)]
struct Geometry {
    n_images: usize,
    channels_in: usize,
    channels_out: usize,
    rows: usize,
    columns: usize,
    is_image: bool,
}

impl Geometry {
    fn new(input: &Shape, dtype: DType, weight: &Shape, bias: &Shape) -> Result<Self> {
        let (channels_out, channels_in, 3, 3) = weight.dims4()? else {
            bail!("weights {weight:?} are not [out, in, 3, 3]")
        };
        if bias.dims() != [channels_out] {
            bail!("bias {bias:?} does not fit weights {weight:?}")
        }
        let (n_images, rows, columns, is_image) = match (input.dims(), dtype) {
            (&[n, c, rows, columns], DType::U8) if c == channels_in && c == IMAGE_CHANNELS => {
                (n, rows, columns, true)
            }
            (&[n, blocks, rows, columns, BLOCK], DType::F32)
                if blocks == channels_in.div_ceil(BLOCK) =>
            {
                (n, rows, columns, false)
            }
            _ => bail!("input {input:?} {dtype:?} does not fit weights {weight:?}"),
        };
        if rows < 4 || columns < 4 || rows * columns > 1 << 24 {
            bail!("input of {rows} x {columns} is not between 4 x 4 and 2^24 values")
        }
        Ok(Self {
            n_images,
            channels_in,
            channels_out,
            rows,
            columns,
            is_image,
        })
    }
    fn pooled_rows(&self) -> usize {
        (self.rows - 2) / 2
    }
    fn pooled_columns(&self) -> usize {
        (self.columns - 2) / 2
    }
    fn blocks_in(&self) -> usize {
        if self.is_image {
            1
        } else {
            self.channels_in.div_ceil(BLOCK)
        }
    }
    fn blocks_out(&self) -> usize {
        self.channels_out.div_ceil(BLOCK)
    }
    /// Values from one column to the next.
    fn column_stride(&self) -> usize {
        if self.is_image { IMAGE_CHANNELS } else { BLOCK }
    }
    fn row_stride(&self) -> usize {
        self.columns * self.column_stride()
    }
    /// Values from one block of channels to the next, of a whole feature map.
    fn block_stride(&self) -> usize {
        self.rows * self.row_stride()
    }
    /// Values of one image's whole input feature map.
    fn input_values(&self) -> usize {
        if self.is_image {
            IMAGE_CHANNELS * self.rows * self.columns
        } else {
            self.blocks_in() * self.block_stride()
        }
    }
    /// Values of one image's pooled feature map.
    fn pooled_values(&self) -> usize {
        self.blocks_out() * BLOCK * self.pooled_rows() * self.pooled_columns()
    }
    /// Vectors of 16 values that cover one 3x3 neighbourhood of a block: a whole row of three RGB pixels (9 values and
    /// 7 of the next ones, which meet zero weights), or one pixel of 16 channels.
    fn taps(&self) -> usize {
        if self.is_image { 3 } else { 9 }
    }
    /// Values of one output channel in the tap layout `[block, tap, 16]`.
    fn tap_values(&self) -> usize {
        self.blocks_in() * self.taps() * BLOCK
    }
    /// Where weight `(channel, i, j)` of an output channel stands in the tap layout.
    fn tap_index(&self, channel: usize, i: usize, j: usize) -> usize {
        if self.is_image {
            i * BLOCK + j * IMAGE_CHANNELS + channel
        } else {
            ((channel / BLOCK) * 9 + i * 3 + j) * BLOCK + channel % BLOCK
        }
    }
    fn partial_sums(&self) -> usize {
        self.n_images.min(MAX_PARTIAL_SUMS)
    }
}

/// Input rows of one image, as the kernels read them: at least 16 readable values after the last.
struct Band {
    scaled: Vec<f32>,
}

impl Band {
    /// The scaled rows `2 * first ..` of an image that `pooled` needs, as `[row, column, channel]`.
    fn of_image(geometry: &Geometry, image: &[u8], pooled: &Range<usize>) -> Self {
        let plane = geometry.rows * geometry.columns;
        let (begin, end) = (
            2 * pooled.start * geometry.columns,
            (2 * pooled.end + 2) * geometry.columns,
        );
        let mut scaled = vec![0f32; (end - begin) * IMAGE_CHANNELS + BLOCK];
        let (red, green, blue) = (
            &image[begin..end],
            &image[plane + begin..plane + end],
            &image[2 * plane + begin..2 * plane + end],
        );
        for (pixel, ((r, g), b)) in scaled
            .chunks_exact_mut(IMAGE_CHANNELS)
            .zip(red.iter().zip(green).zip(blue))
        {
            pixel[0] = f32::from(*r) * IMAGE_SCALE;
            pixel[1] = f32::from(*g) * IMAGE_SCALE;
            pixel[2] = f32::from(*b) * IMAGE_SCALE;
        }
        Self { scaled }
    }
}

/// One image's input.
#[derive(Clone, Copy)]
enum Input<'a> {
    Image(&'a [u8]),
    Map(&'a [f32]),
}

#[derive(Clone, Copy)]
enum Batch<'a> {
    Images(&'a [u8]),
    Maps(&'a [f32]),
}

impl<'a> Batch<'a> {
    fn of(geometry: &Geometry, storage: &'a CpuStorage, layout: &Layout) -> Result<Self> {
        Ok(if geometry.is_image {
            Self::Images(values(storage, layout)?)
        } else {
            Self::Maps(values(storage, layout)?)
        })
    }
    fn image(&self, geometry: &Geometry, index: usize) -> Input<'a> {
        let range = index * geometry.input_values()..(index + 1) * geometry.input_values();
        match self {
            Self::Images(all) => Input::Image(&all[range]),
            Self::Maps(all) => Input::Map(&all[range]),
        }
    }
}

/// A pointer that several tasks write through, each to places of its own.
#[derive(Clone, Copy)]
struct Shared<T>(*mut T);
// SAFETY: every user states why its places are disjoint.
unsafe impl<T> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for Shared<T> {}
impl<T> Shared<T> {
    fn at(self, index: usize) -> *mut T {
        self.0.wrapping_add(index)
    }
}

// ---------------------------------------------------------------------------------------------------- forward

/// Pooled values and argmax of a batch, both in blocks of 16 channels.
fn forward(
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

// --------------------------------------------------------------------------------------------------- backward

/// Gradients of one application.
#[derive(Debug)]
struct Gradients {
    /// In blocks of 16 channels; where asked for.
    input: Option<Vec<f32>>,
    weight: Vec<f32>,
    bias: Vec<f32>,
}

/// An open position: where its neighbourhood begins, from the row's first value, and its gradient.
#[derive(Debug, Clone, Copy, Default)]
struct Open {
    offset: u32,
    gradient: f32,
}

/// Gradients of weights and bias summed over some images, `[out, block, tap, 16]` and `[out]`.
struct PartialSum {
    weight: Vec<f32>,
    bias: Vec<f64>,
}

fn backward(
    instructions: Instructions,
    geometry: &Geometry,
    batch: Batch<'_>,
    weight: &[f32],
    argmax: &[u8],
    gradient: &[f32],
    needs_input_gradient: bool,
) -> Gradients {
    let needs_input_gradient = needs_input_gradient && !geometry.is_image;
    let taps = if needs_input_gradient {
        pack_taps(geometry, weight)
    } else {
        Vec::new()
    };
    let n_sums = geometry.partial_sums();
    let share =
        |sum: usize| sum * geometry.n_images / n_sums..(sum + 1) * geometry.n_images / n_sums;
    let mut input = vec![
        0f32;
        if needs_input_gradient {
            geometry.n_images * geometry.input_values()
        } else {
            0
        }
    ];
    let input_to = Shared(input.as_mut_ptr());
    let sums: Vec<PartialSum> = (0..n_sums)
        .into_par_iter()
        .map(|sum| {
            let mut partial = PartialSum {
                weight: vec![0f32; geometry.channels_out * geometry.tap_values()],
                bias: vec![0f64; geometry.channels_out],
            };
            let mut lists = vec![Open::default(); geometry.blocks_out() * BLOCK * SEGMENT];
            for image in share(sum) {
                let pooled =
                    image * geometry.pooled_values()..(image + 1) * geometry.pooled_values();
                let mut work = BackwardImage {
                    geometry,
                    argmax: &argmax[pooled.clone()],
                    gradient: &gradient[pooled],
                    partial: &mut partial,
                    lists: &mut lists,
                    input_gradient: needs_input_gradient.then(|| {
                        (
                            input_to.at(image * geometry.input_values()),
                            taps.as_slice(),
                        )
                    }),
                };
                work.run(instructions, batch.image(geometry, image));
            }
            partial
        })
        .collect();
    let (weight, bias) = sum_up(geometry, &sums);
    Gradients {
        input: needs_input_gradient.then_some(input),
        weight,
        bias,
    }
}

/// Weights as `[out, block, tap, 16]`.
fn pack_taps(geometry: &Geometry, weight: &[f32]) -> Vec<f32> {
    let mut taps = vec![0f32; geometry.channels_out * geometry.tap_values()];
    for (taps, weight) in taps
        .chunks_exact_mut(geometry.tap_values())
        .zip(weight.chunks_exact(geometry.channels_in * 9))
    {
        for (index, &value) in weight.iter().enumerate() {
            taps[geometry.tap_index(index / 9, index % 9 / 3, index % 3)] = value;
        }
    }
    taps
}

/// Adds the partial sums in their order and restores `[out, in, 3, 3]`.
fn sum_up(geometry: &Geometry, sums: &[PartialSum]) -> (Vec<f32>, Vec<f32>) {
    let mut weight = vec![0f32; geometry.channels_out * geometry.channels_in * 9];
    weight
        .par_chunks_mut(geometry.channels_in * 9)
        .enumerate()
        .for_each(|(out, weight)| {
            for sum in sums {
                let partial = &sum.weight[out * geometry.tap_values()..][..geometry.tap_values()];
                for (index, value) in weight.iter_mut().enumerate() {
                    *value += partial[geometry.tap_index(index / 9, index % 9 / 3, index % 3)];
                }
            }
        });
    #[expect(
        clippy::cast_possible_truncation,
        reason = "the sum is rounded to f32 once, at its end"
    )]
    let bias = (0..geometry.channels_out)
        .map(|out| sums.iter().map(|sum| sum.bias[out]).sum::<f64>() as f32)
        .collect();
    (weight, bias)
}

/// One image's part of the backward pass.
struct BackwardImage<'a> {
    geometry: &'a Geometry,
    argmax: &'a [u8],
    gradient: &'a [f32],
    partial: &'a mut PartialSum,
    /// [`SEGMENT`] places for each output channel.
    lists: &'a mut [Open],
    /// Where this image's input gradient is added up, and the weights as taps.
    input_gradient: Option<(*mut f32, &'a [f32])>,
}

impl BackwardImage<'_> {
    fn run(&mut self, instructions: Instructions, input: Input<'_>) {
        let n_rows = self.geometry.pooled_rows();
        match input {
            Input::Map(map) => {
                assert_eq!(map.len(), self.geometry.input_values(), "the whole map");
                self.rows::<9>(instructions, map, 0..n_rows);
            }
            Input::Image(image) => {
                for first in (0..n_rows).step_by(BAND) {
                    let rows = first..(first + BAND).min(n_rows);
                    let band = Band::of_image(self.geometry, image, &rows);
                    assert_eq!(
                        band.scaled.len(),
                        (2 * rows.len() + 2) * self.geometry.row_stride() + BLOCK,
                        "the band and 16 values"
                    );
                    self.rows::<3>(instructions, &band.scaled, rows);
                }
            }
        }
    }

    /// `input` begins at row `2 * rows.start` of the first block.
    fn rows<const TAPS: usize>(
        &mut self,
        instructions: Instructions,
        input: &[f32],
        rows: Range<usize>,
    ) {
        assert_eq!(TAPS, self.geometry.taps(), "the kernel's taps");
        match instructions {
            // SAFETY: detected; `input` is a whole map or a band with 16 values after it.
            #[cfg(target_arch = "x86_64")]
            Instructions::Avx512 => unsafe { backward_avx512::<TAPS>(self, input.as_ptr(), rows) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Instructions::Avx2 => unsafe { backward_avx2::<TAPS>(self, input.as_ptr(), rows) },
            // SAFETY: as above; needs no instructions.
            Instructions::Portable => unsafe {
                backward_rows::<Portable, TAPS>(self, input.as_ptr(), rows)
            },
        }
    }

    /// Lists the open positions of `columns` of a pooled row for every output channel and adds them to the bias'
    /// gradient; returns how many each channel has.
    fn list_open(&mut self, row: usize, columns: Range<usize>, counts: &mut [usize]) {
        let g = self.geometry;
        let stride = g.column_stride();
        counts.fill(0);
        for block in 0..g.blocks_out() {
            let lists = &mut self.lists[block * BLOCK * SEGMENT..(block + 1) * BLOCK * SEGMENT];
            let counts = &mut counts[block * BLOCK..(block + 1) * BLOCK];
            for column in columns.clone() {
                let at = ((block * g.pooled_rows() + row) * g.pooled_columns() + column) * BLOCK;
                let windows = self.argmax[at..at + BLOCK]
                    .iter()
                    .zip(&self.gradient[at..at + BLOCK]);
                for ((lane, (&index, &gradient)), count) in
                    windows.enumerate().zip(counts.iter_mut())
                {
                    let offset = usize::from(index / 2) * g.row_stride()
                        + (2 * column + usize::from(index % 2)) * stride;
                    #[expect(
                        clippy::cast_possible_truncation,
                        reason = "two rows of at most 2^24 x 16 values"
                    )]
                    let open = Open {
                        offset: offset as u32,
                        gradient,
                    };
                    // Written always and counted when open: no branch. The count stays below the columns seen.
                    lists[lane * SEGMENT + *count] = open;
                    *count += usize::from(index < CLOSED);
                }
            }
        }
        for (out, bias) in self.partial.bias.iter_mut().enumerate() {
            let open = &self.lists[out * SEGMENT..][..counts[out]];
            *bias += open
                .iter()
                .map(|open| f64::from(open.gradient))
                .sum::<f64>();
        }
    }
}

/// # Safety
/// AVX-512F, and as [`backward_rows`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn backward_avx512<const TAPS: usize>(
    work: &mut BackwardImage<'_>,
    input: *const f32,
    rows: Range<usize>,
) {
    // SAFETY: the caller's condition.
    unsafe { backward_rows::<Avx512, TAPS>(work, input, rows) }
}

/// # Safety
/// AVX2 and FMA, and as [`backward_rows`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn backward_avx2<const TAPS: usize>(
    work: &mut BackwardImage<'_>,
    input: *const f32,
    rows: Range<usize>,
) {
    // SAFETY: the caller's condition.
    unsafe { backward_rows::<Avx2, TAPS>(work, input, rows) }
}

/// # Safety
/// The CPU has V's instructions; `input` holds rows `2 * rows.start` to `2 * rows.end + 2` of every block and 16
/// readable values after the last where it is a scaled image; the input gradient, where asked for, holds a whole map.
#[inline(always)]
unsafe fn backward_rows<V: Vector, const TAPS: usize>(
    work: &mut BackwardImage<'_>,
    input: *const f32,
    rows: Range<usize>,
) {
    let g = *work.geometry;
    let mut counts = vec![0usize; g.blocks_out() * BLOCK];
    let taps: [usize; TAPS] = std::array::from_fn(|tap| {
        if g.is_image {
            tap * g.row_stride()
        } else {
            tap / 3 * g.row_stride() + tap % 3 * BLOCK
        }
    });
    for row in rows.clone() {
        for first in (0..g.pooled_columns()).step_by(SEGMENT) {
            work.list_open(
                row,
                first..(first + SEGMENT).min(g.pooled_columns()),
                &mut counts,
            );
            for block in 0..g.blocks_in() {
                for (out, &count) in counts[..g.channels_out].iter().enumerate() {
                    let open = &work.lists[out * SEGMENT..][..count];
                    let at = (out * g.blocks_in() + block) * TAPS * BLOCK;
                    let sums = &mut work.partial.weight[at..at + TAPS * BLOCK];
                    // SAFETY: an open position's neighbourhood lies in the rows that the caller vouches for.
                    unsafe {
                        let from = input.add(
                            block * g.block_stride() + 2 * (row - rows.start) * g.row_stride(),
                        );
                        add_to_weight_gradient::<V, TAPS>(from, &taps, open, sums);
                    }
                }
                let Some((input_gradient, weights)) = work.input_gradient else {
                    continue;
                };
                for (out, &count) in counts[..g.channels_out].iter().enumerate() {
                    let open = &work.lists[out * SEGMENT..][..count];
                    let at = (out * g.blocks_in() + block) * TAPS * BLOCK;
                    // SAFETY: as above, in the whole map of the input gradient.
                    unsafe {
                        let to =
                            input_gradient.add(block * g.block_stride() + 2 * row * g.row_stride());
                        add_to_input_gradient::<V, TAPS>(
                            to,
                            &taps,
                            open,
                            &weights[at..at + TAPS * BLOCK],
                        );
                    }
                }
            }
        }
    }
}

/// `sums[tap, lane] += sum over open positions of gradient * input[offset + taps[tap] + lane]`.
///
/// # Safety
/// The CPU has V's instructions; 16 values can be read at each position; `sums` holds `TAPS * 16` values.
#[inline(always)]
unsafe fn add_to_weight_gradient<V: Vector, const TAPS: usize>(
    input: *const f32,
    taps: &[usize; TAPS],
    open: &[Open],
    sums: &mut [f32],
) {
    for lane in (0..BLOCK).step_by(V::LANES) {
        // SAFETY: the caller's condition.
        unsafe {
            let mut fresh = [V::splat(0.0); TAPS];
            for position in open {
                let gradient = V::splat(position.gradient);
                let from = input.add(position.offset as usize + lane);
                for tap in 0..TAPS {
                    fresh[tap] = V::load(from.add(taps[tap])).mul_add(gradient, fresh[tap]);
                }
            }
            for (tap, fresh) in fresh.iter().enumerate() {
                let sum = sums.as_mut_ptr().add(tap * BLOCK + lane);
                fresh.add(V::load(sum)).store(sum);
            }
        }
    }
}

/// `output[offset + taps[tap] + lane] += gradient * weight[tap, lane]` for every open position.
///
/// # Safety
/// The CPU has V's instructions; 16 values can be written at each position; `weight` holds `TAPS * 16` values.
#[inline(always)]
unsafe fn add_to_input_gradient<V: Vector, const TAPS: usize>(
    output: *mut f32,
    taps: &[usize; TAPS],
    open: &[Open],
    weight: &[f32],
) {
    for lane in (0..BLOCK).step_by(V::LANES) {
        // SAFETY: the caller's condition.
        unsafe {
            let mut w = [V::splat(0.0); TAPS];
            for (tap, w) in w.iter_mut().enumerate() {
                *w = V::load(weight.as_ptr().add(tap * BLOCK + lane));
            }
            for position in open {
                let gradient = V::splat(position.gradient);
                let to = output.add(position.offset as usize + lane);
                for tap in 0..TAPS {
                    let to = to.add(taps[tap]);
                    gradient.mul_add(w[tap], V::load(to)).store(to);
                }
            }
        }
    }
}

impl CustomOp3 for ConvolutionReluPool {
    fn name(&self) -> &'static str {
        "convolution-relu-pool"
    }

    fn cpu_fwd(
        &self,
        input: &CpuStorage,
        input_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
        bias: &CpuStorage,
        bias_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        use candle_core::backend::BackendStorage;
        let geometry = Geometry::new(
            input_layout.shape(),
            input.dtype(),
            weight_layout.shape(),
            bias_layout.shape(),
        )?;
        let batch = Batch::of(&geometry, input, input_layout)?;
        let (pooled, argmax) = forward(
            Instructions::detect(),
            &geometry,
            batch,
            values(weight, weight_layout)?,
            values(bias, bias_layout)?,
        );
        *self.argmax.lock().unwrap_or_else(PoisonError::into_inner) = argmax;
        let shape = [
            geometry.n_images,
            geometry.blocks_out(),
            geometry.pooled_rows(),
            geometry.pooled_columns(),
            BLOCK,
        ];
        Ok((CpuStorage::F32(pooled), Shape::from(shape.to_vec())))
    }

    fn bwd(
        &self,
        input: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        _pooled: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let geometry = Geometry::new(input.shape(), input.dtype(), weight.shape(), bias.shape())?;
        let gradient = gradient.contiguous()?;
        let argmax = self.argmax.lock().unwrap_or_else(PoisonError::into_inner);
        let (storage, layout) = input.storage_and_layout();
        let candle_core::Storage::Cpu(storage) = &*storage else {
            bail!("the operator runs on the CPU only")
        };
        let batch = Batch::of(&geometry, storage, layout)?;
        let gradients = with_values(weight, |weight| {
            with_values(&gradient, |gradient| {
                if gradient.len() != argmax.len() {
                    bail!("the operator was used for two forward passes")
                }
                Ok(backward(
                    Instructions::detect(),
                    &geometry,
                    batch,
                    weight,
                    &argmax,
                    gradient,
                    self.needs_input_gradient,
                ))
            })
        })???;
        let on = input.device();
        Ok((
            gradients
                .input
                .map(|values| Tensor::from_vec(values, input.shape(), on))
                .transpose()?,
            Some(Tensor::from_vec(gradients.weight, weight.shape(), on)?),
            Some(Tensor::from_vec(gradients.bias, bias.shape(), on)?),
        ))
    }
}

#[cfg(test)]
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_precision_loss,
    reason = "the tests' small numbers"
)]
mod tests {
    use super::*;
    use crate::operators::definition::{self, Map};
    use crate::random::Random;

    fn instructions() -> Vec<Instructions> {
        let mut all = vec![Instructions::Portable];
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                all.push(Instructions::Avx2);
            }
            if is_x86_feature_detected!("avx512f") {
                all.push(Instructions::Avx512);
            }
        }
        all
    }

    /// `[channel, row, column]` to blocks of 16 channels.
    fn to_blocks(map: &Map) -> Vec<f32> {
        let area = map.rows * map.columns;
        let mut blocks = vec![0f32; map.channels.div_ceil(BLOCK) * BLOCK * area];
        for (index, &value) in map.values.iter().enumerate() {
            let (channel, pixel) = (index / area, index % area);
            blocks[(channel / BLOCK * area + pixel) * BLOCK + channel % BLOCK] = value as f32;
        }
        blocks
    }

    fn from_blocks(blocks: &[f32], channels: usize, rows: usize, columns: usize) -> Map {
        let area = rows * columns;
        let values = (0..channels * area)
            .map(|index| {
                let (channel, pixel) = (index / area, index % area);
                f64::from(blocks[(channel / BLOCK * area + pixel) * BLOCK + channel % BLOCK])
            })
            .collect();
        Map {
            channels,
            rows,
            columns,
            values,
        }
    }

    #[track_caller]
    fn near(what: &str, found: &[f64], expected: &[f64], tolerance: f64) {
        assert_eq!(found.len(), expected.len(), "{what}");
        let scale = expected
            .iter()
            .fold(1e-30, |scale: f64, value| scale.max(value.abs()));
        for (index, (found, expected)) in found.iter().zip(expected).enumerate() {
            assert!(
                (found - expected).abs() <= tolerance * scale,
                "{what} {index}: {found} not {expected} (scale {scale})"
            );
        }
    }

    /// Values of a test: of any size, or so few that most windows have ties and all sums are exact.
    #[derive(Clone, Copy)]
    enum Values {
        Any,
        Ties,
    }

    impl Values {
        fn weight(self, random: &mut Random) -> f64 {
            match self {
                Self::Any => f64::from((random.uniform() - 0.5) as f32),
                Self::Ties => random.below(3) as f64 - 1.0,
            }
        }
        fn tolerance(self) -> f64 {
            match self {
                Self::Any => 1e-5,
                Self::Ties => 0.0,
            }
        }
    }

    #[track_caller]
    fn check(
        n_images: usize,
        channels_in: usize,
        channels_out: usize,
        rows: usize,
        columns: usize,
        is_image: bool,
        kind: Values,
    ) {
        let mut random = Random::new(11, (rows * columns + channels_in) as u64);
        let geometry = Geometry {
            n_images,
            channels_in,
            channels_out,
            rows,
            columns,
            is_image,
        };
        let weight: Vec<f64> = (0..channels_out * channels_in * 9)
            .map(|_| kind.weight(&mut random))
            .collect();
        let bias: Vec<f64> = (0..channels_out)
            .map(|_| kind.weight(&mut random))
            .collect();
        let bytes: Vec<u8> = (0..n_images * channels_in * rows * columns)
            .map(|_| match kind {
                Values::Any => random.below(256) as u8,
                // 0 or 255, that is 0 or 1 after scaling.
                Values::Ties => random.below(2) as u8 * 255,
            })
            .collect();
        let maps: Vec<Map> = bytes
            .chunks_exact(channels_in * rows * columns)
            .map(|bytes| {
                let values = bytes
                    .iter()
                    .map(|&byte| f64::from(f32::from(byte) * IMAGE_SCALE))
                    .collect();
                Map {
                    channels: channels_in,
                    rows,
                    columns,
                    values,
                }
            })
            .collect();
        let (out_rows, out_columns) = (geometry.pooled_rows(), geometry.pooled_columns());
        let gradients: Vec<Map> = (0..n_images)
            .map(|_| {
                let values = (0..channels_out * out_rows * out_columns)
                    .map(|_| kind.weight(&mut random))
                    .collect();
                Map {
                    channels: channels_out,
                    rows: out_rows,
                    columns: out_columns,
                    values,
                }
            })
            .collect();
        let (weight32, bias32): (Vec<f32>, Vec<f32>) = (
            weight.iter().map(|&v| v as f32).collect(),
            bias.iter().map(|&v| v as f32).collect(),
        );
        let blocks: Vec<f32> = maps.iter().flat_map(to_blocks).collect();
        let gradient_blocks: Vec<f32> = gradients.iter().flat_map(to_blocks).collect();
        let batch = if is_image {
            Batch::Images(&bytes)
        } else {
            Batch::Maps(&blocks)
        };
        for instructions in instructions() {
            let (pooled, argmax) = forward(instructions, &geometry, batch, &weight32, &bias32);
            let found = backward(
                instructions,
                &geometry,
                batch,
                &weight32,
                &argmax,
                &gradient_blocks,
                true,
            );
            let mut expected_weight = vec![0.0; weight.len()];
            let mut expected_bias = vec![0.0; bias.len()];
            for (image, map) in maps.iter().enumerate() {
                let expected = definition::convolution_relu_pool(map, &weight, &bias);
                let part = &pooled[image * geometry.pooled_values()..][..geometry.pooled_values()];
                let part = from_blocks(part, channels_out, out_rows, out_columns);
                near("pooled", &part.values, &expected.values, kind.tolerance());
                let back = definition::convolution_relu_pool_gradient(
                    map,
                    &weight,
                    &bias,
                    &gradients[image],
                );
                for (sum, value) in expected_weight.iter_mut().zip(&back.weight) {
                    *sum += value;
                }
                for (sum, value) in expected_bias.iter_mut().zip(&back.bias) {
                    *sum += value;
                }
                if let Some(input) = &found.input {
                    let part = &input[image * geometry.input_values()..][..geometry.input_values()];
                    let part = from_blocks(part, channels_in, rows, columns);
                    near(
                        "input gradient",
                        &part.values,
                        &back.input,
                        kind.tolerance(),
                    );
                }
            }
            assert_eq!(found.input.is_some(), !is_image);
            let wide = |values: &[f32]| {
                values
                    .iter()
                    .map(|&value| f64::from(value))
                    .collect::<Vec<_>>()
            };
            near(
                "weight gradient",
                &wide(&found.weight),
                &expected_weight,
                kind.tolerance(),
            );
            near(
                "bias gradient",
                &wide(&found.bias),
                &expected_bias,
                kind.tolerance(),
            );
        }
    }

    #[test]
    fn image_layer_equals_its_definition() {
        for kind in [Values::Any, Values::Ties] {
            check(2, 3, 5, 17, 17, true, kind);
            check(1, 3, 33, 8, 11, true, kind);
            check(1, 3, 64, 37, 76, true, kind);
            check(3, 3, 4, 4, 4, true, kind);
        }
    }

    #[test]
    fn map_layer_equals_its_definition() {
        for kind in [Values::Any, Values::Ties] {
            check(2, 20, 7, 13, 16, false, kind);
            check(1, 16, 48, 9, 75, false, kind);
            check(2, 4, 4, 5, 6, false, kind);
            check(1, 33, 17, 20, 12, false, kind);
        }
    }

    #[test]
    fn more_images_than_partial_sums_are_all_counted() {
        check(19, 3, 4, 6, 6, true, Values::Any);
        check(19, 4, 4, 6, 6, false, Values::Any);
    }
}
