//! x86-64 with AVX2: activations and weights widened to 16 bit, `vpmaddwd` and an addition.
//!
//! `vpmaddubsw` would be faster but saturates, so it is not exact. Weights are widened when they are packed. Activations stay bytes:
//! of four broadcast ones a mask keeps the even, a shift the odd, and the weights are packed in that order.
//! A tile is one 2 x 2 window by 24 output channels: 12 of the 16 registers hold sums.
#![allow(
    unsafe_code,
    reason = "loads and stores of whole vectors, through references to arrays of their size"
)]

use std::arch::x86_64::{
    __m128i, __m256i, _mm_packus_epi16, _mm_packus_epi32, _mm_storeu_si64, _mm256_add_epi32,
    _mm256_and_si256, _mm256_castsi256_si128, _mm256_cvtepi8_epi16, _mm256_cvtepi32_ps,
    _mm256_cvtepu8_epi16, _mm256_cvtps_epi32, _mm256_extracti128_si256, _mm256_loadu_ps,
    _mm256_madd_epi16, _mm256_max_epi32, _mm256_max_ps, _mm256_min_ps, _mm256_mul_ps,
    _mm256_set1_epi16, _mm256_set1_epi32, _mm256_set1_ps, _mm256_setzero_ps, _mm256_setzero_si256,
    _mm256_srli_epi16, _mm256_storeu_si256,
};

use std::hint::black_box;

use super::{ConvRow, Geometry, POSITIONS, WeightFormat, scalar};

/// 8 channels a vector, three vectors a block, four activations a step.
pub(super) const GEOMETRY: Geometry = Geometry {
    lanes: 8,
    max_vectors: 3,
    group: 4,
    step: 4,
    weight: WeightFormat::EvenOddWords,
    is_offset: false,
};

/// See [`super::conv_row`].
#[target_feature(enable = "avx2")]
pub(super) fn conv_row(row: &ConvRow<'_>, out: &mut [u8]) {
    match row.bias.len() {
        8 => (0..row.n_columns).for_each(|column| tile::<1>(row, column, out)),
        16 => (0..row.n_columns).for_each(|column| tile::<2>(row, column, out)),
        24 => (0..row.n_columns).for_each(|column| tile::<3>(row, column, out)),
        n => panic!("a block of {n} channels was not packed for this kernel"),
    }
}

/// One pooled column of `VECTORS` x 8 channels.
#[target_feature(enable = "avx2")]
fn tile<const VECTORS: usize>(row: &ConvRow<'_>, column: usize, out: &mut [u8]) {
    let mut sums = [[_mm256_setzero_si256(); VECTORS]; POSITIONS];
    for (v, bias) in row.bias::<8, VECTORS>().iter().enumerate() {
        let bias = load_i32(bias);
        for sums in &mut sums {
            sums[v] = bias;
        }
    }
    let low_bytes = _mm256_set1_epi16(0xff);
    for kernel_row in 0..row.kernel_rows() {
        let windows = row.windows::<1, 4>(kernel_row, column);
        let weights = row
            .kernel_row_weights(kernel_row)
            .as_chunks::<32>()
            .0
            .as_chunks::<2>()
            .0;
        for (step, weights) in (0..windows.n_steps).zip(weights.as_chunks::<VECTORS>().0) {
            for (position, sums) in sums.iter_mut().enumerate() {
                let activations =
                    _mm256_set1_epi32(i32::from_le_bytes(*windows.at(position, 0, step)));
                let even = _mm256_and_si256(activations, low_bytes);
                let odd = _mm256_srli_epi16::<8>(activations);
                for (sum, [even_weights, odd_weights]) in sums.iter_mut().zip(weights) {
                    *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(even, load(even_weights)));
                    *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(odd, load(odd_weights)));
                }
            }
        }
    }
    let [a, b, c, d] = sums;
    let pixel = row.pixel::<8, VECTORS>(column, out);
    for (v, (bytes, scale)) in pixel.iter_mut().zip(row.scale::<8, VECTORS>()).enumerate() {
        pool_and_store([a[v], b[v], c[v], d[v]], scale, bytes);
    }
}

/// See [`super::dense`].
#[target_feature(enable = "avx2")]
pub(super) fn dense(activations: &[u8], weights: &[u8], sums: &mut [i32]) {
    for (sum, weights) in sums.iter_mut().zip(weights.chunks_exact(activations.len())) {
        *sum = neuron(activations, weights);
    }
}

#[target_feature(enable = "avx2")]
fn neuron(activations: &[u8], weights: &[u8]) -> i32 {
    let (vectors, rest) = activations.as_chunks::<16>();
    let (weight_vectors, weight_rest) = weights.as_chunks::<16>();
    let mut sums = [_mm256_setzero_si256(); 4];
    for (activations, weights) in vectors.chunks(4).zip(weight_vectors.chunks(4)) {
        for ((sum, activations), weights) in sums.iter_mut().zip(activations).zip(weights) {
            let activations = _mm256_cvtepu8_epi16(load_half(activations));
            let weights = _mm256_cvtepi8_epi16(load_half(weights));
            *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(activations, weights));
        }
    }
    let [a, b, c, d] = sums;
    let sum = _mm256_add_epi32(_mm256_add_epi32(a, b), _mm256_add_epi32(c, d));
    sum_of_lanes(sum) + scalar::dot(rest, weight_rest)
}

/// Multiplies in 12 registers, without loads and additions; returns the multiply-accumulates done.
#[target_feature(enable = "avx2")]
pub(super) fn peak(repetitions: u32) -> u32 {
    const SUMS: u32 = 12;
    let ones = black_box(_mm256_set1_epi16(1));
    let mut sums = [ones; SUMS as usize];
    for _ in 0..repetitions {
        for sum in &mut sums {
            *sum = _mm256_madd_epi16(*sum, ones);
        }
    }
    black_box(sums);
    repetitions * SUMS * 16
}

/// The sums of a 2 x 2 window pooled, requantized and stored.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn pool_and_store(
    [a, b, c, d]: [__m256i; POSITIONS],
    scale: &[f32; 8],
    bytes: &mut [u8; 8],
) {
    let highest = _mm256_max_epi32(_mm256_max_epi32(a, b), _mm256_max_epi32(c, d));
    store(bytes, requantize(highest, scale));
}

/// Eight sums to eight u8 in the low half, see [`shared::quantize::requantize`].
#[inline]
#[target_feature(enable = "avx2")]
fn requantize(sums: __m256i, scale: &[f32; 8]) -> __m128i {
    // SAFETY: the reference covers the 32 bytes that are read.
    let scale = unsafe { _mm256_loadu_ps(scale.as_ptr()) };
    let scaled = _mm256_mul_ps(_mm256_cvtepi32_ps(sums), scale);
    let clamped = _mm256_min_ps(
        _mm256_max_ps(scaled, _mm256_setzero_ps()),
        _mm256_set1_ps(255.0),
    );
    let rounded = _mm256_cvtps_epi32(clamped);
    let words = _mm_packus_epi32(
        _mm256_castsi256_si128(rounded),
        _mm256_extracti128_si256::<1>(rounded),
    );
    _mm_packus_epi16(words, words)
}

/// Sum of the eight lanes.
#[target_feature(enable = "avx2")]
pub(super) fn sum_of_lanes(sums: __m256i) -> i32 {
    let mut lanes = [0_i32; 8];
    // SAFETY: the array has the 32 bytes that are written.
    unsafe { _mm256_storeu_si256(lanes.as_mut_ptr().cast(), sums) };
    lanes.iter().sum()
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn load(bytes: &[u8; 32]) -> __m256i {
    // SAFETY: the reference covers the 32 bytes that are read.
    unsafe { bytes.as_ptr().cast::<__m256i>().read_unaligned() }
}

#[inline]
#[target_feature(enable = "avx2")]
fn load_half(bytes: &[u8; 16]) -> __m128i {
    // SAFETY: the reference covers the 16 bytes that are read.
    unsafe { bytes.as_ptr().cast::<__m128i>().read_unaligned() }
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn load_i32(values: &[i32; 8]) -> __m256i {
    // SAFETY: the reference covers the 32 bytes that are read.
    unsafe { values.as_ptr().cast::<__m256i>().read_unaligned() }
}

#[inline]
#[target_feature(enable = "avx2")]
fn store(bytes: &mut [u8; 8], value: __m128i) {
    // SAFETY: the reference covers the 8 bytes that are written.
    unsafe { _mm_storeu_si64(bytes.as_mut_ptr(), value) }
}
