//! x86-64 with AVX-512 VNNI: `vpdpbusd` multiplies 64 u8 x s8 pairs and adds them to 16 sums in one instruction.
//!
//! A tile is the 2 x 2 windows of three pooled columns, 12 positions, by 32 output channels: 24 of the 32 registers hold sums, two
//! hold weights, the others a broadcast of four activations. Each step of four activations costs 2 weight loads and 12 broadcasts
//! for 24 multiplications, so the multipliers are the limit. Sums never leave the registers before they are pooled and
//! requantized.
#![allow(
    unsafe_code,
    reason = "loads and stores of whole vectors, through references to arrays of their size"
)]

use std::arch::x86_64::{
    __m128i, __m512, __m512i, _MM_FROUND_NO_EXC, _MM_FROUND_TO_NEAREST_INT, _mm_storeu_si128,
    _mm512_cvt_roundps_epi32, _mm512_cvtepi32_ps, _mm512_cvtusepi32_epi8, _mm512_dpbusd_epi32,
    _mm512_loadu_ps, _mm512_loadu_si512, _mm512_max_epi32, _mm512_mul_ps, _mm512_reduce_add_epi32,
    _mm512_set1_epi32, _mm512_setzero_si512,
};

use std::arch::asm;
use std::hint::black_box;

use super::{ConvRow, Geometry, POSITIONS, WeightFormat, scalar};

/// 16 channels a vector, two vectors a block, four activations a step.
pub(super) const GEOMETRY: Geometry = Geometry {
    lanes: 16,
    max_vectors: 2,
    group: 4,
    step: 4,
    weight: WeightFormat::Bytes,
    is_offset: false,
};

/// Pooled columns of a full tile.
const COLUMNS: usize = 3;

/// Patches of an image of three channels, see `patches.rs`.
const PATCH_BYTES: usize = 36;

/// Bytes of one that a position covers, padded to whole steps.
const PATCH_ROW_BYTES: usize = 28;

/// Neurons of a dense layer at a time: each keeps one stream of weights and one register of sums.
const NEURONS: usize = 8;

/// See [`super::conv_row`].
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub(super) fn conv_row(row: &ConvRow<'_>, out: &mut [u8]) {
    match row.bias.len() {
        16 => columns::<1>(row, out),
        32 => columns::<2>(row, out),
        n => panic!("a block of {n} channels was not packed for this kernel"),
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn columns<const VECTORS: usize>(row: &ConvRow<'_>, out: &mut [u8]) {
    let is_patch = row.kernel_rows() == 1
        && row.column_bytes == PATCH_BYTES
        && row.kernel_row_bytes == PATCH_ROW_BYTES;
    match is_patch {
        true => columns_of::<VECTORS, true>(row, out),
        false => columns_of::<VECTORS, false>(row, out),
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn columns_of<const VECTORS: usize, const IS_PATCH: bool>(row: &ConvRow<'_>, out: &mut [u8]) {
    let full = row.n_columns / COLUMNS * COLUMNS;
    for first in (0..full).step_by(COLUMNS) {
        tile::<VECTORS, COLUMNS, IS_PATCH>(row, first, out);
    }
    match row.n_columns - full {
        0 => {}
        1 => tile::<VECTORS, 1, IS_PATCH>(row, full, out),
        _ => tile::<VECTORS, 2, IS_PATCH>(row, full, out),
    }
}

/// `COLUMNS` pooled columns of `VECTORS` x 16 channels. Of patches the compiler knows all distances, so that it unrolls the steps and leaves
/// little between the multiplications of one tile and the next.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn tile<const VECTORS: usize, const COLUMNS: usize, const IS_PATCH: bool>(
    row: &ConvRow<'_>,
    first: usize,
    out: &mut [u8],
) {
    let (kernel_rows, column_bytes, kernel_row_bytes) = match IS_PATCH {
        true => (1, PATCH_BYTES, PATCH_ROW_BYTES),
        false => (row.kernel_rows(), row.column_bytes, row.kernel_row_bytes),
    };
    let n_steps = kernel_row_bytes / 4;
    let reach = (2 * COLUMNS - 1)
        .checked_mul(column_bytes)
        .and_then(|start| start.checked_add(4 * n_steps))
        .expect("no row is longer than the address space");
    let mut sums = [[[_mm512_setzero_si512(); VECTORS]; COLUMNS]; POSITIONS];
    for (v, bias) in row.bias::<16, VECTORS>().iter().enumerate() {
        let bias = load_i32(bias);
        for sums in sums.as_flattened_mut() {
            sums[v] = bias;
        }
    }
    let weights = row.weights.as_chunks::<64>().0.as_chunks::<VECTORS>().0;
    for kernel_row in 0..kernel_rows {
        let top = &row.rows[kernel_row][2 * first * column_bytes..][..reach];
        let bottom = &row.rows[kernel_row + 1][2 * first * column_bytes..][..reach];
        let weights = &weights[kernel_row * n_steps..][..n_steps];
        for (step, weights) in weights.iter().enumerate() {
            let mut w = [_mm512_setzero_si512(); VECTORS];
            for (w, bytes) in w.iter_mut().zip(weights) {
                *w = load(bytes);
            }
            for (position, sums) in sums.iter_mut().enumerate() {
                let line = if position < 2 { top } else { bottom };
                for (column, sums) in sums.iter_mut().enumerate() {
                    let at = (2 * column + position % 2) * column_bytes + 4 * step;
                    // SAFETY: `step` is below `n_steps`, so `at + 4` is at most `reach`, the length of the line.
                    let quad = unsafe { quad(line, at) };
                    multiply_add(quad, w, sums);
                }
            }
        }
    }
    let [a, b, c, d] = sums;
    for column in 0..COLUMNS {
        let pixel = row.pixel::<16, VECTORS>(first + column, out);
        for (v, (bytes, scale)) in pixel.iter_mut().zip(row.scale::<16, VECTORS>()).enumerate() {
            let top = _mm512_max_epi32(a[column][v], b[column][v]);
            let bottom = _mm512_max_epi32(c[column][v], d[column][v]);
            store(
                bytes,
                requantize(_mm512_max_epi32(top, bottom), load_f32(scale)),
            );
        }
    }
}

/// Four activations from a place on, without a check.
///
/// # Safety
///
/// `at + 4` is at most the length of the line.
#[inline]
unsafe fn quad(line: &[u8], at: usize) -> &[u8; 4] {
    // SAFETY: the caller says that the place lies in the line.
    let first = unsafe { line.as_ptr().add(at) };
    // SAFETY: the caller says that four bytes follow, which live as long as the line.
    unsafe { &*first.cast() }
}

/// `sums[v] + quad x weights[v]` for each vector, lane by lane.
///
/// Assembly for two vectors because the compiler, left alone, moves the broadcasts of all positions to the front and then has to spill sums.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
fn multiply_add<const VECTORS: usize>(
    quad: &[u8; 4],
    weights: [__m512i; VECTORS],
    sums: &mut [__m512i; VECTORS],
) {
    match (weights.as_slice(), sums.as_mut_slice()) {
        // SAFETY: the reference covers the 4 bytes that are read; nothing else is touched, and the CPU has the instructions.
        (&[first, second], [sum, other]) => unsafe {
            asm!(
                "vpbroadcastd {a}, dword ptr [{quad}]",
                "vpdpbusd {sum}, {a}, {first}",
                "vpdpbusd {other}, {a}, {second}",
                quad = in(reg) quad.as_ptr(), a = out(zmm_reg) _, first = in(zmm_reg) first, second = in(zmm_reg) second,
                sum = inout(zmm_reg) *sum, other = inout(zmm_reg) *other,
                options(readonly, nostack, preserves_flags)
            );
        },
        _ => {
            let activations = _mm512_set1_epi32(i32::from_le_bytes(*quad));
            for (sum, weights) in sums.iter_mut().zip(weights) {
                *sum = _mm512_dpbusd_epi32(*sum, activations, weights);
            }
        }
    }
}

/// See [`super::dense`].
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub(super) fn dense(activations: &[u8], weights: &[u8], sums: &mut [i32]) {
    let n = activations.len();
    let full = sums.len() / NEURONS * NEURONS;
    for first in (0..full).step_by(NEURONS) {
        let weights = &weights[first * n..][..NEURONS * n];
        sums[first..][..NEURONS].copy_from_slice(&neurons::<NEURONS>(activations, weights));
    }
    for (sum, weights) in sums.iter_mut().zip(weights.chunks_exact(n)).skip(full) {
        [*sum] = neurons::<1>(activations, weights);
    }
}

/// `N` neurons side by side, so that several streams of weights are under way.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn neurons<const N: usize>(activations: &[u8], weights: &[u8]) -> [i32; N] {
    let n = activations.len();
    let (vectors, rest) = activations.as_chunks::<64>();
    let mut rows: [(&[[u8; 64]], &[u8]); N] = [(&[], &[]); N];
    for (row, weights) in rows.iter_mut().zip(weights.chunks_exact(n)) {
        let (vectors_of_row, rest) = weights.as_chunks::<64>();
        *row = (&vectors_of_row[..vectors.len()], rest);
    }
    let mut sums = [_mm512_setzero_si512(); N];
    for (index, activations) in vectors.iter().enumerate() {
        let activations = load(activations);
        for (sum, (weights, _)) in sums.iter_mut().zip(&rows) {
            *sum = _mm512_dpbusd_epi32(*sum, activations, load(&weights[index]));
        }
    }
    let mut totals = [0; N];
    for ((total, sum), (_, weights)) in totals.iter_mut().zip(sums).zip(rows) {
        *total = _mm512_reduce_add_epi32(sum) + scalar::dot(rest, weights);
    }
    totals
}

/// Multiplies in 24 registers, as a tile does, without loads; returns the multiply-accumulates done.
#[target_feature(enable = "avx512f,avx512vnni")]
pub(super) fn peak(repetitions: u32) -> u32 {
    const SUMS: u32 = 24;
    let ones = black_box(_mm512_set1_epi32(0x0101_0101));
    let mut sums = [_mm512_setzero_si512(); SUMS as usize];
    for _ in 0..repetitions {
        for sum in &mut sums {
            *sum = _mm512_dpbusd_epi32(*sum, ones, ones);
        }
    }
    black_box(sums);
    repetitions * SUMS * 64
}

/// Sixteen sums to sixteen u8, see [`shared::quantize::requantize`]. Raising negative sums to 0 first is the same, because the scale is
/// positive; then the conversion saturates at 255, also from the 2^31 that stands for numbers beyond i32.
#[inline]
#[target_feature(enable = "avx512f")]
fn requantize(sums: __m512i, scale: __m512) -> __m128i {
    let positive = _mm512_max_epi32(sums, _mm512_setzero_si512());
    let scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(positive), scale);
    let rounded =
        _mm512_cvt_roundps_epi32::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(scaled);
    _mm512_cvtusepi32_epi8(rounded)
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load(bytes: &[u8; 64]) -> __m512i {
    // SAFETY: the reference covers the 64 bytes that are read.
    unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load_i32(values: &[i32; 16]) -> __m512i {
    // SAFETY: the reference covers the 64 bytes that are read.
    unsafe { _mm512_loadu_si512(values.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load_f32(values: &[f32; 16]) -> __m512 {
    // SAFETY: the reference covers the 64 bytes that are read.
    unsafe { _mm512_loadu_ps(values.as_ptr()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store(bytes: &mut [u8; 16], value: __m128i) {
    // SAFETY: the reference covers the 16 bytes that are written.
    unsafe { _mm_storeu_si128(bytes.as_mut_ptr().cast(), value) }
}
