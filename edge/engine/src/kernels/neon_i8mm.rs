//! aarch64 with 8-bit matrix multiplication: `usmmla`, 32 products of u8 x s8 in one instruction.
//!
//! The instruction multiplies two rows of eight activations, here two neighbouring positions, with two rows of eight weights, here
//! two channels, into 2 x 2 sums. A tile is one 2 x 2 window by 16 output channels: 16 of the 32 registers hold sums.
//!
//! The intrinsic is unstable in Rust 1.95, hence one line of assembly.
#![allow(
    unsafe_code,
    reason = "instructions without a stable intrinsic, and loads through references to arrays"
)]

use std::arch::aarch64::{
    int8x16_t, int32x4_t, uint8x16_t, vaddq_s32, vaddvq_s32, vcombine_s32, vdupq_n_s32,
    vget_high_s32, vget_low_s32, vld1q_u8, vmax_s32, vmaxq_s32, vreinterpretq_u8_u64,
    vreinterpretq_u64_u8, vzip1q_u64, vzip2q_u64,
};
use std::arch::asm;

use super::neon::{load_i32, load_weights, requantize, requantize_to};
use super::{ConvRow, Geometry, Levels, WeightFormat, scalar};

/// 4 channels a vector, four vectors a block, eight activations a group, 16 a step.
pub(super) const GEOMETRY: Geometry = Geometry {
    lanes: 4,
    max_vectors: 4,
    group: 8,
    step: 16,
    weight: WeightFormat::Bytes,
    is_offset: false,
};

/// Sums of two channels at two neighbouring positions, `[position][channel]`.
type Square = int32x4_t;

/// See [`super::conv_row`].
#[target_feature(enable = "neon,i8mm")]
pub(super) fn conv_row(row: &ConvRow<'_>, out: &mut [u8]) {
    columns::<true>(row, Levels::default(), [out, &mut []]);
}

/// See [`super::conv_rows`].
#[target_feature(enable = "neon,i8mm")]
pub(super) fn conv_rows(row: &ConvRow<'_>, levels: Levels, out: [&mut [u8]; 2]) {
    columns::<false>(row, levels, out);
}

#[target_feature(enable = "neon,i8mm")]
fn columns<const IS_POOLED: bool>(row: &ConvRow<'_>, levels: Levels, mut out: [&mut [u8]; 2]) {
    let (columns, out) = (0..row.n_columns, &mut out);
    match row.bias.len() {
        4 => columns.for_each(|column| tile::<1, IS_POOLED>(row, column, levels, out)),
        8 => columns.for_each(|column| tile::<2, IS_POOLED>(row, column, levels, out)),
        12 => columns.for_each(|column| tile::<3, IS_POOLED>(row, column, levels, out)),
        16 => columns.for_each(|column| tile::<4, IS_POOLED>(row, column, levels, out)),
        n => panic!("a block of {n} channels was not packed for this kernel"),
    }
}

/// One window of `VECTORS` x 4 channels: pooled to the first of `out`, or its two rows.
#[target_feature(enable = "neon,i8mm")]
fn tile<const VECTORS: usize, const IS_POOLED: bool>(
    row: &ConvRow<'_>,
    column: usize,
    levels: Levels,
    out: &mut [&mut [u8]; 2],
) {
    // Two rows of positions, and for each vector of channels two squares.
    let mut sums: [[[Square; 2]; VECTORS]; 2] = [[[vdupq_n_s32(0); 2]; VECTORS]; 2];
    for kernel_row in 0..row.kernel_rows() {
        let window = row.window::<16>(kernel_row, column);
        let weights = row
            .kernel_row_weights(kernel_row)
            .as_chunks::<32>()
            .0
            .as_chunks::<VECTORS>()
            .0;
        for (step, [low, high]) in (0..window.n_steps).zip(weights.as_chunks::<2>().0) {
            let [a, b] = [load(window.at(0, step)), load(window.at(1, step))];
            let [c, d] = [load(window.at(2, step)), load(window.at(3, step))];
            add_group(&mut sums, [low_halves(a, b), low_halves(c, d)], low);
            add_group(&mut sums, [high_halves(a, b), high_halves(c, d)], high);
        }
    }
    let parameters = || {
        let bias = row.bias::<4, VECTORS>().iter();
        bias.zip(row.scale::<4, VECTORS>())
    };
    if IS_POOLED {
        let [top, bottom] = sums;
        let pixel = row.pixel::<4, VECTORS>(column, out[0]).iter_mut();
        for (v, (bytes, (bias, scale))) in pixel.zip(parameters()).enumerate() {
            let a = vmaxq_s32(top[v][0], bottom[v][0]);
            let b = vmaxq_s32(top[v][1], bottom[v][1]);
            let a = vmax_s32(vget_low_s32(a), vget_high_s32(a));
            let b = vmax_s32(vget_low_s32(b), vget_high_s32(b));
            *bytes = requantize(vaddq_s32(vcombine_s32(a, b), load_i32(bias)), scale);
        }
        return;
    }
    for (sums, out) in sums.into_iter().zip(out) {
        let left = row.pixel::<4, VECTORS>(2 * column, out);
        for ((bytes, [a, b]), (bias, scale)) in left.iter_mut().zip(sums).zip(parameters()) {
            let sum = vcombine_s32(vget_low_s32(a), vget_low_s32(b));
            *bytes = requantize_to(vaddq_s32(sum, load_i32(bias)), scale, levels);
        }
        let right = row.pixel::<4, VECTORS>(2 * column + 1, out);
        for ((bytes, [a, b]), (bias, scale)) in right.iter_mut().zip(sums).zip(parameters()) {
            let sum = vcombine_s32(vget_high_s32(a), vget_high_s32(b));
            *bytes = requantize_to(vaddq_s32(sum, load_i32(bias)), scale, levels);
        }
    }
}

/// Eight activations of each position times their weights.
#[inline]
#[target_feature(enable = "neon,i8mm")]
fn add_group<const VECTORS: usize>(
    sums: &mut [[[Square; 2]; VECTORS]; 2],
    activations: [uint8x16_t; 2],
    weights: &[[u8; 32]; VECTORS],
) {
    for (v, weights) in weights.iter().enumerate() {
        for (pair, weights) in weights.as_chunks::<16>().0.iter().take(2).enumerate() {
            let weights = load_weights(weights);
            for (sums, activations) in sums.iter_mut().zip(activations) {
                sums[v][pair] = usmmla(sums[v][pair], activations, weights);
            }
        }
    }
}

/// See [`super::dense`].
#[target_feature(enable = "neon,i8mm")]
pub(super) fn dense(activations: &[u8], weights: &[u8], sums: &mut [i32]) {
    let (vectors, rest) = activations.as_chunks::<16>();
    for (total, weights) in sums.iter_mut().zip(weights.chunks_exact(activations.len())) {
        let (weights, weights_rest) = weights.as_chunks::<16>();
        let mut sum = vdupq_n_s32(0);
        for (activations, weights) in vectors.iter().zip(weights) {
            sum = usdot(sum, load(activations), load_weights(weights));
        }
        *total = vaddvq_s32(sum) + scalar::dot(rest, weights_rest);
    }
}

/// The first eight bytes of each.
#[inline]
#[target_feature(enable = "neon")]
fn low_halves(a: uint8x16_t, b: uint8x16_t) -> uint8x16_t {
    vreinterpretq_u8_u64(vzip1q_u64(vreinterpretq_u64_u8(a), vreinterpretq_u64_u8(b)))
}

/// The last eight bytes of each.
#[inline]
#[target_feature(enable = "neon")]
fn high_halves(a: uint8x16_t, b: uint8x16_t) -> uint8x16_t {
    vreinterpretq_u8_u64(vzip2q_u64(vreinterpretq_u64_u8(a), vreinterpretq_u64_u8(b)))
}

#[inline]
#[target_feature(enable = "neon")]
fn load(bytes: &[u8; 16]) -> uint8x16_t {
    // SAFETY: the reference covers the 16 bytes that are read.
    unsafe { vld1q_u8(bytes.as_ptr()) }
}

/// `sum[2 i + j] + activations[8 i .. 8 i + 8] . weights[8 j .. 8 j + 8]` for i and j of 0 and 1.
#[inline]
#[target_feature(enable = "neon,i8mm")]
fn usmmla(mut sum: Square, activations: uint8x16_t, weights: int8x16_t) -> Square {
    // SAFETY: the instruction touches registers only, and this function's target features say that the CPU has it.
    unsafe {
        asm!(
            "usmmla {sum:v}.4s, {activations:v}.16b, {weights:v}.16b",
            sum = inout(vreg) sum, activations = in(vreg) activations, weights = in(vreg) weights,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    sum
}

/// `sum[i] + activations[4 i .. 4 i + 4] . weights[4 i .. 4 i + 4]` for the four lanes.
#[inline]
#[target_feature(enable = "neon,i8mm")]
fn usdot(mut sum: int32x4_t, activations: uint8x16_t, weights: int8x16_t) -> int32x4_t {
    // SAFETY: the instruction touches registers only, and this function's target features say that the CPU has it.
    unsafe {
        asm!(
            "usdot {sum:v}.4s, {activations:v}.16b, {weights:v}.16b",
            sum = inout(vreg) sum, activations = in(vreg) activations, weights = in(vreg) weights,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    sum
}
