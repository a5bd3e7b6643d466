//! x86-64 with AVX-512F: 16 lanes, 32 registers. A tile of products is 6 tiles by 64 channels: 24 sums, 4 weights, a broadcast activation.
#![allow(
    unsafe_code,
    reason = "loads and stores of whole vectors, through references to arrays of their size"
)]

use std::arch::x86_64::{
    __m512, _MM_HINT_T0, _mm_prefetch, _mm512_add_ps, _mm512_fmadd_ps, _mm512_loadu_ps,
    _mm512_max_ps, _mm512_mul_ps, _mm512_set1_ps, _mm512_setzero_ps, _mm512_storeu_ps,
    _mm512_sub_ps,
};
use std::hint::black_box;

use super::body::float_body;
use super::{
    DENSE_CHUNK, FREQUENCIES, FirstBlock, FirstLayer, Geometry, NEURONS, OUTPUTS, PREFETCH, SIDE,
    Scratch, TILES, WinogradLayer, parts,
};

/// Lanes of a vector.
const LANES: usize = 16;

type Vector = __m512;

/// How this kernel wants its weights.
pub(super) const GEOMETRY: Geometry = Geometry {
    lanes: LANES,
    direct_vectors: 6,
    gemm_vectors: 4,
};

float_body!("avx512f", gemm: [1, 2, 3, 4], direct: [1, 2, 3, 4, 5, 6]);

#[inline]
#[target_feature(enable = "avx512f")]
fn zero() -> Vector {
    _mm512_setzero_ps()
}

#[inline]
#[target_feature(enable = "avx512f")]
fn splat(value: f32) -> Vector {
    _mm512_set1_ps(value)
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load(values: &[f32; LANES]) -> Vector {
    // SAFETY: the reference covers the 64 bytes that are read.
    unsafe { _mm512_loadu_ps(values.as_ptr()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store(values: &mut [f32; LANES], vector: Vector) {
    // SAFETY: the reference covers the 64 bytes that are written.
    unsafe { _mm512_storeu_ps(values.as_mut_ptr(), vector) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn add(a: Vector, b: Vector) -> Vector {
    _mm512_add_ps(a, b)
}

#[inline]
#[target_feature(enable = "avx512f")]
fn sub(a: Vector, b: Vector) -> Vector {
    _mm512_sub_ps(a, b)
}

#[inline]
#[target_feature(enable = "avx512f")]
fn product(a: Vector, b: Vector) -> Vector {
    _mm512_mul_ps(a, b)
}

/// `a x b + c`, one rounding.
#[inline]
#[target_feature(enable = "avx512f")]
fn multiply_add(a: Vector, b: Vector, c: Vector) -> Vector {
    _mm512_fmadd_ps(a, b, c)
}

#[inline]
#[target_feature(enable = "avx512f")]
fn max(a: Vector, b: Vector) -> Vector {
    _mm512_max_ps(a, b)
}

#[inline]
#[target_feature(enable = "avx512f")]
fn sum_of_lanes(vector: Vector) -> f32 {
    let mut lanes = [0.0; LANES];
    store(&mut lanes, vector);
    lanes.iter().sum()
}

/// Asks for the weights [`PREFETCH`] floats further on, every cache line of them: they come from the third level, too late for the hardware's guess.
#[inline]
#[target_feature(enable = "avx512f")]
fn prefetch(weights: &[f32]) {
    for line in weights.chunks(16) {
        _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().wrapping_add(PREFETCH).cast());
    }
}
