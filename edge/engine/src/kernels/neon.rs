//! Any aarch64: `smull`, `smlal`, `sadalp`, 16 products in three instructions.
//!
//! NEON multiplies no u8 by s8, so the kernel computes with `activation - 128`; packing adds 128 x the sum of weights to the bias.
//! Two products of such bytes are at most 2 x 128 x 127 = 32512 and fit in 16 bits; `sadalp` adds pairs of them to 32 bits.
//! Lanes run along the activations, so nothing has to be broadcast. A tile is one 2 x 2 window by 4 output channels: 16 of the 32
//! registers hold sums, whose lanes are added at the end.
#![allow(
    unsafe_code,
    reason = "loads and stores of whole vectors, through references to arrays of their size"
)]

use std::arch::aarch64::{
    int8x16_t, int32x4_t, vaddq_s32, vaddvq_s32, vcombine_u16, vcvtnq_s32_f32, vcvtq_f32_s32,
    vdup_n_u16, vdupq_n_f32, vdupq_n_s32, vdupq_n_u8, veorq_u8, vget_lane_u32, vget_low_s8,
    vld1q_f32, vld1q_s8, vld1q_s32, vld1q_u8, vmaxq_f32, vmaxq_s32, vminq_f32, vminq_s32,
    vmlal_high_s8, vmovn_u16, vmovn_u32, vmull_s8, vmulq_f32, vpadalq_s16, vpaddlq_s8, vpaddq_s32,
    vreinterpret_u32_u8, vreinterpretq_s8_u8, vreinterpretq_u32_s32,
};

use super::{ConvRow, Geometry, Levels, POSITIONS, WeightFormat, scalar};

/// 4 channels a block, 16 activations a step.
pub(super) const GEOMETRY: Geometry = Geometry {
    lanes: 4,
    max_vectors: 1,
    group: 16,
    step: 16,
    weight: WeightFormat::Bytes,
    is_offset: true,
};

/// Channels of a block.
const CHANNELS: usize = 4;

/// See [`super::conv_row`].
#[target_feature(enable = "neon")]
pub(super) fn conv_row(row: &ConvRow<'_>, out: &mut [u8]) {
    let out = &mut [out, &mut []];
    for column in 0..row.n_columns {
        tile::<true>(row, column, Levels::default(), out);
    }
}

/// See [`super::conv_rows`].
#[target_feature(enable = "neon")]
pub(super) fn conv_rows(row: &ConvRow<'_>, levels: Levels, mut out: [&mut [u8]; 2]) {
    for column in 0..row.n_columns {
        tile::<false>(row, column, levels, &mut out);
    }
}

/// One window, pooled to the first of `out`, or its two rows.
#[target_feature(enable = "neon")]
fn tile<const IS_POOLED: bool>(
    row: &ConvRow<'_>,
    column: usize,
    levels: Levels,
    out: &mut [&mut [u8]; 2],
) {
    let mut sums = [[vdupq_n_s32(0); CHANNELS]; POSITIONS];
    for kernel_row in 0..row.kernel_rows() {
        let window = row.window::<16>(kernel_row, column);
        let weights = row.kernel_row_weights(kernel_row).as_chunks::<16>().0;
        for (step, weights) in (0..window.n_steps).zip(weights.as_chunks::<CHANNELS>().0) {
            for (position, sums) in sums.iter_mut().enumerate() {
                let activations = load_offset(window.at(position, step));
                for (sum, weights) in sums.iter_mut().zip(weights) {
                    *sum = add_products(*sum, activations, load_weights(weights));
                }
            }
        }
    }
    let [a, b, c, d] = sums;
    let sums = [sum_lanes(a), sum_lanes(b), sum_lanes(c), sum_lanes(d)];
    let ([bias], [scale]) = (row.bias(), row.scale());
    let bias = load_i32(bias);
    if IS_POOLED {
        let [a, b, c, d] = sums;
        let highest = vmaxq_s32(vmaxq_s32(a, b), vmaxq_s32(c, d));
        let [pixel] = row.pixel(column, out[0]);
        *pixel = requantize(vaddq_s32(highest, bias), scale);
        return;
    }
    for (position, sum) in sums.into_iter().enumerate() {
        let [pixel] = row.pixel(2 * column + position % 2, out[position / 2]);
        *pixel = requantize_to(vaddq_s32(sum, bias), scale, levels);
    }
}

/// The lanes of four vectors added up, one sum a lane.
#[inline]
#[target_feature(enable = "neon")]
fn sum_lanes([a, b, c, d]: [int32x4_t; CHANNELS]) -> int32x4_t {
    vpaddq_s32(vpaddq_s32(a, b), vpaddq_s32(c, d))
}

/// See [`super::dense`]. The sum of the weights is taken on the way, because dense weights lie as in the model file.
#[target_feature(enable = "neon")]
pub(super) fn dense(activations: &[u8], weights: &[u8], sums: &mut [i32]) {
    let (vectors, rest) = activations.as_chunks::<16>();
    for (total, weights) in sums.iter_mut().zip(weights.chunks_exact(activations.len())) {
        let (weights, weights_rest) = weights.as_chunks::<16>();
        let mut sum = vdupq_n_s32(0);
        let mut weight_sum = vdupq_n_s32(0);
        for (activations, weights) in vectors.iter().zip(weights) {
            let weights = load_weights(weights);
            sum = add_products(sum, load_offset(activations), weights);
            weight_sum = vpadalq_s16(weight_sum, vpaddlq_s8(weights));
        }
        *total = vaddvq_s32(sum) + 128 * vaddvq_s32(weight_sum) + scalar::dot(rest, weights_rest);
    }
}

/// Adds 16 products to four sums. No product pair leaves 16 bits, see the head of this file.
#[inline]
#[target_feature(enable = "neon")]
fn add_products(sum: int32x4_t, activations: int8x16_t, weights: int8x16_t) -> int32x4_t {
    let low = vmull_s8(vget_low_s8(activations), vget_low_s8(weights));
    vpadalq_s16(sum, vmlal_high_s8(low, activations, weights))
}

/// Four sums to four u8, see [`shared::quantize::requantize`].
#[inline]
#[target_feature(enable = "neon")]
pub(super) fn requantize(sums: int32x4_t, scale: &[f32; 4]) -> [u8; 4] {
    // SAFETY: the reference covers the 16 bytes that are read.
    let scale = unsafe { vld1q_f32(scale.as_ptr()) };
    let scaled = vmulq_f32(vcvtq_f32_s32(sums), scale);
    let clamped = vminq_f32(vmaxq_f32(scaled, vdupq_n_f32(0.0)), vdupq_n_f32(255.0));
    low_bytes(vcvtnq_s32_f32(clamped))
}

/// Four sums to four u8 with their levels, see [`super::requantize_to`].
#[inline]
#[target_feature(enable = "neon")]
pub(super) fn requantize_to(sums: int32x4_t, scale: &[f32; 4], levels: Levels) -> [u8; 4] {
    // SAFETY: the reference covers the 16 bytes that are read.
    let scale = unsafe { vld1q_f32(scale.as_ptr()) };
    let scaled = vmulq_f32(vcvtq_f32_s32(sums), scale);
    let clamped = vminq_f32(vmaxq_f32(scaled, vdupq_n_f32(-512.0)), vdupq_n_f32(512.0));
    let shifted = vaddq_s32(vcvtnq_s32_f32(clamped), vdupq_n_s32(levels.zero.into()));
    let raised = vmaxq_s32(shifted, vdupq_n_s32(levels.lowest.into()));
    low_bytes(vminq_s32(raised, vdupq_n_s32(255)))
}

/// Four numbers of 0 to 255 as bytes.
#[inline]
#[target_feature(enable = "neon")]
fn low_bytes(numbers: int32x4_t) -> [u8; 4] {
    let words = vmovn_u32(vreinterpretq_u32_s32(numbers));
    let bytes = vmovn_u16(vcombine_u16(words, vdup_n_u16(0)));
    vget_lane_u32::<0>(vreinterpret_u32_u8(bytes)).to_le_bytes()
}

/// Activations less 128, as s8.
#[inline]
#[target_feature(enable = "neon")]
pub(super) fn load_offset(bytes: &[u8; 16]) -> int8x16_t {
    // SAFETY: the reference covers the 16 bytes that are read.
    let activations = unsafe { vld1q_u8(bytes.as_ptr()) };
    vreinterpretq_s8_u8(veorq_u8(activations, vdupq_n_u8(0x80)))
}

#[inline]
#[target_feature(enable = "neon")]
pub(super) fn load_weights(bytes: &[u8; 16]) -> int8x16_t {
    // SAFETY: the reference covers the 16 bytes that are read.
    unsafe { vld1q_s8(bytes.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "neon")]
pub(super) fn load_i32(values: &[i32; 4]) -> int32x4_t {
    // SAFETY: the reference covers the 16 bytes that are read.
    unsafe { vld1q_s32(values.as_ptr()) }
}
