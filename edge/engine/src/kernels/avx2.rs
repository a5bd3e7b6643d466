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
    __m128i, __m256, __m256i, _mm_packus_epi16, _mm_packus_epi32, _mm_storeu_si64,
    _mm256_add_epi16, _mm256_add_epi32, _mm256_and_si256, _mm256_castsi256_si128,
    _mm256_cvtepi8_epi16, _mm256_cvtepi32_ps, _mm256_cvtepu8_epi16, _mm256_cvtps_epi32,
    _mm256_extracti128_si256, _mm256_loadu_ps, _mm256_madd_epi16, _mm256_max_epi32, _mm256_max_ps,
    _mm256_min_ps, _mm256_mul_ps, _mm256_set1_epi16, _mm256_set1_epi32, _mm256_set1_ps,
    _mm256_setzero_ps, _mm256_setzero_si256, _mm256_srai_epi32, _mm256_srli_epi16,
    _mm256_storeu_si256, _mm256_sub_epi16, _mm256_sub_epi32,
};

use std::arch::asm;
use std::hint::black_box;

use super::tile256::tile_256;
use super::winograd::{CHANNELS, FREQUENCIES, SIDE, WinogradScratch, parts, window_parts};
use super::{ConvRow, Geometry, Levels, POSITIONS, WeightFormat, WinogradRow, scalar};

/// 8 channels a vector, three vectors a block, four activations a step.
pub(super) const GEOMETRY: Geometry = Geometry {
    lanes: 8,
    max_vectors: 3,
    group: 4,
    step: 4,
    weight: WeightFormat::EvenOddWords,
    is_offset: false,
};

tile_256!("avx2", 64, add_products);

/// Four activations of a position times their weights, added to its sums.
///
/// Assembly for full blocks, because the compiler, left alone, moves loads to the front and then has to spill sums.
#[inline]
#[target_feature(enable = "avx2")]
fn add_products<const VECTORS: usize>(
    sums: &mut [__m256i; VECTORS],
    quad: &[u8; 4],
    weights: &[[u8; 64]; VECTORS],
) {
    let low_bytes = _mm256_set1_epi16(0xff);
    match sums.as_mut_slice() {
        // SAFETY: the references cover the 4 and the 192 bytes that are read, and the CPU has the instructions.
        [a, b, c] => unsafe {
            asm!(
                "vpbroadcastd {even}, dword ptr [{quad}]",
                "vpsrlw {odd}, {even}, 8",
                "vpand {even}, {even}, {low_bytes}",
                "vpmaddwd {product}, {even}, [{weights}]",
                "vpaddd {a}, {a}, {product}",
                "vpmaddwd {product}, {odd}, [{weights} + 32]",
                "vpaddd {a}, {a}, {product}",
                "vpmaddwd {product}, {even}, [{weights} + 64]",
                "vpaddd {b}, {b}, {product}",
                "vpmaddwd {product}, {odd}, [{weights} + 96]",
                "vpaddd {b}, {b}, {product}",
                "vpmaddwd {even}, {even}, [{weights} + 128]",
                "vpaddd {c}, {c}, {even}",
                "vpmaddwd {odd}, {odd}, [{weights} + 160]",
                "vpaddd {c}, {c}, {odd}",
                quad = in(reg) quad.as_ptr(), weights = in(reg) weights.as_ptr(), low_bytes = in(ymm_reg) low_bytes,
                even = out(ymm_reg) _, odd = out(ymm_reg) _, product = out(ymm_reg) _,
                a = inout(ymm_reg) *a, b = inout(ymm_reg) *b, c = inout(ymm_reg) *c,
                options(readonly, nostack, preserves_flags)
            );
        },
        _ => {
            let activations = _mm256_set1_epi32(i32::from_le_bytes(*quad));
            let even = _mm256_and_si256(activations, low_bytes);
            let odd = _mm256_srli_epi16::<8>(activations);
            for (sum, weights) in sums.iter_mut().zip(weights) {
                let [even_weights, odd_weights] = weights.as_chunks().0 else {
                    continue;
                };
                *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(even, load(even_weights)));
                *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(odd, load(odd_weights)));
            }
        }
    }
}

/// Windows of a full tile of products.
const WINDOWS: usize = 6;

/// Channels of a block of a Winograd layer: two vectors.
pub(super) const WINOGRAD_CHANNELS: usize = 16;

/// See [`super::winograd_row`].
#[target_feature(enable = "avx2")]
pub(super) fn winograd_row(row: &WinogradRow<'_>, scratch: &mut WinogradScratch, out: &mut [u8]) {
    let layer = row.layer;
    for windows in window_parts(row.n_columns) {
        let n = windows.len();
        let activations = &mut scratch.activations[..FREQUENCIES * n * layer.n_inputs];
        transform_activations(row, windows.clone(), activations);
        let sums = &mut scratch.sums.as_chunks_mut::<WINOGRAD_CHANNELS>().0[..FREQUENCIES * n];
        for block in &layer.blocks {
            let weights = block.weights.as_chunks::<32>().0.as_chunks::<2>().0;
            let frequencies = activations
                .chunks_exact(n * layer.n_inputs)
                .zip(weights.chunks_exact(layer.n_inputs / 2));
            for ((activations, weights), sums) in frequencies.zip(sums.chunks_exact_mut(n)) {
                for part in parts(n, WINDOWS) {
                    let activations =
                        &activations[part.start * layer.n_inputs..part.end * layer.n_inputs];
                    products_of(activations, weights, &mut sums[part]);
                }
            }
            for (index, column) in windows.clone().enumerate() {
                let pixel =
                    &mut out[column * row.out_stride + block.first_channel..][..WINOGRAD_CHANNELS];
                for (v, bytes) in pixel.as_chunks_mut::<8>().0.iter_mut().enumerate() {
                    let bias = load_i32(&block.bias.as_chunks().0[v]);
                    let mut window = combine(sums, index, n, v);
                    for sum in &mut window {
                        *sum = _mm256_add_epi32(*sum, bias);
                    }
                    pool_and_store(window, &block.scale.as_chunks().0[v], bytes);
                }
            }
        }
    }
}

/// `B' d B` of `windows`, for all input channels, into `out`, `[frequency][window][input]`; sixteen channels at a time.
///
/// # Panics
///
/// Where `rows` or `out` are too short.
#[target_feature(enable = "avx2")]
pub(super) fn transform_activations(
    row: &WinogradRow<'_>,
    windows: std::ops::Range<usize>,
    out: &mut [i16],
) {
    let n_inputs = row.layer.n_inputs;
    let n_parts = n_inputs / CHANNELS;
    let frequency = windows.len() * n_parts;
    let out = &mut out.as_chunks_mut::<CHANNELS>().0[..FREQUENCIES * frequency];
    for (index, window) in windows.enumerate() {
        let mut pixels: [[&[[u8; CHANNELS]]; SIDE]; SIDE] = [[&[]; SIDE]; SIDE];
        for (pixels, row_bytes) in pixels.iter_mut().zip(row.rows) {
            for (column, pixel) in pixels.iter_mut().enumerate() {
                let bytes = &row_bytes[(2 * window + column) * row.column_bytes..][..n_inputs];
                *pixel = &bytes.as_chunks().0[..n_parts];
            }
        }
        for part in 0..n_parts {
            let mut lines = [[_mm256_setzero_si256(); SIDE]; SIDE];
            for (line, [a, b, c, d]) in lines.iter_mut().zip(&pixels) {
                *line = transform_line(
                    widen(&a[part]),
                    widen(&b[part]),
                    widen(&c[part]),
                    widen(&d[part]),
                );
            }
            let [a, b, c, d] = lines;
            for column in 0..SIDE {
                let values = transform_line(a[column], b[column], c[column], d[column]);
                for (row, value) in values.into_iter().enumerate() {
                    let plane = (row * SIDE + column) * frequency;
                    store_i16(&mut out[plane + index * n_parts + part], value);
                }
            }
        }
    }
}

/// A line of B'.
#[inline]
#[target_feature(enable = "avx2")]
fn transform_line(a: __m256i, b: __m256i, c: __m256i, d: __m256i) -> [__m256i; SIDE] {
    [
        _mm256_sub_epi16(a, c),
        _mm256_add_epi16(b, c),
        _mm256_sub_epi16(c, b),
        _mm256_sub_epi16(b, d),
    ]
}

/// `A' m A / 4` of one window: the four sums of 8 channels, less bias.
#[inline]
#[target_feature(enable = "avx2")]
fn combine(
    sums: &[[i32; WINOGRAD_CHANNELS]],
    first: usize,
    stride: usize,
    v: usize,
) -> [__m256i; POSITIONS] {
    let mut columns = [[_mm256_setzero_si256(); 2]; SIDE];
    for (column, out) in columns.iter_mut().enumerate() {
        let mut line = [_mm256_setzero_si256(); SIDE];
        for (row, value) in line.iter_mut().enumerate() {
            let lanes = sums[first + (row * SIDE + column) * stride]
                .as_chunks::<8>()
                .0;
            *value = load_i32(&lanes[v]);
        }
        *out = combine_line(line);
    }
    let [a, b, c, d] = columns;
    let [top_left, top_right] = combine_line([a[0], b[0], c[0], d[0]]);
    let [bottom_left, bottom_right] = combine_line([a[1], b[1], c[1], d[1]]);
    [
        _mm256_srai_epi32::<2>(top_left),
        _mm256_srai_epi32::<2>(top_right),
        _mm256_srai_epi32::<2>(bottom_left),
        _mm256_srai_epi32::<2>(bottom_right),
    ]
}

/// A line of A'.
#[inline]
#[target_feature(enable = "avx2")]
fn combine_line([a, b, c, d]: [__m256i; SIDE]) -> [__m256i; 2] {
    [
        _mm256_add_epi32(_mm256_add_epi32(a, b), c),
        _mm256_sub_epi32(_mm256_sub_epi32(b, c), d),
    ]
}

/// Sums of products of up to [`WINDOWS`] windows at one frequency.
#[target_feature(enable = "avx2")]
fn products_of(
    activations: &[i16],
    weights: &[[[u8; 32]; 2]],
    sums: &mut [[i32; WINOGRAD_CHANNELS]],
) {
    match sums.len() {
        1 => products::<1>(activations, weights, sums),
        2 => products::<2>(activations, weights, sums),
        3 => products::<3>(activations, weights, sums),
        4 => products::<4>(activations, weights, sums),
        5 => products::<5>(activations, weights, sums),
        6 => products::<6>(activations, weights, sums),
        n => panic!("{n} windows do not fit the registers"),
    }
}

/// `sums[window][channel] = sum over pairs of activations x weights`, 2 x `N` registers of sums.
#[target_feature(enable = "avx2")]
fn products<const N: usize>(
    activations: &[i16],
    weights: &[[[u8; 32]; 2]],
    sums: &mut [[i32; WINOGRAD_CHANNELS]],
) {
    let mut windows = activations.as_chunks::<2>().0.chunks_exact(weights.len());
    let windows: [&[[i16; 2]]; N] =
        std::array::from_fn(|_| windows.next().expect("activations of every window"));
    let mut registers = [[_mm256_setzero_si256(); 2]; N];
    for (step, [first, second]) in weights.iter().enumerate() {
        let (first, second) = (load(first), load(second));
        for ([sum, other], pairs) in registers.iter_mut().zip(&windows) {
            // SAFETY: every window has as many pairs as there are weights, and `step` counts weights.
            let pair: &[i16; 2] = unsafe { pairs.get_unchecked(step) };
            // SAFETY: the reference covers the 4 bytes that are read; nothing else is touched, and the CPU has the instructions.
            unsafe {
                asm!(
                    "vpbroadcastd {a}, dword ptr [{pair}]",
                    "vpmaddwd {product}, {a}, {first}",
                    "vpmaddwd {a}, {a}, {second}",
                    "vpaddd {sum}, {sum}, {product}",
                    "vpaddd {other}, {other}, {a}",
                    pair = in(reg) pair.as_ptr(), a = out(ymm_reg) _, product = out(ymm_reg) _,
                    first = in(ymm_reg) first, second = in(ymm_reg) second,
                    sum = inout(ymm_reg) *sum, other = inout(ymm_reg) *other,
                    options(readonly, nostack, preserves_flags)
                );
            }
        }
    }
    for (sums, registers) in sums.iter_mut().zip(registers) {
        for (sums, register) in sums.as_chunks_mut::<8>().0.iter_mut().zip(registers) {
            store_i32(sums, register);
        }
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
    let scaled = _mm256_mul_ps(_mm256_cvtepi32_ps(sums), load_f32(scale));
    let clamped = _mm256_min_ps(
        _mm256_max_ps(scaled, _mm256_setzero_ps()),
        _mm256_set1_ps(255.0),
    );
    pack_bytes(_mm256_cvtps_epi32(clamped))
}

/// Eight sums requantized with their levels, see [`super::requantize_to`], and stored.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn requantize_and_store(
    sums: __m256i,
    scale: &[f32; 8],
    levels: Levels,
    bytes: &mut [u8; 8],
) {
    let scaled = _mm256_mul_ps(_mm256_cvtepi32_ps(sums), load_f32(scale));
    let (below, above) = (_mm256_set1_ps(-512.0), _mm256_set1_ps(512.0));
    let rounded = _mm256_cvtps_epi32(_mm256_min_ps(_mm256_max_ps(scaled, below), above));
    let shifted = _mm256_add_epi32(rounded, _mm256_set1_epi32(levels.zero.into()));
    let raised = _mm256_max_epi32(shifted, _mm256_set1_epi32(levels.lowest.into()));
    store(bytes, pack_bytes(raised));
}

/// Eight numbers, saturated to u8, in the low half.
#[inline]
#[target_feature(enable = "avx2")]
fn pack_bytes(numbers: __m256i) -> __m128i {
    let words = _mm_packus_epi32(
        _mm256_castsi256_si128(numbers),
        _mm256_extracti128_si256::<1>(numbers),
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
fn load_f32(values: &[f32; 8]) -> __m256 {
    // SAFETY: the reference covers the 32 bytes that are read.
    unsafe { _mm256_loadu_ps(values.as_ptr()) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn store(bytes: &mut [u8; 8], value: __m128i) {
    // SAFETY: the reference covers the 8 bytes that are written.
    unsafe { _mm_storeu_si64(bytes.as_mut_ptr(), value) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn store_i32(values: &mut [i32; 8], sums: __m256i) {
    // SAFETY: the reference covers the 32 bytes that are written.
    unsafe { _mm256_storeu_si256(values.as_mut_ptr().cast(), sums) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn store_i16(values: &mut [i16; CHANNELS], vector: __m256i) {
    // SAFETY: the reference covers the 32 bytes that are written.
    unsafe { _mm256_storeu_si256(values.as_mut_ptr().cast(), vector) }
}

/// Sixteen u8 as 16-bit numbers.
#[inline]
#[target_feature(enable = "avx2")]
fn widen(bytes: &[u8; CHANNELS]) -> __m256i {
    _mm256_cvtepu8_epi16(load_half(bytes))
}
