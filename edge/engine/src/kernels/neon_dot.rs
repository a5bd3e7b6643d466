//! aarch64 with dot product (Cortex-A76 and later): `sdot` by element, 16 products in one instruction.
//!
//! `sdot` multiplies s8 by s8, so the kernel computes with `activation - 128`, as `neon.rs` does. One load of 16 activations of a
//! position serves four steps of four, chosen by the instruction's lane. A tile is one 2 x 2 window by 24 output channels: 24 of
//! the 32 registers hold sums, four activations, four weights.
//!
//! The intrinsic is unstable in Rust 1.95, hence one line of assembly.
#![allow(unsafe_code, reason = "one instruction without a stable intrinsic")]

use std::arch::aarch64::{int8x16_t, int32x4_t, vaddvq_s32, vdupq_n_s8, vdupq_n_s32, vmaxq_s32};
use std::arch::asm;

use super::neon::{load_i32, load_offset, load_weights, requantize, requantize_to};
use super::{ConvRow, Geometry, Levels, POSITIONS, WeightFormat, scalar};

/// 4 channels a vector, six vectors a block, four activations a group, 16 a step.
pub(super) const GEOMETRY: Geometry = Geometry {
    lanes: 4,
    max_vectors: 6,
    group: 4,
    step: 16,
    weight: WeightFormat::Bytes,
    is_offset: true,
};

/// See [`super::conv_row`].
#[target_feature(enable = "neon,dotprod")]
pub(super) fn conv_row(row: &ConvRow<'_>, out: &mut [u8]) {
    columns::<true>(row, Levels::default(), [out, &mut []]);
}

/// See [`super::conv_rows`].
#[target_feature(enable = "neon,dotprod")]
pub(super) fn conv_rows(row: &ConvRow<'_>, levels: Levels, out: [&mut [u8]; 2]) {
    columns::<false>(row, levels, out);
}

#[target_feature(enable = "neon,dotprod")]
fn columns<const IS_POOLED: bool>(row: &ConvRow<'_>, levels: Levels, mut out: [&mut [u8]; 2]) {
    let (columns, out) = (0..row.n_columns, &mut out);
    match row.bias.len() {
        4 => columns.for_each(|column| tile::<1, IS_POOLED>(row, column, levels, out)),
        8 => columns.for_each(|column| tile::<2, IS_POOLED>(row, column, levels, out)),
        12 => columns.for_each(|column| tile::<3, IS_POOLED>(row, column, levels, out)),
        16 => columns.for_each(|column| tile::<4, IS_POOLED>(row, column, levels, out)),
        20 => columns.for_each(|column| tile::<5, IS_POOLED>(row, column, levels, out)),
        24 => columns.for_each(|column| tile::<6, IS_POOLED>(row, column, levels, out)),
        n => panic!("a block of {n} channels was not packed for this kernel"),
    }
}

/// One window of `VECTORS` x 4 channels: pooled to the first of `out`, or its two rows.
#[target_feature(enable = "neon,dotprod")]
fn tile<const VECTORS: usize, const IS_POOLED: bool>(
    row: &ConvRow<'_>,
    column: usize,
    levels: Levels,
    out: &mut [&mut [u8]; 2],
) {
    let mut sums = [[vdupq_n_s32(0); VECTORS]; POSITIONS];
    for (v, bias) in row.bias::<4, VECTORS>().iter().enumerate() {
        let bias = load_i32(bias);
        for sums in &mut sums {
            sums[v] = bias;
        }
    }
    for kernel_row in 0..row.kernel_rows() {
        let window = row.window::<16>(kernel_row, column);
        let weights = row
            .kernel_row_weights(kernel_row)
            .as_chunks::<16>()
            .0
            .as_chunks::<VECTORS>()
            .0;
        for (step, [first, second, third, fourth]) in
            (0..window.n_steps).zip(weights.as_chunks::<4>().0)
        {
            let mut activations = [vdupq_n_s8(0); POSITIONS];
            for (position, activations) in activations.iter_mut().enumerate() {
                *activations = load_offset(window.at(position, step));
            }
            add_lane::<VECTORS, 0>(&mut sums, activations, first);
            add_lane::<VECTORS, 1>(&mut sums, activations, second);
            add_lane::<VECTORS, 2>(&mut sums, activations, third);
            add_lane::<VECTORS, 3>(&mut sums, activations, fourth);
        }
    }
    let scales = row.scale::<4, VECTORS>();
    if IS_POOLED {
        let [a, b, c, d] = sums;
        let pixel = row.pixel::<4, VECTORS>(column, out[0]);
        for (v, (bytes, scale)) in pixel.iter_mut().zip(scales).enumerate() {
            let highest = vmaxq_s32(vmaxq_s32(a[v], b[v]), vmaxq_s32(c[v], d[v]));
            *bytes = requantize(highest, scale);
        }
        return;
    }
    for (position, sums) in sums.into_iter().enumerate() {
        let pixel = row.pixel::<4, VECTORS>(2 * column + position % 2, out[position / 2]);
        for ((bytes, scale), sum) in pixel.iter_mut().zip(scales).zip(sums) {
            *bytes = requantize_to(sum, scale, levels);
        }
    }
}

/// Four activations of each position, those of lane `LANE`, times their weights.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn add_lane<const VECTORS: usize, const LANE: i32>(
    sums: &mut [[int32x4_t; VECTORS]; POSITIONS],
    activations: [int8x16_t; POSITIONS],
    weights: &[[u8; 16]; VECTORS],
) {
    for (v, weights) in weights.iter().enumerate() {
        let weights = load_weights(weights);
        for (sums, activations) in sums.iter_mut().zip(activations) {
            sums[v] = sdot_lane::<LANE>(sums[v], weights, activations);
        }
    }
}

/// See [`super::dense`]. The sum of the weights is taken on the way, because dense weights lie as in the model file.
#[target_feature(enable = "neon,dotprod")]
pub(super) fn dense(activations: &[u8], weights: &[u8], sums: &mut [i32]) {
    let ones = vdupq_n_s8(1);
    let (vectors, rest) = activations.as_chunks::<16>();
    for (total, weights) in sums.iter_mut().zip(weights.chunks_exact(activations.len())) {
        let (weights, weights_rest) = weights.as_chunks::<16>();
        let mut sum = vdupq_n_s32(0);
        let mut weight_sum = vdupq_n_s32(0);
        for (activations, weights) in vectors.iter().zip(weights) {
            let weights = load_weights(weights);
            sum = sdot(sum, weights, load_offset(activations));
            weight_sum = sdot(weight_sum, weights, ones);
        }
        *total = vaddvq_s32(sum) + 128 * vaddvq_s32(weight_sum) + scalar::dot(rest, weights_rest);
    }
}

/// `sum[i] + weights[4 i .. 4 i + 4] . activations[4 LANE .. 4 LANE + 4]` for the four lanes.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn sdot_lane<const LANE: i32>(
    mut sum: int32x4_t,
    weights: int8x16_t,
    activations: int8x16_t,
) -> int32x4_t {
    // SAFETY: the instruction touches registers only, and this function's target features say that the CPU has it.
    unsafe {
        asm!(
            "sdot {sum:v}.4s, {weights:v}.16b, {activations:v}.4b[{lane}]",
            sum = inout(vreg) sum, weights = in(vreg) weights, activations = in(vreg) activations, lane = const LANE,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    sum
}

/// `sum[i] + weights[4 i .. 4 i + 4] . activations[4 i .. 4 i + 4]` for the four lanes.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn sdot(mut sum: int32x4_t, weights: int8x16_t, activations: int8x16_t) -> int32x4_t {
    // SAFETY: the instruction touches registers only, and this function's target features say that the CPU has it.
    unsafe {
        asm!(
            "sdot {sum:v}.4s, {weights:v}.16b, {activations:v}.16b",
            sum = inout(vreg) sum, weights = in(vreg) weights, activations = in(vreg) activations,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    sum
}
